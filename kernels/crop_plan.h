/* The filter of a request: which pixels make an output, and by what weights. Private to kernels/. */
#ifndef DUALFOCUS_CROP_PLAN_H
#define DUALFOCUS_CROP_PLAN_H

#include "crop.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    BLOCK = 4,  /* taps: the horizontal pass may read on to a block's end, and weighs that with 0 */
    ALIGN = 64, /* bytes: where pieces of scratch begin */
};

/* One axis of the resize: `length` pixels become `out_length`, of which `size` from out_first on are wanted.
 * The crop is the `crop` pixels from `before` on; the others are padding. */
typedef struct {
    int64_t length, out_length, out_first, before, crop;
} crop_geometry;

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

void crop_plan(const crop_request *request, crop_geometry *across, crop_geometry *down);

/* Whether the vertical pass comes first. The first pass rounds, so the order shows in the last bits. */
int crop_down_first(const crop_geometry *across, const crop_geometry *down);

/* The most taps that an output of either axis can have, padding counted. */
size_t crop_window_max(const crop_geometry *across, const crop_geometry *down);

/* Weights that each output of an axis has room for. */
size_t crop_weight_stride(const crop_geometry *g);

/* Cuts the next piece off the scratch; with base NULL it only counts. */
static inline void *crop_carve(char *base, size_t *used, size_t bytes)
{
    void *piece = base ? base + *used : NULL;
    *used += (bytes + ALIGN - 1) / ALIGN * ALIGN;
    return piece;
}

void crop_carve_axis(crop_axis *axis, const crop_geometry *g, int32_t size, char *base, size_t *used);

/* Fills a carved axis. `window`: room for the axis's window of weights before rounding. */
void crop_build_axis(crop_axis *axis, const crop_geometry *g, double *window);

/* What the horizontal pass makes of a row of padding, (size, 3): the pad colour, unless a window has so many
 * thousand taps that the rounded weights no longer add up to one. */
void crop_pad_row(const crop_axis *across, const uint8_t pad[3], uint8_t *row);

#ifdef __cplusplus
}
#endif

#endif
