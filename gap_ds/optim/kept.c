/* Optimizer steps over the kept weights of masked pieces. gap_ds/optim/cpu.py compiles this file for the machine it runs
   on, with -ffp-contract=off: a multiplication and an addition are one operation where fmaf says so, as in PyTorch's
   kernels, and nowhere else. Moments are packed in the order of the bits. */

#include <stdint.h>
#include <string.h>

#define fma __builtin_fmaf
/* Weights whose bits are decoded at a time, a multiple of 64; and of how many floats ahead memory is asked for. Asking
   past the end is harmless. */
#define BLOCK 2048
#define AHEAD 2048

/* Positions of the bits that are set among the first `count`, ascending, from `start` on; returns their number. Eight
   are written at once, which takes fewer branches that cannot be foreseen: `at` needs room for seven more. Weights that
   the caller is going to read or write are asked for. */
static int64_t positions(const uint8_t *mask, int64_t count, int32_t start, int32_t *at, const float *asked, int write) {
    int64_t many = 0;
    for (int64_t i = 0; i < count; i += 64) {
        uint64_t bits = 0;
        int64_t left = (count - i + 7) / 8;
        memcpy(&bits, mask + i / 8, left < 8 ? left : 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        bits = __builtin_bswap64(bits);
#endif
        for (int j = 0; j < 64; j += 16)
            if (write) __builtin_prefetch(asked + i + j + AHEAD, 1);
            else __builtin_prefetch(asked + i + j + AHEAD, 0);
        int found = __builtin_popcountll(bits);
        for (int32_t *to = at + many, *end = to + found; to < end; to += 8)
            for (int j = 0; j < 8; j++, bits &= bits - 1)
                to[j] = start + (int32_t)i + __builtin_ctzll(bits | 1ull << 63);
        many += found;
    }
    return many;
}

/* Both moments of AdamW, and the positions of the kept weights. sign: -1 to maximize. one: 1 - beta1. value: 1 - beta2. */
void adamw_moments(const float *gradient, const uint8_t *mask, int64_t count, float sign, float one, float beta2,
                   float value, float *m, float *v, int32_t *at) {
    float g[BLOCK];
    for (int64_t first = 0; first < count; first += BLOCK) {
        int64_t size = count - first < BLOCK ? count - first : BLOCK;
        int64_t many = positions(mask + first / 8, size, (int32_t)first, at, gradient + first, 0);
        for (int64_t k = 0; k < many; k++) g[k] = sign * gradient[at[k]];
        if (one < 0.5f)
            for (int64_t k = 0; k < many; k++) m[k] = fma(one, g[k] - m[k], m[k]);
        else
            for (int64_t k = 0; k < many; k++) m[k] = fma(one - 1.0f, g[k] - m[k], g[k]);
        for (int64_t k = 0; k < many; k++) v[k] = fma(value * g[k], g[k], v[k] * beta2);
        m += many;
        v += many;
        at += many;
    }
}

/* Weights of AdamW at these positions. root: square roots of the second moments. decay: 1 - lr * weight decay. size: -lr
   / correction of the first moment. correction: square root of that of the second. */
void adamw_weights(float *weights, const int32_t *at, int64_t kept, const float *m, const float *root, float decay,
                   float size, float correction, float eps) {
    enum { TOGETHER = 256 };
    float w[TOGETHER];
    for (int64_t first = 0; first < kept; first += TOGETHER) {
        int64_t many = kept - first < TOGETHER ? kept - first : TOGETHER;
        for (int64_t k = 0; k < many; k++) {
            w[k] = weights[at[first + k]];
            if (first + k + TOGETHER < kept) __builtin_prefetch(weights + at[first + k + TOGETHER], 1);
        }
        for (int64_t k = 0; k < many; k++)
            w[k] = w[k] * decay + size * m[first + k] / (root[first + k] / correction + eps);
        for (int64_t k = 0; k < many; k++) weights[at[first + k]] = w[k];
    }
}

/* SGD. buffer: momentum, or NULL. made: 0 if the buffer has no values yet. rate: -lr. rest: 1 - dampening. */
void sgd(float *weights, const float *gradient, const uint8_t *mask, int64_t count, float *buffer, int64_t made,
         float sign, float decay, float momentum, float rest, int64_t nesterov, float rate) {
    float g[BLOCK], w[BLOCK];
    int32_t at[BLOCK + 7];
    for (int64_t first = 0; first < count; first += BLOCK) {
        int64_t size = count - first < BLOCK ? count - first : BLOCK;
        int64_t many = positions(mask + first / 8, size, (int32_t)first, at, weights + first, 1);
        for (int64_t k = 0; k < many; k++) w[k] = weights[at[k]];
        for (int64_t k = 0; k < many; k++) g[k] = sign * gradient[at[k]];
        if (decay != 0.0f)
            for (int64_t k = 0; k < many; k++) g[k] = fma(decay, w[k], g[k]);
        if (buffer) {
            if (made)
                for (int64_t k = 0; k < many; k++) buffer[k] = fma(rest, g[k], buffer[k] * momentum);
            else
                memcpy(buffer, g, many * sizeof(float));
            if (nesterov)
                for (int64_t k = 0; k < many; k++) g[k] = fma(momentum, buffer[k], g[k]);
            else
                memcpy(g, buffer, many * sizeof(float));
            buffer += many;
        }
        for (int64_t k = 0; k < many; k++) w[k] = fma(rate, g[k], w[k]);
        for (int64_t k = 0; k < many; k++) weights[at[k]] = w[k];
    }
}
