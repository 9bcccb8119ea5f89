/* The features above their thresholds: compacted, and the strongest of them under noise.
 *
 * One pass over what an SAE's product gave, where a library writes and reads the dense activations several times.
 * Plain C, built once for each level of processor; knows no Python.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../level.h"

#define BLOCK 64 /* entries that are looked at together for one that matters */

/* counts[r] = how many of the d entries of row r are above their thresholds, for rows `from` to `to`. */
void lensd_count(const float *dense, const float *thresholds, int64_t d, int64_t *counts, int64_t from, int64_t to) {
    for (int64_t r = from; r < to; r++) {
        const float *row = dense + r * d;
        int32_t count = 0;
        for (int64_t j = 0; j < d; j++) count += row[j] > thresholds[j];
        counts[r] = count;
    }
}

/* Those entries, by ascending index, in rows of `width`: the largest count at least. The rest of a row is 0. */
void lensd_compact(const float *dense, const float *thresholds, int64_t d, const int64_t *counts, int64_t width,
                   int64_t *indices, float *values, int64_t from, int64_t to) {
    for (int64_t r = from; r < to; r++) {
        const float *row = dense + r * d;
        int64_t *index = indices + r * width, count = counts[r];
        float *value = values + r * width;
        int64_t found = 0;
        for (int64_t j = 0; found < count; j++) { /* without a branch: what does not count is written over */
            index[found] = j;
            value[found] = row[j];
            found += row[j] > thresholds[j];
        }
        memset(index + count, 0, sizeof(int64_t) * (width - count));
        memset(value + count, 0, sizeof(float) * (width - count));
    }
}

/* Puts an entry among the strongest, in descending order; the weakest goes where they are `top` already. */
static void put(int64_t *index, float *value, int64_t found, int64_t top, int64_t new_index, float new_value) {
    int64_t at = found < top ? found : top - 1;
    for (; at > 0 && value[at - 1] < new_value; at--) {
        value[at] = value[at - 1];
        index[at] = index[at - 1];
    }
    value[at] = new_value;
    index[at] = new_index;
}

/* The `top` largest entries of x + noise (d) above their thresholds, which are not negative; -1 for none. Of equals
 * those of lower index. */
static void strongest(const float *x, const float *noise, const float *thresholds, int64_t d, int64_t top,
                      int64_t *index, float *value) {
    float sums[BLOCK], weakest = 0;
    int64_t found = 0;
    for (int64_t first = 0; first < d; first += BLOCK) {
        int64_t n = d - first < BLOCK ? d - first : BLOCK;
        int32_t matters = 0;
        for (int64_t j = 0; j < n; j++) {
            sums[j] = noise ? x[first + j] + noise[first + j] : x[first + j];
            matters |= (sums[j] > thresholds[first + j]) & (sums[j] > weakest);
        }
        if (!matters) continue;
        for (int64_t j = 0; j < n; j++)
            if (sums[j] > thresholds[first + j] && sums[j] > weakest) {
                put(index, value, found, top, first + j, sums[j]);
                if (found < top) found++;
                if (found == top) weakest = value[top - 1];
            }
    }
    for (; found < top; found++) index[found] = -1;
}

/* sets (rows, 1 + draws, top) = the strongest of each row of x (rows, d), and of it plus each of its `drawn` (rows,
 * draws) rows of `bank` (n, d). Returns -1 without memory. */
int lensd_strongest(const float *x, const float *bank, const int64_t *drawn, int64_t draws, const float *thresholds,
                    int64_t d, int64_t top, int64_t *sets, int64_t from, int64_t to) {
    float *value = malloc((top + 1) * sizeof(float));
    if (!value) return -1;
    for (int64_t r = from; r < to; r++)
        for (int64_t k = 0; k <= draws; k++) {
            const float *noise = k ? bank + drawn[r * draws + k - 1] * d : NULL;
            strongest(x + r * d, noise, thresholds, d, top, sets + (r * (draws + 1) + k) * top, value);
        }
    free(value);
    return 0;
}
