/* Python's door to crop.h and stream.h: checks every argument, makes the result, works without the GIL. */
#include <Python.h>

#include <stdlib.h>
#include <string.h>

#include "crop.h"
#include "stream.h"

static const crop_isa *find_isa(const char *name)
{
    for (size_t i = 0;; i++) {
        const crop_isa *isa = crop_isa_at(i);
        if (!isa || strcmp(crop_isa_name(isa), name) == 0)
            return isa;
    }
}

/* Reads a whole number; one beyond Py_ssize_t is clipped, for a range check to refuse. Like all readers
 * below: 1 if it could, else 0 with a ValueError set. */
static int whole(PyObject *value, const char *what, Py_ssize_t *out)
{
    if (PyIndex_Check(value)) {
        *out = PyNumber_AsSsize_t(value, NULL);
        if (*out != -1 || !PyErr_Occurred())
            return 1;
        PyErr_Clear();
    }
    PyErr_Format(PyExc_ValueError, "%s must be a whole number, got %R", what, value);
    return 0;
}

static int whole_numbers(PyObject *values, const char *what, const char *names, Py_ssize_t count,
                         Py_ssize_t *out)
{
    if (!PySequence_Check(values) || PySequence_Size(values) != count) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s must be %s in whole numbers, got %R", what, names, values);
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *value = PySequence_GetItem(values, i);
        int ok = value && whole(value, what, &out[i]);
        Py_XDECREF(value);
        if (!ok)
            return 0;
    }
    return 1;
}

/* If it succeeds, `view` is held. */
static int read_picture(PyObject *picture, crop_request *request, Py_buffer *view)
{
    if (!PyObject_CheckBuffer(picture)) {
        PyErr_Format(PyExc_ValueError, "picture must be a uint8 array (height, width, 3), got %R",
                     (PyObject *)Py_TYPE(picture));
        return 0;
    }
    if (PyObject_GetBuffer(picture, view, PyBUF_STRIDES | PyBUF_FORMAT) < 0)
        return 0;
    if (strcmp(view->format, "B") != 0)
        PyErr_Format(PyExc_ValueError, "picture must hold uint8, format 'B'; its format is '%s'",
                     view->format);
    else if (view->ndim != 3)
        PyErr_Format(PyExc_ValueError, "picture must have the shape (height, width, 3), it has %d dimensions",
                     view->ndim);
    else if (view->shape[2] != 3 || view->shape[0] < 1 || view->shape[1] < 1 || view->shape[0] > INT32_MAX
             || view->shape[1] > INT32_MAX)
        PyErr_Format(PyExc_ValueError,
                     "picture must have the shape (height, width, 3), it has (%zd, %zd, %zd)", view->shape[0],
                     view->shape[1], view->shape[2]);
    else if (view->strides[2] != 1 || (view->strides[1] != 3 && view->shape[1] > 1))
        PyErr_Format(PyExc_ValueError,
                     "picture must have the strides (any, 3, 1), packed rows; it has (%zd, %zd, %zd)",
                     view->strides[0], view->strides[1], view->strides[2]);
    else {
        request->pixels = view->buf;
        request->row_stride = view->strides[0];
        request->height = (int32_t)view->shape[0];
        request->width = (int32_t)view->shape[1];
        return 1;
    }
    PyBuffer_Release(view);
    return 0;
}

static int read_box(PyObject *box, crop_request *request)
{
    Py_ssize_t at[4];
    if (!whole_numbers(box, "box", "(x0, y0, x1, y1)", 4, at))
        return 0;
    if (at[0] < 0 || at[1] < 0 || at[2] > request->width || at[3] > request->height) {
        PyErr_Format(PyExc_ValueError, "box (%zd, %zd, %zd, %zd) is outside the picture, which is %d x %d",
                     at[0], at[1], at[2], at[3], request->width, request->height);
        return 0;
    }
    if (at[0] >= at[2] || at[1] >= at[3]) {
        PyErr_Format(PyExc_ValueError, "box (%zd, %zd, %zd, %zd) is empty: x0 < x1 and y0 < y1 are needed",
                     at[0], at[1], at[2], at[3]);
        return 0;
    }
    if (at[2] - at[0] > CROP_SIDE_MAX || at[3] - at[1] > CROP_SIDE_MAX) {
        PyErr_Format(PyExc_ValueError, "box (%zd, %zd, %zd, %zd) has a side above %d pixels", at[0], at[1],
                     at[2], at[3], CROP_SIDE_MAX);
        return 0;
    }
    request->x0 = (int32_t)at[0];
    request->y0 = (int32_t)at[1];
    request->x1 = (int32_t)at[2];
    request->y1 = (int32_t)at[3];
    return 1;
}

static int read_size(PyObject *size, crop_request *request)
{
    Py_ssize_t value;
    if (!whole(size, "size", &value))
        return 0;
    if (value < 1 || value > CROP_SIZE_MAX) {
        PyErr_Format(PyExc_ValueError, "size must be 1 to %d, got %R", CROP_SIZE_MAX, size);
        return 0;
    }
    request->size = (int32_t)value;
    return 1;
}

static int read_fit(PyObject *fit, crop_request *request)
{
    Py_ssize_t values[3];
    if (PyUnicode_Check(fit)) {
        int crop = PyUnicode_CompareWithASCIIString(fit, "crop") == 0;
        if (!crop && PyUnicode_CompareWithASCIIString(fit, "stretch") != 0) {
            PyErr_Format(PyExc_ValueError, "fit must be 'crop', 'stretch' or (red, green, blue), got %R",
                         fit);
            return 0;
        }
        request->fit = crop ? CROP_CENTRE : CROP_STRETCH;
        return 1;
    }
    if (!whole_numbers(fit, "fit", "'crop', 'stretch' or (red, green, blue)", 3, values))
        return 0;
    for (int c = 0; c < 3; c++) {
        if (values[c] < 0 || values[c] > 255) {
            PyErr_Format(PyExc_ValueError, "fit must be three values of 0 to 255, got %R", fit);
            return 0;
        }
        request->pad[c] = (uint8_t)values[c];
    }
    request->fit = CROP_PAD;
    return 1;
}

/* A new bytearray, or NULL with an error set. */
static PyObject *run(const crop_request *request, const crop_isa *isa)
{
    size_t item = request->table ? request->item_size : 1;
    Py_ssize_t bytes = (Py_ssize_t)(3 * item * (size_t)request->size * (size_t)request->size);
    PyObject *out = PyByteArray_FromStringAndSize(NULL, bytes);
    if (!out)
        return NULL;
    void *scratch = malloc(crop_scratch_size(request));
    if (!scratch) {
        Py_DECREF(out);
        return PyErr_NoMemory();
    }
    char *to = PyByteArray_AsString(out);
    Py_BEGIN_ALLOW_THREADS
    crop_resize(request, isa, scratch, to);
    Py_END_ALLOW_THREADS
    free(scratch);
    return out;
}

PyDoc_STRVAR(resize_doc,
             "resize(picture, box, size, fit, table, isa) -> bytearray\n\n"
             "table None: (size, size, 3) bytes. A contiguous (3, 256) array of 2- or 4-byte items:\n"
             "(3, size, size) of its items.");

static PyObject *resize(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *picture, *box, *size, *fit, *table, *result = NULL;
    const char *isa_name;
    if (!PyArg_ParseTuple(args, "OOOOOs", &picture, &box, &size, &fit, &table, &isa_name))
        return NULL;
    const crop_isa *isa = find_isa(isa_name);
    if (!isa)
        return PyErr_Format(PyExc_ValueError, "this processor has no path named '%s'", isa_name);

    crop_request request = {0};
    Py_buffer picture_view, table_view;
    if (!read_picture(picture, &request, &picture_view))
        return NULL;
    if (read_box(box, &request) && read_size(size, &request) && read_fit(fit, &request)) {
        if (table == Py_None)
            result = run(&request, isa);
        else if (PyObject_GetBuffer(table, &table_view, PyBUF_ND) == 0) {
            request.table = table_view.buf;
            request.item_size = (size_t)table_view.itemsize;
            if ((request.item_size == 2 || request.item_size == 4)
                && table_view.len == 3 * 256 * table_view.itemsize)
                result = run(&request, isa);
            else
                PyErr_SetString(PyExc_ValueError, "table must be (3, 256) items of 2 or 4 bytes");
            PyBuffer_Release(&table_view);
        }
    }
    PyBuffer_Release(&picture_view);
    return result;
}

PyDoc_STRVAR(request_doc,
             "request(height, width, box, size, fit) -> bytes\n\n"
             "Checked, as a crop_request without pixels and table: what the library on the GPU is handed.");

static PyObject *checked_request(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_ssize_t height, width;
    PyObject *box, *size, *fit;
    if (!PyArg_ParseTuple(args, "nnOOO", &height, &width, &box, &size, &fit))
        return NULL;
    if (height < 1 || width < 1 || height > INT32_MAX || width > INT32_MAX)
        return PyErr_Format(PyExc_ValueError, "a picture's sides must be 1 to %d, they are %zd and %zd",
                            INT32_MAX, height, width);
    crop_request request = {.height = (int32_t)height, .width = (int32_t)width};
    if (!read_box(box, &request) || !read_size(size, &request) || !read_fit(fit, &request))
        return NULL;
    return PyBytes_FromStringAndSize((const char *)&request, sizeof request);
}

PyDoc_STRVAR(available_doc, "available() -> the names of the paths this processor can run, the best first");

static PyObject *available(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Py_ssize_t count = 0;
    while (crop_isa_at((size_t)count))
        count++;
    PyObject *names = PyTuple_New(count);
    for (Py_ssize_t i = 0; names && i < count; i++) {
        PyObject *name = PyUnicode_FromString(crop_isa_name(crop_isa_at((size_t)i)));
        if (!name || PyTuple_SetItem(names, i, name) < 0)
            Py_CLEAR(names);
    }
    return names;
}

PyDoc_STRVAR(stream_sum_doc, "stream_sum(words) -> the sum, modulo 2^64, of a contiguous buffer's 8-byte words");

static PyObject *sum_words(PyObject *Py_UNUSED(module), PyObject *words)
{
    Py_buffer view;
    if (PyObject_GetBuffer(words, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    if ((uintptr_t)view.buf % sizeof(uint64_t) || (size_t)view.len % sizeof(uint64_t)) {
        PyBuffer_Release(&view);
        PyErr_SetString(PyExc_ValueError, "words must be aligned to 8 bytes, and whole");
        return NULL;
    }
    uint64_t sum;
    Py_BEGIN_ALLOW_THREADS
    sum = stream_sum(view.buf, (size_t)view.len / sizeof(uint64_t));
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    return PyLong_FromUnsignedLongLong(sum);
}

static PyMethodDef methods[] = {
    {"resize", resize, METH_VARARGS, resize_doc},
    {"request", checked_request, METH_VARARGS, request_doc},
    {"available", available, METH_NOARGS, available_doc},
    {"stream_sum", sum_words, METH_O, stream_sum_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_crop",
    .m_doc = "The kernels in C; use dualfocus.kernels.",
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__crop(void)
{
    return PyModuleDef_Init(&module);
}
