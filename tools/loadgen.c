/* A load generator that costs little: one thread, epoll, no libraries. tools/bench_native.py compiles and runs it.
 *
 * It asks the same request over and over, keeping a number outstanding on each connection, and prints one JSON object.
 * Two protocols: frames (agent/wire.py) over a unix socket, each with an id of its own, and HTTP/1.1 with keep-alive
 * over TCP or a unix socket, where answers come in the order of the requests. With --lane FILE each connection first
 * sends that frame and goes on over the socket whose descriptor comes with the reply; a refusal ends the program with
 * status 3.
 *
 * Bounds: seconds, requests, connections, depth and the request's size; an end by time waits GRACE_S for answers, and
 * for a first one that counts.
 * Leaves out: open loops, checking what is answered beyond "result" or 200, TLS.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define CONNECTIONS_MAX 1024
#define DEPTH_MAX 1024
#define REQUEST_BYTES_MAX (64 << 20)
#define PENDING_BYTES_MAX (256 << 20)  /* unsent, of one connection: depth x request */
#define HEAD_BYTES_MAX (64 << 10)      /* of an answer */
#define HEAD_STEP 512                  /* looked at in one go */
#define REQUESTS_MAX 20000000
#define SECONDS_MAX 3600.0
#define GRACE_S 2.0
#define READ_BYTES (256 << 10)
#define PREFIX_BYTES 16
#define NESTING_MAX 16
#define LANE_TIMEOUT_S 10
#define LANE_REFUSED 3                 /* exit status */

enum protocol { FRAMES, HTTP };

struct connection {
    int fd;               /* -1: lost */
    int depth_used;       /* outstanding */
    int want_write;       /* EPOLLOUT is asked for */
    uint64_t next;        /* number of the next request; its slot is number % depth */
    uint64_t answered;    /* HTTP: number of the next answer */
    uint64_t *sent_ns;    /* per slot; 0: free */
    unsigned char *out;   /* unsent bytes */
    size_t out_at, out_end;
    unsigned char *head;  /* of the answer under way */
    size_t head_bytes;
    uint64_t skip;        /* bytes of its body still to come */
};

static struct {
    enum protocol protocol;
    unsigned char *request;
    size_t request_bytes, id_offset;
    unsigned char *lane;  /* the request for one; NULL: none */
    size_t lane_bytes;
    int connections, depth;
    double seconds, warm_up_s;
    uint64_t requests_max;
} plan = {.connections = 1, .depth = 1, .seconds = 1.0, .warm_up_s = 0.05, .requests_max = 4000000};

static struct {
    uint32_t *latencies;  /* tenths of a microsecond */
    uint64_t answers, errors, sent, lost;
    uint64_t last_ns;     /* when the last answer came */
    char first_error[128];
} found;

static struct connection lines[CONNECTIONS_MAX];
static unsigned char input[READ_BYTES];
static int epoll_fd;
static uint64_t count_from_ns, end_ns;

static void die(const char *what) {
    fprintf(stderr, "loadgen: %s%s%s\n", what, errno ? ": " : "", errno ? strerror(errno) : "");
    exit(2);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void fault(const char *text, size_t length) {
    found.errors++;
    if (found.first_error[0]) return;
    size_t n = 0;
    for (size_t i = 0; i < length && n < sizeof found.first_error - 1; i++)
        if (text[i] >= ' ' && text[i] <= '~' && text[i] != '"' && text[i] != '\\') found.first_error[n++] = text[i];
}

/* --- MessagePack, as much of it as a header's map needs --- */

static uint64_t big_endian(const unsigned char *at, int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++) value = value << 8 | at[i];
    return value;
}

/* Set the length and start of a text; return its end, or NULL if there is none at `at`. */
static const unsigned char *text_at(const unsigned char *at, const unsigned char *end, const char **text, size_t *length) {
    size_t head = 1;
    if (at >= end) return NULL;
    if ((*at & 0xe0) == 0xa0) *length = *at & 0x1f;
    else if (*at >= 0xd9 && *at <= 0xdb && end - at > 1 << (*at - 0xd9)) {
        int bytes = 1 << (*at - 0xd9);
        *length = big_endian(at + 1, bytes);
        head += bytes;
    } else return NULL;
    if ((size_t)(end - at) < head + *length) return NULL;
    *text = (const char *)at + head;
    return at + head + *length;
}

/* Return the end of the value at `at`, or NULL if it is cut or nested too deep. */
static const unsigned char *skip_value(const unsigned char *at, const unsigned char *end, int nesting) {
    static const signed char fixed[] = {  /* 0xc0..0xdf: bytes after the first; -1..-3: a length of 1, 2, 4 bytes */
        0, 0, 0, 0, -1, -2, -3, -1, -2, -3, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 2, 3, 5, 9, 17, -1, -2, -3, 0, 0, 0, 0};
    uint64_t items = 0, length = 0;
    if (at >= end || nesting > NESTING_MAX) return NULL;
    unsigned char first = *at++;
    if (first < 0x80 || first >= 0xe0) return at;
    if (first < 0x90) items = 2 * (uint64_t)(first & 0x0f);
    else if (first < 0xa0) items = first & 0x0f;
    else if (first < 0xc0) length = first & 0x1f;
    else if (first >= 0xdc) {
        int bytes = first & 1 ? 4 : 2;
        if (end - at < bytes) return NULL;
        items = big_endian(at, bytes) * (first >= 0xde ? 2 : 1);
        at += bytes;
    } else if (fixed[first - 0xc0] >= 0) length = fixed[first - 0xc0];
    else {
        int bytes = 1 << (-fixed[first - 0xc0] - 1);
        if (end - at < bytes) return NULL;
        length = big_endian(at, bytes) + (first >= 0xc7 && first <= 0xc9);
        at += bytes;
    }
    if ((uint64_t)(end - at) < length) return NULL;
    at += length;
    for (; items && at; items--) at = skip_value(at, end, nesting + 1);
    return at;
}

struct words {                         /* an answer's header, as far as it is looked at */
    int64_t id;                        /* -1: none */
    const char *kind, *code, *message;
    size_t kind_bytes, code_bytes, message_bytes;
};

/* Read an answer's header; return 0 if it is malformed. */
static int read_header(const unsigned char *at, size_t bytes, struct words *found) {
    *found = (struct words){.id = -1, .kind = "", .code = "?", .message = "", .code_bytes = 1};
    const unsigned char *end = at + bytes;
    uint64_t pairs;
    if (bytes < 1) return 0;
    if ((*at & 0xf0) == 0x80) pairs = *at++ & 0x0f;
    else if (*at == 0xde && bytes > 3) { pairs = big_endian(at + 1, 2); at += 3; }
    else return 0;
    for (; pairs; pairs--) {
        const char *name, *text;
        size_t name_bytes, text_bytes;
        at = text_at(at, end, &name, &name_bytes);
        if (!at || at >= end) return 0;
        if (name_bytes == 2 && !memcmp(name, "id", 2)) {
            if (*at < 0x80) found->id = *at;
            else if (*at >= 0xcc && *at <= 0xcf && end - at > 1 << (*at - 0xcc))
                found->id = big_endian(at + 1, 1 << (*at - 0xcc));
        } else if (text_at(at, end, &text, &text_bytes)) {
            if (name_bytes == 4 && !memcmp(name, "kind", 4)) { found->kind = text; found->kind_bytes = text_bytes; }
            if (name_bytes == 4 && !memcmp(name, "code", 4)) { found->code = text; found->code_bytes = text_bytes; }
            if (name_bytes == 7 && !memcmp(name, "message", 7)) {
                found->message = text;
                found->message_bytes = text_bytes;
            }
        }
        at = skip_value(at, end, 0);
        if (!at) return 0;
    }
    return 1;
}

/* --- Asking and answers --- */

/* Room for a request that was refused before it was sent whole, and for `depth` new ones. */
static size_t out_bytes(void) {
    return plan.request_bytes * (size_t)(plan.depth + 1);
}

static void ask(struct connection *c, uint64_t now) {
    if (found.sent >= plan.requests_max || (now >= end_ns && found.answers + found.errors)) return;
    if (c->out_end + plan.request_bytes > out_bytes()) return;
    unsigned char *to = c->out + c->out_end;
    memcpy(to, plan.request, plan.request_bytes);
    if (plan.protocol == FRAMES)
        for (int i = 0; i < 8; i++) to[plan.id_offset + i] = (unsigned char)(c->next >> (56 - 8 * i));
    c->out_end += plan.request_bytes;
    c->sent_ns[c->next++ % plan.depth] = now;
    c->depth_used++;
    found.sent++;
}

static void lose(struct connection *c, const char *why) {
    if (c->fd < 0) return;
    close(c->fd);
    c->fd = -1;
    found.lost++;
    fault(why, strlen(why));
}

/* Count one answer to request `number`; `good` tells a result from an error. */
static void answered(struct connection *c, uint64_t number, int good, const char *code, size_t code_bytes, uint64_t now) {
    uint64_t *sent = &c->sent_ns[number % plan.depth];
    if (number >= c->next || c->next - number > (uint64_t)plan.depth || !*sent) { lose(c, "an answer nobody asked for"); return; }
    if (!good) fault(code, code_bytes);
    else if (*sent >= count_from_ns && found.answers < plan.requests_max)
        found.latencies[found.answers++] = (uint32_t)((now - *sent) / 100);
    *sent = 0;
    c->depth_used--;
    found.last_ns = now;
}

static void frame_done(struct connection *c, size_t header_bytes, uint64_t now) {
    struct words words;
    if (!read_header(c->head + PREFIX_BYTES, header_bytes, &words)) {
        lose(c, "a header that is not MessagePack");
        return;
    }
    int result = words.kind_bytes == 6 && !memcmp(words.kind, "result", 6);
    int error = words.kind_bytes == 5 && !memcmp(words.kind, "error", 5);
    if (words.kind_bytes == 3 && !memcmp(words.kind, "bye", 3)) { lose(c, "the lane was revoked"); return; }
    if (!result && !error) return;  /* of no request */
    if (words.id < 0) { lose(c, words.code); return; }
    answered(c, (uint64_t)words.id, result, words.code, words.code_bytes, now);
}

/* Return the bytes of the answer's head when it is complete (0: not yet) and set its body's length. */
static size_t frame_head(struct connection *c, uint64_t *body) {
    uint32_t header;
    if (c->head_bytes < PREFIX_BYTES) return 0;
    memcpy(&header, c->head + 4, 4);
    memcpy(body, c->head + 8, 8);
    if (memcmp(c->head, "IFD1", 4) || header > HEAD_BYTES_MAX - PREFIX_BYTES) { lose(c, "not a frame"); return 0; }
    return c->head_bytes >= PREFIX_BYTES + header ? PREFIX_BYTES + header : 0;
}

static size_t http_head(struct connection *c, uint64_t *body) {
    unsigned char *end = memmem(c->head, c->head_bytes, "\r\n\r\n", 4);
    if (!end) return 0;
    *body = 0;
    for (unsigned char *line = c->head; line < end; line++) {
        line = memmem(line, end - line, "\r\n", 2);
        if (!line) break;
        if (!strncasecmp((char *)line + 2, "content-length:", 15)) *body = strtoull((char *)line + 17, NULL, 10);
    }
    return end + 4 - c->head;
}

static void received(struct connection *c, const unsigned char *at, size_t bytes, uint64_t now) {
    while (bytes && c->fd >= 0) {
        if (c->skip) {
            size_t n = bytes < c->skip ? bytes : c->skip;
            c->skip -= n, at += n, bytes -= n;
            continue;
        }
        size_t before = c->head_bytes, room = HEAD_BYTES_MAX - before, n = bytes < HEAD_STEP ? bytes : HEAD_STEP;
        uint64_t body = 0;
        if (n > room) n = room;
        memcpy(c->head + before, at, n);
        c->head_bytes += n;
        c->head[c->head_bytes] = 0;
        size_t head = plan.protocol == FRAMES ? frame_head(c, &body) : http_head(c, &body);
        if (!head) {
            if (c->head_bytes == HEAD_BYTES_MAX) lose(c, "an answer's head is too long");
            at += n, bytes -= n;
            continue;
        }
        at += head - before, bytes -= head - before;
        c->skip = body;
        c->head_bytes = 0;
        /* An answer counts when its head is here: bodies of what is asked here follow at once. */
        if (plan.protocol == FRAMES) frame_done(c, head - PREFIX_BYTES, now);
        else answered(c, c->answered++, !memcmp(c->head + 9, "200", 3), (char *)c->head + 9, 3, now);
    }
}

static void watch(struct connection *c, int want_write, int operation) {
    struct epoll_event event = {.events = EPOLLIN | (want_write ? EPOLLOUT : 0), .data.ptr = c};
    c->want_write = want_write;
    if (epoll_ctl(epoll_fd, operation, c->fd, &event)) die("epoll_ctl");
}

static void flush(struct connection *c) {
    while (c->fd >= 0 && c->out_at < c->out_end) {
        ssize_t n = send(c->fd, c->out + c->out_at, c->out_end - c->out_at, MSG_NOSIGNAL);
        if (n > 0) c->out_at += n;
        else if (errno == EAGAIN) break;
        else if (errno != EINTR) lose(c, "the daemon closed");
    }
    if (c->fd >= 0 && c->want_write != (c->out_at < c->out_end)) watch(c, !c->want_write, EPOLL_CTL_MOD);
}

static void ready(struct connection *c, uint32_t events) {
    if (events & ~(uint32_t)EPOLLOUT) {
        ssize_t n = recv(c->fd, input, sizeof input, 0);
        if (n > 0) {
            uint64_t now = now_ns();
            received(c, input, n, now);
            if (c->fd >= 0 && c->out_at) {
                memmove(c->out, c->out + c->out_at, c->out_end - c->out_at);
                c->out_end -= c->out_at, c->out_at = 0;
            }
            while (c->fd >= 0 && c->depth_used < plan.depth && !c->sent_ns[c->next % plan.depth]) {
                uint64_t sent = found.sent;
                ask(c, now);
                if (found.sent == sent) break;
            }
        } else if (!n || (errno != EAGAIN && errno != EINTR)) lose(c, "the daemon closed");
    }
    flush(c);
}

static int open_line(const char *unix_path, const char *host, int port) {
    struct sockaddr_un to_unix = {.sun_family = AF_UNIX};
    struct sockaddr_in to_tcp = {.sin_family = AF_INET, .sin_port = htons(port)};
    int one = 1, fd = socket(unix_path ? AF_UNIX : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) die("socket");
    if (unix_path) {
        if (strlen(unix_path) >= sizeof to_unix.sun_path) die("the socket's path is too long");
        strcpy(to_unix.sun_path, unix_path);
        if (connect(fd, (struct sockaddr *)&to_unix, sizeof to_unix)) die(unix_path);
    } else {
        if (inet_pton(AF_INET, host, &to_tcp.sin_addr) != 1) die("--tcp: an IPv4 address is needed");
        if (connect(fd, (struct sockaddr *)&to_tcp, sizeof to_tcp)) die(host);
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    }
    return fd;
}

static void refused(const char *code, size_t code_bytes, const char *message, size_t message_bytes) {
    fprintf(stderr, "lane not granted: %.*s: %.*s\n", (int)code_bytes, code, (int)message_bytes, message);
    exit(LANE_REFUSED);
}

/* Send the request for a lane and return its socket, which came with the reply. The connection stays open beside it. */
static int open_lane(int fd) {
    static unsigned char reply[HEAD_BYTES_MAX];
    struct timeval wait = {.tv_sec = LANE_TIMEOUT_S};
    struct words words;
    size_t got = 0;
    uint32_t header = 0;
    int lane = -1;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
    if (send(fd, plan.lane, plan.lane_bytes, MSG_NOSIGNAL) != (ssize_t)plan.lane_bytes) die("the request for a lane");
    while (got < PREFIX_BYTES || got < PREFIX_BYTES + header) {
        union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof(int))]; } room;
        struct iovec part = {reply + got, sizeof reply - got};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &room, .msg_controllen = sizeof room};
        ssize_t n = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
        if (n <= 0) refused("?", 1, n ? strerror(errno) : "the daemon closed", n ? strlen(strerror(errno)) : 17);
        struct cmsghdr *passed = CMSG_FIRSTHDR(&message);
        if (passed && passed->cmsg_level == SOL_SOCKET && passed->cmsg_type == SCM_RIGHTS)
            memcpy(&lane, CMSG_DATA(passed), sizeof lane);
        got += n;
        if (got >= PREFIX_BYTES) memcpy(&header, reply + 4, 4);
        if (memcmp(reply, "IFD1", got < 4 ? got : 4) || header > sizeof reply - PREFIX_BYTES) die("not a frame");
    }
    if (!read_header(reply + PREFIX_BYTES, header, &words)) die("a header that is not MessagePack");
    if (words.kind_bytes == 5 && !memcmp(words.kind, "error", 5))
        refused(words.code, words.code_bytes, words.message, words.message_bytes);
    if (lane < 0) refused("?", 1, "no descriptor came with the reply", 33);
    return lane;
}

static unsigned char *read_file(const char *path, size_t bytes_max, size_t *bytes) {
    FILE *file = fopen(path, "rb");
    unsigned char *data = malloc(bytes_max + 1);
    if (!file) die(path);
    if (!data) die("memory");
    *bytes = fread(data, 1, bytes_max + 1, file);
    fclose(file);
    if (!*bytes || *bytes > bytes_max) die("the request is empty or too large");
    return data;
}

static void read_request(const char *path) {
    plan.request = read_file(path, REQUEST_BYTES_MAX, &plan.request_bytes);
    if (plan.protocol == FRAMES && plan.id_offset + 8 > plan.request_bytes) die("--id-offset lies outside the request");
}

static int by_value(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void report(double seconds) {
    static const double quantiles[] = {0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100};
    struct rusage used;
    uint64_t n = found.answers, outstanding = 0;
    for (int i = 0; i < plan.connections; i++) outstanding += lines[i].depth_used;
    getrusage(RUSAGE_SELF, &used);
    qsort(found.latencies, n, sizeof *found.latencies, by_value);
    printf("{\"answers\": %llu, \"errors\": %llu, \"unanswered\": %llu, \"lost_connections\": %llu, \"sent\": %llu, ",
           (unsigned long long)n, (unsigned long long)found.errors, (unsigned long long)outstanding,
           (unsigned long long)found.lost, (unsigned long long)found.sent);
    printf("\"first_error\": \"%s\", \"seconds\": %.6f, \"rate_s\": %.1f, \"cpu_s\": %.6f, \"quantiles_us\": {",
           found.first_error, seconds, seconds > 0 ? n / seconds : 0.0,
           used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6);
    for (size_t i = 0; n && i < sizeof quantiles / sizeof *quantiles; i++) {
        uint64_t at = quantiles[i] / 100 * n;
        printf("%s\"%g\": %.1f", i ? ", " : "", quantiles[i], found.latencies[at < n ? at : n - 1] / 10.0);
    }
    printf("}}\n");
}

static double number(const char *text, double low, double high, const char *name) {
    char *end;
    double value = strtod(text, &end);
    if (*end || !(value >= low && value <= high)) die(name);
    return value;
}

int main(int argc, char **argv) {
    const char *unix_path = NULL, *request = NULL;
    char *host = NULL;
    int port = 0;
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(name, "--http")) { plan.protocol = HTTP; continue; }
        i++;
        if (!strcmp(name, "--unix")) unix_path = value;
        else if (!strcmp(name, "--tcp")) {
            host = strdup(value);
            char *colon = host ? strrchr(host, ':') : NULL;
            if (!colon) die("--tcp: HOST:PORT");
            *colon = 0;
            port = (int)number(colon + 1, 1, 65535, name);
        } else if (!strcmp(name, "--request")) request = value;
        else if (!strcmp(name, "--lane")) plan.lane = read_file(value, HEAD_BYTES_MAX, &plan.lane_bytes);
        else if (!strcmp(name, "--id-offset")) plan.id_offset = (size_t)number(value, 0, REQUEST_BYTES_MAX, name);
        else if (!strcmp(name, "--connections")) plan.connections = (int)number(value, 1, CONNECTIONS_MAX, name);
        else if (!strcmp(name, "--depth")) plan.depth = (int)number(value, 1, DEPTH_MAX, name);
        else if (!strcmp(name, "--seconds")) plan.seconds = number(value, 0.001, SECONDS_MAX, name);
        else if (!strcmp(name, "--warm-up")) plan.warm_up_s = number(value, 0, 60, name);
        else if (!strcmp(name, "--requests-max")) plan.requests_max = (uint64_t)number(value, 1, REQUESTS_MAX, name);
        else die("usage: loadgen (--unix PATH | --tcp HOST:PORT) --request FILE (--http | --id-offset N) [--lane FILE]"
                 " [--connections N] [--depth N] [--seconds S] [--warm-up S] [--requests-max N]");
    }
    if (!request || (!unix_path == !host)) die("--request and one of --unix and --tcp are needed");
    read_request(request);
    if (out_bytes() > PENDING_BYTES_MAX) die("depth x request is too large");
    found.latencies = malloc(plan.requests_max * sizeof *found.latencies);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (!found.latencies || epoll_fd < 0) die("start");

    for (int i = 0; i < plan.connections; i++) {
        struct connection *c = &lines[i];
        c->fd = open_line(unix_path, host, port);
        if (plan.lane) c->fd = open_lane(c->fd);
        if (fcntl(c->fd, F_SETFL, O_NONBLOCK)) die("fcntl");
        c->sent_ns = calloc(plan.depth, sizeof *c->sent_ns);
        c->out = malloc(out_bytes());
        c->head = malloc(HEAD_BYTES_MAX + 1);
        if (!c->sent_ns || !c->out || !c->head) die("memory");
        watch(c, 0, EPOLL_CTL_ADD);
    }
    uint64_t started = now_ns(), live = plan.connections;
    count_from_ns = started + (uint64_t)(plan.warm_up_s * 1e9);
    end_ns = count_from_ns + (uint64_t)(plan.seconds * 1e9);
    for (int i = 0; i < plan.connections; i++) {
        for (int k = 0; k < plan.depth; k++) ask(&lines[i], started);
        flush(&lines[i]);
    }
    uint64_t give_up_ns = end_ns + (uint64_t)(GRACE_S * 1e9);
    while (live && now_ns() < give_up_ns) {
        struct epoll_event events[64];
        int n = epoll_wait(epoll_fd, events, 64, 100);
        if (n < 0 && errno != EINTR) die("epoll_wait");
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (c->fd >= 0) ready(c, events[i].events);
        }
        live = 0;
        for (int i = 0; i < plan.connections; i++) live += lines[i].fd >= 0 && lines[i].depth_used;
    }
    report(found.last_ns > count_from_ns ? (found.last_ns - count_from_ns) / 1e9 : 0.0);
    return 0;
}
