/* The native core: what Python can't do fast, or can't do without holding the interpreter.
 *
 * It lives on an ibv_pd that pyverbs opened and registered memory on, and adds a completion channel, one CQ and a few RC
 * QPs (its lanes) for each end of a connection. It holds no policy, no protocol and no global state.
 *
 * - libibverbs is opened at run time and never linked, so that one build works on machines with and without it. Its
 *   headers are needed at build time because posting and polling are inline functions over a table of pointers.
 * - Every function that can fail returns a count or 0, or a negative errno, and then says in *error which verb failed.
 * - Threads: different ends are independent. On one, posts and polls may come from any threads at once; rx_wait from
 *   one thread at a time (polls beside it are fine); create, modify and destroy exclude everything else on that end.
 * - No call allocates memory but rx_open and rx_ep_create (and rx_wait above 64 ends).
 */
#ifndef RDMAXFER_VERBS_H
#define RDMAXFER_VERBS_H

#include <stddef.h>
#include <stdint.h>

typedef struct rx_lib rx_lib; /* libibverbs' entry points; lives as long as the process */
typedef struct rx_ep rx_ep;   /* one end of a connection: completion channel + CQ + 1 to RX_MAX_LANES RC QPs */

#define RX_MAX_LANES 8

typedef struct {
    char verb[40];
    int err; /* positive errno */
} rx_error;

/* Of the CQ, and of each QP. In: wanted. Out: granted (devices round up). The send queue gets one place more than asked for, so that the last
 * work request of a drain always fits. */
typedef struct {
    uint32_t cqe;
    uint32_t send_wr;
    uint32_t recv_wr;
    uint32_t max_inline;
} rx_caps;

/* What INIT -> RTR needs to know of the peer. Numbers are in host order. */
typedef struct {
    uint32_t dest_qp_num; /* 24 bits */
    uint32_t rq_psn;      /* 24 bits */
    uint32_t path_mtu;    /* bytes: 256, 512, 1024, 2048 or 4096 */
    uint32_t port_num;
    uint32_t sgid_index;
    uint32_t is_global; /* RoCE: 1, with dgid. InfiniBand: 0, with dlid */
    uint32_t dlid;      /* 16 bits */
    uint32_t hop_limit;
    uint32_t traffic_class;
    uint32_t sl;
    uint32_t min_rnr_timer;
    uint32_t max_dest_rd_atomic;
    uint8_t dgid[16];
} rx_path;

/* What RTR -> RTS needs. */
typedef struct {
    uint32_t sq_psn; /* 24 bits */
    uint32_t timeout;
    uint32_t retry_cnt;
    uint32_t rnr_retry;
    uint32_t max_rd_atomic;
} rx_retry;

#define RX_WRITE 0
#define RX_WRITE_IMM 1
#define RX_SEND 2

#define RX_SIGNALED 1
#define RX_INLINE 2
#define RX_SOLICITED 4

#define RX_REMOTE_WRITE 1

typedef struct {
    uint64_t wr_id; /* 60 bits: the top ones belong to the core */
    uint64_t addr[2];
    uint32_t length[2];
    uint32_t lkey[2];
    uint32_t num_sge; /* 0..2 */
    uint32_t opcode;
    uint32_t flags;
    uint32_t imm; /* host order */
    uint64_t remote_addr;
    uint32_t rkey;
    uint32_t reserved;
} rx_send_wr;

typedef struct {
    uint64_t wr_id; /* 60 bits */
    uint64_t addr;
    uint32_t length; /* 0: a RECV without a buffer */
    uint32_t lkey;
} rx_recv_wr;

/* wr_id, status, vendor_err, index, lane and is_recv always hold; the others only where status is 0. */
typedef struct {
    uint64_t wr_id;
    uint32_t status;
    uint32_t opcode; /* enum ibv_wc_opcode */
    uint32_t byte_len;
    uint32_t imm; /* host order */
    uint32_t has_imm;
    uint32_t vendor_err;
    uint32_t index; /* which of the ends that were polled */
    uint32_t is_recv;
    uint32_t lane; /* and which of its QPs */
    uint32_t reserved;
} rx_wc;

/* NULL, with a sentence in message, where the library or one of its symbols is missing. */
rx_lib *rx_open(const char *path, char *message, size_t size);

/* To be called before the first registration. On kernels that copy pinned pages on fork it does nothing. */
int rx_fork_init(rx_lib *lib, rx_error *error);

int rx_ep_create(rx_lib *lib, void *pd, uint32_t lanes, rx_caps *caps, rx_ep **out, rx_error *error);
int rx_ep_to_init(rx_ep *ep, uint32_t lane, uint32_t port_num, uint32_t access, rx_error *error);
int rx_ep_to_rtr(rx_ep *ep, uint32_t lane, const rx_path *path, rx_error *error);
int rx_ep_to_rts(rx_ep *ep, uint32_t lane, const rx_retry *retry, rx_error *error);
int rx_ep_to_err(rx_ep *ep, uint32_t lane, rx_error *error);

/* Frees *ep and returns 0 (also where the device was removed, and nothing is left to destroy), or destroys what it can and returns an error: then it may be called again. */
int rx_ep_destroy(rx_ep *ep, rx_error *error);

uint32_t rx_ep_qp_num(const rx_ep *ep, uint32_t lane);
/* RECVs of all lanes that were posted and have not been polled. */
uint32_t rx_ep_receives(const rx_ep *ep);
int rx_ep_fd(const rx_ep *ep);

/* Post in order, one doorbell for each 64. *posted says how many work requests belong to the device until their
 * completion (or the QP's destruction), also when an error is returned. */
int rx_post_send(rx_ep *ep, uint32_t lane, const rx_send_wr *wrs, int n, int *posted, rx_error *error);
/* Post wrs[*done] to wrs[n - 1], and move *done on: called again after an interruption, it goes on where it was. */
int rx_post_chain(rx_ep *ep, uint32_t lane, const rx_send_wr *wrs, int n, int *done, rx_error *error);
int rx_post_recv(rx_ep *ep, uint32_t lane, const rx_recv_wr *wrs, int n, int *posted, rx_error *error);

/* Up to max completions of n ends, beginning with eps[first % n], so that a caller who moves `first` on is fair. */
int rx_poll(rx_ep **eps, int n, int first, rx_wc *out, int max, int *taken, rx_error *error);

/* The same, but if there are none: spin for up to spin_ns; then arm every CQ, look once more, and sleep on all the
 * completion channels and on wake_fd (an eventfd, an epoll set, or -1), until timeout_ns (< 0: for ever) after the call. An end whose
 * device was removed is left out from then on: rx_async_get tells of that.
 * 0 means timeout, wake (then the eventfd was drained) or a signal, whose handler runs when the caller is back in Python.
 * *slept: whether it came to sleeping. */
int rx_wait(rx_ep **eps, int n, int first, int wake_fd, uint64_t spin_ns, int64_t timeout_ns, rx_wc *out, int max,
            int *taken, int *slept, rx_error *error);

/* Which ibv_context a pd belongs to; it lives as long as pyverbs' Context is open. */
void *rx_context(void *pd);

#define RX_OF_DEVICE 0
#define RX_OF_PORT 1
#define RX_OF_QP 2
#define RX_OF_CQ 3

typedef struct {
    uint32_t type;  /* enum ibv_event_type */
    uint32_t scope; /* RX_OF_... */
    uint32_t port_num;
    uint32_t qp_num;
    uint64_t cq; /* rx_ep_cq of the end concerned */
} rx_async;

/* The file descriptor that is readable when there is an asynchronous event; non-blocking from now on. */
int rx_async_fd(void *context, rx_error *error);

/* 1: *out is the next asynchronous event, which was acknowledged; 0: there is none. */
int rx_async_get(rx_lib *lib, void *context, rx_async *out, rx_error *error);
uint64_t rx_ep_cq(const rx_ep *ep);

/* Copy n <= 4096 bytes of this process's memory: -EFAULT, not a crash, where it can't be read. */
int rx_read_safely(uint64_t address, void *out, size_t n);

/* Where struct ibv_context keeps cmd_fd: the check that a pointer really is an ibv_pd reads it. */
size_t rx_context_cmd_fd_offset(void);

#endif
