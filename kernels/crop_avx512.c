/* AVX-512 with VNNI (Ice Lake, Zen 4 and later): byte multiplies, four taps of four rows at a time. */
#include "crop_isa.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vnni")))

static int supported(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
           && __builtin_cpu_supports("avx512vnni");
}

/* A weight takes 24 bits, a multiplier 8: weight = digit 2 * 2^16 + digit 1 * 2^8 + digit 0, all signed.
 * A block becomes {digit 0 of its four taps, digit 1 of them, digit 2 of them, unused}. */
static void pack(int32_t *weights, size_t blocks)
{
    for (size_t b = 0; b < blocks; b++, weights += BLOCK) {
        int8_t digits[4 * BLOCK] = {0};
        for (int t = 0; t < BLOCK; t++) {
            int32_t rest = weights[t];
            for (int d = 0; d < 3; d++) {
                int32_t digit = ((rest + 128) & 255) - 128;
                digits[d * BLOCK + t] = (int8_t)digit;
                rest = (rest - digit) / 256;
            }
        }
        memcpy(weights, digits, sizeof digits);
    }
}

AVX512 static __m512i load_block(const uint8_t *const rows[STRIP], size_t at)
{
    __m512i block = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows[0] + at)));
    block = _mm512_inserti32x4(block, _mm_loadu_si128((const __m128i *)(rows[1] + at)), 1);
    block = _mm512_inserti32x4(block, _mm_loadu_si128((const __m128i *)(rows[2] + at)), 2);
    return _mm512_inserti32x4(block, _mm_loadu_si128((const __m128i *)(rows[3] + at)), 3);
}

AVX512 static void horizontal(const crop_axis *axis, const int32_t (*bias)[4],
                              const uint8_t *const rows[STRIP], uint8_t *const out[STRIP])
{
    /* In each row's 128 bits: R0R1R2R3 G0G1G2G3 B0B1B2B3 ----. */
    const __m512i planes = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1));

    for (int32_t x = 0; x < axis->size; x++) {
        const int32_t *weights = axis->weights + (size_t)x * axis->stride;
        size_t at = 3 * (size_t)axis->first[x];
        __m512i sums0 = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)bias[x]));
        __m512i sums1 = _mm512_setzero_si512(), sums2 = _mm512_setzero_si512();
        for (size_t b = block_count(axis->taps[x]); b > 0; b--, weights += BLOCK, at += 3 * BLOCK) {
            __m512i pixels = _mm512_shuffle_epi8(load_block(rows, at), planes);
            sums0 = _mm512_dpbusd_epi32(sums0, pixels, _mm512_set1_epi32(weights[0]));
            sums1 = _mm512_dpbusd_epi32(sums1, pixels, _mm512_set1_epi32(weights[1]));
            sums2 = _mm512_dpbusd_epi32(sums2, pixels, _mm512_set1_epi32(weights[2]));
        }
        sums1 = _mm512_add_epi32(_mm512_slli_epi32(sums1, 8), _mm512_slli_epi32(sums2, 16));
        __m512i values = _mm512_srai_epi32(_mm512_add_epi32(sums0, sums1), WEIGHT_BITS);
        uint32_t pixels[STRIP];
        _mm_storeu_si128((__m128i *)pixels,
                         _mm512_cvtusepi32_epi8(_mm512_max_epi32(values, _mm512_setzero_si512())));
        for (int r = 0; r < STRIP; r++)
            memcpy(out[r] + 3 * (size_t)x, &pixels[r], 4);
    }
}

AVX512 static void vertical(const uint8_t *const *rows, const int32_t *weights, size_t taps, uint8_t *out,
                            size_t bytes)
{
    for (size_t at = 0; at < bytes; at += 64) {
        __m512i sums[4];
        for (int i = 0; i < 4; i++)
            sums[i] = _mm512_set1_epi32(HALF);
        for (size_t t = 0; t < taps; t++) {
            __m512i weight = _mm512_set1_epi32(weights[t]);
            for (int i = 0; i < 4; i++) {
                __m128i loaded = _mm_loadu_si128((const __m128i *)(rows[t] + at + 16 * i));
                __m512i values = _mm512_cvtepu8_epi32(loaded);
                sums[i] = _mm512_add_epi32(sums[i], _mm512_mullo_epi32(values, weight));
            }
        }
        for (int i = 0; i < 4; i++) {
            __m512i values = _mm512_srai_epi32(sums[i], WEIGHT_BITS);
            values = _mm512_max_epi32(values, _mm512_setzero_si512()); /* 255: the conversion */
            _mm_storeu_si128((__m128i *)(out + at + 16 * i), _mm512_cvtusepi32_epi8(values));
        }
    }
}

const crop_isa crop_avx512 = {"avx512", supported, pack, horizontal, vertical};

#else
typedef int nothing_to_compile; /* an empty translation unit is not C */
#endif
