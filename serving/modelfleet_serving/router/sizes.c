/* How much a request is to read, and what an answer says that it took. `policy/load.py` and `usage.py` say how
 * that is told, and do the same without this file.
 */

#include "wire.h"

#include <string.h>

#define SMALL 16384
#define STRIDE 4096
#define PROBES 32
#define WINDOW 384
#define MEDIA 64
#define MAX_DIGITS 15

/* Base64 has no white space, quotes or escapes, and is ASCII. */
static bool is_media(const char *text, size_t size)
{
    if (memchr(text, ' ', size) != NULL || memchr(text, '"', size) != NULL || memchr(text, '\\', size) != NULL)
        return false;
    unsigned char all = 0;
    for (size_t place = 0; place < size; place++)
        all |= (unsigned char)text[place];
    return all < 0x80;
}

PyObject *readable_bytes(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t number)
{
    if (number != 2 || !PyBytes_CheckExact(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "readable_bytes() takes bytes and where the body begins in them");
        return NULL;
    }
    Py_ssize_t start = PyLong_AsSsize_t(arguments[1]);
    if (start == -1 && PyErr_Occurred())
        return NULL;
    Py_ssize_t end = PyBytes_GET_SIZE(arguments[0]);
    if (start < 0 || start > end) {
        PyErr_SetString(PyExc_ValueError, "a body begins within its bytes");
        return NULL;
    }
    Py_ssize_t size = end - start;
    if (size < SMALL)
        return PyLong_FromSsize_t(size);
    Py_ssize_t stride = Py_MAX(STRIDE, size / PROBES);
    Py_ssize_t media = 0, places = 0;
    const char *text = PyBytes_AS_STRING(arguments[0]);
    for (Py_ssize_t place = start; place < end; place += stride, places++)
        media += is_media(text + place, (size_t)Py_MIN(WINDOW, end - place));
    return PyLong_FromSsize_t(size - media * size / places * (MEDIA - 1) / MEDIA);
}

/* --- Usage --- */

static const char *skip_text(const char *at, const char *end, const char *text)
{
    size_t size = strlen(text);
    return (size_t)(end - at) >= size && !memcmp(at, text, size) ? at + size : NULL;
}

/* At most MAX_DIGITS digits, perhaps none. */
static const char *read_number(const char *at, const char *end, long long *number)
{
    *number = 0;
    for (int digits = 0; digits < MAX_DIGITS && at < end && *at >= '0' && *at <= '9'; digits++, at++)
        *number = 10 * *number + (*at - '0');
    return at;
}

/* As most engines write it; NULL for any other form. */
static PyObject *read_usual(const char *at, const char *end)
{
    long long read, written, total;
    if ((at = skip_text(at, end, "\"usage\":{\"prompt_tokens\":")) == NULL)
        return NULL;
    at = read_number(at, end, &read);
    const char *behind = skip_text(at, end, ",\"total_tokens\":");
    if (behind != NULL)
        at = read_number(behind, end, &total);
    if ((at = skip_text(at, end, ",\"completion_tokens\":")) == NULL)
        return NULL;
    behind = read_number(at, end, &written);
    return behind > at ? Py_BuildValue("LL", read, written) : NULL;
}

PyObject *usual_usage(PyObject *Py_UNUSED(module), PyObject *data)
{
    static const char key[] = "\"usage\"";
    if (!PyBytes_CheckExact(data)) {
        PyErr_SetString(PyExc_TypeError, "usual_usage() takes bytes");
        return NULL;
    }
    const char *at = PyBytes_AS_STRING(data);
    const char *end = at + PyBytes_GET_SIZE(data);
    const char *last = NULL;
    while ((at = memmem(at, (size_t)(end - at), key, sizeof key - 1)) != NULL) {
        last = at;
        at += sizeof key - 1;
    }
    if (last == NULL)
        Py_RETURN_NONE;
    PyObject *usage = read_usual(last, end);
    if (usage != NULL || PyErr_Occurred())
        return usage;
    return PyTuple_New(0);
}
