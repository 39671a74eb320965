/* A read of memory as fast as one core can have it: what `bench limits` measures bandwidth by. */
#ifndef DUALFOCUS_STREAM_H
#define DUALFOCUS_STREAM_H

#include <stddef.h>
#include <stdint.h>

/* The sum, modulo 2^64, of `count` words, so that every byte has to be read. */
uint64_t stream_sum(const uint64_t *words, size_t count);

#endif
