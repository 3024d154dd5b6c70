/* What the C files of the data path share. */

#ifndef MODELFLEET_WIRE_H
#define MODELFLEET_WIRE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>

#define READ_BYTES (256 * 1024)

/* Where every read goes first. Guarded by the interpreter's lock, which is held from the read to the copy. */
extern char wire_buffer[READ_BYTES];

ssize_t wire_receive(int descriptor, char *data, Py_ssize_t room);
ssize_t wire_send(int descriptor, const char *data, Py_ssize_t size);
bool wire_would_block(void);
bool wire_to_descriptor(PyObject *number, int *descriptor);
double wire_now(void);

bool wire_add_event(PyObject *ready, int descriptor, PyObject *what);

/* What shortcuts have received and not sent yet: it stands in wire_buffer. Sent together, pieces wake those who
 * wait for them once and not one by one, which is much of what a piece costs. */
#define GATHERED_PIECES 32

struct gathered {
    int number;
    Py_ssize_t used;
    struct {
        PyObject *shortcut; /* a reference */
        int source;
        Py_ssize_t start;
        Py_ssize_t size;
    } pieces[GATHERED_PIECES];
};

/* What became of a descriptor's event. */
enum received {
    TAKEN,  /* nothing is left to do but sending */
    UNREAD, /* an ordinary event: whoever reads finds out */
    FAILED, /* with an exception */
};

bool shortcut_exists(int descriptor);
enum received shortcut_receive(int descriptor, struct gathered *gathered, PyObject *ready);
bool shortcut_send(struct gathered *gathered, PyObject *ready);
int shortcut_add_to(PyObject *module);

bool tape_is(PyObject *object);
Py_ssize_t tape_size(PyObject *tape);
bool tape_append(PyObject *tape, const char *data, Py_ssize_t size);
int tape_add_to(PyObject *module);

int prefixes_add_to(PyObject *module);
PyObject *peek(PyObject *module, PyObject *const *arguments, Py_ssize_t number);
PyObject *hash_blocks(PyObject *module, PyObject *const *arguments, Py_ssize_t number);
PyObject *readable_bytes(PyObject *module, PyObject *const *arguments, Py_ssize_t number);
PyObject *usual_usage(PyObject *module, PyObject *data);
PyObject *charge(PyObject *module, PyObject *const *arguments, Py_ssize_t number);

#endif
