// Threads: OpenMP's pool in this process, which is torch's, if there is one.
#pragma once

#include <pthread.h>

#include "vectors.h"

namespace {

void (*start)(void (*)(void*), void*, unsigned, unsigned);
int (*thread_number)();
int (*thread_count)();
int (*inside)();
// A pool does not survive fork(): a child that enters it hangs, in torch's own operations too.
volatile int forked;

// Whether scratch could not be had since this thread's call, or its part of one, began. No
// exception, which could not leave a thread of the pool: who asked for scratch and got none
// returns.
thread_local bool no_memory;

template <class F>
struct Task {
  F& f;
  long n;
  bool no_memory_there;
  static void run(void* p) {
    Task& t = *(Task*)p;
    long i = thread_number(), k = thread_count(), begin = t.n * i / k, end = t.n * (i + 1) / k;
    if (begin < end) t.f(begin, end);
    fence();
    if (no_memory) __atomic_store_n(&t.no_memory_there, true, __ATOMIC_RELAXED);
    no_memory = false;  // of a thread of the pool: the one that called is told below
  }
};

// f(begin, end) over pieces of [0, n).
template <class F>
void parallel(long n, long threads, F f) {
  threads = least(threads, n);
  if (threads > 1 && start && !forked && !inside()) {
    Task<F> task{f, n, false};
    start(Task<F>::run, &task, (unsigned)threads, 0);
    no_memory |= task.no_memory_there;
  } else if (n > 0) {
    f(0, n);
    fence();
  }
}

}  // namespace
