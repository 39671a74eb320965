/* From a request to its filter: the sizes, the order of the passes, the weights. */
#include "crop_plan.h"

#include <assert.h>
#include <string.h>

#include "crop_math.h"

void crop_plan(const crop_request *q, crop_geometry *across, crop_geometry *down)
{
    int64_t width = (int64_t)q->x1 - q->x0, height = (int64_t)q->y1 - q->y0;
    int64_t shorter = width < height ? width : height, longer = width < height ? height : width;
    if (q->fit == CROP_PAD) {
        *across = (crop_geometry){longer, q->size, 0, (longer - width) / 2, width};
        *down = (crop_geometry){longer, q->size, 0, (longer - height) / 2, height};
        return;
    }
    if (q->fit == CROP_STRETCH) {
        *across = (crop_geometry){width, q->size, 0, 0, width};
        *down = (crop_geometry){height, q->size, 0, 0, height};
        return;
    }
    /* Hugging Face's get_resize_output_image_size: int(size * long / short), a true division, truncated. */
    int64_t resized = (int64_t)((double)(q->size * longer) / (double)shorter);
    int64_t out_width = width <= height ? q->size : resized, out_height = width <= height ? resized : q->size;
    *across = (crop_geometry){width, out_width, (out_width - q->size) / 2, 0, width};
    *down = (crop_geometry){height, out_height, (out_height - q->size) / 2, 0, height};
}

int crop_down_first(const crop_geometry *across, const crop_geometry *down)
{
    /* Pillow since version 13 begins with the height where that loses more than twice the pixels the width
     * does; in a square, both lose the same. */
    int64_t lost_across = across->length - across->out_length, lost_down = down->length - down->out_length;
    return lost_down > 0 && lost_down > 2 * lost_across;
}

static double support(const crop_geometry *g)
{
    double scale = (double)g->length / (double)g->out_length;
    return 2.0 * (scale < 1.0 ? 1.0 : scale);
}

/* The most taps that an output can have, padding counted. Between two numbers that are 2 x support apart lie
 * at most that many integers, and one; rounding adds none, since 2 x support is no nearer to the next integer
 * than 1 / out_length. */
static size_t window_max(const crop_geometry *g)
{
    int64_t taps = (int64_t)(2.0 * support(g)) + 1;
    return (size_t)(taps < g->length ? taps : g->length);
}

size_t crop_window_max(const crop_geometry *across, const crop_geometry *down)
{
    return window_max(across) > window_max(down) ? window_max(across) : window_max(down);
}

size_t crop_weight_stride(const crop_geometry *g)
{
    size_t taps = window_max(g);
    taps = taps < (size_t)g->crop ? taps : (size_t)g->crop;
    return (taps + BLOCK - 1) / BLOCK * BLOCK;
}

void crop_carve_axis(crop_axis *axis, const crop_geometry *g, int32_t size, char *base, size_t *used)
{
    axis->size = size;
    axis->stride = crop_weight_stride(g);
    axis->first = crop_carve(base, used, (size_t)size * sizeof(int32_t));
    axis->taps = crop_carve(base, used, (size_t)size * sizeof(int32_t));
    axis->pad_weight = crop_carve(base, used, (size_t)size * sizeof(int32_t));
    axis->weights = crop_carve(base, used, (size_t)size * axis->stride * sizeof(int32_t));
}

/* Keys' cubic convolution with a = -1/2, written in Pillow's order of operations: the last bit counts. */
static double bicubic(double x)
{
    const double a = -0.5;
    if (x < 0.0)
        x = -x;
    if (x < 1.0)
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0)
        return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

static int32_t to_fixed(double weight)
{
    return (int32_t)((weight < 0 ? -0.5 : 0.5) + weight * (1 << WEIGHT_BITS));
}

void crop_build_axis(crop_axis *axis, const crop_geometry *g, double *window)
{
    double scale = (double)g->length / (double)g->out_length;
    double reach = support(g), shrink = 1.0 / (scale < 1.0 ? 1.0 : scale);

    for (int32_t i = 0; i < axis->size; i++) {
        double centre = ((double)(g->out_first + i) + 0.5) * scale;
        int64_t begin = (int64_t)(centre - reach + 0.5), end = (int64_t)(centre + reach + 0.5);
        begin = begin < 0 ? 0 : begin;
        end = end > g->length ? g->length : end;
        assert(begin < end && (size_t)(end - begin) <= window_max(g));

        double total = 0.0;
        for (int64_t j = begin; j < end; j++)
            total += window[j - begin] = bicubic(((double)j - centre + 0.5) * shrink);

        int32_t *weights = axis->weights + (size_t)i * axis->stride;
        int32_t first = 0, taps = 0, pad_weight = 0;
        for (int64_t j = begin; j < end; j++) {
            int32_t weight = to_fixed(window[j - begin] / total);
            int64_t at = j - g->before;
            if (at < 0 || at >= g->crop)
                pad_weight += weight;
            else {
                first = taps ? first : (int32_t)at;
                weights[taps++] = weight;
            }
        }
        /* Leading zeros stay: without them `first` could step back, and `across_first` forgets rows. */
        while (taps && weights[taps - 1] == 0)
            taps--;
        memset(weights + taps, 0, (axis->stride - (size_t)taps) * sizeof *weights);
        axis->first[i] = first;
        axis->taps[i] = taps;
        axis->pad_weight[i] = pad_weight;
    }
}

void crop_pad_row(const crop_axis *across, const uint8_t pad[3], uint8_t *row)
{
    for (int32_t x = 0; x < across->size; x++) {
        int32_t total = across->pad_weight[x];
        for (int32_t t = 0; t < across->taps[x]; t++)
            total += across->weights[(size_t)x * across->stride + t];
        for (int c = 0; c < 3; c++)
            row[3 * (size_t)x + c] = to_byte(HALF + total * pad[c]);
    }
}
