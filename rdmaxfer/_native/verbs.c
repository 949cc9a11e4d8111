#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* dlvsym, pipe2, ppoll */
#endif
#include "verbs.h"
#include "spin.h"

#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BATCH 64                 /* work requests per doorbell, and completions per poll: what fits well on a stack */
#define MAX_SGE 2                /* header, payload */
#define RECV_BIT (1ULL << 63)    /* a failed completion has no opcode: wr_id tells RECVs from the rest */
#define LANE_SHIFT 60            /* and which queue pair it belongs to */
#define OWN_BITS ((1ULL << LANE_SHIFT) - 1)
#define SPINS_PER_CLOCK 8

struct rx_lib {
    struct ibv_comp_channel *(*create_comp_channel)(struct ibv_context *);
    int (*destroy_comp_channel)(struct ibv_comp_channel *);
    struct ibv_cq *(*create_cq)(struct ibv_context *, int, void *, struct ibv_comp_channel *, int);
    int (*destroy_cq)(struct ibv_cq *);
    struct ibv_qp *(*create_qp)(struct ibv_pd *, struct ibv_qp_init_attr *);
    int (*modify_qp)(struct ibv_qp *, struct ibv_qp_attr *, int);
    int (*destroy_qp)(struct ibv_qp *);
    int (*get_cq_event)(struct ibv_comp_channel *, struct ibv_cq **, void **);
    void (*ack_cq_events)(struct ibv_cq *, unsigned int);
    int (*fork_init)(void);
    int (*get_async_event)(struct ibv_context *, struct ibv_async_event *);
    void (*ack_async_event)(struct ibv_async_event *);
};

struct rx_ep {
    rx_lib *lib;
    struct ibv_comp_channel *channel;
    struct ibv_cq *cq;
    struct ibv_qp *qps[RX_MAX_LANES];
    uint32_t lanes;
    uint32_t receives; /* atomic */
    int armed;         /* a notification was asked for and its event not yet read; only rx_wait touches it */
    int gone;          /* the device was removed: no notification will come any more; only rx_wait touches it */
};

/* Many verbs return a positive errno, some -1 with errno set, some drivers a negative errno. */
static int fail(rx_error *error, const char *verb, int code) {
    if (code < 0)
        code = -code;
    if (code == 0)
        code = EIO;
    if (error) {
        snprintf(error->verb, sizeof error->verb, "%s", verb);
        error->err = code;
    }
    return -code;
}

/* --- library ---------------------------------------------------------------------------------------------------- */

/* Plain dlsym could give the IBVERBS_1.0 entry points, which take other structures. */
static int resolve(void *handle, void *slot, const char *symbol, const char *version) {
    void *address = NULL;
#ifdef __GLIBC__
    address = dlvsym(handle, symbol, version);
#else
    (void)version;
#endif
    if (!address)
        address = dlsym(handle, symbol);
    memcpy(slot, &address, sizeof address); /* ISO C has no cast from void * to a function pointer */
    return address != NULL;
}

rx_lib *rx_open(const char *path, char *message, size_t size) {
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        const char *reason = dlerror();
        snprintf(message, size, "%s", reason ? reason : path);
        return NULL;
    }
    rx_lib *lib = calloc(1, sizeof *lib);
    if (!lib) {
        snprintf(message, size, "out of memory");
        return NULL;
    }
    const struct {
        void *slot;
        const char *symbol, *version;
    } symbols[] = {
        {&lib->create_comp_channel, "ibv_create_comp_channel", "IBVERBS_1.0"},
        {&lib->destroy_comp_channel, "ibv_destroy_comp_channel", "IBVERBS_1.0"},
        {&lib->create_cq, "ibv_create_cq", "IBVERBS_1.1"},
        {&lib->destroy_cq, "ibv_destroy_cq", "IBVERBS_1.1"},
        {&lib->create_qp, "ibv_create_qp", "IBVERBS_1.1"},
        {&lib->modify_qp, "ibv_modify_qp", "IBVERBS_1.1"},
        {&lib->destroy_qp, "ibv_destroy_qp", "IBVERBS_1.1"},
        {&lib->get_cq_event, "ibv_get_cq_event", "IBVERBS_1.1"},
        {&lib->ack_cq_events, "ibv_ack_cq_events", "IBVERBS_1.1"},
        {&lib->fork_init, "ibv_fork_init", "IBVERBS_1.1"},
        {&lib->get_async_event, "ibv_get_async_event", "IBVERBS_1.1"},
        {&lib->ack_async_event, "ibv_ack_async_event", "IBVERBS_1.1"},
    };
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        if (!resolve(handle, symbols[i].slot, symbols[i].symbol, symbols[i].version)) {
            snprintf(message, size, "%s has no %s", path, symbols[i].symbol);
            free(lib);
            dlclose(handle);
            return NULL;
        }
    }
    return lib;
}

int rx_fork_init(rx_lib *lib, rx_error *error) {
    int rc = lib->fork_init();
    return rc ? fail(error, "ibv_fork_init", rc) : 0;
}

/* --- queue pairs ------------------------------------------------------------------------------------------------ */

int rx_ep_destroy(rx_ep *e, rx_error *error) {
    int rc;
    if (!e)
        return 0;
    for (; e->lanes; e->lanes--) {
        rc = e->lib->destroy_qp(e->qps[e->lanes - 1]);
        if (rc && rc != EIO) /* EIO: the device was removed, and the kernel has destroyed what was on it */
            return fail(error, "ibv_destroy_qp", rc);
    }
    if (e->cq) { /* every event was acknowledged when it was read: ibv_destroy_cq does not block */
        rc = e->lib->destroy_cq(e->cq);
        if (rc && rc != EIO)
            return fail(error, "ibv_destroy_cq", rc);
        e->cq = NULL;
    }
    if (e->channel) {
        int fd = e->channel->fd;
        rc = e->lib->destroy_comp_channel(e->channel);
        if (rc == EBUSY) /* libibverbs still counts a CQ that the kernel has destroyed */
            close(fd);
        else if (rc)
            return fail(error, "ibv_destroy_comp_channel", rc);
    }
    free(e);
    return 0;
}

int rx_ep_create(rx_lib *lib, void *pd_pointer, uint32_t lanes, rx_caps *caps, rx_ep **out, rx_error *error) {
    struct ibv_pd *pd = pd_pointer;
    const char *verb;
    int code;
    *out = NULL;
    if (lanes < 1 || lanes > RX_MAX_LANES)
        return fail(error, "ibv_create_qp", EINVAL);
    rx_ep *e = calloc(1, sizeof *e);
    if (!e)
        return fail(error, "calloc", ENOMEM);
    e->lib = lib;

    verb = "ibv_create_comp_channel";
    e->channel = lib->create_comp_channel(pd->context);
    if (!e->channel)
        goto failed;
    verb = "fcntl";
    int flags = fcntl(e->channel->fd, F_GETFL);
    if (flags < 0 || fcntl(e->channel->fd, F_SETFL, flags | O_NONBLOCK) < 0)
        goto failed;
    verb = "ibv_create_cq";
    e->cq = lib->create_cq(pd->context, (int)caps->cqe, NULL, e->channel, 0);
    if (!e->cq)
        goto failed;
    verb = "ibv_create_qp";
    rx_caps granted = {.cqe = (uint32_t)e->cq->cqe};
    while (e->lanes < lanes) {
        struct ibv_qp_init_attr attr = {
            .send_cq = e->cq,
            .recv_cq = e->cq,
            .qp_type = IBV_QPT_RC,
            .cap = {.max_send_wr = caps->send_wr + 1,
                    .max_recv_wr = caps->recv_wr,
                    .max_send_sge = MAX_SGE,
                    .max_recv_sge = 1,
                    .max_inline_data = caps->max_inline},
        };
        struct ibv_qp *qp = lib->create_qp(pd, &attr);
        if (!qp)
            goto failed;
        e->qps[e->lanes++] = qp;
        granted.send_wr = attr.cap.max_send_wr - 1;
        granted.recv_wr = attr.cap.max_recv_wr;
        granted.max_inline = attr.cap.max_inline_data;
    }
    *caps = granted;
    *out = e;
    return 0;

failed:
    code = errno;
    rx_ep_destroy(e, NULL);
    return fail(error, verb, code);
}

static int modify(rx_ep *e, uint32_t lane, struct ibv_qp_attr *attr, int mask, const char *what, rx_error *error) {
    int rc = lane < e->lanes ? e->lib->modify_qp(e->qps[lane], attr, mask | IBV_QP_STATE) : EINVAL;
    return rc ? fail(error, what, rc == -1 ? errno : rc) : 0;
}

int rx_ep_to_init(rx_ep *e, uint32_t lane, uint32_t port_num, uint32_t access, rx_error *error) {
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_INIT,
        .pkey_index = 0,
        .port_num = (uint8_t)port_num,
        .qp_access_flags = access & RX_REMOTE_WRITE ? IBV_ACCESS_REMOTE_WRITE : 0,
    };
    return modify(e, lane, &attr, IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS, "ibv_modify_qp(INIT)", error);
}

static int mtu_of(uint32_t bytes, enum ibv_mtu *mtu) {
    switch (bytes) {
    case 256: *mtu = IBV_MTU_256; return 0;
    case 512: *mtu = IBV_MTU_512; return 0;
    case 1024: *mtu = IBV_MTU_1024; return 0;
    case 2048: *mtu = IBV_MTU_2048; return 0;
    case 4096: *mtu = IBV_MTU_4096; return 0;
    default: return -1;
    }
}

int rx_ep_to_rtr(rx_ep *e, uint32_t lane, const rx_path *path, rx_error *error) {
    const char *what = "ibv_modify_qp(RTR)";
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_RTR,
        .dest_qp_num = path->dest_qp_num & 0xffffff,
        .rq_psn = path->rq_psn & 0xffffff,
        .max_dest_rd_atomic = (uint8_t)path->max_dest_rd_atomic,
        .min_rnr_timer = (uint8_t)(path->min_rnr_timer & 31),
        .ah_attr = {.dlid = (uint16_t)path->dlid,
                    .sl = (uint8_t)(path->sl & 15),
                    .port_num = (uint8_t)path->port_num,
                    .is_global = path->is_global != 0},
    };
    if (mtu_of(path->path_mtu, &attr.path_mtu))
        return fail(error, what, EINVAL);
    if (path->is_global) {
        memcpy(attr.ah_attr.grh.dgid.raw, path->dgid, sizeof path->dgid);
        attr.ah_attr.grh.sgid_index = (uint8_t)path->sgid_index;
        if (path->sgid_index > UINT8_MAX) /* the structure has 8 bits for it, tables may be longer */
            return fail(error, what, EINVAL);
        attr.ah_attr.grh.hop_limit = (uint8_t)path->hop_limit;
        attr.ah_attr.grh.traffic_class = (uint8_t)path->traffic_class;
    }
    return modify(e, lane, &attr,
                  IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
                      IBV_QP_MIN_RNR_TIMER,
                  what, error);
}

int rx_ep_to_rts(rx_ep *e, uint32_t lane, const rx_retry *retry, rx_error *error) {
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_RTS,
        .sq_psn = retry->sq_psn & 0xffffff,
        .timeout = (uint8_t)(retry->timeout & 31),
        .retry_cnt = (uint8_t)(retry->retry_cnt & 7),
        .rnr_retry = (uint8_t)(retry->rnr_retry & 7),
        .max_rd_atomic = (uint8_t)retry->max_rd_atomic,
    };
    return modify(e, lane, &attr,
                  IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC,
                  "ibv_modify_qp(RTS)", error);
}

int rx_ep_to_err(rx_ep *e, uint32_t lane, rx_error *error) {
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};
    return modify(e, lane, &attr, 0, "ibv_modify_qp(ERR)", error);
}

uint32_t rx_ep_qp_num(const rx_ep *e, uint32_t lane) { return lane < e->lanes ? e->qps[lane]->qp_num : 0; }

uint32_t rx_ep_receives(const rx_ep *e) { return __atomic_load_n(&e->receives, __ATOMIC_RELAXED); }

int rx_ep_fd(const rx_ep *e) { return e->channel->fd; }

/* --- posting ---------------------------------------------------------------------------------------------------- */

static uint64_t lane_bits(uint32_t lane) { return (uint64_t)lane << LANE_SHIFT; }

static int fill_send(const rx_send_wr *in, uint32_t lane, struct ibv_send_wr *wr, struct ibv_sge *sge) {
    static const enum ibv_wr_opcode opcodes[] = {
        [RX_WRITE] = IBV_WR_RDMA_WRITE, [RX_WRITE_IMM] = IBV_WR_RDMA_WRITE_WITH_IMM, [RX_SEND] = IBV_WR_SEND};
    if (in->num_sge > MAX_SGE || in->opcode >= sizeof opcodes / sizeof *opcodes)
        return -1;
    memset(wr, 0, sizeof *wr);
    for (uint32_t i = 0; i < in->num_sge; i++)
        sge[i] = (struct ibv_sge){.addr = in->addr[i], .length = in->length[i], .lkey = in->lkey[i]};
    wr->wr_id = (in->wr_id & OWN_BITS) | lane_bits(lane);
    wr->sg_list = sge;
    wr->num_sge = (int)in->num_sge;
    wr->opcode = opcodes[in->opcode];
    wr->send_flags = (in->flags & RX_SIGNALED ? (unsigned)IBV_SEND_SIGNALED : 0u) |
                     (in->flags & RX_INLINE ? (unsigned)IBV_SEND_INLINE : 0u) |
                     (in->flags & RX_SOLICITED ? (unsigned)IBV_SEND_SOLICITED : 0u);
    wr->imm_data = htonl(in->imm);
    if (in->opcode != RX_SEND) {
        wr->wr.rdma.remote_addr = in->remote_addr;
        wr->wr.rdma.rkey = in->rkey;
    }
    return 0;
}

/* How many of a chain of n a failed post left with the device. Where a provider queues the whole chain and only its
 * doorbell fails (rxe), it sets no bad_wr: all n may still be carried out. */
static int taken(const void *chain, const void *bad, size_t each, int n) {
    if (!bad)
        return n;
    ptrdiff_t distance = (const char *)bad - (const char *)chain;
    return distance < 0 || (size_t)distance >= each * (size_t)n ? n : (int)((size_t)distance / each);
}

int rx_post_send(rx_ep *e, uint32_t lane, const rx_send_wr *wrs, int n, int *posted, rx_error *error) {
    struct ibv_send_wr chain[BATCH];
    struct ibv_sge sges[BATCH][MAX_SGE];
    *posted = 0;
    if (lane >= e->lanes)
        return fail(error, "ibv_post_send", EINVAL);
    while (*posted < n) {
        int count = n - *posted < BATCH ? n - *posted : BATCH;
        for (int i = 0; i < count; i++) {
            if (fill_send(&wrs[*posted + i], lane, &chain[i], sges[i]))
                return fail(error, "ibv_post_send", EINVAL); /* nothing of this batch was posted */
            chain[i].next = i + 1 < count ? &chain[i + 1] : NULL;
        }
        struct ibv_send_wr *bad = NULL;
        int rc = ibv_post_send(e->qps[lane], chain, &bad);
        if (rc) {
            *posted += taken(chain, bad, sizeof *chain, count);
            return fail(error, "ibv_post_send", rc == -1 ? errno : rc);
        }
        *posted += count;
    }
    return 0;
}

int rx_post_chain(rx_ep *e, uint32_t lane, const rx_send_wr *wrs, int n, int *done, rx_error *error) {
    int posted = 0, rc = 0;
    if (*done < n)
        rc = rx_post_send(e, lane, wrs + *done, n - *done, &posted, error);
    *done += posted;
    return rc;
}

int rx_post_recv(rx_ep *e, uint32_t lane, const rx_recv_wr *wrs, int n, int *posted, rx_error *error) {
    struct ibv_recv_wr chain[BATCH];
    struct ibv_sge sges[BATCH];
    *posted = 0;
    if (lane >= e->lanes)
        return fail(error, "ibv_post_recv", EINVAL);
    while (*posted < n) {
        int count = n - *posted < BATCH ? n - *posted : BATCH;
        for (int i = 0; i < count; i++) {
            const rx_recv_wr *in = &wrs[*posted + i];
            sges[i] = (struct ibv_sge){.addr = in->addr, .length = in->length, .lkey = in->lkey};
            chain[i] = (struct ibv_recv_wr){
                .wr_id = (in->wr_id & OWN_BITS) | lane_bits(lane) | RECV_BIT,
                .next = i + 1 < count ? &chain[i + 1] : NULL,
                .sg_list = in->length ? &sges[i] : NULL,
                .num_sge = in->length ? 1 : 0,
            };
        }
        struct ibv_recv_wr *bad = NULL;
        /* counted first: another thread may poll a completion before the post returns */
        __atomic_add_fetch(&e->receives, (uint32_t)count, __ATOMIC_RELAXED);
        int rc = ibv_post_recv(e->qps[lane], chain, &bad);
        if (rc) {
            int done = taken(chain, bad, sizeof *chain, count);
            __atomic_sub_fetch(&e->receives, (uint32_t)(count - done), __ATOMIC_RELAXED);
            *posted += done;
            return fail(error, "ibv_post_recv", rc == -1 ? errno : rc);
        }
        *posted += count;
    }
    return 0;
}

/* --- completions ------------------------------------------------------------------------------------------------ */

static int poll_one(rx_ep *e, uint32_t index, rx_wc *out, int max, rx_error *error) {
    struct ibv_wc wcs[BATCH];
    int got = 0;
    while (got < max) {
        int want = max - got < BATCH ? max - got : BATCH;
        int n = ibv_poll_cq(e->cq, want, wcs);
        if (n < 0)
            return got ? got : fail(error, "ibv_poll_cq", n == -1 ? EIO : n); /* the next poll fails again */
        uint32_t receives = 0;
        for (int i = 0; i < n; i++) {
            const struct ibv_wc *wc = &wcs[i];
            int good = wc->status == IBV_WC_SUCCESS, recv = (wc->wr_id & RECV_BIT) != 0;
            int has_imm = good && (wc->wc_flags & IBV_WC_WITH_IMM);
            receives += (uint32_t)recv;
            out[got++] = (rx_wc){
                .wr_id = wc->wr_id & OWN_BITS,
                .status = wc->status,
                .opcode = good ? wc->opcode : 0,
                .byte_len = good ? wc->byte_len : 0,
                .imm = has_imm ? ntohl(wc->imm_data) : 0,
                .has_imm = (uint32_t)has_imm,
                .vendor_err = wc->vendor_err,
                .index = index,
                .is_recv = (uint32_t)recv,
                .lane = (uint32_t)((wc->wr_id & ~RECV_BIT) >> LANE_SHIFT),
            };
        }
        if (receives)
            __atomic_sub_fetch(&e->receives, receives, __ATOMIC_RELAXED);
        if (n < want)
            break;
    }
    return got;
}

static int poll_all(rx_ep **eps, int n, int first, rx_wc *out, int max, rx_error *error) {
    int got = 0;
    for (int i = 0; i < n && got < max; i++) {
        int index = (int)(((unsigned)first + (unsigned)i) % (unsigned)n);
        int rc = poll_one(eps[index], (uint32_t)index, out + got, max - got, error);
        if (rc < 0)
            return got ? got : rc;
        got += rc;
    }
    return got;
}

/* An armed CQ whose event has not been read needs no second system call: its event is in the channel, or will be. */
static int arm_all(rx_ep **eps, int n, rx_error *error) {
    for (int i = 0; i < n; i++) {
        if (eps[i]->armed || eps[i]->gone)
            continue;
        int rc = ibv_req_notify_cq(eps[i]->cq, 0);
        if (rc == EIO) {
            eps[i]->gone = 1;
            continue;
        }
        if (rc)
            return fail(error, "ibv_req_notify_cq", rc == -1 ? errno : rc);
        eps[i]->armed = 1;
    }
    return 0;
}

static int take_event(rx_ep *e, rx_error *error) {
    struct ibv_cq *cq;
    void *context;
    if (e->lib->get_cq_event(e->channel, &cq, &context)) {
        if (errno == EIO) { /* the device was removed since ppoll(2) */
            e->gone = 1;
            return 0;
        }
        return errno == EAGAIN || errno == EINTR ? 0 : fail(error, "ibv_get_cq_event", errno);
    }
    e->lib->ack_cq_events(cq, 1);
    e->armed = 0;
    return 0;
}

/* 1: look at the CQs (again); 0: the wait is over; < 0: an error. */
static int sleep_once(rx_ep **eps, int n, int wake_fd, struct pollfd *fds, const struct timespec *left, rx_error *error) {
    for (int i = 0; i < n; i++)
        fds[i] = (struct pollfd){.fd = eps[i]->gone ? -1 : eps[i]->channel->fd, .events = POLLIN};
    fds[n] = (struct pollfd){.fd = wake_fd, .events = POLLIN}; /* poll(2) skips a negative fd */
    int ready = ppoll(fds, (nfds_t)n + 1, left, NULL);
    if (ready < 0)
        return errno == EINTR ? 0 : fail(error, "ppoll", errno);
    if (ready == 0)
        return 0;
    for (int i = 0; i < n; i++) {
        if (fds[i].revents & POLLIN) {
            int rc = take_event(eps[i], error);
            if (rc)
                return rc;
        } else if (fds[i].revents) { /* POLLERR, POLLHUP: the device was removed; an asynchronous event says so, too */
            eps[i]->gone = 1;
        }
    }
    if (fds[n].revents & POLLIN) {
        uint64_t count;
        /* EINVAL: it is an epoll set, whose members the caller looks at */
        if (read(wake_fd, &count, sizeof count) < 0 && errno != EAGAIN && errno != EINTR && errno != EINVAL)
            return fail(error, "read(wake_fd)", errno);
        return 0;
    }
    return fds[n].revents ? fail(error, "poll(wake_fd)", EBADF) : 1;
}

static int wait_all(rx_ep **eps, int n, int first, int wake_fd, uint64_t spin_ns, int64_t timeout_ns, rx_wc *out,
                    int max, int *slept, rx_error *error) {
    struct pollfd few[BATCH + 1], *fds = few;
    int got = poll_all(eps, n, first, out, max, error);
    if (got || timeout_ns == 0 || max <= 0)
        return got;
    uint64_t start = 0, elapsed = 0; /* the clock is read only if needed: on some kernels that is a system call */
    uint64_t limit = timeout_ns < 0 ? UINT64_MAX : (uint64_t)timeout_ns;
    if (spin_ns > limit)
        spin_ns = limit;
    if (spin_ns)
        start = now_ns();
    while (n > 0 && elapsed < spin_ns) {
        for (int i = 0; i < SPINS_PER_CLOCK; i++) {
            relax();
            got = poll_all(eps, n, first, out, max, error);
            if (got)
                return got;
        }
        sched_yield(); /* whoever is to do what is waited for may need this very CPU */
        elapsed = now_ns() - start;
    }
    if (n > BATCH) {
        fds = malloc(((size_t)n + 1) * sizeof *fds);
        if (!fds)
            return fail(error, "malloc", ENOMEM);
    }
    for (int more = 1, woken = 0; more > 0; woken = 1) {
        got = arm_all(eps, n, error);
        if (!got)
            got = poll_all(eps, n, first, out, max, error); /* what came before the CQ was armed makes no event */
        if (got)
            break;
        if (timeout_ns >= 0 && start)
            elapsed = now_ns() - start;
        else if (timeout_ns >= 0 && woken)
            start = now_ns(); /* woken for nothing; the time until then is not counted */
        if (elapsed >= limit)
            break;
        *slept = 1;
        uint64_t rest = limit - elapsed;
        struct timespec left = {.tv_sec = (time_t)(rest / 1000000000u), .tv_nsec = (long)(rest % 1000000000u)};
        more = sleep_once(eps, n, wake_fd, fds, timeout_ns < 0 ? NULL : &left, error);
        /* Before arming again, which is a system call; nor does a wake or a timeout lose what came at the same moment. */
        got = more < 0 ? more : poll_all(eps, n, first, out, max, error);
        if (got)
            break;
    }
    if (fds != few)
        free(fds);
    return got;
}

/* The count is also stored: where the caller's return is lost (a signal handler that raises), the completions are not. */
int rx_poll(rx_ep **eps, int n, int first, rx_wc *out, int max, int *taken, rx_error *error) {
    int got = poll_all(eps, n, first, out, max, error);
    *taken = got > 0 ? got : 0;
    return got;
}

int rx_wait(rx_ep **eps, int n, int first, int wake_fd, uint64_t spin_ns, int64_t timeout_ns, rx_wc *out, int max,
            int *taken, int *slept, rx_error *error) {
    *slept = 0;
    int got = wait_all(eps, n, first, wake_fd, spin_ns, timeout_ns, out, max, slept, error);
    *taken = got > 0 ? got : 0;
    return got;
}

/* --- asynchronous events ---------------------------------------------------------------------------------------- */

void *rx_context(void *pd) { return ((struct ibv_pd *)pd)->context; }

int rx_async_fd(void *context, rx_error *error) {
    int fd = ((struct ibv_context *)context)->async_fd;
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return fail(error, "fcntl", errno);
    return fd;
}

int rx_async_get(rx_lib *lib, void *context, rx_async *out, rx_error *error) {
    struct ibv_async_event event;
    if (lib->get_async_event(context, &event))
        return errno == EAGAIN || errno == EINTR ? 0 : fail(error, "ibv_get_async_event", errno);
    *out = (rx_async){.type = event.event_type};
    switch (event.event_type) {
    case IBV_EVENT_QP_FATAL:
    case IBV_EVENT_QP_REQ_ERR:
    case IBV_EVENT_QP_ACCESS_ERR:
    case IBV_EVENT_COMM_EST:
    case IBV_EVENT_SQ_DRAINED:
    case IBV_EVENT_PATH_MIG:
    case IBV_EVENT_PATH_MIG_ERR:
    case IBV_EVENT_QP_LAST_WQE_REACHED:
        out->scope = RX_OF_QP;
        out->qp_num = event.element.qp->qp_num;
        break;
    case IBV_EVENT_CQ_ERR:
        out->scope = RX_OF_CQ;
        out->cq = (uint64_t)(uintptr_t)event.element.cq;
        break;
    case IBV_EVENT_PORT_ACTIVE:
    case IBV_EVENT_PORT_ERR:
    case IBV_EVENT_LID_CHANGE:
    case IBV_EVENT_PKEY_CHANGE:
    case IBV_EVENT_SM_CHANGE:
    case IBV_EVENT_CLIENT_REREGISTER:
    case IBV_EVENT_GID_CHANGE:
        out->scope = RX_OF_PORT;
        out->port_num = (uint32_t)event.element.port_num;
        break;
    default:
        out->scope = RX_OF_DEVICE;
    }
    lib->ack_async_event(&event); /* what destroys a QP or CQ waits for this */
    return 1;
}

uint64_t rx_ep_cq(const rx_ep *e) { return (uint64_t)(uintptr_t)e->cq; }

/* --- looking before leaping ------------------------------------------------------------------------------------- */

int rx_read_safely(uint64_t address, void *out, size_t n) {
    int fds[2], rc = 0;
    if (n > 4096) /* PIPE_BUF: written as a whole or not at all */
        return -EINVAL;
    if (pipe2(fds, O_CLOEXEC | O_NONBLOCK))
        return -errno;
    ssize_t done = write(fds[1], (const void *)(uintptr_t)address, n);
    if (done < 0)
        rc = -errno;
    else if ((size_t)done != n || read(fds[0], out, n) != (ssize_t)n)
        rc = -EFAULT;
    close(fds[0]);
    close(fds[1]);
    return rc;
}

size_t rx_context_cmd_fd_offset(void) { return offsetof(struct ibv_context, cmd_fd); }
