/* A load generator for OpenAI servers: one thread, epoll, HTTP/1.1 keep-alive. Prints its figures as JSON (ms).
 *
 *   loadgen --port N --requests FILE [--mode closed|open|trace] [--connections N] [--duration S] [--rate R] ...
 *
 * closed: each connection sends its next request when it has its answer. open: requests arrive at --rate (Poisson)
 * whether or not earlier ones are answered, and latency counts from the arrival. trace: each request arrives at its
 * own time; a session's later turns wait for the turn before, and then for their own think time.
 *
 * FILE is a sequence of records: 32 bytes (u64 time in us, u32 session, u32 turn, u64 body length, u64 unused, little
 * endian), then the body. closed and open go round it.
 *
 * A stream's chunks carry "t=<20 digits>", the monotonic time they were sent at (nanoseconds): chunk delay is arrival
 * less that. With --verify each request's mark "@i=<16 hex>k=<6 digits>@" gets a fresh id, and an answer must be whole:
 * its id ours, its chunks 0..k-1 in order, each once, [DONE] at the end. --ledger writes a line for every request.
 */
#include "bench.h"
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>

#define MAX_EVENTS 512
#define IN_SIZE 65536
#define EVENT_SIZE 8192
#define NOTE_SIZE 160

typedef struct {
  uint64_t at_us;
  uint32_t session, turn;
  uint64_t length, unused;
} Record;

typedef struct Request {
  const Record *record;
  const char *body;
  char *head;
  size_t head_length;
  struct Request *turn_after; /* the same session's next turn */
} Request;

enum { OUT_OK, OUT_HTTP_ERROR, OUT_STREAM_ERROR, OUT_TRUNCATED, OUT_NO_ANSWER, OUT_REFUSED, OUT_TIMEOUT, OUT_WRONG, OUT_KINDS };
static const char *const outcome_names[] = {"ok", "http_error", "stream_error", "truncated", "no_answer", "refused", "timeout",
                                            "wrong"};

typedef struct Job { /* one request on its way */
  Request *request;
  uint64_t due_ns, id;
  struct Job *next;
} Job;

typedef struct Conn {
  int fd;
  uint32_t events, generation;
  Job *job;
  char *body;
  size_t sent, used_before;
  uint64_t start_ns, first_byte_ns, first_chunk_ns, last_chunk_ns;
  enum { IDLE, CONNECTING, SENDING, HEAD, SIZED, CHUNKED, UNTIL_CLOSE } state;
  bool resent, close_after, sse, saw_done, saw_error;
  int status;
  uint64_t body_left;
  Dechunk dechunk;
  char *in;
  size_t in_length;
  char *event;
  size_t event_length;
  unsigned chunks, expected;
  bool disordered, foreign;
  char replica[64], note[NOTE_SIZE];
  size_t note_length;
  struct Conn *next_idle;
} Conn;

static struct {
  int port;
  const char *mode, *path, *requests, *ledger;
  unsigned connections, headers;
  double duration, warmup, rate, timeout, ramp, drain;
  bool verify;
  char header[4096];
} options = {.mode = "closed", .path = "/v1/chat/completions", .connections = 1, .duration = 3, .timeout = 60, .drain = 30};

static int epoll_fd;
static Heap timers;
static Conn *conns, *idle;
static unsigned open_conns;
static Request *requests;
static size_t request_count, next_request;
static Job *queue_first, *queue_last, *free_jobs;
static FILE *ledger;
static uint64_t begin_ns, warm_ns, end_ns, next_id, arrivals, finished, in_flight, answer_bytes, chunk_total, reconnects;
static uint64_t outcomes[OUT_KINDS], statuses[600];
static Hist latency, ttft, chunk_delay, chunk_gap;
static bool closed_loop, stopping;
static uint64_t random_state = 88172645463325252u;

enum { TIMER_ARRIVAL, TIMER_CONN_START, TIMER_SWEEP, TIMER_TURN };

static double random_unit(void) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (double)(random_state >> 11) / 9007199254740992.0;
}

static void watch(Conn *conn, uint32_t events) {
  if (conn->events == events) return;
  struct epoll_event event = {.events = events, .data.ptr = conn};
  epoll_ctl(epoll_fd, conn->events ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, conn->fd, &event);
  conn->events = events;
}

static void hang_up(Conn *conn) {
  if (conn->fd >= 0) close(conn->fd), open_conns--;
  conn->fd = -1;
  conn->events = 0;
  conn->used_before = 0;
}

static void on_sendable(Conn *conn);
static void over(Conn *conn, int outcome);

static void start_sending(Conn *conn) {
  conn->sent = 0;
  conn->in_length = conn->event_length = 0;
  conn->status = 0;
  conn->chunks = conn->expected = 0;
  conn->sse = conn->saw_done = conn->saw_error = conn->close_after = conn->disordered = conn->foreign = false;
  conn->first_byte_ns = conn->first_chunk_ns = conn->last_chunk_ns = 0;
  conn->replica[0] = conn->note[0] = 0;
  conn->note_length = 0;
  if (conn->fd < 0) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)options.port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    conn->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (conn->fd < 0) die("socket");
    open_conns++;
    set_nodelay(conn->fd);
    if (connect(conn->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) {
      over(conn, OUT_REFUSED);
      return;
    }
    conn->state = CONNECTING;
    watch(conn, EPOLLOUT);
    return;
  }
  conn->state = SENDING;
  on_sendable(conn);
}

static void assign(Conn *conn, Job *job) {
  conn->job = job;
  conn->resent = false;
  conn->generation++;
  conn->start_ns = now_ns();
  in_flight++;
  conn->body = (char *)(uintptr_t)job->request->body;
  if (options.verify) { /* its own copy, with its own id */
    size_t length = job->request->record->length;
    conn->body = grow(NULL, length);
    memcpy(conn->body, job->request->body, length);
    char *mark = memmem(conn->body, length, "@i=", 3), id[20];
    if (!mark) errno = 0, die("a request without a mark can't be verified");
    snprintf(id, sizeof id, "%016" PRIx64, job->id);
    memcpy(mark + 3, id, 16);
  }
  start_sending(conn);
}

static Job *new_job(Request *request, uint64_t due_ns) {
  Job *job = free_jobs;
  if (job) free_jobs = job->next;
  else job = zeroed(sizeof *job);
  *job = (Job){.request = request, .due_ns = due_ns, .id = ++next_id};
  arrivals++;
  return job;
}

static void submit(Request *request, uint64_t due_ns) {
  Job *job = new_job(request, due_ns);
  if (idle) {
    Conn *conn = idle;
    idle = conn->next_idle;
    assign(conn, job);
    return;
  }
  if (queue_last) queue_last->next = job;
  else queue_first = job;
  queue_last = job;
}

static Request *round_robin(void) { return &requests[next_request++ % request_count]; }

static void next_job(Conn *conn) {
  conn->state = IDLE;
  if (closed_loop) {
    if (!stopping) assign(conn, new_job(round_robin(), now_ns()));
    return;
  }
  if (queue_first) {
    Job *job = queue_first;
    queue_first = job->next;
    if (!queue_first) queue_last = NULL;
    job->next = NULL;
    assign(conn, job);
    return;
  }
  conn->next_idle = idle;
  idle = conn;
}

static void over(Conn *conn, int outcome) {
  Job *job = conn->job;
  uint64_t now = now_ns();
  if (outcome == OUT_OK && options.verify) {
    const char *mark = memmem(conn->body, job->request->record->length, "@i=", 3);
    unsigned wanted = (unsigned)strtoul(mark + 21, NULL, 10);
    if (conn->foreign || conn->disordered || (conn->sse ? conn->chunks != wanted : conn->chunks != 1)) outcome = OUT_WRONG;
  }
  outcomes[outcome]++;
  if (conn->status > 0 && conn->status < 600) statuses[conn->status]++;
  finished++;
  in_flight--;
  if (outcome == OUT_OK && now >= warm_ns) {
    hist_add(&latency, now - job->due_ns);
    if (conn->first_chunk_ns) hist_add(&ttft, conn->first_chunk_ns - job->due_ns);
  }
  if (ledger)
    fprintf(ledger, "%016" PRIx64 "\t%" PRIu64 "\t%" PRIu64 "\t%s\t%d\t%u\t%s\t%d\t%s\n", job->id, conn->start_ns / NS_PER_US,
            now / NS_PER_US, outcome_names[outcome], conn->status, conn->chunks, conn->replica[0] ? conn->replica : "-",
            conn->resent, conn->note);
  if (options.verify) free(conn->body);
  conn->body = NULL;
  conn->job = NULL;
  conn->generation++;
  conn->used_before++;
  bool whole = conn->sent == job->request->head_length + job->request->record->length;
  if ((outcome != OUT_OK && outcome != OUT_HTTP_ERROR) || conn->close_after || !whole) hang_up(conn);
  Request *after = job->request->turn_after;
  if (!closed_loop && !strcmp(options.mode, "trace") && after)
    heap_push(&timers, (Timer){now + after->record->at_us * NS_PER_US, after, 0, TIMER_TURN});
  job->next = free_jobs;
  free_jobs = job;
  conn->state = IDLE;
  if (closed_loop && outcome == OUT_REFUSED) /* no busy loop against a closed port */
    heap_push(&timers, (Timer){now + 10 * NS_PER_MS, conn, conn->generation, TIMER_CONN_START});
  else next_job(conn);
}

static void on_sendable(Conn *conn) {
  const Request *request = conn->job->request;
  size_t total = request->head_length + request->record->length;
  while (conn->sent < total) {
    struct iovec parts[2];
    int count = 0;
    if (conn->sent < request->head_length)
      parts[count++] = (struct iovec){request->head + conn->sent, request->head_length - conn->sent};
    size_t offset = conn->sent > request->head_length ? conn->sent - request->head_length : 0;
    parts[count++] = (struct iovec){conn->body + offset, request->record->length - offset};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)count};
    ssize_t sent = sendmsg(conn->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno == EAGAIN) {
      watch(conn, EPOLLIN | EPOLLOUT);
      return;
    }
    if (sent < 0) break; /* the answer, or the close, is found on reading */
    conn->sent += (size_t)sent;
  }
  conn->state = HEAD;
  watch(conn, EPOLLIN);
}

/* --- Answers ----------------------------------------------------------------------------------------------------- */

static void on_text(Conn *conn, const char *text, size_t length) { /* an event, or a whole JSON answer */
  const char *end = text + length, *stamp = memmem(text, length, "t=0", 3);
  uint64_t now = now_ns();
  if (!stamp || end - stamp < 50) {
    const char *error = memmem(text, length < 64 ? length : 64, "\"error\"", 7);
    if (error) {
      conn->saw_error = true;
      conn->note_length = length < NOTE_SIZE - 1 ? length : NOTE_SIZE - 1;
      memcpy(conn->note, text, conn->note_length);
      conn->note[conn->note_length] = 0;
      for (char *c = conn->note; *c; c++)
        if (*c == '\n' || *c == '\t' || *c == '\r') *c = ' ';
    }
    return;
  }
  uint64_t sent = strtoull(stamp + 2, NULL, 10);
  if (!conn->first_chunk_ns) conn->first_chunk_ns = now;
  else if (now >= warm_ns) hist_add(&chunk_gap, now - conn->last_chunk_ns);
  conn->last_chunk_ns = now;
  if (conn->sse) {
    chunk_total++;
    if (now >= warm_ns && sent <= now) hist_add(&chunk_delay, now - sent);
  }
  if (options.verify) {
    if (strtoul(stamp + 25, NULL, 10) != conn->expected++) conn->disordered = true;
    if (strtoull(stamp + 34, NULL, 16) != conn->job->id) conn->foreign = true;
  }
  conn->chunks++;
}

static void on_body(Conn *conn, const char *data, size_t length) {
  answer_bytes += length;
  if (!conn->sse) {
    size_t room = EVENT_SIZE - conn->event_length, take = length < room ? length : room;
    memcpy(conn->event + conn->event_length, data, take);
    conn->event_length += take;
    return;
  }
  while (length) { /* events end with an empty line; whole ones are read where they lie */
    if (!conn->event_length) {
      const char *stop = memmem(data, length, "\n\n", 2);
      if (stop) {
        size_t size = (size_t)(stop - data) + 2;
        if (size >= 14 && !memcmp(data, "data: [DONE]", 12)) conn->saw_done = true;
        else on_text(conn, data, size);
        data += size;
        length -= size;
        continue;
      }
    }
    size_t i = 0;
    bool whole = false;
    for (; i < length && !whole; i++) {
      if (conn->event_length < EVENT_SIZE) conn->event[conn->event_length++] = data[i];
      whole = data[i] == '\n' && conn->event_length > 1 && conn->event[conn->event_length - 2] == '\n';
    }
    if (whole) {
      if (conn->event_length >= 14 && !memcmp(conn->event, "data: [DONE]", 12)) conn->saw_done = true;
      else on_text(conn, conn->event, conn->event_length);
      conn->event_length = 0;
    }
    data += i;
    length -= i;
  }
}

static void answer_whole(Conn *conn) {
  if (!conn->sse && conn->event_length) on_text(conn, conn->event, conn->event_length);
  if (conn->status != 200) over(conn, conn->saw_error || !options.verify ? OUT_HTTP_ERROR : OUT_WRONG);
  else if (conn->saw_error) over(conn, OUT_STREAM_ERROR);
  else if (conn->sse && !conn->saw_done) over(conn, OUT_TRUNCATED);
  else over(conn, OUT_OK);
}

static bool read_head(Conn *conn) { /* false: incomplete, or the connection is over */
  char *end = memmem(conn->in, conn->in_length, "\r\n\r\n", 4);
  if (!end) return false;
  size_t head = (size_t)(end - conn->in) + 4, size;
  conn->status = head > 12 ? atoi(conn->in + 9) : 0;
  const char *value = header_find(conn->in, head, "content-type:", &size);
  conn->sse = value && size >= 17 && !strncasecmp(value, "text/event-stream", 17);
  value = header_find(conn->in, head, "connection:", &size);
  conn->close_after = value && size == 5 && !strncasecmp(value, "close", 5);
  value = header_find(conn->in, head, "x-modelfleet-replica:", &size);
  if (value && size < sizeof conn->replica) memcpy(conn->replica, value, size), conn->replica[size] = 0;
  if (header_find(conn->in, head, "transfer-encoding:", &size)) {
    conn->state = CHUNKED;
    conn->dechunk = (Dechunk){0};
  } else if ((value = header_find(conn->in, head, "content-length:", &size))) {
    conn->state = SIZED;
    conn->body_left = strtoull(value, NULL, 10);
  } else conn->state = UNTIL_CLOSE, conn->close_after = true;
  conn->in_length -= head;
  memmove(conn->in, conn->in + head, conn->in_length);
  return true;
}

static void consume(Conn *conn) {
  if (conn->state == HEAD || conn->state == SENDING) {
    if (!read_head(conn)) {
      if (conn->in_length == IN_SIZE) over(conn, OUT_WRONG);
      return;
    }
  }
  size_t offset = 0, size = 0;
  const char *data = NULL;
  Job *job = conn->job;
  if (conn->state == CHUNKED) {
    while (offset < conn->in_length && conn->dechunk.state != CHUNK_DONE && conn->dechunk.state != CHUNK_BAD) {
      offset += dechunk(&conn->dechunk, conn->in + offset, conn->in_length - offset, &data, &size);
      if (size) on_body(conn, data, size);
    }
    bool surplus = offset < conn->in_length;
    conn->in_length = 0;
    if (conn->dechunk.state == CHUNK_BAD || surplus) over(conn, OUT_WRONG);
    else if (conn->dechunk.state == CHUNK_DONE) answer_whole(conn);
    return;
  }
  size = conn->in_length;
  if (conn->state == SIZED && size > conn->body_left) { /* more than was announced */
    over(conn, OUT_WRONG);
    return;
  }
  on_body(conn, conn->in, size);
  conn->in_length = 0;
  if (conn->state == SIZED && conn->job == job && !(conn->body_left -= size)) answer_whole(conn);
}

static void on_closed(Conn *conn) {
  if (conn->state == UNTIL_CLOSE) {
    hang_up(conn);
    answer_whole(conn);
  } else if (conn->state == SIZED || conn->state == CHUNKED)
    over(conn, conn->sse && conn->saw_error ? OUT_STREAM_ERROR : OUT_TRUNCATED); /* it said why before it broke off */
  else if (conn->used_before && !conn->resent && !conn->in_length) {
    /* RFC 9112 9.3.1: the server closed an idle connection while this request was on its way; once more, on a new one */
    conn->resent = true;
    reconnects++;
    hang_up(conn);
    start_sending(conn);
  } else over(conn, OUT_NO_ANSWER);
}

static void on_readable(Conn *conn) {
  uint32_t generation = conn->generation;
  for (;;) {
    size_t room = IN_SIZE - conn->in_length;
    ssize_t got = recv(conn->fd, conn->in + conn->in_length, room, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
      on_closed(conn);
      return;
    }
    if (!conn->first_byte_ns) conn->first_byte_ns = now_ns();
    conn->in_length += (size_t)got;
    consume(conn);
    if (conn->generation != generation || (size_t)got < room) return;
  }
}

static void on_event(Conn *conn, uint32_t events) {
  if (conn->state == IDLE) { /* the server closed a connection at rest */
    char byte;
    if (recv(conn->fd, &byte, 1, MSG_DONTWAIT) <= 0 && errno != EAGAIN) hang_up(conn);
    return;
  }
  if (conn->state == CONNECTING) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(conn->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
      over(conn, OUT_REFUSED);
      return;
    }
    conn->state = SENDING;
    on_sendable(conn);
    return;
  }
  uint32_t generation = conn->generation;
  if (conn->state == SENDING && events & EPOLLOUT) on_sendable(conn);
  if (conn->generation == generation && conn->fd >= 0 && events & (EPOLLIN | EPOLLHUP | EPOLLERR)) on_readable(conn);
}

/* --- Arrivals ------------------------------------------------------------------------------------------------------ */

static void sweep(uint64_t now) {
  uint64_t limit = (uint64_t)(options.timeout * 1e9);
  for (unsigned i = 0; i < options.connections; i++)
    if (conns[i].job && now - conns[i].start_ns > limit) over(&conns[i], OUT_TIMEOUT);
}

static void on_timer(Timer timer) {
  switch (timer.kind) {
  case TIMER_ARRIVAL:
    if (stopping) return;
    submit(round_robin(), timer.when);
    timer.when += (uint64_t)(-__builtin_log(1 - random_unit()) / options.rate * 1e9);
    heap_push(&timers, timer);
    break;
  case TIMER_TURN:
    if (!stopping) submit(timer.what, timer.when);
    break;
  case TIMER_CONN_START:
    if (((Conn *)timer.what)->generation == timer.generation) next_job(timer.what);
    break;
  default:
    sweep(now_ns());
    timer.when = now_ns() + 100 * NS_PER_MS;
    heap_push(&timers, timer);
  }
}

static void load_requests(void) {
  int fd = open(options.requests, O_RDONLY | O_CLOEXEC);
  struct stat info;
  if (fd < 0 || fstat(fd, &info)) die("%s", options.requests);
  const char *data = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0), *end = data + info.st_size;
  if (data == MAP_FAILED) die("%s", options.requests);
  for (const char *at = data; at < end; request_count++) {
    requests = grow(requests, (request_count + 1) * sizeof *requests);
    const Record *record = (const Record *)(const void *)at;
    char head[8192];
    int length = snprintf(head, sizeof head, "POST %s HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json\r\n%s"
                          "content-length: %" PRIu64 "\r\n\r\n", options.path, options.port, options.header, record->length);
    requests[request_count] = (Request){record, at + sizeof *record, strdup(head), (size_t)length, NULL};
    at += sizeof *record + record->length;
    at += -(uintptr_t)at & 7u; /* records are aligned to 8 bytes */
  }
  for (size_t i = 0; i + 1 < request_count; i++) /* a session's turns stand one after another */
    if (requests[i + 1].record->turn && requests[i + 1].record->session == requests[i].record->session)
      requests[i].turn_after = &requests[i + 1];
}

static void start_arrivals(void) {
  heap_push(&timers, (Timer){begin_ns + 100 * NS_PER_MS, NULL, 0, TIMER_SWEEP});
  for (unsigned i = options.connections; i--;) {
    Conn *conn = &conns[i];
    *conn = (Conn){.fd = -1, .in = grow(NULL, IN_SIZE), .event = grow(NULL, EVENT_SIZE + 1)};
    if (closed_loop)
      heap_push(&timers, (Timer){begin_ns + (uint64_t)(options.ramp * 1e9 * i / options.connections), conn, 0, TIMER_CONN_START});
    else conn->next_idle = idle, idle = conn;
  }
  if (!strcmp(options.mode, "open")) heap_push(&timers, (Timer){begin_ns, NULL, 0, TIMER_ARRIVAL});
  if (!strcmp(options.mode, "trace"))
    for (size_t i = 0; i < request_count; i++)
      if (!requests[i].record->turn)
        heap_push(&timers, (Timer){begin_ns + requests[i].record->at_us * NS_PER_US, &requests[i], 0, TIMER_TURN});
}

static void report(double seconds) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  printf("{\"seconds\": %.6f, \"arrivals\": %" PRIu64 ", \"finished\": %" PRIu64 ", \"unfinished\": %" PRIu64 ", ", seconds, arrivals,
         finished, arrivals - finished);
  for (int i = 0; i < OUT_KINDS; i++) printf("\"%s\": %" PRIu64 ", ", outcome_names[i], outcomes[i]);
  printf("\"statuses\": {");
  bool first = true;
  for (int i = 0; i < 600; i++)
    if (statuses[i]) printf("%s\"%d\": %" PRIu64, first ? "" : ", ", i, statuses[i]), first = false;
  printf("}, \"reconnects\": %" PRIu64 ", \"chunks\": %" PRIu64 ", \"bytes\": %" PRIu64 ", \"cpu_seconds\": %.3f, ", reconnects,
         chunk_total, answer_bytes,
         (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) + (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6);
  hist_print(stdout, "latency_ms", &latency);
  printf(", ");
  hist_print(stdout, "ttft_ms", &ttft);
  printf(", ");
  hist_print(stdout, "chunk_delay_ms", &chunk_delay);
  printf(", ");
  hist_print(stdout, "chunk_gap_ms", &chunk_gap);
  puts("}");
}

static void read_options(int argc, char **argv) {
  for (int i = 1; i + 1 < argc; i += 2) {
    const char *name = argv[i], *value = argv[i + 1];
    if (!strcmp(name, "--port")) options.port = atoi(value);
    else if (!strcmp(name, "--mode")) options.mode = value;
    else if (!strcmp(name, "--path")) options.path = value;
    else if (!strcmp(name, "--requests")) options.requests = value;
    else if (!strcmp(name, "--ledger")) options.ledger = value;
    else if (!strcmp(name, "--connections")) options.connections = (unsigned)atoi(value);
    else if (!strcmp(name, "--duration")) options.duration = atof(value);
    else if (!strcmp(name, "--warmup")) options.warmup = atof(value);
    else if (!strcmp(name, "--rate")) options.rate = atof(value);
    else if (!strcmp(name, "--timeout")) options.timeout = atof(value);
    else if (!strcmp(name, "--ramp")) options.ramp = atof(value);
    else if (!strcmp(name, "--drain")) options.drain = atof(value);
    else if (!strcmp(name, "--verify")) options.verify = atoi(value);
    else if (!strcmp(name, "--first-id")) next_id = strtoull(value, NULL, 10);
    else if (!strcmp(name, "--header")) {
      size_t used = strlen(options.header);
      snprintf(options.header + used, sizeof options.header - used, "%s\r\n", value);
    } else errno = 0, die("unknown option %s", name);
  }
  if (!options.port || !options.requests) errno = 0, die("--port and --requests are needed");
  closed_loop = !strcmp(options.mode, "closed");
}

int main(int argc, char **argv) {
  signal(SIGPIPE, SIG_IGN);
  read_options(argc, argv);
  load_requests();
  if (options.ledger && !(ledger = fopen(options.ledger, "w"))) die("%s", options.ledger);
  conns = zeroed(options.connections * sizeof *conns);
  epoll_fd = epoll_create1(EPOLL_CLOEXEC);
  Alarm alarm = alarm_new();
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = &alarm}, events[MAX_EVENTS];
  epoll_ctl(epoll_fd, EPOLL_CTL_ADD, alarm.fd, &event);
  begin_ns = now_ns();
  warm_ns = begin_ns + (uint64_t)(options.warmup * 1e9);
  end_ns = begin_ns + (uint64_t)(options.duration * 1e9);
  start_arrivals();
  uint64_t stopped_ns = 0;
  for (;;) {
    alarm_set(&alarm, timers.count ? timers.items[0].when : 0);
    int count = epoll_wait(epoll_fd, events, MAX_EVENTS, 100);
    if (count < 0 && errno != EINTR) die("epoll_wait");
    for (int i = 0; i < count; i++) {
      if (events[i].data.ptr == &alarm) alarm_drain(&alarm);
      else if (((Conn *)events[i].data.ptr)->fd >= 0) on_event(events[i].data.ptr, events[i].events);
    }
    uint64_t now = now_ns();
    while (timers.count && timers.items[0].when <= now) on_timer(heap_pop(&timers));
    bool all_done = !strcmp(options.mode, "trace") && finished == request_count;
    if ((now >= end_ns || all_done) && !stopping) stopping = true, stopped_ns = now;
    if (!stopping) continue;
    /* Closed loops end at once, so that the rate is over whole seconds of work; others wait for what is on its way. */
    if (closed_loop && !options.verify) break;
    if ((!in_flight && !queue_first) || now - stopped_ns > (uint64_t)(options.drain * 1e9)) break;
  }
  double seconds = (double)((closed_loop && !options.verify ? now_ns() : stopped_ns) - begin_ns) / 1e9;
  if (ledger && fclose(ledger)) die("%s", options.ledger);
  report(seconds);
  return 0;
}
