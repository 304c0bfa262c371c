// The barriers as kernels of one warp, for places where no neighbouring kernel carries one.
//
// Each may be launched with programmatic dependent launch: it then waits for what came before it, and lets the
// next kernel be set up while it polls.
#include "barrier.cuh"

using namespace lockstep;

namespace {

// base: this rank's control block; stride: bytes from slot to slot; n: ranks; layer, operation: for the record;
// opens_step: 1 in the first barrier of a step, which then compares step numbers.
template <typename Barrier>
__device__ __forceinline__ void run(char* base, i64 stride, int n, int layer, int operation, int opens_step,
                                    Barrier barrier) {
  wait_for_prior_kernels();
  let_next_kernel_start();
  Peers peers{base, stride, n};
  int lane = threadIdx.x;
  Where where{layer, operation};
  if (opens_step) announce_step(peers, lane);
  bool fine = barrier(peers, lane, where);
  if (opens_step && fine) check_step(peers, lane, where);
}

}  // namespace

#define LOCKSTEP_BARRIER(name, call)                                                                          \
  extern "C" __global__ void __launch_bounds__(32)                                                            \
      name(char* base, i64 stride, int n, int layer, int operation, int opens_step) {                         \
    run(base, stride, n, layer, operation, opens_step,                                                        \
        [](const Peers& p, int lane, Where where) { return call; });                                          \
  }

LOCKSTEP_BARRIER(barrier_tag, tag_barrier<Poll::kAcquire>(p, lane, where))
LOCKSTEP_BARRIER(barrier_tag_relaxed, tag_barrier<Poll::kRelaxedThenFence>(p, lane, where))
LOCKSTEP_BARRIER(barrier_epoch, epoch_barrier<Poll::kAcquire>(p, lane, where))
LOCKSTEP_BARRIER(barrier_epoch_relaxed, epoch_barrier<Poll::kRelaxedThenFence>(p, lane, where))
