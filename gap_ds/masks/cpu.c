/* Inner loops of masks, selection and sparse inference on CPUs. gap_ds/masks/cpu.py compiles this file for the machine
   it runs on. Vectors use the extension of GCC and Clang, which split them where the processor has shorter ones. */

#include <stdint.h>

/* -- masks: words whose bit is 0 become 0, in place ---------------------------------------------------------------- */

/* Many pieces are a table with four numbers for each: address of the words, address of their bits, number of words, and
   bytes of a word (2, 4 or 8). */
#define OVER_PIECES(CALL)                                                                                             \
    for (int64_t i = 0; i < pieces; i++, table += 4) {                                                                \
        void *words = (void *)(intptr_t)table[0];                                                                     \
        const uint8_t *mask = (const uint8_t *)(intptr_t)table[1];                                                    \
        switch (table[3]) {                                                                                           \
        case 2: CALL(16); break;                                                                                      \
        case 4: CALL(32); break;                                                                                      \
        case 8: CALL(64); break;                                                                                      \
        }                                                                                                             \
    }

/* Eight weights share a byte of the mask, so eight words are combined with eight bits at once, and two cache lines of
   words in a round, which asks for those that come AHEAD words later. Asking past the end is harmless. */
#define AHEAD 1024
#define EIGHTS(BITS) (128 / BITS)
#define ASK(BITS, WRITE)                                                                                              \
    __builtin_prefetch(words + 8 * from + AHEAD, WRITE);                                                              \
    __builtin_prefetch(words + 8 * from + AHEAD + 512 / BITS, WRITE);

#define ZERO_PRUNED(BITS)                                                                                             \
    typedef uint##BITS##_t words##BITS __attribute__((vector_size(BITS), aligned(BITS / 8), may_alias));              \
    static void zero_pruned_##BITS(uint##BITS##_t *words, const uint8_t *mask, int64_t count) {                       \
        const words##BITS bits = {1, 2, 4, 8, 16, 32, 64, 128};                                                       \
        int64_t from = 0;                                                                                             \
        for (; from + EIGHTS(BITS) <= count / 8; from += EIGHTS(BITS)) {                                              \
            ASK(BITS, 1)                                                                                              \
            for (int64_t i = from; i < from + EIGHTS(BITS); i++) {                                                    \
                words##BITS *eight = (words##BITS *)(words + 8 * i);                                                  \
                *eight &= (words##BITS)((((words##BITS){0} + mask[i]) & bits) == bits);                               \
            }                                                                                                         \
        }                                                                                                             \
        for (int64_t i = 8 * from; i < count; i++)                                                                    \
            words[i] &= (uint##BITS##_t)0 - (uint##BITS##_t)(mask[i / 8] >> i % 8 & 1);                               \
    }

ZERO_PRUNED(16)
ZERO_PRUNED(32)
ZERO_PRUNED(64)

void zero_pruned(const int64_t *table, int64_t pieces) {
#define ZERO(BITS) zero_pruned_##BITS(words, mask, table[2])
    OVER_PIECES(ZERO)
}

/* Counts the floating-point words other than 0 and -0 whose bit is 0. There should be none, so one pass combines all of
   them by a bitwise or, without their signs, and they are counted only if that is not 0. */
#define COUNT_REVIVED(BITS)                                                                                           \
    static int64_t count_revived_##BITS(const uint##BITS##_t *words, const uint8_t *mask, int64_t count) {            \
        const words##BITS bits = {1, 2, 4, 8, 16, 32, 64, 128};                                                       \
        words##BITS eight = {0};                                                                                      \
        int64_t from = 0;                                                                                             \
        for (; from + EIGHTS(BITS) <= count / 8; from += EIGHTS(BITS)) {                                              \
            ASK(BITS, 0)                                                                                              \
            for (int64_t i = from; i < from + EIGHTS(BITS); i++)                                                      \
                eight |= *(const words##BITS *)(words + 8 * i) &                                                      \
                         (words##BITS)((((words##BITS){0} + mask[i]) & bits) != bits);                                \
        }                                                                                                             \
        uint##BITS##_t any = 0;                                                                                       \
        for (int i = 0; i < 8; i++) any |= eight[i];                                                                  \
        int64_t found = 0, first = (uint##BITS##_t)(any << 1) ? 0 : 8 * from;                                         \
        for (int64_t i = first; i < count; i++)                                                                       \
            found += (uint##BITS##_t)(words[i] << 1) && !(mask[i / 8] >> i % 8 & 1);                                  \
        return found;                                                                                                 \
    }

COUNT_REVIVED(16)
COUNT_REVIVED(32)
COUNT_REVIVED(64)

/* found: one number for each piece. */
void count_revived(const int64_t *table, int64_t pieces, int64_t *found) {
#define COUNT(BITS) found[i] = count_revived_##BITS(words, mask, table[2])
    OVER_PIECES(COUNT)
}

/* -- selection: passes over the keys of a piece's weights ---------------------------------------------------------- */

/* The bits of fp32 numbers without the sign, which have the order of the magnitudes; -1 for a NaN. */
void magnitude_keys(const int32_t *bits, int64_t count, int32_t *keys) {
    for (int64_t i = 0; i < count; i++) {
        int32_t magnitude = bits[i] & 0x7FFFFFFF;
        keys[i] = magnitude > 0x7F800000 ? -1 : magnitude;
    }
}

/* counts[(key >> shift) - base] += 1 for every key. */
void count_keys(const int32_t *keys, int64_t count, int64_t shift, int64_t base, int64_t *counts) {
    for (int64_t i = 0; i < count; i++) counts[(keys[i] >> shift) - base]++;
}

/* Copies the keys with this prefix (key >> shift) to `found`, which has room for all, and returns their number. Few
   have it, so sixteen keys are tested together, and one by one only if one of them has it. */
int64_t keys_with(const int32_t *keys, int64_t count, int64_t shift, int64_t prefix, int32_t *found) {
    int64_t many = 0, i = 0;
    for (; i + 16 <= count; i += 16) {
        int any = 0;
        for (int j = 0; j < 16; j++) any |= keys[i + j] >> shift == (int32_t)prefix;
        for (int j = 0; any && j < 16; j++) {
            found[many] = keys[i + j];
            many += keys[i + j] >> shift == (int32_t)prefix;
        }
    }
    for (; i < count; i++) {
        found[many] = keys[i];
        many += keys[i] >> shift == (int32_t)prefix;
    }
    return many;
}

/* Bit i is 1 if key i is above the limit. */
void pack_above(const int32_t *keys, int64_t count, int64_t limit, uint8_t *bits) {
    for (int64_t i = 0; i < count / 8; i++) {
        uint8_t byte = 0;
        for (int j = 0; j < 8; j++) byte |= (keys[8 * i + j] > (int32_t)limit) << j;
        bits[i] = byte;
    }
    if (count % 8) bits[count / 8] = 0;
    for (int64_t i = count / 8 * 8; i < count; i++) bits[i / 8] |= (keys[i] > (int32_t)limit) << i % 8;
}

/* -- compressed rows (W: outputs x inputs) times activations (x: rows x inputs) ------------------------------------ */

/* x^T with `width` columns; columns beyond the rows are 0. Sixteen inputs at a time are one cache line of x. */
void transpose(const float *x, int64_t rows, int64_t inputs, int64_t width, float *xt) {
    for (int64_t first = 0; first < inputs; first += 16) {
        int64_t count = inputs - first < 16 ? inputs - first : 16;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < count; i++) xt[(first + i) * width + r] = x[r * inputs + first + i];
        for (int64_t i = 0; i < count; i++)
            for (int64_t r = rows; r < width; r++) xt[(first + i) * width + r] = 0;
    }
}

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef float sixteen __attribute__((vector_size(64), aligned(4), may_alias));

/* y[r, o - from] = bias[o] + sum over the weights k of row o of values[k] * x[r, col[k]], for outputs from <= o < to.
   The sums of one output for all rows stay in registers, in as many chains as hide the latency of an addition. Sixteen
   outputs are transposed into lines of y together. */
#define MULTIPLY(VECTOR, COUNT, CHAINS)                                                                               \
    static void multiply_##VECTOR##_##COUNT(                                                                          \
        const int32_t *crow, const int32_t *col, const float *values, const float *bias, const float *xt,             \
        int64_t rows, int64_t from, int64_t to, float *y, int64_t stride) {                                           \
        enum { WIDTH = sizeof(VECTOR) / sizeof(float) * COUNT };                                                      \
        for (int64_t first = from; first < to; first += 16) {                                                         \
            VECTOR tile[16][COUNT];                                                                                   \
            int64_t outputs = to - first < 16 ? to - first : 16;                                                      \
            for (int64_t o = 0; o < outputs; o++) {                                                                   \
                VECTOR sum[CHAINS][COUNT] = {{{0}}};                                                                  \
                int64_t k = crow[first + o], end = crow[first + o + 1];                                               \
                for (; k + CHAINS <= end; k += CHAINS)                                                                \
                    for (int i = 0; i < CHAINS; i++)                                                                  \
                        for (int c = 0; c < COUNT; c++)                                                               \
                            sum[i][c] += values[k + i] * ((const VECTOR *)(xt + (int64_t)col[k + i] * WIDTH))[c];     \
                for (; k < end; k++)                                                                                  \
                    for (int c = 0; c < COUNT; c++)                                                                   \
                        sum[0][c] += values[k] * ((const VECTOR *)(xt + (int64_t)col[k] * WIDTH))[c];                 \
                for (int c = 0; c < COUNT; c++) {                                                                     \
                    tile[o][c] = sum[0][c] + (bias ? bias[first + o] : 0.0f);                                         \
                    for (int i = 1; i < CHAINS; i++) tile[o][c] += sum[i][c];                                         \
                }                                                                                                     \
            }                                                                                                         \
            for (int64_t r = 0; r < rows; r++)                                                                        \
                for (int64_t o = 0; o < outputs; o++)                                                                 \
                    y[r * stride + first - from + o] = ((const float *)tile[o])[r];                                   \
        }                                                                                                             \
    }

MULTIPLY(four, 1, 8)
MULTIPLY(eight, 1, 8)
MULTIPLY(sixteen, 1, 6)
MULTIPLY(sixteen, 2, 3)
MULTIPLY(sixteen, 3, 2)
MULTIPLY(sixteen, 4, 2)

/* The same for a single row. */
static void multiply_one(const int32_t *crow, const int32_t *col, const float *values, const float *bias,
                         const float *x, int64_t from, int64_t to, float *y) {
    for (int64_t o = from; o < to; o++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int32_t k = crow[o]; k < crow[o + 1]; k++) sum += values[k] * x[col[k]];
        y[o - from] = sum + (bias ? bias[o] : 0.0f);
    }
}

/* xt: a result of `transpose` with one of these widths; stride: distance of the rows of y. */
void multiply(const int32_t *crow, const int32_t *col, const float *values, const float *bias, const float *xt,
              int64_t width, int64_t rows, int64_t from, int64_t to, float *y, int64_t stride) {
    switch (width) {
    case 1: multiply_one(crow, col, values, bias, xt, from, to, y); break;
    case 4: multiply_four_1(crow, col, values, bias, xt, rows, from, to, y, stride); break;
    case 8: multiply_eight_1(crow, col, values, bias, xt, rows, from, to, y, stride); break;
    case 16: multiply_sixteen_1(crow, col, values, bias, xt, rows, from, to, y, stride); break;
    case 32: multiply_sixteen_2(crow, col, values, bias, xt, rows, from, to, y, stride); break;
    case 48: multiply_sixteen_3(crow, col, values, bias, xt, rows, from, to, y, stride); break;
    case 64: multiply_sixteen_4(crow, col, values, bias, xt, rows, from, to, y, stride); break;
    }
}
