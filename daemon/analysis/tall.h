/* Householder's reduction of one symmetric matrix to a tridiagonal in float32, and the way back for a vector.
 *
 * As in LAPACK's latrd (Dongarra, Sorensen & Hammarling, 1989): while a panel of steps is made, the matrix is only
 * read, for the product of each step, and what the steps before have put off is made up for in the vectors; then
 * one pass over the rest of the matrix takes the changes of all of them.
 *
 * Of row i lies what is from the start of the vector with its diagonal on, filled up with zeros at the end: the
 * upper triangle, with the squares on the diagonal full. So column k of what is left is row k, in one piece, and
 * no vector is ever read in part. What a square has left of the columns that are left is whatever it is by then:
 * finite, and only ever multiplied by zeros.
 */

#define ACROSS (HALVES * LANES) /* numbers in a vector */
#if LANES == 8
#define ROWS 8 /* that share the loads of a vector, as many as there are registers for; divides ACROSS */
#else
#define ROWS 4
#endif
#define PANEL 8 /* steps; a multiple of ROWS */

typedef float slim __attribute__((vector_size(4 * ACROSS)));
typedef int32_t slim_mask __attribute__((vector_size(4 * ACROSS)));
typedef float slim_half __attribute__((vector_size(4 * LANES), may_alias));
typedef float slim_scalar __attribute__((may_alias));

typedef struct {
    slim *a;                   /* (n, stride) row by row; then the reflectors, from beside the diagonal on */
    slim *w;                   /* (PANEL, stride) a panel's changes are -(v w^T + w v^T) for each reflector v */
    slim_scalar *d, *e, *tau;  /* (n) the tridiagonal's diagonal, and what is beside it; of the reflectors */
    int64_t n, across, stride; /* rows; vectors of a row, and from one row to the next */
} Tall;

INLINE int64_t across_tall(int64_t n) { return (n + ACROSS - 1) / ACROSS; }
INLINE int64_t rows_tall(int64_t n) { return (n + ROWS - 1) / ROWS * ROWS; }
/* Odd: else there would be sizes of which all rows want the same place in the cache. */
INLINE int64_t stride_tall(int64_t n) { return across_tall(n) | 1; }

/* How much room a reduction takes, in vectors, and where in it what lies. */
INLINE int64_t room_tall(int64_t n) { return (rows_tall(n) + PANEL + 3) * stride_tall(n); }

INLINE Tall laid_out_tall(slim *room, int64_t n) {
    int64_t stride = stride_tall(n);
    slim *w = room + rows_tall(n) * stride, *d = w + PANEL * stride;
    return (Tall){.a = room, .w = w, .d = (slim_scalar *)d, .e = (slim_scalar *)(d + stride),
                  .tau = (slim_scalar *)(d + 2 * stride), .n = n, .across = across_tall(n), .stride = stride};
}

/* Keeps a value in a register, where GCC would take it from memory once more for each use. */
#if defined(__x86_64__) && !defined(__clang__)
#define LOADED(x) __asm__("" : "+v"(x))
#else
#define LOADED(x) (void)0
#endif

INLINE float at(const slim *row, int64_t j) { return ((const slim_scalar *)row)[j]; }

INLINE slim choose_slim(slim_mask where, slim yes, slim no) {
    return (slim)((where & (slim_mask)yes) | (~where & (slim_mask)no));
}

INLINE slim_mask lane_numbers(void) {
    slim_mask numbers = {0};
    for (int i = 0; i < ACROSS; i++) numbers[i] = i;
    return numbers;
}

/* Each lane gets the number of the lane that differs from it in the bit `by`. */
INLINE slim crossed(slim x, const int by) {
#ifdef __clang__
    slim found = x;
    for (int i = 0; i < ACROSS; i++) found[i] = x[i ^ by];
    return found;
#else
    return __builtin_shuffle(x, lane_numbers() ^ by);
#endif
}

/* The sum of all lanes. */
INLINE float total(slim x) {
    for (int by = 1; by < ACROSS; by *= 2) x += crossed(x, by);
    return x[0];
}

/* Adds up the halves of two vectors each, into the lanes without and with the bit `by` of the first of them. */
INLINE void paired(slim *x, const int by) {
    slim_mask second = (lane_numbers() & by) != 0;
    for (int i = 0; i < ROWS; i += 2 * by)
        x[i] = choose_slim(second, x[i + by], x[i]) + crossed(choose_slim(second, x[i], x[i + by]), by);
}

/* The sums of ROWS vectors: lane i gets that of vector i % ROWS. */
INLINE slim totals(slim *x) {
    paired(x, 1);
    paired(x, 2);
    if (ROWS > 4) paired(x, 4);
    for (int by = ROWS; by < ACROSS; by *= 2) x[0] += crossed(x[0], by);
    return x[0];
}

/* Row i of a matrix in float64, which lies alike, and zeros for the rows past the last that a loop takes with it. */
INLINE void round_row(const Tall *t, int64_t i, const lanes *from) {
    for (int64_t j = i / ACROSS; j < t->across; j++) {
        slim_half *to = (slim_half *)&t->a[i * t->stride + j];
        for (int h = 0; h < HALVES; h++) to[h] = __builtin_convertvector(from[HALVES * j + h], slim_half);
        if (i + 1 == t->n)
            for (int64_t below = t->n; below < rows_tall(t->n); below++) t->a[below * t->stride + j] = (slim){0};
    }
}

/* p = A v from row and column `first` on, before which v is 0 and p is arbitrary. */
INLINE void product(const Tall *t, int64_t first, const slim *restrict v, slim *restrict p) {
    for (int64_t j = first / ACROSS; j < t->across; j++) p[j] = (slim){0};
    for (int64_t i = first / ROWS * ROWS; i < t->n; i += ROWS) {
        const slim *restrict row[ROWS];
        float of_v[ROWS];
        slim sum[ROWS];
        int64_t own = i / ACROSS;
        for (int r = 0; r < ROWS; r++) {
            row[r] = t->a + (i + r) * t->stride;
            of_v[r] = at(v, i + r);
            sum[r] = row[r][own] * v[own];
        }
        for (int64_t j = own + 1; j < t->across; j++) { /* a row's numbers stand for those of a column too */
            slim here = v[j], below = p[j];
            for (int r = 0; r < ROWS; r++) {
                slim value = row[r][j];
                LOADED(value);
                sum[r] += value * here;
                below += value * of_v[r];
            }
            p[j] = below;
        }
        slim_mask ours = (lane_numbers() & -ROWS) == (int32_t)(i % ACROSS);
        p[own] += choose_slim(ours, totals(sum), (slim){0});
    }
}

/* x -= V of_w + W of_v from column k + 1 on: what the steps from `first` to before k have put off. */
INLINE void catch_up(const Tall *t, int64_t first, int64_t k, const float *of_v, const float *of_w,
                     slim *restrict x) {
    for (int64_t j = (k + 1) / ACROSS; j < t->across; j++) {
        const slim *v = t->a + first * t->stride + j, *w = t->w + j;
        slim sum = x[j];
        for (int64_t s = 0; s < k - first; s++, v += t->stride, w += t->stride)
            sum = sum - *v * of_w[s] - *w * of_v[s];
        x[j] = sum;
    }
}

/* Step k of the panel that begins with step `first`: column k, which is row k, becomes its reflector. */
INLINE void step_tall(const Tall *t, int64_t first, int64_t k) {
    int64_t across = t->across, stride = t->stride, from = (k + 1) / ACROSS;
    slim *v = t->a + k * stride, *restrict w = t->w + (k - first) * stride;
    const slim zero = {0};
    slim_mask column = lane_numbers() + (int32_t)(from * ACROSS);
    float of_v[PANEL], of_w[PANEL];
    t->d[k] = at(v, k);
    for (int64_t s = 0; s < k - first; s++) {
        of_v[s] = at(t->a + (first + s) * stride, k);
        of_w[s] = at(t->w + s * stride, k);
        t->d[k] -= 2 * of_v[s] * of_w[s];
    }
    t->tau[k] = t->e[k] = 0;
    if (k + 1 == t->n) return;
    catch_up(t, first, k, of_v, of_w, v);
    float alpha = at(v, k + 1);
    v[from] = choose_slim(column > (int32_t)(k + 1), v[from], zero);
    slim square = zero;
    for (int64_t j = from; j < across; j++) square += v[j] * v[j];
    float rest = total(square);
    if (rest == 0) { /* nothing to reflect */
        t->e[k] = alpha;
        for (int64_t j = from; j < across; j++) v[j] = w[j] = zero;
        return;
    }
    float beta = -copysignf(sqrtf(alpha * alpha + rest), alpha), scale = 1 / (alpha - beta);
    float tau = (beta - alpha) / beta;
    t->e[k] = beta;
    t->tau[k] = tau;
    for (int64_t j = from; j < across; j++) v[j] *= scale;
    v[from] = choose_slim(column == (int32_t)(k + 1), zero + 1, v[from]);
    product(t, k + 1, v, w);
    for (int64_t s = 0; s < k - first; s++) {
        const slim *old_v = t->a + (first + s) * stride, *old_w = t->w + s * stride;
        slim along_v = zero, along_w = zero;
        for (int64_t j = from; j < across; j++) {
            along_v += old_v[j] * v[j];
            along_w += old_w[j] * v[j];
        }
        of_v[s] = total(along_v);
        of_w[s] = total(along_w);
    }
    catch_up(t, first, k, of_v, of_w, w);
    w[from] = choose_slim(column > (int32_t)k, w[from], zero);
    slim dot = zero;
    for (int64_t j = from; j < across; j++) dot += w[j] * v[j];
    float half_dot = tau * total(dot) * tau / 2;
    for (int64_t j = from; j < across; j++) w[j] = tau * w[j] - half_dot * v[j];
}

/* What a panel's steps have put off of ROWS rows, in one or two vectors of each. */
INLINE void update(const Tall *t, int64_t first, int64_t i, int64_t j, const int vectors) {
    slim *restrict a = t->a + i * t->stride + j, sum[ROWS][2];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < vectors; c++) sum[r][c] = a[r * t->stride + c];
    for (int s = 0; s < PANEL; s++) {
        const slim *restrict v = t->a + (first + s) * t->stride, *restrict w = t->w + s * t->stride;
        for (int r = 0; r < ROWS; r++) {
            float of_v = at(v, i + r), of_w = at(w, i + r);
            for (int c = 0; c < vectors; c++) sum[r][c] = sum[r][c] - of_v * w[j + c] - of_w * v[j + c];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < vectors; c++) a[r * t->stride + c] = sum[r][c];
}

/* A = Q T Q^T. */
INLINE void reduce_tall(const Tall *t) {
    for (int64_t first = 0; first < t->n; first += PANEL) {
        int64_t end = first + PANEL < t->n ? first + PANEL : t->n;
        for (int64_t k = first; k < end; k++) step_tall(t, first, k);
        for (int64_t i = first + PANEL; i < t->n; i += ROWS) {
            int64_t j = i / ACROSS;
            for (; j + 2 <= t->across; j += 2) update(t, first, i, j, 2);
            if (j < t->across) update(t, first, i, j, 1);
        }
    }
}

/* x (n) = Q x. */
INLINE void reflect_tall(const Tall *t, slim *restrict x) {
    for (int64_t k = t->n - 3; k >= 0; k--) {
        const slim *restrict v = t->a + k * t->stride;
        slim dot = {0};
        for (int64_t j = (k + 1) / ACROSS; j < t->across; j++) dot += v[j] * x[j];
        float along = t->tau[k] * total(dot);
        for (int64_t j = (k + 1) / ACROSS; j < t->across; j++) x[j] -= along * v[j];
    }
}
