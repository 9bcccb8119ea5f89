/* The operations of `daemon.durable`, several in turn, without the interpreter's lock.

Where small files are many, most of the time of an operation goes into giving the lock up and waiting to have
it back. One call here gives it up once, for any number of files. */

#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* As `durable.StepKind` counts them. */
enum { MAKE_NEW_FOLDER, WRITE_WHOLE, FSYNC_FILE, FSYNC_FOLDER, RENAME, MOVE, WRITE_NOTE, UNLINK };
enum { DONE = 0, FAILED = -1, NOT_SYNCED = -2 }; /* the last: the disk refused an fsync */

typedef struct {
    int kind;
    PyObject *path; /* bytes */
    PyObject *name; /* bytes: the other one of two; NULL where there is none */
    Py_buffer content; /* .obj NULL where there is none */
} Step;

static int put_all(int descriptor, const char *data, Py_ssize_t size) {
    while (size > 0) {
        ssize_t written = write(descriptor, data, (size_t)size);
        if (written < 0) {
            if (errno == EINTR)
                continue;
            return FAILED;
        }
        data += written;
        size -= written;
    }
    return DONE;
}

/* Close, and keep the error of what came before. */
static int closed(int descriptor, int result) {
    int error = errno;
    if (close(descriptor) < 0 && result == DONE)
        return FAILED;
    errno = error;
    return result;
}

static int write_new(const char *path, const Py_buffer *content, int to_disk) {
    int descriptor = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor < 0)
        return FAILED;
    int result = put_all(descriptor, content->buf, content->len);
#ifdef SYNC_FILE_RANGE_WRITE
    if (result == DONE && to_disk)
        (void)sync_file_range(descriptor, 0, 0, SYNC_FILE_RANGE_WRITE); /* makes nothing durable: only sooner */
#endif
    return closed(descriptor, result);
}

static int flush(const char *path, int flags) {
    int descriptor = open(path, flags);
    if (descriptor < 0)
        return FAILED;
    int result = DONE;
    while (fsync(descriptor) < 0)
        if (errno != EINTR) {
            result = NOT_SYNCED;
            break;
        }
    return closed(descriptor, result);
}

static int move(const char *source, const char *target) {
#if defined(SYS_renameat2) && defined(RENAME_NOREPLACE)
    return (int)syscall(SYS_renameat2, AT_FDCWD, source, AT_FDCWD, target, RENAME_NOREPLACE);
#else
    (void)source, (void)target;
    errno = ENOSYS;
    return FAILED;
#endif
}

static int take(const Step *step) {
    const char *path = PyBytes_AS_STRING(step->path);
    const char *name = step->name == NULL ? "" : PyBytes_AS_STRING(step->name);
    switch (step->kind) {
    case MAKE_NEW_FOLDER:
        return mkdir(path, 0777);
    case WRITE_WHOLE:
        return write_new(path, &step->content, 1);
    case FSYNC_FILE:
        return flush(path, O_RDONLY | O_CLOEXEC);
    case FSYNC_FOLDER:
        return flush(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    case RENAME:
        return rename(path, name);
    case MOVE:
        return move(path, name);
    case WRITE_NOTE:
        return write_new(path, &step->content, 0);
    case UNLINK:
        return unlink(path);
    }
    errno = EINVAL;
    return FAILED;
}

static int read_step(PyObject *item, Step *step) {
    PyObject *operand;
    if (!PyArg_ParseTuple(item, "iO&O", &step->kind, PyUnicode_FSConverter, &step->path, &operand))
        return -1;
    if (operand == Py_None)
        return 0;
    if (PyUnicode_Check(operand))
        return PyUnicode_FSConverter(operand, &step->name) ? 0 : -1;
    return PyObject_GetBuffer(operand, &step->content, PyBUF_SIMPLE);
}

static PyObject *in_turn(PyObject *module, PyObject *argument) {
    (void)module;
    PyObject *items = PySequence_Fast(argument, "steps must be a sequence");
    if (items == NULL)
        return NULL;
    Py_ssize_t count = PySequence_Fast_GET_SIZE(items), ready = 0, taken = 0;
    int result = DONE, error = 0;
    PyObject *report = NULL;
    Step *steps = calloc(count ? (size_t)count : 1, sizeof *steps);
    if (steps == NULL) {
        PyErr_NoMemory();
        goto end;
    }
    for (; ready < count; ready++)
        if (read_step(PySequence_Fast_GET_ITEM(items, ready), &steps[ready]) < 0)
            goto end;
    Py_BEGIN_ALLOW_THREADS
    while (taken < count && (result = take(&steps[taken])) == DONE)
        taken++;
    if (result != DONE)
        error = errno;
    Py_END_ALLOW_THREADS
    report = Py_BuildValue("niO", taken, error, result == NOT_SYNCED ? Py_True : Py_False);
end:
    for (Py_ssize_t i = 0; steps != NULL && i < count; i++) {
        Py_XDECREF(steps[i].path);
        Py_XDECREF(steps[i].name);
        if (steps[i].content.obj != NULL)
            PyBuffer_Release(&steps[i].content);
    }
    free(steps);
    Py_DECREF(items);
    return report;
}

static PyMethodDef methods[] = {
    {"in_turn", in_turn, METH_O,
     "Take (kind, path, operand) steps until one fails: how many were taken, errno or 0, whether an fsync failed."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_durable", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__durable(void) { return PyModule_Create(&definition); }
