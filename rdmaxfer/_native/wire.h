/* A socket of ZeroMQ, used from threads that Ctrl-C can interrupt.
 *
 * pyzmq looks for signals after each call of libzmq: with Ctrl-C at that moment, a message that was received is lost, and nobody
 * knows whether one was sent. So the data of frames go by libzmq itself, which pyzmq has loaded, and what happened is counted here.
 *
 * - The socket is pyzmq's: it makes, connects and closes it. These calls are for whatever thread has the socket at that time.
 * - A message has one to three parts: its sender (at a ROUTER), a small part, and perhaps a payload.
 * - Nothing waits.
 */
#ifndef RDMAXFER_WIRE_H
#define RDMAXFER_WIRE_H

#include <stddef.h>
#include <stdint.h>

typedef struct wx_lib wx_lib;         /* libzmq's entry points; lives as long as the process */
typedef struct wx_channel wx_channel; /* one socket */

#define WX_PARTS 3

/* A message that came. */
typedef struct {
    uint32_t parts; /* how many it had; those above WX_PARTS are not kept */
    uint32_t reserved;
    const void *data[WX_PARTS];
    uint64_t bytes[WX_PARTS];
} wx_message;

/* path: of a library that is linked with libzmq. NULL, with why in `message`, if its functions are not found. */
wx_lib *wx_open(const char *path, char *message, size_t size);

wx_channel *wx_new(wx_lib *lib, void *socket);
/* After the socket was closed. Memory that was sent and that ZeroMQ still has stays counted. */
void wx_free(wx_channel *channel);

/* Send a message, or none at all if small is NULL; either way it is counted. With to == NULL it has no such part, with payload ==
 * NULL no payload. The payload is copied, or (by_ref) read where it is until wx_let_go says so. 1: done. 0: not possible just now.
 * Else a negative errno. */
int wx_send(wx_channel *channel, const void *to, size_t to_bytes, const void *small, size_t small_bytes, void *payload,
            size_t payload_bytes, int by_ref);
uint64_t wx_sent(const wx_channel *channel);
/* Payloads sent by reference, and how many of them ZeroMQ has let go of, in their order. */
uint64_t wx_referred(const wx_channel *channel);
uint64_t wx_let_go(const wx_channel *channel);

/* Take in what has come, until `max` messages are here. How many are here, or a negative errno. */
int wx_fetch(wx_channel *channel, int max);
/* The index-th of them. It is there until it is consumed, and as long as it is held. */
wx_message *wx_at(wx_channel *channel, int index);
wx_message *wx_hold(wx_message *message);
void wx_release(wx_message *message);
/* Forget those up to the total-th that ever came; wx_consumed says how many were. */
void wx_consume(wx_channel *channel, uint64_t total);
uint64_t wx_consumed(const wx_channel *channel);

/* Whether a wx_fetch would find something new. */
int wx_readable(wx_channel *channel);

#endif
