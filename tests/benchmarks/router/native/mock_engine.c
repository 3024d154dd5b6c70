/* A mock OpenAI engine: many replicas in one thread, cheap enough that the proxy in front is the bottleneck.
 *
 *   mock_engine --ports 9001-9008 --control 9000 [--log FILE] [--config "name=value&..."]
 *
 * Every port is one replica. The control port takes GET /config?name=value&... (add port=N for one replica's
 * mode), GET /stats and GET /reset. What a replica does with a chat completion:
 *
 *   prefill_us   silence before the answer begins          interval_us  gap between streamed chunks
 *   chunks       chunks of a stream without max_tokens      flood_bytes  >0: streams are this many bytes, at full speed
 *   headers_early 1: the head of a stream goes out before the prefill
 *   sim          1: a queue, prefill at sim_rate tokens/s less what the prefix cache (sim_blocks of 16 tokens, LRU)
 *                holds, decoding at sim_itl_us + sim_slope_us per running request, at most sim_running at once
 *   mode         ok | 500 | 503 | stall | reset | cut (closes a stream after cut_after chunks)
 *
 * A chunk's text carries the monotonic time it was sent at (t=), its place in the stream (n=) and the request's id
 * (i=), which the request brought in its text as @i=<16 hex>k=<6 digits>@ (k: length of the stream). A prompt that
 * already ends with "n=<6 digits>" of the answer is continued from there.
 */
#include "bench.h"

#define BLOCK_BYTES 64 /* 16 tokens of 4 bytes */
#define MAX_EVENTS 512
#define SEARCH_WINDOW 1024
#define PENDING_LIMIT (1 << 20)

enum { MODE_OK, MODE_500, MODE_503, MODE_STALL, MODE_RESET, MODE_CUT };
static const char *const mode_names[] = {"ok", "500", "503", "stall", "reset", "cut"};
enum { TIMER_START, TIMER_TOKEN, TIMER_PREFILLED };

typedef struct Node {
  uint64_t hash;
  struct Node *newer, *older, *chain;
} Node;

typedef struct {
  Node **table, *nodes, *newest, *oldest;
  size_t mask, used, capacity;
} Cache;

struct Conn;
typedef struct {
  int fd, port, mode;
  bool control;
  uint32_t generation;
  Cache cache;
  struct Conn *first, *last, *prefilling; /* waiting, first come first served */
  int running, active, queued;
  uint64_t requests, finished, aborted, chunks, prompt_tokens, cached_tokens, bytes, last_request_ns, last_abort_ns;
} Engine;

typedef struct Conn {
  int fd;
  Engine *engine;
  uint32_t generation, events;
  char *in;
  size_t in_length, in_capacity, head_length, body_length, scanned;
  bool chunked, close_after, counted;
  Dechunk dechunk;
  char *out;
  size_t out_length, out_offset, out_capacity;
  enum { READING, WAITING, STREAMING, FLOODING } state;
  bool stream, usage, headers_sent, queued, decoding;
  unsigned sequence, total;
  char id[17];
  uint64_t flood_left;
  uint64_t *hashes;
  size_t hash_count, hash_capacity, prompt_tokens, cached;
  struct Conn *next, *previous;
} Conn;

static struct {
  uint64_t prefill_us, interval_us, chunks, flood_bytes, headers_early, verify, cut_after, pad;
  uint64_t sim, sim_rate, sim_blocks, sim_itl_us, sim_slope_us, sim_running, sim_overhead_us;
} config = {.chunks = 128, .interval_us = 20000, .cut_after = 8, .sim_rate = 20000, .sim_blocks = 16384,
            .sim_itl_us = 15000, .sim_slope_us = 100, .sim_running = 256, .sim_overhead_us = 3000};

static const struct {
  const char *name;
  uint64_t *value;
} settings[] = {{"prefill_us", &config.prefill_us}, {"interval_us", &config.interval_us}, {"chunks", &config.chunks},
                {"flood_bytes", &config.flood_bytes}, {"headers_early", &config.headers_early},
                {"verify", &config.verify}, {"cut_after", &config.cut_after}, {"pad", &config.pad},
                {"sim", &config.sim}, {"sim_rate", &config.sim_rate}, {"sim_blocks", &config.sim_blocks},
                {"sim_itl_us", &config.sim_itl_us}, {"sim_slope_us", &config.sim_slope_us},
                {"sim_running", &config.sim_running}, {"sim_overhead_us", &config.sim_overhead_us}};

static int epoll_fd;
static Heap timers;
static Engine *engines;
static size_t engine_count;
static Conn *free_conns;
static FILE *request_log;
static char flood_block[65536];

/* --- The prefix cache ------------------------------------------------------------------------------------------- */

static void cache_reset(Cache *cache) {
  free(cache->table);
  free(cache->nodes);
  size_t size = 1;
  while (size < config.sim_blocks * 2) size *= 2;
  *cache = (Cache){.table = zeroed(size * sizeof(Node *)), .nodes = zeroed(config.sim_blocks * sizeof(Node)),
                   .mask = size - 1, .capacity = config.sim_blocks};
}

static Node *cache_find(Cache *cache, uint64_t hash) {
  Node *node = cache->table[hash & cache->mask];
  while (node && node->hash != hash) node = node->chain;
  return node;
}

static void cache_unlink(Cache *cache, Node *node) {
  if (node->newer) node->newer->older = node->older;
  else cache->newest = node->older;
  if (node->older) node->older->newer = node->newer;
  else cache->oldest = node->newer;
}

static void cache_use(Cache *cache, uint64_t hash) { /* touches or inserts; the least recently used makes room */
  Node *node = cache_find(cache, hash);
  if (node) cache_unlink(cache, node);
  else {
    if (cache->used < cache->capacity) node = &cache->nodes[cache->used++];
    else {
      node = cache->oldest;
      cache_unlink(cache, node);
      Node **link = &cache->table[node->hash & cache->mask];
      while (*link != node) link = &(*link)->chain;
      *link = node->chain;
    }
    node->hash = hash;
    node->chain = cache->table[hash & cache->mask];
    cache->table[hash & cache->mask] = node;
  }
  node->newer = NULL;
  node->older = cache->newest;
  if (cache->newest) cache->newest->newer = node;
  cache->newest = node;
  if (!cache->oldest) cache->oldest = node;
}

static uint64_t mix(uint64_t hash, const char *block) {
  for (unsigned i = 0; i < BLOCK_BYTES; i += 8) {
    uint64_t word;
    memcpy(&word, block + i, 8);
    __uint128_t product = (__uint128_t)(word ^ 0x9e3779b97f4a7c15ull ^ hash) * 0xbf58476d1ce4e5b9ull;
    hash = (uint64_t)product ^ (uint64_t)(product >> 64) ^ (hash << 1);
  }
  return hash;
}

/* Block hashes of the message list, the same however the rest of the body is arranged. */
static void hash_prompt(Conn *conn, const char *body, size_t length) {
  const char *end = body + length, *start = memmem(body, length, "\"messages\"", 10);
  conn->hash_count = 0;
  conn->prompt_tokens = 0;
  if (!start || !(start = memchr(start, '[', (size_t)(end - start)))) return;
  const char *stop = start;
  int depth = 0;
  bool quoted = false;
  for (; stop < end; stop++) {
    if (quoted) {
      if (*stop == '\\') stop++;
      else if (*stop == '"') quoted = false;
    } else if (*stop == '"') quoted = true;
    else if (*stop == '[') depth++;
    else if (*stop == ']' && !--depth) break;
  }
  size_t blocks = (size_t)(stop - start) / BLOCK_BYTES;
  if (blocks > conn->hash_capacity) {
    conn->hash_capacity = blocks;
    conn->hashes = grow(conn->hashes, blocks * sizeof *conn->hashes);
  }
  uint64_t hash = 0;
  for (size_t i = 0; i < blocks; i++) conn->hashes[i] = hash = mix(hash, start + i * BLOCK_BYTES);
  conn->hash_count = blocks;
  conn->prompt_tokens = (size_t)(stop - start) / 4;
}

/* --- Connections ------------------------------------------------------------------------------------------------ */

static void sim_pump(Engine *engine);

static void watch(Conn *conn, uint32_t events) {
  if (conn->events == events) return;
  struct epoll_event event = {.events = events, .data.ptr = conn};
  epoll_ctl(epoll_fd, conn->events ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, conn->fd, &event);
  conn->events = events;
}

static void dequeue(Conn *conn) {
  Engine *engine = conn->engine;
  if (!conn->queued) return;
  if (conn->previous) conn->previous->next = conn->next;
  else engine->first = conn->next;
  if (conn->next) conn->next->previous = conn->previous;
  else engine->last = conn->previous;
  conn->next = conn->previous = NULL;
  conn->queued = false;
  engine->queued--;
}

static void request_over(Conn *conn, bool aborted) {
  Engine *engine = conn->engine;
  conn->generation++;
  if (!conn->counted) return;
  conn->counted = false;
  engine->active--;
  if (aborted) engine->aborted++, engine->last_abort_ns = now_ns();
  else engine->finished++;
  dequeue(conn);
  if (conn->decoding) conn->decoding = false, engine->running--;
  if (engine->prefilling == conn) engine->prefilling = NULL, engine->generation++;
  if (config.sim) sim_pump(engine);
}

static void conn_close(Conn *conn) {
  if (conn->fd < 0) return;
  request_over(conn, true);
  close(conn->fd);
  conn->fd = -1;
  conn->next = free_conns;
  free_conns = conn;
}

static bool conn_send(Conn *conn, const char *data, size_t length) {
  if (conn->out_length == conn->out_offset) {
    ssize_t sent = send(conn->fd, data, length, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno != EAGAIN) {
      conn_close(conn);
      return false;
    }
    if (sent < 0) sent = 0;
    conn->engine->bytes += (uint64_t)sent;
    if ((size_t)sent == length) return true;
    data += sent;
    length -= (size_t)sent;
    conn->out_length = conn->out_offset = 0;
  }
  if (conn->out_length + length > conn->out_capacity) {
    conn->out_capacity = (conn->out_length + length) * 2;
    conn->out = grow(conn->out, conn->out_capacity);
  }
  memcpy(conn->out + conn->out_length, data, length);
  conn->out_length += length;
  watch(conn, EPOLLIN | EPOLLRDHUP | EPOLLOUT);
  return true;
}

static void timer_in(Conn *conn, uint64_t delay_us, uint32_t kind) {
  heap_push(&timers, (Timer){now_ns() + delay_us * NS_PER_US, conn, conn->generation, kind});
}

static void answer(Conn *conn, const char *status, const char *type, const char *body, size_t length) {
  char buffer[8192];
  int head = snprintf(buffer, sizeof buffer, "HTTP/1.1 %s\r\ncontent-type: %s\r\ncontent-length: %zu\r\n%s\r\n", status,
                      type, length, conn->close_after ? "connection: close\r\n" : "");
  if ((size_t)head + length > sizeof buffer) die("an answer of %zu bytes is too long", length);
  memcpy(buffer + head, body, length);
  if (!conn_send(conn, buffer, (size_t)head + length)) return;
  request_over(conn, false);
  conn->state = READING;
  if (conn->close_after) conn_close(conn);
}

static void answer_completion(Conn *conn) {
  char body[1024];
  unsigned words = conn->total < 32 ? conn->total : 32;
  int length = snprintf(body, sizeof body,
      "{\"id\":\"chatcmpl-6f1d4c0b9a7e4d2f\",\"object\":\"chat.completion\",\"created\":1767225600,\"model\":\"m\","
      "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"t=%020" PRIu64 " n=%06u i=%s The answer of a "
      "mock engine, long enough to look like one.\"},\"logprobs\":null,\"finish_reason\":\"stop\"}],"
      "\"system_fingerprint\":\"e%d\",\"usage\":{\"prompt_tokens\":%zu,\"completion_tokens\":%u,\"total_tokens\":%zu,"
      "\"prompt_tokens_details\":{\"cached_tokens\":%zu}}}",
      now_ns(), 0u, conn->id, conn->engine->port, conn->prompt_tokens, words, conn->prompt_tokens + words, conn->cached);
  answer(conn, "200 OK", "application/json", body, (size_t)length);
}

static bool send_stream_head(Conn *conn) {
  static const char head[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                             "cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n";
  conn->headers_sent = true;
  return conn_send(conn, head, sizeof head - 1);
}

static int put_chunk(char *out, const char *event, int length) {
  int head = sprintf(out, "%x\r\n", (unsigned)length);
  memcpy(out + head, event, (size_t)length);
  memcpy(out + head + length, "\r\n", 2);
  return head + length + 2;
}

static void stream_step(Conn *conn) {
  char event[8192], out[16384];
  int used = 0, length;
  Engine *engine = conn->engine;
  if (!conn->headers_sent && !send_stream_head(conn)) return;
  length = snprintf(event, sizeof event,
      "data: {\"id\":\"chatcmpl-6f1d4c0b9a7e4d2f\",\"object\":\"chat.completion.chunk\",\"created\":1767225600,"
      "\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"t=%020" PRIu64 " n=%06u i=%s \"},\"logprobs\":null,"
      "\"finish_reason\":%s}]}\n\n",
      now_ns(), conn->sequence, conn->id, conn->sequence + 1 == conn->total ? "\"stop\"" : "null");
  conn->sequence++;
  engine->chunks++;
  used = put_chunk(out, event, length);
  bool last = conn->sequence >= conn->total;
  if (last) {
    if (conn->usage) {
      length = snprintf(event, sizeof event,
          "data: {\"id\":\"chatcmpl-6f1d4c0b9a7e4d2f\",\"object\":\"chat.completion.chunk\",\"created\":1767225600,"
          "\"model\":\"m\",\"choices\":[],\"usage\":{\"prompt_tokens\":%zu,\"completion_tokens\":%u,\"total_tokens\":%zu}}\n\n",
          conn->prompt_tokens, conn->sequence, conn->prompt_tokens + conn->sequence);
      used += put_chunk(out + used, event, length);
    }
    used += put_chunk(out + used, "data: [DONE]\n\n", 14);
    memcpy(out + used, "0\r\n\r\n", 5);
    used += 5;
  }
  if (!conn_send(conn, out, (size_t)used)) return;
  if (last) {
    request_over(conn, false);
    conn->state = READING;
    if (conn->close_after) conn_close(conn);
  } else if (engine->mode == MODE_CUT && conn->sequence >= config.cut_after) conn_close(conn);
}

static uint64_t token_gap_us(const Conn *conn) {
  if (!config.sim) return config.interval_us;
  return config.sim_itl_us + config.sim_slope_us * (uint64_t)conn->engine->running;
}

static void flood(Conn *conn) {
  while (conn->out_length == conn->out_offset && conn->flood_left) {
    size_t take = conn->flood_left < sizeof flood_block ? (size_t)conn->flood_left : sizeof flood_block;
    conn->flood_left -= take;
    if (!conn_send(conn, flood_block, take)) return;
  }
  if (!conn->flood_left && conn->out_length == conn->out_offset) conn_close(conn); /* ends with the connection */
}

static void begin_answer(Conn *conn) {
  if (config.flood_bytes && conn->stream) {
    static const char head[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
    conn->state = FLOODING;
    conn->flood_left = config.flood_bytes;
    if (conn_send(conn, head, sizeof head - 1)) flood(conn);
  } else if (!conn->stream) answer_completion(conn);
  else {
    uint32_t generation = conn->generation;
    conn->state = STREAMING;
    stream_step(conn);
    if (conn->fd >= 0 && conn->state == STREAMING && conn->generation == generation)
      timer_in(conn, token_gap_us(conn), TIMER_TOKEN);
  }
}

/* --- The simulated engine: one prefill at a time, then decoding beside the others ---------------------------- */

static void sim_pump(Engine *engine) {
  if (engine->prefilling || !engine->first || engine->running >= (int)config.sim_running) return;
  Conn *conn = engine->first;
  dequeue(conn);
  size_t hit = 0;
  while (hit < conn->hash_count && cache_find(&engine->cache, conn->hashes[hit])) hit++;
  for (size_t i = conn->hash_count; i--;) cache_use(&engine->cache, conn->hashes[i]); /* leaves grow old first */
  conn->cached = hit * 16;
  if (conn->cached > conn->prompt_tokens) conn->cached = conn->prompt_tokens;
  engine->prompt_tokens += conn->prompt_tokens;
  engine->cached_tokens += conn->cached;
  engine->prefilling = conn;
  uint64_t work_ns = (conn->prompt_tokens - conn->cached) * NS_PER_S / config.sim_rate;
  heap_push(&timers, (Timer){now_ns() + work_ns + config.sim_overhead_us * NS_PER_US, engine, ++engine->generation,
                             TIMER_PREFILLED});
}

static void sim_prefilled(Engine *engine) {
  Conn *conn = engine->prefilling;
  engine->prefilling = NULL;
  engine->running++;
  conn->decoding = true;
  if (conn->stream) begin_answer(conn);
  else timer_in(conn, token_gap_us(conn) * conn->total, TIMER_START);
  sim_pump(engine);
}

/* --- Requests ---------------------------------------------------------------------------------------------------- */

/* Finds `needle` near either end of the body: what clients set stands before or after the messages. */
static const char *find_setting(const char *body, size_t length, const char *needle) {
  size_t window = length < SEARCH_WINDOW ? length : SEARCH_WINDOW, size = strlen(needle);
  const char *found = memmem(body + length - window, window, needle, size);
  return found ? found : memmem(body, window, needle, size);
}

static bool setting_true(const char *body, size_t length, const char *needle) {
  const char *found = find_setting(body, length, needle);
  if (!found) return false;
  found += strlen(needle);
  while (*found == ' ' || *found == ':') found++;
  return !strncmp(found, "true", 4);
}

static void read_marks(Conn *conn, const char *body, size_t length) {
  const char *mark = memmem(body, length, "@i=", 3);
  if (!mark || mark + 27 > body + length) return;
  memcpy(conn->id, mark + 3, 16);
  if (!memcmp(mark + 19, "k=", 2)) conn->total = (unsigned)strtoul(mark + 21, NULL, 10);
  const char *last = NULL, *next = mark;
  while ((next = memmem(next, (size_t)(body + length - next), " n=", 3))) last = next, next += 3;
  if (last) conn->sequence = (unsigned)strtoul(last + 3, NULL, 10) + 1;
}

static void chat(Conn *conn, const char *body, size_t length) {
  Engine *engine = conn->engine;
  engine->requests++;
  engine->active++;
  engine->last_request_ns = now_ns();
  conn->counted = true;
  conn->state = WAITING;
  conn->headers_sent = false;
  conn->sequence = 0;
  conn->cached = 0;
  conn->total = (unsigned)config.chunks;
  conn->prompt_tokens = length / 4;
  memcpy(conn->id, "0000000000000000", 17);
  conn->stream = setting_true(body, length, "\"stream\"");
  conn->usage = conn->stream && setting_true(body, length, "\"include_usage\"");
  const char *limit = find_setting(body, length, "\"max_tokens\"");
  if (!limit) limit = find_setting(body, length, "\"max_completion_tokens\"");
  if (limit) {
    const char *number = memchr(limit, ':', (size_t)(body + length - limit));
    if (number) conn->total = (unsigned)strtoul(number + 1, NULL, 10);
  }
  if (config.verify) read_marks(conn, body, length);
  if (!conn->total) conn->total = 1;
  if (request_log)
    fprintf(request_log, "%s %d %u %" PRIu64 "\n", conn->id, engine->port, conn->sequence, now_ns() / NS_PER_US);
  static const char failure[] = "{\"error\":{\"message\":\"injected fault\",\"type\":\"server_error\",\"code\":\"injected\"}}";
  switch (engine->mode) {
  case MODE_500:
    answer(conn, "500 Internal Server Error", "application/json", failure, sizeof failure - 1);
    return;
  case MODE_503:
    answer(conn, "503 Service Unavailable", "application/json", failure, sizeof failure - 1);
    return;
  case MODE_STALL:
    return;
  case MODE_RESET: {
    struct linger reset = {1, 0};
    setsockopt(conn->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    conn_close(conn);
    return;
  }
  default:
    break;
  }
  if (conn->stream && config.headers_early && !send_stream_head(conn)) return;
  if (config.sim) {
    hash_prompt(conn, body, length);
    conn->previous = engine->last;
    conn->next = NULL;
    if (engine->last) engine->last->next = conn;
    else engine->first = conn;
    engine->last = conn;
    conn->queued = true;
    engine->queued++;
    sim_pump(engine);
  } else if (config.prefill_us) timer_in(conn, config.prefill_us, TIMER_START);
  else begin_answer(conn);
}

static Engine *engine_by_port(int port) {
  for (size_t i = 0; i < engine_count; i++)
    if (engines[i].port == port) return &engines[i];
  return NULL;
}

/* Takes "name=value&..."; returns the part that it doesn't know, or NULL. */
static const char *configure(char *query) {
  Engine *only = NULL;
  char *save = NULL;
  for (char *pair = strtok_r(query, "&", &save); pair; pair = strtok_r(NULL, "&", &save)) {
    char *value = strchr(pair, '=');
    bool known = false;
    if (!value) return pair;
    *value++ = 0;
    if (!strcmp(pair, "port")) only = engine_by_port(atoi(value)), known = true;
    for (unsigned m = 0; !strcmp(pair, "mode") && m < sizeof mode_names / sizeof *mode_names; m++)
      if (!strcmp(value, mode_names[m])) {
        known = true;
        for (size_t i = 0; i < engine_count; i++)
          if (!only || only == &engines[i]) engines[i].mode = (int)m;
      }
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
      if (!strcmp(pair, settings[i].name)) *settings[i].value = strtoull(value, NULL, 10), known = true;
    if (!known) return pair;
  }
  for (size_t i = 0; i < engine_count; i++)
    if (config.sim && engines[i].cache.capacity != config.sim_blocks) cache_reset(&engines[i].cache);
  return NULL;
}

static void control(Conn *conn, char *path) {
  char body[7000];
  size_t used = 0;
  char *query = strchr(path, '?');
  if (query) *query++ = 0;
  if (!strcmp(path, "/config")) {
    const char *unknown = query ? configure(query) : NULL;
    if (unknown) {
      answer(conn, "400 Bad Request", "text/plain", unknown, strlen(unknown));
      return;
    }
  } else if (!strcmp(path, "/reset")) {
    for (size_t i = 0; i < engine_count; i++) {
      Engine *e = &engines[i];
      e->requests = e->finished = e->aborted = e->chunks = e->prompt_tokens = e->cached_tokens = e->bytes = 0;
      if (config.sim) cache_reset(&e->cache);
    }
  }
  used += (size_t)snprintf(body, sizeof body, "{\"now_ns\": %" PRIu64 ", \"engines\": [", now_ns());
  for (size_t i = 0; i < engine_count; i++) {
    Engine *e = &engines[i];
    if (e->control) continue;
    used += (size_t)snprintf(body + used, sizeof body - used,
        "%s{\"port\": %d, \"mode\": \"%s\", \"requests\": %" PRIu64 ", \"finished\": %" PRIu64 ", \"aborted\": %" PRIu64
        ", \"active\": %d, \"queued\": %d, \"chunks\": %" PRIu64 ", \"prompt_tokens\": %" PRIu64 ", \"cached_tokens\": %" PRIu64
        ", \"bytes\": %" PRIu64 ", \"last_request_ns\": %" PRIu64 ", \"last_abort_ns\": %" PRIu64 "}",
        body[used - 1] == '[' ? "" : ", ", e->port, mode_names[e->mode], e->requests, e->finished, e->aborted, e->active,
        e->queued, e->chunks, e->prompt_tokens, e->cached_tokens, e->bytes, e->last_request_ns, e->last_abort_ns);
    if (used > sizeof body - 600) die("too many engines for one answer");
  }
  memcpy(body + used, "]}", 2);
  answer(conn, "200 OK", "application/json", body, used + 2);
}

static void get(Conn *conn, const char *path) {
  static const char models[] = "{\"object\":\"list\",\"data\":[{\"id\":\"m\",\"object\":\"model\",\"created\":1767225600,"
                               "\"owned_by\":\"mock\",\"root\":\"m\",\"max_model_len\":131072}]}";
  static const char info[] = "{\"model_path\":\"m\",\"served_model_name\":\"m\",\"tokenizer_path\":\"m\",\"is_generation\":true,"
                             "\"tp_size\":1,\"dp_size\":1,\"version\":\"0.0\",\"max_total_num_tokens\":1000000}";
  char metrics[256];
  if (!strncmp(path, "/v1/models", 10)) answer(conn, "200 OK", "application/json", models, sizeof models - 1);
  else if (!strncmp(path, "/metrics", 8)) {
    int length = snprintf(metrics, sizeof metrics, "vllm:num_requests_running{model_name=\"m\"} %d\nvllm:num_requests_waiting{"
                          "model_name=\"m\"} %d\n", conn->engine->active - conn->engine->queued, conn->engine->queued);
    answer(conn, "200 OK", "text/plain; version=0.0.4", metrics, (size_t)length);
  } else if (!strncmp(path, "/health", 7)) {
    bool well = conn->engine->mode == MODE_OK || conn->engine->mode == MODE_CUT;
    if (conn->engine->mode == MODE_STALL) return;
    answer(conn, well ? "200 OK" : "503 Service Unavailable", "text/plain", "", 0);
  } else answer(conn, "200 OK", "application/json", info, sizeof info - 1);
}

/* POST .../render: the prompt as token ids, one for 4 bytes of the message list. vllm-router's cache-aware mode asks
 * every engine for them. */
static void render(Conn *conn, const char *body, size_t length) {
  hash_prompt(conn, body, length);
  const char *start = memmem(body, length, "\"messages\"", 10);
  if (!start || !(start = memchr(start, '[', (size_t)(body + length - start)))) start = body, conn->prompt_tokens = 0;
  char *out = grow(NULL, conn->prompt_tokens * 8 + 512);
  size_t used = (size_t)sprintf(out, "{\"request_id\":\"chatcmpl-1\",\"model\":\"m\",\"sampling_params\":{\"max_tokens\":16},"
                                     "\"token_ids\":[");
  for (size_t i = 0; i < conn->prompt_tokens; i++) {
    uint32_t word;
    memcpy(&word, start + 4 * i, 4);
    used += (size_t)sprintf(out + used, i ? ",%u" : "%u", (word * 2654435761u) >> 15);
  }
  used += (size_t)sprintf(out + used, "]}");
  char head[128];
  int head_length = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n", used);
  if (conn_send(conn, head, (size_t)head_length)) conn_send(conn, out, used);
  free(out);
}

static bool ends_with(const char *path, const char *tail) {
  size_t length = strlen(path), size = strlen(tail);
  return length >= size && !strcmp(path + length - size, tail);
}

static void dispatch(Conn *conn) {
  char *body = conn->in + conn->head_length, path[1024];
  size_t length = conn->body_length, i = 0;
  const char *start = memchr(conn->in, ' ', conn->head_length);
  if (strncmp(conn->in, "POST ", 5) && strncmp(conn->in, "GET ", 4)) { /* sglang-router tries gRPC as well */
    conn_close(conn);
    return;
  }
  for (start++; i < sizeof path - 1 && start[i] != ' '; i++) path[i] = start[i];
  path[i] = 0;
  body[length] = 0;
  if (conn->engine->control) control(conn, path);
  else if (conn->in[0] == 'P' && ends_with(path, "/completions")) chat(conn, body, length);
  else if (conn->in[0] == 'P' && ends_with(path, "/render")) render(conn, body, length);
  else if (conn->in[0] == 'P') answer(conn, "404 Not Found", "text/plain", "", 0);
  else get(conn, path);
}

/* Takes requests out of the input, one at a time; the next waits until the one before is answered. */
static void take_requests(Conn *conn) {
  while (conn->fd >= 0 && conn->state == READING && conn->in_length) {
    if (!conn->head_length) {
      char *end = memmem(conn->in, conn->in_length, "\r\n\r\n", 4);
      if (!end) {
        if (conn->in_length > 65536) conn_close(conn);
        return;
      }
      size_t size, head = (size_t)(end - conn->in) + 4;
      const char *value = header_find(conn->in, head, "content-length:", &size);
      conn->head_length = head;
      conn->body_length = value ? strtoull(value, NULL, 10) : 0;
      conn->chunked = header_find(conn->in, head, "transfer-encoding:", &size) != NULL;
      value = header_find(conn->in, head, "connection:", &size);
      conn->close_after = value && size == 5 && !strncasecmp(value, "close", 5);
      conn->scanned = head;
      if (conn->chunked) conn->body_length = 0, conn->dechunk = (Dechunk){0};
      else if (head + conn->body_length + 1 > conn->in_capacity) {
        conn->in_capacity = head + conn->body_length + 4096;
        conn->in = grow(conn->in, conn->in_capacity);
      }
    }
    size_t used = conn->head_length + conn->body_length;
    if (conn->chunked) { /* the body is put together in place */
      const char *data;
      size_t size;
      while (conn->scanned < conn->in_length && conn->dechunk.state != CHUNK_DONE && conn->dechunk.state != CHUNK_BAD) {
        conn->scanned += dechunk(&conn->dechunk, conn->in + conn->scanned, conn->in_length - conn->scanned, &data, &size);
        if (size) memmove(conn->in + conn->head_length + conn->body_length, data, size), conn->body_length += size;
      }
      if (conn->dechunk.state == CHUNK_BAD) {
        conn_close(conn);
        return;
      }
      if (conn->dechunk.state != CHUNK_DONE) return;
      used = conn->scanned;
    } else if (conn->in_length < used) return;
    char kept = conn->in[conn->head_length + conn->body_length];
    dispatch(conn);
    if (conn->fd < 0) return;
    conn->in[conn->head_length + conn->body_length] = kept;
    memmove(conn->in, conn->in + used, conn->in_length - used);
    conn->in_length -= used;
    conn->head_length = 0;
  }
}

static void on_readable(Conn *conn) {
  for (;;) {
    if (conn->in_capacity < conn->in_length + 2) {
      conn->in_capacity = conn->in_capacity ? conn->in_capacity * 2 : 16384;
      conn->in = grow(conn->in, conn->in_capacity);
    }
    size_t room = conn->in_capacity - conn->in_length - 1; /* one byte to end the body with */
    ssize_t got = recv(conn->fd, conn->in + conn->in_length, room, MSG_DONTWAIT);
    if (got == 0 || (got < 0 && errno != EAGAIN)) {
      conn_close(conn);
      return;
    }
    if (got < 0) return;
    conn->in_length += (size_t)got;
    take_requests(conn);
    if (conn->fd < 0 || (size_t)got < room) return;
  }
}

static void on_writable(Conn *conn) {
  size_t left = conn->out_length - conn->out_offset;
  if (left) {
    ssize_t sent = send(conn->fd, conn->out + conn->out_offset, left, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno != EAGAIN) {
      conn_close(conn);
      return;
    }
    if (sent > 0) conn->out_offset += (size_t)sent, conn->engine->bytes += (uint64_t)sent;
  }
  if (conn->out_offset < conn->out_length) return;
  conn->out_offset = conn->out_length = 0;
  watch(conn, EPOLLIN | EPOLLRDHUP);
  if (conn->state == FLOODING) flood(conn);
}

static void on_accept(Engine *engine) {
  for (;;) {
    int fd = accept4(engine->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) return;
    set_nodelay(fd);
    Conn *conn = free_conns;
    if (conn) free_conns = conn->next;
    else conn = zeroed(sizeof *conn);
    conn->fd = fd;
    conn->engine = engine;
    conn->events = 0;
    conn->in_length = conn->head_length = conn->out_length = conn->out_offset = 0;
    conn->state = READING;
    conn->next = conn->previous = NULL;
    conn->counted = conn->queued = conn->decoding = false;
    watch(conn, EPOLLIN | EPOLLRDHUP);
  }
}

static void on_timer(Timer timer) {
  if (timer.kind == TIMER_PREFILLED) {
    Engine *engine = timer.what;
    if (engine->generation == timer.generation && engine->prefilling) sim_prefilled(engine);
    return;
  }
  Conn *conn = timer.what;
  if (conn->fd < 0 || conn->generation != timer.generation) return;
  if (timer.kind == TIMER_START) {
    if (conn->engine->mode != MODE_STALL) begin_answer(conn);
    take_requests(conn);
    return;
  }
  if (conn->engine->mode == MODE_STALL || conn->out_length - conn->out_offset > PENDING_LIMIT) {
    timer_in(conn, 20000, TIMER_TOKEN); /* an engine stops when its socket does */
    return;
  }
  stream_step(conn);
  if (conn->fd >= 0 && conn->generation == timer.generation) /* keeps to its own beat: no drift */
    heap_push(&timers, (Timer){timer.when + token_gap_us(conn) * NS_PER_US, conn, conn->generation, TIMER_TOKEN});
  else if (conn->fd >= 0) take_requests(conn);
}

static void listen_on(int port, bool control_port) {
  engines = grow(engines, (engine_count + 1) * sizeof *engines);
  Engine *engine = &engines[engine_count++];
  *engine = (Engine){.port = port, .control = control_port};
  engine->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  int one = 1;
  setsockopt(engine->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  if (bind(engine->fd, (struct sockaddr *)&address, sizeof address) || listen(engine->fd, 4096)) die("port %d", port);
}

static void fill_flood(void) {
  size_t used = 0;
  while (used < sizeof flood_block) {
    char event[320];
    int length = snprintf(event, sizeof event, "data: {\"id\":\"chatcmpl-6f1d4c0b9a7e4d2f\",\"object\":\"chat.completion.chunk\","
                          "\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a flood of words \"}}]}\n\n");
    size_t take = sizeof flood_block - used < (size_t)length ? sizeof flood_block - used : (size_t)length;
    memcpy(flood_block + used, event, take);
    used += take;
  }
}

int main(int argc, char **argv) {
  int first = 0, last = -1;
  char *start_config = NULL;
  signal(SIGPIPE, SIG_IGN);
  for (int i = 1; i + 1 < argc; i += 2) {
    if (!strcmp(argv[i], "--ports")) {
      first = last = atoi(argv[i + 1]);
      if (strchr(argv[i + 1], '-')) last = atoi(strchr(argv[i + 1], '-') + 1);
    } else if (!strcmp(argv[i], "--control")) listen_on(atoi(argv[i + 1]), true);
    else if (!strcmp(argv[i], "--log")) {
      request_log = fopen(argv[i + 1], "a");
      if (!request_log) die("%s", argv[i + 1]);
      setvbuf(request_log, NULL, _IOLBF, 0);
    } else if (!strcmp(argv[i], "--config")) start_config = argv[i + 1];
    else die("unknown option %s", argv[i]);
  }
  for (int port = first; port <= last; port++) listen_on(port, false);
  const char *unknown = start_config ? configure(start_config) : NULL;
  if (unknown) errno = 0, die("unknown setting %s", unknown);
  fill_flood();
  epoll_fd = epoll_create1(EPOLL_CLOEXEC);
  Alarm alarm = alarm_new();
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = &alarm}, events[MAX_EVENTS];
  epoll_ctl(epoll_fd, EPOLL_CTL_ADD, alarm.fd, &event);
  for (size_t i = 0; i < engine_count; i++) {
    event = (struct epoll_event){.events = EPOLLIN, .data.ptr = &engines[i]};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, engines[i].fd, &event);
  }
  puts("ready");
  fflush(stdout);
  for (;;) {
    alarm_set(&alarm, timers.count ? timers.items[0].when : 0);
    int count = epoll_wait(epoll_fd, events, MAX_EVENTS, -1);
    if (count < 0 && errno != EINTR) die("epoll_wait");
    for (int i = 0; i < count; i++) {
      void *what = events[i].data.ptr;
      if (what == &alarm) alarm_drain(&alarm);
      else if ((char *)what >= (char *)engines && (char *)what < (char *)(engines + engine_count)) on_accept(what);
      else {
        Conn *conn = what;
        if (conn->fd >= 0 && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR | EPOLLRDHUP)) on_readable(conn);
        if (conn->fd >= 0 && events[i].events & EPOLLOUT) on_writable(conn);
      }
    }
    uint64_t now = now_ns();
    while (timers.count && timers.items[0].when <= now) on_timer(heap_pop(&timers));
  }
}
