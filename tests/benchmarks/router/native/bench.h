/* What the load generator and the mock engine share: the clock, histograms, a timer heap, small HTTP scanning. */
#ifndef MODELFLEET_BENCH_H
#define MODELFLEET_BENCH_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_S UINT64_C(1000000000)
#define NS_PER_MS UINT64_C(1000000)
#define NS_PER_US UINT64_C(1000)

static inline uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * NS_PER_S + (uint64_t)t.tv_nsec;
}

static inline void die(const char *format, ...) {
  va_list args;
  va_start(args, format);
  vfprintf(stderr, format, args);
  va_end(args);
  if (errno) fprintf(stderr, ": %s", strerror(errno));
  fputc('\n', stderr);
  exit(1);
}

static inline void *grow(void *memory, size_t size) {
  void *out = realloc(memory, size);
  if (!out) die("out of memory (%zu bytes)", size);
  return out;
}

static inline void *zeroed(size_t size) {
  void *out = calloc(1, size);
  if (!out) die("out of memory (%zu bytes)", size);
  return out;
}

/* --- Histogram: log-linear, 64 steps to the octave, so a value is off by at most 1.6 % ------------------------ */

#define HIST_SUB 64
#define HIST_SIZE ((64 - 5) * HIST_SUB)

typedef struct {
  uint64_t count[HIST_SIZE];
  uint64_t total, max;
  double sum;
} Hist;

static inline unsigned hist_index(uint64_t value) {
  if (value < 2 * HIST_SUB) return (unsigned)value;
  unsigned exponent = 63u - (unsigned)__builtin_clzll(value);
  return (exponent - 5u) * HIST_SUB + (unsigned)((value >> (exponent - 6u)) & (HIST_SUB - 1));
}

static inline uint64_t hist_value(unsigned index) { /* upper edge of the step */
  if (index < 2 * HIST_SUB) return index;
  unsigned exponent = index / HIST_SUB + 5u;
  return ((uint64_t)(HIST_SUB + index % HIST_SUB + 1) << (exponent - 6u)) - 1;
}

static inline void hist_add(Hist *h, uint64_t value) {
  h->count[hist_index(value)]++;
  h->total++;
  h->sum += (double)value;
  if (value > h->max) h->max = value;
}

static inline double hist_percentile_ms(const Hist *h, double percent) {
  uint64_t want = (uint64_t)((double)h->total * percent / 100.0 + 0.999999), seen = 0;
  if (!h->total) return 0;
  for (unsigned i = 0; i < HIST_SIZE; i++) {
    seen += h->count[i];
    if (seen >= want) return (double)(hist_value(i) < h->max ? hist_value(i) : h->max) / 1e6;
  }
  return (double)h->max / 1e6;
}

static inline void hist_print(FILE *out, const char *name, const Hist *h) {
  fprintf(out, "\"%s\": {\"count\": %" PRIu64 ", \"mean\": %.6f, \"p50\": %.6f, \"p90\": %.6f, \"p99\": %.6f, ", name,
          h->total, h->total ? h->sum / (double)h->total / 1e6 : 0.0, hist_percentile_ms(h, 50),
          hist_percentile_ms(h, 90), hist_percentile_ms(h, 99));
  fprintf(out, "\"p999\": %.6f, \"max\": %.6f}", hist_percentile_ms(h, 99.9), (double)h->max / 1e6);
}

/* --- Timers: a binary heap of (when, what, generation); a stale generation is ignored when it comes up --------- */

typedef struct {
  uint64_t when;
  void *what;
  uint32_t generation, kind;
} Timer;

typedef struct {
  Timer *items;
  size_t count, capacity;
} Heap;

static inline void heap_push(Heap *heap, Timer timer) {
  if (heap->count == heap->capacity) {
    heap->capacity = heap->capacity ? heap->capacity * 2 : 1024;
    heap->items = grow(heap->items, heap->capacity * sizeof(Timer));
  }
  size_t i = heap->count++;
  while (i && heap->items[(i - 1) / 2].when > timer.when) {
    heap->items[i] = heap->items[(i - 1) / 2];
    i = (i - 1) / 2;
  }
  heap->items[i] = timer;
}

static inline Timer heap_pop(Heap *heap) {
  Timer top = heap->items[0], last = heap->items[--heap->count];
  size_t i = 0;
  for (;;) {
    size_t child = 2 * i + 1;
    if (child >= heap->count) break;
    if (child + 1 < heap->count && heap->items[child + 1].when < heap->items[child].when) child++;
    if (heap->items[child].when >= last.when) break;
    heap->items[i] = heap->items[child];
    i = child;
  }
  if (heap->count) heap->items[i] = last;
  return top;
}

typedef struct {
  int fd;
  uint64_t armed;
} Alarm;

static inline Alarm alarm_new(void) {
  int fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
  if (fd < 0) die("timerfd_create");
  return (Alarm){fd, 0};
}

/* Wake at `when` (0: never). One syscall, and only when the answer changed. */
static inline void alarm_set(Alarm *alarm, uint64_t when) {
  if (when == alarm->armed) return;
  struct itimerspec spec = {.it_value = {(time_t)(when / NS_PER_S), (long)(when % NS_PER_S)}};
  if (timerfd_settime(alarm->fd, TFD_TIMER_ABSTIME, &spec, NULL)) die("timerfd_settime");
  alarm->armed = when;
}

static inline void alarm_drain(Alarm *alarm) {
  uint64_t ticks;
  if (read(alarm->fd, &ticks, sizeof ticks) == (ssize_t)sizeof ticks) alarm->armed = 0;
}

/* --- HTTP --------------------------------------------------------------------------------------------------------- */

/* Value of a header in [head, head + length), or NULL. `name` is lower case and ends with ':'. */
static inline const char *header_find(const char *head, size_t length, const char *name, size_t *value_length) {
  size_t name_length = strlen(name);
  const char *end = head + length, *line = memchr(head, '\n', length);
  while (line && ++line + name_length < end) {
    const char *stop = memchr(line, '\n', (size_t)(end - line));
    if (!stop) stop = end;
    if (!strncasecmp(line, name, name_length)) {
      const char *value = line + name_length, *last = stop;
      while (value < last && (*value == ' ' || *value == '\t')) value++;
      while (last > value && (last[-1] == '\r' || last[-1] == ' ')) last--;
      *value_length = (size_t)(last - value);
      return value;
    }
    line = stop < end ? stop : NULL;
  }
  return NULL;
}

/* Undoes chunked transfer coding, one piece of input at a time. */
typedef struct {
  enum { CHUNK_SIZE, CHUNK_EXTENSION, CHUNK_DATA, CHUNK_END, CHUNK_TRAILER, CHUNK_DONE, CHUNK_BAD } state;
  uint64_t left;
  unsigned line;
} Dechunk;

/* Takes input until data, the end, or nothing is left: returns the number of bytes taken, and data as a slice. */
static inline size_t dechunk(Dechunk *d, const char *in, size_t length, const char **data, size_t *data_length) {
  size_t i = 0;
  *data_length = 0;
  while (i < length && d->state != CHUNK_DONE && d->state != CHUNK_BAD) {
    char c = in[i];
    switch (d->state) {
    case CHUNK_SIZE:
      i++;
      if (c >= '0' && c <= '9') d->left = d->left * 16 + (uint64_t)(c - '0'), d->line++;
      else if ((c | 32) >= 'a' && (c | 32) <= 'f') d->left = d->left * 16 + (uint64_t)((c | 32) - 'a' + 10), d->line++;
      else if (c == ';' || c == '\r') d->state = CHUNK_EXTENSION;
      else d->state = CHUNK_BAD;
      if (d->line > 15) d->state = CHUNK_BAD;
      break;
    case CHUNK_EXTENSION:
      i++;
      if (c == '\n') {
        if (!d->line) d->state = CHUNK_BAD;
        else d->state = d->left ? CHUNK_DATA : CHUNK_TRAILER;
        d->line = 0;
      }
      break;
    case CHUNK_DATA: {
      size_t take = length - i < d->left ? length - i : (size_t)d->left;
      *data = in + i;
      *data_length = take;
      d->left -= take;
      if (!d->left) d->state = CHUNK_END;
      return i + take;
    }
    case CHUNK_END:
      i++;
      if (c == '\n') d->state = CHUNK_SIZE, d->left = 0, d->line = 0;
      break;
    case CHUNK_TRAILER: /* ends with an empty line */
      i++;
      if (c == '\n') {
        if (!d->line) d->state = CHUNK_DONE;
        d->line = 0;
      } else if (c != '\r') d->line++;
      break;
    default:
      break;
    }
  }
  return i;
}

static inline void set_nodelay(int fd) {
  int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

#endif
