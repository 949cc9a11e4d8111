/* What rdmaxfer/intake.py and librdmaxfer_shm (attach.c) say to each other. Both run on one machine: native byte order.
 *
 * The program connects to the Unix socket (SOCK_SEQPACKET, abstract name) INTAKE_PREFIX UID/NAME, and sends its ABI, a uint32_t. When its
 * turn has come it gets a welcome, with descriptors of: the slots; the queues; the eventfd that wakes it; the one that wakes Python.
 * With another `abi`, or without descriptors, it is turned away, and `text` says why. Later either side ends it by closing the socket;
 * Python may send the reason before.
 *
 * Items of the queues: SX_WRITE, `imm` the slot, with an intake_frame and behind it the metadata; SX_IMM, `imm` a slot that is free. */
#ifndef RDMAXFER_INTAKE_H
#define RDMAXFER_INTAKE_H

#include <stdint.h>

#define INTAKE_PREFIX "rdmaxfer-intake/"
#define INTAKE_MAGIC "rdmaxint"
#define INTAKE_MAX_NAME 64
#define INTAKE_TEXT 512
#define INTAKE_FDS 4

struct intake_welcome {
    char magic[8];
    uint32_t abi;
    uint32_t slots;
    uint32_t capacity; /* of each queue */
    uint32_t reserved;
    uint64_t slot_bytes;
    uint64_t slot_stride; /* from one slot to the next */
    char text[INTAKE_TEXT];
};

struct intake_frame {
    int64_t captured_ns;
    uint64_t shape[8];
    uint32_t ndim;
    char dtype[64]; /* ends with a 0 */
    uint32_t reserved;
};

#endif
