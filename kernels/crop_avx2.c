/* AVX2: sixteen-bit multiplies, two taps at a time. */
#include "crop_isa.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2")))
#define LOW_BITS 15

static int supported(void)
{
    return __builtin_cpu_supports("avx2");
}

/* A weight takes 24 bits, a multiplier 16: weight = high * 2^15 + low, both signed. A block becomes
 * {low 0, low 1, high 0, high 1, low 2, low 3, high 2, high 3}. */
static void pack(int32_t *weights, size_t blocks)
{
    for (size_t b = 0; b < blocks; b++, weights += BLOCK) {
        int16_t halves[2 * BLOCK];
        for (int t = 0; t < BLOCK; t++) {
            const int32_t half = 1 << (LOW_BITS - 1), mask = (1 << LOW_BITS) - 1;
            int32_t low = ((weights[t] + half) & mask) - half;
            int at = t / 2 * 4 + t % 2;
            halves[at] = (int16_t)low;
            halves[at + 2] = (int16_t)((weights[t] - low) / (1 << LOW_BITS));
        }
        memcpy(weights, halves, sizeof halves);
    }
}

AVX2 static void horizontal(const crop_axis *axis, const int32_t (*bias)[4], const uint8_t *const rows[STRIP],
                            uint8_t *const out[STRIP])
{
    /* Four pixels to sixteen-bit pairs of neighbours: R0R1 G0G1 B0B1 -- | R2R3 G2G3 B2B3 --. */
    const __m256i pairs = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,
                                           6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    const __m256i lows = _mm256_setr_epi8(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3,
                                          8, 9, 10, 11, 8, 9, 10, 11, 8, 9, 10, 11, 8, 9, 10, 11);
    const __m256i highs = _mm256_add_epi8(lows, _mm256_set1_epi8(4));

    for (int32_t x = 0; x < axis->size; x++) {
        const int32_t *weights = axis->weights + (size_t)x * axis->stride;
        size_t at = 3 * (size_t)axis->first[x];
        __m256i low[STRIP], high[STRIP];
        for (int r = 0; r < STRIP; r++)
            low[r] = high[r] = _mm256_setzero_si256();
        for (size_t b = block_count(axis->taps[x]); b > 0; b--, weights += BLOCK, at += 3 * BLOCK) {
            __m256i block = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)weights));
            __m256i low_weights = _mm256_shuffle_epi8(block, lows);
            __m256i high_weights = _mm256_shuffle_epi8(block, highs);
            for (int r = 0; r < STRIP; r++) {
                __m128i bytes = _mm_loadu_si128((const __m128i *)(rows[r] + at));
                __m256i pixels = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), pairs);
                low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(pixels, low_weights));
                high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(pixels, high_weights));
            }
        }
        __m128i start = _mm_loadu_si128((const __m128i *)bias[x]), sums[STRIP];
        for (int r = 0; r < STRIP; r++) {
            __m256i both = _mm256_add_epi32(low[r], _mm256_slli_epi32(high[r], LOW_BITS));
            __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
            sums[r] = _mm_srai_epi32(_mm_add_epi32(sum, start), WEIGHT_BITS);
        }
        __m128i words01 = _mm_packs_epi32(sums[0], sums[1]), words23 = _mm_packs_epi32(sums[2], sums[3]);
        __m128i bytes = _mm_packus_epi16(words01, words23);
        uint32_t pixels[STRIP];
        _mm_storeu_si128((__m128i *)pixels, bytes);
        for (int r = 0; r < STRIP; r++)
            memcpy(out[r] + 3 * (size_t)x, &pixels[r], 4);
    }
}

AVX2 static void vertical(const uint8_t *const *rows, const int32_t *weights, size_t taps, uint8_t *out,
                          size_t bytes)
{
    for (size_t at = 0; at < bytes; at += 32) {
        __m256i sums[4];
        for (int i = 0; i < 4; i++)
            sums[i] = _mm256_set1_epi32(HALF);
        for (size_t t = 0; t < taps; t++) {
            __m256i weight = _mm256_set1_epi32(weights[t]);
            for (int i = 0; i < 4; i++) {
                __m128i loaded = _mm_loadl_epi64((const __m128i *)(rows[t] + at + 8 * i));
                __m256i values = _mm256_cvtepu8_epi32(loaded);
                sums[i] = _mm256_add_epi32(sums[i], _mm256_mullo_epi32(values, weight));
            }
        }
        for (int i = 0; i < 4; i++)
            sums[i] = _mm256_srai_epi32(sums[i], WEIGHT_BITS);
        /* packing works within 128-bit lanes: the four-byte groups come out as 0 2 4 6 1 3 5 7 */
        __m256i words01 = _mm256_packs_epi32(sums[0], sums[1]);
        __m256i words23 = _mm256_packs_epi32(sums[2], sums[3]);
        __m256i packed = _mm256_packus_epi16(words01, words23);
        packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256((__m256i *)(out + at), packed);
    }
}

const crop_isa crop_avx2 = {"avx2", supported, pack, horizontal, vertical};

#else
typedef int nothing_to_compile; /* an empty translation unit is not C */
#endif
