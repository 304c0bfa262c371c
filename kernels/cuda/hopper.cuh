// What Hopper's tensor cores and copy engine are asked through: mbarriers, bulk copies, wgmma.
//
// Every wrapper is one instruction. Shared memory is named by its 32-bit address in the own block; a
// neighbour of the cluster by `in_block`.
#pragma once

namespace lockstep {

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
  char opaque[128];
};

__device__ __forceinline__ u32 shared_address(const void* at) {
  return static_cast<u32>(__cvta_generic_to_shared(at));
}

// -- mbarriers -----------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 bar, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

// The same place in another block of the cluster.
__device__ __forceinline__ u32 in_block(u32 at, u32 rank) {
  u32 mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(at), "r"(rank));
  return mapped;
}

__device__ __forceinline__ void barrier_arrive_at(u32 mapped) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mapped) : "memory");
}

__device__ __forceinline__ bool barrier_done(u32 bar, u32 parity) {
  u32 done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// -- the copy engine -----------------------------------------------------------------------------

__device__ __forceinline__ void load_box(u32 to, const TensorMap* map, int col, int row, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(map), "r"(col), "r"(row), "r"(bar)
      : "memory");
}

// To the same place of every block in `blocks`, and to its barrier there.
__device__ __forceinline__ void load_box_to(u32 to, const TensorMap* map, int col, int row, u32 bar,
                                            unsigned short blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(col), "r"(row), "r"(bar), "h"(blocks)
      : "memory");
}

__device__ __forceinline__ void store_box(const TensorMap* map, int col, int row, u32 from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(col),
               "r"(row), "r"(from)
               : "memory");
}

// Wait until what this thread stored has been read from shared memory.
__device__ __forceinline__ void end_stores() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Four 8 by 8 matrices of bf16, as accumulators lie in registers; lane i names row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrices(u32 row, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

__device__ __forceinline__ void ask_l2(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void ask_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Ordinary stores to shared memory become visible to wgmma and to the copy engine.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// -- wgmma ---------------------------------------------------------------------------------------

// Operands in shared memory are named by descriptors. Their upper half is a constant, and moving within an operand
// adds bytes / 16 to the lower half: one instruction, for these instructions stand between the products.
//
// All operands here are tiles of rows of 128 bytes (64 bf16) as the copy engine leaves them with its swizzle of 128
// bytes, at multiples of 1024 bytes: groups of 8 rows are 1024 bytes apart.
constexpr u32 kSwizzled = (1u << 30) | (1024 >> 4);

// In a cluster an address holds the block's rank, too, above what a descriptor takes.
__device__ __forceinline__ u32 in_sixteens(u32 at) { return (at & 0x3ffff) >> 4; }

// Rows along M or N, columns along K.
__device__ __forceinline__ u32 columns_along_k(u32 at) { return (1u << 16) | in_sixteens(at); }

// Rows along K, columns along N; the next 64 columns are in the next tile, 8192 bytes on.
__device__ __forceinline__ u32 rows_along_k(u32 at) { return ((8192u >> 4) << 16) | in_sixteens(at); }

__device__ __forceinline__ u64 operand(u32 lower) {
  u64 both;
  asm("mov.b64 %0, {%1, %2};" : "=l"(both) : "r"(lower), "r"(kSwizzled));
  return both;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kLeft>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

#define LOCKSTEP_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LOCKSTEP_F16(d, i) \
  LOCKSTEP_F4(d, i), LOCKSTEP_F4(d, i + 4), LOCKSTEP_F4(d, i + 8), LOCKSTEP_F4(d, i + 12)
#define LOCKSTEP_F32(d, i) LOCKSTEP_F16(d, i), LOCKSTEP_F16(d, i + 16)
#define LOCKSTEP_R32                                                                                        \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "   \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define LOCKSTEP_R64                                                                                        \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "   \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "    \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "    \
  "%62, %63}"

// d [64, 64] (+)= a [64, 16] · b [64, 16]ᵀ, both in shared memory; `add` 0 starts from zero.
__device__ __forceinline__ void wgmma_64(float (&d)[32], u64 a, u64 b, int add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " LOCKSTEP_R32 ", %32, %33, p, 1, 1, 0, 0; }"
      : LOCKSTEP_F32(d, 0)
      : "l"(a), "l"(b), "r"(add));
}

// d [64, 128] (+)= a [64, 16], in registers, · b [16, 128], rows along N.
__device__ __forceinline__ void wgmma_128(float (&d)[64], const u32* a, u64 b, int add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " LOCKSTEP_R64
      ", {%64, %65, %66, %67}, %68, p, 1, 1, 1; }"
      : LOCKSTEP_F32(d, 0), LOCKSTEP_F32(d, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// -- arithmetic ----------------------------------------------------------------------------------

#define LOCKSTEP_INFINITY __int_as_float(0x7f800000)

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two bf16 in a word, the first one low.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// -- programmatic dependent launch ---------------------------------------------------------------

__device__ __forceinline__ void await_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void release_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace lockstep
