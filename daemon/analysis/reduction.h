/* Householder's reduction of several symmetric matrices to tridiagonals, and the way back for a vector.
 *
 * Included once for each type of number: VECTOR holds WIDTH of them, MASK as many integers of the same size,
 * SIGN is such an integer's highest bit, ROOT the square root of one, NAME(f) what a function is called.
 */

typedef struct {
    VECTOR *a;             /* (n, n) row by row, the lower triangle; then the reflectors, below the diagonal */
    VECTOR *d, *e;         /* (n) of the tridiagonal: its diagonal, and what is beside it */
    VECTOR *tau;           /* (n) of the reflectors */
    VECTOR *v, *w, *p;     /* (n) of one step */
    VECTOR *old_v, *old_w; /* (n) of the step before */
} NAME(Reduction);

INLINE VECTOR NAME(choose)(MASK where, VECTOR yes, VECTOR no) {
    return (VECTOR)((where & (MASK)yes) | (~where & (MASK)no));
}

/* How much room a reduction takes, in vectors, and where in it what lies. */
INLINE int64_t NAME(room)(int64_t n) { return n * n + 8 * n; }

INLINE NAME(Reduction) NAME(laid_out)(VECTOR *room, int64_t n) {
    VECTOR *rest = room + n * n;
    return (NAME(Reduction)){.a = room,          .d = rest,         .e = rest + n,     .tau = rest + 2 * n,
                             .v = rest + 3 * n,  .w = rest + 4 * n, .p = rest + 5 * n, .old_v = rest + 6 * n,
                             .old_w = rest + 7 * n};
}

/* A = Q T Q^T, the update of each step done in the same pass over A as the product of the next. */
INLINE void NAME(reduce)(const NAME(Reduction) *r, int64_t n) {
    VECTOR *restrict a = r->a, *restrict v = r->v, *restrict w = r->w, *restrict p = r->p;
    VECTOR *restrict old_v = r->old_v, *restrict old_w = r->old_w;
    const VECTOR zero = {0};
    for (int64_t i = 0; i < n; i++) old_v[i] = old_w[i] = zero;
    for (int64_t k = 0; k < n; k++) {
        for (int64_t i = k; i < n; i++) a[i * n + k] -= old_v[i] * old_w[k] + old_w[i] * old_v[k];
        r->d[k] = a[k * n + k];
        r->tau[k] = r->e[k] = zero;
        if (k + 1 == n) break;
        VECTOR alpha = a[(k + 1) * n + k], rest = zero;
        for (int64_t i = k + 2; i < n; i++) rest += a[i * n + k] * a[i * n + k];
        MASK flat = rest == zero; /* nothing to reflect */
        VECTOR beta = alpha * alpha + rest;
        for (int lane = 0; lane < WIDTH; lane++) beta[lane] = ROOT(beta[lane]);
        beta = (VECTOR)(((MASK)beta & ~SIGN) | (((MASK)alpha & SIGN) ^ SIGN)); /* of the other sign */
        VECTOR tau = NAME(choose)(flat, zero, (beta - alpha) / beta);
        VECTOR scale = NAME(choose)(flat, zero, 1 / (alpha - beta));
        r->e[k] = NAME(choose)(flat, alpha, beta);
        r->tau[k] = tau;
        v[k + 1] = zero + 1;
        for (int64_t i = k + 2; i < n; i++) v[i] = a[i * n + k] * scale;
        for (int64_t i = k + 1; i < n; i++) p[i] = zero;
        int64_t i = k + 1;
        for (; i + 1 < n; i += 2) { /* two rows at a time share the loads of the vectors */
            VECTOR *restrict r0 = a + i * n, *restrict r1 = r0 + n;
            VECTOR v0 = v[i], v1 = v[i + 1], p0 = p[i], p1 = p[i + 1];
            VECTOR ov0 = old_v[i], ov1 = old_v[i + 1], ow0 = old_w[i], ow1 = old_w[i + 1];
            for (int64_t j = k + 1; j < i; j++) {
                VECTOR a0 = r0[j] - ov0 * old_w[j] - ow0 * old_v[j];
                VECTOR a1 = r1[j] - ov1 * old_w[j] - ow1 * old_v[j];
                r0[j] = a0;
                r1[j] = a1;
                p0 += a0 * v[j];
                p1 += a1 * v[j];
                p[j] = (p[j] + a0 * v0) + a1 * v1;
            }
            VECTOR d0 = r0[i] - ov0 * old_w[i] - ow0 * old_v[i];
            VECTOR below = r1[i] - ov1 * old_w[i] - ow1 * old_v[i];
            VECTOR d1 = r1[i + 1] - ov1 * old_w[i + 1] - ow1 * old_v[i + 1];
            r0[i] = d0;
            r1[i] = below;
            r1[i + 1] = d1;
            p[i] = p0 + d0 * v0 + below * v1;
            p[i + 1] = p1 + below * v0 + d1 * v1;
        }
        for (; i < n; i++) { /* in the same order of rounding */
            VECTOR *restrict r0 = a + i * n;
            VECTOR p0 = p[i];
            for (int64_t j = k + 1; j < i; j++) {
                r0[j] = r0[j] - old_v[i] * old_w[j] - old_w[i] * old_v[j];
                p0 += r0[j] * v[j];
                p[j] += r0[j] * v[i];
            }
            r0[i] = r0[i] - old_v[i] * old_w[i] - old_w[i] * old_v[i];
            p[i] = p0 + r0[i] * v[i];
        }
        VECTOR dot = zero;
        for (int64_t j = k + 1; j < n; j++) {
            p[j] *= tau;
            dot += p[j] * v[j];
        }
        dot *= tau / 2;
        for (int64_t j = k + 1; j < n; j++) {
            w[j] = p[j] - dot * v[j];
            a[j * n + k] = v[j]; /* kept for the way back */
            old_v[j] = v[j];
            old_w[j] = w[j];
        }
    }
}

/* x (n) = Q x. */
INLINE void NAME(reflect)(const NAME(Reduction) *r, int64_t n, VECTOR *restrict x) {
    for (int64_t k = n - 3; k >= 0; k--) {
        VECTOR dot = {0};
        for (int64_t i = k + 1; i < n; i++) dot += r->a[i * n + k] * x[i];
        dot *= r->tau[k];
        for (int64_t i = k + 1; i < n; i++) x[i] -= dot * r->a[i * n + k];
    }
}
