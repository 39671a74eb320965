/* The crop on an NVIDIA GPU: the bits of crop.c, by the same plan and the same arithmetic.
 *
 * The host makes the plan and uploads it; the device does the two passes, in whole numbers alone. The first
 * writes bytes into scratch, the second looks its sums up in the table and writes the planar result where the
 * caller wants it. Threads that lie side by side write side by side, and read so where the pass goes down.
 *
 * A workspace has room for one crop, whose end it marks with an event: the next crop waits for that on the
 * host, whatever streams the two are on. It must not be used by two threads at once.
 *
 * Functions return a cudaError_t; cuda.py calls them. */
#include <cuda_runtime.h>

#include <stdlib.h>
#include <string.h>

#include "crop_math.h"
#include "crop_plan.h"

#define API extern "C" __attribute__((visibility("default")))

#define TRY(call)                                                                                            \
    do {                                                                                                     \
        cudaError_t error = (call);                                                                          \
        if (error != cudaSuccess)                                                                            \
            return error;                                                                                    \
    } while (0)

/* Where a picture lies. RGB: three bytes a pixel in plane 0. NV12: a byte of luma in plane 0, and in plane 1,
 * for each square of two by two pixels, blue's difference and red's. */
struct crop_cuda_source {
    const uint8_t *planes[2];
    ptrdiff_t strides[2]; /* bytes from one row to the next */
    int32_t matrix;       /* -1: RGB; else NV12's, an index into `matrices` */
    int32_t on_host;      /* not on the device: what the crop needs is uploaded */
};

struct crop_cuda_workspace {
    char *staging, *device; /* pinned host memory, and the device's */
    size_t staging_bytes, device_bytes;
    cudaEvent_t done;
};

namespace {

/* ---- on the device ---- */

/* Pixels are counted from the crop's corner, which lies at (left, top). */
struct rgb_source {
    const uint8_t *pixels;
    ptrdiff_t stride;
    int32_t left, top;

    __device__ crop_pixel at(int32_t x, int32_t y) const
    {
        const uint8_t *p = pixels + (top + y) * stride + 3 * (ptrdiff_t)(left + x);
        return {p[0], p[1], p[2]};
    }
};

/* Every pixel of a square has the square's chroma as it is. */
struct nv12_source {
    const uint8_t *luma, *chroma;
    ptrdiff_t luma_stride, chroma_stride;
    int32_t left, top;
    crop_yuv matrix;

    __device__ crop_pixel at(int32_t x, int32_t y) const
    {
        const uint8_t *uv = chroma + (top + y) / 2 * chroma_stride + (left + x) / 2 * 2;
        return yuv_to_rgb(&matrix, luma[(top + y) * luma_stride + left + x], uv[0], uv[1]);
    }
};

struct byte_sink {
    uint8_t *pixels; /* (rows, columns, 3) */
    int32_t columns;

    __device__ void put(int32_t x, int32_t y, crop_pixel sums) const
    {
        uint8_t *p = pixels + 3 * ((ptrdiff_t)y * columns + x);
        p[0] = to_byte(sums.red);
        p[1] = to_byte(sums.green);
        p[2] = to_byte(sums.blue);
    }
};

template <class item> struct planar_sink {
    item *planes;      /* (3, size, size) */
    const item *table; /* (3, 256) */
    int32_t size;

    __device__ void put(int32_t x, int32_t y, crop_pixel sums) const
    {
        ptrdiff_t plane = (ptrdiff_t)size * size, at = (ptrdiff_t)y * size + x;
        planes[at] = table[to_byte(sums.red)];
        planes[plane + at] = table[256 + to_byte(sums.green)];
        planes[2 * plane + at] = table[512 + to_byte(sums.blue)];
    }
};

/* A crop_axis on the device. Weight t of output i is at [i * output_step + t * tap_step]: along a row it is
 * the outputs' weights that lie side by side, since side by side they are read. */
struct device_axis {
    const int32_t *first, *taps, *pad_weight, *weights;
    ptrdiff_t output_step, tap_step;
};

template <class source, class sink> struct pass {
    source from;
    sink to;
    int32_t columns, rows; /* of the result */
    device_axis axis;
    const uint8_t *pad; /* pad_step 0: one colour for all columns; 3: a colour for each */
    int32_t pad_step;
};

/* A thread makes a pixel, and those that lie a grid further down. */
template <bool across, class source, class sink> __global__ void filter(const pass<source, sink> p)
{
    int32_t x = (int32_t)(blockIdx.x * blockDim.x + threadIdx.x);
    if (x >= p.columns)
        return;
    const uint8_t *pad = p.pad + (ptrdiff_t)p.pad_step * x;
    for (int32_t y = (int32_t)(blockIdx.y * blockDim.y + threadIdx.y); y < p.rows;
         y += (int32_t)(gridDim.y * blockDim.y)) {
        int32_t i = across ? x : y;
        int32_t first = p.axis.first[i], taps = p.axis.taps[i], pad_weight = p.axis.pad_weight[i];
        const int32_t *weight = p.axis.weights + i * p.axis.output_step;
        crop_pixel sums = {HALF + pad_weight * pad[0], HALF + pad_weight * pad[1],
                           HALF + pad_weight * pad[2]};
        for (int32_t t = 0; t < taps; t++, weight += p.axis.tap_step) {
            crop_pixel value = across ? p.from.at(first + t, y) : p.from.at(x, first + t);
            sums.red += *weight * value.red;
            sums.green += *weight * value.green;
            sums.blue += *weight * value.blue;
        }
        p.to.put(x, y, sums);
    }
}

/* ---- on the host ---- */

/* round(2^16 * ...) of the standards' coefficients, which take 219 steps of luma and 224 of chroma to 255. */
const crop_yuv matrices[] = {
    {76309, 104597, -25675, -53279, 132201}, /* BT.601 */
    {76309, 117489, -13975, -34925, 138438}, /* BT.709 */
};

template <bool across, class source, class sink>
cudaError_t launch(const pass<source, sink> &p, cudaStream_t stream)
{
    const unsigned wide = 32, high = 8, grid_rows_max = 65535;
    if (p.columns == 0 || p.rows == 0)
        return cudaSuccess; /* all is padding */
    unsigned grid_rows = ((unsigned)p.rows + high - 1) / high;
    dim3 grid(((unsigned)p.columns + wide - 1) / wide, grid_rows < grid_rows_max ? grid_rows : grid_rows_max);
    void *arguments[] = {const_cast<pass<source, sink> *>(&p)};
    return cudaLaunchKernel(filter<across, source, sink>, grid, dim3(wide, high), arguments, 0, stream);
}

/* The plan in the staging memory. All before across.weights is uploaded: the device has `turned` instead. */
struct host_plan {
    crop_axis across, down;
    bool down_first;
    int32_t columns, rows, left, top; /* of the first pass: its result, and the crop's corner */
    int32_t *turned;                  /* (across.stride, size) */
    uint8_t *pad, *pad_row;           /* (3,); (size, 3) */
    char *table;                      /* (3, 256) */
    double *window;
};

size_t lay_out(host_plan *plan, const crop_request *q, const crop_geometry *across, const crop_geometry *down,
               char *base)
{
    size_t used = 0, size = (size_t)q->size;
    plan->down_first = crop_down_first(across, down);
    plan->pad = (uint8_t *)crop_carve(base, &used, 3);
    plan->pad_row = (uint8_t *)crop_carve(base, &used, 3 * size);
    plan->table = (char *)crop_carve(base, &used, 3 * 256 * q->item_size);
    crop_carve_axis(&plan->down, down, q->size, base, &used);
    plan->turned = (int32_t *)crop_carve(base, &used, crop_weight_stride(across) * size * sizeof(int32_t));
    crop_carve_axis(&plan->across, across, q->size, base, &used); /* its weights are its last piece */
    plan->window = (double *)crop_carve(base, &used, crop_window_max(across, down) * sizeof(double));
    return used;
}

/* Takes from the first pass what no output of the second weighs: `first` then counts from the first that is
 * weighed, which is returned, and `count` are left. */
int32_t narrow(crop_axis *second, int32_t *count)
{
    int32_t begin = INT32_MAX, end = 0;
    for (int32_t i = 0; i < second->size; i++)
        if (second->taps[i]) {
            int32_t first = second->first[i], last = first + second->taps[i];
            begin = first < begin ? first : begin;
            end = last > end ? last : end;
        }
    begin = begin < end ? begin : end;
    for (int32_t i = 0; i < second->size; i++)
        if (second->taps[i])
            second->first[i] -= begin;
    *count = end - begin;
    return begin;
}

/* Makes room; what was there goes. */
cudaError_t reserve_staging(crop_cuda_workspace *w, size_t bytes)
{
    if (bytes <= w->staging_bytes)
        return cudaSuccess;
    w->staging_bytes = 0;
    TRY(cudaFreeHost(w->staging));
    w->staging = NULL;
    TRY(cudaMallocHost((void **)&w->staging, bytes));
    w->staging_bytes = bytes;
    return cudaSuccess;
}

cudaError_t reserve_device(crop_cuda_workspace *w, size_t bytes)
{
    if (bytes <= w->device_bytes)
        return cudaSuccess;
    w->device_bytes = 0;
    TRY(cudaFree(w->device));
    w->device = NULL;
    TRY(cudaMalloc((void **)&w->device, bytes));
    w->device_bytes = bytes;
    return cudaSuccess;
}

void fill(host_plan *plan, const crop_request *q, const crop_geometry *across, const crop_geometry *down)
{
    crop_build_axis(&plan->across, across, plan->window);
    crop_build_axis(&plan->down, down, plan->window);
    crop_pad_row(&plan->across, q->pad, plan->pad_row);
    memcpy(plan->pad, q->pad, 3);
    memcpy(plan->table, q->table, 3 * 256 * q->item_size);
    size_t size = (size_t)q->size, stride = plan->across.stride;
    for (size_t x = 0; x < size; x++)
        for (size_t t = 0; t < stride; t++)
            plan->turned[t * size + x] = plan->across.weights[x * stride + t];

    plan->columns = plan->rows = q->size;
    plan->left = q->x0;
    plan->top = q->y0;
    if (plan->down_first)
        plan->left += narrow(&plan->across, &plan->columns);
    else
        plan->top += narrow(&plan->down, &plan->rows);
}

/* The part of a plane that a crop needs. */
struct part {
    int32_t row;
    ptrdiff_t column;   /* in bytes */
    size_t rows, width; /* in bytes */
};

/* Of NV12 whole squares are needed, as chroma has no less. */
void find_parts(const crop_request *q, bool nv12, part parts[2])
{
    int32_t left = nv12 ? q->x0 / 2 * 2 : q->x0, top = nv12 ? q->y0 / 2 * 2 : q->y0;
    size_t columns = (size_t)(q->x1 - left), rows = (size_t)(q->y1 - top), depth = nv12 ? 1 : 3;
    parts[0] = {top, (ptrdiff_t)depth * left, rows, depth * columns};
    parts[1] = {top / 2, left, (rows + 1) / 2, (columns + 1) / 2 * 2}; /* RGB has no such plane */
}

/* Copies the part to packed rows. cudaMemcpy2D takes only rows that follow each other without overlap. */
cudaError_t upload(char *to, const uint8_t *plane, ptrdiff_t stride, const part &from, cudaStream_t stream)
{
    const uint8_t *row = plane + from.row * stride + from.column;
    if (stride >= (ptrdiff_t)from.width)
        return cudaMemcpy2DAsync(to, from.width, row, (size_t)stride, from.width, from.rows,
                                 cudaMemcpyHostToDevice, stream);
    for (size_t y = 0; y < from.rows; y++, row += stride, to += from.width)
        TRY(cudaMemcpyAsync(to, row, from.width, cudaMemcpyHostToDevice, stream));
    return cudaSuccess;
}

/* What both passes read and write on the device. */
struct device_plan {
    device_axis across, down;
    const uint8_t *pad, *pad_row;
    const char *table;
    uint8_t *between; /* (rows, columns, 3) */
};

template <class T> T *on_device(const crop_cuda_workspace *w, T *piece)
{
    return (T *)(w->device + ((char *)piece - w->staging));
}

device_plan find_on_device(const crop_cuda_workspace *w, const host_plan *plan)
{
    const crop_axis *across = &plan->across, *down = &plan->down;
    device_plan there;
    there.across = {on_device(w, across->first), on_device(w, across->taps), on_device(w, across->pad_weight),
                    on_device(w, plan->turned), 1, across->size};
    there.down = {on_device(w, down->first), on_device(w, down->taps), on_device(w, down->pad_weight),
                  on_device(w, down->weights), (ptrdiff_t)down->stride, 1};
    there.pad = on_device(w, plan->pad);
    there.pad_row = on_device(w, plan->pad_row);
    there.table = on_device(w, plan->table);
    return there;
}

template <class source, class item>
cudaError_t both_passes(source from, const host_plan *plan, const device_plan *there, item *out,
                        cudaStream_t stream)
{
    int32_t size = plan->across.size, columns = plan->columns, rows = plan->rows;
    byte_sink between = {there->between, columns};
    rgb_source again = {there->between, 3 * (ptrdiff_t)columns, 0, 0};
    planar_sink<item> to = {out, (const item *)there->table, size};
    pass<source, byte_sink> first = {from, between, columns, rows, there->across, there->pad, 0};
    pass<rgb_source, planar_sink<item>> second = {again, to, size, size, there->down, there->pad_row, 3};
    if (!plan->down_first) {
        TRY(launch<true>(first, stream));
        return launch<false>(second, stream);
    }
    first.axis = there->down; /* never with padding */
    second.axis = there->across;
    second.pad = there->pad;
    second.pad_step = 0;
    TRY(launch<false>(first, stream));
    return launch<true>(second, stream);
}

template <class source>
cudaError_t both_passes(source from, const host_plan *plan, const device_plan *there, const crop_request *q,
                        void *out, cudaStream_t stream)
{
    return q->item_size == 2 ? both_passes(from, plan, there, (uint16_t *)out, stream)
                             : both_passes(from, plan, there, (uint32_t *)out, stream);
}

cudaError_t enqueue(crop_cuda_workspace *w, const crop_request *q, crop_cuda_source s, void *out,
                    cudaStream_t stream)
{
    crop_geometry across, down;
    crop_plan(q, &across, &down);
    host_plan plan;
    TRY(reserve_staging(w, lay_out(&plan, q, &across, &down, NULL)));
    lay_out(&plan, q, &across, &down, w->staging);

    part parts[2];
    bool nv12 = s.matrix >= 0;
    int uploaded = !s.on_host ? 0 : nv12 ? 2 : 1; /* planes */
    find_parts(q, nv12, parts);
    size_t used = 0, plan_bytes = (size_t)((char *)plan.across.weights - w->staging), at[2];
    crop_carve(NULL, &used, plan_bytes);
    size_t between = used, lines = (size_t)(plan.down_first ? across.crop : down.crop);
    crop_carve(NULL, &used, 3 * (size_t)q->size * lines);
    for (int p = 0; p < uploaded; p++) {
        at[p] = used;
        crop_carve(NULL, &used, parts[p].rows * parts[p].width);
    }
    TRY(reserve_device(w, used));

    for (int p = 0; p < uploaded; p++) {
        char *to = w->device + at[p];
        TRY(upload(to, s.planes[p], s.strides[p], parts[p], stream));
        s.planes[p] = (const uint8_t *)to;
        s.strides[p] = (ptrdiff_t)parts[p].width;
    }
    fill(&plan, q, &across, &down); /* while the picture is under way */
    TRY(cudaMemcpyAsync(w->device, w->staging, plan_bytes, cudaMemcpyHostToDevice, stream));
    if (uploaded) {
        plan.left -= nv12 ? q->x0 / 2 * 2 : q->x0;
        plan.top -= parts[0].row;
    }

    device_plan there = find_on_device(w, &plan);
    there.between = (uint8_t *)w->device + between;
    if (!nv12) {
        rgb_source rgb = {s.planes[0], s.strides[0], plan.left, plan.top};
        return both_passes(rgb, &plan, &there, q, out, stream);
    }
    nv12_source yuv = {s.planes[0], s.planes[1], s.strides[0], s.strides[1], plan.left, plan.top,
                       matrices[s.matrix]};
    return both_passes(yuv, &plan, &there, q, out, stream);
}

} /* namespace */

API const char *dualfocus_cuda_error(int error)
{
    return cudaGetErrorString((cudaError_t)error);
}

/* The newest CUDA that the driver knows, as 1000 * major + 10 * minor; 0 where there is no driver. */
API int dualfocus_cuda_driver(int *version)
{
    return cudaDriverGetVersion(version);
}

/* The device that this thread uses. */
API int dualfocus_cuda_device(int *device)
{
    int count;
    TRY(cudaGetDeviceCount(&count));
    return cudaGetDevice(device);
}

API int dualfocus_cuda_allocate(void **memory, size_t bytes)
{
    return cudaMalloc(memory, bytes);
}

API int dualfocus_cuda_free(void *memory)
{
    return cudaFree(memory);
}

/* Between memories of either kind; done when it returns. */
API int dualfocus_cuda_copy(void *to, const void *from, size_t bytes)
{
    TRY(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
    return cudaStreamSynchronize(0);
}

API int dualfocus_cuda_synchronize(cudaStream_t stream)
{
    return cudaStreamSynchronize(stream);
}

/* A workspace on the device that this thread uses; it stays for good. */
API int dualfocus_cuda_workspace(crop_cuda_workspace **made)
{
    static const crop_cuda_workspace empty = {};
    crop_cuda_workspace *w = (crop_cuda_workspace *)malloc(sizeof *w);
    if (!w)
        return cudaErrorMemoryAllocation;
    *w = empty;
    cudaError_t error = cudaEventCreateWithFlags(&w->done, cudaEventDisableTiming);
    if (error == cudaSuccess)
        *made = w;
    else
        free(w);
    return error;
}

/* request: as the module _crop checked it. table: (3, 256) items of item_size 2 or 4 bytes, in host memory.
 * out: (3, size, size) of them, on the device. With a picture on the host the crop is done when this returns,
 * else it may still be under way in the stream. */
API int dualfocus_cuda_crop(crop_cuda_workspace *w, const void *request, const crop_cuda_source *source,
                            const void *table, size_t item_size, void *out, cudaStream_t stream)
{
    crop_request q;
    memcpy(&q, request, sizeof q);
    q.table = table;
    q.item_size = item_size;
    TRY(cudaEventSynchronize(w->done));
    cudaError_t failed = enqueue(w, &q, *source, out, stream);
    TRY(cudaEventRecord(w->done, stream)); /* after a failure too: what was enqueued uses the workspace */
    TRY(failed);
    return source->on_host ? cudaEventSynchronize(w->done) : cudaSuccess;
}
