/* rdmaxfer.h: a C or C++ program fills frames in memory of a Python process, which sends them on with rdmaxfer, without a copy.
 *
 *     Python:                                              C:
 *     sender = rdmaxfer.Sender()                           rdmaxfer_ring *ring;
 *     sender.bind("tcp://0.0.0.0:7471")                    rdmaxfer_attach(RDMAXFER_ABI, "camera", 5000, &ring);
 *     with sender.intake("camera", slot_bytes=8 << 20):    while (...) {
 *         ...                                                  rdmaxfer_slot slot;
 *                                                              rdmaxfer_reserve(ring, 1000, &slot);
 *                                                              fill(slot.data);
 *                                                              rdmaxfer_publish(ring, &slot, &frame);
 *                                                          }
 *                                                          rdmaxfer_detach(ring);
 *
 * Build: cc capture.c $(rdmaxfer config --cflags --libs). Or dlopen(3) what `rdmaxfer config --library` prints, and look up what you
 * need with dlsym(3). The library needs nothing but the C library.
 *
 * - Functions return 0, or a negative errno(3) value; rdmaxfer_error() says in words what went wrong, and what to do.
 * - Timeouts are milliseconds: 0 does not wait, a negative one waits for ever. A signal ends a wait with -EINTR.
 * - A ring is for one thread at a time, and not for a child made by fork(2).
 * - Both programs must run on one machine, as the same user (and in the same network namespace: with containers, --network host).
 */
#ifndef RDMAXFER_H
#define RDMAXFER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RDMAXFER_ABI 1 /* of this header: changed whenever anything in it is in an incompatible way */
#define RDMAXFER_MAX_DIMS 8
#define RDMAXFER_MAX_DTYPE 63      /* characters */
#define RDMAXFER_MAX_METADATA 4096 /* bytes */

typedef struct rdmaxfer_ring rdmaxfer_ring;

typedef struct {
    void *data;      /* where to put the frame: page-aligned, writable until it is published or discarded */
    size_t bytes;    /* how much room there is */
    uint32_t number; /* which slot; not to be changed */
} rdmaxfer_slot;

/* What lies in a slot, from its first byte on, in C order. Set what you don't use to 0: rdmaxfer_frame frame = {0}; */
typedef struct {
    const char *dtype;  /* as numpy writes it: "u1", "<u2", "<f4", ... */
    uint32_t ndim;      /* up to RDMAXFER_MAX_DIMS */
    uint64_t shape[RDMAXFER_MAX_DIMS];
    int64_t captured_ns;  /* nanoseconds since 1970; 0: not known */
    const char *metadata; /* a JSON object, such as {"exposure_s": 0.01}; NULL: none */
} rdmaxfer_frame;

/* The ABI of the library, if it was opened with dlopen: it must be RDMAXFER_ABI. */
uint32_t rdmaxfer_abi(void);

/* What went wrong in the call of this thread that failed last. Valid until the next one that does. */
const char *rdmaxfer_error(void);

/* Attach to the intake of that name, once there is one and no other program is attached to it. `abi` is RDMAXFER_ABI.
 * -ETIMEDOUT, -EINVAL (not a name), -EPROTO (another ABI, or nothing of rdmaxfer), -EACCES (another user's), or of the system's calls. */
int rdmaxfer_attach(uint32_t abi, const char *name, int timeout_ms, rdmaxfer_ring **ring);

uint32_t rdmaxfer_slots(const rdmaxfer_ring *ring);
size_t rdmaxfer_slot_bytes(const rdmaxfer_ring *ring);

/* A slot to fill. Several may be reserved at a time. -ETIMEDOUT: all are reserved, or have frames that not all receivers have released
 * (which counts in the order of the frames), or there is no receiver; -EPIPE: the Python process has ended, or closed the intake, or
 * could not use a frame. */
int rdmaxfer_reserve(rdmaxfer_ring *ring, int timeout_ms, rdmaxfer_slot *slot);

/* Hand a filled slot over: Python sends it, in the order of these calls. It is not this program's any more, also after an error.
 * -EINVAL: the frame can't be one; -EPIPE: as above. Python finds out about the rest (an unknown dtype, say), and what comes next fails
 * with -EPIPE. What Python had taken in is sent whatever comes; whether it had, rdmaxfer_flush tells. */
int rdmaxfer_publish(rdmaxfer_ring *ring, const rdmaxfer_slot *slot, const rdmaxfer_frame *frame);

/* Give a slot back unused: the next reserve has it again. */
int rdmaxfer_discard(rdmaxfer_ring *ring, const rdmaxfer_slot *slot);

/* Wait until all receivers have released all that was published. -ETIMEDOUT, -EPIPE. */
int rdmaxfer_flush(rdmaxfer_ring *ring, int timeout_ms);

/* The end. What was published is sent all the same; slots that are reserved are lost. NULL is harmless. */
void rdmaxfer_detach(rdmaxfer_ring *ring);

#ifdef __cplusplus
}
#endif

#endif
