// Runs barriers/cuda/barrier.cuh on a CPU; emulated.h says how.
#define EMULATED_LANES 4  // ranks need no more lanes than there are ranks
#define EMULATED_CODE "barrier.cuh"
#include "emulated.h"

namespace {

using Barrier = bool (*)(const Peers&, int, Where);
bool tag(const Peers& p, int lane, Where w) { return tag_barrier<Poll::kAcquire>(p, lane, w); }
bool tag_relaxed(const Peers& p, int lane, Where w) { return tag_barrier<Poll::kRelaxedThenFence>(p, lane, w); }
bool epoch(const Peers& p, int lane, Where w) { return epoch_barrier<Poll::kAcquire>(p, lane, w); }
bool epoch_relaxed(const Peers& p, int lane, Where w) {
  return epoch_barrier<Poll::kRelaxedThenFence>(p, lane, w);
}
const Barrier kBarriers[] = {tag, tag_relaxed, epoch, epoch_relaxed};

// One barrier of one rank.
bool barrier(Ranks& ranks, Barrier f, int rank, Where where, bool opens_step = false) {
  Warp w;
  bool fine[kFibers];
  Peers p = ranks.peers(rank);
  w.run([&](int lane) {
    if (opens_step) announce_step(p, lane);
    fine[lane] = f(p, lane, where);
    if (opens_step && fine[lane]) fine[lane] = check_step(p, lane, where);
  });
  for (int i = 1; i < kFibers; i++) CHECK(fine[i] == fine[0], "lanes disagree");
  return fine[0];
}

// What peers wrote before the barrier is there after it, round after round.
void litmus(Barrier f, int n, int rounds) {
  Ranks ranks(n, 20000);
  ranks.run([&](int rank) {
    for (int i = 0; i < rounds; i++) {
      for (int k = 0; k < n; k++) ranks.payload(rank, k)[(i & 1) * n + (n - k) % n] = 1000 * i + rank;
      if ((rank * 7 + i) % 11 == 0) usleep(50);
      CHECK(barrier(ranks, f, rank, Where{1, 2}, i % 3 == 0), "round %d of rank %d stopped", i, rank);
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
    for (int i = 0; i < 4; i++) CHECK(barrier(ranks, f, rank, Where{i, 3}), "stopped early");
    if (rank == 2) return;
    ranks.peers(rank).control(0)->state.own_step = 812;
    u64 begin = now_ns();
    CHECK(!barrier(ranks, f, rank, Where{7, 3}), "passed without rank 2");
    u64 waited = (now_ns() - begin) / 1000000;
    // No upper bound below seconds: on a busy machine a fiber's poll takes a time slice.
    CHECK(waited >= (rank ? 400 : 60) && waited < 10000, "rank %d waited %llu ms", rank, waited);
    begin = now_ns();
    for (int i = 0; i < 10; i++) CHECK(!barrier(ranks, f, rank, Where{8, 3}), "passed after the end");
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
      CHECK(barrier(ranks, f, rank, Where{0, 1}, true), "stopped early");
      CHECK(barrier(ranks, f, rank, Where{0, 2}), "stopped early");
    }
    if (rank == 1) step += ahead;
    CHECK(!barrier(ranks, f, rank, Where{0, 1}, true), "passed in another step");
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
    CHECK(!barrier(ranks, f, rank, Where{0, 0}), "passed alone");
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
    CHECK(barrier(ranks, f, rank, Where{0, 0}), "stopped early");
  });
  clock_stands = false;
  munmap(nowhere, 4096);
}

}  // namespace

int main() {
  for (Barrier f : kBarriers) {
    for (int n = 1; n <= kFibers; n++) litmus(f, n, 120);
    late_rank(f);
    other_step(f, 1);
    other_step(f, -1);
    host_abort(f);
    short_wait(f);
  }
  std::puts("fine");
  return 0;
}
