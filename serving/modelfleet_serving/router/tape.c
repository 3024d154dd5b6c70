/* Tapes: what is only ever appended to, and read once or never. Streams are kept on them, a chunk at a time.
 *
 * A bytearray that grows is moved, and its memory goes back to the system and comes again, page by page; that
 * cost as much as all else that a chunk needs here. Blocks stay where they are, and those given back are taken
 * again first, while they are in the processor's cache.
 */

#include "wire.h"

#include <string.h>

#define BLOCK_BYTES 4064
/* Kept for the next tapes: 2 MB. */
#define MAX_SPARE 512

struct block {
    struct block *next;
    char data[BLOCK_BYTES];
};

typedef struct {
    PyObject_HEAD
    Py_ssize_t size;
    Py_ssize_t room; /* in the last block */
    struct block *first;
    struct block *last;
} Tape;

/* Guarded by the interpreter's lock. */
static struct block *spare;
static int spares;

static PyTypeObject tape_type;

static bool extend(Tape *self)
{
    struct block *block = spare;
    if (block != NULL) {
        spare = block->next;
        spares--;
    } else if ((block = PyMem_RawMalloc(sizeof *block)) == NULL) {
        PyErr_NoMemory();
        return false;
    }
    block->next = NULL;
    if (self->last == NULL)
        self->first = block;
    else
        self->last->next = block;
    self->last = block;
    self->room = BLOCK_BYTES;
    return true;
}

static void wipe(Tape *self)
{
    struct block *block = self->first;
    self->first = self->last = NULL;
    self->size = self->room = 0;
    while (block != NULL) {
        struct block *next = block->next;
        if (spares < MAX_SPARE) {
            block->next = spare;
            spare = block;
            spares++;
        } else {
            PyMem_RawFree(block);
        }
        block = next;
    }
}

bool tape_is(PyObject *object)
{
    return Py_IS_TYPE(object, &tape_type);
}

Py_ssize_t tape_size(PyObject *tape)
{
    return ((Tape *)tape)->size;
}

/* False with an exception; then what fitted was appended. */
bool tape_append(PyObject *tape, const char *data, Py_ssize_t size)
{
    Tape *self = (Tape *)tape;
    while (size > 0) {
        if (self->room == 0 && !extend(self))
            return false;
        Py_ssize_t piece = Py_MIN(size, self->room);
        memcpy(self->last->data + (BLOCK_BYTES - self->room), data, (size_t)piece);
        self->room -= piece;
        self->size += piece;
        data += piece;
        size -= piece;
    }
    return true;
}

/* --- The type --- */

static PyObject *append(PyObject *self, PyObject *object)
{
    Py_buffer view;
    if (PyObject_GetBuffer(object, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    bool well = tape_append(self, view.buf, view.len);
    PyBuffer_Release(&view);
    return well ? Py_NewRef(self) : NULL;
}

static PyObject *to_bytes(Tape *self, PyObject *Py_UNUSED(nothing))
{
    PyObject *result = PyBytes_FromStringAndSize(NULL, self->size);
    if (result == NULL)
        return NULL;
    char *place = PyBytes_AS_STRING(result);
    for (struct block *block = self->first; block != NULL; block = block->next) {
        Py_ssize_t used = block == self->last ? BLOCK_BYTES - self->room : BLOCK_BYTES;
        memcpy(place, block->data, (size_t)used);
        place += used;
    }
    return result;
}

static PyObject *clear(Tape *self, PyObject *Py_UNUSED(nothing))
{
    wipe(self);
    Py_RETURN_NONE;
}

static void destroy(Tape *self)
{
    wipe(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef tape_methods[] = {
    {"__bytes__", (PyCFunction)to_bytes, METH_NOARGS, NULL},
    {"clear", (PyCFunction)clear, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PySequenceMethods tape_as_sequence = {
    .sq_length = tape_size,
    .sq_inplace_concat = append,
};

static PyTypeObject tape_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "modelfleet_serving.router._wire.Tape",
    .tp_basicsize = sizeof(Tape),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = (destructor)destroy,
    .tp_methods = tape_methods,
    .tp_as_sequence = &tape_as_sequence,
};

int tape_add_to(PyObject *module)
{
    return PyModule_AddType(module, &tape_type);
}
