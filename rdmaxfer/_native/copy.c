/* See copy.h.
 *
 * An array is first brought to as few dimensions as describe it. Of these, two are copied by a *tile* loop: the last one, along which
 * the destination runs, and the one along which the source runs. Where they are the same, each row is a run; where they are not, as
 * in a transposed array, both sides would touch a new cache line with every item if one went row by row, and the tiles keep the lines
 * of both in the first-level cache until all of their items were used. */
#include "copy.h"

#include <pthread.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define LINE 64                 /* bytes; a tile is as wide as a line of the source */
#define TILE 32                 /* ... by so many lines: with those of the destination, they fit into the smallest first-level cache */
#define PIECE (1 << 15)         /* bytes of a row that are copied at once, so that threads can share a long row */
#define FEW 16                  /* so few columns are not worth a loop of their own */
#define ROWS_TO_CROSS 8         /* numpy does well with fewer */
#define A_THREAD (1 << 20)      /* bytes, at least */
#define MAX_THREADS 8           /* so many use up what a memory controller gives, and leave other cores to others */
#define WIDE 8                  /* items of so many bytes or more numpy transposes as fast, as long as all is in the cache */
#define WIDE_FROM (4 << 20)     /* bytes */

typedef struct {
    int ndim;
    int64_t shape[RX_MAX_DIMS], src[RX_MAX_DIMS], dst[RX_MAX_DIMS];
} layout;

/* After fork(2), OpenMP of gcc waits for ever for threads that only the parent has. */
static int forked;

static void in_child(void) {
    forked = 1;
}

__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(NULL, NULL, in_child);
}

static int64_t magnitude(int64_t stride) {
    return stride < 0 ? -stride : stride;
}

/* Leaves out dimensions of extent 1, and joins those that follow each other in the source as they do in the destination. */
static layout simplify(int ndim, const int64_t *shape, const int64_t *strides, int64_t item) {
    layout a = {.ndim = 0};
    for (int i = 0; i < ndim; i++) {
        if (shape[i] == 1)
            continue;
        int last = a.ndim - 1;
        if (last >= 0 && a.src[last] == strides[i] * shape[i]) {
            a.shape[last] *= shape[i];
            a.src[last] = strides[i];
        } else {
            a.shape[a.ndim] = shape[i];
            a.src[a.ndim++] = strides[i];
        }
    }
    if (a.ndim == 0) {
        a.shape[0] = 1;
        a.src[0] = item;
        a.ndim = 1;
    }
    int64_t step = item;
    for (int i = a.ndim - 1; i >= 0; i--) {
        a.dst[i] = step;
        step *= a.shape[i];
    }
    return a;
}

/* Rows by columns of items; along a column the destination has no gaps. Inlined with a constant `item`, which makes the copy of an
 * item one instruction. */
__attribute__((always_inline)) static inline void tile(char *dst, const char *src, int64_t rows, int64_t cols, int64_t dst_row,
                                                       int64_t src_row, int64_t src_col, int64_t item) {
    if (cols <= FEW && rows > cols && magnitude(src_row) < magnitude(src_col)) {
        for (int64_t c = 0; c < cols; c++)
            for (int64_t r = 0; r < rows; r++)
                memcpy(dst + r * dst_row + c * item, src + r * src_row + c * src_col, (size_t)item);
    } else if (cols == 3) { /* red, green, blue */
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < 3; c++)
                memcpy(dst + r * dst_row + c * item, src + r * src_row + c * src_col, (size_t)item);
    } else {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < cols; c++)
                memcpy(dst + r * dst_row + c * item, src + r * src_row + c * src_col, (size_t)item);
    }
}

/* Square blocks of 16 bytes a side are turned in registers: of N rows each, the first half is interleaved with the second one, and
 * that log2(N) times. `src` has a column in each line, `dst` gets a row in each. */
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (__typeof__(a)){__VA_ARGS__})
#endif
#define SIDE 16

#define TURN(name, type, n, LOW, HIGH)                                                                                       \
    static void name(char *dst, const char *src, int64_t dst_row, int64_t src_col) {                                         \
        typedef type vector __attribute__((vector_size(SIDE)));                                                              \
        vector a[n], b[n];                                                                                                   \
        for (int i = 0; i < n; i++)                                                                                          \
            memcpy(&a[i], src + i * src_col, SIDE);                                                                          \
        for (int stage = 1; stage < n; stage *= 2) {                                                                         \
            for (int i = 0; i < n / 2; i++) {                                                                                \
                b[2 * i] = SHUFFLE(a[i], a[i + n / 2], LOW);                                                                 \
                b[2 * i + 1] = SHUFFLE(a[i], a[i + n / 2], HIGH);                                                            \
            }                                                                                                                \
            memcpy(a, b, sizeof a);                                                                                          \
        }                                                                                                                    \
        for (int i = 0; i < n; i++)                                                                                          \
            memcpy(dst + i * dst_row, &a[i], SIDE);                                                                          \
    }

#define LIST(...) __VA_ARGS__
TURN(turn1, uint8_t, 16, LIST(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
     LIST(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31))
TURN(turn2, uint16_t, 8, LIST(0, 8, 1, 9, 2, 10, 3, 11), LIST(4, 12, 5, 13, 6, 14, 7, 15))
TURN(turn4, uint32_t, 4, LIST(0, 4, 1, 5), LIST(2, 6, 3, 7))

/* A tile of which the source runs along the rows without gaps. */
__attribute__((always_inline)) static inline void turned(void (*turn)(char *, const char *, int64_t, int64_t), char *dst,
                                                         const char *src, int64_t rows, int64_t cols, int64_t dst_row,
                                                         int64_t src_col, int64_t item) {
    int64_t n = SIDE / item, whole_rows = rows - rows % n, whole_cols = cols - cols % n;
    for (int64_t r = 0; r < whole_rows; r += n)
        for (int64_t c = 0; c < whole_cols; c += n)
            turn(dst + r * dst_row + c * item, src + r * item + c * src_col, dst_row, src_col);
    tile(dst + whole_cols * item, src + whole_cols * src_col, whole_rows, cols - whole_cols, dst_row, item, src_col, item);
    tile(dst + whole_rows * dst_row, src + whole_rows * item, rows - whole_rows, cols, dst_row, item, src_col, item);
}

static void tile_of(char *dst, const char *src, int64_t rows, int64_t cols, int64_t dst_row, int64_t src_row, int64_t src_col,
                    int64_t item) {
    if (src_row == -item) { /* from the last row to the first */
        src += (rows - 1) * src_row;
        dst += (rows - 1) * dst_row;
        src_row = item;
        dst_row = -dst_row;
    }
    if (src_row == item && cols >= FEW) {
        switch (item) {
        case 1: turned(turn1, dst, src, rows, cols, dst_row, src_col, 1); return;
        case 2: turned(turn2, dst, src, rows, cols, dst_row, src_col, 2); return;
        case 4: turned(turn4, dst, src, rows, cols, dst_row, src_col, 4); return;
        }
    }
    switch (item) {
    case 1: tile(dst, src, rows, cols, dst_row, src_row, src_col, 1); break;
    case 2: tile(dst, src, rows, cols, dst_row, src_row, src_col, 2); break;
    case 4: tile(dst, src, rows, cols, dst_row, src_row, src_col, 4); break;
    case 8: tile(dst, src, rows, cols, dst_row, src_row, src_col, 8); break;
    case 16: tile(dst, src, rows, cols, dst_row, src_row, src_col, 16); break;
    default: tile(dst, src, rows, cols, dst_row, src_row, src_col, item);
    }
}

/* How the array is cut into units of work: blocks of rows by blocks of columns, in every plane of the other dimensions. */
typedef struct {
    int row; /* the dimension of the rows; -1: there is only one row */
    int crossing; /* the source runs along the rows, the destination along the columns */
    int64_t rows, cols, row_blocks, col_blocks, rows_at_once, cols_at_once, units;
} plan;

static plan cut(const layout *a, int64_t item) {
    int last = a->ndim - 1;
    plan p = {.row = last - 1, .rows = 1, .cols = a->shape[last]};
    for (int i = 0; i < last; i++) {
        int64_t least = magnitude(a->src[p.crossing ? p.row : last]);
        if (a->src[i] && magnitude(a->src[i]) < least && a->shape[i] >= ROWS_TO_CROSS) {
            p.row = i;
            p.crossing = 1;
        }
    }
    if (p.row >= 0)
        p.rows = a->shape[p.row];
    if (p.crossing && p.cols > FEW) {
        p.rows_at_once = item < LINE ? LINE / item : 1;
        p.cols_at_once = TILE;
    } else {
        p.cols_at_once = item < PIECE ? PIECE / item : 1;
        if (p.cols_at_once > p.cols)
            p.cols_at_once = p.cols;
        p.rows_at_once = p.cols_at_once * item < PIECE ? PIECE / (p.cols_at_once * item) : 1;
    }
    p.row_blocks = (p.rows + p.rows_at_once - 1) / p.rows_at_once;
    p.col_blocks = (p.cols + p.cols_at_once - 1) / p.cols_at_once;
    p.units = p.row_blocks * p.col_blocks;
    for (int i = 0; i < last; i++)
        if (i != p.row)
            p.units *= a->shape[i];
    return p;
}

static void copy_unit(const layout *a, const plan *p, int64_t unit, char *dst, const char *src, int64_t item) {
    int last = a->ndim - 1;
    int64_t col = unit % p->col_blocks * p->cols_at_once;
    unit /= p->col_blocks;
    int64_t row = unit % p->row_blocks * p->rows_at_once;
    unit /= p->row_blocks;
    for (int i = last - 1; i >= 0; i--) {
        if (i == p->row)
            continue;
        int64_t at = unit % a->shape[i];
        unit /= a->shape[i];
        dst += at * a->dst[i];
        src += at * a->src[i];
    }
    int64_t rows = p->rows - row < p->rows_at_once ? p->rows - row : p->rows_at_once;
    int64_t cols = p->cols - col < p->cols_at_once ? p->cols - col : p->cols_at_once;
    int64_t dst_row = p->row >= 0 ? a->dst[p->row] : 0, src_row = p->row >= 0 ? a->src[p->row] : 0;
    dst += row * dst_row + col * item;
    src += row * src_row + col * a->src[last];
    if (a->src[last] == item && cols * item > FEW) {
        for (int64_t r = 0; r < rows; r++)
            memcpy(dst + r * dst_row, src + r * src_row, (size_t)(cols * item));
    } else {
        tile_of(dst, src, rows, cols, dst_row, src_row, a->src[last], item);
    }
}

int rx_copy(char *dst, const char *src, int ndim, const int64_t *shape, const int64_t *strides, int64_t item, int threads) {
    if (item == 0 || ndim == 0 || ndim > RX_MAX_DIMS)
        return 0;
    for (int i = 0; i < ndim; i++)
        if (shape[i] == 0)
            return 0;
    layout a = simplify(ndim, shape, strides, item);
    plan p = cut(&a, item);
    int64_t nbytes = a.dst[0] * a.shape[0];
#ifdef _OPENMP
    if (threads == 0)
        threads = omp_get_max_threads();
    if (threads > MAX_THREADS)
        threads = MAX_THREADS;
    if (threads > nbytes / A_THREAD)
        threads = (int)(nbytes / A_THREAD);
    if (threads > p.units)
        threads = (int)p.units;
    if (forked || nbytes < RX_PARALLEL_FROM)
        threads = 1;
#else
    threads = 1;
#endif
    int runs = a.src[a.ndim - 1] == item;
    if (threads == 1 || !runs) {
        if (p.crossing ? item >= WIDE && nbytes < WIDE_FROM : p.cols > RX_PIXEL)
            return 0;
    }
    if (threads == 1) {
        for (int64_t unit = 0; unit < p.units; unit++)
            copy_unit(&a, &p, unit, dst, src, item);
        return 1;
    }
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t unit = 0; unit < p.units; unit++)
        copy_unit(&a, &p, unit, dst, src, item);
#endif
    return threads;
}
