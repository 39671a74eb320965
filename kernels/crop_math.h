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

typedef struct {
    int32_t red, green, blue;
} crop_pixel;

/* From luma and chroma to red, green and blue, in units of 2^-YUV_BITS. */
typedef struct {
    int32_t luma, red_v, green_u, green_v, blue_u;
} crop_yuv;

enum { YUV_BITS = 16 };

CROP_SHARED uint8_t clip_to_byte(int32_t value)
{
    return value < 0 ? 0 : value > 255 ? 255 : (uint8_t)value;
}

CROP_SHARED uint8_t to_byte(int32_t sum)
{
    return clip_to_byte(sum >> WEIGHT_BITS);
}

/* Limited range: luma 16 to 235, chroma 16 to 240 around 128. Rounded to the nearest, halves up. */
CROP_SHARED crop_pixel yuv_to_rgb(const crop_yuv *m, int32_t y, int32_t u, int32_t v)
{
    int32_t grey = m->luma * (y - 16) + (1 << (YUV_BITS - 1));
    u -= 128;
    v -= 128;
    crop_pixel rgb;
    rgb.red = clip_to_byte((grey + m->red_v * v) >> YUV_BITS);
    rgb.green = clip_to_byte((grey + m->green_u * u + m->green_v * v) >> YUV_BITS);
    rgb.blue = clip_to_byte((grey + m->blue_u * u) >> YUV_BITS);
    return rgb;
}

#endif
