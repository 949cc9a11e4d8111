#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "shm.h"
#include "spin.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#define LINE 64
#define SPINS_PER_CLOCK 32
#define EVENTS 64

/* Each index on a cache line of its own, as the two processes write to different ones. */
struct control {
    _Alignas(LINE) uint64_t tail; /* items ever put in; the producer's */
    _Alignas(LINE) uint64_t head; /* items ever taken out; the consumer's */
    _Alignas(LINE) uint32_t sleeps; /* the consumer wants to be woken by an item */
    _Alignas(LINE) uint32_t stuck;  /* the producer wants to be woken by room */
};

struct record {
    _Alignas(LINE) sx_item item;
    _Alignas(LINE) char data[SX_ROOM];
};

struct queue {
    struct control *control;
    struct record *records;
};

struct sx_ep {
    struct queue out, in;
    uint64_t mask;
    uint64_t tail;     /* ours, of `out` */
    uint64_t head;     /* ours, of `in` */
    uint64_t receives; /* how far `in` may be taken */
    uint64_t posted;
    uint64_t *wr_ids; /* signalled and not consumed, `done_tail - done_head` of them */
    uint64_t done_head, done_tail, done_mask;
    int own_fd, peer_fd;
};

static size_t queue_bytes(uint32_t capacity) { return sizeof(struct control) + capacity * sizeof(struct record); }

size_t sx_bytes(uint32_t capacity) { return 2 * queue_bytes(capacity); }

static struct queue queue_at(char *memory) {
    return (struct queue){.control = (struct control *)memory, .records = (struct record *)(memory + sizeof(struct control))};
}

sx_ep *sx_new(void *memory, uint32_t capacity, int first, int own_fd, int peer_fd) {
    if (capacity < 1 || capacity > SX_MAX_CAPACITY || (capacity & (capacity - 1)))
        return NULL;
    sx_ep *e = calloc(1, sizeof *e);
    if (!e)
        return NULL;
    uint32_t most = 2 * SX_MAX_CAPACITY; /* whoever posts counts what it has not seen completed, and stops far below */
    e->wr_ids = calloc(most, sizeof *e->wr_ids);
    if (!e->wr_ids) {
        free(e);
        return NULL;
    }
    struct queue one = queue_at(memory), other = queue_at((char *)memory + queue_bytes(capacity));
    e->out = first ? one : other;
    e->in = first ? other : one;
    e->mask = capacity - 1;
    e->done_mask = most - 1;
    e->own_fd = own_fd;
    e->peer_fd = peer_fd;
    return e;
}

void sx_free(sx_ep *e) {
    if (e)
        free(e->wr_ids);
    free(e);
}

static void kick(int fd) {
    uint64_t one = 1;
    /* A full counter wakes as well, and a descriptor that the peer has spoilt is its own loss. */
    if (write(fd, &one, sizeof one) < 0)
        return;
}

/* --- putting in ---------------------------------------------------------------------------------------------------- */

/* 1: there is room; 0: there is none; -1: the peer can't have taken what it says. */
static int room(const sx_ep *e) {
    uint64_t used = e->tail - __atomic_load_n(&e->out.control->head, __ATOMIC_ACQUIRE);
    return used <= e->mask ? 1 : used == e->mask + 1 ? 0 : -1;
}

int sx_post(sx_ep *e, const sx_item *item, const void *data, uint64_t wr_id, int signaled) {
    if (item->data_bytes > SX_ROOM)
        return -EINVAL;
    if (signaled && e->done_tail - __atomic_load_n(&e->done_head, __ATOMIC_ACQUIRE) > e->done_mask)
        return 0;
    if (item->kind != SX_EMPTY) {
        int free_ = room(e);
        if (free_ == 0) { /* look once more after asking to be woken, or room made in between would go unnoticed */
            __atomic_store_n(&e->out.control->stuck, 1, __ATOMIC_SEQ_CST);
            __atomic_thread_fence(__ATOMIC_SEQ_CST);
            free_ = room(e);
        }
        if (free_ <= 0)
            return free_ < 0 ? -EPROTO : 0;
        struct record *record = &e->out.records[e->tail & e->mask];
        record->item = *item;
        memcpy(record->data, data, item->data_bytes);
        e->tail++;
        __atomic_store_n(&e->out.control->tail, e->tail, __ATOMIC_RELEASE);
        __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the tail is seen before we look whether the peer sleeps */
        if (__atomic_load_n(&e->out.control->sleeps, __ATOMIC_RELAXED) &&
            __atomic_exchange_n(&e->out.control->sleeps, 0, __ATOMIC_SEQ_CST))
            kick(e->peer_fd);
    }
    __atomic_store_n(&e->posted, e->posted + 1, __ATOMIC_RELEASE);
    if (signaled) { /* whoever takes completions may be another thread, at this moment */
        e->wr_ids[e->done_tail & e->done_mask] = wr_id;
        __atomic_store_n(&e->done_tail, e->done_tail + 1, __ATOMIC_RELEASE);
    }
    return 1;
}

uint64_t sx_posted(const sx_ep *e) { return __atomic_load_n(&e->posted, __ATOMIC_ACQUIRE); }

/* --- taking out ---------------------------------------------------------------------------------------------------- */

/* Items that may be taken, or -EPROTO. */
static int64_t waiting(const sx_ep *e) {
    uint64_t there = __atomic_load_n(&e->in.control->tail, __ATOMIC_ACQUIRE) - e->head;
    if (there > e->mask + 1)
        return -EPROTO;
    uint64_t allowed = __atomic_load_n(&e->receives, __ATOMIC_ACQUIRE) - e->head;
    return (int64_t)(there < allowed ? there : allowed);
}

int sx_completed(const sx_ep *e, uint64_t *wr_ids, int max) {
    int n = 0;
    uint64_t tail = __atomic_load_n(&e->done_tail, __ATOMIC_ACQUIRE);
    for (uint64_t i = e->done_head; i != tail && n < max; i++)
        wr_ids[n++] = e->wr_ids[i & e->done_mask];
    return n;
}

int sx_arrived(const sx_ep *e, sx_item *items, int max) {
    int64_t there = waiting(e);
    if (there < 0)
        return (int)there;
    int n = 0;
    for (; n < there && n < max; n++) {
        items[n] = e->in.records[(e->head + (uint64_t)n) & e->mask].item;
        if (items[n].data_bytes > SX_ROOM)
            return -EPROTO;
    }
    return n;
}

const void *sx_data(const sx_ep *e, int i) { return e->in.records[(e->head + (uint64_t)i) & e->mask].data; }

void sx_consume(sx_ep *e, uint64_t completed, uint64_t arrived) {
    __atomic_store_n(&e->done_head, completed, __ATOMIC_RELEASE);
    if (arrived == e->head)
        return;
    e->head = arrived;
    __atomic_store_n(&e->in.control->head, arrived, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(&e->in.control->stuck, __ATOMIC_RELAXED) &&
        __atomic_exchange_n(&e->in.control->stuck, 0, __ATOMIC_SEQ_CST))
        kick(e->peer_fd);
}

uint64_t sx_completed_before(const sx_ep *e) { return e->done_head; }

uint64_t sx_arrived_before(const sx_ep *e) { return e->head; }

void sx_set_receives(sx_ep *e, uint64_t total) { __atomic_store_n(&e->receives, total, __ATOMIC_RELEASE); }

int sx_ready(const sx_ep *e) {
    return e->done_head != __atomic_load_n(&e->done_tail, __ATOMIC_ACQUIRE) || waiting(e) != 0;
}

/* --- waiting ------------------------------------------------------------------------------------------------------- */

static int any_ready(sx_ep **eps, int n) {
    for (int i = 0; i < n; i++)
        if (sx_ready(eps[i]))
            return 1;
    return 0;
}

int sx_arm(sx_ep **eps, int n) {
    for (int i = 0; i < n; i++)
        __atomic_store_n(&eps[i]->in.control->sleeps, 1, __ATOMIC_SEQ_CST);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return any_ready(eps, n);
}

void sx_disarm(sx_ep **eps, int n) {
    for (int i = 0; i < n; i++)
        __atomic_store_n(&eps[i]->in.control->sleeps, 0, __ATOMIC_RELAXED);
}

static int spin(sx_ep **eps, int n, uint64_t spin_ns) {
    uint64_t end = now_ns() + spin_ns;
    do {
        for (int i = 0; i < SPINS_PER_CLOCK; i++) {
            if (any_ready(eps, n))
                return 1;
            relax();
        }
        sched_yield(); /* the peer may need this very CPU */
    } while (now_ns() < end);
    return 0;
}

static int is_eventfd(sx_ep **eps, int n, int wake_fd, int fd) {
    if (fd == wake_fd)
        return 1;
    for (int i = 0; i < n; i++)
        if (fd == eps[i]->own_fd)
            return 1;
    return 0;
}

int sx_wait(sx_ep **eps, int n, int epoll_fd, int wake_fd, uint64_t spin_ns, int64_t timeout_ns, int *fds, int max, int *slept) {
    struct epoll_event events[EVENTS];
    int found = 0, timeout_ms = -1;
    *slept = 0;
    if (timeout_ns >= 0 && (uint64_t)timeout_ns < spin_ns)
        spin_ns = (uint64_t)timeout_ns;
    if (spin_ns && n && spin(eps, n, spin_ns))
        return 0;
    if (timeout_ns >= 0) {
        int64_t left_ns = timeout_ns - (int64_t)spin_ns;
        timeout_ms = left_ns >= (int64_t)INT32_MAX * 1000000 ? INT32_MAX : (int)((left_ns + 999999) / 1000000);
    }
    if (sx_arm(eps, n))
        timeout_ms = 0;
    *slept = timeout_ms != 0;
    int ready = epoll_wait(epoll_fd, events, EVENTS, timeout_ms);
    int code = errno;
    sx_disarm(eps, n);
    if (ready < 0)
        return code == EINTR ? 0 : -code;
    for (int i = 0; i < ready; i++) {
        int fd = events[i].data.fd;
        uint64_t count;
        if (!is_eventfd(eps, n, wake_fd, fd)) {
            if (found < max)
                fds[found++] = fd;
        } else if (read(fd, &count, sizeof count) < 0 && errno != EAGAIN && errno != EINTR)
            return -errno;
    }
    return found;
}
