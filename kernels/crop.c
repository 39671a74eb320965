/* The filter's weights, the driver and the scalar path. */
#include "crop_isa.h"

#include <assert.h>
#include <string.h>

_Static_assert(sizeof(size_t) == 8, "scratch sizes are computed in 64 bits");

#define HALF (1 << (WEIGHT_BITS - 1))

/* ---- scalar ---- */

static uint8_t to_byte(int32_t sum)
{
    int32_t value = sum >> WEIGHT_BITS;
    return value < 0 ? 0 : value > 255 ? 255 : (uint8_t)value;
}

static void scalar_horizontal(const crop_axis *axis, const int32_t (*bias)[4],
                              const uint8_t *const rows[STRIP], uint8_t *const out[STRIP])
{
    for (int32_t x = 0; x < axis->size; x++) {
        const int32_t *weights = axis->weights + (size_t)x * axis->stride;
        for (int r = 0; r < STRIP; r++) {
            const uint8_t *pixel = rows[r] + 3 * (size_t)axis->first[x];
            int32_t red = bias[x][0], green = bias[x][1], blue = bias[x][2];
            for (int32_t t = 0; t < axis->taps[x]; t++, pixel += 3) {
                red += weights[t] * pixel[0];
                green += weights[t] * pixel[1];
                blue += weights[t] * pixel[2];
            }
            out[r][3 * x] = to_byte(red);
            out[r][3 * x + 1] = to_byte(green);
            out[r][3 * x + 2] = to_byte(blue);
        }
    }
}

static void scalar_vertical(const uint8_t *const *rows, const int32_t *weights, size_t taps, uint8_t *out,
                            size_t bytes)
{
    for (size_t at = 0; at < bytes; at += CHUNK) {
        int32_t sums[CHUNK];
        for (int i = 0; i < CHUNK; i++)
            sums[i] = HALF;
        for (size_t t = 0; t < taps; t++)
            for (int i = 0; i < CHUNK; i++)
                sums[i] += weights[t] * rows[t][at + i];
        for (int i = 0; i < CHUNK; i++)
            out[at + i] = to_byte(sums[i]);
    }
}

static int always(void)
{
    return 1;
}

static const crop_isa crop_scalar = {"scalar", always, NULL, scalar_horizontal, scalar_vertical};

const crop_isa *crop_isa_at(size_t i)
{
    static const crop_isa *const all[] = {
#if defined(__x86_64__)
        &crop_avx512, &crop_avx2,
#elif defined(__aarch64__)
        &crop_neon,
#endif
        &crop_scalar,
    };
    for (size_t j = 0; j < sizeof all / sizeof *all; j++)
        if (all[j]->supported() && i-- == 0)
            return all[j];
    return NULL;
}

const char *crop_isa_name(const crop_isa *isa)
{
    return isa->name;
}

/* ---- weights ---- */

/* One axis of the resize: `length` pixels become `out_length`, of which `size` from out_first on are wanted.
 * The crop is the `crop` pixels from `before` on; the others are padding. */
typedef struct {
    int64_t length, out_length, out_first, before, crop;
} geometry;

static void plan(const crop_request *q, geometry *across, geometry *down)
{
    int64_t width = (int64_t)q->x1 - q->x0, height = (int64_t)q->y1 - q->y0;
    int64_t shorter = width < height ? width : height, longer = width < height ? height : width;
    if (q->fit == CROP_PAD) {
        *across = (geometry){longer, q->size, 0, (longer - width) / 2, width};
        *down = (geometry){longer, q->size, 0, (longer - height) / 2, height};
        return;
    }
    if (q->fit == CROP_STRETCH) {
        *across = (geometry){width, q->size, 0, 0, width};
        *down = (geometry){height, q->size, 0, 0, height};
        return;
    }
    /* Hugging Face's get_resize_output_image_size: int(size * long / short), a true division, truncated. */
    int64_t resized = (int64_t)((double)(q->size * longer) / (double)shorter);
    int64_t out_width = width <= height ? q->size : resized, out_height = width <= height ? resized : q->size;
    *across = (geometry){width, out_width, (out_width - q->size) / 2, 0, width};
    *down = (geometry){height, out_height, (out_height - q->size) / 2, 0, height};
}

static double support(const geometry *g)
{
    double scale = (double)g->length / (double)g->out_length;
    return 2.0 * (scale < 1.0 ? 1.0 : scale);
}

/* The most taps that an output can have, padding counted. */
static size_t window_max(const geometry *g)
{
    int64_t taps = (int64_t)(2.0 * support(g)) + 2;
    return (size_t)(taps < g->length ? taps : g->length);
}

static size_t weight_stride(const geometry *g)
{
    size_t taps = window_max(g);
    taps = taps < (size_t)g->crop ? taps : (size_t)g->crop;
    return (taps + BLOCK - 1) / BLOCK * BLOCK;
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

static void build_axis(crop_axis *axis, const geometry *g, double *window)
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

/* ---- driver ---- */

typedef struct {
    crop_axis across, down;
    double *window;           /* one output's weights before rounding */
    int32_t (*bias)[4];       /* (size, 4) */
    uint8_t *wide[STRIP];     /* rows of the crop's width, with room for what a block reads beyond them */
    uint8_t *line[STRIP];     /* rows of the result */
    uint8_t *ring, *pad_row;  /* horizontally filtered rows, `pitch` bytes apart, and that of the padding */
    const uint8_t **tap_rows; /* the vertical filter's operands for one output row */
    int32_t *tap_weights;
    size_t wide_size, pitch, ring_rows;
} workspace;

/* Cuts the next piece off the scratch; with base NULL it only counts. */
static void *carve(char *base, size_t *used, size_t bytes)
{
    void *piece = base ? base + *used : NULL;
    *used += (bytes + CHUNK - 1) / CHUNK * CHUNK;
    return piece;
}

static void carve_axis(crop_axis *axis, const geometry *g, int32_t size, char *base, size_t *used)
{
    axis->size = size;
    axis->stride = weight_stride(g);
    axis->first = carve(base, used, (size_t)size * sizeof(int32_t));
    axis->taps = carve(base, used, (size_t)size * sizeof(int32_t));
    axis->pad_weight = carve(base, used, (size_t)size * sizeof(int32_t));
    axis->weights = carve(base, used, (size_t)size * axis->stride * sizeof(int32_t));
}

/* Gives every piece of the workspace its place from `base` on; the bytes that takes. */
static size_t lay_out(workspace *w, const crop_request *q, const geometry *across, const geometry *down,
                      char *base)
{
    size_t used = 0, size = (size_t)q->size;
    size_t window = window_max(across) > window_max(down) ? window_max(across) : window_max(down);

    carve_axis(&w->across, across, q->size, base, &used);
    carve_axis(&w->down, down, q->size, base, &used);
    w->window = carve(base, &used, window * sizeof(double));
    w->bias = carve(base, &used, size * sizeof *w->bias);
    w->wide_size = 3 * ((size_t)across->crop + BLOCK) + BLOCK_READ;
    w->pitch = (3 * size + 1 + CHUNK - 1) / CHUNK * CHUNK;
    for (int r = 0; r < STRIP; r++) {
        w->wide[r] = carve(base, &used, w->wide_size);
        w->line[r] = carve(base, &used, w->pitch);
    }
    w->ring_rows = w->down.stride + STRIP;
    w->ring = carve(base, &used, w->ring_rows * w->pitch);
    w->pad_row = carve(base, &used, w->pitch);
    w->tap_rows = carve(base, &used, (w->down.stride + 1) * sizeof *w->tap_rows);
    w->tap_weights = carve(base, &used, (w->down.stride + 1) * sizeof *w->tap_weights);
    return used;
}

size_t crop_scratch_size(const crop_request *q)
{
    geometry across, down;
    workspace w;
    plan(q, &across, &down);
    return lay_out(&w, q, &across, &down, NULL) + CHUNK;
}

static const uint8_t *crop_row(const crop_request *q, int64_t y)
{
    return q->pixels + (q->y0 + y) * q->row_stride + 3 * (ptrdiff_t)q->x0;
}

/* The first byte beyond the picture. */
static const uint8_t *picture_end(const crop_request *q)
{
    const uint8_t *last = q->pixels;
    if (q->row_stride > 0)
        last += (ptrdiff_t)(q->height - 1) * q->row_stride;
    return last + 3 * (size_t)q->width;
}

/* Inlined with a constant `item`, each copy is one load and one store. */
static inline void look_up(const uint8_t *values, size_t count, const char *table, size_t item, char *out)
{
    for (size_t i = 0; i < count; i++)
        memcpy(out + i * item, table + values[3 * i] * item, item);
}

static void emit(const crop_request *q, const uint8_t *line, int32_t y, void *out)
{
    size_t size = (size_t)q->size, item = q->item_size;
    if (!q->table) {
        memcpy((char *)out + (size_t)y * 3 * size, line, 3 * size);
        return;
    }
    for (size_t c = 0; c < 3; c++) {
        const char *table = (const char *)q->table + c * 256 * item;
        char *row = (char *)out + (c * size + (size_t)y) * size * item;
        if (item == 4)
            look_up(line + c, size, table, 4, row);
        else
            look_up(line + c, size, table, 2, row);
    }
}

/* Filters the crop's rows from `first` on, at most STRIP of them, into the ring. */
static void filter_strip(const workspace *w, const crop_request *q, const crop_isa *isa, int64_t first,
                         int64_t rows)
{
    const uint8_t *from[STRIP], *end = picture_end(q);
    uint8_t *to[STRIP];
    for (int r = 0; r < STRIP; r++) {
        int64_t y = first + (r < rows ? r : rows - 1); /* a short strip does its last row again */
        from[r] = crop_row(q, y);
        to[r] = w->ring + (size_t)y % w->ring_rows * w->pitch;
        if ((size_t)(end - from[r]) < w->wide_size)
            from[r] = memcpy(w->wide[r], from[r], 3 * (size_t)(q->x1 - q->x0));
    }
    isa->horizontal(&w->across, (const int32_t(*)[4])w->bias, from, to);
}

/* What the horizontal pass makes of a row of padding: the pad colour, unless a window has so many thousand
 * taps that the rounded weights no longer add up to one. */
static void filter_padding(const workspace *w, const crop_request *q, const crop_isa *isa)
{
    const uint8_t *from[STRIP];
    uint8_t *to[STRIP];
    for (size_t x = 0; x < (size_t)(q->x1 - q->x0); x++)
        memcpy(w->wide[0] + 3 * x, q->pad, 3);
    for (int r = 0; r < STRIP; r++) {
        from[r] = w->wide[0];
        to[r] = w->pad_row;
    }
    isa->horizontal(&w->across, (const int32_t(*)[4])w->bias, from, to);
}

/* Horizontal pass, then vertical: rows go through the first as the second comes to need them, so that a
 * window of them is all that is ever held. */
static void across_first(const workspace *w, const crop_request *q, const crop_isa *isa, void *out)
{
    int64_t height = (int64_t)q->y1 - q->y0;
    int64_t filtered = 0; /* the rows before this one have been filtered, or are not needed any more */
    for (int32_t y = 0; y < q->size; y++) {
        size_t taps = (size_t)w->down.taps[y];
        int64_t first = w->down.first[y], end = first + (int64_t)taps;
        filtered = filtered < first ? first : filtered;
        while (filtered < end) {
            int64_t rows = height - filtered < STRIP ? height - filtered : STRIP;
            filter_strip(w, q, isa, filtered, rows);
            filtered += rows;
        }
        for (size_t t = 0; t < taps; t++) {
            w->tap_rows[t] = w->ring + ((size_t)first + t) % w->ring_rows * w->pitch;
            w->tap_weights[t] = w->down.weights[(size_t)y * w->down.stride + t];
        }
        if (w->down.pad_weight[y]) {
            w->tap_rows[taps] = w->pad_row;
            w->tap_weights[taps++] = w->down.pad_weight[y];
        }
        isa->vertical(w->tap_rows, w->tap_weights, taps, w->line[0], w->pitch);
        emit(q, w->line[0], y, out);
    }
}

/* Vertical pass, then horizontal. */
static void down_first(const workspace *w, const crop_request *q, const crop_isa *isa, void *out)
{
    size_t bytes = 3 * (size_t)(q->x1 - q->x0), whole = bytes / CHUNK * CHUNK;
    for (int32_t begin = 0; begin < q->size; begin += STRIP) {
        for (int r = 0; r < STRIP; r++) {
            int32_t y = begin + r < q->size ? begin + r : q->size - 1;
            const int32_t *weights = w->down.weights + (size_t)y * w->down.stride;
            size_t taps = (size_t)w->down.taps[y];
            for (size_t t = 0; t < taps; t++)
                w->tap_rows[t] = crop_row(q, w->down.first[y] + (int64_t)t);
            isa->vertical(w->tap_rows, weights, taps, w->wide[r], whole);
            for (size_t t = 0; t < taps; t++) /* the last bytes of a row are no whole chunk */
                w->tap_rows[t] = memcpy(w->ring + t * CHUNK, w->tap_rows[t] + whole, bytes - whole);
            isa->vertical(w->tap_rows, weights, taps, w->wide[r] + whole, bytes > whole ? CHUNK : 0);
        }
        isa->horizontal(&w->across, (const int32_t(*)[4])w->bias, (const uint8_t *const *)w->wide, w->line);
        for (int32_t y = begin; y < q->size && y < begin + STRIP; y++)
            emit(q, w->line[y - begin], y, out);
    }
}

void crop_resize(const crop_request *q, const crop_isa *isa, void *scratch, void *out)
{
    assert(0 <= q->x0 && q->x0 < q->x1 && q->x1 <= q->width && q->x1 - q->x0 <= CROP_SIDE_MAX);
    assert(0 <= q->y0 && q->y0 < q->y1 && q->y1 <= q->height && q->y1 - q->y0 <= CROP_SIDE_MAX);
    assert(1 <= q->size && q->size <= CROP_SIZE_MAX);
    assert(!q->table || q->item_size == 4 || q->item_size == 2);

    geometry across, down;
    workspace w;
    plan(q, &across, &down);
    lay_out(&w, q, &across, &down, (char *)(((uintptr_t)scratch + CHUNK - 1) / CHUNK * CHUNK));

    build_axis(&w.across, &across, w.window);
    build_axis(&w.down, &down, w.window);
    for (int32_t x = 0; x < q->size; x++)
        for (int c = 0; c < 4; c++)
            w.bias[x][c] = HALF + (c < 3 ? q->pad[c] * w.across.pad_weight[x] : 0);
    if (isa->pack)
        isa->pack(w.across.weights, (size_t)q->size * w.across.stride / BLOCK);
    if (down.crop < down.length)
        filter_padding(&w, q, isa);

    /* The first pass rounds, so the order shows in the last bits. Pillow since version 13 begins with the
     * height where that loses more than twice the pixels the width does; in a square, both lose the same. */
    int64_t lost_across = across.length - across.out_length, lost_down = down.length - down.out_length;
    if (lost_down > 0 && lost_down > 2 * lost_across)
        down_first(&w, q, isa, out);
    else
        across_first(&w, q, isa, out);
}
