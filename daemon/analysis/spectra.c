/* The spectra of many small symmetric matrices at once.
 *
 * LAPACK takes one matrix after the other, and at some hundred rows waits for memory in the half of the work
 * that is no matrix product. Here a scalar of the textbook's algorithms is a vector of LANES matrices, so that
 * each load serves LANES of them and nothing is shuffled: Householder's reduction to a tridiagonal (Golub & Van
 * Loan, 8.3.1; reduction.h), all eigenvalues by the root-free QL of Pal, Walker and Kahan (Parlett, The Symmetric
 * Eigenvalue Problem, 8.15), and the principal eigenvector by inverse iteration, shifted above the spectrum,
 * where no pivoting is needed.
 *
 * Float32 is enough for the reduction, nearly all of the work, where the features came in it: the matrix is made
 * in float64, scaled to a trace of 1 and rounded, and what follows the reduction is in float64 again. Of such a
 * matrix there is enough to fill vectors with its own rows (tall.h), and one at a time stays in the cache.
 *
 * A matrix smaller than its lane's is filled up with zeros at the end, which change none of its sums: what
 * comes out does not depend on its neighbours, bit for bit.
 * Plain C with the vector extensions of GCC and Clang, built once for each level of processor; knows no Python.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../level.h"

#if defined(__AVX512F__) /* as many as a register holds: wider vectors are taken apart one number at a time */
#define LANES 8
#elif defined(__AVX__)
#define LANES 4
#else
#define LANES 2
#endif
#define HALVES 2                      /* vectors of float64 to one of float32 */
#define ALIGNMENT 64
#define TOLERANCE (0.1 * DBL_EPSILON) /* of the largest eigenvalue: beside the diagonal, less counts for nothing */
#define SHIFT 1e-11                   /* of the principal eigenvalue, by which inverse iteration stays off it */
#define SLIM_TOLERANCE 1e-9           /* the same after a reduction in float32, far below what that rounds off; */
#define SLIM_SHIFT 1e-7               /* the shift far above what the tolerance may do to the eigenvalue */
#define ITERATIONS 2                  /* each divides another eigenvector's share by its distance over the shift */
#define NOUGHT 1e-40                  /* of the largest eigenvalue: QL takes less for this, so as to divide by it */
#define MAX_SWEEPS 50                 /* of QL for each eigenvalue; two are usual */

#define INLINE static inline __attribute__((always_inline))

typedef double lanes __attribute__((vector_size(8 * LANES)));
typedef int64_t mask __attribute__((vector_size(8 * LANES))); /* -1 where it holds, else 0 */
typedef double scalar __attribute__((may_alias));             /* one of the numbers in vectors */

INLINE lanes all(double value) { return (lanes){0} + value; }
INLINE lanes only(mask where, lanes x) { return (lanes)(where & (mask)x); }
INLINE lanes choose(mask where, lanes yes, lanes no) { return (lanes)((where & (mask)yes) | (~where & (mask)no)); }
INLINE lanes absolute(lanes x) { return (lanes)((mask)x & INT64_MAX); }
INLINE lanes root(lanes x) {
    for (int i = 0; i < LANES; i++) x[i] = sqrt(x[i]);
    return x;
}
INLINE double sum_of(lanes x) {
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

#include "reduction.h"
#include "tall.h"
#include "tridiagonal.h"

/* What a call works on; see `lensd_spectra`. */
typedef struct {
    const double *gram, *inner, *weights;
    const int64_t *indices, *counts, *order; /* in which the matrices are taken */
    int64_t width, d_sae;
    double *eigen, *vectors, *moment, *square;
} Work;

/* Up to LANES matrices that are worked on together. */
typedef struct {
    int used;
    int64_t row[LANES], count[LANES]; /* where each lies, and how many of its rows matter: 0 past `used` */
} Batch;

/* Those from `first` on, of those before `end`. */
INLINE Batch batch_from(const Work *work, int64_t first, int64_t end) {
    Batch batch = {.used = 0};
    for (int64_t at = first; at < end && batch.used < LANES; at++, batch.used++) {
        batch.row[batch.used] = work->order[at];
        batch.count[batch.used] = work->counts[work->order[at]];
    }
    return batch;
}

INLINE int64_t tallest(const Batch *batch, int64_t n) {
    for (int k = 0; k < batch->used; k++)
        if (batch->count[k] > n) n = batch->count[k];
    return n;
}

/* S S^T of clouds out of the table of inner products; see geometry.py. Fills the lower triangle of a. */
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

/* LANES matrices from `first` on, all in float64; how many did not converge. */
INLINE int spectra_lanes(const Work *work, int64_t first, int64_t end, lanes *room) {
    Batch batch = batch_from(work, first, end);
    int64_t n = tallest(&batch, 1);
    Reduction r = laid_out_lanes(room, n);
    Group g = grouped(room + room_lanes(n), n);
    take(work, &batch, &r, n);
    reduce_lanes(&r, n);
    g.d = r.d;
    g.e = r.e;
    int left = eigenvalues(&g, 1, n, TOLERANCE);
    principal(&g, n, batch.count, SHIFT);
    reflect_lanes(&r, n, g.x);
    give(work, &batch, g.q, work->eigen);
    give(work, &batch, g.x, work->vectors);
    return left;
}

/* What to multiply a matrix with for a trace of 1; a matrix of zeros stays as it is. */
INLINE double over_trace(double trace) { return trace > 0 ? 1 / trace : 1; }

/* How much room `look_up_tall` takes, in vectors. */
INLINE int64_t room_made(int64_t n) { return (n + 2) * HALVES * across_tall(n); }

/* S S^T of one cloud as `look_up` makes it, times what is returned. */
INLINE double look_up_tall(const Work *work, int64_t row, const Tall *t, lanes *room) {
    const int64_t *restrict indices = work->indices + row * work->width, n = t->n, stride = HALVES * t->across;
    const double *restrict weights = work->weights + row * work->width;
    lanes *restrict w = room, *restrict to_centroid = w + stride, *restrict rest = to_centroid + stride;
    for (int64_t j = 0; j < stride; j++) w[j] = to_centroid[j] = all(0);
    memcpy(w, weights, n * sizeof(double));
    double total = 0, trace = 0;
    for (int64_t i = 0; i < n; i++) {
        const double *restrict from = work->inner + indices[i] * work->d_sae;
        lanes *restrict a = rest + i * stride;
        int64_t own = i / ACROSS;
        for (int64_t j = stride - HALVES; j < stride; j++) a[j] = all(0);
        for (int64_t j = own * ACROSS; j < n; j++) ((scalar *)a)[j] = from[indices[j]];
        lanes sum = all(0);
        for (int64_t j = own * HALVES; j < (own + 1) * HALVES; j++) sum += a[j] * w[j];
        for (int64_t j = (own + 1) * HALVES; j < stride; j++) {
            sum += a[j] * w[j];
            to_centroid[j] += a[j] * weights[i];
        }
        ((scalar *)to_centroid)[i] += sum_of(sum);
        total += weights[i] * ((scalar *)a)[i];
    }
    lanes square = all(0);
    for (int64_t j = 0; j < stride; j++) square += w[j] * to_centroid[j];
    double of_centroid = sum_of(square);
    for (int64_t j = 0; j < stride; j++) {
        to_centroid[j] -= 0.5 * of_centroid;
        w[j] = root(w[j]);
    }
    for (int64_t i = 0; i < n; i++)
        trace += weights[i] * (((scalar *)(rest + i * stride))[i] - 2 * ((scalar *)to_centroid)[i]);
    double scale = over_trace(trace);
    for (int64_t i = 0; i < n; i++) {
        lanes *restrict a = rest + i * stride;
        double of_row = ((scalar *)to_centroid)[i], by = ((scalar *)w)[i] * scale;
        for (int64_t j = i / ACROSS * HALVES; j < stride; j++) a[j] = (a[j] - of_row - to_centroid[j]) * by * w[j];
        round_row(t, i, a);
    }
    work->moment[row] = total;
    work->square[row] = of_centroid;
    return scale;
}

/* A matrix of `gram`, times what is returned. */
INLINE double copy_in_tall(const Work *work, int64_t row, const Tall *t, lanes *a) {
    const double *gram = work->gram + row * work->width * work->width;
    double trace = 0;
    for (int64_t i = 0; i < t->n; i++) trace += gram[i * work->width + i];
    double scale = over_trace(trace);
    for (int64_t j = 0; j < HALVES * t->across; j++) a[j] = all(0);
    for (int64_t i = 0; i < t->n; i++) {
        for (int64_t j = i / ACROSS * ACROSS; j < t->n; j++) ((scalar *)a)[j] = gram[i * work->width + j] * scale;
        round_row(t, i, a);
    }
    return scale;
}

/* HALVES times LANES matrices from `first` on, each reduced by itself in float32; how many did not converge. */
INLINE int spectra_tall(const Work *work, int64_t first, int64_t end, lanes *room, slim *tall_room) {
    Batch batch[HALVES];
    Tall tall[HALVES][LANES];
    Group g[HALVES];
    lanes scale[HALVES];
    int64_t n = 1;
    for (int h = 0; h < HALVES; h++) {
        batch[h] = batch_from(work, first + h * LANES, end);
        n = tallest(&batch[h], n);
    }
    for (int h = 0; h < HALVES; h++) {
        g[h] = grouped(room + h * GROUP_PARTS * n, n);
        scale[h] = all(1);
        for (int64_t i = 0; i < n; i++) g[h].d[i] = g[h].e[i] = all(0);
        for (int k = 0; k < batch[h].used; k++) {
            Tall *t = &tall[h][k];
            *t = laid_out_tall(tall_room, batch[h].count[k]);
            tall_room += room_tall(t->n);
            lanes *rest = room + HALVES * GROUP_PARTS * n;
            scale[h][k] = work->gram ? copy_in_tall(work, batch[h].row[k], t, rest)
                                     : look_up_tall(work, batch[h].row[k], t, rest);
            reduce_tall(t);
            for (int64_t i = 0; i < t->n; i++) {
                g[h].d[i][k] = t->d[i];
                g[h].e[i][k] = t->e[i];
            }
        }
    }
    int left = eigenvalues(g, HALVES, n, SLIM_TOLERANCE);
    for (int h = 0; h < HALVES; h++) {
        principal(&g[h], n, batch[h].count, SLIM_SHIFT);
        for (int64_t i = 0; i < n; i++) g[h].q[i] /= scale[h];
        give(work, &batch[h], g[h].q, work->eigen);
        for (int k = 0; k < batch[h].used; k++) {
            const Tall *t = &tall[h][k];
            slim *x = t->w; /* free by now */
            for (int64_t j = 0; j < t->across; j++) x[j] = (slim){0};
            for (int64_t i = 0; i < t->n; i++) ((slim_scalar *)x)[i] = (float)g[h].x[i][k];
            reflect_tall(t, x);
            for (int64_t i = 0; i < t->n; i++) g[h].x[i][k] = at(x, i);
        }
        give(work, &batch[h], g[h].x, work->vectors);
    }
    return left;
}

INLINE void *reserved(int64_t bytes) { return aligned_alloc(ALIGNMENT, (bytes / ALIGNMENT + 1) * ALIGNMENT); }

/* Spectra of `rows` matrices of at most `width` rows; `counts` of them matter, the rest is 0. Either `gram`
 * (rows, width, width) or, where that is NULL, by `indices` and `weights` (rows, width) out of `inner`
 * (d_sae, d_sae), with `moment` and `square` (rows). Fills eigenvalues (rows, width), in no order, and vectors
 * (rows, width). Where `slim_from` rows or more matter the reduction is in float32, else in float64. Returns
 * how many did not converge, or -1 without memory. */
int lensd_spectra(const double *gram, const double *inner, int64_t d_sae, const int64_t *indices,
                  const double *weights, const int64_t *counts, int64_t rows, int64_t width, int64_t slim_from,
                  double *eigen, double *vectors, double *moment, double *square) {
    if (!rows) return 0;
    int64_t *order = malloc(rows * sizeof(int64_t)), exact = 0, n = 1, n_tall = 1;
    if (!order) return -1;
    for (int64_t row = 0; row < rows; row++) {
        if (counts[row] >= slim_from) continue;
        order[exact++] = row;
        if (counts[row] > n) n = counts[row];
    }
    int64_t taken = exact;
    for (int64_t row = 0; row < rows; row++) {
        if (counts[row] < slim_from) continue;
        order[taken++] = row;
        if (counts[row] > n_tall) n_tall = counts[row];
    }
    int64_t of_lanes = room_lanes(n) + GROUP_PARTS * n, of_tall = room_made(n_tall) + HALVES * GROUP_PARTS * n_tall;
    int64_t together = rows - exact < HALVES * LANES ? rows - exact : HALVES * LANES;
    lanes *room = reserved((of_lanes > of_tall ? of_lanes : of_tall) * sizeof(lanes));
    slim *tall_room = reserved(together * room_tall(n_tall) * sizeof(slim));
    int left = -1;
    if (room && tall_room) {
        Work work = {.gram = gram, .inner = inner, .weights = weights, .indices = indices, .counts = counts,
                     .order = order, .width = width, .d_sae = d_sae, .eigen = eigen, .vectors = vectors,
                     .moment = moment, .square = square};
        memset(eigen, 0, sizeof(double) * rows * width);
        memset(vectors, 0, sizeof(double) * rows * width);
        left = 0;
        for (int64_t first = 0; first < exact; first += LANES) left += spectra_lanes(&work, first, exact, room);
        for (int64_t first = exact; first < rows; first += HALVES * LANES)
            left += spectra_tall(&work, first, rows, room, tall_room);
    }
    free(order);
    free(room);
    free(tall_room);
    return left;
}

/* sums (rows, d) = for each row, the first `counts` of its weights (rows, width) times rows of the table (M, d). */
void lensd_weighted_sums(const float *table, int64_t d, const int64_t *indices, const double *weights,
                         const int64_t *counts, int64_t rows, int64_t width, double *sums) {
    if (!rows) return;
    memset(sums, 0, sizeof(double) * rows * d);
    for (int64_t row = 0; row < rows; row++) {
        double *restrict sum = sums + row * d;
        for (int64_t i = 0; i < counts[row]; i++) {
            const float *restrict from = table + indices[row * width + i] * d;
            double weight = weights[row * width + i];
            for (int64_t j = 0; j < d; j++) sum[j] += weight * from[j];
        }
    }
}
