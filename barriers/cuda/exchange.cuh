// What kernels that exchange rows over peer memory have in common: loads of what is read once, and a signal
// that all blocks of a grid carry.
#pragma once

#include "barrier.cuh"

namespace lockstep {

#ifndef LOCKSTEP_EMULATED  // the test that runs kernels on a CPU brings its own

// Read once, by us alone: not worth a line of L1, and a peer's line must not stay there.
__device__ __forceinline__ uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

#endif

// One warp of a block that sends its own share of the grid's signal. All shares of a grid add up to kTag, so
// that peers need not know how many blocks there are. Order and pairing as in tag_signal.
__device__ __forceinline__ void signal_share(const Peers& p, int lane, int share) {
  if (blockIdx.x == 0) share = kTag - share * ((int)gridDim.x - 1);
  if (lane > 0 && lane < p.n) {
    red_add_release_sys(&p.control(lane)->tag[p.us_at(lane) * LOCKSTEP_SPACING], -share);
    if (blockIdx.x == 0) red_add_relaxed_sys(&p.control(0)->tag[lane * LOCKSTEP_SPACING], kTag);
  }
}

// The end of a grid that sends, every thread of every block after its last write: signal, and in one block wait
// for all ranks. True in the warp that waited.
//
// Args: counter: for last_block. share: of the signal that each block but the first gives; 0: the last block gives
// all of it. opens_step: this is the step's first barrier.
__device__ __forceinline__ bool close_grid(const Peers& p, int* counter, int share, int opens_step, Where where) {
  if (share)
    __syncthreads();  // before the block's release
  else if (!last_block(counter, gridDim.x))
    return false;
  if (threadIdx.x >= 32) return false;
  int lane = threadIdx.x;
  if (share && blockIdx.x != 0) {
    signal_share(p, lane, share);
    return false;
  }
  if (opens_step) announce_step(p, lane);
  if (share)
    signal_share(p, lane, share);
  else
    tag_signal(p, lane);
  if (tag_wait(p, lane, where) && opens_step) check_step(p, lane, where);
  return true;
}

}  // namespace lockstep
