/* The benchmark's upstream: a mock of vLLM's OpenAI server that costs little enough not to be what is measured.
 *
 *   upstream PORT        serves on 127.0.0.1:PORT until SIGTERM, in one thread
 *
 * POST /v1/chat/completions   a plain answer, or with "stream":true one event for each token
 * POST /v1/completions        the same, in that route's words
 * GET  /stats                 counters, as JSON
 * GET  /configure?chunks=N&delay_us=D&first_us=F   answers from now on: N content events, D µs between two of them
 *                             (absolute deadlines; 0: as fast as they are taken), F µs before the first byte of content
 * GET  /configure?arrivals=N  note the next N requests, in memory that is ready beforehand; 0 notes none, as at the start
 * GET  /arrivals              the requests noted, a line each: nanoseconds of CLOCK_REALTIME when its last byte had been
 *                             read, bytes of its body, `max_tokens` or `max_completion_tokens` in it (-1: neither), its
 *                             X-Request-Id or -
 * GET  anything else          200 and {}, but for /v1/models
 *
 * Rules of a fair mock: no two events or answers are equal (each carries the clock, in nanoseconds of CLOCK_MONOTONIC);
 * every event is its own chunk and its own write; the events of all streams take turns, as steps of an engine; usage
 * comes only when `include_usage` asks for it; an answer whose client leaves before its end counts as aborted.
 *
 * To be configured while nothing is in flight. It reads requests with a Content-Length, keep-alive and pipelined, and refuses those without one (411).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MODEL "bench-model"
#define MAX_REQUEST (64u << 20)

enum kind { NOTHING, UNARY, STREAM };

struct conn {
    int fd;
    bool closed, queued, wants_usage, wants_out, is_chat;
    enum kind answering;
    char *in, *out; /* received and not yet read; written and not yet taken by the kernel */
    size_t in_len, in_cap, out_len, out_cap;
    long step;     /* the next event: 0 is the role, 1..chunks are content */
    uint64_t id;   /* of the answer */
    uint64_t due;  /* when the next write is due, ns */
    struct conn *next;
};

static struct {
    uint64_t requests, streams, completed, aborted, events, usage_asked, body_bytes, connections;
} stats;
static long chunks = 128;
static uint64_t delay_ns, first_ns;
/* Answers that wait for their first write, and those for their next: with one delay each, both are in order. */
static struct queue {
    struct conn *head, *tail;
    size_t len;
} firsts, nexts;
static struct arrival {
    uint64_t at_ns;
    size_t body_len;
    long max_tokens;
    char id[64];
} *arrivals;
static size_t arrivals_len, arrivals_cap;
static int epoll_fd;

static uint64_t clock_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void *grown(void *p, size_t *cap, size_t need) {
    if (need <= *cap) return p;
    while (*cap < need) *cap = *cap ? *cap * 2 : 4096;
    if (!(p = realloc(p, *cap))) die("realloc");
    return p;
}

static void enqueue(struct queue *q, struct conn *c, uint64_t due) {
    c->due = due;
    c->next = NULL;
    c->queued = true;
    if (q->tail) q->tail->next = c; else q->head = c;
    q->tail = c;
    q->len++;
}

static struct conn *dequeue(struct queue *q) {
    struct conn *c = q->head;
    if (!(q->head = c->next)) q->tail = NULL;
    q->len--;
    c->queued = false;
    return c;
}

static void close_conn(struct conn *c) {
    if (c->closed) return;
    if (c->answering != NOTHING) stats.aborted++;
    c->answering = NOTHING;
    c->closed = true;
    stats.connections--;
    close(c->fd);
    if (!c->queued) enqueue(&firsts, c, 0); /* freed when its turn comes: its caller still looks at it */
}

static void watch(struct conn *c, bool wants_out) {
    if (c->wants_out == wants_out) return;
    c->wants_out = wants_out;
    struct epoll_event e = {.events = EPOLLIN | (wants_out ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e);
}

/* What the kernel does not take waits in `out`. A broken connection shows when it is read. */
static void put(struct conn *c, const char *data, size_t len) {
    ssize_t sent = 0;
    if (!c->out_len) {
        sent = send(c->fd, data, len, MSG_NOSIGNAL);
        if (sent < 0) sent = 0;
    }
    if ((size_t)sent == len) return;
    len -= (size_t)sent;
    c->out = grown(c->out, &c->out_cap, c->out_len + len);
    memcpy(c->out + c->out_len, data + sent, len);
    c->out_len += len;
    watch(c, true);
}

static void put_event(struct conn *c, const char *data, int len) {
    char frame[1024];
    int n = snprintf(frame, sizeof frame, "%x\r\n%.*s\r\n", (unsigned)len, len, data);
    put(c, frame, (size_t)n);
    stats.events++;
}

static void put_json(struct conn *c, const char *status, const char *body) {
    char answer[2048];
    int n = snprintf(answer, sizeof answer,
                     "HTTP/1.1 %s\r\ndate: Mon, 02 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
                     "content-length: %zu\r\ncontent-type: application/json\r\n\r\n%s",
                     status, strlen(body), body);
    put(c, answer, (size_t)n);
}

static void put_unary(struct conn *c) {
    char body[1024];
    if (!c->is_chat)
        snprintf(body, sizeof body,
                 "{\"id\":\"cmpl-%016llx\",\"object\":\"text_completion\",\"created\":1793577600,\"model\":\"" MODEL
                 "\",\"choices\":[{\"index\":0,\"text\":\"At %llu the answer was the same.\",\"logprobs\":null,"
                 "\"finish_reason\":\"stop\",\"stop_reason\":null}],\"usage\":{\"prompt_tokens\":128,"
                 "\"total_tokens\":152,\"completion_tokens\":24}}",
                 (unsigned long long)c->id, (unsigned long long)now_ns());
    else snprintf(body, sizeof body,
             "{\"id\":\"chatcmpl-%016llx\",\"object\":\"chat.completion\",\"created\":1793577600,\"model\":\"" MODEL
             "\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"At %llu the answer was "
             "that a gateway should cost less than what it carries, and that what it carries should arrive whole.\","
             "\"refusal\":null,\"annotations\":null,\"audio\":null,\"function_call\":null,\"tool_calls\":[],"
             "\"reasoning\":null},\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null,"
             "\"token_ids\":null}],\"service_tier\":null,\"system_fingerprint\":null,\"usage\":{\"prompt_tokens\":128,"
             "\"total_tokens\":152,\"completion_tokens\":24,\"prompt_tokens_details\":null},"
             "\"prompt_logprobs\":null,\"kv_transfer_params\":null}",
             (unsigned long long)c->id, (unsigned long long)now_ns());
    put_json(c, "200 OK", body);
    c->answering = NOTHING;
    stats.completed++;
}

/* One event; after the last content event also the end: usage where it was asked for, [DONE], the last chunk. */
static void put_step(struct conn *c) {
    char data[768];
    int n;
    const char *head = c->is_chat ? "data: {\"id\":\"chatcmpl-%016llx\",\"object\":\"chat.completion.chunk\",\"created\":"
                                    "1793577600,\"model\":\"" MODEL "\",\"choices\":["
                                  : "data: {\"id\":\"cmpl-%016llx\",\"object\":\"text_completion\",\"created\":"
                                    "1793577600,\"model\":\"" MODEL "\",\"choices\":[";
    n = snprintf(data, sizeof data, head, (unsigned long long)c->id);
    if (c->step == 0)
        n += snprintf(data + n, sizeof data - (size_t)n, "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":"
                      "\"\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n");
    else
        n += snprintf(data + n, sizeof data - (size_t)n, "{\"index\":0,%s\" %llu\"%s,\"logprobs\":null,\"finish_reason\":%s,"
                      "\"token_ids\":null}]}\n\n", c->is_chat ? "\"delta\":{\"content\":" : "\"text\":",
                      (unsigned long long)now_ns(), c->is_chat ? "}" : "",
                      c->step == chunks ? "\"stop\",\"stop_reason\":null" : "null");
    put_event(c, data, n);
    if (c->step++ < chunks) return;
    if (c->wants_usage) {
        n = snprintf(data, sizeof data, head, (unsigned long long)c->id);
        n += snprintf(data + n, sizeof data - (size_t)n, "],\"usage\":{\"prompt_tokens\":128,\"total_tokens\":%ld,"
                      "\"completion_tokens\":%ld}}\n\n", 128 + chunks, chunks);
        put_event(c, data, n);
    }
    put_event(c, "data: [DONE]\n\n", 14);
    put(c, "0\r\n\r\n", 5);
    c->answering = NOTHING;
    stats.completed++;
}

/* Whether `"key": true` stands in the JSON text. Inside a string the quotes would be escaped. */
static bool is_true(const char *json, size_t len, const char *key) {
    const char *end = json + len, *p = json;
    size_t key_len = strlen(key);
    while ((p = memmem(p, (size_t)(end - p), key, key_len))) {
        p += key_len;
        while (p < end && strchr(" \t\r\n:", *p)) p++;
        if (end - p >= 4 && !memcmp(p, "true", 4)) return true;
    }
    return false;
}

/* The integer after `"key":`; -1 when there is none. */
static long integer_of(const char *json, size_t len, const char *key) {
    const char *end = json + len, *p = memmem(json, len, key, strlen(key));
    long n = -1;
    if (!p) return -1;
    for (p += strlen(key); p < end && strchr(" \t\r\n:", *p); p++);
    for (; p < end && *p >= '0' && *p <= '9'; p++) n = (n < 0 ? 0 : n) * 10 + (*p - '0');
    return n;
}

static void note_arrival(const char *head, const char *body, size_t len) {
    struct arrival *a = &arrivals[arrivals_len++];
    a->at_ns = clock_ns(CLOCK_REALTIME);
    a->body_len = len;
    a->max_tokens = integer_of(body, len, "\"max_tokens\"");
    if (a->max_tokens < 0) a->max_tokens = integer_of(body, len, "\"max_completion_tokens\"");
    strcpy(a->id, "-");
    for (const char *p = head; (p = memmem(p, (size_t)(body - p), "\r\n", 2)) && p + 17 < body;) {
        p += 2;
        if (strncasecmp(p, "x-request-id:", 13)) continue;
        for (p += 13; *p == ' '; p++);
        for (size_t n = 0; n < sizeof a->id - 1 && *p > ' '; n++) a->id[n] = *p++; /* a head ends in CR */
    }
}

static void answer_generate(struct conn *c, const char *body, size_t len, bool is_chat) {
    stats.requests++;
    stats.body_bytes += len;
    c->id = stats.requests;
    c->is_chat = is_chat;
    if (is_true(body, len, "\"stream\"")) {
        static const char head[] = "HTTP/1.1 200 OK\r\ndate: Mon, 02 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
                                   "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
        c->answering = STREAM;
        c->step = is_chat ? 0 : 1;
        c->wants_usage = is_true(body, len, "\"include_usage\"");
        stats.streams++;
        stats.usage_asked += c->wants_usage;
        put(c, head, sizeof head - 1);
        enqueue(&firsts, c, now_ns() + first_ns);
    } else {
        c->answering = UNARY;
        if (first_ns) enqueue(&firsts, c, now_ns() + first_ns);
        else put_unary(c);
    }
}

/* Also forgets what has been noted. */
static void reserve_arrivals(size_t count) {
    arrivals_len = 0;
    arrivals_cap = count;
    if (count && !(arrivals = realloc(arrivals, count * sizeof *arrivals))) die("realloc");
    if (count) memset(arrivals, 0, count * sizeof *arrivals); /* no page is to be made while a load runs */
}

static void put_arrivals(struct conn *c) {
    char line[160], head[160], *body = NULL;
    size_t len = 0, cap = 0;
    for (const struct arrival *a = arrivals; a < arrivals + arrivals_len; a++) {
        int n = snprintf(line, sizeof line, "%llu %zu %ld %s\n", (unsigned long long)a->at_ns, a->body_len, a->max_tokens,
                         a->id);
        body = grown(body, &cap, len + (size_t)n);
        memcpy(body + len, line, (size_t)n);
        len += (size_t)n;
    }
    int n = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: %zu\r\n\r\n", len);
    put(c, head, (size_t)n);
    put(c, body, len);
    free(body);
}

static void answer_get(struct conn *c, const char *path) {
    char body[512];
    if (!strncmp(path, "/configure?", 11)) {
        const char *value;
        if ((value = strstr(path, "chunks="))) chunks = atol(value + 7) > 0 ? atol(value + 7) : 1;
        if ((value = strstr(path, "delay_us="))) delay_ns = strtoull(value + 9, NULL, 10) * 1000;
        if ((value = strstr(path, "first_us="))) first_ns = strtoull(value + 9, NULL, 10) * 1000;
        if ((value = strstr(path, "arrivals="))) reserve_arrivals(strtoull(value + 9, NULL, 10));
        put_json(c, "200 OK", "{}");
    } else if (!strcmp(path, "/arrivals")) {
        put_arrivals(c);
    } else if (!strcmp(path, "/stats")) {
        snprintf(body, sizeof body,
                 "{\"requests\":%llu,\"streams\":%llu,\"completed\":%llu,\"aborted\":%llu,\"in_flight\":%llu,"
                 "\"events\":%llu,\"usage_asked\":%llu,\"body_bytes\":%llu,\"connections\":%llu}",
                 (unsigned long long)stats.requests, (unsigned long long)stats.streams,
                 (unsigned long long)stats.completed, (unsigned long long)stats.aborted,
                 (unsigned long long)(stats.requests - stats.completed - stats.aborted),
                 (unsigned long long)stats.events, (unsigned long long)stats.usage_asked,
                 (unsigned long long)stats.body_bytes, (unsigned long long)stats.connections);
        put_json(c, "200 OK", body);
    } else if (!strcmp(path, "/v1/models")) {
        put_json(c, "200 OK", "{\"object\":\"list\",\"data\":[{\"id\":\"" MODEL "\",\"object\":\"model\",\"created\":"
                 "1793577600,\"owned_by\":\"vllm\",\"root\":\"" MODEL "\",\"parent\":null,\"max_model_len\":131072}]}");
    } else {
        put_json(c, "200 OK", "{}");
    }
}

/* The Content-Length of a request head; -1 when it has none, -2 when it is no number or too large. */
static long content_length(const char *head, const char *end) {
    for (const char *p = head; (p = memmem(p, (size_t)(end - p), "\r\n", 2)) && p + 17 < end;) {
        p += 2;
        if (strncasecmp(p, "content-length:", 15)) continue;
        char *rest;
        unsigned long n = strtoul(p + 15, &rest, 10);
        return *rest == '\r' && n <= MAX_REQUEST ? (long)n : -2;
    }
    return -1;
}

/* Answer the requests that have arrived whole, one at a time. */
static void answer(struct conn *c) {
    while (c->answering == NOTHING && !c->closed && c->in_len) {
        char *head_end = memmem(c->in, c->in_len, "\r\n\r\n", 4);
        if (!head_end) {
            if (c->in_len > 65536) close_conn(c);
            return;
        }
        head_end += 4;
        bool is_post = !strncmp(c->in, "POST ", 5);
        bool is_get = !strncmp(c->in, "GET ", 4);
        long len = content_length(c->in, head_end);
        if (len == -2 || (!is_post && !is_get)) {
            put_json(c, "400 Bad Request", "{\"error\":{\"message\":\"not a request that the mock reads\"}}");
            close_conn(c);
            return;
        }
        if (is_post && len == -1) {
            put_json(c, "411 Length Required", "{\"error\":{\"message\":\"the mock needs a Content-Length\"}}");
            close_conn(c);
            return;
        }
        size_t whole = (size_t)(head_end - c->in) + (size_t)(len > 0 ? len : 0);
        if (c->in_len < whole) {
            c->in = grown(c->in, &c->in_cap, whole);
            return;
        }
        char path[256];
        const char *target = c->in + (is_get ? 4 : 5), *target_end = memchr(target, ' ', (size_t)(head_end - target));
        size_t target_len = target_end ? (size_t)(target_end - target) : 0;
        if (target_len >= sizeof path) target_len = sizeof path - 1;
        memcpy(path, target, target_len);
        path[target_len] = 0;
        if (is_get) answer_get(c, path);
        else if (!strcmp(path, "/v1/chat/completions") || !strcmp(path, "/v1/completions")) {
            if (arrivals_len < arrivals_cap) note_arrival(c->in, head_end, (size_t)len);
            answer_generate(c, head_end, (size_t)len, path[4] == 'c' && path[5] == 'h');
        } else put_json(c, "404 Not Found", "{\"error\":{\"message\":\"Not Found\"}}");
        c->in_len -= whole;
        memmove(c->in, c->in + whole, c->in_len);
    }
}

static void readable(struct conn *c) {
    for (;;) {
        c->in = grown(c->in, &c->in_cap, c->in_len + 4096);
        size_t room = c->in_cap - c->in_len;
        ssize_t n = recv(c->fd, c->in + c->in_len, room, 0);
        if (n <= 0) {
            if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
                close_conn(c);
                return;
            }
            break;
        }
        c->in_len += (size_t)n;
        if ((size_t)n < room) break;
    }
    answer(c);
}

static void writable(struct conn *c) {
    ssize_t sent = send(c->fd, c->out, c->out_len, MSG_NOSIGNAL);
    if (sent <= 0) return;
    c->out_len -= (size_t)sent;
    memmove(c->out, c->out + sent, c->out_len);
    if (c->out_len) return;
    watch(c, false);
    if (c->answering == STREAM && !c->queued) enqueue(&nexts, c, now_ns());
    else answer(c);
}

/* The writes that are due, at most one for each answer: then the sockets have their turn. */
static void run_queue(struct queue *q) {
    uint64_t now = now_ns();
    for (size_t n = q->len; n && q->head->due <= now; n--) {
        struct conn *c = dequeue(q);
        if (c->closed) {
            free(c->in);
            free(c->out);
            free(c);
        } else if (c->answering == UNARY) {
            put_unary(c);
            answer(c);
        } else if (c->answering == STREAM && !c->out_len) {
            put_step(c);
            if (c->answering == STREAM) enqueue(&nexts, c, delay_ns ? c->due + delay_ns : now_ns());
            else answer(c);
        } /* else `writable` puts it back */
    }
}

static uint64_t wait_ns(const struct queue *q, uint64_t now) {
    return !q->head ? UINT64_MAX : q->head->due > now ? q->head->due - now : 0;
}

static void accept_all(int listener) {
    int fd, yes = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        struct conn *c = calloc(1, sizeof *c);
        if (!c) die("calloc");
        c->fd = fd;
        stats.connections++;
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
        if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e)) die("epoll_ctl");
    }
}

int main(int argc, char **argv) {
    if (argc != 2 || atoi(argv[1]) <= 0) {
        fprintf(stderr, "usage: upstream PORT\n");
        return 2;
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    prctl(PR_SET_TIMERSLACK, 1);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), yes = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1])),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) die("listen");
    if ((epoll_fd = epoll_create1(EPOLL_CLOEXEC)) < 0) die("epoll_create1");
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &e);
    for (;;) {
        struct epoll_event events[256];
        struct timespec wait = {0}, *timeout = NULL;
        if (firsts.head || nexts.head) {
            uint64_t now = now_ns(), first = wait_ns(&firsts, now), next = wait_ns(&nexts, now);
            uint64_t left = first < next ? first : next;
            wait.tv_sec = (time_t)(left / 1000000000u);
            wait.tv_nsec = (long)(left % 1000000000u);
            timeout = &wait;
        }
        int n = epoll_pwait2(epoll_fd, events, 256, timeout, NULL);
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            if (!c) {
                accept_all(listener);
                continue;
            }
            if (events[i].events & EPOLLOUT && c->out_len) writable(c);
            if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR) && !c->closed) readable(c);
        }
        run_queue(&firsts);
        run_queue(&nexts);
    }
}
