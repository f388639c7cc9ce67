/* Loads for a proxy, and the backend that answers them.

   load serve PORT LETTER                            the backend, until killed
   load connect ADDRESS PORT HELLO AT_ONCE SECONDS   connections one after the other, some at once
   load latency ADDRESS PORT HELLO SECONDS           the same, one at a time, each timed
   load bytes   ADDRESS PORT HELLO up|down STREAMS MIB   so many MiB over all streams
   load hold    ADDRESS PORT HELLO NUMBER            connections that stay until stdin ends
   load silence ADDRESS PORT NUMBER                  the same, without a byte sent

   HELLO is a file with a ClientHello. What the backend is to do travels in the hello's random field,
   so that a proxy sees a hello and nothing else. The backend's first byte is LETTER. Loads print one
   line of JSON. Each is bounded in count and by a last-resort alarm(2). */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BACKLOG = 4096, HELLO_MAX = 16384, EVENTS = 256, CHUNK = 256 * 1024, MOST = 1000000 };
enum { RANDOM_AT = 5 + 4 + 2, COMMAND = 1 + 8, HEAD = RANDOM_AT + COMMAND }; /* RFC 8446, 4.1.2 */
enum { AT_ONCE_WHILE_OPENING = 128 };

static char chunk[CHUNK];

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int would_block(void) { return errno == EAGAIN || errno == EWOULDBLOCK; }

static void watch(int epoll, int fd, void *owner)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET};
    event.data.ptr = owner;
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
        die("epoll_ctl");
}

/* Received bytes are thrown away in the kernel (MSG_TRUNC, tcp(7)), at most `most` of them. */
static ssize_t discard(int fd, uint64_t most)
{
    return recv(fd, NULL, most < (1 << 30) ? most : (1 << 30), MSG_TRUNC);
}

/* ---- The backend ---- */

enum command { ONE_BYTE = 'B', HOLD = 'H', SEND = 'S', TAKE = 'T' };

struct served {
    int fd;
    unsigned got;              /* of the hello */
    unsigned char head[HEAD];  /* its first bytes */
    enum command command;
    int said_letter;
    uint64_t left; /* to send or to take */
};

/* Whether the hello is whole; -1 if the connection is over. */
static int read_hello(struct served *s)
{
    for (;;) {
        unsigned whole = s->got < HEAD ? HEAD : 5u + (s->head[3] << 8 | s->head[4]);
        if (s->got >= HEAD && s->got >= whole)
            return 1;
        ssize_t n = s->got < HEAD ? recv(s->fd, s->head + s->got, HEAD - s->got, 0)
                                  : discard(s->fd, whole - s->got);
        if (n <= 0)
            return n < 0 && would_block() ? 0 : -1;
        s->got += n;
        if (s->got == HEAD) {
            s->command = s->head[RANDOM_AT];
            for (int i = 1; i <= 8; i++)
                s->left = s->left << 8 | s->head[RANDOM_AT + i];
        }
    }
}

/* Go on until it would block; -1 if the connection is over. */
static int serve(struct served *s, char letter)
{
    int whole = read_hello(s);
    if (whole <= 0)
        return whole;
    while (s->command == TAKE && s->left) {
        ssize_t n = discard(s->fd, s->left);
        if (n <= 0)
            return n < 0 && would_block() ? 0 : -1;
        s->left -= n;
    }
    if (!s->said_letter) {
        if (send(s->fd, &letter, 1, MSG_NOSIGNAL) != 1)
            return -1;
        s->said_letter = 1;
    }
    while (s->command == SEND && s->left) {
        ssize_t n = send(s->fd, chunk, s->left < CHUNK ? s->left : CHUNK, MSG_NOSIGNAL);
        if (n <= 0)
            return n < 0 && would_block() ? 0 : -1;
        s->left -= n;
    }
    if (s->command != HOLD)
        return -1;
    ssize_t n = discard(s->fd, 1);
    return n < 0 && would_block() ? 0 : -1;
}

static void backend(int port, char letter)
{
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(port)};
    int epoll = epoll_create1(0), one = 1;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, BACKLOG))
        die("listen");
    struct epoll_event listening = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &listening))
        die("epoll_ctl");
    for (;;) {
        struct epoll_event events[EVENTS];
        int n = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            struct served *s = events[i].data.ptr;
            if (s) {
                if (serve(s, letter) < 0) {
                    close(s->fd);
                    free(s);
                }
                continue;
            }
            int fd;
            while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                s = calloc(1, sizeof *s);
                s->fd = fd;
                watch(epoll, fd, s);
            }
        }
    }
}

/* ---- The loads ---- */

static struct sockaddr_in target;
static unsigned char hello[HELLO_MAX];
static size_t hello_size; /* 0: silence */

static void load_hello(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        die(path);
    hello_size = fread(hello, 1, sizeof hello, file);
    fclose(file);
    if (hello_size < HEAD)
        die("too short a hello");
}

static void write_command(enum command command, uint64_t number)
{
    hello[RANDOM_AT] = command;
    for (int i = 8; i >= 1; i--, number >>= 8)
        hello[RANDOM_AT + i] = number & 0xff;
}

struct visit {
    int fd;
    int sent_hello;
    int answered;
    double began;
    float waited;
};

/* A new connection, on its way. */
static void dial(struct visit *v, int epoll)
{
    *v = (struct visit){.fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), .began = now()};
    if (v->fd < 0)
        die("socket");
    if (connect(v->fd, (struct sockaddr *)&target, sizeof target) && errno != EINPROGRESS)
        die("connect");
    watch(epoll, v->fd, v);
}

/* Say hello once connected: 1 if said, 0 if not connected yet, -1 if refused. */
static int greet(struct visit *v)
{
    if (v->sent_hello)
        return 1;
    ssize_t n = send(v->fd, hello, hello_size, MSG_NOSIGNAL);
    if (n < 0)
        return would_block() || errno == ENOTCONN ? 0 : -1;
    if ((size_t)n != hello_size)
        return -1;
    v->sent_hello = 1;
    return 1;
}

static int ascending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Connections that get one byte and an end-of-file, `at_once` at a time, for so many seconds.
   Timed is what passes from connect(2) to the first byte. */
static void connections(int at_once, double seconds)
{
    int epoll = epoll_create1(0), open = 0;
    long done = 0, failed = 0;
    struct visit *visits = calloc(at_once, sizeof *visits);
    float *waits = calloc(MOST + at_once, sizeof *waits);
    double began = now(), end = began + seconds;
    write_command(ONE_BYTE, 0);
    for (; open < at_once; open++)
        dial(&visits[open], epoll);
    while (open) {
        struct epoll_event events[EVENTS];
        int n = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            struct visit *v = events[i].data.ptr;
            char byte;
            int greeted = greet(v);
            ssize_t got = greeted;
            if (greeted > 0) {
                while ((got = recv(v->fd, &byte, 1, 0)) > 0) {
                    if (!v->answered)
                        v->waited = now() - v->began;
                    v->answered = 1;
                }
            }
            if (greeted == 0 || (got < 0 && would_block()))
                continue;
            close(v->fd);
            if (greeted > 0 && got == 0 && v->answered)
                waits[done++] = v->waited;
            else
                failed++;
            if (now() < end && done < MOST && failed < 1000)
                dial(v, epoll);
            else
                open--;
        }
    }
    double took = now() - began;
    qsort(waits, done, sizeof *waits, ascending);
    printf("{\"connections\": %ld, \"failed\": %ld, \"seconds\": %.6f, "
           "\"p50_us\": %.2f, \"p99_us\": %.2f}\n",
           done, failed, took, done ? waits[done / 2] * 1e6 : 0,
           done ? waits[done * 99 / 100] * 1e6 : 0);
}

/* `total` bytes over `streams` connections, from us (up) or from the backend (down). */
static void bytes(int up, int streams, uint64_t total)
{
    int epoll = epoll_create1(0), open = 0, failed = 0;
    struct visit *visits = calloc(streams, sizeof *visits);
    uint64_t *left = calloc(streams, sizeof *left), each = total / streams;
    double began = now();
    write_command(up ? TAKE : SEND, each);
    for (; open < streams; open++) {
        left[open] = up ? each : each + 1; /* the letter comes first */
        dial(&visits[open], epoll);
    }
    while (open) {
        struct epoll_event events[EVENTS];
        int n = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            struct visit *v = events[i].data.ptr;
            uint64_t *rest = &left[v - visits];
            ssize_t got = greet(v);
            if (got == 0)
                continue;
            while (got > 0 && up && *rest) {
                got = send(v->fd, chunk, *rest < CHUNK ? *rest : CHUNK, MSG_NOSIGNAL);
                *rest -= got > 0 ? got : 0;
            }
            while (got > 0) { /* up: the letter says that all has arrived */
                got = discard(v->fd, UINT64_MAX);
                *rest -= got > 0 && !up ? got : 0;
            }
            if (got < 0 && would_block())
                continue;
            failed += got < 0 || *rest != 0;
            close(v->fd);
            open--;
        }
    }
    printf("{\"bytes\": %llu, \"failed\": %d, \"seconds\": %.6f}\n",
           (unsigned long long)each * streams, failed, now() - began);
}

/* `number` connections that stay: with a hello, until the first byte has come; or silent. */
static void hold(int number)
{
    int epoll = epoll_create1(0), dialled = 0, ready = 0, failed = 0;
    struct visit *visits = calloc(number, sizeof *visits);
    write_command(HOLD, 0);
    while (ready + failed < number) {
        while (dialled < number && dialled - ready - failed < AT_ONCE_WHILE_OPENING)
            dial(&visits[dialled++], epoll);
        struct epoll_event events[EVENTS];
        int n = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            struct visit *v = events[i].data.ptr;
            if (v->answered)
                continue;
            char byte;
            ssize_t got = 1;
            if (!hello_size)
                got = events[i].events & (EPOLLERR | EPOLLHUP) ? -1 : !!(events[i].events & EPOLLOUT);
            else if ((got = greet(v)) > 0 && (got = recv(v->fd, &byte, 1, 0)) < 0 && would_block())
                continue;
            else if (!got && v->sent_hello)
                got = -1;
            if (!got)
                continue;
            v->answered = 1;
            ready += got > 0;
            failed += got < 0;
        }
    }
    printf("{\"open\": %d, \"failed\": %d}\n", ready, failed);
    fflush(stdout);
    alarm(120);
    while (read(0, chunk, sizeof chunk) > 0)
        ;
}

static void usage(void)
{
    fputs("usage: see the head of load.c\n", stderr);
    exit(2);
}

int main(int argc, char **argv)
{
    if (argc < 4)
        usage();
    const char *what = argv[1];
    if (!strcmp(what, "serve")) {
        backend(atoi(argv[2]), argv[3][0]);
        return 0;
    }
    int arguments = argc - 4;
    target.sin_family = AF_INET;
    target.sin_port = htons(atoi(argv[3]));
    if (inet_pton(AF_INET, argv[2], &target.sin_addr) != 1)
        usage();
    alarm(60);
    if (!strcmp(what, "silence") && arguments == 1) {
        hold(atoi(argv[4]));
        return 0;
    }
    if (arguments < 2)
        usage();
    load_hello(argv[4]);
    if (!strcmp(what, "connect") && arguments == 3)
        connections(atoi(argv[5]), atof(argv[6]));
    else if (!strcmp(what, "latency") && arguments == 2)
        connections(1, atof(argv[5]));
    else if (!strcmp(what, "bytes") && arguments == 4)
        bytes(!strcmp(argv[5], "up"), atoi(argv[6]), (uint64_t)atoi(argv[7]) << 20);
    else if (!strcmp(what, "hold") && arguments == 2)
        hold(atoi(argv[5]));
    else
        usage();
    return 0;
}
