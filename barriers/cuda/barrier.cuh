// Barriers among the ranks of one node, for one warp of a kernel: tag, epoch and (for comparison) phase.
//
// Ranks see each other through one address range: this rank's memory is slot 0 and rank (self + k) mod n
// is slot k, at `base + k * stride`. A slot begins with a `Control` block. Since slots are relative, the
// device code needs no rank number, so one compiled graph serves every rank.
//
// Everything a wait needs before it is *late* comes in kernel parameters: no load stands between the
// launch and the signal. The deadline, the step and the poison flag are read only after the first polls.
//
// A wait never hangs and never traps. At its deadline it writes who is late into pinned host memory, marks
// the run poisoned and returns false; later waits return false after their first polls. A poisoned rank
// goes on *signalling*, so that its peers blame only the rank that is really late. The memory of a run
// that was poisoned is thrown away: its signals are no longer paired.
#pragma once

namespace lockstep {

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifndef LOCKSTEP_SPACING
#define LOCKSTEP_SPACING 1  // words from one rank's signal to the next; the A/B benchmark varies it
#endif

constexpr int kMaxRanks = 32;  // one lane of a warp each
constexpr int kTag = 1024;
constexpr int kFastPolls = 32;   // microseconds, before anything else is looked at
constexpr int kSlowPolls = 64;   // between two looks at the clock and the poison flag
// Between two looks into host memory, the first one included. Every waiting block looks, and host memory answers
// one read after another, each about a microsecond: were a wait of some 20 us enough for a look, a grid of
// hundreds would be late by hundreds of microseconds, its peers would wait for it and look, too, and so on.
constexpr u64 kAskHostNs = 1000000;
constexpr u32 kWarp = 0xffffffffu;

// Why waits stopped waiting; `barriers/watch.py` mirrors the numbers.
enum Stop : int { kRunning = 0, kDeadline = 1, kStepMismatch = 2, kAborted = 3 };

// In pinned host memory, one per rank; written once. `barriers/watch.py` mirrors it.
struct Record {
  int stop;        // a Stop; stored last, so a host that sees it non-zero may read the rest
  int abort;       // set by the host: stop waiting now
  int layer;
  int operation;
  i64 step;
  i64 peer_step;   // step mismatch: where the lowest slot of `missing` is
  u64 missing;     // bit k: the rank of slot k has not arrived (or is in another step)
  u64 waited_ns;
};

// In device memory behind the signals. The host writes it before the first launch.
struct State {
  const i64* step;    // int64 [1]: number of the running step, kept by the runtime
  Record* record;     // pinned host memory
  u64 deadline_ns;    // of one wait
  int poison;         // a Stop
  int reserved;
  i64 own_step;       // int64 [1]: what `step` points to when no runtime keeps one
};

// Each word has one writer rank beside its owner.
struct Signals {
  int tag[kMaxRanks * 8];     // [k * spacing]: signals from slot k, owed minus taken, times kTag
  u32 epoch[kMaxRanks * 8];   // [k * spacing]: barriers that slot k has arrived at; [0]: our own count
  u32 phase[kMaxRanks * 8];   // [k * spacing]: the last count that slot k sent
  i64 steps[kMaxRanks];       // [k]: the step that slot k announced
};

// The head of every slot.
struct Control : Signals {
  State state;
};

#ifdef LOCKSTEP_STATE_AT  // given by the host code that lays out the same block
static_assert(sizeof(Signals) == LOCKSTEP_STATE_AT, "Control is not as the host has it");
static_assert(sizeof(State) == LOCKSTEP_STATE_BYTES, "State is not as the host has it");
static_assert(sizeof(Record) == LOCKSTEP_RECORD_BYTES, "Record is not as the host has it");
#endif

struct Peers {
  char* base;   // slot 0: this rank's control block, then its payload
  i64 stride;   // bytes from one slot to the next
  int n;        // ranks, 1..kMaxRanks

  __device__ __forceinline__ Control* control(int slot) const {
    return reinterpret_cast<Control*>(base + slot * stride);
  }
  // The slot in which the rank of our slot k sees us.
  __device__ __forceinline__ int us_at(int k) const { return n - k; }
};

// Where in the step a wait stands; only for the record.
struct Where {
  int layer;
  int operation;
};

// ---- memory operations ---------------------------------------------------------------------------------

#ifndef LOCKSTEP_EMULATED  // the test that runs this file on a CPU brings its own

__device__ __forceinline__ int ld_acquire_sys(const int* p) {
  int v;
  asm volatile("ld.acquire.sys.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ int ld_relaxed_sys(const int* p) {
  int v;
  asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void st_relaxed_sys(int* p, int v) {
  asm volatile("st.relaxed.sys.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void st_release_sys(int* p, int v) {
  asm volatile("st.release.sys.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void red_add_relaxed_sys(int* p, int v) {
  asm volatile("red.relaxed.sys.global.add.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// A release is one MEMBAR.SYS before the access; a separate fence would also invalidate L1.
__device__ __forceinline__ void red_add_release_sys(int* p, int v) {
  asm volatile("red.release.sys.global.add.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void fence_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
__device__ __forceinline__ u64 now_ns() {
  u64 t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
  return t;
}

// Programmatic dependent launch; both do nothing in a kernel that was launched without it.
__device__ __forceinline__ void wait_for_prior_kernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ int increment_acq_rel_gpu(int* p) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(p) : "memory");
  return before;
}

#endif

// ---- waiting -------------------------------------------------------------------------------------------

// How a wait polls. Both end in an acquire that pairs with the sender's release; which is faster depends on
// whether an acquiring load or one trailing fence costs more.
enum class Poll { kAcquire, kRelaxedThenFence };

template <Poll kPoll>
__device__ __forceinline__ int poll(const int* p) {
  return kPoll == Poll::kAcquire ? ld_acquire_sys(p) : ld_relaxed_sys(p);
}

// One lane: stop the run. The first to come writes the record; the others change nothing.
__device__ __noinline__ void stop_run(State* state, Stop why, Where where, u64 missing, i64 peer_step,
                                      u64 waited_ns) {
  if (atomicCAS(&state->poison, kRunning, why) != kRunning) return;
  Record* r = state->record;
  r->layer = where.layer;
  r->operation = where.operation;
  r->step = *state->step;
  r->peer_step = peer_step;
  r->missing = missing;
  r->waited_ns = waited_ns;
  st_release_sys(&r->stop, why);  // pairs with the host's ordered reads of `stop`, then the rest
}

// The whole warp, after the fast polls: may the wait go on? `late`: the lane's peer has not arrived. ask_ns: when to
// look into host memory; returns the next such time, or 0 to stop.
__device__ __noinline__ u64 may_go_on(State* state, Where where, bool late, u64 begin_ns, u64 ask_ns) {
  u32 missing = __ballot_sync(kWarp, late);
  int go_on = 1;
  if ((threadIdx.x & 31) == 0) {
    u64 now = now_ns(), waited = now - begin_ns;
    // Relaxed: poison carries no data, only the wish to stop. `abort` lies in host memory.
    if (ld_relaxed_sys(&state->poison) != kRunning) {
      go_on = 0;
    } else if (waited > state->deadline_ns) {
      stop_run(state, kDeadline, where, missing, 0, waited);
      go_on = 0;
    } else if (now >= ask_ns) {
      ask_ns = now + kAskHostNs;
      if (ld_relaxed_sys(&state->record->abort) != 0) {
        stop_run(state, kAborted, where, missing, 0, waited);
        go_on = 0;
      }
    }
  }
  return __shfl_sync(kWarp, go_on, 0) != 0 ? ask_ns : 0;
}

// The whole warp: wait until `arrived(word)` holds in every lane with `late` set.
//
// Args: state: of this rank. word: the lane's signal, in own memory. arrived: int -> bool; once true of a
// word it stays true until this rank's next barrier. Returns false if the run is poisoned.
template <Poll kPoll, typename Arrived>
__device__ __forceinline__ bool wait_all(State* state, Where where, bool late, const int* word,
                                         Arrived arrived) {
  #pragma unroll 1
  for (int i = 0; i < kFastPolls && __any_sync(kWarp, late); i++) late = late && !arrived(poll<kPoll>(word));
  if (__any_sync(kWarp, late)) {
    u64 begin = now_ns(), ask = begin + kAskHostNs;
    do {
      #pragma unroll 1
      for (int i = 0; i < kSlowPolls && __any_sync(kWarp, late); i++)
        late = late && !arrived(poll<kPoll>(word));
    } while (__any_sync(kWarp, late) && (ask = may_go_on(state, where, late, begin, ask)) != 0);
  }
  // Relaxed polls acquire nothing by themselves: this fence pairs with the peers' releases.
  if (kPoll == Poll::kRelaxedThenFence) fence_sys();
  return !__any_sync(kWarp, late);
}

// ---- announcing the step -------------------------------------------------------------------------------

// In a step's first barrier ranks tell each other which step they are in, so that a rank that skipped one is
// found there, and not when the others wait for it at the end. A step needs another barrier after this one: a
// peer leaves that only when we have read what it announced here, so it cannot announce its next step too soon.
__device__ __forceinline__ void announce_step(const Peers& p, int lane) {
  i64 step = *p.control(0)->state.step;
  if (lane > 0 && lane < p.n) p.control(lane)->steps[p.us_at(lane)] = step;  // released by the signal
}

// The whole warp, after the barrier. False: some peer is in another step, and the run is poisoned.
__device__ __forceinline__ bool check_step(const Peers& p, int lane, Where where) {
  Control* own = p.control(0);
  i64 step = *own->state.step, seen = step;
  if (lane > 0 && lane < p.n) seen = own->steps[lane];
  u32 wrong = __ballot_sync(kWarp, seen != step);
  if (wrong != 0 && lane == __ffs(wrong) - 1) stop_run(&own->state, kStepMismatch, where, wrong, seen, 0);
  return wrong == 0;
}

// ---- tag: stateless, so a replayed graph cannot be out of date ------------------------------------------
//
// tag[k] of rank a counts what a is owed: a itself adds kTag when it arrives, the rank of slot k subtracts
// kTag when that one does. a may pass when no word is above zero. It is `<= 0`, never `== 0`: a fast peer may
// have subtracted for the barrier after this one already. After both have passed the word is back at zero.

// The whole warp. Everything that this thread's block wrote before a __syncthreads, and everything that
// happened before this kernel, is visible to a peer that sees the signal.
__device__ __forceinline__ void tag_signal(const Peers& p, int lane) {
  if (lane > 0 && lane < p.n) {
    // Pairs with the acquire in the peer's wait. The peer comes first: a release waits for everything before
    // it, and our own add, relaxed because it tells nobody anything, lands in the shadow of the flight.
    red_add_release_sys(&p.control(lane)->tag[p.us_at(lane) * LOCKSTEP_SPACING], -kTag);
    red_add_relaxed_sys(&p.control(0)->tag[lane * LOCKSTEP_SPACING], kTag);
  }
}

// The whole warp, in the same lanes as the signal: the lane's own add comes before its polls in program
// order, on the same word. Returns false if the run is poisoned.
template <Poll kPoll = Poll::kAcquire>
__device__ __forceinline__ bool tag_wait(const Peers& p, int lane, Where where) {
  Control* own = p.control(0);
  return wait_all<kPoll>(&own->state, where, lane > 0 && lane < p.n, &own->tag[lane * LOCKSTEP_SPACING],
                         [](int value) { return value <= 0; });
}

// The whole warp: signal, wait.
template <Poll kPoll = Poll::kAcquire>
__device__ __forceinline__ bool tag_barrier(const Peers& p, int lane, Where where) {
  tag_signal(p, lane);
  return tag_wait<kPoll>(p, lane, where);
}

// ---- epoch: the count lives on the device ---------------------------------------------------------------
//
// epoch[0] is how many barriers this rank has passed; each arrival stores that plus one at every peer. Plain
// stores cross the link, no atomics; the price is a load before the signal. Counts wrap: compare by difference.

template <Poll kPoll = Poll::kAcquire>
__device__ __forceinline__ bool epoch_barrier(const Peers& p, int lane, Where where) {
  Control* own = p.control(0);
  int* words = reinterpret_cast<int*>(own->epoch);
  int count = ld_relaxed_sys(words) + 1;  // only this warp and earlier kernels of its stream write it
  bool mine = lane > 0 && lane < p.n;
  // Pairs with the acquire in the peer's wait. The release's fence does not need the count: both latencies
  // overlap.
  if (mine)
    st_release_sys(reinterpret_cast<int*>(p.control(lane)->epoch) + p.us_at(lane) * LOCKSTEP_SPACING, count);
  bool fine = wait_all<kPoll>(&own->state, where, mine, words + lane * LOCKSTEP_SPACING,
                              [count](int value) { return value - count >= 0; });
  if (lane == 0) st_relaxed_sys(words, count);  // after every lane's load: the polls' votes converge the warp
  __syncwarp();                                 // before any lane's load for the next barrier
  return fine;
}

// ---- phase: the count is a kernel argument ---------------------------------------------------------------
//
// NOT replay-safe: a graph freezes the argument, and from its second replay on every wait is satisfied by the
// first. Kept for the A/B benchmark, which shows it fail.

template <Poll kPoll = Poll::kAcquire>
__device__ __forceinline__ bool phase_barrier(const Peers& p, int lane, Where where, int count) {
  Control* own = p.control(0);
  bool mine = lane > 0 && lane < p.n;
  if (mine)  // pairs as in epoch_barrier
    st_release_sys(reinterpret_cast<int*>(p.control(lane)->phase) + p.us_at(lane) * LOCKSTEP_SPACING, count);
  return wait_all<kPoll>(&own->state, where, mine,
                         reinterpret_cast<int*>(own->phase) + lane * LOCKSTEP_SPACING,
                         [count](int value) { return value - count >= 0; });
}

// ---- at the end of a grid --------------------------------------------------------------------------------

// Every thread of every block, after its last write: true in the one block that comes last. Its first warp
// may then signal for the whole grid.
//
// Args: counter: int32 [1], device memory of this rank, zero before and after. blocks: of the grid.
//
// Order: a block's writes come before its __syncthreads, that before thread 0's add (release at the scope of
// this GPU), which pairs with the last block's add (acquire); the signal's fence is cumulative and carries
// them on to the peers.
__device__ __forceinline__ bool last_block(int* counter, int blocks) {
  __shared__ int is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = increment_acq_rel_gpu(counter) == blocks - 1;
    if (is_last) *counter = 0;
  }
  __syncthreads();
  return is_last != 0;
}

}  // namespace lockstep
