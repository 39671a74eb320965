/* The driver and the scalar path. */
#include "crop_isa.h"

#include <assert.h>
#include <string.h>

_Static_assert(sizeof(size_t) == 8, "scratch sizes are computed in 64 bits");
_Static_assert(ALIGN % CHUNK == 0, "the vertical pass writes whole chunks into every piece of scratch");

/* ---- scalar ---- */

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

/* Gives every piece of the workspace its place from `base` on; the bytes that takes. */
static size_t lay_out(workspace *w, const crop_request *q, const crop_geometry *across,
                      const crop_geometry *down, char *base)
{
    size_t used = 0, size = (size_t)q->size;

    crop_carve_axis(&w->across, across, q->size, base, &used);
    crop_carve_axis(&w->down, down, q->size, base, &used);
    w->window = crop_carve(base, &used, crop_window_max(across, down) * sizeof(double));
    w->bias = crop_carve(base, &used, size * sizeof *w->bias);
    w->wide_size = 3 * ((size_t)across->crop + BLOCK) + BLOCK_READ;
    w->pitch = (3 * size + 1 + CHUNK - 1) / CHUNK * CHUNK;
    for (int r = 0; r < STRIP; r++) {
        w->wide[r] = crop_carve(base, &used, w->wide_size);
        w->line[r] = crop_carve(base, &used, w->pitch);
    }
    w->ring_rows = w->down.stride + STRIP;
    w->ring = crop_carve(base, &used, w->ring_rows * w->pitch);
    w->pad_row = crop_carve(base, &used, w->pitch);
    w->tap_rows = crop_carve(base, &used, (w->down.stride + 1) * sizeof *w->tap_rows);
    w->tap_weights = crop_carve(base, &used, (w->down.stride + 1) * sizeof *w->tap_weights);
    return used;
}

size_t crop_scratch_size(const crop_request *q)
{
    crop_geometry across, down;
    workspace w;
    crop_plan(q, &across, &down);
    return lay_out(&w, q, &across, &down, NULL) + ALIGN;
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

    crop_geometry across, down;
    workspace w;
    crop_plan(q, &across, &down);
    lay_out(&w, q, &across, &down, (char *)(((uintptr_t)scratch + ALIGN - 1) / ALIGN * ALIGN));

    crop_build_axis(&w.across, &across, w.window);
    crop_build_axis(&w.down, &down, w.window);
    for (int32_t x = 0; x < q->size; x++)
        for (int c = 0; c < 4; c++)
            w.bias[x][c] = HALF + (c < 3 ? q->pad[c] * w.across.pad_weight[x] : 0);
    crop_pad_row(&w.across, q->pad, w.pad_row);
    if (isa->pack)
        isa->pack(w.across.weights, (size_t)q->size * w.across.stride / BLOCK);

    if (crop_down_first(&across, &down))
        down_first(&w, q, isa, out);
    else
        across_first(&w, q, isa, out);
}
