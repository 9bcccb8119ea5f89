/* The work of a decoder layer of Llama's kind between its matrix products, in float32: norm, rotary embedding and
 * attention over a trie.
 *
 * Written for short texts: keys lie in tiles of a vector's width, transposed, so that one load serves a score of as
 * many keys, and a block of queries reads only the tiles that one of them attends to. Whoever attends to whom is told
 * by one number for each node: i attends to j exactly when j <= i < end[j].
 * Plain C with the vector extensions of GCC and Clang; knows no Python. Each function works on a range of nodes, so
 * that threads may share the work.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "clones.h"

#define WIDTH 8  /* numbers in a vector, which is a register of AVX2 */
#define SPAN 2   /* vectors of a head that are summed up at a time, for ROWS queries: as many as registers hold */
#define BLOCK 16 /* queries that read the same tiles; a multiple of WIDTH */
#define ROWS 4   /* rows of a product that are worked on together */
#define ALIGNMENT 64

typedef float vector __attribute__((vector_size(4 * WIDTH)));
typedef float loose __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias)); /* anywhere in memory */
typedef int32_t whole __attribute__((vector_size(4 * WIDTH)));
typedef int32_t loose_whole __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

/* A layer's attention over n nodes, made ready by `lensd_turn`. */
typedef struct {
    int64_t n, heads, key_heads, d_head;
    float *queries;     /* (n, heads, d_head) turned; then the result of each */
    float *keys;        /* (key heads, tiles, d_head, WIDTH) turned */
    float *values;      /* (n, key heads, d_head) */
    const int32_t *end; /* (tiles * WIDTH) one past each node's last descendant; 0 past n */
    const int32_t *depth;
    int32_t window;     /* a query attends to less than so many tokens before it; 0 for all */
    int32_t odd;        /* whether a value is not finite: then a share of 0 must skip it */
    float softcap;      /* scores s become softcap tanh(s / softcap); 0 for none */
} Attention;

/* The result of the products, and the hidden states that they read. */
typedef struct {
    const float *qkv; /* (n, heads + 2 key heads, d_head) */
    const float *x;   /* (n, d_model), before the norm: the result is still to be divided by it; NULL: it is not */
    int64_t d_model;
    float epsilon;           /* of the norm */
    float scale;             /* of scores */
    const float *bias;       /* (heads + 2 key heads, d_head) or NULL: added after the norm */
    const float *cos, *sin;  /* (n, d_head), or NULL: heads are turned already */
} Given;

/* The sizes of both structures: a caller that was made for others must not call. */
int64_t lensd_sizes(void) { return sizeof(Attention) << 32 | sizeof(Given); }

INLINE vector all(float value) { return (vector){0} + value; }
INLINE vector choose(whole where, vector yes, vector no) { return (vector)((where & (whole)yes) | (~where & (whole)no)); }
INLINE int64_t tiles_of(int64_t n) { return (n + WIDTH - 1) / WIDTH; }

INLINE float sum_of(vector x) {
    float sums[WIDTH];
    *(loose *)sums = x;
    for (int half = WIDTH / 2; half; half /= 2)
        for (int k = 0; k < half; k++) sums[k] += sums[k + half];
    return sums[0];
}

INLINE float largest_of(vector x) {
    float largest = x[0];
    for (int k = 1; k < WIDTH; k++) largest = x[k] > largest ? x[k] : largest;
    return largest;
}

/* e^x for x <= 0, to 3 units in the last place; 0 below -87, NaN for NaN. */
INLINE vector exponential(vector x) {
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    vector bounded = choose(x < -87, all(-87), x);
    vector k = bounded * 1.44269504f + round - round;
    vector r = bounded - k * 0.693359375f + k * 2.12194440e-4f; /* ln 2 in two parts, the first exact times k */
    vector p = 1.0f / 720 * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1;
    vector scale = (vector)((__builtin_convertvector(k, whole) + 127) << 23);
    return choose(x < -87, all(0), p * scale);
}

/* 1 / sqrt(mean square + epsilon) of a row (d). */
INLINE float over_norm(const float *x, int64_t d, float epsilon) {
    vector squares[2] = {{0}}; /* two, so that a sum does not wait for the one before it */
    float rest = 0;
    int64_t i = 0;
    for (; i + 2 * WIDTH <= d; i += 2 * WIDTH)
        for (int k = 0; k < 2; k++) squares[k] += *(const loose *)(x + i + k * WIDTH) * *(const loose *)(x + i + k * WIDTH);
    for (; i < d; i++) rest += x[i] * x[i];
    return 1 / sqrtf((sum_of(squares[0] + squares[1]) + rest) / d + epsilon);
}

/* Rows `from` to `to` of two (n, d): x += y, and normed = x over its root mean square. */
CLONES void lensd_add_norm(float *x, const float *y, float *normed, int64_t d, float epsilon, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
        float *row = x + i * d;
        for (int64_t j = 0; j < d; j++) row[j] += y[i * d + j];
        float scale = over_norm(row, d, epsilon);
        for (int64_t j = 0; j < d; j++) normed[i * d + j] = scale * row[j];
    }
}

/* A head in its place: over the norm, with its bias, turned, times `scale`. */
INLINE void turned(const float *restrict from, const float *restrict bias, float over, const float *restrict cos,
                   const float *restrict sin, float scale, int64_t d_head, float *restrict to, const int step) {
    int64_t half = d_head / 2;
    if (!cos) {
        for (int64_t j = 0; j < d_head; j++) to[j * step] = from[j] * scale;
        return;
    }
    for (int64_t j = 0; j < half; j++) {
        float low = from[j] * over, high = from[j + half] * over;
        if (bias) {
            low += bias[j];
            high += bias[j + half];
        }
        to[j * step] = (low * cos[j] - high * sin[j]) * scale;
        to[(j + half) * step] = (high * cos[j] + low * sin[j]) * scale;
    }
}

/* Makes nodes `from` to `to` of the products' result ready for attention. */
CLONES void lensd_turn(Attention *a, const Given *given, int64_t from, int64_t to) {
    int64_t tiles = tiles_of(a->n), d_head = a->d_head, stride = (a->heads + 2 * a->key_heads) * d_head;
    const float *bias = given->bias;
    whole odd = {0};
    for (int64_t i = from; i < to; i++) {
        float over = given->x ? over_norm(given->x + i * given->d_model, given->d_model, given->epsilon) : 1;
        const float *row = given->qkv + i * stride, *cos = given->cos ? given->cos + i * d_head : NULL;
        const float *sin = given->cos ? given->sin + i * d_head : NULL;
        for (int64_t head = 0; head < a->heads; head++)
            turned(row + head * d_head, bias ? bias + head * d_head : NULL, over, cos, sin, given->scale, d_head,
                   a->queries + (i * a->heads + head) * d_head, 1);
        for (int64_t head = 0; head < a->key_heads; head++) {
            int64_t at = (a->heads + head) * d_head;
            turned(row + at, bias ? bias + at : NULL, over, cos, sin, 1, d_head,
                   a->keys + (head * tiles + i / WIDTH) * d_head * WIDTH + i % WIDTH, WIDTH);
        }
        int64_t width = a->key_heads * d_head, at = (a->heads + a->key_heads) * d_head;
        float *values = a->values + i * width;
        for (int64_t j = 0; j < width; j += WIDTH) {
            vector value = *(const loose *)(row + at + j) * over;
            if (bias) value += *(const loose *)(bias + at + j);
            *(loose *)(values + j) = value;
            odd |= value - value != 0;
        }
    }
    for (int k = 0; k < WIDTH; k++)
        if (odd[k]) a->odd = 1;
}

/* *scores[r] = the scores of query r with the keys of one tile. */
INLINE void score(float *const *queries, const float *tile, int64_t d_head, vector *const *scores) {
    vector sums[2 * ROWS] = {{0}};
    for (int64_t j = 0; j < d_head; j++) {
        vector keys = *(const loose *)(tile + j * WIDTH);
        for (int r = 0; r < 2 * ROWS; r++) sums[r] += keys * queries[r][j];
    }
    for (int r = 0; r < 2 * ROWS; r++) *scores[r] = sums[r];
}

/* cap tanh(x / cap). */
INLINE vector capped(vector x, float cap) {
    vector size = choose(x < 0, -x, x) / cap;
    vector shrunk = exponential(-2 * size);
    vector bounded = cap * ((1 - shrunk) / (1 + shrunk));
    return choose(x < 0, -bounded, bounded);
}

/* Masks the scores of a query with the keys of some tiles and makes them shares, not yet divided by their sum. */
INLINE void soften(const Attention *a, int32_t i, const int32_t *tiles, int64_t n_tiles, vector *scores) {
    whole lane;
    for (int k = 0; k < WIDTH; k++) lane[k] = k;
    vector largest = all(-INFINITY);
    for (int64_t t = 0; t < n_tiles; t++) {
        int32_t first = tiles[t] * WIDTH;
        whole end = *(const loose_whole *)(a->end + first);
        whole sees = (lane + first <= i) & (end > i);
        if (a->window) sees &= a->depth[i] - *(const loose_whole *)(a->depth + first) < a->window;
        if (a->softcap != 0) scores[t] = capped(scores[t], a->softcap);
        scores[t] = choose(sees, scores[t], all(-INFINITY));
        largest = choose(scores[t] > largest, scores[t], largest);
    }
    vector top = all(largest_of(largest));
    for (int64_t t = 0; t < n_tiles; t++) scores[t] = exponential(scores[t] - top);
}

/* over[r] = 1 / the sum of shares[r]. One key after the other, as their values are summed: a query's keys come in the
 * order of the text, and the shares of others are 0, so that its sums are the same bits whatever else is in the trie. */
INLINE void invert_sums(const vector *const *shares, int64_t n_tiles, float *over) {
    float sums[2 * ROWS] = {0};
    for (int64_t t = 0; t < n_tiles; t++)
        for (int k = 0; k < WIDTH; k++)
            for (int r = 0; r < 2 * ROWS; r++) sums[r] += ((const float *)(shares[r] + t))[k];
    for (int r = 0; r < 2 * ROWS; r++) over[r] = 1 / sums[r];
}

/* out[r] (`spanned` vectors) = over[r] * sum over keys of shares[r] times their values. */
INLINE void gather_values(const Attention *a, const float *values, const int32_t *tiles, int64_t n_tiles,
                          const vector *const *shares, const float *over, float *const *out, const int spanned,
                          const int careful) {
    vector sums[ROWS][SPAN] = {{{0}}};
    for (int64_t t = 0; t < n_tiles; t++) {
        int64_t first = (int64_t)tiles[t] * WIDTH, last = first + WIDTH < a->n ? first + WIDTH : a->n;
        for (int64_t j = first; j < last; j++) {
            const float *value = values + j * a->key_heads * a->d_head;
            for (int r = 0; r < ROWS; r++) {
                float share = ((const float *)(shares[r] + t))[j - first];
                if (careful && share == 0) continue;
                for (int v = 0; v < spanned; v++) sums[r][v] += *(const loose *)(value + v * WIDTH) * share;
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < spanned; v++) *(loose *)(out[r] + v * WIDTH) = sums[r][v] * over[r];
}

/* Attention of the queries of one block, for one key head and the heads that share it. */
INLINE void attend(const Attention *a, int64_t block, int64_t key_head, const int32_t *tiles, int64_t n_tiles,
                   vector *scores) {
    int64_t group = a->heads / a->key_heads, first = block * BLOCK;
    int64_t nodes = first + BLOCK < a->n ? BLOCK : a->n - first;
    const float *keys = a->keys + key_head * tiles_of(a->n) * a->d_head * WIDTH;
    const float *values = a->values + key_head * a->d_head;
    int64_t rows = nodes * group;
    for (int64_t begin = 0; begin < rows; begin += 2 * ROWS) {
        float *queries[2 * ROWS], over[2 * ROWS];
        const vector *shares[2 * ROWS];
        vector *of_row[2 * ROWS];
        int32_t node[2 * ROWS];
        for (int r = 0; r < 2 * ROWS; r++) { /* past the last row that one again: its results are the same */
            int64_t row = begin + r < rows ? begin + r : rows - 1;
            int64_t head = key_head * group + row % group;
            node[r] = (int32_t)(first + row / group);
            queries[r] = a->queries + (node[r] * a->heads + head) * a->d_head;
            shares[r] = scores + r * n_tiles;
        }
        for (int64_t t = 0; t < n_tiles; t++) {
            for (int r = 0; r < 2 * ROWS; r++) of_row[r] = scores + r * n_tiles + t;
            score(queries, keys + tiles[t] * a->d_head * WIDTH, a->d_head, of_row);
        }
        for (int r = 0; r < 2 * ROWS; r++) soften(a, node[r], tiles, n_tiles, scores + r * n_tiles);
        invert_sums(shares, n_tiles, over);
        for (int r = 0; r < 2 * ROWS; r += ROWS)
            for (int64_t at = 0; at < a->d_head; at += SPAN * WIDTH) {
                float *to[ROWS];
                for (int k = 0; k < ROWS; k++) to[k] = queries[r + k] + at;
                int whole_span = at + SPAN * WIDTH <= a->d_head;
                if (whole_span && !a->odd)
                    gather_values(a, values + at, tiles, n_tiles, shares + r, over + r, to, SPAN, 0);
                else
                    for (int64_t v = 0; v < SPAN && at + v * WIDTH < a->d_head; v++) {
                        gather_values(a, values + at + v * WIDTH, tiles, n_tiles, shares + r, over + r, to, 1, a->odd);
                        for (int k = 0; k < ROWS; k++) to[k] += WIDTH;
                    }
            }
    }
}

/* Attention of blocks `from` to `to` of BLOCK queries. d_head is a multiple of WIDTH. Returns -1 without memory. */
CLONES int lensd_attend(const Attention *a, int64_t from, int64_t to) {
    int64_t all_tiles = tiles_of(a->n);
    int32_t *tiles = malloc((all_tiles + 1) * sizeof(int32_t));
    int32_t *latest = malloc((all_tiles + 1) * sizeof(int32_t)); /* one past the last node that a tile is seen by */
    vector *scores = aligned_alloc(ALIGNMENT, (2 * ROWS * all_tiles * sizeof(vector) / ALIGNMENT + 1) * ALIGNMENT);
    int result = -1;
    if (tiles && latest && scores) {
        for (int64_t t = 0; t < all_tiles; t++) {
            latest[t] = 0;
            for (int k = 0; k < WIDTH; k++)
                if (a->end[t * WIDTH + k] > latest[t]) latest[t] = a->end[t * WIDTH + k];
        }
        for (int64_t block = from; block < to; block++) {
            int64_t n_tiles = 0, first = block * BLOCK, last = first + BLOCK < a->n ? first + BLOCK : a->n;
            for (int64_t t = 0; t * WIDTH < last; t++)
                if (latest[t] > first) tiles[n_tiles++] = (int32_t)t;
            for (int64_t head = 0; head < a->key_heads; head++) attend(a, block, head, tiles, n_tiles, scores);
        }
        result = 0;
    }
    free(tiles);
    free(latest);
    free(scores);
    return result;
}
