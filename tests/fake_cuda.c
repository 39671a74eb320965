/* CUDA as ONNX Runtime's provider calls it, without a GPU: memory is the host's, copies are made at once, kernels do
 * nothing. test_cuda_provider.py adds all that the provider wants and is not here, as functions that return 0, which
 * is success. Where parameters at the end are left out, nothing here depends on them. */
#include <malloc.h>
#include <stdlib.h>
#include <string.h>

/* What was asked for; cuda_provider.py reads it. */
long held;               /* bytes of memory, the device's and pinned */
long launched;           /* kernels, and products of matrices */
long copied;             /* bytes, but within the device */
long captured, replayed; /* graphs */
long forbidden;          /* allocations, waits and copies but within the device, while a graph is captured */
long stream, graph;      /* that were captured and replayed last; graphs are numbered as they are captured */

static int is_capturing;

/* ---- the device ---- */

static int set(int *value, int to) { *value = to; return 0; }

int cudaGetDeviceCount(int *count) { return set(count, 1); }
int cudaGetDevice(int *device) { return set(device, 0); }
int cudaRuntimeGetVersion(int *version) { return set(version, 13000); }

int cudaDeviceGetAttribute(int *value, int attribute)
{
    enum { MAJOR = 75, MINOR = 76 };
    return set(value, attribute == MAJOR ? 9 : attribute == MINOR ? 0 : 1024);
}

/* CUDA 13's cudaDeviceProp, as far as it matters to anybody here. */
struct properties {
    char name[256], gap0[32];
    size_t memory, shared_per_block;
    int registers_per_block, warp;
    size_t gap1;
    int threads_per_block, block[3], grid[3];
    size_t gap2;
    int major, minor;
    size_t gap3[2];
    int multiprocessors;
    char gap4[216];
    int threads_per_multiprocessor;
    char gap5[400];
};
_Static_assert(sizeof(struct properties) == 1008, "as in CUDA 13's driver_types.h");

int cudaGetDeviceProperties(struct properties *of)
{
    *of = (struct properties){
        .name = "no GPU", .memory = (size_t)80 << 30, .shared_per_block = 48 << 10, .warp = 32,
        .registers_per_block = 65536, .threads_per_block = 1024, .block = {1024, 1024, 64},
        .grid = {0x7fffffff, 65535, 65535}, .major = 9, .multiprocessors = 132,
        .threads_per_multiprocessor = 2048,
    };
    return 0;
}

/* ---- memory ---- */

int cudaMalloc(void **memory, size_t bytes)
{
    forbidden += is_capturing;
    *memory = calloc(1, bytes);
    held += (long)malloc_usable_size(*memory);
    return *memory ? 0 : 2;
}

int cudaHostAlloc(void **memory, size_t bytes) { return cudaMalloc(memory, bytes); }
int cudaMallocHost(void **memory, size_t bytes) { return cudaMalloc(memory, bytes); }

int cudaFree(void *memory)
{
    forbidden += is_capturing;
    held -= (long)malloc_usable_size(memory);
    free(memory);
    return 0;
}

int cudaFreeHost(void *memory) { return cudaFree(memory); }

int cudaMemGetInfo(size_t *available, size_t *total)
{
    *available = *total = (size_t)80 << 30;
    return 0;
}

int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind)
{
    enum { WITHIN_THE_DEVICE = 3 };
    if (kind != WITHIN_THE_DEVICE) {
        forbidden += is_capturing;
        copied += (long)bytes;
    }
    memcpy(to, from, bytes);
    return 0;
}

int cudaMemcpy(void *to, const void *from, size_t bytes, int kind)
{
    forbidden += is_capturing; /* it waits, whatever it copies */
    return cudaMemcpyAsync(to, from, bytes, kind);
}

int cudaMemsetAsync(void *memory, int byte, size_t bytes) { memset(memory, byte, bytes); return 0; }

/* ---- streams, graphs, kernels ---- */

int cudaStreamSynchronize(void) { forbidden += is_capturing; return 0; }
int cudaDeviceSynchronize(void) { return cudaStreamSynchronize(); }
int cudaEventSynchronize(void) { return cudaStreamSynchronize(); }

int cudaStreamIsCapturing(void *on, int *status) { (void)on; return set(status, is_capturing); }
int cudaStreamBeginCapture(void *on) { stream = (long)on; return set(&is_capturing, 1); }

int cudaStreamEndCapture(void *on, void **made)
{
    (void)on;
    *made = (void *)++captured;
    return set(&is_capturing, 0);
}

int cudaGraphInstantiate(void **made, void *from) { *made = from; return 0; }
int cudaGraphLaunch(void *which) { replayed++; graph = (long)which; return 0; }

int cudaLaunchHostFunc(void *on, void (*function)(void *), void *with) { (void)on; function(with); return 0; }

static int launch(void) { launched++; return 0; }

int cudaLaunchKernel(void) { return launch(); }
int __cudaLaunchKernel(void) { return launch(); }
int cudaLaunchKernelExC(void) { return launch(); }
int cublasGemmEx(void) { return launch(); }
int cublasGemmStridedBatchedEx(void) { return launch(); }
int cublasLtMatmul(void) { return launch(); }
int cudnnBackendExecute(void) { return launch(); }

/* Objects that nobody looks into. */
static int create(void **made) { static char object; *made = &object; return 0; }

int cudaStreamCreateWithFlags(void **made) { return create(made); }
int cudaEventCreateWithFlags(void **made) { return create(made); }
int cublasCreate_v2(void **made) { return create(made); }
int cublasLtCreate(void **made) { return create(made); }
int cudnnCreate(void **made) { return create(made); }
int cudnnBackendCreateDescriptor(int type, void **made) { (void)type; return create(made); }

size_t cudnnGetVersion(void) { return 91000; }

/* cuDNN's frontend asks for the engines that may run a graph: one, which needs no memory and is not noted for
 * anything. */
int cudnnBackendGetAttribute(void *of, int name, int type, long room, long *count, void *values)
{
    enum { INT64 = 3, OBJECT = 15, INT32 = 23 };
    const size_t bytes = type == INT64 ? 8 : type == INT32 ? 4 : 0;
    (void)of, (void)name;
    if (count)
        *count = bytes || type == OBJECT;
    if (values && room)
        memset(values, 0, bytes);
    return 0;
}
