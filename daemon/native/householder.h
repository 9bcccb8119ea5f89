/* Householder's reduction of LANES symmetric matrices in float64 to tridiagonals, and the way back for a vector. */

typedef struct {
    lanes *a;             /* (n, n) row by row, the lower triangle; then the reflectors, below the diagonal */
    lanes *d, *e;         /* (n) of the tridiagonal: its diagonal, and what is beside it */
    lanes *tau;           /* (n) of the reflectors */
    lanes *v, *w, *p;     /* (n) of one step */
    lanes *old_v, *old_w; /* (n) of the step before */
} Reduction;

/* How much room a reduction takes, in vectors, and where its parts lie. */
INLINE int64_t room_of_reduction(int64_t n) { return n * n + 8 * n; }

INLINE Reduction laid_out(lanes *room, int64_t n) {
    lanes *rest = room + n * n;
    return (Reduction){.a = room,         .d = rest,         .e = rest + n,     .tau = rest + 2 * n,
                       .v = rest + 3 * n, .w = rest + 4 * n, .p = rest + 5 * n, .old_v = rest + 6 * n,
                       .old_w = rest + 7 * n};
}

/* A = Q T Q^T, the update of each step done in the same pass over A as the product of the next. */
INLINE void reduce(const Reduction *r, int64_t n) {
    lanes *restrict a = r->a, *restrict v = r->v, *restrict w = r->w, *restrict p = r->p;
    lanes *restrict old_v = r->old_v, *restrict old_w = r->old_w;
    const lanes zero = {0};
    for (int64_t i = 0; i < n; i++) old_v[i] = old_w[i] = zero;
    for (int64_t k = 0; k < n; k++) {
        for (int64_t i = k; i < n; i++) a[i * n + k] -= old_v[i] * old_w[k] + old_w[i] * old_v[k];
        r->d[k] = a[k * n + k];
        r->tau[k] = r->e[k] = zero;
        if (k + 1 == n) break;
        lanes alpha = a[(k + 1) * n + k], rest = zero;
        for (int64_t i = k + 2; i < n; i++) rest += a[i * n + k] * a[i * n + k];
        mask flat = rest == zero; /* nothing to reflect */
        lanes beta = root(alpha * alpha + rest);
        beta = choose(alpha < zero, beta, -beta); /* of the other sign */
        lanes tau = choose(flat, zero, (beta - alpha) / beta);
        lanes scale = choose(flat, zero, 1 / (alpha - beta));
        r->e[k] = choose(flat, alpha, beta);
        r->tau[k] = tau;
        v[k + 1] = zero + 1;
        for (int64_t i = k + 2; i < n; i++) v[i] = a[i * n + k] * scale;
        for (int64_t i = k + 1; i < n; i++) p[i] = zero;
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
        lanes dot = zero;
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
INLINE void reflect(const Reduction *r, int64_t n, lanes *restrict x) {
    for (int64_t k = n - 3; k >= 0; k--) {
        lanes dot = {0};
        for (int64_t i = k + 1; i < n; i++) dot += r->a[i * n + k] * x[i];
        dot *= r->tau[k];
        for (int64_t i = k + 1; i < n; i++) x[i] -= dot * r->a[i * n + k];
    }
}
