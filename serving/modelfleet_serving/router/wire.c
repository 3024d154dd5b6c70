/* The data path's system calls, without what the standard library puts around them: no tuples of arguments, no
 * memory views, no release of the interpreter's lock for a call that never waits. `wire.py` says what each
 * does, and does the same without this file.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define READ_BYTES (256 * 1024)
/* Between these, copying costs more than allocating too much. Above, malloc maps and unmaps memory each time,
 * as long as more is allocated than stays. */
#define LARGE_BYTES (8 * 1024)
#define HUGE_BYTES (96 * 1024)
#define MAX_PIECES 64
#define MAX_EVENTS 512

/* Guarded by the interpreter's lock, which is held from the read to the copy. */
static char read_buffer[READ_BYTES];

static bool would_block(void)
{
    return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
}

static bool to_descriptor(PyObject *number, int *descriptor)
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
    ssize_t size = recv(descriptor, PyBytes_AS_STRING(data), (size_t)room, MSG_DONTWAIT);
    if (size >= 0) {
        if (size < room)
            _PyBytes_Resize(&data, size); /* on failure data is NULL */
        return data;
    }
    int failure = errno;
    Py_DECREF(data);
    errno = failure;
    if (would_block())
        Py_RETURN_NONE;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *receive(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t number)
{
    int descriptor;
    if (!has_arguments("receive", number, 2) || !to_descriptor(arguments[0], &descriptor))
        return NULL;
    Py_ssize_t expected = PyLong_AsSsize_t(arguments[1]);
    if (expected == -1 && PyErr_Occurred())
        return NULL;
    if (expected >= LARGE_BYTES && expected <= HUGE_BYTES)
        return receive_large(descriptor, expected);
    ssize_t size = recv(descriptor, read_buffer, sizeof read_buffer, MSG_DONTWAIT);
    if (size >= 0)
        return PyBytes_FromStringAndSize(read_buffer, size);
    if (would_block())
        Py_RETURN_NONE;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *sent(ssize_t size)
{
    if (size >= 0)
        return PyLong_FromSsize_t(size);
    if (would_block())
        return PyLong_FromLong(0);
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *transmit(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t number)
{
    int descriptor;
    if (!has_arguments("transmit", number, 2) || !to_descriptor(arguments[0], &descriptor))
        return NULL;
    if (PyBytes_CheckExact(arguments[1]))
        return sent(send(descriptor, PyBytes_AS_STRING(arguments[1]), (size_t)PyBytes_GET_SIZE(arguments[1]),
                         MSG_DONTWAIT | MSG_NOSIGNAL));
    Py_buffer view;
    if (PyObject_GetBuffer(arguments[1], &view, PyBUF_SIMPLE) < 0)
        return NULL;
    ssize_t size = send(descriptor, view.buf, (size_t)view.len, MSG_DONTWAIT | MSG_NOSIGNAL);
    PyObject *result = sent(size); /* reads errno, which releasing the buffer might change */
    PyBuffer_Release(&view);
    return result;
}

static PyObject *transmit_pieces(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t number)
{
    int descriptor;
    if (!has_arguments("transmit_pieces", number, 2) || !to_descriptor(arguments[0], &descriptor))
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

static PyObject *wait_ready(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t number)
{
    int descriptor;
    if (!has_arguments("wait_ready", number, 2) || !to_descriptor(arguments[0], &descriptor))
        return NULL;
    double seconds = PyFloat_AsDouble(arguments[1]);
    if (seconds == -1.0 && PyErr_Occurred())
        return NULL;
    /* Never wakes early: that would be a busy wait until the time is over. */
    int milliseconds = seconds < 0 ? -1 : seconds > 2e6 ? INT_MAX : (int)(seconds * 1000 + 0.999999);
    struct epoll_event events[MAX_EVENTS];
    int found;
    if (milliseconds) {
        Py_BEGIN_ALLOW_THREADS
        found = epoll_wait(descriptor, events, MAX_EVENTS, milliseconds);
        Py_END_ALLOW_THREADS
    } else {
        found = epoll_wait(descriptor, events, MAX_EVENTS, 0);
    }
    if (found < 0) {
        if (errno != EINTR)
            return PyErr_SetFromErrno(PyExc_OSError);
        if (PyErr_CheckSignals() < 0)
            return NULL;
        found = 0;
    }
    PyObject *ready = PyList_New(2 * (Py_ssize_t)found);
    if (ready == NULL)
        return NULL;
    for (int index = 0; index < found; index++) {
        PyObject *file = PyLong_FromLong(events[index].data.fd);
        PyObject *mask = PyLong_FromUnsignedLong(events[index].events);
        if (file == NULL || mask == NULL) {
            Py_XDECREF(file);
            Py_XDECREF(mask);
            Py_DECREF(ready);
            return NULL;
        }
        PyList_SET_ITEM(ready, 2 * (Py_ssize_t)index, file);
        PyList_SET_ITEM(ready, 2 * (Py_ssize_t)index + 1, mask);
    }
    return ready;
}

static PyMethodDef methods[] = {
    {"receive", (PyCFunction)(void (*)(void))receive, METH_FASTCALL, NULL},
    {"transmit", (PyCFunction)(void (*)(void))transmit, METH_FASTCALL, NULL},
    {"transmit_pieces", (PyCFunction)(void (*)(void))transmit_pieces, METH_FASTCALL, NULL},
    {"wait_ready", (PyCFunction)(void (*)(void))wait_ready, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_wire", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__wire(void)
{
    return PyModule_Create(&definition);
}
