/* Shortcuts of the data path: a stream's regular chunks go from an engine's socket to a client's where they
 * are found, without the interpreter. `wire.py` says what a shortcut is, and when it ends.
 */

#include "wire.h"

#include <errno.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <structmember.h>
#include <sys/socket.h>

/* A token is some hundred bytes. What is much more is no stream of tokens. */
#define MAX_CHUNKS (16 * 1024)
#define MAX_SIZE_DIGITS 4

typedef struct {
    PyObject_HEAD
    int source; /* -1 while it is closed, as is the sink */
    int sink;
    double last;
    Py_ssize_t pieces;
    Py_ssize_t most;
    PyObject *kept; /* a Tape, or NULL */
    Py_buffer bounds;
    Py_buffer counts;
} Shortcut;

/* By source; borrowed: a shortcut that goes takes itself out. */
static Shortcut **shortcuts;
static int capacity;

static Shortcut *find(int descriptor)
{
    return descriptor >= 0 && descriptor < capacity ? shortcuts[descriptor] : NULL;
}

bool shortcut_exists(int descriptor)
{
    return find(descriptor) != NULL;
}

static bool make_room(int descriptor)
{
    if (descriptor < capacity)
        return true;
    int wanted = descriptor < 512 ? 1024 : descriptor > INT_MAX / 2 ? INT_MAX : 2 * descriptor;
    Shortcut **moved = PyMem_RawRealloc(shortcuts, (size_t)wanted * sizeof *moved);
    if (moved == NULL) {
        PyErr_NoMemory();
        return false;
    }
    memset(moved + capacity, 0, (size_t)(wanted - capacity) * sizeof *moved);
    shortcuts = moved;
    capacity = wanted;
    return true;
}

static void end(Shortcut *self)
{
    if (self->source >= 0)
        shortcuts[self->source] = NULL;
    self->source = self->sink = -1;
}

/* --- What is regular --- */

/* Whole chunks as servers write them: sizes in lower case, nothing beside them, none of them the last. */
static bool are_whole_chunks(const char *data, Py_ssize_t size)
{
    Py_ssize_t place = 0;
    while (place < size) {
        Py_ssize_t length = 0;
        Py_ssize_t digits = 0;
        for (; place + digits < size && digits <= MAX_SIZE_DIGITS; digits++) {
            char digit = data[place + digits];
            if (digit >= '0' && digit <= '9')
                length = 16 * length + (digit - '0');
            else if (digit >= 'a' && digit <= 'f')
                length = 16 * length + (digit - 'a' + 10);
            else
                break;
        }
        if (digits == 0 || digits > MAX_SIZE_DIGITS || data[place] == '0')
            return false;
        place += digits;
        if (size - place < length + 4 || data[place] != '\r' || data[place + 1] != '\n')
            return false;
        place += length + 4;
        if (data[place - 2] != '\r' || data[place - 1] != '\n')
            return false;
    }
    return true;
}

/* A usage that is no more than its absence says nothing: some engines write it in every event. */
static bool tells_usage(const char *data, size_t size)
{
    static const char key[] = "\"usage\"";
    static const char nothing[] = ":null";
    const char *end_of_data = data + size;
    const char *found;
    while ((found = memmem(data, (size_t)(end_of_data - data), key, sizeof key - 1)) != NULL) {
        data = found + sizeof key - 1;
        if ((size_t)(end_of_data - data) < sizeof nothing - 1 || memcmp(data, nothing, sizeof nothing - 1))
            return true;
    }
    return false;
}

static bool is_regular(const char *data, Py_ssize_t size)
{
    return size <= MAX_CHUNKS && size > 4 && !memcmp(data + size - 4, "\n\n\r\n", 4)
        && are_whole_chunks(data, size) && !tells_usage(data, (size_t)size);
}

/* --- Passing on --- */

static void count(Shortcut *self, double now)
{
    double gap = now - self->last;
    const double *bounds = self->bounds.buf;
    double *counts = self->counts.buf;
    Py_ssize_t number = self->bounds.len / (Py_ssize_t)sizeof *bounds;
    Py_ssize_t bucket = 0;
    while (bucket < number && bounds[bucket] < gap)
        bucket++;
    counts[bucket] += 1;
    counts[number + 1] += gap;
    self->last = now;
    self->pieces++;
}

/* Sends a regular piece. What can't be sent, or not all of it, is for the interpreter. */
static bool forward(Shortcut *self, int source, const char *data, Py_ssize_t size, double now, PyObject *ready)
{
    if (self->source != source) /* ended since: a finalizer may have run */
        return wire_add_event(ready, source, PyBytes_FromStringAndSize(data, size));
    ssize_t sent = wire_send(self->sink, data, size);
    if (sent < 0 && !wire_would_block()) {
        end(self); /* sending it again finds the same fault */
        return wire_add_event(ready, source, PyBytes_FromStringAndSize(data, size));
    }
    count(self, now);
    if (self->kept != NULL && !tape_append(self->kept, data, size))
        return false;
    if (sent == size)
        return true;
    end(self);
    return wire_add_event(ready, source, Py_BuildValue("y#n", data, size, sent < 0 ? (Py_ssize_t)0 : (Py_ssize_t)sent));
}

/* Sends what was gathered; without `ready`, after a failure, forgets it. */
bool shortcut_send(struct gathered *gathered, PyObject *ready)
{
    bool well = ready != NULL;
    double now = wire_now();
    for (int index = 0; index < gathered->number; index++) {
        PyObject *shortcut = gathered->pieces[index].shortcut;
        well = well
            && forward((Shortcut *)shortcut, gathered->pieces[index].source,
                       wire_buffer + gathered->pieces[index].start, gathered->pieces[index].size, now, ready);
        Py_DECREF(shortcut);
    }
    gathered->number = 0;
    gathered->used = 0;
    return well || ready == NULL;
}

/* Receives what a shortcut's source has; what is not regular ends the shortcut, and is for the interpreter. */
enum received shortcut_receive(int descriptor, struct gathered *gathered, PyObject *ready)
{
    bool full = gathered->number == GATHERED_PIECES || READ_BYTES - gathered->used < READ_BYTES / 2;
    if (full && !shortcut_send(gathered, ready))
        return FAILED;
    Shortcut *self = find(descriptor);
    if (self == NULL)
        return UNREAD;
    char *data = wire_buffer + gathered->used;
    ssize_t size = wire_receive(descriptor, data, READ_BYTES - gathered->used);
    if (size < 0 && wire_would_block())
        return TAKEN;
    if (size > 0 && is_regular(data, size)
        && (self->kept == NULL || tape_size(self->kept) < self->most)) {
        int index = gathered->number++;
        gathered->pieces[index].shortcut = Py_NewRef((PyObject *)self);
        gathered->pieces[index].source = descriptor;
        gathered->pieces[index].start = gathered->used;
        gathered->pieces[index].size = size;
        gathered->used += size;
        return TAKEN;
    }
    end(self);
    if (size <= 0)
        return UNREAD;
    return wire_add_event(ready, descriptor, PyBytes_FromStringAndSize(data, size)) ? TAKEN : FAILED;
}

/* --- The type --- */

static bool take_doubles(PyObject *object, Py_buffer *view, const char *name)
{
    if (PyObject_GetBuffer(object, view, PyBUF_WRITABLE | PyBUF_FORMAT) < 0)
        return false;
    if (view->format != NULL && !strcmp(view->format, "d"))
        return true;
    PyErr_Format(PyExc_TypeError, "%s must be an array of doubles", name);
    return false;
}

static int initialize(Shortcut *self, PyObject *arguments, PyObject *named)
{
    static char *names[] = {"", "", "", "", NULL};
    PyObject *bounds, *counts, *kept;
    if (self->bounds.obj != NULL) {
        PyErr_SetString(PyExc_TypeError, "a shortcut is made once");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(arguments, named, "OOOn", names, &bounds, &counts, &kept, &self->most))
        return -1;
    if (kept != Py_None && !tape_is(kept)) {
        PyErr_SetString(PyExc_TypeError, "what is kept must be kept on a Tape, or None");
        return -1;
    }
    if (!take_doubles(bounds, &self->bounds, "bounds") || !take_doubles(counts, &self->counts, "counts"))
        return -1;
    if (self->counts.len != self->bounds.len + 2 * (Py_ssize_t)sizeof(double)) {
        PyErr_SetString(PyExc_ValueError, "there must be a count more than bounds, and the sum behind them");
        return -1;
    }
    self->kept = kept == Py_None ? NULL : Py_NewRef(kept);
    return 0;
}

static PyObject *create(PyTypeObject *type, PyObject *Py_UNUSED(arguments), PyObject *Py_UNUSED(named))
{
    Shortcut *self = (Shortcut *)type->tp_alloc(type, 0);
    if (self != NULL)
        self->source = self->sink = -1;
    return (PyObject *)self;
}

static void destroy(Shortcut *self)
{
    end(self);
    PyBuffer_Release(&self->bounds);
    PyBuffer_Release(&self->counts);
    Py_XDECREF(self->kept);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* Lets every second chunk be acknowledged, not each: that is a fifth of what a chunk costs. The kernel goes back
 * to each by itself when an acknowledgement was waited for, so that a sender that does so (Nagle) is held up for
 * 40 ms, once. */
static void acknowledge_later(int source)
{
    int at_once = 0;
    setsockopt(source, IPPROTO_TCP, TCP_QUICKACK, &at_once, sizeof at_once); /* it passes without, too */
}

static PyObject *begin(Shortcut *self, PyObject *const *arguments, Py_ssize_t number)
{
    int source, sink;
    if (number != 3) {
        PyErr_SetString(PyExc_TypeError, "open() takes source, sink and a time");
        return NULL;
    }
    if (!wire_to_descriptor(arguments[0], &source) || !wire_to_descriptor(arguments[1], &sink))
        return NULL;
    double last = PyFloat_AsDouble(arguments[2]);
    if (last == -1.0 && PyErr_Occurred())
        return NULL;
    if (source < 0 || sink < 0 || self->bounds.obj == NULL) {
        PyErr_SetString(PyExc_ValueError, "a shortcut needs two open sockets");
        return NULL;
    }
    end(self);
    if (!make_room(source))
        return NULL;
    if (shortcuts[source] != NULL)
        end(shortcuts[source]);
    shortcuts[source] = self;
    self->source = source;
    self->sink = sink;
    self->last = last;
    acknowledge_later(source);
    Py_RETURN_NONE;
}

static PyObject *finish(Shortcut *self, PyObject *Py_UNUSED(nothing))
{
    end(self);
    Py_RETURN_NONE;
}

static PyObject *is_open(Shortcut *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(self->source >= 0);
}

static PyMethodDef shortcut_methods[] = {
    {"open", (PyCFunction)(void (*)(void))begin, METH_FASTCALL, NULL},
    {"close", (PyCFunction)finish, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef shortcut_members[] = {
    {"last", T_DOUBLE, offsetof(Shortcut, last), READONLY, NULL},
    {"pieces", T_PYSSIZET, offsetof(Shortcut, pieces), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef shortcut_properties[] = {
    {"is_open", (getter)is_open, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject shortcut_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "modelfleet_serving.router._wire.Shortcut",
    .tp_basicsize = sizeof(Shortcut),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = create,
    .tp_init = (initproc)initialize,
    .tp_dealloc = (destructor)destroy,
    .tp_methods = shortcut_methods,
    .tp_members = shortcut_members,
    .tp_getset = shortcut_properties,
};

int shortcut_add_to(PyObject *module)
{
    return PyModule_AddType(module, &shortcut_type);
}
