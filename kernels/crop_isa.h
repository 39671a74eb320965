/* What an instruction set's file provides, and what the driver hands it. Private to kernels/. */
#ifndef DUALFOCUS_CROP_ISA_H
#define DUALFOCUS_CROP_ISA_H

#include "crop_math.h"
#include "crop_plan.h"

enum {
    STRIP = 4,       /* rows that the horizontal pass does at once */
    BLOCK_READ = 16, /* bytes that reading a block may touch: 12, and 4 beyond it */
    CHUNK = 64,      /* bytes that the vertical pass does at once */
};

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
