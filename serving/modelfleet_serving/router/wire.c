/* The data path's system calls, without what the standard library puts around them: no tuples of arguments, no
 * memory views, no release of the interpreter's lock for a call that never waits. `wire.py` says what each
 * does, and does the same without this file.
 */

#include "wire.h"

#include <errno.h>
#include <limits.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* Between these, copying costs more than allocating too much. Above, malloc maps and unmaps memory each time,
 * as long as more is allocated than stays. */
#define LARGE_BYTES (8 * 1024)
#define HUGE_BYTES (96 * 1024)
#define MAX_PIECES 64
#define MAX_EVENTS 512

char wire_buffer[READ_BYTES];

/* Neither of these two waits. The C library's own functions let their thread be cancelled meanwhile, which the
 * interpreter has no use for and which takes longer than getting to the kernel and back. */
ssize_t wire_receive(int descriptor, char *data, Py_ssize_t room)
{
    return syscall(SYS_recvfrom, descriptor, data, (size_t)room, MSG_DONTWAIT, NULL, NULL);
}

ssize_t wire_send(int descriptor, const char *data, Py_ssize_t size)
{
    return syscall(SYS_sendto, descriptor, data, (size_t)size, MSG_DONTWAIT | MSG_NOSIGNAL, NULL, 0);
}

bool wire_would_block(void)
{
    return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
}

bool wire_to_descriptor(PyObject *number, int *descriptor)
{
    long value = PyLong_AsLong(number);
    if (value == -1 && PyErr_Occurred())
        return false;
    if (value < INT_MIN || value > INT_MAX) {
        PyErr_SetString(PyExc_OverflowError, "no file descriptor is so large");
        return false;
    }
    *descriptor = (int)value;
    return true;
}

static bool has_arguments(const char *name, Py_ssize_t given, Py_ssize_t wanted)
{
    if (given == wanted)
        return true;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, not %zd", name, wanted, given);
    return false;
}

/* Receives to where the bytes stay. */
static PyObject *receive_large(int descriptor, Py_ssize_t room)
{
    PyObject *data = PyBytes_FromStringAndSize(NULL, room);
    if (data == NULL)
        return NULL;
    ssize_t size = wire_receive(descriptor, PyBytes_AS_STRING(data), room);
    if (size >= 0) {
        if (size < room)
            _PyBytes_Resize(&data, size); /* on failure data is NULL */
        return data;
    }
    int failure = errno;
    Py_DECREF(data);
    errno = failure;
    if (wire_would_block())
        Py_RETURN_NONE;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *receive(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t number)
{
    int descriptor;
    if (!has_arguments("receive", number, 2) || !wire_to_descriptor(arguments[0], &descriptor))
        return NULL;
    Py_ssize_t expected = PyLong_AsSsize_t(arguments[1]);
    if (expected == -1 && PyErr_Occurred())
        return NULL;
    if (expected >= LARGE_BYTES && expected <= HUGE_BYTES)
        return receive_large(descriptor, expected);
    ssize_t size = wire_receive(descriptor, wire_buffer, sizeof wire_buffer);
    if (size >= 0)
        return PyBytes_FromStringAndSize(wire_buffer, size);
    if (wire_would_block())
        Py_RETURN_NONE;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *sent(ssize_t size)
{
    if (size >= 0)
        return PyLong_FromSsize_t(size);
    if (wire_would_block())
        return PyLong_FromLong(0);
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *transmit(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t number)
{
    int descriptor;
    if (!has_arguments("transmit", number, 2) || !wire_to_descriptor(arguments[0], &descriptor))
        return NULL;
    if (PyBytes_CheckExact(arguments[1]))
        return sent(wire_send(descriptor, PyBytes_AS_STRING(arguments[1]), PyBytes_GET_SIZE(arguments[1])));
    Py_buffer view;
    if (PyObject_GetBuffer(arguments[1], &view, PyBUF_SIMPLE) < 0)
        return NULL;
    ssize_t size = wire_send(descriptor, view.buf, view.len);
    PyObject *result = sent(size); /* reads errno, which releasing the buffer might change */
    PyBuffer_Release(&view);
    return result;
}

static PyObject *transmit_pieces(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t number)
{
    int descriptor;
    if (!has_arguments("transmit_pieces", number, 2) || !wire_to_descriptor(arguments[0], &descriptor))
        return NULL;
    PyObject *pieces = PySequence_Fast(arguments[1], "pieces must be a sequence");
    if (pieces == NULL)
        return NULL;
    Py_buffer views[MAX_PIECES];
    struct iovec vectors[MAX_PIECES];
    Py_ssize_t wanted = Py_MIN(PySequence_Fast_GET_SIZE(pieces), MAX_PIECES);
    Py_ssize_t held = 0;
    PyObject *result = NULL;
    for (; held < wanted; held++) {
        if (PyObject_GetBuffer(PySequence_Fast_GET_ITEM(pieces, held), &views[held], PyBUF_SIMPLE) < 0)
            goto release;
        vectors[held].iov_base = views[held].buf;
        vectors[held].iov_len = (size_t)views[held].len;
    }
    struct msghdr message = {.msg_iov = vectors, .msg_iovlen = (size_t)held};
    result = sent(sendmsg(descriptor, &message, MSG_DONTWAIT | MSG_NOSIGNAL));
release:
    while (held > 0)
        PyBuffer_Release(&views[--held]);
    Py_DECREF(pieces);
    return result;
}

double wire_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* The number of events; -1 with an exception. */
static int wait_for_events(int descriptor, struct epoll_event *events, double seconds)
{
    /* Never wakes early: that would be a busy wait until the time is over. */
    int milliseconds = seconds < 0 ? -1 : seconds > 2e6 ? INT_MAX : (int)(seconds * 1000 + 0.999999);
    int found;
    if (milliseconds) {
        Py_BEGIN_ALLOW_THREADS
        found = epoll_wait(descriptor, events, MAX_EVENTS, milliseconds);
        Py_END_ALLOW_THREADS
    } else {
        found = epoll_wait(descriptor, events, MAX_EVENTS, 0);
    }
    if (found >= 0)
        return found;
    if (errno == EINTR)
        return PyErr_CheckSignals() < 0 ? -1 : 0;
    PyErr_SetFromErrno(PyExc_OSError);
    return -1;
}

/* Takes `what` over; NULL with an exception is passed on. */
bool wire_add_event(PyObject *ready, int descriptor, PyObject *what)
{
    PyObject *file = PyLong_FromLong(descriptor);
    bool added = file != NULL && what != NULL && PyList_Append(ready, file) == 0 && PyList_Append(ready, what) == 0;
    Py_XDECREF(file);
    Py_XDECREF(what);
    return added;
}

/* Passes on what has a shortcut, and adds to `ready` what shortcuts leave. */
static bool serve_shortcuts(struct epoll_event *events, int found, PyObject *ready)
{
    struct gathered gathered = {.number = 0, .used = 0};
    bool well = true;
    for (int index = 0; index < found && well; index++) {
        int descriptor = events[index].data.fd;
        if (events[index].events != EPOLLIN || !shortcut_exists(descriptor))
            continue;
        enum received outcome = shortcut_receive(descriptor, &gathered, ready);
        if (outcome != UNREAD)
            events[index].events = 0;
        well = outcome != FAILED;
    }
    return shortcut_send(&gathered, well ? ready : NULL) && well;
}

/* Adds all that is for the interpreter to `ready`, first what shortcuts have received: it must be taken before
 * another event can end the connection that it belongs to. */
static bool serve(struct epoll_event *events, int found, PyObject *ready)
{
    if (!serve_shortcuts(events, found, ready))
        return false;
    for (int index = 0; index < found; index++) {
        uint32_t mask = events[index].events;
        if (mask && !wire_add_event(ready, events[index].data.fd, PyLong_FromUnsignedLong(mask)))
            return false;
    }
    return true;
}

static PyObject *wait_ready(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t number)
{
    int descriptor;
    if (!has_arguments("wait_ready", number, 2) || !wire_to_descriptor(arguments[0], &descriptor))
        return NULL;
    double seconds = PyFloat_AsDouble(arguments[1]);
    if (seconds == -1.0 && PyErr_Occurred())
        return NULL;
    double until = seconds > 0 ? wire_now() + seconds : 0;
    PyObject *ready = PyList_New(0);
    while (ready != NULL) {
        struct epoll_event events[MAX_EVENTS];
        int found = wait_for_events(descriptor, events, seconds);
        if (found < 0 || !serve(events, found, ready) || PyErr_CheckSignals() < 0)
            Py_CLEAR(ready);
        else if (found == 0 || PyList_GET_SIZE(ready))
            break;
        else if (seconds >= 0 && (seconds = until - wire_now()) <= 0)
            break;
    }
    return ready;
}

static PyMethodDef methods[] = {
    {"receive", (PyCFunction)(void (*)(void))receive, METH_FASTCALL, NULL},
    {"transmit", (PyCFunction)(void (*)(void))transmit, METH_FASTCALL, NULL},
    {"transmit_pieces", (PyCFunction)(void (*)(void))transmit_pieces, METH_FASTCALL, NULL},
    {"peek", (PyCFunction)(void (*)(void))peek, METH_FASTCALL, NULL},
    {"hash_blocks", (PyCFunction)(void (*)(void))hash_blocks, METH_FASTCALL, NULL},
    {"readable_bytes", (PyCFunction)(void (*)(void))readable_bytes, METH_FASTCALL, NULL},
    {"usual_usage", usual_usage, METH_O, NULL},
    {"charge", (PyCFunction)(void (*)(void))charge, METH_FASTCALL, NULL},
    {"wait_ready", (PyCFunction)(void (*)(void))wait_ready, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_wire", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__wire(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && (shortcut_add_to(module) < 0 || tape_add_to(module) < 0 || prefixes_add_to(module) < 0))
        Py_CLEAR(module);
    return module;
}
