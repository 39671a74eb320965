/* As much of CUDA as kernels/crop.cu uses, on the host: with this folder before nvcc's a C++ compiler makes of
 * crop.cu a library that does the same, thread by thread, in host memory.
 *
 * What a GPU would refuse or get wrong is refused here too: memory of the device can be touched by kernels and
 * copies alone, pinned memory not by kernels, a byte beyond a block by nobody; fresh memory is no zeros. All
 * copies and kernels are done at once, so that streams and events have nothing to do. */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include <vector>

#define __device__
#define __global__

enum cudaError_t {
    cudaSuccess,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDefault = 4 };
enum { cudaEventDisableTiming = 2 };
typedef struct stream *cudaStream_t;
typedef struct event *cudaEvent_t;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static dim3 blockIdx, blockDim, threadIdx, gridDim;

/* Tests read the first and set the second. */
extern "C" {
__attribute__((visibility("default"))) size_t emulated_uploaded = 0; /* bytes, by copies to the device */
__attribute__((visibility("default"))) size_t emulated_room = SIZE_MAX; /* bytes that one allocation may take */
}

struct emulated_block {
    char *pages, *memory;
    size_t page_bytes, bytes;
    bool on_device;
};
static std::vector<emulated_block> emulated_blocks;

/* The last page of a block, which begins where its memory ends, stays closed. */
static void emulated_open(bool device, bool pinned)
{
    for (const emulated_block &b : emulated_blocks)
        mprotect(b.pages, b.page_bytes, (b.on_device ? device : pinned) ? PROT_READ | PROT_WRITE : PROT_NONE);
}

static cudaError_t emulated_allocate(void **memory, size_t bytes, bool on_device)
{
    if (bytes > emulated_room)
        return cudaErrorMemoryAllocation;
    const size_t page = 4096, aligned = (bytes + 15) / 16 * 16, page_bytes = (aligned + page - 1) / page * page;
    char *pages = (char *)mmap(NULL, page_bytes + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED)
        return cudaErrorMemoryAllocation;
    emulated_blocks.push_back({pages, pages + page_bytes - aligned, page_bytes, bytes, on_device});
    emulated_open(true, true);
    memset(pages, 0xA5, page_bytes);
    emulated_open(false, true);
    *memory = emulated_blocks.back().memory;
    return cudaSuccess;
}

static cudaError_t emulated_free(void *memory)
{
    for (size_t i = 0; i < emulated_blocks.size(); i++)
        if (emulated_blocks[i].memory == memory) {
            munmap(emulated_blocks[i].pages, emulated_blocks[i].page_bytes + 4096);
            emulated_blocks.erase(emulated_blocks.begin() + (ptrdiff_t)i);
            return cudaSuccess;
        }
    return memory ? cudaErrorInvalidValue : cudaSuccess;
}

static cudaError_t cudaMalloc(void **memory, size_t bytes)
{
    return emulated_allocate(memory, bytes, true);
}

static cudaError_t cudaMallocHost(void **memory, size_t bytes)
{
    return emulated_allocate(memory, bytes, false);
}

static cudaError_t cudaFree(void *memory)
{
    return emulated_free(memory);
}

static cudaError_t cudaFreeHost(void *memory)
{
    return emulated_free(memory);
}

static cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                                     size_t rows, cudaMemcpyKind kind, cudaStream_t)
{
    bool to_device = false;
    for (const emulated_block &b : emulated_blocks)
        to_device |= b.on_device && b.memory <= to && (char *)to + rows * to_pitch <= b.memory + b.bytes;
    if (width > to_pitch || width > from_pitch || (kind == cudaMemcpyHostToDevice && !to_device))
        return cudaErrorInvalidValue;
    if (kind == cudaMemcpyHostToDevice)
        emulated_uploaded += rows * width;
    emulated_open(true, true);
    for (size_t y = 0; y < rows; y++)
        memcpy((char *)to + y * to_pitch, (const char *)from + y * from_pitch, width);
    emulated_open(false, true);
    return cudaSuccess;
}

static cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream)
{
    return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}

static cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind)
{
    return cudaMemcpyAsync(to, from, bytes, kind, NULL);
}

template <class parameter>
static cudaError_t cudaLaunchKernel(void (*kernel)(parameter), dim3 grid, dim3 block, void **arguments, size_t,
                                    cudaStream_t)
{
    if (!grid.x || !grid.y || grid.x > INT32_MAX || grid.y > 65535 || block.x * block.y > 1024)
        return cudaErrorInvalidConfiguration;
    gridDim = grid;
    blockDim = block;
    emulated_open(true, false);
    for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++)
            for (threadIdx.y = 0; threadIdx.y < block.y; threadIdx.y++)
                for (threadIdx.x = 0; threadIdx.x < block.x; threadIdx.x++)
                    kernel(*(const parameter *)arguments[0]);
    emulated_open(false, true);
    return cudaSuccess;
}

static cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned)
{
    *event = NULL;
    return cudaSuccess;
}

static cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t)
{
    return cudaSuccess;
}

static cudaError_t cudaEventSynchronize(cudaEvent_t)
{
    return cudaSuccess;
}

static cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    return cudaSuccess;
}

static cudaError_t cudaDriverGetVersion(int *version)
{
    *version = 13000;
    return cudaSuccess;
}

static cudaError_t cudaGetDeviceCount(int *count)
{
    *count = 1;
    return cudaSuccess;
}

static cudaError_t cudaGetDevice(int *device)
{
    *device = 0;
    return cudaSuccess;
}

static const char *cudaGetErrorString(cudaError_t error)
{
    return error == cudaErrorMemoryAllocation ? "out of memory" : "refused";
}
