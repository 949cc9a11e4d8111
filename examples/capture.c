/* A capture program in C: it fills frames in memory of a Python process, which sends them on. The other side is capture_send.py.
 *
 *     python capture_send.py tcp://0.0.0.0:7471 &
 *     cc capture.c $(rdmaxfer config --cflags --libs) -o capture
 *     ./capture camera 100
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <rdmaxfer.h>

enum { WIDTH = 640, HEIGHT = 480 };

static void fill(uint16_t *pixels, int number) { /* where a camera would put its picture */
    for (int i = 0; i < WIDTH * HEIGHT; i++)
        pixels[i] = (uint16_t)(i + number);
}

int main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "camera";
    int count = argc > 2 ? atoi(argv[2]) : 100, status = 0;
    rdmaxfer_ring *ring;

    if (rdmaxfer_attach(RDMAXFER_ABI, name, 30000, &ring)) {
        fprintf(stderr, "capture: %s\n", rdmaxfer_error());
        return 1;
    }
    if (rdmaxfer_slot_bytes(ring) < WIDTH * HEIGHT * sizeof(uint16_t)) {
        fprintf(stderr, "capture: slots of %zu bytes are too small\n", rdmaxfer_slot_bytes(ring));
        return 1;
    }
    for (int number = 0; number < count; number++) {
        rdmaxfer_slot slot;
        if ((status = rdmaxfer_reserve(ring, 30000, &slot)))
            break;
        fill(slot.data, number);

        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        char metadata[64];
        snprintf(metadata, sizeof metadata, "{\"number\": %d}", number);
        rdmaxfer_frame frame = {
            .dtype = "u2",
            .ndim = 2,
            .shape = {HEIGHT, WIDTH},
            .captured_ns = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec,
            .metadata = metadata,
        };
        if ((status = rdmaxfer_publish(ring, &slot, &frame)))
            break;
    }
    if (!status)
        status = rdmaxfer_flush(ring, 30000);
    if (status)
        fprintf(stderr, "capture: %s\n", rdmaxfer_error());
    else
        printf("filled %d frames, all released\n", count);
    rdmaxfer_detach(ring);
    return status != 0;
}
