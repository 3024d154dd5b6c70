/* Hashes of a prompt's blocks, each seeded with the one before. `policy/fingerprint.py` says what for.
 *
 * XXH64 as its specification describes it (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md), as
 * the library that Python uses has no interface for C.
 */

#include "wire.h"

#include <endian.h>
#include <stdint.h>
#include <string.h>

#define PRIME_1 0x9E3779B185EBCA87ULL
#define PRIME_2 0xC2B2AE3D27D4EB4FULL
#define PRIME_3 0x165667B19E3779F9ULL
#define PRIME_4 0x85EBCA77C2B2AE63ULL
#define STRIPE 32

static uint64_t read_word(const char *at)
{
    uint64_t word;
    memcpy(&word, at, sizeof word);
    return le64toh(word);
}

static uint64_t rotate(uint64_t value, int bits)
{
    return value << bits | value >> (64 - bits);
}

static uint64_t round_of(uint64_t sum, uint64_t lane)
{
    return rotate(sum + lane * PRIME_2, 31) * PRIME_1;
}

static uint64_t merge(uint64_t hash, uint64_t sum)
{
    return (hash ^ round_of(0, sum)) * PRIME_1 + PRIME_4;
}

/* Of a size that is a multiple of STRIPE, and not 0. */
static uint64_t hash_stripes(const char *data, Py_ssize_t size, uint64_t seed)
{
    uint64_t sums[4] = {seed + PRIME_1 + PRIME_2, seed + PRIME_2, seed, seed - PRIME_1};
    for (Py_ssize_t place = 0; place < size; place += STRIPE) {
        for (int lane = 0; lane < 4; lane++)
            sums[lane] = round_of(sums[lane], read_word(data + place + 8 * lane));
    }
    uint64_t hash = rotate(sums[0], 1) + rotate(sums[1], 7) + rotate(sums[2], 12) + rotate(sums[3], 18);
    for (int lane = 0; lane < 4; lane++)
        hash = merge(hash, sums[lane]);
    hash += (uint64_t)size;
    hash = (hash ^ hash >> 33) * PRIME_2;
    hash = (hash ^ hash >> 29) * PRIME_3;
    return hash ^ hash >> 32;
}

PyObject *hash_blocks(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t number)
{
    if (number != 4) {
        PyErr_SetString(PyExc_TypeError, "hash_blocks() takes data, its size, a seed and the ends of blocks");
        return NULL;
    }
    Py_ssize_t size = PyLong_AsSsize_t(arguments[1]);
    uint64_t seed = PyLong_AsUnsignedLongLong(arguments[2]);
    if (PyErr_Occurred())
        return NULL;
    Py_buffer data, ends;
    if (PyObject_GetBuffer(arguments[3], &ends, PyBUF_FORMAT) < 0)
        return NULL;
    PyObject *hashes = NULL;
    if (ends.format == NULL || strcmp(ends.format, "q")) {
        PyErr_SetString(PyExc_TypeError, "ends of blocks must be an array of 64-bit integers");
        goto release;
    }
    if (PyObject_GetBuffer(arguments[0], &data, PyBUF_SIMPLE) < 0)
        goto release;
    hashes = PyList_New(0);
    Py_ssize_t start = 0;
    size = Py_MIN(size, data.len);
    for (Py_ssize_t block = 0; hashes != NULL && block < ends.len / (Py_ssize_t)sizeof(int64_t); block++) {
        Py_ssize_t end = (Py_ssize_t)((const int64_t *)ends.buf)[block];
        if (end > size)
            break;
        if (end <= start || (end - start) % STRIPE) {
            PyErr_SetString(PyExc_ValueError, "blocks must be multiples of 32 bytes");
            Py_CLEAR(hashes);
            break;
        }
        seed = hash_stripes((const char *)data.buf + start, end - start, seed);
        PyObject *hash = PyLong_FromUnsignedLongLong(seed);
        if (hash == NULL || PyList_Append(hashes, hash) < 0)
            Py_CLEAR(hashes);
        Py_XDECREF(hash);
        start = end;
    }
    PyBuffer_Release(&data);
release:
    PyBuffer_Release(&ends);
    return hashes;
}
