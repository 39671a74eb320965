/* Crop, fit into a square, resize and normalise a picture in one pass.
 *
 * The result equals that of Pillow 13, bit for bit:
 *
 *     crop = picture.crop(box)
 *     CROP_PAD:     centre the crop on a square of the pad colour, resize((size, size), BICUBIC)
 *     CROP_CENTRE:  resize the shorter edge to `size` (BICUBIC), cut the central size x size out
 *     CROP_STRETCH: crop.resize((size, size), BICUBIC), whatever becomes of its shape
 *
 * yet neither the crop, nor the square, nor the resized picture is ever made: the filter reads the picture
 * where it lies, and the padding enters as a constant times the weight that falls on it.
 *
 * The caller allocates: `crop_scratch_size` says how much scratch a request needs. Nothing here keeps state,
 * so calls may run at once on several threads.
 */
#ifndef DUALFOCUS_CROP_H
#define DUALFOCUS_CROP_H

#include <stddef.h>
#include <stdint.h>

enum {
    CROP_SIZE_MAX = 16384,   /* an output side beyond this is a mistake, not a model's input */
    CROP_SIDE_MAX = 1 << 24, /* Pillow takes boxes as floats, which count no further than this */
};

typedef enum { CROP_PAD, CROP_CENTRE, CROP_STRETCH } crop_fit;

typedef struct {
    const uint8_t *pixels; /* the picture's first pixel; RGB, three bytes a pixel */
    ptrdiff_t row_stride;  /* bytes from one row to the next; may be negative */
    int32_t width, height;

    int32_t x0, y0, x1, y1; /* half-open, inside the picture, not empty, no side above CROP_SIDE_MAX */
    int32_t size;           /* output side, 1 .. CROP_SIZE_MAX */
    crop_fit fit;
    uint8_t pad[3]; /* red, green, blue; shows with CROP_PAD alone */

    /* NULL: the output is bytes, (size, size, 3). Else (3, 256) items of `item_size` 2 or 4 bytes:
     * the output is planar, (3, size, size), and item [c][v] stands for the value v of channel c. */
    const void *table;
    size_t item_size;
} crop_request;

/* One instruction set's way through; all give the same bits. */
typedef struct crop_isa crop_isa;

/* The i-th path this processor can run, the best first and "scalar" last; NULL past the end. */
const crop_isa *crop_isa_at(size_t i);
const char *crop_isa_name(const crop_isa *isa);

/* Bytes of scratch that `crop_resize` needs: grows with the size, and with the longer side of the box. */
size_t crop_scratch_size(const crop_request *request);

void crop_resize(const crop_request *request, const crop_isa *isa, void *scratch, void *out);

#endif
