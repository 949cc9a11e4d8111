/* librdmaxfer_shm: the side of a program that fills frames for rdmaxfer/intake.py. rdmaxfer.h says how it is used.
 *
 * Two queues (shm.h) in memory that both have: frames that were published go one way, numbers of slots that are free the other. A Unix
 * socket brings the descriptors at the beginning, tells each side when the other has gone, and why.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "../include/rdmaxfer.h"
#include "intake.h"
#include "shm.h"
#include "spin.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define PUBLIC __attribute__((visibility("default")))
#define BUSY "the intake %s does not answer: another program is attached to it, or its Python process stands still"
#define LOOK_NS 20000000u /* how often attach looks for an intake */

enum state { AWAY, FREE, RESERVED }; /* of a slot: with Python, here to be reserved, reserved */

struct rdmaxfer_ring {
    sx_ep *ep;
    char *memory;
    void *queues;
    size_t memory_bytes, queue_bytes, slot_bytes, slot_stride;
    uint32_t slots, reserved, kept;
    int socket, own_fd, peer_fd;
    int gone;
    unsigned char *states;
    char why[INTAKE_TEXT];
};

static _Thread_local char message[INTAKE_TEXT + 256];

static int fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
static int fail(int code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return -code;
}

PUBLIC uint32_t rdmaxfer_abi(void) { return RDMAXFER_ABI; }

PUBLIC const char *rdmaxfer_error(void) { return message; }

/* --- waiting ------------------------------------------------------------------------------------------------------- */

static uint64_t deadline_of(int timeout_ms) {
    return timeout_ms < 0 ? UINT64_MAX : now_ns() + (uint64_t)timeout_ms * 1000000u;
}

static int left_ms(uint64_t deadline) {
    if (deadline == UINT64_MAX)
        return -1;
    uint64_t now = now_ns();
    if (now >= deadline)
        return 0;
    uint64_t ms = (deadline - now + 999999u) / 1000000u;
    return ms > INT_MAX ? INT_MAX : (int)ms;
}

/* 0: readable, -EINTR, -ETIMEDOUT, ... */
static int readable(int fd, int timeout_ms) {
    struct pollfd one = {.fd = fd, .events = POLLIN};
    int n = poll(&one, 1, timeout_ms);
    return n < 0 ? -errno : n ? 0 : -ETIMEDOUT;
}

/* --- attaching ----------------------------------------------------------------------------------------------------- */

static int address_of(const char *name, struct sockaddr_un *address, socklen_t *bytes) {
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    size_t room = sizeof address->sun_path - 1;
    if (!name || !*name || strlen(name) > INTAKE_MAX_NAME)
        return -EINVAL;
    int n = snprintf(address->sun_path + 1, room, INTAKE_PREFIX "%u/%s", (unsigned)geteuid(), name);
    if (n < 0 || (size_t)n >= room)
        return -EINVAL;
    *bytes = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n);
    return 0;
}

static int open_socket(const struct sockaddr_un *address, socklen_t bytes) {
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); /* a full queue at the door would hold connect(2) up */
    if (fd < 0)
        return -errno;
    if (connect(fd, (const struct sockaddr *)address, bytes)) {
        int code = errno;
        close(fd);
        return -code;
    }
    return fd;
}

/* The answer to our greeting, with its descriptors. */
static int receive_welcome(int fd, struct intake_welcome *welcome, int fds[INTAKE_FDS]) {
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * INTAKE_FDS)];
    } control;
    struct iovec part = {.iov_base = welcome, .iov_len = sizeof *welcome};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t n = recvmsg(fd, &header, MSG_CMSG_CLOEXEC);
    if (n < 0)
        return fail(errno, "nothing can be received from the intake: %s", strerror(errno));
    int count = 0;
    for (struct cmsghdr *each = CMSG_FIRSTHDR(&header); each; each = CMSG_NXTHDR(&header, each))
        if (each->cmsg_level == SOL_SOCKET && each->cmsg_type == SCM_RIGHTS) {
            count = (int)((each->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            memcpy(fds, CMSG_DATA(each), sizeof(int) * (size_t)(count <= INTAKE_FDS ? count : INTAKE_FDS));
        }
    if (n == 0)
        return fail(EPIPE, "the Python process has closed the intake");
    welcome->text[sizeof welcome->text - 1] = 0;
    if (n == sizeof *welcome && memcmp(welcome->magic, INTAKE_MAGIC, sizeof welcome->magic) == 0 && welcome->abi == RDMAXFER_ABI &&
        count == INTAKE_FDS)
        return 0;
    for (int i = 0; i < count && i < INTAKE_FDS; i++)
        close(fds[i]);
    if (n == sizeof *welcome && memcmp(welcome->magic, INTAKE_MAGIC, sizeof welcome->magic) == 0)
        return fail(EPROTO, "the intake turned this program away: %s", welcome->text);
    return fail(EPROTO, "what answers there is no intake of rdmaxfer");
}

static void *map(int fd, size_t bytes) {
    struct stat found;
    if (fstat(fd, &found) || found.st_size < 0 || (uint64_t)found.st_size < bytes)
        return NULL;
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static int begin(int socket, const struct intake_welcome *welcome, const int fds[INTAKE_FDS], rdmaxfer_ring **made) {
    int status = 0;
    rdmaxfer_ring *ring = calloc(1, sizeof *ring);
    if (ring) {
        ring->own_fd = fds[2];
        ring->peer_fd = fds[3];
        ring->socket = socket;
        ring->slots = welcome->slots;
        ring->slot_bytes = welcome->slot_bytes;
        ring->slot_stride = welcome->slot_stride;
        ring->memory_bytes = welcome->slots * (size_t)welcome->slot_stride;
        ring->queue_bytes = sx_bytes(welcome->capacity);
        ring->states = calloc(welcome->slots, 1);
        ring->memory = map(fds[0], ring->memory_bytes);
        ring->queues = map(fds[1], ring->queue_bytes);
        if (ring->memory && ring->queues)
            ring->ep = sx_new(ring->queues, welcome->capacity, 0, ring->own_fd, ring->peer_fd);
    }
    if (!ring || !ring->states || !ring->ep)
        status = fail(ENOMEM, "the intake's memory can't be mapped here: %u slots of %llu bytes", welcome->slots,
                      (unsigned long long)welcome->slot_bytes);
    close(fds[0]);
    close(fds[1]);
    if (!ring) {
        close(fds[2]);
        close(fds[3]);
        close(socket);
        return status;
    }
    if (status) {
        rdmaxfer_detach(ring);
        return status;
    }
    sx_set_receives(ring->ep, UINT64_MAX / 2); /* all that comes is taken */
    *made = ring;
    return 0;
}

PUBLIC int rdmaxfer_attach(uint32_t abi, const char *name, int timeout_ms, rdmaxfer_ring **ring) {
    struct sockaddr_un address;
    socklen_t address_bytes;
    uint64_t deadline = deadline_of(timeout_ms);
    *ring = NULL;
    if (abi != RDMAXFER_ABI)
        return fail(EPROTO, "this program was built for ABI %u, and the library has ABI %u; build it again", abi, RDMAXFER_ABI);
    if (address_of(name, &address, &address_bytes))
        return fail(EINVAL, "the name of an intake has 1 to %d characters", INTAKE_MAX_NAME);
    int fd;
    while ((fd = open_socket(&address, address_bytes)) < 0) {
        if (fd != -ECONNREFUSED && fd != -EAGAIN)
            return fail(-fd, "the intake %s can't be connected to: %s", name, strerror(-fd));
        int ms = left_ms(deadline);
        if (ms == 0 && fd == -EAGAIN)
            return fail(ETIMEDOUT, BUSY, name);
        if (ms == 0)
            return fail(ETIMEDOUT, "nobody on this machine offers the intake %s; start the Python program that calls sender.intake(\"%s\", ...), as this user",
                        name, name);
        struct timespec pause = {.tv_nsec = LOOK_NS};
        if (nanosleep(&pause, NULL))
            return fail(EINTR, "interrupted by a signal");
    }
    struct ucred peer;
    socklen_t peer_bytes = sizeof peer;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &peer_bytes) || peer.uid != geteuid()) {
        close(fd);
        return fail(EACCES, "the intake %s belongs to another user", name);
    }
    uint32_t greeting = RDMAXFER_ABI;
    if (send(fd, &greeting, sizeof greeting, MSG_NOSIGNAL) < 0) {
        int code = errno;
        close(fd);
        return fail(code, "the intake %s has gone", name);
    }
    int status = readable(fd, left_ms(deadline));
    struct intake_welcome welcome;
    int fds[INTAKE_FDS];
    if (status == -ETIMEDOUT)
        fail(ETIMEDOUT, BUSY, name);
    else if (status)
        fail(-status, "waiting for the intake %s ended: %s", name, strerror(-status));
    else
        status = receive_welcome(fd, &welcome, fds);
    if (status) {
        close(fd);
        return status;
    }
    return begin(fd, &welcome, fds, ring);
}

PUBLIC void rdmaxfer_detach(rdmaxfer_ring *ring) {
    if (!ring)
        return;
    sx_free(ring->ep);
    if (ring->memory)
        munmap(ring->memory, ring->memory_bytes);
    if (ring->queues)
        munmap(ring->queues, ring->queue_bytes);
    close(ring->own_fd);
    close(ring->peer_fd);
    close(ring->socket); /* by which Python notices, after all that was published */
    free(ring->states);
    free(ring);
}

PUBLIC uint32_t rdmaxfer_slots(const rdmaxfer_ring *ring) { return ring->slots; }

PUBLIC size_t rdmaxfer_slot_bytes(const rdmaxfer_ring *ring) { return ring->slot_bytes; }

/* --- slots --------------------------------------------------------------------------------------------------------- */

/* Take in which slots have become free. */
static int take(rdmaxfer_ring *ring) {
    sx_item item;
    int n;
    while ((n = sx_arrived(ring->ep, &item, 1)) > 0) {
        if (item.kind != SX_IMM || item.imm >= ring->slots || ring->states[item.imm] != AWAY)
            return fail(EPROTO, "the Python process gave a slot back that it did not have");
        ring->states[item.imm] = FREE;
        ring->kept++;
        sx_consume(ring->ep, 0, sx_arrived_before(ring->ep) + 1);
    }
    return n < 0 ? fail(-n, "the memory that is shared with the Python process is damaged") : 0;
}

/* The socket has something to say: that is the end, with a reason or without. */
static void hear(rdmaxfer_ring *ring) {
    ssize_t n = recv(ring->socket, ring->why, sizeof ring->why - 1, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    ring->why[n > 0 ? n : 0] = 0;
    ring->gone = 1;
}

static int has_ended(rdmaxfer_ring *ring) {
    struct pollfd end = {.fd = ring->socket, .events = POLLIN};
    if (!ring->gone && poll(&end, 1, 0) > 0)
        hear(ring);
    return ring->gone;
}

static int fail_ended(const rdmaxfer_ring *ring) {
    return fail(EPIPE, "%s", *ring->why ? ring->why : "the Python process has ended, or closed the intake; attach again");
}

/* Wait until a slot has come back, or something else has happened. */
static int wait_for_slots(rdmaxfer_ring *ring, uint64_t deadline) {
    if (ring->gone)
        return fail_ended(ring);
    int status = 0, ms = left_ms(deadline);
    if (ms == 0)
        return -ETIMEDOUT;
    if (!sx_arm(&ring->ep, 1)) {
        struct pollfd both[2] = {{.fd = ring->own_fd, .events = POLLIN}, {.fd = ring->socket, .events = POLLIN}};
        uint64_t count;
        if (poll(both, 2, ms) < 0)
            status = errno == EINTR ? fail(EINTR, "interrupted by a signal") : fail(errno, "poll: %s", strerror(errno));
        else {
            if (both[0].revents && read(ring->own_fd, &count, sizeof count) < 0 && errno != EAGAIN && errno != EINTR)
                status = fail(errno, "eventfd: %s", strerror(errno));
            if (both[1].revents)
                hear(ring);
        }
    }
    sx_disarm(&ring->ep, 1);
    return status;
}

static int find_free(const rdmaxfer_ring *ring) {
    for (uint32_t i = 0; i < ring->slots; i++)
        if (ring->states[i] == FREE)
            return (int)i;
    return -1;
}

PUBLIC int rdmaxfer_reserve(rdmaxfer_ring *ring, int timeout_ms, rdmaxfer_slot *slot) {
    uint64_t deadline = deadline_of(timeout_ms);
    for (;;) {
        int status = take(ring);
        if (status)
            return status;
        int number = has_ended(ring) ? -1 : find_free(ring);
        if (number >= 0) {
            ring->states[number] = RESERVED;
            ring->kept--;
            ring->reserved++;
            *slot = (rdmaxfer_slot){.data = ring->memory + (size_t)number * ring->slot_stride,
                                    .bytes = ring->slot_bytes,
                                    .number = (uint32_t)number};
            return 0;
        }
        status = wait_for_slots(ring, deadline);
        if (status == -ETIMEDOUT)
            return fail(ETIMEDOUT, "all %u slots are reserved (%u), or have frames that are on their way, or wait for a receiver", ring->slots,
                        ring->reserved);
        if (status)
            return status;
    }
}

static int check_reserved(const rdmaxfer_ring *ring, const rdmaxfer_slot *slot) {
    if (slot->number >= ring->slots || ring->states[slot->number] != RESERVED)
        return fail(EINVAL, "this slot is not reserved (any more)");
    return 0;
}

static void put_back(rdmaxfer_ring *ring, uint32_t number) {
    ring->states[number] = FREE;
    ring->reserved--;
    ring->kept++;
}

PUBLIC int rdmaxfer_discard(rdmaxfer_ring *ring, const rdmaxfer_slot *slot) {
    int status = check_reserved(ring, slot);
    if (!status)
        put_back(ring, slot->number);
    return status;
}

static int check_frame(const rdmaxfer_frame *frame) {
    if (frame->ndim > RDMAXFER_MAX_DIMS)
        return fail(EINVAL, "a frame has up to %d dimensions, not %u", RDMAXFER_MAX_DIMS, frame->ndim);
    if (!frame->dtype || !*frame->dtype || strlen(frame->dtype) > RDMAXFER_MAX_DTYPE)
        return fail(EINVAL, "a frame needs a dtype, such as \"u1\" or \"<f4\", of up to %d characters", RDMAXFER_MAX_DTYPE);
    if (frame->metadata && strlen(frame->metadata) > RDMAXFER_MAX_METADATA)
        return fail(EINVAL, "metadata has up to %d bytes", RDMAXFER_MAX_METADATA);
    return 0;
}

PUBLIC int rdmaxfer_publish(rdmaxfer_ring *ring, const rdmaxfer_slot *slot, const rdmaxfer_frame *frame) {
    int status = check_reserved(ring, slot);
    if (status)
        return status;
    status = check_frame(frame);
    if (!status && has_ended(ring))
        status = fail_ended(ring);
    if (status) {
        put_back(ring, slot->number);
        return status;
    }
    struct {
        struct intake_frame frame;
        char metadata[RDMAXFER_MAX_METADATA];
    } data = {.frame = {.captured_ns = frame->captured_ns, .ndim = frame->ndim}};
    for (uint32_t i = 0; i < frame->ndim; i++)
        data.frame.shape[i] = frame->shape[i];
    strcpy(data.frame.dtype, frame->dtype);
    size_t metadata_bytes = frame->metadata ? strlen(frame->metadata) : 0;
    if (metadata_bytes)
        memcpy(data.metadata, frame->metadata, metadata_bytes);
    sx_item item = {.kind = SX_WRITE, .imm = slot->number, .data_bytes = (uint32_t)(sizeof data.frame + metadata_bytes)};
    if (sx_post(ring->ep, &item, &data, 0, 0) != 1) { /* there is room for all slots */
        put_back(ring, slot->number);
        return fail(EPROTO, "the memory that is shared with the Python process is damaged");
    }
    ring->states[slot->number] = AWAY;
    ring->reserved--;
    return 0;
}

PUBLIC int rdmaxfer_flush(rdmaxfer_ring *ring, int timeout_ms) {
    uint64_t deadline = deadline_of(timeout_ms);
    for (;;) {
        int status = take(ring);
        if (status)
            return status;
        if (ring->kept + ring->reserved == ring->slots)
            return 0;
        status = wait_for_slots(ring, deadline);
        if (status == -ETIMEDOUT)
            return fail(ETIMEDOUT, "receivers have not released %u of the frames yet", ring->slots - ring->kept - ring->reserved);
        if (status)
            return status;
    }
}
