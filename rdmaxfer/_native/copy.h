/* Copying arrays of any strides into contiguous memory. */
#ifndef RDMAXFER_COPY_H
#define RDMAXFER_COPY_H

#include <stdint.h>

#define RX_MAX_DIMS 64
#define RX_PIXEL 4 /* rows of so few items numpy copies item by item, and longer ones as fast as memcpy(3) if they have no gaps */
#define RX_PARALLEL_FROM (4 << 20) /* bytes; below it, waking other threads takes longer than what they save */

/* Copies an array of `ndim` dimensions to `dst`, where it becomes C-contiguous: extents, strides in bytes (of any sign, also 0),
 * bytes of an item. `threads`: as many at the most, where it pays; 0: as many as OpenMP would take; but never more than 8, or than there
 * are MiB. The memory of both must not overlap. Returns the count of threads, or 0 if nothing was copied, because numpy does it as
 * well. */
int rx_copy(char *dst, const char *src, int ndim, const int64_t *shape, const int64_t *strides, int64_t item, int threads);

#endif
