/* Charges requests to what their tenants may use. `policy/quota.py` says how that is counted, and does the
 * same without this file.
 */

#include "wire.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define RATES 3
#define MINUTE 60.0
#define LONGEST 600.0
#define ROUNDING 1e-4
#define MOST 1e18 /* is a number that has room */
#define LINE_BYTES 200

static bool take_three(PyObject *numbers, double *taken)
{
    if (!PyTuple_CheckExact(numbers) || PyTuple_GET_SIZE(numbers) != RATES) {
        PyErr_SetString(PyExc_TypeError, "there are three rates");
        return false;
    }
    for (int rate = 0; rate < RATES; rate++)
        taken[rate] = PyFloat_AsDouble(PyTuple_GET_ITEM(numbers, rate));
    return !PyErr_Occurred();
}

/* --- Header lines --- */

/* The C library prints a double by arithmetic of any precision, which takes as long as the charging. */
static int write_number(char *to, double whole)
{
    char digits[20];
    int size = 0;
    uint64_t left = (uint64_t)whole;
    do
        digits[size++] = (char)('0' + left % 10);
    while ((left /= 10) != 0);
    for (int place = 0; place < size; place++)
        to[place] = digits[size - 1 - place];
    return size;
}

static int write_duration(char *to, double seconds)
{
    if (seconds < 1.0) {
        int size = write_number(to, seconds * 1000.0 + 0.5);
        memcpy(to + size, "ms", 2);
        return size + 2;
    }
    if (seconds >= MINUTE) {
        long whole = (long)nearbyint(seconds); /* to even, as Python rounds */
        return sprintf(to, "%ldm%lds", whole / 60, whole % 60);
    }
    char *text = PyOS_double_to_string(seconds, 'g', 4, 0, NULL);
    if (text == NULL)
        return -1;
    int size = sprintf(to, "%ss", text);
    PyMem_Free(text);
    return size;
}

static bool copy_words(char **to, const char *end, PyObject *words)
{
    if (!PyBytes_CheckExact(words) || PyBytes_GET_SIZE(words) > end - *to) {
        PyErr_SetString(PyExc_TypeError, "a header's words are bytes, and few");
        return false;
    }
    memcpy(*to, PyBytes_AS_STRING(words), (size_t)PyBytes_GET_SIZE(words));
    *to += PyBytes_GET_SIZE(words);
    return true;
}

/* What is left of each rate that has a limit, and when all of it will be. */
static PyObject *write_lines(PyObject *lines, const double *units, const double *owing)
{
    char text[RATES * LINE_BYTES];
    char *at = text;
    const char *end = text + sizeof text - 64; /* room for two numbers */
    for (int rate = 0; rate < RATES; rate++) {
        if (units[rate] == 0.0)
            continue;
        PyObject *words = PyList_GetItem(lines, rate); /* borrowed, as what is in it */
        if (words == NULL || !PyTuple_CheckExact(words) || PyTuple_GET_SIZE(words) != 2) {
            PyErr_SetString(PyExc_TypeError, "a rate has two words for its header lines");
            return NULL;
        }
        if (!copy_words(&at, end, PyTuple_GET_ITEM(words, 0)))
            return NULL;
        double left = trunc((MINUTE - owing[rate] + ROUNDING) / units[rate]);
        at += write_number(at, left > MOST ? MOST : left > 0.0 ? left : 0.0);
        if (!copy_words(&at, end, PyTuple_GET_ITEM(words, 1)))
            return NULL;
        int size = write_duration(at, owing[rate]);
        if (size < 0)
            return NULL;
        at += size;
        *at++ = '\r';
        *at++ = '\n';
    }
    return PyBytes_FromStringAndSize(text, at - text);
}

/* --- Charging --- */

static double owed(double cell, double now)
{
    double seconds = cell - now;
    return seconds <= 0.0 ? 0.0 : Py_MIN(LONGEST, seconds);
}

static bool fits(double owing, double cost, double unit)
{
    return unit == 0.0 || owing + Py_MIN(MINUTE, cost) - MINUTE <= ROUNDING;
}

/* Charges all three rates; false, and none, when one has no room. */
static bool take(double *cells, double *charged, Py_ssize_t workers, double now, const double *units,
                 const double *costs, double *owing)
{
    for (int rate = 0; rate < RATES; rate++) {
        owing[rate] = owed(cells[rate], now);
        if (!fits(owing[rate], costs[rate], units[rate]))
            return false;
    }
    for (int rate = 0; rate < RATES; rate++) {
        owing[rate] = Py_MIN(owing[rate] + costs[rate], LONGEST);
        if (rate && costs[rate] == 0.0)
            continue;
        cells[rate] = now + owing[rate];
        charged[rate * workers] += costs[rate];
    }
    return true;
}

PyObject *charge(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t number)
{
    if (number != 9 || !PyList_CheckExact(arguments[8])) {
        PyErr_SetString(PyExc_TypeError, "charge() takes nine arguments, the last one a list");
        return NULL;
    }
    Py_ssize_t row = PyLong_AsSsize_t(arguments[2]);
    Py_ssize_t workers = PyLong_AsSsize_t(arguments[3]);
    Py_ssize_t worker = PyLong_AsSsize_t(arguments[4]);
    double now = PyFloat_AsDouble(arguments[5]);
    double units[RATES], costs[RATES], owing[RATES];
    if (PyErr_Occurred() || !take_three(arguments[6], units) || !take_three(arguments[7], costs))
        return NULL;
    Py_buffer rates, charged;
    if (PyObject_GetBuffer(arguments[0], &rates, PyBUF_WRITABLE) < 0)
        return NULL;
    if (PyObject_GetBuffer(arguments[1], &charged, PyBUF_WRITABLE) < 0) {
        PyBuffer_Release(&rates);
        return NULL;
    }
    PyObject *lines = NULL;
    Py_ssize_t rows = rates.len / (Py_ssize_t)sizeof(double) / RATES;
    if (row < 0 || row >= rows || worker < 0 || worker >= workers
        || charged.len / (Py_ssize_t)sizeof(double) / RATES / workers < rows)
        PyErr_SetString(PyExc_IndexError, "there is no such row");
    else if (take((double *)rates.buf + row * RATES, (double *)charged.buf + row * RATES * workers + worker, workers,
                  now, units, costs, owing))
        lines = write_lines(arguments[8], units, owing);
    else
        lines = Py_NewRef(Py_None);
    PyBuffer_Release(&charged);
    PyBuffer_Release(&rates);
    return lines;
}
