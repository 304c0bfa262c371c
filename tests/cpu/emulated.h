// Runs device code of barriers/cuda on a CPU: a rank is a thread or several, the lanes of a warp are fibers that
// meet in every vote, memory operations are the compiler's atomics. Checks what does not depend on a GPU: which
// words are signalled and waited for, that waits end at their deadlines, what they record, and what is copied.
//
// EMULATED_LANES: fibers of a warp; a block is one warp. EMULATED_CODE: the file of barriers/cuda, in quotes.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(threads)
#define __shared__ static thread_local  // a block is a thread
#define __forceinline__ inline
#define __noinline__
#define LOCKSTEP_EMULATED

namespace {

constexpr int kFibers = EMULATED_LANES;  // of an emulated warp: lanes 0 to kFibers - 1

struct Dim {
  int x = 0;
};

// Lanes of one warp, run in turn by one thread. A lane that votes gives way until all lanes have voted.
struct Warp {
  ucontext_t main, lanes[kFibers];
  std::vector<char> stacks[kFibers];
  bool done[kFibers] = {};
  long votes[kFibers] = {};
  int current = 0;
  const std::function<void(int)>* body = nullptr;

  void run(const std::function<void(int)>& f);
  std::vector<long> vote(long value) {
    votes[current] = value;
    swapcontext(&lanes[current], &main);  // back when every lane has voted
    std::vector<long> all(votes, votes + kFibers);
    swapcontext(&lanes[current], &main);  // back when every lane has read
    return all;
  }
};

thread_local Warp* warp;
thread_local Dim threadIdx, blockIdx, gridDim;

void enter(unsigned high, unsigned low) {
  Warp* w = reinterpret_cast<Warp*>((static_cast<unsigned long>(high) << 32) | low);
  int lane = w->current;
  (*w->body)(lane);
  w->done[lane] = true;
}

void Warp::run(const std::function<void(int)>& f) {
  body = &f;
  warp = this;
  unsigned long self = reinterpret_cast<unsigned long>(this);
  for (int i = 0; i < kFibers; i++) {
    done[i] = false;
    stacks[i].resize(64 << 10);
    getcontext(&lanes[i]);
    lanes[i].uc_stack.ss_sp = stacks[i].data();
    lanes[i].uc_stack.ss_size = stacks[i].size();
    lanes[i].uc_link = &main;
    makecontext(&lanes[i], reinterpret_cast<void (*)()>(enter), 2, static_cast<unsigned>(self >> 32),
                static_cast<unsigned>(self));
  }
  for (bool any = true; any;) {
    any = false;
    for (int i = 0; i < kFibers; i++) {
      if (done[i]) continue;
      current = threadIdx.x = i;
      swapcontext(&main, &lanes[i]);
      any = any || !done[i];
    }
  }
}

unsigned __ballot_sync(unsigned, bool value) {
  unsigned bits = 0;
  std::vector<long> all = warp->vote(value);
  for (int i = 0; i < kFibers; i++) bits |= static_cast<unsigned>(all[i] != 0) << i;
  return bits;
}
bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
int __shfl_sync(unsigned, int value, int lane) { return static_cast<int>(warp->vote(value)[lane]); }
void __syncwarp() { warp->vote(0); }
void __syncthreads() { warp->vote(0); }  // a block is one warp
int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
float __uint_as_float(unsigned v) {
  float f;
  std::memcpy(&f, &v, sizeof f);
  return f;
}
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
int min(int a, int b) { return a < b ? a : b; }
int atomicCAS(int* p, int want, int value) { return __sync_val_compare_and_swap(p, want, value); }

}  // namespace

namespace lockstep {

inline int ld_acquire_sys(const int* p) {
  std::this_thread::yield();  // two cores, more ranks
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline int ld_relaxed_sys(const int* p) {
  std::this_thread::yield();
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
inline void st_relaxed_sys(int* p, int v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
inline void st_release_sys(int* p, int v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
inline void red_add_relaxed_sys(int* p, int v) { __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline void red_add_release_sys(int* p, int v) { __atomic_fetch_add(p, v, __ATOMIC_RELEASE); }
inline void fence_sys() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void wait_for_prior_kernels() {}
inline void let_next_kernel_start() {}
inline uint4 load_once(const void* p) { return *static_cast<const uint4*>(p); }
inline int increment_acq_rel_gpu(int* p) { return __atomic_fetch_add(p, 1, __ATOMIC_ACQ_REL); }
std::atomic<bool> clock_stands{false};
inline unsigned long long now_ns() {
  if (clock_stands) return 1;
  auto t = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(t).count();
}

}  // namespace lockstep

#include EMULATED_CODE

using namespace lockstep;

namespace {

#define CHECK(condition, ...)                               \
  do {                                                      \
    if (!(condition)) {                                     \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                             \
      std::printf("\n");                                    \
      std::fflush(stdout);                                  \
      std::_Exit(1);                                        \
    }                                                       \
  } while (0)

// Ranks' memory: one shared file each, mapped side by side in every rank's own order.
struct Ranks {
  int n;
  i64 stride;  // a multiple of a page; the payload begins at 4096
  std::vector<char*> views;
  std::vector<Record> records;

  Ranks(int n, u64 deadline_ms, i64 stride = 8192) : n(n), stride(stride), records(n) {
    std::vector<int> files;
    for (int r = 0; r < n; r++) {
      files.push_back(memfd_create("slot", 0));
      CHECK(ftruncate(files[r], stride) == 0, "no memory");
    }
    for (int r = 0; r < n; r++) {
      char* view = static_cast<char*>(
          mmap(nullptr, n * stride, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      for (int k = 0; k < n; k++) {
        void* at = mmap(view + k * stride, stride, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                        files[(r + k) % n], 0);
        CHECK(at != MAP_FAILED, "no mapping");
      }
      views.push_back(view);
      std::memset(&records[r], 0, sizeof(Record));
      State& s = peers(r).control(0)->state;
      s.step = &peers(r).control(0)->state.own_step;
      s.record = &records[r];
      s.deadline_ns = deadline_ms * 1000000ull;
    }
    for (int f : files) close(f);
  }
  ~Ranks() {
    for (char* view : views) munmap(view, n * stride);
  }
  Peers peers(int rank) { return Peers{views[rank], stride, n}; }
  int* payload(int rank, int slot) { return reinterpret_cast<int*>(views[rank] + slot * stride + 4096); }

  // One thread a rank, in which `body(rank)` runs.
  void run(const std::function<void(int)>& body) {
    std::vector<std::thread> threads;
    for (int r = 0; r < n; r++) threads.emplace_back(body, r);
    for (std::thread& t : threads) t.join();
  }
};

}  // namespace
