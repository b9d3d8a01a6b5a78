/* A clock for the programs that are started with this in LD_PRELOAD: the machine's, and so many seconds more as stand in
 * the file that SHIFTED_CLOCK names, at any moment. As when somebody sets a machine's clock, CLOCK_MONOTONIC goes on.
 * Times of files are told by the same clock; those before 2001 are left as they are: they are marks, not times.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define LONG_AGO 1000000000

static const volatile long long *offset_s;

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("SHIFTED_CLOCK");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *found = mmap(NULL, sizeof(long long), PROT_READ, MAP_SHARED, file, 0);
  close(file);
  if (found != MAP_FAILED) offset_s = found;
}

static long long shift(void) { return offset_s ? *offset_s : 0; }

int clock_gettime(clockid_t clock, struct timespec *now) {
  static __typeof__(&clock_gettime) next;
  if (!next) next = NEXT(clock_gettime);
  int result = next(clock, now);
  if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += shift();
  return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  static int (*next)(struct timeval *, void *);
  if (!next) next = dlsym(RTLD_NEXT, "gettimeofday");
  int result = next(now, zone);
  if (!result) now->tv_sec += shift();
  return result;
}

time_t time(time_t *place) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (place) *place = now.tv_sec;
  return now.tv_sec;
}

static int told(int result, struct stat *found) {
  if (!result && found->st_mtim.tv_sec > LONG_AGO) found->st_mtim.tv_sec += shift();
  return result;
}

int fstat(int file, struct stat *found) {
  static __typeof__(&fstat) next;
  if (!next) next = NEXT(fstat);
  return told(next(file, found), found);
}

int stat(const char *restrict path, struct stat *restrict found) {
  static __typeof__(&stat) next;
  if (!next) next = NEXT(stat);
  return told(next(path, found), found);
}

int lstat(const char *restrict path, struct stat *restrict found) {
  static __typeof__(&lstat) next;
  if (!next) next = NEXT(lstat);
  return told(next(path, found), found);
}

int fstatat(int directory, const char *restrict path, struct stat *restrict found, int flags) {
  static __typeof__(&fstatat) next;
  if (!next) next = NEXT(fstatat);
  return told(next(directory, path, found, flags), found);
}

/* On 64 bits the same under another name. */
int fstat64(int, struct stat64 *) __attribute__((alias("fstat")));
int stat64(const char *restrict, struct stat64 *restrict) __attribute__((alias("stat")));
int lstat64(const char *restrict, struct stat64 *restrict) __attribute__((alias("lstat")));
int fstatat64(int, const char *restrict, struct stat64 *restrict, int) __attribute__((alias("fstatat")));
