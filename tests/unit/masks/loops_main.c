/* Runs the loops of gap_ds/masks/cpu.c on a machine without Python, such as an emulated one: see test_compilers.py.
   Every result is compared with the plainest code for it. Returns the number of the first check that fails. */

#include <stdlib.h>
#include <string.h>

#include "../../../gap_ds/masks/cpu.c"

static uint64_t state = 88172645463325252u;

static uint64_t next(void) { /* xorshift, Marsaglia 2003 */
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

enum { N = 1003, ROWS = 5, INPUTS = 40, OUTPUTS = 21 };

static int kept(const uint8_t *bits, int i) { return bits[i / 8] >> i % 8 & 1; }

#define CHECK_WORDS(BITS)                                                                                             \
    {                                                                                                                 \
        static uint##BITS##_t words[N], before[N];                                                                    \
        for (int i = 0; i < N; i++) words[i] = before[i] = (uint##BITS##_t)(next() | 1);                              \
        int64_t table[4] = {(intptr_t)words, (intptr_t)bits, N, BITS / 8}, found = -1, expected = 0;                  \
        for (int i = 0; i < N; i++) expected += !kept(bits, i) && (uint##BITS##_t)(words[i] << 1);                    \
        count_revived(table, 1, &found);                                                                              \
        if (found != expected) return BITS + 1;                                                                       \
        zero_pruned(table, 1);                                                                                        \
        for (int i = 0; i < N; i++)                                                                                   \
            if (words[i] != (kept(bits, i) ? before[i] : 0)) return BITS + 2;                                         \
        count_revived(table, 1, &found);                                                                              \
        if (found) return BITS + 3;                                                                                   \
    }

static int passes(void) {
    static int32_t numbers[N], keys[N], some[N];
    static int64_t counts[1 + 2048];
    static uint8_t above[N / 8 + 1];
    for (int i = 0; i < N; i++) numbers[i] = (int32_t)next();
    magnitude_keys(numbers, N, keys);
    for (int i = 0; i < N; i++) {
        int32_t magnitude = numbers[i] & 0x7FFFFFFF;
        if (keys[i] != (magnitude > 0x7F800000 ? -1 : magnitude)) return 1;
    }
    count_keys(keys, N, 20, -1, counts);
    int64_t total = 0;
    for (int b = 0; b < 1 + 2048; b++) {
        int64_t expected = 0;
        for (int i = 0; i < N; i++) expected += (keys[i] >> 20) + 1 == b;
        if (counts[b] != expected) return 2;
        total += counts[b];
    }
    if (total != N) return 3;
    int64_t prefix = keys[N / 2] >> 24, many = keys_with(keys, N, 24, prefix, some), seen = 0;
    for (int i = 0; i < N; i++)
        if (keys[i] >> 24 == prefix && some[seen++] != keys[i]) return 4;
    if (seen != many) return 5;
    pack_above(keys, N, keys[7], above);
    for (int i = 0; i < N; i++)
        if (kept(above, i) != (keys[i] > keys[7])) return 6;
    return 0;
}

static int products(int64_t width) {
    static float x[64 * INPUTS], xt[64 * INPUTS], values[OUTPUTS * INPUTS], bias[OUTPUTS], y[64 * OUTPUTS];
    static int32_t crow[OUTPUTS + 1], col[OUTPUTS * INPUTS];
    int64_t rows = width > 3 ? width - 3 : width;
    /* Small integers have exact sums in any order. */
    for (int i = 0; i < rows * INPUTS; i++) x[i] = (float)(next() % 9) - 4;
    int count = 0;
    for (int o = 0; o < OUTPUTS; o++) {
        crow[o] = count;
        bias[o] = (float)(next() % 9);
        for (int i = 0; i < INPUTS; i++)
            if (next() % 3 == 0) {
                col[count] = i;
                values[count++] = (float)(next() % 9) - 4;
            }
    }
    crow[OUTPUTS] = count;
    transpose(x, rows, INPUTS, width, xt);
    multiply(crow, col, values, bias, xt, width, rows, 0, OUTPUTS, y, OUTPUTS);
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < OUTPUTS; o++) {
            float sum = bias[o];
            for (int k = crow[o]; k < crow[o + 1]; k++) sum += values[k] * x[r * INPUTS + col[k]];
            if (sum != y[r * OUTPUTS + o]) return 1;
        }
    return 0;
}

int main(void) {
    static uint8_t bits[N / 8 + 1];
    for (int i = 0; i < N; i++) bits[i / 8] |= (uint8_t)((next() >> 7 & 1) << i % 8);
    CHECK_WORDS(16)
    CHECK_WORDS(32)
    CHECK_WORDS(64)
    int failed = passes();
    if (failed) return failed;
    const int64_t widths[] = {1, 4, 8, 16, 32, 48, 64};
    for (int i = 0; i < 7; i++)
        if (products(widths[i])) return 100 + i;
    return 0;
}
