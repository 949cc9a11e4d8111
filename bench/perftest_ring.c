/* Makes perftest write to a ring, as rdmaxfer does, and not to one place again and again.
 *
 * ib_write_bw walks through a buffer that is as large as a page: it asks sysconf(_SC_PAGESIZE) for that, and messages larger than
 * half a page stay at its beginning, so that both ends' memory stays in the cache. This file, built as a shared library and named in
 * LD_PRELOAD, answers PERFTEST_RING_BYTES (a power of two) to perftest itself, and the truth to the libraries it uses. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

long sysconf(int name) {
    long (*real)(int);
    *(void **)&real = dlsym(RTLD_NEXT, "sysconf");
    const char *bytes = getenv("PERFTEST_RING_BYTES");
    Dl_info caller;
    if (name == _SC_PAGESIZE && bytes && dladdr(__builtin_return_address(0), &caller) && caller.dli_fname &&
        strstr(caller.dli_fname, "ib_write_"))
        return atol(bytes);
    return real(name);
}
