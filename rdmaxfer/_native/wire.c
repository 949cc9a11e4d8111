#include "wire.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* zmq.h's, which need not be installed. These are part of libzmq's ABI (version 5, since 4.1). */
typedef struct {
    _Alignas(void *) unsigned char opaque[64];
} zmq_msg;
#define ZMQ_DONTWAIT 1
#define ZMQ_SNDMORE 2
#define ZMQ_EVENTS 15
#define ZMQ_POLLIN 1

struct wx_lib {
    int (*msg_init)(zmq_msg *);
    int (*msg_init_size)(zmq_msg *, size_t);
    int (*msg_init_data)(zmq_msg *, void *, size_t, void (*)(void *, void *), void *);
    int (*msg_send)(zmq_msg *, void *, int);
    int (*msg_recv)(zmq_msg *, void *, int);
    int (*msg_close)(zmq_msg *);
    void *(*msg_data)(zmq_msg *);
    size_t (*msg_size)(const zmq_msg *);
    int (*msg_more)(const zmq_msg *);
    int (*getsockopt)(void *, int, void *, size_t *);
    int (*zmq_errno)(void);
};

/* ZeroMQ's own thread counts what it lets go of, perhaps when the channel is gone. */
struct count {
    atomic_uint_fast64_t let_go;
    atomic_uint_fast64_t users;
};

struct received {
    wx_message public; /* first: they are the same pointer */
    struct wx_lib *lib;
    struct received *next;
    atomic_uint users;
    uint32_t kept;
    zmq_msg msgs[WX_PARTS];
};

struct wx_channel {
    wx_lib *lib;
    void *socket;
    uint64_t sent;
    uint64_t referred;
    struct count *count;
    struct received *first, *last;
    struct received *partial; /* the rest of it has not come */
    uint64_t consumed;
    int here;
};

wx_lib *wx_open(const char *path, char *message, size_t size) {
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        const char *reason = dlerror();
        snprintf(message, size, "%s", reason ? reason : path);
        return NULL;
    }
    wx_lib *lib = calloc(1, sizeof *lib);
    if (!lib) {
        snprintf(message, size, "out of memory");
        return NULL;
    }
    const struct {
        void *slot;
        const char *symbol;
    } symbols[] = {
        {&lib->msg_init, "zmq_msg_init"},           {&lib->msg_init_size, "zmq_msg_init_size"},
        {&lib->msg_init_data, "zmq_msg_init_data"}, {&lib->msg_send, "zmq_msg_send"},
        {&lib->msg_recv, "zmq_msg_recv"},           {&lib->msg_close, "zmq_msg_close"},
        {&lib->msg_data, "zmq_msg_data"},           {&lib->msg_size, "zmq_msg_size"},
        {&lib->msg_more, "zmq_msg_more"},           {&lib->getsockopt, "zmq_getsockopt"},
        {&lib->zmq_errno, "zmq_errno"},
    };
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        void *address = dlsym(handle, symbols[i].symbol); /* also in what it is linked with */
        if (!address) {
            snprintf(message, size, "%s has no %s", path, symbols[i].symbol);
            free(lib);
            dlclose(handle);
            return NULL;
        }
        memcpy(symbols[i].slot, &address, sizeof address);
    }
    return lib;
}

static void leave(struct count *count) {
    if (atomic_fetch_sub(&count->users, 1) == 1)
        free(count);
}

wx_channel *wx_new(wx_lib *lib, void *socket) {
    wx_channel *channel = calloc(1, sizeof *channel);
    struct count *count = calloc(1, sizeof *count);
    if (!channel || !count) {
        free(channel);
        free(count);
        return NULL;
    }
    atomic_init(&count->users, 1);
    channel->lib = lib;
    channel->socket = socket;
    channel->count = count;
    return channel;
}

void wx_free(wx_channel *channel) {
    if (!channel)
        return;
    wx_consume(channel, channel->consumed + (uint64_t)channel->here);
    if (channel->partial)
        wx_release(&channel->partial->public);
    leave(channel->count);
    free(channel);
}

/* --- sending ----------------------------------------------------------------------------------------------------- */

static void on_let_go(void *data, void *hint) {
    struct count *count = hint;
    (void)data;
    atomic_fetch_add(&count->let_go, 1);
    leave(count);
}

static int send_it(wx_channel *channel, zmq_msg *msg, int flags) {
    wx_lib *lib = channel->lib;
    int error = 0;
    do {
        if (lib->msg_send(msg, channel->socket, flags) >= 0)
            return 1;
        error = lib->zmq_errno();
    } while (error == EINTR);
    lib->msg_close(msg);
    return -error;
}

static int send_copy(wx_channel *channel, const void *data, size_t bytes, int flags) {
    zmq_msg msg;
    wx_lib *lib = channel->lib;
    if (lib->msg_init_size(&msg, bytes))
        return -ENOMEM;
    if (bytes)
        memcpy(lib->msg_data(&msg), data, bytes);
    return send_it(channel, &msg, flags);
}

static int send_by_ref(wx_channel *channel, void *data, size_t bytes) {
    zmq_msg msg;
    wx_lib *lib = channel->lib;
    atomic_fetch_add(&channel->count->users, 1);
    if (lib->msg_init_data(&msg, data, bytes, on_let_go, channel->count)) {
        leave(channel->count);
        return -ENOMEM;
    }
    channel->referred++; /* also if it fails: closing lets go of it, too */
    return send_it(channel, &msg, ZMQ_DONTWAIT);
}

int wx_send(wx_channel *channel, const void *to, size_t to_bytes, const void *small, size_t small_bytes, void *payload,
            size_t payload_bytes, int by_ref) {
    int rc = 1;
    if (to && small)
        rc = send_copy(channel, to, to_bytes, ZMQ_DONTWAIT | ZMQ_SNDMORE);
    if (rc == -EAGAIN)
        return 0;
    if (rc > 0 && small)
        rc = send_copy(channel, small, small_bytes, ZMQ_DONTWAIT | (payload ? ZMQ_SNDMORE : 0));
    if (!to && rc == -EAGAIN)
        return 0;
    if (rc > 0 && payload)
        rc = by_ref ? send_by_ref(channel, payload, payload_bytes)
                    : send_copy(channel, payload, payload_bytes, ZMQ_DONTWAIT);
    if (rc > 0)
        channel->sent++;
    return rc;
}

uint64_t wx_sent(const wx_channel *channel) { return channel->sent; }

uint64_t wx_referred(const wx_channel *channel) { return channel->referred; }

uint64_t wx_let_go(const wx_channel *channel) { return atomic_load(&channel->count->let_go); }

/* --- receiving --------------------------------------------------------------------------------------------------- */

wx_message *wx_hold(wx_message *message) {
    struct received *received = (struct received *)message;
    atomic_fetch_add(&received->users, 1);
    return message;
}

void wx_release(wx_message *message) {
    struct received *received = (struct received *)message;
    if (!received || atomic_fetch_sub(&received->users, 1) != 1)
        return;
    for (uint32_t i = 0; i < received->kept; i++)
        received->lib->msg_close(&received->msgs[i]);
    free(received);
}

/* One more part. 1: the message is whole; 0: it is not; else a negative errno. */
static int recv_part(wx_channel *channel) {
    wx_lib *lib = channel->lib;
    zmq_msg msg;
    lib->msg_init(&msg);
    if (lib->msg_recv(&msg, channel->socket, ZMQ_DONTWAIT) < 0) {
        int error = lib->zmq_errno();
        lib->msg_close(&msg);
        return -error;
    }
    int more = lib->msg_more(&msg);
    struct received *received = channel->partial;
    if (!received) {
        received = calloc(1, sizeof *received);
        if (!received) {
            lib->msg_close(&msg);
            return -ENOMEM;
        }
        received->lib = lib;
        atomic_init(&received->users, 1);
        channel->partial = received;
    }
    if (received->kept < WX_PARTS) {
        zmq_msg *kept = &received->msgs[received->kept];
        *kept = msg; /* libzmq lets messages be moved in memory: zmq_msg_move copies these bytes, too */
        received->public.data[received->kept] = lib->msg_data(kept);
        received->public.bytes[received->kept] = lib->msg_size(kept);
        received->kept++;
    } else {
        lib->msg_close(&msg);
    }
    received->public.parts++;
    return !more;
}

int wx_fetch(wx_channel *channel, int max) {
    while (channel->here < max) {
        int rc = recv_part(channel);
        if (rc == -EAGAIN || rc == -EINTR)
            break;
        if (rc < 0)
            return channel->here ? channel->here : rc;
        if (rc == 0)
            continue;
        struct received *whole = channel->partial;
        channel->partial = NULL;
        if (channel->last)
            channel->last->next = whole;
        else
            channel->first = whole;
        channel->last = whole;
        channel->here++;
    }
    return channel->here < max ? channel->here : max;
}

wx_message *wx_at(wx_channel *channel, int index) {
    struct received *each = channel->first;
    while (each && index-- > 0)
        each = each->next;
    return each ? &each->public : NULL;
}

void wx_consume(wx_channel *channel, uint64_t total) {
    while (channel->first && channel->consumed < total) {
        struct received *first = channel->first;
        channel->first = first->next;
        if (!channel->first)
            channel->last = NULL;
        channel->here--;
        channel->consumed++;
        wx_release(&first->public);
    }
}

uint64_t wx_consumed(const wx_channel *channel) { return channel->consumed; }

int wx_readable(wx_channel *channel) {
    int events = 0;
    size_t size = sizeof events;
    return channel->lib->getsockopt(channel->socket, ZMQ_EVENTS, &events, &size) == 0 && (events & ZMQ_POLLIN);
}
