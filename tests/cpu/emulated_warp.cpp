// Runs barriers/cuda/barrier.cuh on a CPU: a rank is a thread, its lanes are fibers that meet in every warp
// vote, memory operations are the compiler's atomics. Checks what does not depend on a GPU: which words are
// signalled and waited for, that waits end at their deadlines, and what they record.
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
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define LOCKSTEP_EMULATED

namespace {

constexpr int kLanes = 4;  // of an emulated warp: ranks need no more lanes than there are ranks

struct Dim {
  int x = 0;
};

// Lanes of one warp, run in turn by one thread. A lane that votes gives way until all lanes have voted.
struct Warp {
  ucontext_t main, lanes[kLanes];
  std::vector<char> stacks[kLanes];
  bool done[kLanes] = {};
  long votes[kLanes] = {};
  int current = 0;
  const std::function<void(int)>* body = nullptr;

  void run(const std::function<void(int)>& f);
  std::vector<long> vote(long value) {
    votes[current] = value;
    swapcontext(&lanes[current], &main);  // back when every lane has voted
    std::vector<long> all(votes, votes + kLanes);
    swapcontext(&lanes[current], &main);  // back when every lane has read
    return all;
  }
};

thread_local Warp* warp;
thread_local Dim threadIdx, blockIdx;

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
  for (int i = 0; i < kLanes; i++) {
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
    for (int i = 0; i < kLanes; i++) {
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
  for (int i = 0; i < kLanes; i++) bits |= static_cast<unsigned>(all[i] != 0) << i;
  return bits;
}
bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
int __shfl_sync(unsigned, int value, int lane) { return static_cast<int>(warp->vote(value)[lane]); }
void __syncwarp() { warp->vote(0); }
void __syncthreads() {}
int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
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
inline int increment_acq_rel_gpu(int* p) { return __atomic_fetch_add(p, 1, __ATOMIC_ACQ_REL); }
std::atomic<bool> clock_stands{false};
inline unsigned long long now_ns() {
  if (clock_stands) return 1;
  auto t = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(t).count();
}

}  // namespace lockstep

#include "barrier.cuh"

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

using Barrier = bool (*)(const Peers&, int, Where);
bool tag(const Peers& p, int lane, Where w) { return tag_barrier<Poll::kAcquire>(p, lane, w); }
bool tag_relaxed(const Peers& p, int lane, Where w) { return tag_barrier<Poll::kRelaxedThenFence>(p, lane, w); }
bool epoch(const Peers& p, int lane, Where w) { return epoch_barrier<Poll::kAcquire>(p, lane, w); }
bool epoch_relaxed(const Peers& p, int lane, Where w) {
  return epoch_barrier<Poll::kRelaxedThenFence>(p, lane, w);
}
const Barrier kBarriers[] = {tag, tag_relaxed, epoch, epoch_relaxed};

// Ranks' memory: one shared file each, mapped side by side in every rank's own order.
struct Ranks {
  static constexpr i64 kStride = 8192;
  int n;
  std::vector<char*> views;
  std::vector<Record> records;

  Ranks(int n, u64 deadline_ms) : n(n), records(n) {
    std::vector<int> files;
    for (int r = 0; r < n; r++) {
      files.push_back(memfd_create("slot", 0));
      CHECK(ftruncate(files[r], kStride) == 0, "no memory");
    }
    for (int r = 0; r < n; r++) {
      char* view = static_cast<char*>(
          mmap(nullptr, n * kStride, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      for (int k = 0; k < n; k++) {
        void* at = mmap(view + k * kStride, kStride, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
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
    for (char* view : views) munmap(view, n * kStride);
  }
  Peers peers(int rank) { return Peers{views[rank], kStride, n}; }
  int* payload(int rank, int slot) { return reinterpret_cast<int*>(views[rank] + slot * kStride + 4096); }

  // One thread a rank, in which `body(rank)` runs.
  void run(const std::function<void(int)>& body) {
    std::vector<std::thread> threads;
    for (int r = 0; r < n; r++) threads.emplace_back(body, r);
    for (std::thread& t : threads) t.join();
  }
  // One barrier of one rank.
  bool barrier(Barrier f, int rank, Where where, bool opens_step = false) {
    Warp w;
    bool fine[kLanes];
    Peers p = peers(rank);
    w.run([&](int lane) {
      if (opens_step) announce_step(p, lane);
      fine[lane] = f(p, lane, where);
      if (opens_step && fine[lane]) fine[lane] = check_step(p, lane, where);
    });
    for (int i = 1; i < kLanes; i++) CHECK(fine[i] == fine[0], "lanes disagree");
    return fine[0];
  }
};

// What peers wrote before the barrier is there after it, round after round.
void litmus(Barrier f, int n, int rounds) {
  Ranks ranks(n, 20000);
  ranks.run([&](int rank) {
    for (int i = 0; i < rounds; i++) {
      for (int k = 0; k < n; k++) ranks.payload(rank, k)[(i & 1) * n + (n - k) % n] = 1000 * i + rank;
      if ((rank * 7 + i) % 11 == 0) usleep(50);
      CHECK(ranks.barrier(f, rank, Where{1, 2}, i % 3 == 0), "round %d of rank %d stopped", i, rank);
      for (int k = 0; k < n; k++) {
        int got = ranks.payload(rank, 0)[(i & 1) * n + k], want = 1000 * i + (rank + k) % n;
        CHECK(got == want, "round %d: rank %d sees %d from slot %d, not %d", i, rank, got, k, want);
      }
      if (i % 3 == 2) ranks.peers(rank).control(0)->state.own_step++;
    }
  });
  for (int r = 0; r < n; r++)
    for (int k = 0; k < n; k++) CHECK(ranks.peers(r).control(0)->tag[k] == 0, "a tag word is not back at zero");
}

// Rank 2 of 3 stays away; rank 0 gives up long before rank 1 and goes on signalling. Both blame rank 2 alone.
void late_rank(Barrier f) {
  Ranks ranks(3, 400);
  ranks.peers(0).control(0)->state.deadline_ns = 60 * 1000000ull;
  ranks.run([&](int rank) {
    for (int i = 0; i < 4; i++) CHECK(ranks.barrier(f, rank, Where{i, 3}), "stopped early");
    if (rank == 2) return;
    ranks.peers(rank).control(0)->state.own_step = 812;
    u64 begin = now_ns();
    CHECK(!ranks.barrier(f, rank, Where{7, 3}), "passed without rank 2");
    u64 waited = (now_ns() - begin) / 1000000;
    // No upper bound below seconds: on a busy machine a fiber's poll takes a time slice.
    CHECK(waited >= (rank ? 400 : 60) && waited < 10000, "rank %d waited %llu ms", rank, waited);
    begin = now_ns();
    for (int i = 0; i < 10; i++) CHECK(!ranks.barrier(f, rank, Where{8, 3}), "passed after the end");
    CHECK(rank == 0 || now_ns() - begin < 10 * 400 * 1000000ull, "poisoned waits go on to their deadlines");
  });
  for (int rank = 0; rank < 2; rank++) {
    Record& r = ranks.records[rank];
    CHECK(r.stop == kDeadline && r.layer == 7 && r.operation == 3 && r.step == 812, "the record is wrong");
    CHECK(r.missing == 1ull << (2 - rank), "rank %d blames %llx", rank, r.missing);
    CHECK(ranks.peers(rank).control(0)->state.poison == kDeadline, "not poisoned");
  }
}

// Rank 1 of 3 is one step ahead; the others name it, and it names them.
void other_step(Barrier f, int ahead) {
  Ranks ranks(3, 5000);
  ranks.run([&](int rank) {
    i64& step = ranks.peers(rank).control(0)->state.own_step;
    for (step = 0; step < 5; step++) {
      CHECK(ranks.barrier(f, rank, Where{0, 1}, true), "stopped early");
      CHECK(ranks.barrier(f, rank, Where{0, 2}), "stopped early");
    }
    if (rank == 1) step += ahead;
    CHECK(!ranks.barrier(f, rank, Where{0, 1}, true), "passed in another step");
  });
  for (int rank = 0; rank < 3; rank++) {
    Record& r = ranks.records[rank];
    u64 blamed = rank == 1 ? 0b110 : 1ull << ((1 - rank + 3) % 3);
    CHECK(r.stop == kStepMismatch && r.missing == blamed, "rank %d: stop %d, %llx", rank, r.stop, r.missing);
    CHECK(r.step == (rank == 1 ? 5 + ahead : 5), "wrong own step");
    CHECK(r.peer_step == (rank == 1 ? 5 : 5 + ahead), "rank %d sees step %lld", rank, (long long)r.peer_step);
  }
}

// The host ends a wait long before its deadline.
void host_abort(Barrier f) {
  Ranks ranks(2, 60000);
  ranks.run([&](int rank) {
    if (rank == 1) {
      usleep(20000);
      __atomic_store_n(&ranks.records[0].abort, 1, __ATOMIC_RELAXED);
      return;
    }
    u64 begin = now_ns();
    CHECK(!ranks.barrier(f, rank, Where{0, 0}), "passed alone");
    CHECK(now_ns() - begin < 30000 * 1000000ull, "took no notice of its host");
  });
  CHECK(ranks.records[0].stop == kAborted && ranks.records[0].missing == 2, "the record is wrong");
}

// A wait of less than kAskHostNs touches no host memory: here that would be the end of the process.
void short_wait(Barrier f) {
  Ranks ranks(2, 60000);
  void* nowhere = mmap(nullptr, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  for (int r = 0; r < 2; r++) ranks.peers(r).control(0)->state.record = static_cast<Record*>(nowhere);
  clock_stands = true;
  ranks.run([&](int rank) {
    if (rank == 1) usleep(20000);
    CHECK(ranks.barrier(f, rank, Where{0, 0}), "stopped early");
  });
  clock_stands = false;
  munmap(nowhere, 4096);
}

}  // namespace

int main() {
  for (Barrier f : kBarriers) {
    for (int n = 1; n <= kLanes; n++) litmus(f, n, 120);
    late_rank(f);
    other_step(f, 1);
    other_step(f, -1);
    host_abort(f);
    short_wait(f);
  }
  std::puts("fine");
  return 0;
}
