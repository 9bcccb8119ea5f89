/* The spectra of many small symmetric matrices at once: one matrix in each lane of a vector.
 *
 * LAPACK takes one matrix after the other, and at some hundred rows waits for memory in the half of the work
 * that is no matrix product. Here every scalar of the textbook's algorithms is a vector of LANES matrices, so
 * that each load serves LANES of them and nothing is shuffled: Householder's reduction to a tridiagonal
 * (Golub & Van Loan, 8.3.1), all eigenvalues by the root-free QL of Pal, Walker and Kahan (Parlett, The
 * Symmetric Eigenvalue Problem, 8.15), and the principal eigenvector by inverse iteration, shifted above the
 * spectrum, where no pivoting is needed.
 *
 * A matrix smaller than its lane's is filled up with zeros at the end, which change none of its sums: what
 * comes out does not depend on its neighbours, bit for bit.
 * Plain C with the vector extensions of GCC and Clang; knows no Python.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8
#define ALIGNMENT 64
#define SHIFT 1e-11      /* of the principal eigenvalue, by which inverse iteration stays off it */
#define ITERATIONS 2     /* of it: each divides another eigenvector's share by its distance over SHIFT */
#define MAX_SWEEPS 50    /* of QL for each eigenvalue; two are usual */

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

typedef double lanes __attribute__((vector_size(8 * LANES)));
typedef int64_t mask __attribute__((vector_size(8 * LANES))); /* -1 where it holds, else 0 */

/* What a group of LANES matrices needs; n rows each. */
typedef struct {
    lanes *a;       /* (n, n) row by row, the lower triangle; then the reflectors, below the diagonal */
    lanes *d, *e;   /* (n) of the tridiagonal: its diagonal, and what is beside it */
    lanes *tau;     /* (n) of the reflectors */
    lanes *v, *w, *p; /* (n) of one step of the reduction */
    lanes *x;       /* (n) the eigenvector */
    lanes *q, *f;   /* (n) eigenvalues in the making: diagonal, and squares of what is beside it */
} Group;

INLINE lanes all(double value) { return (lanes){0} + value; }
INLINE lanes choose(mask where, lanes yes, lanes no) {
    return (lanes)((where & (mask)yes) | (~where & (mask)no));
}
INLINE lanes absolute(lanes x) { return (lanes)((mask)x & INT64_MAX); }
INLINE lanes like_sign(lanes size, lanes sign) {
    return (lanes)(((mask)size & INT64_MAX) | ((mask)sign & INT64_MIN));
}
INLINE lanes root(lanes x) {
    lanes r;
    for (int i = 0; i < LANES; i++) r[i] = sqrt(x[i]);
    return r;
}
INLINE int any(mask m) {
    int64_t found = 0;
    for (int i = 0; i < LANES; i++) found |= m[i];
    return found != 0;
}

/* A = Q T Q^T, the update of each step done in the same pass over A as the product of the next. */
INLINE void tridiagonalise(Group *g, int64_t n) {
    lanes *restrict a = g->a, *restrict v = g->v, *restrict w = g->w, *restrict p = g->p;
    lanes *restrict old_v = g->q, *restrict old_w = g->f;
    for (int64_t i = 0; i < n; i++) old_v[i] = old_w[i] = all(0);
    for (int64_t k = 0; k < n; k++) {
        for (int64_t i = k; i < n; i++) a[i * n + k] -= old_v[i] * old_w[k] + old_w[i] * old_v[k];
        g->d[k] = a[k * n + k];
        g->tau[k] = g->e[k] = all(0);
        if (k + 1 == n) break;
        lanes alpha = a[(k + 1) * n + k], rest = all(0);
        for (int64_t i = k + 2; i < n; i++) rest += a[i * n + k] * a[i * n + k];
        mask flat = rest == all(0); /* nothing to reflect */
        lanes beta = -like_sign(root(alpha * alpha + rest), alpha);
        lanes tau = choose(flat, all(0), (beta - alpha) / beta);
        lanes scale = choose(flat, all(0), all(1) / (alpha - beta));
        g->e[k] = choose(flat, alpha, beta);
        g->tau[k] = tau;
        v[k + 1] = all(1);
        for (int64_t i = k + 2; i < n; i++) v[i] = a[i * n + k] * scale;
        for (int64_t i = k + 1; i < n; i++) p[i] = all(0);
        int64_t i = k + 1;
        for (; i + 1 < n; i += 2) { /* two rows at a time share the loads of the vectors */
            lanes *restrict r0 = a + i * n, *restrict r1 = r0 + n;
            lanes v0 = v[i], v1 = v[i + 1], p0 = p[i], p1 = p[i + 1];
            lanes ov0 = old_v[i], ov1 = old_v[i + 1], ow0 = old_w[i], ow1 = old_w[i + 1];
            for (int64_t j = k + 1; j < i; j++) {
                lanes a0 = r0[j] - ov0 * old_w[j] - ow0 * old_v[j];
                lanes a1 = r1[j] - ov1 * old_w[j] - ow1 * old_v[j];
                r0[j] = a0;
                r1[j] = a1;
                p0 += a0 * v[j];
                p1 += a1 * v[j];
                p[j] = (p[j] + a0 * v0) + a1 * v1;
            }
            lanes d0 = r0[i] - ov0 * old_w[i] - ow0 * old_v[i];
            lanes below = r1[i] - ov1 * old_w[i] - ow1 * old_v[i];
            lanes d1 = r1[i + 1] - ov1 * old_w[i + 1] - ow1 * old_v[i + 1];
            r0[i] = d0;
            r1[i] = below;
            r1[i + 1] = d1;
            p[i] = p0 + d0 * v0 + below * v1;
            p[i + 1] = p1 + below * v0 + d1 * v1;
        }
        for (; i < n; i++) { /* in the same order of rounding */
            lanes *restrict r0 = a + i * n;
            lanes p0 = p[i];
            for (int64_t j = k + 1; j < i; j++) {
                r0[j] = r0[j] - old_v[i] * old_w[j] - old_w[i] * old_v[j];
                p0 += r0[j] * v[j];
                p[j] += r0[j] * v[i];
            }
            r0[i] = r0[i] - old_v[i] * old_w[i] - old_w[i] * old_v[i];
            p[i] = p0 + r0[i] * v[i];
        }
        lanes dot = all(0);
        for (int64_t j = k + 1; j < n; j++) {
            p[j] *= tau;
            dot += p[j] * v[j];
        }
        dot *= 0.5 * tau;
        for (int64_t j = k + 1; j < n; j++) {
            w[j] = p[j] - dot * v[j];
            a[j * n + k] = v[j]; /* kept for the way back */
            old_v[j] = v[j];
            old_w[j] = w[j];
        }
    }
}

/* All eigenvalues of the tridiagonal, in q, in no order; how many lanes did not converge. */
INLINE int eigenvalues(Group *g, int64_t n) {
    lanes *restrict q = g->q, *restrict f = g->f;
    lanes norm = all(0);
    for (int64_t i = 0; i < n; i++) {
        q[i] = g->d[i];
        f[i] = g->e[i] * g->e[i];
        lanes size = absolute(q[i]) + absolute(g->e[i]);
        norm = choose(size > norm, size, norm);
    }
    lanes small = norm * (0.1 * DBL_EPSILON);
    small *= small; /* a square below it is nothing beside the largest eigenvalue */
    int64_t l[LANES] = {0}, m[LANES];
    for (int64_t sweeps = 0; sweeps < MAX_SWEEPS * n; sweeps++) {
        lanes sigma = all(0), from = all(0), to = all(0);
        int64_t top = 0, bottom = n;
        for (int i = 0; i < LANES; i++) { /* of each lane, the next block that is not yet diagonal */
            while (l[i] + 1 < n && f[l[i]][i] <= small[i]) l[i]++;
            if (l[i] + 1 >= n) continue;
            for (m[i] = l[i] + 1; m[i] + 1 < n && f[m[i]][i] > small[i];) m[i]++;
            double side = sqrt(f[l[i]][i]), lower = q[l[i]][i];
            double half = (q[l[i] + 1][i] - lower) / (2 * side);
            sigma[i] = lower - side / (half + copysign(sqrt(half * half + 1), half));
            from[i] = (double)l[i];
            to[i] = (double)m[i];
            if (m[i] > top) top = m[i];
            if (l[i] < bottom) bottom = l[i];
        }
        if (top == 0) return 0;
        lanes c = all(1), s = all(0), gamma = all(0), p = all(0);
        for (int i = 0; i < LANES; i++) gamma[i] = q[(int64_t)to[i]][i] - sigma[i];
        p = gamma * gamma;
        for (int64_t i = top - 1; i >= bottom; i--) {
            mask active = (all((double)i) < to) & (all((double)i) >= from);
            mask first = all((double)(i + 1)) == to;
            lanes b = f[i], r = p + b;
            f[i + 1] = choose(active & ~first, s * r, f[i + 1]);
            lanes over = all(1) / r, c_new = p * over, s_new = b * over;
            lanes diagonal = q[i];
            lanes gamma_new = c_new * (diagonal - sigma) - s_new * gamma;
            q[i + 1] = choose(active, gamma + (diagonal - gamma_new), q[i + 1]);
            lanes p_new = choose(c_new != all(0), gamma_new * gamma_new / c_new, c * b);
            c = choose(active, c_new, c);
            s = choose(active, s_new, s);
            gamma = choose(active, gamma_new, gamma);
            p = choose(active, p_new, p);
        }
        for (int i = 0; i < LANES; i++) {
            if (l[i] + 1 >= n) continue;
            f[l[i]][i] = s[i] * p[i];
            q[l[i]][i] = sigma[i] + gamma[i];
        }
    }
    int left = 0;
    for (int i = 0; i < LANES; i++) left += l[i] + 1 < n;
    return left;
}

/* The unit eigenvector of the largest eigenvalue, in x; arbitrary where that is not above zero. */
INLINE void principal(Group *g, int64_t n, const int64_t *counts) {
    lanes *restrict x = g->x, *restrict pivot = g->p;
    lanes largest = all(0);
    for (int64_t i = 0; i < n; i++) largest = choose(g->q[i] > largest, g->q[i], largest);
    lanes shift = choose(largest > all(0), largest * (1 + SHIFT), all(1));
    for (int64_t i = 0; i < n; i++) { /* no symmetry makes this start orthogonal to it */
        for (int k = 0; k < LANES; k++) x[i][k] = i < counts[k] ? cos(pow((double)(i + 1), 1.5)) : 0;
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
    for (int64_t k = n - 3; k >= 0; k--) { /* x = H_0 H_1 ... x */
        lanes dot = all(0);
        for (int64_t i = k + 1; i < n; i++) dot += g->a[i * n + k] * x[i];
        dot *= g->tau[k];
        for (int64_t i = k + 1; i < n; i++) x[i] -= dot * g->a[i * n + k];
    }
}

/* S S^T of LANES clouds out of the table of inner products; see geometry.py. Fills the lower triangle. */
INLINE void look_up(Group *g, int64_t n, const double *inner, int64_t d_sae, const int64_t *indices,
                    const double *weights, const int64_t *counts, int64_t width, double *moment, double *square) {
    lanes *restrict a = g->a, *restrict w = g->w, *restrict to_centroid = g->p;
    for (int64_t i = 0; i < n; i++) {
        const double *row[LANES];
        to_centroid[i] = w[i] = all(0);
        for (int k = 0; k < LANES; k++) {
            row[k] = i < counts[k] ? inner + indices[k * width + i] * d_sae : NULL;
            if (row[k]) w[i][k] = weights[k * width + i];
        }
        for (int64_t j = 0; j <= i; j++) {
            lanes value = all(0);
            for (int k = 0; k < LANES; k++)
                if (row[k]) value[k] = row[k][indices[k * width + j]];
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
    for (int k = 0; k < LANES; k++) {
        if (moment) moment[k] = total[k];
        if (square) square[k] = of_centroid[k];
    }
}

INLINE void copy_in(Group *g, int64_t n, const double *gram, const int64_t *counts, int64_t width) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++) {
            lanes value = all(0);
            for (int k = 0; k < LANES; k++)
                if (i < counts[k]) value[k] = gram[(k * width + i) * width + j];
            g->a[i * n + j] = value;
        }
}

/* Spectra of `rows` matrices of at most `width` rows; `counts` of them matter, the rest is 0. Either `gram`
 * (rows, width, width) or, where that is NULL, by `indices` and `weights` (rows, width) out of `inner`
 * (d_sae, d_sae), with `moment` and `square` (rows). Fills eigenvalues (rows, width), in no order, and vectors
 * (rows, width). Returns how many did not converge, or -1 without memory. */
EACH_CPU int lensd_spectra(const double *gram, const double *inner, int64_t d_sae, const int64_t *indices,
                           const double *weights, const int64_t *counts, int64_t rows, int64_t width,
                           double *eigen, double *vectors, double *moment, double *square) {
    size_t elements = (size_t)width * width + 9 * (size_t)width;
    lanes *room = aligned_alloc(ALIGNMENT, elements * sizeof(lanes));
    if (!room) return -1;
    memset(eigen, 0, sizeof(double) * rows * width);
    memset(vectors, 0, sizeof(double) * rows * width);
    int left = 0;
    for (int64_t first = 0; first < rows; first += LANES) {
        int64_t n = 1, count[LANES];
        int used = rows - first < LANES ? (int)(rows - first) : LANES;
        for (int k = 0; k < LANES; k++) {
            count[k] = k < used ? counts[first + k] : 0;
            if (count[k] > n) n = count[k];
        }
        Group g;
        g.a = room;
        lanes **parts[] = {&g.d, &g.e, &g.tau, &g.v, &g.w, &g.p, &g.x, &g.q, &g.f};
        for (int part = 0; part < 9; part++) *parts[part] = room + n * n + part * n;
        if (gram) {
            copy_in(&g, n, gram + first * width * width, count, width);
        } else {
            double of_moment[LANES], of_square[LANES];
            look_up(&g, n, inner, d_sae, indices + first * width, weights + first * width, count, width,
                    of_moment, of_square);
            for (int k = 0; k < used; k++) {
                moment[first + k] = of_moment[k];
                square[first + k] = of_square[k];
            }
        }
        tridiagonalise(&g, n);
        left += eigenvalues(&g, n);
        principal(&g, n, count);
        for (int k = 0; k < used; k++)
            for (int64_t i = 0; i < count[k]; i++) {
                eigen[(first + k) * width + i] = g.q[i][k];
                vectors[(first + k) * width + i] = g.x[i][k];
            }
    }
    free(room);
    return left;
}
