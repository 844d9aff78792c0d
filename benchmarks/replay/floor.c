/* The least that a replay can be late here: a C program that has every byte ready and nothing to do but send it.

   floor PORT TRACE SUMMARY

   TRACE is Mooncake's JSONL, of which the timestamps (ms) are read. Requests go to 127.0.0.1:PORT on connections that are
   open beforehand, as X-Request-Id floor-ROW. SUMMARY gets the schedule's zero, {"started_at": epoch seconds}, first. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum { CONNECTIONS = 512, LONGEST = 1 << 16, SPIN_NS = 250000, LEAD_NS = 500000000 };

static int idle[CONNECTIONS], idles, events;
static char bytes[LONGEST];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static long long now_ns(clockid_t clock)
{
    struct timespec at;
    clock_gettime(clock, &at);
    return at.tv_sec * 1000000000LL + at.tv_nsec;
}

static void open_connection(int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int one = 1, connection = socket(AF_INET, SOCK_STREAM, 0);
    if (connection < 0 || connect(connection, (struct sockaddr *)&address, sizeof address))
        fail("connect");
    setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = connection};
    if (epoll_ctl(events, EPOLL_CTL_ADD, connection, &event))
        fail("epoll_ctl");
    idle[idles++] = connection;
}

/* Read what has come within wait_ns; a connection whose answer is over is idle again. Returns how many are. */
static int read_answers(long long wait_ns)
{
    struct epoll_event found[64];
    struct timespec wait = {wait_ns / 1000000000, wait_ns % 1000000000};
    int over = 0, count = epoll_pwait2(events, found, 64, &wait, NULL);
    for (int i = 0; i < count; i++) {
        ssize_t size = read(found[i].data.fd, bytes, LONGEST);
        if (size <= 0)
            fail("read");
        if (size >= 5 && !memcmp(bytes + size - 5, "0\r\n\r\n", 5)) {
            idle[idles++] = found[i].data.fd;
            over++;
        }
    }
    return over;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return fprintf(stderr, "floor PORT TRACE SUMMARY\n"), 2;
    FILE *trace = fopen(argv[2], "r");
    if (!trace)
        fail(argv[2]);
    long long *due_ns = NULL;
    int rows = 0, room = 0;
    char *line = NULL;
    size_t line_room = 0;
    while (getline(&line, &line_room, trace) > 0) {
        char *stamp = strstr(line, "\"timestamp\":");
        if (!stamp)
            return fprintf(stderr, "%s: line %d: expected a timestamp\n", argv[2], rows + 1), 1;
        if (rows == room && !(due_ns = realloc(due_ns, sizeof *due_ns * (room = room * 2 + 1024))))
            fail("realloc");
        due_ns[rows++] = strtoll(stamp + 12, NULL, 10) * 1000000;
    }
    if ((events = epoll_create1(0)) < 0)
        fail("epoll_create1");
    while (idles < CONNECTIONS)
        open_connection(atoi(argv[1]));
    static char body[300];
    memset(body, 'a', sizeof body - 1);
    sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 1}); /* as burstgate, where it may */
    long long zero_ns = now_ns(CLOCK_MONOTONIC) + LEAD_NS;
    FILE *summary = fopen(argv[3], "w");
    if (!summary)
        fail(argv[3]);
    fprintf(summary, "{\"started_at\": %.9f}\n", (now_ns(CLOCK_REALTIME) + LEAD_NS) / 1e9);
    fclose(summary);
    int over = 0;
    for (int row = 0; row < rows; row++) {
        char request[1024];
        int content = snprintf(bytes, LONGEST,
            "{\"model\":\"bench-model\",\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"%s\"}]}", body);
        int size = snprintf(request, sizeof request,
            "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            "x-request-id: floor-%d\r\ncontent-length: %d\r\n\r\n%s", row, content, bytes);
        for (long long left; (left = zero_ns + due_ns[row] - now_ns(CLOCK_MONOTONIC)) > 0;)
            over += read_answers(left > SPIN_NS ? left - SPIN_NS : 0);
        while (!idles)
            over += read_answers(1000000);
        if (write(idle[--idles], request, size) != size)
            fail("write");
    }
    while (over < rows)
        over += read_answers(1000000);
    return 0;
}
