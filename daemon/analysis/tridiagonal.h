/* The spectra of several tridiagonals at once, one in each lane of a vector, in float64: eigenvalues by QL, and the
 * principal eigenvector by inverse iteration.
 */

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

/* All eigenvalues of the tridiagonals of one or two groups, in q, in no order; how many lanes did not converge.
 *
 * A step waits for the one before it, and most of all for its one division: two groups side by side take hardly
 * longer than one, and what does not wait for the quotient is done meanwhile. */
INLINE int eigenvalues(const Group *g, const int groups, int64_t n, double tolerance) {
    const double small = tolerance * tolerance;
    lanes norm[HALVES], from[HALVES], to[HALVES]; /* of each lane, the first and last row not yet diagonal */
    for (int h = 0; h < groups; h++) {
        norm[h] = from[h] = to[h] = all(0);
        for (int64_t i = 0; i < n; i++) {
            lanes size = absolute(g[h].d[i]) + absolute(g[h].e[i]);
            norm[h] = choose(size > norm[h], size, norm[h]);
        }
        norm[h] = choose(norm[h] > all(0), norm[h], all(1));
        for (int64_t i = 0; i < n; i++) {
            lanes beside = g[h].e[i] / norm[h];
            g[h].q[i] = g[h].d[i] / norm[h];
            g[h].f[i] = beside * beside;
            to[h] = choose(g[h].f[i] > all(small), all((double)(i + 1)), to[h]);
        }
    }
    for (int64_t sweeps = 0; sweeps < MAX_SWEEPS * n; sweeps++) {
        lanes sigma[HALVES], s[HALVES], gamma[HALVES], p[HALVES];
        int64_t top = 0, bottom = n;
        for (int h = 0; h < groups; h++) {
            const lanes *q = g[h].q, *f = g[h].f;
            sigma[h] = s[h] = gamma[h] = all(0);
            for (int i = 0; i < LANES; i++) {
                int64_t first = (int64_t)from[h][i], last = (int64_t)to[h][i];
                while (first < last && f[first][i] <= small) first++;
                from[h][i] = (double)first;
                if (first == last) continue;
                double side = sqrt(f[first][i]), lower = q[first][i];
                double half = (q[first + 1][i] - lower) / (2 * side);
                sigma[h][i] = lower - side / (half + copysign(sqrt(half * half + 1), half));
                gamma[h][i] = q[last][i] - sigma[h][i];
                if (last > top) top = last;
                if (first < bottom) bottom = first;
            }
            gamma[h] = choose(absolute(gamma[h]) > all(NOUGHT), gamma[h], all(NOUGHT));
            p[h] = gamma[h] * gamma[h];
        }
        if (top == 0) break;
        for (int64_t i = top - 1; i >= bottom; i--) {
            lanes here = all((double)i);
            for (int h = 0; h < groups; h++) {
                lanes *restrict q = g[h].q, *restrict f = g[h].f;
                mask active = (here < to[h]) & (here >= from[h]);
                lanes b = f[i], r = p[h] + b, over = all(1) / (p[h] * r);
                lanes turned = p[h] * (q[i] - sigma[h]) - b * gamma[h]; /* the next gamma times r */
                turned = choose(absolute(turned) > NOUGHT * r, turned, NOUGHT * r);
                f[i + 1] = choose(active, s[h] * r, f[i + 1]);
                q[i + 1] = choose(active, gamma[h] + (q[i] - turned * p[h] * over), q[i + 1]);
                gamma[h] = only(active, turned * p[h]) * over + only(~active, gamma[h]);
                s[h] = only(active, b * p[h]) * over + only(~active, s[h]);
                p[h] = only(active, turned * turned) * over + only(~active, p[h]);
            }
        }
        for (int h = 0; h < groups; h++)
            for (int i = 0; i < LANES; i++) {
                int64_t first = (int64_t)from[h][i];
                if (first == (int64_t)to[h][i]) continue;
                g[h].f[first][i] = s[h][i] * p[h][i];
                g[h].q[first][i] = sigma[h][i] + gamma[h][i];
            }
    }
    int left = 0;
    for (int h = 0; h < groups; h++) {
        for (int64_t i = 0; i < n; i++) g[h].q[i] *= norm[h];
        for (int i = 0; i < LANES; i++) left += from[h][i] < to[h][i];
    }
    return left;
}

/* The unit eigenvector of the tridiagonal's largest eigenvalue, in x, from a shift that is `above` of it above it;
 * arbitrary where that is not above zero. */
INLINE void principal(Group *g, int64_t n, const int64_t *counts, double above) {
    lanes *restrict x = g->x, *restrict pivot = g->pivot;
    lanes largest = all(0);
    for (int64_t i = 0; i < n; i++) largest = choose(g->q[i] > largest, g->q[i], largest);
    lanes shift = choose(largest > all(0), largest * (1 + above), all(1));
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
