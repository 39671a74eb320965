/* What an instruction set's file provides, and what the driver hands it. Private to kernels/. */
#ifndef DUALFOCUS_CROP_ISA_H
#define DUALFOCUS_CROP_ISA_H

#include "crop.h"

enum {
    WEIGHT_BITS = 22, /* Pillow's fixed point: of 32 bits, 8 hold the value, 2 the negative lobes */
    STRIP = 4,        /* rows that the horizontal pass does at once */
    BLOCK = 4,        /* taps: the horizontal pass may read on to a block's end, and weighs that with 0 */
    BLOCK_READ = 16,  /* bytes that reading a block may touch: 12, and 4 beyond it */
    CHUNK = 64,       /* bytes that the vertical pass does at once */
};

/* The filter along one axis. Output i is pad_weight[i] * pad, plus the sum over t < taps[i] of
 * weights[i * stride + t] * value[first[i] + t], `first` counting from the crop's edge. Weights from taps[i]
 * to stride are 0. `first` never steps back, but for outputs without taps, where it is 0. */
typedef struct {
    int32_t size;        /* outputs */
    size_t stride;       /* a multiple of BLOCK */
    int32_t *first;      /* (size,) */
    int32_t *taps;       /* (size,) */
    int32_t *pad_weight; /* (size,) */
    int32_t *weights;    /* (size, stride) */
} crop_axis;

struct crop_isa {
    const char *name;
    int (*supported)(void);

    /* Rearranges the horizontal weights in place, block by block, to what `horizontal` reads. May be NULL. */
    void (*pack)(int32_t *weights, size_t blocks);

    /* Filters STRIP rows to axis->size pixels each. bias[x]: what the sums of red, green and blue start from.
     * Writes one byte beyond the last pixel of every row. */
    void (*horizontal)(const crop_axis *axis, const int32_t (*bias)[4], const uint8_t *const rows[STRIP],
                       uint8_t *const out[STRIP]);

    /* out[i] = the rounded, clipped sum over t of weights[t] * rows[t][i]; `bytes` is a multiple of CHUNK. */
    void (*vertical)(const uint8_t *const *rows, const int32_t *weights, size_t taps, uint8_t *out,
                     size_t bytes);
};

static inline size_t block_count(int32_t taps)
{
    return ((size_t)taps + BLOCK - 1) / BLOCK;
}

#if defined(__x86_64__)
extern const crop_isa crop_avx512, crop_avx2;
#elif defined(__aarch64__)
extern const crop_isa crop_neon;
#endif

#endif
