/* The wall clock of one process, ahead or behind: preloaded into the processes of a federation by `clock.py`.

   A file of six numbers (seconds, one for each kind of process) is mapped; whoever writes to it moves those clocks at once.
   The monotonic clock is left alone, as it is when somebody sets a machine's time. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const char *const kinds[] = {"seedbed.client.nursery", "seedbed.client.worker", "seedbed.server.registry",
                                    "flower-superlink", "seedbed.server.gateway"};
static const int places[] = {1, 1, 4, 3, 2};
static volatile int64_t *offset;
static int (*real_gettime)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
    real_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("SEEDBED_CLOCKS"), *who = getenv("SEEDBED_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    int64_t *found = mmap(NULL, 4096, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (found == MAP_FAILED) return;
    int place = who ? atoi(who) : 5;
    char line[4096];
    int command = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t size = command < 0 ? 0 : read(command, line, sizeof line - 1);
    if (command >= 0) close(command);
    for (ssize_t i = 0; i < size; i++) if (!line[i]) line[i] = ' ';
    line[size > 0 ? size : 0] = 0;
    for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (strstr(line, kinds[i])) place = places[i] == 1 && place == 5 ? 5 : places[i];
    offset = found + place;
}

int clock_gettime(clockid_t clock, struct timespec *found) {
    int code = real_gettime(clock, found);
    if (!code && offset && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) found->tv_sec += *offset;
    return code;
}

int gettimeofday(struct timeval *restrict found, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    found->tv_sec = now.tv_sec;
    found->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *found) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found) *found = now.tv_sec;
    return now.tv_sec;
}
