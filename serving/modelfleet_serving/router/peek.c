/* Reads of a JSON body what routing needs. `wire.py` says what; here is how little that takes: of a request's
 * 32 KB nearly all are inside of strings, which are passed over by blocks.
 *
 * Everything is checked, by RFC 8259 but for the encoding of texts. What is not plain (an escape in a
 * top-level name or the model's, a model that is no string, much nesting, any fault) is left to another reader,
 * which also says what is wrong.
 */

#include "wire.h"

#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define MAX_DEPTH 64
/* A value up to this size is copied: that costs less than a view of it. */
#define COPIED_BYTES 1024

typedef const unsigned char *place; /* NULL for a fault */

/* --- Strings --- */

static bool is_special(unsigned char character)
{
    return character < 0x20 || character == '"' || character == '\\';
}

#ifdef __SSE2__
#define BLOCK_BYTES 64

/* 0xff for each special character. */
static __m128i specials(place at)
{
    __m128i text = _mm_loadu_si128((const __m128i *)at);
    __m128i control = _mm_cmpeq_epi8(_mm_min_epu8(text, _mm_set1_epi8(0x1f)), text);
    __m128i quote = _mm_cmpeq_epi8(text, _mm_set1_epi8('"'));
    return _mm_or_si128(control, _mm_or_si128(quote, _mm_cmpeq_epi8(text, _mm_set1_epi8('\\'))));
}

/* Where the first special character of a block is; BLOCK_BYTES for none. */
static int first_special(place at)
{
    __m128i parts[4];
    for (int part = 0; part < 4; part++)
        parts[part] = specials(at + 16 * part);
    if (!_mm_movemask_epi8(_mm_or_si128(_mm_or_si128(parts[0], parts[1]), _mm_or_si128(parts[2], parts[3]))))
        return BLOCK_BYTES;
    int part = 0;
    while (!_mm_movemask_epi8(parts[part]))
        part++;
    return 16 * part + __builtin_ctz((unsigned)_mm_movemask_epi8(parts[part]));
}
#else
#define BLOCK_BYTES 16

/* The same by words that the compiler makes of what the processor has. */
static int first_special(place at)
{
    typedef unsigned char characters __attribute__((vector_size(16)));
    typedef uint64_t words __attribute__((vector_size(16)));
    characters text;
    memcpy(&text, at, sizeof text);
    words found = (words)((text == '"') | (text == '\\') | ((text & 0xe0) == 0));
    if (!(found[0] | found[1]))
        return BLOCK_BYTES;
    int index = 0;
    while (!is_special(at[index]))
        index++;
    return index;
}
#endif

/* The first character that is more than itself. */
static place find_special(place at, place end)
{
    while (end - at >= BLOCK_BYTES) {
        int index = first_special(at);
        if (index < BLOCK_BYTES)
            return at + index;
        at += BLOCK_BYTES;
    }
    while (at < end && !is_special(*at))
        at++;
    return at;
}

static int hex_digit(unsigned char character)
{
    if (character >= '0' && character <= '9')
        return character - '0';
    character |= 0x20;
    return character >= 'a' && character <= 'f' ? character - 'a' + 10 : -1;
}

/* The code of \uXXXX; -1 for anything else. */
static int code_unit(place at, place end)
{
    if (end - at < 6 || at[0] != '\\' || at[1] != 'u')
        return -1;
    int code = 0;
    for (int index = 2; index < 6; index++) {
        int digit = hex_digit(at[index]);
        if (digit < 0)
            return -1;
        code = code << 4 | digit;
    }
    return code;
}

static place skip_escape(place at, place end)
{
    if (end - at < 2)
        return NULL;
    switch (at[1]) {
    case '"': case '\\': case '/': case 'b': case 'f': case 'n': case 'r': case 't':
        return at + 2;
    case 'u':
        break;
    default:
        return NULL;
    }
    int code = code_unit(at, end);
    if (code < 0 || (code >= 0xdc00 && code <= 0xdfff))
        return NULL;
    if (code < 0xd800 || code > 0xdbff)
        return at + 6;
    int second = code_unit(at + 6, end);
    return second >= 0xdc00 && second <= 0xdfff ? at + 12 : NULL;
}

/* From behind the opening quote to behind the closing one. */
static place skip_string(place at, place end, bool *escaped)
{
    while ((at = find_special(at, end)) < end) {
        if (*at == '"')
            return at + 1;
        if (*at != '\\')
            return NULL;
        *escaped = true;
        at = skip_escape(at, end);
        if (at == NULL)
            return NULL;
    }
    return NULL;
}

/* --- Other values --- */

static place skip_space(place at, place end)
{
    while (at < end && (*at == ' ' || *at == '\n' || *at == '\r' || *at == '\t'))
        at++;
    return at;
}

static place skip_digits(place at, place end)
{
    place start = at;
    while (at < end && *at >= '0' && *at <= '9')
        at++;
    return at > start ? at : NULL;
}

static place skip_number(place at, place end)
{
    if (*at == '-')
        at++;
    if (at < end && *at == '0')
        at++;
    else
        at = skip_digits(at, end);
    if (at != NULL && at < end && *at == '.')
        at = skip_digits(at + 1, end);
    if (at != NULL && at < end && (*at | 0x20) == 'e') {
        at++;
        if (at < end && (*at == '+' || *at == '-'))
            at++;
        at = skip_digits(at, end);
    }
    return at;
}

static place skip_word(place at, place end, const char *word)
{
    size_t size = strlen(word);
    return (size_t)(end - at) >= size && !memcmp(at, word, size) ? at + size : NULL;
}

static place skip_value(place at, place end, int depth);

/* A name and its colon; *name and *size say where it stands. */
static place skip_name(place at, place end, place *name, Py_ssize_t *size, bool *escaped)
{
    if (at == end || *at != '"')
        return NULL;
    *name = at + 1;
    at = skip_string(at + 1, end, escaped);
    if (at == NULL)
        return NULL;
    *size = at - 1 - *name;
    at = skip_space(at, end);
    return at < end && *at == ':' ? skip_space(at + 1, end) : NULL;
}

/* From the opening bracket to behind the closing one. */
static place skip_list(place at, place end, int depth)
{
    bool named = *at == '{';
    unsigned char closing = named ? '}' : ']';
    at = skip_space(at + 1, end);
    if (at < end && *at == closing)
        return at + 1;
    for (;;) {
        if (named) {
            place name;
            Py_ssize_t size;
            bool escaped = false;
            at = skip_name(at, end, &name, &size, &escaped);
        }
        if (at == NULL || (at = skip_value(at, end, depth)) == NULL || (at = skip_space(at, end)) == end)
            return NULL;
        if (*at == closing)
            return at + 1;
        if (*at != ',')
            return NULL;
        at = skip_space(at + 1, end);
    }
}

static place skip_value(place at, place end, int depth)
{
    if (at == end)
        return NULL;
    bool escaped = false;
    switch (*at) {
    case '"':
        return skip_string(at + 1, end, &escaped);
    case '{':
    case '[':
        return depth < MAX_DEPTH ? skip_list(at, end, depth + 1) : NULL;
    case 't':
        return skip_word(at, end, "true");
    case 'f':
        return skip_word(at, end, "false");
    case 'n':
        return skip_word(at, end, "null");
    default:
        return skip_number(at, end);
    }
}

/* --- Members --- */

enum { MODEL, MEMBERS = 11 };

#define NAMED(text) {text, sizeof text - 1}
static const struct {
    const char *text;
    Py_ssize_t size;
} names[MEMBERS] = {
    NAMED("model"), NAMED("stream"), NAMED("messages"), NAMED("prompt"), NAMED("input"), NAMED("system"),
    NAMED("tools"), NAMED("stream_options"), NAMED("previous_response_id"), NAMED("max_tokens"),
    NAMED("max_completion_tokens"),
};

struct member {
    place start; /* NULL where it isn't there */
    place end;
};

static int index_of(place name, Py_ssize_t size)
{
    for (int index = 0; index < MEMBERS; index++) {
        if (names[index].size == size && !memcmp(names[index].text, name, (size_t)size))
            return index;
    }
    return -1;
}

/* Finds members; of one that comes twice the last, but for the model. False for anything that isn't plain. */
static bool find_members(place at, place end, struct member *members)
{
    at = skip_space(at, end);
    if (at == end || *at != '{')
        return false;
    do {
        place name, start;
        Py_ssize_t size;
        bool escaped = false;
        start = skip_name(skip_space(at + 1, end), end, &name, &size, &escaped);
        if (start == NULL || escaped || (at = skip_value(start, end, 1)) == NULL)
            return false;
        int index = index_of(name, size);
        if (index == MODEL && members[MODEL].start != NULL)
            return false;
        if (index >= 0)
            members[index] = (struct member){start, at};
        at = skip_space(at, end);
    } while (at < end && *at == ',');
    if (at == end || *at != '}' || skip_space(at + 1, end) != end)
        return false;
    struct member model = members[MODEL];
    return model.start != NULL && *model.start == '"'
        && memchr(model.start, '\\', (size_t)(model.end - model.start)) == NULL;
}

static PyObject *value_of(PyObject *data, struct member member)
{
    if (member.start == NULL)
        return PyBytes_FromStringAndSize(NULL, 0);
    Py_ssize_t size = member.end - member.start;
    if (size <= COPIED_BYTES)
        return PyBytes_FromStringAndSize((const char *)member.start, size);
    PyObject *all = PyMemoryView_FromObject(data);
    if (all == NULL)
        return NULL;
    Py_ssize_t start = (const char *)member.start - PyBytes_AS_STRING(data);
    PyObject *part = PySequence_GetSlice(all, start, start + size);
    Py_DECREF(all);
    return part;
}

PyObject *peek(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t number)
{
    if (number != 2 || !PyBytes_CheckExact(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "peek() takes bytes and where the body begins in them");
        return NULL;
    }
    PyObject *data = arguments[0];
    Py_ssize_t start = PyLong_AsSsize_t(arguments[1]);
    if (start == -1 && PyErr_Occurred())
        return NULL;
    if (start < 0 || start > PyBytes_GET_SIZE(data)) {
        PyErr_SetString(PyExc_ValueError, "a body begins within its bytes");
        return NULL;
    }
    place text = (place)PyBytes_AS_STRING(data);
    struct member members[MEMBERS] = {{NULL, NULL}};
    if (!find_members(text + start, text + PyBytes_GET_SIZE(data), members))
        Py_RETURN_NONE;
    struct member model = members[MODEL];
    PyObject *name = PyUnicode_DecodeUTF8((const char *)model.start + 1, model.end - model.start - 2, NULL);
    if (name == NULL) {
        PyErr_Clear(); /* no text: the other reader says so */
        Py_RETURN_NONE;
    }
    PyObject *found = PyTuple_New(MEMBERS + 2);
    if (found == NULL) {
        Py_DECREF(name);
        return NULL;
    }
    PyTuple_SET_ITEM(found, MODEL, name);
    for (int index = MODEL + 1; index < MEMBERS; index++)
        PyTuple_SET_ITEM(found, index, value_of(data, members[index]));
    PyTuple_SET_ITEM(found, MEMBERS, PyLong_FromSsize_t(model.start - text - start));
    PyTuple_SET_ITEM(found, MEMBERS + 1, PyLong_FromSsize_t(model.end - text - start));
    if (PyErr_Occurred())
        Py_CLEAR(found);
    return found;
}
