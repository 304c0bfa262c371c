// Kernels of the barrier benchmark and of the tests on GPUs: other ways to write the same barrier, the payload
// litmus, and the pieces of a barrier's time. Nothing here is part of a decode step.
#include "barrier.cuh"

using namespace lockstep;

namespace {

constexpr int kInboxParities = 2;

// As in the first probe: the own word before the peer's, so the release waits for it.
__device__ __forceinline__ bool tag_own_first(const Peers& p, int lane, Where where) {
  if (lane > 0 && lane < p.n) {
    red_add_relaxed_sys(&p.control(0)->tag[lane * LOCKSTEP_SPACING], kTag);
    red_add_release_sys(&p.control(lane)->tag[p.us_at(lane) * LOCKSTEP_SPACING], -kTag);
  }
  return tag_wait(p, lane, where);
}

// The reset after the wait: one access fewer before the polls, one more after them.
__device__ __forceinline__ bool tag_reset_late(const Peers& p, int lane, Where where) {
  Control* own = p.control(0);
  bool mine = lane > 0 && lane < p.n;
  if (mine) red_add_release_sys(&p.control(lane)->tag[p.us_at(lane) * LOCKSTEP_SPACING], -kTag);
  bool fine = wait_all<Poll::kAcquire>(&own->state, where, mine, &own->tag[lane * LOCKSTEP_SPACING],
                                       [](int value) { return value + kTag <= 0; });
  if (mine) red_add_relaxed_sys(&own->tag[lane * LOCKSTEP_SPACING], kTag);
  return fine;
}

// NOT a barrier for data: it releases nothing. It shows what the release costs.
__device__ __forceinline__ bool tag_without_release(const Peers& p, int lane, Where where) {
  if (lane > 0 && lane < p.n) {
    red_add_relaxed_sys(&p.control(lane)->tag[p.us_at(lane) * LOCKSTEP_SPACING], -kTag);
    red_add_relaxed_sys(&p.control(0)->tag[lane * LOCKSTEP_SPACING], kTag);
  }
  return tag_wait<Poll::kAcquire>(p, lane, where);
}

__device__ __forceinline__ u32 mix(u32 a, u32 b, u32 c, u32 d) {
  u32 h = a * 0x9E3779B1u + b * 0x85EBCA77u + c * 0xC2B2AE3Du + d * 0x27D4EB2Fu;
  h ^= h >> 15;
  h *= 0x2C1B3C6Du;
  return h ^ (h >> 13);
}

__device__ __forceinline__ void spin_ns(u64 ns) {
  u64 begin = now_ns();
  while (now_ns() - begin < ns) {
  }
}

// One round of the litmus: check what round - 1 brought, then write this round's values to every peer. Two
// inboxes by parity: a peer that is one barrier ahead writes the other one.
//
// inbox: bytes from a slot's begin to u32 [2][n][words]. round: a function of both ranks' progress alone.
__device__ __forceinline__ void exchange_round(const Peers& p, i64 inbox, int words, int rank, int round,
                                               int jitter_ns, u64* errors) {
  int k = blockIdx.y + 1, peer = (rank + k) % p.n;
  if (jitter_ns > 0 && threadIdx.x == 0) {
    u32 h = mix(rank, round, blockIdx.x, k);
    if ((h & 7) == 0) spin_ns((h >> 3) % jitter_ns);
  }
  __syncthreads();
  auto box = [&](int slot, int parity, int from) {
    return reinterpret_cast<u32*>(p.base + slot * p.stride + inbox) + (i64)(parity * p.n + from) * words;
  };
  const u32* got = box(0, (round - 1) & 1, k);
  u32* sent = box(k, round & 1, p.us_at(k));
  u64 wrong = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += gridDim.x * blockDim.x) {
    if (round > 0) wrong += got[i] != mix(peer, rank, round - 1, i);
    sent[i] = mix(rank, peer, round, i);
  }
  if (wrong) atomicAdd(errors, wrong);
}

// iterations barriers in one launch: the protocol's time without launches.
template <typename Barrier>
__device__ __forceinline__ void repeat(char* base, i64 stride, int n, int iterations, Barrier barrier) {
  Peers peers{base, stride, n};
  for (int i = 0; i < iterations; i++)
    if (!barrier(peers, (int)threadIdx.x, Where{-1, 0})) return;
}

}  // namespace

#define LOCKSTEP_VARIANT(name, call)                                                                          \
  extern "C" __global__ void __launch_bounds__(32)                                                            \
      name(char* base, i64 stride, int n, int layer, int operation, int opens_step) {                         \
    wait_for_prior_kernels();                                                                                 \
    let_next_kernel_start();                                                                                  \
    Peers p{base, stride, n};                                                                                 \
    int lane = threadIdx.x;                                                                                   \
    Where where{layer, operation};                                                                            \
    call;                                                                                                     \
  }

LOCKSTEP_VARIANT(variant_tag_own_first, tag_own_first(p, lane, where))
LOCKSTEP_VARIANT(variant_tag_reset_late, tag_reset_late(p, lane, where))
LOCKSTEP_VARIANT(variant_tag_without_release, tag_without_release(p, lane, where))
// The count comes in the place of opens_step: a kernel argument, as the phase barrier wants it.
LOCKSTEP_VARIANT(variant_phase, phase_barrier(p, lane, where, opens_step))

extern "C" __global__ void __launch_bounds__(32) repeat_tag(char* base, i64 stride, int n, int iterations) {
  repeat(base, stride, n, iterations,
         [](const Peers& p, int lane, Where where) { return tag_barrier(p, lane, where); });
}
extern "C" __global__ void __launch_bounds__(32)
    repeat_tag_relaxed(char* base, i64 stride, int n, int iterations) {
  repeat(base, stride, n, iterations, [](const Peers& p, int lane, Where where) {
    return tag_barrier<Poll::kRelaxedThenFence>(p, lane, where);
  });
}
extern "C" __global__ void __launch_bounds__(32) repeat_epoch(char* base, i64 stride, int n, int iterations) {
  repeat(base, stride, n, iterations,
         [](const Peers& p, int lane, Where where) { return epoch_barrier(p, lane, where); });
}

// A launch and nothing else.
extern "C" __global__ void __launch_bounds__(32) nothing() {
  wait_for_prior_kernels();
  let_next_kernel_start();
}

// first_round: int32 [1], device memory; the round of the first exchange of a replay. index: of this exchange
// in its graph. errors: uint64 [1], device memory.
extern "C" __global__ void __launch_bounds__(256)
    exchange(char* base, i64 stride, int n, i64 inbox, int words, int rank, const int* first_round, int index,
             int jitter_ns, u64* errors) {
  wait_for_prior_kernels();
  let_next_kernel_start();
  exchange_round(Peers{base, stride, n}, inbox, words, rank, *first_round + index, jitter_ns, errors);
}

// The same, with the barrier in its last block. blocks_done: int32 [1], device memory, zero.
extern "C" __global__ void __launch_bounds__(256)
    exchange_tag(char* base, i64 stride, int n, i64 inbox, int words, int rank, const int* first_round,
                 int index, int jitter_ns, u64* errors, int* blocks_done) {
  wait_for_prior_kernels();
  let_next_kernel_start();
  Peers peers{base, stride, n};
  exchange_round(peers, inbox, words, rank, *first_round + index, jitter_ns, errors);
  if (last_block(blocks_done, gridDim.x * gridDim.y) && threadIdx.x < 32)
    tag_barrier(peers, threadIdx.x, Where{-1, 0});
}

// After the exchanges of a replay. step: int64 [1], the step that the record names.
extern "C" __global__ void advance(int* first_round, int rounds, i64* step) {
  wait_for_prior_kernels();
  let_next_kernel_start();
  *first_round += rounds;
  *step += 1;
}

// One word to and fro between two ranks: link latency. Nothing is released; the acquire only drops L1 lines.
// peer: slot of the other. first: 1 on the rank that serves. took_ns: uint64 [1], time of the rounds after the
// first tenth, in which the ranks find each other. Uses the phase words, which must be zero.
extern "C" __global__ void __launch_bounds__(32)
    ping_pong(char* base, i64 stride, int n, int peer, int first, int rounds, u64* took_ns) {
  Peers p{base, stride, n};
  Control* own = p.control(0);
  int lane = threadIdx.x;
  int* theirs = reinterpret_cast<int*>(p.control(peer)->phase) + p.us_at(peer) * LOCKSTEP_SPACING;
  const int* ours = reinterpret_cast<int*>(own->phase) + peer * LOCKSTEP_SPACING;
  u64 begin = 0;
  for (int i = 1; i <= rounds; i++) {
    if (i == rounds / 10 + 1) begin = now_ns();
    if (first && lane == 0) st_relaxed_sys(theirs, i);
    bool fine = wait_all<Poll::kAcquire>(&own->state, Where{-1, 0}, lane == peer, ours,
                                         [i](int value) { return value - i >= 0; });
    if (!fine) return;
    if (!first && lane == 0) st_relaxed_sys(theirs, i);
  }
  if (lane == 0) *took_ns = now_ns() - begin;
}
