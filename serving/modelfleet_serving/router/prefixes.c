/* Looks into the table of who has seen which prefix. `policy/prefix_table.py` says how that is laid out, and
 * does the same without this file.
 */

#include "wire.h"

#include <endian.h>
#include <stdint.h>
#include <string.h>

#define CELLS 8
#define BUCKET_BYTES 64
#define NEAR_END 3
#define CODE 0xffffULL

typedef struct {
    PyObject_HEAD
    Py_buffer memory;
    uint64_t mask;
} Prefixes;

/* A copy of a bucket: other processes write to it at any time. */
typedef struct {
    unsigned char *memory;
    uint64_t cells[CELLS];
} Bucket;

static Bucket look(Prefixes *self, uint64_t value)
{
    Bucket bucket = {.memory = (unsigned char *)self->memory.buf + (value & self->mask) * BUCKET_BYTES};
    memcpy(bucket.cells, bucket.memory, BUCKET_BYTES);
    for (int cell = 0; cell < CELLS; cell++)
        bucket.cells[cell] = le64toh(bucket.cells[cell]);
    return bucket;
}

static bool to_value(PyObject *number, uint64_t *value)
{
    *value = PyLong_AsUnsignedLongLong(number);
    return *value != (uint64_t)-1 || !PyErr_Occurred();
}

static bool hash_at(PyObject *hashes, Py_ssize_t block, uint64_t *value)
{
    if (block < 0 || block >= PyList_GET_SIZE(hashes)) {
        PyErr_SetString(PyExc_IndexError, "there is no such block");
        return false;
    }
    return to_value(PyList_GET_ITEM(hashes, block), value);
}

static bool append(PyObject *list, long number)
{
    PyObject *item = PyLong_FromLong(number);
    bool appended = item != NULL && PyList_Append(list, item) == 0;
    Py_XDECREF(item);
    return appended;
}

/* --- Telling --- */

static int add(Prefixes *self, uint64_t value, uint64_t code)
{
    uint64_t entry = (value & ~CODE) | code;
    Bucket bucket = look(self, value);
    if (bucket.cells[0] == entry)
        return 2;
    int place = 1;
    while (place < CELLS && bucket.cells[place] != entry)
        place++;
    bool known = place < CELLS;
    int moved = known ? place : CELLS - 1;
    memmove(bucket.memory + sizeof entry, bucket.memory, (size_t)moved * sizeof entry);
    entry = htole64(entry);
    memcpy(bucket.memory, &entry, sizeof entry);
    return known;
}

static bool to_code(PyObject *number, uint64_t *code)
{
    if (!to_value(number, code))
        return false;
    if (*code >= 1 && *code <= CODE)
        return true;
    PyErr_SetString(PyExc_OverflowError, "a code has 16 bits, and is not 0");
    return false;
}

static PyObject *add_method(Prefixes *self, PyObject *const *arguments, Py_ssize_t number)
{
    uint64_t value, code;
    if (number != 2) {
        PyErr_SetString(PyExc_TypeError, "add() takes a hash and a code");
        return NULL;
    }
    if (!to_value(arguments[0], &value) || !to_code(arguments[1], &code))
        return NULL;
    return PyLong_FromLong(add(self, value, code));
}

static PyObject *record(Prefixes *self, PyObject *const *arguments, Py_ssize_t number)
{
    uint64_t value, code;
    if (number != 2 || !PyList_CheckExact(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "record() takes a list of hashes and a code");
        return NULL;
    }
    if (!to_code(arguments[1], &code))
        return NULL;
    for (Py_ssize_t block = PyList_GET_SIZE(arguments[0]) - 1; block >= 0; block--) {
        if (!hash_at(arguments[0], block, &value))
            return NULL;
        int known = add(self, value, code);
        if (known == 1 && block) {
            if (!hash_at(arguments[0], 0, &value))
                return NULL;
            add(self, value, code);
        }
        if (known)
            break;
    }
    Py_RETURN_NONE;
}

/* --- Asking --- */

static PyObject *holders(Prefixes *self, PyObject *number)
{
    uint64_t value;
    if (!to_value(number, &value))
        return NULL;
    Bucket bucket = look(self, value);
    PyObject *codes = PyList_New(0);
    for (int cell = 0; cell < CELLS && codes != NULL; cell++) {
        uint64_t found = bucket.cells[cell];
        if (((found ^ value) & ~CODE) == 0 && found & CODE && !append(codes, (long)(found & CODE)))
            Py_CLEAR(codes);
    }
    return codes;
}

/* A search of a prompt's blocks. */
typedef struct {
    Prefixes *prefixes;
    PyObject *hashes;
    PyObject *by_code;
    PyObject *without;
    PyObject *members; /* of the block that was looked at last */
} Search;

static bool take_member(Search *search, uint64_t code)
{
    PyObject *key = PyLong_FromUnsignedLongLong(code);
    if (key == NULL)
        return false;
    PyObject *index = PyDict_GetItemWithError(search->by_code, key); /* borrowed */
    Py_DECREF(key);
    if (index == NULL)
        return !PyErr_Occurred();
    int excluded = PySet_Contains(search->without, index);
    return excluded == 1 || (excluded == 0 && PyList_Append(search->members, index) == 0);
}

/* Whether anybody has seen a block; -1 with an exception. */
static int seen(Search *search, Py_ssize_t block)
{
    uint64_t value;
    if (!hash_at(search->hashes, block, &value))
        return -1;
    Py_XSETREF(search->members, PyList_New(0));
    if (search->members == NULL)
        return -1;
    Bucket bucket = look(search->prefixes, value);
    for (int cell = 0; cell < CELLS; cell++) {
        uint64_t found = bucket.cells[cell];
        if (((found ^ value) & ~CODE) == 0 && found & CODE && !take_member(search, found & CODE))
            return -1;
    }
    return PyList_GET_SIZE(search->members) > 0;
}

/* The last block up to `last` that a member has seen, -1 for none; -2 with an exception. */
static Py_ssize_t find_deepest(Search *search, Py_ssize_t last)
{
    int found = seen(search, last);
    if (found || !last)
        return found < 0 ? -2 : found ? last : -1;
    if ((found = seen(search, 0)) <= 0)
        return found < 0 ? -2 : -1;
    Py_ssize_t low = 0, high = last;
    for (Py_ssize_t block = last - 1; block > Py_MAX(0, last - NEAR_END); block--) {
        if ((found = seen(search, block)))
            return found < 0 ? -2 : block;
        high = block;
    }
    while (high - low > 1) {
        Py_ssize_t middle = (low + high) / 2;
        if ((found = seen(search, middle)) < 0)
            return -2;
        if (found)
            low = middle;
        else
            high = middle;
    }
    return seen(search, low) < 0 ? -2 : low;
}

static PyObject *deepest(Prefixes *self, PyObject *const *arguments, Py_ssize_t number)
{
    if (number != 4 || !PyList_CheckExact(arguments[0]) || !PyDict_CheckExact(arguments[2])
        || !PyAnySet_Check(arguments[3])) {
        PyErr_SetString(PyExc_TypeError, "deepest() takes a list of hashes, a number, a dictionary and a set");
        return NULL;
    }
    Py_ssize_t stop = PyLong_AsSsize_t(arguments[1]);
    if (stop == -1 && PyErr_Occurred())
        return NULL;
    Search search = {self, arguments[0], arguments[2], arguments[3], NULL};
    Py_ssize_t block = stop > 0 ? find_deepest(&search, stop - 1) : -1;
    PyObject *found = NULL;
    if (block == -1)
        Py_XSETREF(search.members, PyList_New(0));
    if (block >= -1 && search.members != NULL)
        found = Py_BuildValue("nO", block, search.members);
    Py_XDECREF(search.members);
    return found;
}

/* --- The type --- */

static PyObject *create(PyTypeObject *type, PyObject *arguments, PyObject *named)
{
    PyObject *memory;
    static char *names[] = {"", NULL};
    if (!PyArg_ParseTupleAndKeywords(arguments, named, "O", names, &memory))
        return NULL;
    Prefixes *self = (Prefixes *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    if (PyObject_GetBuffer(memory, &self->memory, PyBUF_WRITABLE) == 0) {
        uint64_t size = (uint64_t)self->memory.len;
        self->mask = size / BUCKET_BYTES - 1;
        if (size >= BUCKET_BYTES && !(size & (size - 1)))
            return (PyObject *)self;
        PyErr_SetString(PyExc_ValueError, "the table needs a power of two of bytes");
    }
    Py_DECREF(self);
    return NULL;
}

static void destroy(Prefixes *self)
{
    PyBuffer_Release(&self->memory);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef methods[] = {
    {"add", (PyCFunction)(void (*)(void))add_method, METH_FASTCALL, NULL},
    {"record", (PyCFunction)(void (*)(void))record, METH_FASTCALL, NULL},
    {"holders", (PyCFunction)holders, METH_O, NULL},
    {"deepest", (PyCFunction)(void (*)(void))deepest, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject prefixes_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "modelfleet_serving.router._wire.Prefixes",
    .tp_basicsize = sizeof(Prefixes),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = create,
    .tp_dealloc = (destructor)destroy,
    .tp_methods = methods,
};

int prefixes_add_to(PyObject *module)
{
    return PyModule_AddType(module, &prefixes_type);
}
