// Runs under an emulator of another CPU, with the kernels that were built for it, and calls their functions for
// emulated.py, which is at the other end of two pipes.
//
//   a request   the function's name [32], the number of arguments, the bytes of each (-1: null), the arguments
//   an answer   what the function returned, the arguments after it
//
// Numbers are of 64 bits. Threads are OpenMP's, as in a process of torch's.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <omp.h>

extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);

static void take(void* to, long bytes) {
  if (fread(to, 1, bytes, stdin) != (size_t)bytes) exit(0);  // no more requests
}
static void give(const void* from, long bytes) {
  if (fwrite(from, 1, bytes, stdout) != (size_t)bytes) exit(2);
}

int main(int, char** words) {
  void* library = dlopen(words[1], RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 2;
  auto init = (void (*)(void*, void*, void*, void*))dlsym(library, "xzoo_init");
  init((void*)GOMP_parallel, (void*)omp_get_thread_num, (void*)omp_get_num_threads, (void*)omp_in_parallel);
  for (;;) {
    char name[32];
    int64_t count, bytes[8];
    void* p[8] = {};
    take(name, sizeof name), take(&count, sizeof count), take(bytes, count * sizeof *bytes);
    for (int i = 0; i < count; i++)
      if (bytes[i] >= 0) take(p[i] = malloc(bytes[i]), bytes[i]);
    // Arguments are in registers; a function of fewer does not look at the rest.
    auto function = (int (*)(void*, void*, void*, void*, void*, void*, void*, void*))dlsym(library, name);
    const int64_t answer = function(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]);
    give(&answer, sizeof answer);
    for (int i = 0; i < count; i++)
      if (p[i]) give(p[i], bytes[i]), free(p[i]);
    fflush(stdout);
  }
}
