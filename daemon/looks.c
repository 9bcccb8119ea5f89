/* The looks of `daemon.looks`, at many files, without the interpreter's lock, which one call gives up once. */

#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct {
    PyObject *path; /* bytes */
    int error;      /* errno, 0 where the look told something */
    struct stat status;
    char *content; /* .status.st_size bytes */
} Look;

static void forget(Look *looks, Py_ssize_t count) {
    for (Py_ssize_t i = 0; looks != NULL && i < count; i++) {
        Py_XDECREF(looks[i].path);
        free(looks[i].content);
    }
    free(looks);
}

/* One for each of a sequence of paths; NULL with an exception. */
static Look *looks_at(PyObject *paths, Py_ssize_t *count) {
    PyObject *items = PySequence_Fast(paths, "paths must be a sequence");
    if (items == NULL)
        return NULL;
    *count = PySequence_Fast_GET_SIZE(items);
    Look *looks = calloc(*count ? (size_t)*count : 1, sizeof *looks);
    if (looks == NULL)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; looks != NULL && i < *count; i++)
        if (!PyUnicode_FSConverter(PySequence_Fast_GET_ITEM(items, i), &looks[i].path)) {
            forget(looks, *count);
            looks = NULL;
        }
    Py_DECREF(items);
    return looks;
}

static long long nanoseconds(struct timespec time) { return (long long)time.tv_sec * 1000000000LL + time.tv_nsec; }

static PyObject *described(const Look *look) {
    const struct stat *status = &look->status;
    if (look->error == ENOENT)
        Py_RETURN_NONE;
    if (look->error != 0) {
        errno = look->error;
        return PyErr_SetFromErrnoWithFilename(PyExc_OSError, PyBytes_AS_STRING(look->path));
    }
    return Py_BuildValue("KKKLLL", (unsigned long long)status->st_mode, (unsigned long long)status->st_dev,
                         (unsigned long long)status->st_ino, (long long)status->st_size,
                         nanoseconds(status->st_mtim), nanoseconds(status->st_ctim));
}

static PyObject *content_of(const Look *look) {
    if (look->content == NULL)
        Py_RETURN_NONE;
    return PyBytes_FromStringAndSize(look->content, (Py_ssize_t)look->status.st_size);
}

static PyObject *told(Look *looks, Py_ssize_t count, PyObject *(*tell)(const Look *)) {
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list != NULL && i < count; i++) {
        PyObject *item = tell(&looks[i]);
        if (item == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, item);
    }
    forget(looks, count);
    return list;
}

static PyObject *lstat_each(PyObject *module, PyObject *paths) {
    (void)module;
    Py_ssize_t count;
    Look *looks = looks_at(paths, &count);
    if (looks == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++)
        if (lstat(PyBytes_AS_STRING(looks[i].path), &looks[i].status) < 0)
            looks[i].error = errno;
    Py_END_ALLOW_THREADS
    return told(looks, count, described);
}

/* Leaves `content` NULL unless all of a small regular file came at one go. */
static void read_one(Look *look, long long max_bytes) {
    int file = open(PyBytes_AS_STRING(look->path), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (file < 0)
        return;
    if (fstat(file, &look->status) == 0 && S_ISREG(look->status.st_mode) && look->status.st_size <= max_bytes) {
        size_t size = (size_t)look->status.st_size;
        char *content = malloc(size + 1);
        if (content != NULL && read(file, content, size + 1) == (ssize_t)size)
            look->content = content;
        else
            free(content);
    }
    (void)close(file);
}

static PyObject *read_small(PyObject *module, PyObject *arguments) {
    (void)module;
    PyObject *paths;
    long long max_bytes;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(arguments, "OL", &paths, &max_bytes))
        return NULL;
    Look *looks = looks_at(paths, &count);
    if (looks == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++)
        read_one(&looks[i], max_bytes);
    Py_END_ALLOW_THREADS
    return told(looks, count, content_of);
}

static PyMethodDef methods[] = {
    {"lstat_each", lstat_each, METH_O, "(mode, device, inode, size, mtime_ns, ctime_ns) of each path, None for none."},
    {"read_small", read_small, METH_VARARGS, "What each file of at most so many bytes holds, None where it is none."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_looks", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__looks(void) { return PyModule_Create(&definition); }
