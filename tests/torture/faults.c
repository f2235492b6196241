/* Stands in for what libc has to change files: a chosen call on a file below a folder fails, and perhaps all after it.
   cc -shared -fPIC -O1 -o faults.so faults.c -ldl;  LD_PRELOAD=./faults.so python ...;  then fault_arm from inside. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX], first[PATH_MAX];
static long at, calls, hits;
static int error, lasting;

void fault_arm(const char *path, int n, int e, int all_after) {
    snprintf(folder, sizeof folder, "%s/", path);
    at = n, error = e, lasting = all_after, calls = hits = first[0] = 0;
}
long fault_count(void) { return calls; }
long fault_hits(void) { return hits; }
const char *fault_first(void) { return first; }

static int fails(const char *path) {
    if (!folder[0] || !path || strncmp(path, folder, strlen(folder))) return 0;
    long n = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (!at || n < at || (n > at && !lasting)) return 0;
    if (__atomic_add_fetch(&hits, 1, __ATOMIC_SEQ_CST) == 1) snprintf(first, sizeof first, "%s", path);
    errno = error;
    return 1;
}

static int fd_fails(int fd) {
    if (!folder[0]) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return fails(path);
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
#define ON_FD(type, name, params, args, ...) \
    type name params { REAL(type, name, __VA_ARGS__); return fd_fails(fd) ? -1 : real args; }

ON_FD(ssize_t, write, (int fd, const void *b, size_t n), (fd, b, n), int, const void *, size_t)
ON_FD(ssize_t, pwrite, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o), int, const void *, size_t, off_t)
ON_FD(ssize_t, pwrite64, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o), int, const void *, size_t, off64_t)
ON_FD(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n), int, const struct iovec *, int)
ON_FD(int, fsync, (int fd), (fd), int)
ON_FD(int, fdatasync, (int fd), (fd), int)
ON_FD(int, ftruncate, (int fd, off_t n), (fd, n), int, off_t)
ON_FD(int, ftruncate64, (int fd, off64_t n), (fd, n), int, off64_t)

int rename(const char *a, const char *b) {
    REAL(int, rename, const char *, const char *);
    return fails(b) ? -1 : real(a, b);
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...); \
        mode_t mode = 0; \
        if (flags & O_CREAT) { va_list l; va_start(l, flags); mode = va_arg(l, mode_t); va_end(l); } \
        if ((flags & O_CREAT) && fails(path)) return -1; \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
