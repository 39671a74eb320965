/* Random crops on exact-size heap blocks: every path must give the scalar path's bytes, and a sanitizer, if
 * one is compiled in, must see no byte outside a block touched. Prints the number of cases and a hash of all
 * results, which is the same on every processor. Usage: kernel_fuzz CASES */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "crop.h"

static uint64_t state = 0x9E3779B97F4A7C15u;

static uint32_t random_below(uint32_t bound)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 33) % bound;
}

static int32_t random_side(void)
{
    static const uint32_t bounds[] = {4, 24, 90, 600};
    return 1 + (int32_t)random_below(bounds[random_below(4)]);
}

/* Half of the crops reach the picture's far edge, where reading on would leave the block. */
static void random_span(int32_t length, int32_t *begin, int32_t *end)
{
    *begin = (int32_t)random_below((uint32_t)length);
    *end = random_below(2) ? length : *begin + 1 + (int32_t)random_below((uint32_t)(length - *begin));
}

static void *block(size_t bytes)
{
    void *memory = malloc(bytes);
    if (!memory)
        abort();
    return memory;
}

static uint64_t hash_bytes(uint64_t hash, const uint8_t *bytes, size_t count)
{
    for (size_t i = 0; i < count; i++)
        hash = (hash ^ bytes[i]) * 0x100000001B3u;
    return hash;
}

int main(int argc, char **argv)
{
    uint64_t hash = 0xCBF29CE484222325u;
    int cases = argc > 1 ? atoi(argv[1]) : 100;
    for (int n = 0; n < cases; n++) {
        crop_request q = {.width = random_side(), .height = random_side(), .size = random_side() / 2 + 1};
        size_t stride = 3 * (size_t)q.width + random_below(2) * random_below(70);
        size_t picture_bytes = (size_t)(q.height - 1) * stride + 3 * (size_t)q.width;
        uint8_t *picture = block(picture_bytes);
        int binary = (int)random_below(2); /* black and white overshoots most */
        for (size_t i = 0; i < picture_bytes; i++)
            picture[i] = binary ? (uint8_t)(255 * random_below(2)) : (uint8_t)random_below(256);
        q.pixels = picture;
        q.row_stride = (ptrdiff_t)stride;
        if (random_below(2)) {
            q.pixels += (size_t)(q.height - 1) * stride;
            q.row_stride = -q.row_stride;
        }
        random_span(q.width, &q.x0, &q.x1);
        random_span(q.height, &q.y0, &q.y1);
        for (int c = 0; c < 3; c++)
            q.pad[c] = (uint8_t)random_below(256);
        q.fit = (crop_fit)random_below(3);

        size_t item = (size_t)1 << random_below(3);
        uint8_t *table = item == 1 ? NULL : block(768 * item);
        for (size_t i = 0; table && i < 768 * item; i++)
            table[i] = (uint8_t)random_below(256);
        q.table = table;
        q.item_size = item;

        size_t bytes = 3 * item * (size_t)q.size * (size_t)q.size, scratch_bytes = crop_scratch_size(&q);
        uint8_t *want = NULL, *scratch = block(scratch_bytes);
        size_t paths = 0;
        while (crop_isa_at(paths))
            paths++;
        while (paths-- > 0) { /* from the last, the scalar one */
            uint8_t *got = block(bytes);
            memset(scratch, 0xA5, scratch_bytes);
            crop_resize(&q, crop_isa_at(paths), scratch, got);
            if (!want) {
                want = got;
                continue;
            }
            if (memcmp(got, want, bytes) != 0) {
                printf("case %d: %s differs from scalar: %d x %d, box %d %d %d %d, size %d, fit %d, item %zu\n",
                       n, crop_isa_name(crop_isa_at(paths)), q.width, q.height, q.x0, q.y0, q.x1, q.y1, q.size,
                       (int)q.fit, item);
                return 1;
            }
            free(got);
        }
        hash = hash_bytes(hash, want, bytes);
        free(want);
        free(scratch);
        free(table);
        free(picture);
    }
    printf("%d cases, hash %016llx\n", cases, (unsigned long long)hash);
    return 0;
}
