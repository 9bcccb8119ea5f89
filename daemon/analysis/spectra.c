/* The spectra of many small symmetric matrices at once: one matrix in each lane of a vector.
 *
 * LAPACK takes one matrix after the other, and at some hundred rows waits for memory in the half of the work
 * that is no matrix product. Here every scalar of the textbook's algorithms is a vector of LANES matrices, so
 * that each load serves LANES of them and nothing is shuffled: Householder's reduction to a tridiagonal
 * (Golub & Van Loan, 8.3.1; reduction.h), all eigenvalues by the root-free QL of Pal, Walker and Kahan (Parlett,
 * The Symmetric Eigenvalue Problem, 8.15), and the principal eigenvector by inverse iteration, shifted above the
 * spectrum, where no pivoting is needed.
 *
 * Float32 is enough for the reduction, nearly all of the work, where the features came in it: the matrix is made
 * in float64, scaled to a trace of 1 and rounded, and what follows the reduction is in float64 again.
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

#if defined(__AVX512F__) /* as many as a register holds: wider vectors are taken apart one number at a time */
#define LANES 8
#elif defined(__AVX__)
#define LANES 4
#else
#define LANES 2
#endif
#define HALVES 2         /* groups of LANES that one reduction in float32 holds */
#define ALIGNMENT 64
#define SHIFT 1e-11      /* of the principal eigenvalue, by which inverse iteration stays off it */
#define ITERATIONS 2     /* of it: each divides another eigenvector's share by its distance over SHIFT */
#define MAX_SWEEPS 50    /* of QL for each eigenvalue; two are usual */

#define INLINE static inline __attribute__((always_inline))

typedef double lanes __attribute__((vector_size(8 * LANES)));
typedef int64_t mask __attribute__((vector_size(8 * LANES))); /* -1 where it holds, else 0 */
typedef float slim __attribute__((vector_size(4 * HALVES * LANES)));
typedef int32_t slim_mask __attribute__((vector_size(4 * HALVES * LANES)));
typedef float half __attribute__((vector_size(4 * LANES), may_alias));

#define WIDTH LANES
#define VECTOR lanes
#define MASK mask
#define SIGN INT64_MIN
#define ROOT sqrt
#define NAME(f) f##_exact
#include "reduction.h"
#undef WIDTH
#undef VECTOR
#undef MASK
#undef SIGN
#undef ROOT
#undef NAME
#define WIDTH (HALVES * LANES)
#define VECTOR slim
#define MASK slim_mask
#define SIGN INT32_MIN
#define ROOT sqrtf
#define NAME(f) f##_slim
#include "reduction.h"

/* What a group of LANES matrices needs besides, in vectors of n. */
typedef struct {
    lanes *d, *e;     /* of the tridiagonal: its diagonal, and what is beside it */
    lanes *q, *f;     /* eigenvalues in the making: diagonal, and squares of what is beside it */
    lanes *x, *pivot; /* the eigenvector */
} Group;

#define GROUP_PARTS 6

INLINE Group grouped(lanes *room, int64_t n) {
    return (Group){.d = room, .e = room + n, .q = room + 2 * n, .f = room + 3 * n, .x = room + 4 * n,
                   .pivot = room + 5 * n};
}

INLINE lanes all(double value) { return (lanes){0} + value; }
INLINE lanes absolute(lanes x) { return (lanes)((mask)x & INT64_MAX); }
INLINE lanes root(lanes x) {
    for (int i = 0; i < LANES; i++) x[i] = sqrt(x[i]);
    return x;
}

/* All eigenvalues of the tridiagonals of one or two groups, in q, in no order; how many lanes did not converge.
 *
 * A step waits for the one before it, and most of all for its divisions: two groups side by side take hardly longer
 * than one. */
INLINE int eigenvalues(const Group *g, const int groups, int64_t n) {
    lanes small[HALVES];
    int64_t l[HALVES][LANES] = {{0}};
    for (int h = 0; h < groups; h++) {
        lanes norm = all(0);
        for (int64_t i = 0; i < n; i++) {
            g[h].q[i] = g[h].d[i];
            g[h].f[i] = g[h].e[i] * g[h].e[i];
            lanes size = absolute(g[h].q[i]) + absolute(g[h].e[i]);
            norm = choose_exact(size > norm, size, norm);
        }
        small[h] = norm * (0.1 * DBL_EPSILON);
        small[h] *= small[h]; /* a square below it is nothing beside the largest eigenvalue */
    }
    for (int64_t sweeps = 0; sweeps < MAX_SWEEPS * n; sweeps++) {
        lanes sigma[HALVES], from[HALVES], to[HALVES], c[HALVES], s[HALVES], gamma[HALVES], p[HALVES];
        int64_t top = 0, bottom = n;
        for (int h = 0; h < groups; h++) {
            const lanes *q = g[h].q, *f = g[h].f;
            sigma[h] = to[h] = s[h] = gamma[h] = all(0);
            c[h] = all(1);
            lanes ends = all((double)(n - 1));
            int64_t least = n;
            for (int i = 0; i < LANES; i++) { /* of each lane, the next block that is not yet diagonal */
                while (l[h][i] + 1 < n && f[l[h][i]][i] <= small[h][i]) l[h][i]++;
                from[h][i] = (double)l[h][i];
                if (l[h][i] < least) least = l[h][i];
            }
            for (int64_t i = n - 2; i > least; i--)
                ends = choose_exact((f[i] <= small[h]) & (all((double)i) > from[h]), all((double)i), ends);
            for (int i = 0; i < LANES; i++) {
                int64_t first = l[h][i], last = (int64_t)ends[i];
                if (first + 1 >= n) continue;
                double side = sqrt(f[first][i]), lower = q[first][i];
                double half = (q[first + 1][i] - lower) / (2 * side);
                sigma[h][i] = lower - side / (half + copysign(sqrt(half * half + 1), half));
                gamma[h][i] = q[last][i] - sigma[h][i];
                to[h][i] = (double)last;
                if (last > top) top = last;
                if (first < bottom) bottom = first;
            }
            p[h] = gamma[h] * gamma[h];
        }
        if (top == 0) return 0;
        for (int64_t i = top - 1; i >= bottom; i--) {
            lanes here = all((double)i);
            for (int h = 0; h < groups; h++) {
                lanes *restrict q = g[h].q, *restrict f = g[h].f;
                mask active = (here < to[h]) & (here >= from[h]);
                mask first = here + 1 == to[h];
                lanes b = f[i], r = p[h] + b;
                lanes over_c = r / p[h]; /* beside the other division, not after it */
                lanes over_r = all(1) / r;
                f[i + 1] = choose_exact(active & ~first, s[h] * r, f[i + 1]);
                lanes c_new = p[h] * over_r, s_new = b * over_r, diagonal = q[i];
                lanes gamma_new = c_new * (diagonal - sigma[h]) - s_new * gamma[h];
                q[i + 1] = choose_exact(active, gamma[h] + (diagonal - gamma_new), q[i + 1]);
                lanes p_new = choose_exact(c_new != all(0), gamma_new * gamma_new * over_c, c[h] * b);
                c[h] = choose_exact(active, c_new, c[h]);
                s[h] = choose_exact(active, s_new, s[h]);
                gamma[h] = choose_exact(active, gamma_new, gamma[h]);
                p[h] = choose_exact(active, p_new, p[h]);
            }
        }
        for (int h = 0; h < groups; h++)
            for (int i = 0; i < LANES; i++) {
                int64_t first = l[h][i];
                if (first + 1 >= n) continue;
                g[h].f[first][i] = s[h][i] * p[h][i];
                g[h].q[first][i] = sigma[h][i] + gamma[h][i];
            }
    }
    int left = 0;
    for (int h = 0; h < groups; h++)
        for (int i = 0; i < LANES; i++) left += l[h][i] + 1 < n;
    return left;
}

/* The unit eigenvector of the tridiagonal's largest eigenvalue, in x; arbitrary where that is not above zero. */
INLINE void principal(Group *g, int64_t n, const int64_t *counts) {
    lanes *restrict x = g->x, *restrict pivot = g->pivot;
    lanes largest = all(0);
    for (int64_t i = 0; i < n; i++) largest = choose_exact(g->q[i] > largest, g->q[i], largest);
    lanes shift = choose_exact(largest > all(0), largest * (1 + SHIFT), all(1));
    for (int64_t i = 0; i < n; i++) { /* no symmetry makes this start orthogonal to it */
        double start = cos(pow((double)(i + 1), 1.5));
        for (int k = 0; k < LANES; k++) x[i][k] = i < counts[k] ? start : 0;
        pivot[i] = shift - g->d[i];
        if (i) pivot[i] -= g->e[i - 1] * g->e[i - 1] / pivot[i - 1];
    }
    for (int step = 0; step < ITERATIONS; step++) {
        for (int64_t i = 1; i < n; i++) x[i] += g->e[i - 1] / pivot[i - 1] * x[i - 1];
        x[n - 1] /= pivot[n - 1];
        for (int64_t i = n - 2; i >= 0; i--) x[i] = (x[i] + g->e[i] * x[i + 1]) / pivot[i];
        lanes square = all(0);
        for (int64_t i = 0; i < n; i++) square += x[i] * x[i];
        lanes over = all(1) / root(square);
        for (int64_t i = 0; i < n; i++) x[i] *= over;
    }
}

/* What to multiply a matrix with for a trace of 1; a matrix of zeros stays as it is. */
INLINE lanes over_trace(const lanes *a, int64_t n) {
    lanes trace = all(0);
    for (int64_t i = 0; i < n; i++) trace += a[i * n + i];
    return choose_exact(trace > all(0), all(1) / trace, all(1));
}

/* One of the halves of a vector. */
INLINE half *half_of(slim *vector, int which) { return (half *)vector + which; }

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
INLINE void look_up(const Work *work, const Batch *batch, const Reduction_exact *r, int64_t n) {
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

INLINE void take(const Work *work, const Batch *batch, const Reduction_exact *r, int64_t n) {
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
INLINE int spectra_exact(const Work *work, int64_t first, int64_t end, lanes *room) {
    Batch batch = batch_from(work, first, end);
    int64_t n = tallest(&batch, 1);
    Reduction_exact r = laid_out_exact(room, n);
    Group g = grouped(room + room_exact(n), n);
    take(work, &batch, &r, n);
    reduce_exact(&r, n);
    g.d = r.d;
    g.e = r.e;
    int left = eigenvalues(&g, 1, n);
    principal(&g, n, batch.count);
    reflect_exact(&r, n, g.x);
    give(work, &batch, g.q, work->eigen);
    give(work, &batch, g.x, work->vectors);
    return left;
}

/* HALVES times LANES matrices from `first` on, reduced in float32; how many did not converge. */
INLINE int spectra_slim(const Work *work, int64_t first, int64_t end, lanes *room, slim *slim_room) {
    Batch batch[HALVES];
    lanes scale[HALVES];
    int64_t n = 1;
    for (int h = 0; h < HALVES; h++) {
        batch[h] = batch_from(work, first + h * LANES, end);
        n = tallest(&batch[h], n);
    }
    Reduction_exact made = laid_out_exact(room, n);
    Reduction_slim r = laid_out_slim(slim_room, n);
    Group g[HALVES];
    for (int h = 0; h < HALVES; h++) {
        g[h] = grouped(room + room_exact(n) + h * GROUP_PARTS * n, n);
        take(work, &batch[h], &made, n);
        scale[h] = over_trace(made.a, n);
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j <= i; j++)
                *half_of(&r.a[i * n + j], h) = __builtin_convertvector(made.a[i * n + j] * scale[h], half);
    }
    reduce_slim(&r, n);
    slim *x = r.v; /* free by now */
    for (int h = 0; h < HALVES; h++)
        for (int64_t i = 0; i < n; i++) {
            g[h].d[i] = __builtin_convertvector(*half_of(&r.d[i], h), lanes);
            g[h].e[i] = __builtin_convertvector(*half_of(&r.e[i], h), lanes);
        }
    int left = eigenvalues(g, HALVES, n);
    for (int h = 0; h < HALVES; h++) {
        principal(&g[h], n, batch[h].count);
        for (int64_t i = 0; i < n; i++) {
            g[h].q[i] /= scale[h];
            *half_of(&x[i], h) = __builtin_convertvector(g[h].x[i], half);
        }
        give(work, &batch[h], g[h].q, work->eigen);
    }
    reflect_slim(&r, n, x);
    for (int h = 0; h < HALVES; h++) {
        for (int64_t i = 0; i < n; i++) g[h].x[i] = __builtin_convertvector(*half_of(&x[i], h), lanes);
        give(work, &batch[h], g[h].x, work->vectors);
    }
    return left;
}

/* Spectra of `rows` matrices of at most `width` rows; `counts` of them matter, the rest is 0. Either `gram`
 * (rows, width, width) or, where that is NULL, by `indices` and `weights` (rows, width) out of `inner`
 * (d_sae, d_sae), with `moment` and `square` (rows). Fills eigenvalues (rows, width), in no order, and vectors
 * (rows, width). Where `slim_from` rows or more matter the reduction is in float32, else in float64. Returns
 * how many did not converge, or -1 without memory. */
int lensd_spectra(const double *gram, const double *inner, int64_t d_sae, const int64_t *indices,
                  const double *weights, const int64_t *counts, int64_t rows, int64_t width, int64_t slim_from,
                  double *eigen, double *vectors, double *moment, double *square) {
    int64_t *order = malloc((rows + 1) * sizeof(int64_t));
    lanes *room = aligned_alloc(ALIGNMENT, (room_exact(width) + HALVES * GROUP_PARTS * width) * sizeof(lanes));
    slim *slim_room = aligned_alloc(ALIGNMENT, room_slim(width) * sizeof(slim));
    int left = -1;
    if (order && room && slim_room) {
        int64_t exact = 0, at = 0;
        for (int64_t row = 0; row < rows; row++)
            if (counts[row] < slim_from) order[exact++] = row;
        at = exact;
        for (int64_t row = 0; row < rows; row++)
            if (counts[row] >= slim_from) order[at++] = row;
        Work work = {.gram = gram, .inner = inner, .weights = weights, .indices = indices, .counts = counts,
                     .order = order, .width = width, .d_sae = d_sae, .eigen = eigen, .vectors = vectors,
                     .moment = moment, .square = square};
        memset(eigen, 0, sizeof(double) * rows * width);
        memset(vectors, 0, sizeof(double) * rows * width);
        left = 0;
        for (int64_t first = 0; first < exact; first += LANES) left += spectra_exact(&work, first, exact, room);
        for (int64_t first = exact; first < rows; first += HALVES * LANES)
            left += spectra_slim(&work, first, rows, room, slim_room);
    }
    free(order);
    free(room);
    free(slim_room);
    return left;
}

/* The highest level of x86-64 that this processor has and that is built for: 4, 3 or 0. */
int lensd_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512cd");
    return wide ? 4 : 3;
#else
    return 0;
#endif
}

/* sums (rows, d) = for each row, the first `counts` of its weights (rows, width) times rows of the table (M, d). */
void lensd_weighted_sums(const float *table, int64_t d, const int64_t *indices, const double *weights,
                         const int64_t *counts, int64_t rows, int64_t width, double *sums) {
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
