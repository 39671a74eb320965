/* The crop kernel behind a pipe: requests come in on standard input, results go out on standard output.
 * Usage: kernel_pipe ISA. A request is a `header`, the picture's packed rows, and the table if there is one;
 * test_kernels_neon.py writes them. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "crop.h"

typedef struct {
    int32_t width, height, x0, y0, x1, y1, size, fit, pad[3], item_size; /* item_size 0: no table */
} header;

static void *block(size_t bytes)
{
    void *memory = malloc(bytes);
    if (!memory)
        abort();
    return memory;
}

static void *read_block(size_t bytes)
{
    void *memory = block(bytes);
    if (fread(memory, 1, bytes, stdin) != bytes)
        abort();
    return memory;
}

int main(int argc, char **argv)
{
    const crop_isa *isa = NULL;
    for (size_t i = 0; argc == 2 && (isa = crop_isa_at(i)) && strcmp(crop_isa_name(isa), argv[1]) != 0; i++)
        ;
    if (!isa)
        return 2;
    header h;
    while (fread(&h, sizeof h, 1, stdin) == 1) {
        uint8_t *pixels = read_block(3 * (size_t)h.width * (size_t)h.height);
        void *table = h.item_size ? read_block(768 * (size_t)h.item_size) : NULL;
        crop_request q = {
            .pixels = pixels,
            .row_stride = 3 * (ptrdiff_t)h.width,
            .width = h.width,
            .height = h.height,
            .x0 = h.x0,
            .y0 = h.y0,
            .x1 = h.x1,
            .y1 = h.y1,
            .size = h.size,
            .fit = (crop_fit)h.fit,
            .pad = {(uint8_t)h.pad[0], (uint8_t)h.pad[1], (uint8_t)h.pad[2]},
            .table = table,
            .item_size = (size_t)h.item_size,
        };
        size_t bytes = 3 * (size_t)h.size * (size_t)h.size * (size_t)(h.item_size ? h.item_size : 1);
        void *scratch = block(crop_scratch_size(&q)), *out = block(bytes);
        crop_resize(&q, isa, scratch, out);
        if (fwrite(out, 1, bytes, stdout) != bytes || fflush(stdout) != 0)
            return 1;
        free(out);
        free(scratch);
        free(table);
        free(pixels);
    }
    return 0;
}
