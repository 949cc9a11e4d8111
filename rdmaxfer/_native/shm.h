/* Two queues in memory that two processes share, one for each direction, and waiting for what comes through them.
 *
 * An item says where a frame's payload lies (in a segment that the other side has mapped) and carries its header along. Each queue has
 * one producer and one consumer. Who finds its queue empty says so in it before it sleeps, and is woken by its eventfd: nobody spins who
 * was not told to, and no system call is made for somebody who is awake.
 *
 * - What the peer writes is not believed: own indices are kept in own memory, its indices are looked at once and checked, and items are
 *   copied before they are.
 * - Threads: one thread at a time posts to an end, and one takes from it (or waits for it); the two may be different ones.
 */
#ifndef RDMAXFER_SHM_H
#define RDMAXFER_SHM_H

#include <stddef.h>
#include <stdint.h>

typedef struct sx_ep sx_ep; /* one end */

#define SX_WRITE 1 /* a frame: header, where the payload is, immediate */
#define SX_IMM 2   /* an immediate alone */
#define SX_SEND 3  /* a message */
#define SX_EMPTY 4 /* nothing but a completion here */

#define SX_ROOM 8192         /* bytes of header or message that an item can carry */
#define SX_MAX_CAPACITY 4096 /* items in a queue: a power of 2 up to this */

typedef struct {
    uint32_t kind;
    uint32_t imm;
    uint32_t rkey;       /* of the peer's memory that the frame is meant for */
    uint32_t data_bytes; /* header or message */
    uint64_t address;    /* in the peer's memory */
    uint64_t nbytes;     /* payload */
    uint64_t offset;     /* of the payload in its segment */
    uint32_t segment;
    uint32_t reserved;
} sx_item;

/* What both queues of a connection take together. */
size_t sx_bytes(uint32_t capacity);

/* One end of the connection in `memory`, which stays mapped until sx_free; `first` for who made (and zeroed) it. peer_fd and own_fd are
 * eventfds. NULL: out of memory, or a capacity that can't be. */
sx_ep *sx_new(void *memory, uint32_t capacity, int first, int own_fd, int peer_fd);
void sx_free(sx_ep *ep);

/* Hand an item over, and wake the peer if it sleeps. 1: done; 0: no room: the peer will wake this side when there is; -EPROTO: the peer's
 * index is impossible. With `signaled`, `wr_id` is among those completed. */
int sx_post(sx_ep *ep, const sx_item *item, const void *data, uint64_t wr_id, int signaled);
uint64_t sx_posted(const sx_ep *ep); /* in all */

/* What has happened and was not consumed: up to `max` wr_ids that completed, and items that came, if there are receives for so many. The
 * data of an item is at sx_data(ep, i) until it is consumed. A count, or -EPROTO. */
int sx_completed(const sx_ep *ep, uint64_t *wr_ids, int max);
int sx_arrived(const sx_ep *ep, sx_item *items, int max);
const void *sx_data(const sx_ep *ep, int i);

/* Consume up to these ordinals (in all, since the beginning): again is harmless. */
void sx_consume(sx_ep *ep, uint64_t completed, uint64_t arrived);
uint64_t sx_completed_before(const sx_ep *ep);
uint64_t sx_arrived_before(const sx_ep *ep);

/* So many receives were ever posted; beyond them, nothing is taken. */
void sx_set_receives(sx_ep *ep, uint64_t total);

/* Whether there is something to take. */
int sx_ready(const sx_ep *ep);

/* Tell the peers that this side is going to sleep, or that it is awake. sx_arm returns 1 if there is something to take already. */
int sx_arm(sx_ep **eps, int n);
void sx_disarm(sx_ep **eps, int n);

/* Wait until one has something to take: spin for up to spin_ns, then arm, and sleep until one of the descriptors that epoll_fd watches is
 * readable, or until timeout_ns (< 0: for ever) after the call. Drains wake_fd and the ends' own eventfds. Others that are readable (the
 * sockets) are put into fds. Returns their count (mostly 0), or -errno; a signal is no error. *slept: whether it came to sleeping. */
int sx_wait(sx_ep **eps, int n, int epoll_fd, int wake_fd, uint64_t spin_ns, int64_t timeout_ns, int *fds, int max, int *slept);

#endif
