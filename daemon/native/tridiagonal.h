/* Eigenvalues of LANES tridiagonals by QL, and their principal eigenvectors by inverse iteration, in float64. */

typedef struct {
    int64_t n;
    const lanes *d, *e; /* the diagonal, and what is beside it */
    lanes *q, *f;       /* eigenvalues in the making: diagonal, and squares of what is beside it */
    lanes *x, *pivot;   /* the eigenvector */
} Tridiagonal;

#define TRIDIAGONAL_PARTS 4 /* vectors of n that it takes besides d and e */

INLINE Tridiagonal tridiagonal(lanes *room, const lanes *d, const lanes *e, int64_t n) {
    return (Tridiagonal){.n = n, .d = d, .e = e, .q = room, .f = room + n, .x = room + 2 * n,
                         .pivot = room + 3 * n};
}

/* Puts all eigenvalues into q, in no order; returns how many lanes did not converge. */
INLINE int eigenvalues(const Tridiagonal *t) {
    const double small = TOLERANCE * TOLERANCE;
    const int64_t n = t->n;
    lanes *restrict q = t->q, *restrict f = t->f;
    lanes norm = all(0), from = all(0), to = all(0); /* of each lane, the first and last row not yet diagonal */
    for (int64_t i = 0; i < n; i++) {
        lanes size = absolute(t->d[i]) + absolute(t->e[i]);
        norm = choose(size > norm, size, norm);
    }
    norm = choose(norm > all(0), norm, all(1));
    for (int64_t i = 0; i < n; i++) {
        lanes beside = t->e[i] / norm;
        q[i] = t->d[i] / norm;
        f[i] = beside * beside;
        to = choose(f[i] > all(small), all((double)(i + 1)), to);
    }
    for (int64_t sweeps = 0; sweeps < MAX_SWEEPS * n; sweeps++) {
        lanes sigma = all(0), s = all(0), gamma = all(0);
        int64_t top = 0, bottom = n;
        for (int i = 0; i < LANES; i++) {
            int64_t first = (int64_t)from[i], last = (int64_t)to[i];
            while (first < last && f[first][i] <= small) first++;
            from[i] = (double)first;
            if (first == last) continue;
            double side = sqrt(f[first][i]), lower = q[first][i];
            double half = (q[first + 1][i] - lower) / (2 * side);
            sigma[i] = lower - side / (half + copysign(sqrt(half * half + 1), half));
            gamma[i] = q[last][i] - sigma[i];
            if (last > top) top = last;
            if (first < bottom) bottom = first;
        }
        gamma = choose(absolute(gamma) > all(NOUGHT), gamma, all(NOUGHT));
        lanes p = gamma * gamma;
        if (top == 0) break;
        for (int64_t i = top - 1; i >= bottom; i--) { /* a step waits for its one division, so it makes do with one */
            lanes here = all((double)i);
            mask active = (here < to) & (here >= from);
            lanes b = f[i], r = p + b, over = all(1) / (p * r);
            lanes turned = p * (q[i] - sigma) - b * gamma; /* the next gamma times r */
            turned = choose(absolute(turned) > NOUGHT * r, turned, NOUGHT * r);
            f[i + 1] = choose(active, s * r, f[i + 1]);
            q[i + 1] = choose(active, gamma + (q[i] - turned * p * over), q[i + 1]);
            gamma = only(active, turned * p) * over + only(~active, gamma);
            s = only(active, b * p) * over + only(~active, s);
            p = only(active, turned * turned) * over + only(~active, p);
        }
        for (int i = 0; i < LANES; i++) {
            int64_t first = (int64_t)from[i];
            if (first == (int64_t)to[i]) continue;
            f[first][i] = s[i] * p[i];
            q[first][i] = sigma[i] + gamma[i];
        }
    }
    int left = 0;
    for (int64_t i = 0; i < n; i++) q[i] *= norm;
    for (int i = 0; i < LANES; i++) left += from[i] < to[i];
    return left;
}

/* Puts the unit eigenvector of the largest eigenvalue into x, by steps from a shift a little above it; arbitrary
 * where that eigenvalue is not above zero. */
INLINE void principal(const Tridiagonal *t, const int64_t *counts) {
    const int64_t n = t->n;
    lanes *restrict x = t->x, *restrict pivot = t->pivot;
    lanes largest = all(0);
    for (int64_t i = 0; i < n; i++) largest = choose(t->q[i] > largest, t->q[i], largest);
    lanes shift = choose(largest > all(0), largest * (1 + SHIFT), all(1));
    for (int64_t i = 0; i < n; i++) { /* no symmetry makes this start orthogonal to it */
        double start = cos(pow((double)(i + 1), 1.5));
        for (int k = 0; k < LANES; k++) x[i][k] = i < counts[k] ? start : 0;
        pivot[i] = shift - t->d[i];
        if (i) pivot[i] -= t->e[i - 1] * t->e[i - 1] / pivot[i - 1];
    }
    for (int step = 0; step < ITERATIONS; step++) {
        for (int64_t i = 1; i < n; i++) x[i] += t->e[i - 1] / pivot[i - 1] * x[i - 1];
        x[n - 1] /= pivot[n - 1];
        for (int64_t i = n - 2; i >= 0; i--) x[i] = (x[i] + t->e[i] * x[i + 1]) / pivot[i];
        lanes square = all(0);
        for (int64_t i = 0; i < n; i++) square += x[i] * x[i];
        lanes over = all(1) / root(square);
        for (int64_t i = 0; i < n; i++) x[i] *= over;
    }
}
