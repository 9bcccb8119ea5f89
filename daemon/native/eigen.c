/* Eigenvalues and principal eigenvectors of many small symmetric matrices at once.
 *
 * LAPACK takes one matrix after the other, and at some hundred rows waits for memory in the half of the work
 * that is no matrix product. Here a scalar of the textbook's algorithms is a vector of LANES matrices, so that
 * each load serves LANES of them and nothing is shuffled: Householder's reduction to a tridiagonal (Golub & Van
 * Loan, 8.3.1; householder.h), all eigenvalues by the root-free QL of Pal, Walker and Kahan (Parlett, The
 * Symmetric Eigenvalue Problem, 8.15), and the principal eigenvector by inverse iteration, shifted above all
 * eigenvalues, where no pivoting is needed (tridiagonal.h).
 *
 * A matrix smaller than its lane's is filled up with zeros at the end, which change none of its sums: its results
 * do not depend on its neighbours, bit for bit.
 * Plain C with the vector extensions of GCC and Clang; knows no Python.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "clones.h"

#define LANES 4 /* numbers in a vector, which is a register of AVX2 */
#define ALIGNMENT 64
#define TOLERANCE (0.1 * DBL_EPSILON) /* of the largest eigenvalue: beside the diagonal, less counts as zero */
#define SHIFT 1e-11                   /* of the principal eigenvalue, by which inverse iteration stays off it */
#define ITERATIONS 2                  /* each divides another eigenvector's share by its distance over the shift */
#define NOUGHT 1e-40                  /* of the largest eigenvalue: QL takes less for this, so as to divide by it */
#define MAX_SWEEPS 50                 /* of QL for each eigenvalue; two are usual */

typedef double lanes __attribute__((vector_size(8 * LANES)));
typedef int64_t mask __attribute__((vector_size(8 * LANES))); /* -1 where it holds, else 0 */

INLINE lanes all(double value) { return (lanes){0} + value; }
INLINE lanes only(mask where, lanes x) { return (lanes)(where & (mask)x); }
INLINE lanes choose(mask where, lanes yes, lanes no) { return (lanes)((where & (mask)yes) | (~where & (mask)no)); }
INLINE lanes absolute(lanes x) { return (lanes)((mask)x & INT64_MAX); }
INLINE lanes root(lanes x) {
    for (int i = 0; i < LANES; i++) x[i] = sqrt(x[i]);
    return x;
}

#include "householder.h"
#include "tridiagonal.h"

/* The arguments of a call; see `lensd_eigen`. */
typedef struct {
    const double *gram, *inner, *weights;
    const int64_t *indices, *counts;
    int64_t rows, width, d_sae;
    double *values, *vectors, *moment, *square;
} Work;

/* Up to LANES matrices that are worked on together. */
typedef struct {
    int used;
    int64_t row[LANES], count[LANES]; /* its number, and how many of its rows matter: 0 past `used` */
} Batch;

INLINE Batch batch_from(const Work *work, int64_t first) {
    Batch batch = {.used = 0};
    for (int64_t row = first; row < work->rows && batch.used < LANES; row++, batch.used++) {
        batch.row[batch.used] = row;
        batch.count[batch.used] = work->counts[row];
    }
    return batch;
}

INLINE int64_t tallest(const Batch *batch, int64_t n) {
    for (int k = 0; k < batch->used; k++)
        if (batch->count[k] > n) n = batch->count[k];
    return n;
}

/* Makes S S^T of weighted rows from the table of inner products; see geometry.py. Fills the lower triangle of a. */
INLINE void look_up(const Work *work, const Batch *batch, const Reduction *r, int64_t n) {
    lanes *restrict a = r->a, *restrict w = r->w, *restrict to_centroid = r->p;
    for (int64_t i = 0; i < n; i++) {
        const double *row[LANES];
        to_centroid[i] = w[i] = all(0);
        for (int k = 0; k < LANES; k++) {
            row[k] = NULL;
            if (i >= batch->count[k]) continue;
            int64_t slot = batch->row[k] * work->width + i;
            row[k] = work->inner + work->indices[slot] * work->d_sae;
            w[i][k] = work->weights[slot];
        }
        for (int64_t j = 0; j <= i; j++) {
            lanes value = all(0);
            for (int k = 0; k < LANES; k++)
                if (row[k]) value[k] = row[k][work->indices[batch->row[k] * work->width + j]];
            a[i * n + j] = value;
        }
    }
    lanes total = all(0), of_centroid = all(0);
    for (int64_t i = 0; i < n; i++) {
        lanes sum = to_centroid[i];
        for (int64_t j = 0; j < i; j++) {
            sum += a[i * n + j] * w[j];
            to_centroid[j] += a[i * n + j] * w[i];
        }
        to_centroid[i] = sum + a[i * n + i] * w[i];
        total += w[i] * a[i * n + i];
    }
    for (int64_t i = 0; i < n; i++) of_centroid += w[i] * to_centroid[i];
    for (int64_t i = 0; i < n; i++) {
        to_centroid[i] -= 0.5 * of_centroid;
        w[i] = root(w[i]);
        for (int64_t j = 0; j <= i; j++)
            a[i * n + j] = (a[i * n + j] - to_centroid[i] - to_centroid[j]) * w[i] * w[j];
    }
    for (int k = 0; k < batch->used; k++) {
        work->moment[batch->row[k]] = total[k];
        work->square[batch->row[k]] = of_centroid[k];
    }
}

INLINE void copy_in(const Work *work, const Batch *batch, lanes *restrict a, int64_t n) {
    int64_t width = work->width;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++) {
            lanes value = all(0);
            for (int k = 0; k < LANES; k++)
                if (i < batch->count[k]) value[k] = work->gram[(batch->row[k] * width + i) * width + j];
            a[i * n + j] = value;
        }
}

INLINE void take(const Work *work, const Batch *batch, const Reduction *r, int64_t n) {
    if (work->gram)
        copy_in(work, batch, r->a, n);
    else
        look_up(work, batch, r, n);
}

INLINE void give(const Work *work, const Batch *batch, const lanes *from, double *to) {
    for (int k = 0; k < batch->used; k++)
        for (int64_t i = 0; i < batch->count[k]; i++) to[batch->row[k] * work->width + i] = from[i][k];
}

/* LANES matrices from `first` on; returns how many did not converge. */
INLINE int solve(const Work *work, int64_t first, lanes *room) {
    Batch batch = batch_from(work, first);
    int64_t n = tallest(&batch, 1);
    Reduction r = laid_out(room, n);
    Tridiagonal t = tridiagonal(room + room_of_reduction(n), r.d, r.e, n);
    take(work, &batch, &r, n);
    reduce(&r, n);
    int left = eigenvalues(&t);
    principal(&t, batch.count);
    reflect(&r, n, t.x);
    give(work, &batch, t.q, work->values);
    give(work, &batch, t.x, work->vectors);
    return left;
}

/* Eigenvalues (rows, width), in no order, and principal eigenvectors (rows, width) of `rows` matrices. Of each the
 * first `counts` rows and columns matter. The matrices are `gram` (rows, width, width) or, where that is NULL, made
 * from `indices` and `weights` (rows, width) and the table `inner` (d_sae, d_sae), which gives `moment` and `square`
 * (rows) too; see geometry.py. Returns how many did not converge, or -1 without memory. */
CLONES int lensd_eigen(const double *gram, const double *inner, int64_t d_sae, const int64_t *indices,
                       const double *weights, const int64_t *counts, int64_t rows, int64_t width, double *values,
                       double *vectors, double *moment, double *square) {
    int64_t n = 1;
    for (int64_t row = 0; row < rows; row++)
        if (counts[row] > n) n = counts[row];
    int64_t bytes = (room_of_reduction(n) + TRIDIAGONAL_PARTS * n) * sizeof(lanes);
    lanes *room = aligned_alloc(ALIGNMENT, (bytes / ALIGNMENT + 1) * ALIGNMENT);
    if (!room) return -1;
    Work work = {.gram = gram, .inner = inner, .weights = weights, .indices = indices, .counts = counts,
                 .rows = rows, .width = width, .d_sae = d_sae, .values = values, .vectors = vectors,
                 .moment = moment, .square = square};
    memset(values, 0, sizeof(double) * rows * width);
    memset(vectors, 0, sizeof(double) * rows * width);
    int left = 0;
    for (int64_t first = 0; first < rows; first += LANES) left += solve(&work, first, room);
    free(room);
    return left;
}
