/* The arithmetic that the processor's path and the GPU's share: whole numbers, so that bits agree.
 * Private to kernels/. */
#ifndef DUALFOCUS_CROP_MATH_H
#define DUALFOCUS_CROP_MATH_H

#include <stdint.h>

#ifdef __CUDACC__
#define CROP_SHARED static inline __host__ __device__
#else
#define CROP_SHARED static inline
#endif

enum {
    WEIGHT_BITS = 22, /* Pillow's fixed point: of 32 bits, 8 hold the value, 2 the negative lobes */
    HALF = 1 << (WEIGHT_BITS - 1), /* the sums start from it, and to_byte thereby rounds */
};

CROP_SHARED uint8_t clip_to_byte(int32_t value)
{
    return value < 0 ? 0 : value > 255 ? 255 : (uint8_t)value;
}

CROP_SHARED uint8_t to_byte(int32_t sum)
{
    return clip_to_byte(sum >> WEIGHT_BITS);
}

#endif
