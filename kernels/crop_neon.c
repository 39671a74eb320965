/* NEON, part of every 64-bit ARM: thirty-two-bit multiplies, one tap's three channels at a time. */
#include "crop_isa.h"

#if defined(__aarch64__)

#include <arm_neon.h>
#include <string.h>

static int supported(void)
{
    return 1;
}

static void horizontal(const crop_axis *axis, const int32_t (*bias)[4], const uint8_t *const rows[STRIP],
                       uint8_t *const out[STRIP])
{
    /* Pixel t of four, its bytes widened to thirty-two bits: R G B 0. An index out of range gives 0. */
    static const uint8_t spread[BLOCK][16] = {
        {0, 255, 255, 255, 1, 255, 255, 255, 2, 255, 255, 255, 255, 255, 255, 255},
        {3, 255, 255, 255, 4, 255, 255, 255, 5, 255, 255, 255, 255, 255, 255, 255},
        {6, 255, 255, 255, 7, 255, 255, 255, 8, 255, 255, 255, 255, 255, 255, 255},
        {9, 255, 255, 255, 10, 255, 255, 255, 11, 255, 255, 255, 255, 255, 255, 255},
    };
    const uint8x16_t spread0 = vld1q_u8(spread[0]), spread1 = vld1q_u8(spread[1]);
    const uint8x16_t spread2 = vld1q_u8(spread[2]), spread3 = vld1q_u8(spread[3]);

    for (int32_t x = 0; x < axis->size; x++) {
        const int32_t *weights = axis->weights + (size_t)x * axis->stride;
        size_t at = 3 * (size_t)axis->first[x];
        int32x4_t sums[STRIP];
        for (int r = 0; r < STRIP; r++)
            sums[r] = vld1q_s32(bias[x]);
        for (size_t b = block_count(axis->taps[x]); b > 0; b--, weights += BLOCK, at += 3 * BLOCK) {
            int32x4_t weight = vld1q_s32(weights);
            for (int r = 0; r < STRIP; r++) {
                uint8x16_t bytes = vld1q_u8(rows[r] + at);
                int32x4_t pixel0 = vreinterpretq_s32_u8(vqtbl1q_u8(bytes, spread0));
                int32x4_t pixel1 = vreinterpretq_s32_u8(vqtbl1q_u8(bytes, spread1));
                int32x4_t pixel2 = vreinterpretq_s32_u8(vqtbl1q_u8(bytes, spread2));
                int32x4_t pixel3 = vreinterpretq_s32_u8(vqtbl1q_u8(bytes, spread3));
                sums[r] = vmlaq_laneq_s32(sums[r], pixel0, weight, 0);
                sums[r] = vmlaq_laneq_s32(sums[r], pixel1, weight, 1);
                sums[r] = vmlaq_laneq_s32(sums[r], pixel2, weight, 2);
                sums[r] = vmlaq_laneq_s32(sums[r], pixel3, weight, 3);
            }
        }
        for (int r = 0; r < STRIP; r++) {
            uint16x4_t values = vqmovun_s32(vshrq_n_s32(sums[r], WEIGHT_BITS));
            uint8x8_t bytes = vqmovn_u16(vcombine_u16(values, values));
            memcpy(out[r] + 3 * (size_t)x, &bytes, 4);
        }
    }
}

static void vertical(const uint8_t *const *rows, const int32_t *weights, size_t taps, uint8_t *out,
                     size_t bytes)
{
    for (size_t at = 0; at < bytes; at += 16) {
        int32x4_t sums[4];
        for (int i = 0; i < 4; i++)
            sums[i] = vdupq_n_s32(HALF);
        for (size_t t = 0; t < taps; t++) {
            uint8x16_t values = vld1q_u8(rows[t] + at);
            uint16x8_t low = vmovl_u8(vget_low_u8(values)), high = vmovl_high_u8(values);
            uint32x4_t quads[4] = {
                vmovl_u16(vget_low_u16(low)),
                vmovl_high_u16(low),
                vmovl_u16(vget_low_u16(high)),
                vmovl_high_u16(high),
            };
            for (int i = 0; i < 4; i++)
                sums[i] = vmlaq_n_s32(sums[i], vreinterpretq_s32_u32(quads[i]), weights[t]);
        }
        for (int i = 0; i < 4; i++)
            sums[i] = vshrq_n_s32(sums[i], WEIGHT_BITS);
        uint16x8_t low = vcombine_u16(vqmovun_s32(sums[0]), vqmovun_s32(sums[1]));
        uint16x8_t high = vcombine_u16(vqmovun_s32(sums[2]), vqmovun_s32(sums[3]));
        vst1q_u8(out + at, vcombine_u8(vqmovn_u16(low), vqmovn_u16(high)));
    }
}

const crop_isa crop_neon = {"neon", supported, NULL, horizontal, vertical};

#else
typedef int nothing_to_compile; /* an empty translation unit is not C */
#endif
