/* What the C files of the data path share. */

#ifndef MODELFLEET_WIRE_H
#define MODELFLEET_WIRE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>

#define READ_BYTES (256 * 1024)

/* Where every read goes first. Guarded by the interpreter's lock, which is held from the read to the copy. */
extern char wire_buffer[READ_BYTES];

bool wire_would_block(void);
bool wire_to_descriptor(PyObject *number, int *descriptor);
double wire_now(void);

/* What became of a descriptor's bytes. */
enum passed {
    PASSED_ON, /* nothing is left to do */
    UNREAD,    /* an ordinary event: whoever reads finds out */
    STOPPED,   /* *what is for the interpreter: bytes, or a tuple of bytes and how many of them were sent */
    FAILED,    /* with an exception */
};

bool shortcut_exists(int descriptor);
enum passed shortcut_pass(int descriptor, PyObject **what);
int shortcut_add_to(PyObject *module);

#endif
