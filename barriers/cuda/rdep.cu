// Rank-deduplicated expert parallelism over peer memory: send, sum, pull.
//
//   send  each token goes once to every rank that has one of its experts, quantised on the way; the kernel
//         ends when the tokens of all ranks are here (a tag barrier, carried by its blocks)
//   ...   the experts run over the received rows
//   sum   the weighted sum of each received row's experts, in k order, into symmetric memory; its blocks
//         give the second barrier's signal, which flies while the next kernel starts
//   pull  waits for that signal and reads the peers' partial sums of our tokens, added in rank order
//
// Why nothing is overwritten too early: a rank signals `sum` after its experts have read the received rows,
// and sends again only after `pull`, which ends when all signals are here; a rank signals `send` after it has
// pulled, and sums again only after all `send` signals are here. So two signals a layer protect both buffers.
//
// Slots are relative (slot 0 is this rank, slot k is rank + k); rows on the wire are [source rank, kCapacity].
// Every rank may send another number of tokens and use another grid: a signal is always worth kTag in all.
#include "exchange.cuh"

using namespace lockstep;

namespace {

constexpr int kWorld = RDEP_WORLD;
constexpr int kHidden = RDEP_HIDDEN;
constexpr int kTopK = RDEP_TOP_K;
constexpr int kLocalExperts = RDEP_LOCAL_EXPERTS;
constexpr int kCapacity = RDEP_CAPACITY;
constexpr int kAct = RDEP_ACT;      // 0 bf16, 1 fp16, 2 fp32
constexpr bool kFp8 = RDEP_FP8;     // tokens travel as e4m3 with fp32 scales, else as act
constexpr bool kBulk = RDEP_BULK;   // pull through the bulk copy engine and shared memory
constexpr int kSendThreads = RDEP_SEND_THREADS;
constexpr int kSumThreads = RDEP_SUM_THREADS;
constexpr int kPullThreads = RDEP_PULL_THREADS;

constexpr int kActBytes = kAct == 2 ? 4 : 2;
constexpr int kLanes = 16 / kActBytes;              // act elements in 16 bytes
constexpr int kActChunks = kHidden / kLanes;        // 16-byte pieces of an act row
constexpr int kWireChunks = kFp8 ? kHidden / 16 : kActChunks;
constexpr int kGroups = (kHidden + 127) / 128;
constexpr int kSendParts = (kWireChunks + kSendThreads - 1) / kSendThreads;  // blocks' worth of a row
constexpr int kSumParts = (kActChunks + kSumThreads - 1) / kSumThreads;
constexpr int kPullParts = (kActChunks + kPullThreads - 1) / kPullThreads;
constexpr u32 kAllRanks = (1u << kWorld) - 1;

static_assert(kHidden % 16 == 0 && kWorld <= 8 && kTopK <= 16, "see TransportConfig");
static_assert(kSendThreads % 32 == 0 && kSumThreads % 32 == 0 && kPullThreads % 32 == 0, "whole warps");

// Own memory of this rank, int32.
struct Words {
  int rank;
  int silent_rows;   // of the last rows of the wire, how many hold no id at any peer; 0 is always true
  int send_blocks;   // for last_block
  int sum_blocks;
};

// This rank's own part of the wire; slot k's is `stride * k` bytes further.
struct Wire {
  char* x;         // e4m3 or act [kWorld * kCapacity, kHidden]
  float* scale;    // fp32 [kWorld * kCapacity, kGroups], unused without kFp8
  int* ids;        // int32 [kWorld * kCapacity, kTopK]; this rank's expert index or -1
  float* weights;  // fp32 [kWorld * kCapacity, kTopK]
  int* count;      // int32 [kWorld]: rows that each source sent
};

template <typename T>
__device__ __forceinline__ T* at_slot(T* own, i64 stride, int slot) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(own) + slot * stride);
}

// ---- numbers -------------------------------------------------------------------------------------------

__device__ __forceinline__ void unpack2(u32 w, float& low, float& high) {
  if (kAct == 0) {
    low = __uint_as_float(w << 16);
    high = __uint_as_float(w & 0xffff0000u);
  } else {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high)
        : "r"(w));
  }
}

__device__ __forceinline__ u32 pack2(float low, float high) {
  u32 w;
  if (kAct == 0)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
  return w;
}

// 16 bytes of act as fp32, and back.
__device__ __forceinline__ void unpack(uint4 v, float (&f)[kLanes]) {
  const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (kAct == 2)
      f[i] = __uint_as_float(w[i]);
    else
      unpack2(w[i], f[2 * i], f[2 * i + 1]);
  }
}

__device__ __forceinline__ uint4 pack(const float (&f)[kLanes]) {
  u32 w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (kAct == 2)
      w[i] = __float_as_uint(f[i]);
    else
      w[i] = pack2(f[2 * i], f[2 * i + 1]);
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

__device__ __forceinline__ u32 e4m3x4(float a, float b, float c, float d) {
  unsigned short low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return low | (u32)high << 16;
}

// x / scale as a division rounds it, for these bits must be those of every other place that quantises: one
// Newton step from a correctly rounded reciprocal (Markstein). 16 divisions would branch, one after another.
__device__ __forceinline__ float quotient(float x, float scale, float inverse) {
  float q = x * inverse;
  return copysignf(fmaf(fmaf(-q, scale, x), inverse, q), x);
}

// ---- owners --------------------------------------------------------------------------------------------

// The whole warp: which slots own one of the token's experts, as bits. ids: int32 [kTopK] of the token.
__device__ __forceinline__ u32 owner_slots(const int* ids, int rank) {
  int lane = threadIdx.x & 31;
  u32 id = lane < kTopK ? ids[lane] : ~0u;
  u32 ranks = __reduce_or_sync(kWarp, id < kWorld * kLocalExperts ? 1u << id / kLocalExperts : 0u);
  return (ranks >> rank | ranks << (kWorld - rank)) & kAllRanks;
}

// ---- send ----------------------------------------------------------------------------------------------

struct Piece {
  uint4 bytes;   // 16 bytes of a row on the wire
  float scale;   // of its group
};

// The thread's 16 bytes of the row, as they are.
__device__ __forceinline__ Piece load_piece(const char* row, const float* scale, int chunk) {
  Piece p{make_uint4(0, 0, 0, 0), 0.f};
  if (chunk < kWireChunks) {
    p.bytes = *reinterpret_cast<const uint4*>(row + chunk * 16);
    if (kFp8) p.scale = scale[chunk / 8];
  }
  return p;
}

// 16 elements of an act row: as many 16-byte loads as an element has bytes.
struct Elements {
  uint4 v[kActBytes];
};

__device__ __forceinline__ Elements load_elements(const char* row, int chunk) {
  Elements e;
#pragma unroll
  for (int i = 0; i < kActBytes; i++) {
    e.v[i] = make_uint4(0, 0, 0, 0);
    if (chunk < kWireChunks) e.v[i] = reinterpret_cast<const uint4*>(row)[chunk * kActBytes + i];
  }
  return e;
}

// Quantised: 8 neighbouring lanes hold a group of 128.
__device__ __forceinline__ Piece quantize(const Elements& e) {
  float f[16];
  float amax = 0.f;
#pragma unroll
  for (int i = 0; i < kActBytes; i++) {
    float part[kLanes];
    unpack(e.v[i], part);
#pragma unroll
    for (int j = 0; j < kLanes; j++) {
      f[i * kLanes + j] = part[j];
      amax = fmaxf(amax, fabsf(part[j]));
    }
  }
#pragma unroll
  for (int o = 4; o > 0; o >>= 1) amax = fmaxf(amax, __shfl_xor_sync(kWarp, amax, o));
  float scale = __fdiv_rn(fmaxf(amax, 1e-4f), 448.f), inverse = __frcp_rn(scale);
#pragma unroll
  for (int i = 0; i < 16; i++) f[i] = quotient(f[i], scale, inverse);
  u32 q[4];
#pragma unroll
  for (int i = 0; i < 4; i++) q[i] = e4m3x4(f[4 * i], f[4 * i + 1], f[4 * i + 2], f[4 * i + 3]);
  return {make_uint4(q[0], q[1], q[2], q[3]), scale};
}

// The whole warp: its 512 bytes and 4 scales of a row to every slot in `slots`, peers first.
__device__ __forceinline__ void put_piece(const Wire& wire, i64 stride, int row, int chunk, const Piece& p,
                                          u32 slots) {
  char* x = wire.x + ((i64)row * kWireChunks + chunk) * 16;
#pragma unroll
  for (int i = 1; i <= kWorld; i++) {
    int slot = i % kWorld;
    if (slots >> slot & 1 && chunk < kWireChunks) *reinterpret_cast<uint4*>(x + slot * stride) = p.bytes;
  }
  if (kFp8) {
    // One instruction for all peers, four neighbouring lanes each: one small packet a peer and warp.
    int lane = threadIdx.x & 31, slot = lane / 4, group = (chunk - lane) / 8 + lane % 4;
    float scale = __shfl_sync(kWarp, p.scale, lane % 4 * 8);
    if (slot < kWorld && slots >> slot & 1 && group < kGroups)
      at_slot(wire.scale, stride, slot)[(i64)row * kGroups + group] = scale;
  }
}

// The whole block: the row's ids and weights to every slot, with -1 for experts of others.
__device__ __forceinline__ void put_choices(const Wire& wire, i64 stride, int rank, int row, const int* ids,
                                            const float* weights) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kWorld * kTopK; i += kSendThreads) {
    int slot = i / kTopK, k = i % kTopK;
    int local = ids[k] - (rank + slot) % kWorld * kLocalExperts;
    bool theirs = local >= 0 && local < kLocalExperts;
    at_slot(wire.ids, stride, slot)[row * kTopK + k] = theirs ? local : -1;
    if (theirs) at_slot(wire.weights, stride, slot)[row * kTopK + k] = weights[k];
  }
}

// One block: tell every slot how many rows this rank sends, and take back the ids of rows past them that an
// earlier, larger key may have left there.
__device__ __forceinline__ void put_count(const Wire& wire, i64 stride, Words* words, int rank, int tokens) {
  int end = kCapacity - words->silent_rows;
#pragma unroll 1
  for (int i = threadIdx.x + tokens * kTopK; i < end * kTopK; i += kSendThreads)
#pragma unroll 1
    for (int slot = 0; slot < kWorld; slot++)
      at_slot(wire.ids, stride, slot)[rank * kCapacity * kTopK + i] = -1;
  if (threadIdx.x < kWorld) at_slot(wire.count, stride, threadIdx.x)[rank] = tokens;
  __syncthreads();  // everybody has read silent_rows
  if (threadIdx.x == 0) words->silent_rows = kCapacity - tokens;
}

// tokens: rows of x. share: of the signal that each block but the first gives; 0: the last block gives all of it.
template <bool kQuantize>
__device__ __forceinline__ void send(char* base, i64 stride, const char* x, const float* scale, const int* ids,
                                     const float* weights, const Wire& wire, Words* words, int tokens,
                                     int share, int opens_step, Where where) {
  wait_for_prior_kernels();
  let_next_kernel_start();
  constexpr i64 kRowBytes = kQuantize ? kHidden * kActBytes : kWireChunks * 16;
  int rank = words->rank;
  for (int item = blockIdx.x; item < tokens * kSendParts; item += gridDim.x) {
    int t = item / kSendParts, part = item % kSendParts, chunk = part * kSendThreads + threadIdx.x;
    int row = rank * kCapacity + t;
    const char* from = x + t * kRowBytes;
    Piece piece;
    u32 slots;
    if constexpr (kQuantize) {
      Elements elements = load_elements(from, chunk);  // both loads are in flight before either is used
      slots = owner_slots(ids + t * kTopK, rank);
      piece = quantize(elements);
    } else {
      piece = load_piece(from, scale + t * kGroups, chunk);
      slots = owner_slots(ids + t * kTopK, rank);
    }
    if (slots) put_piece(wire, stride, row, chunk, piece, slots);
    if (part == 0) put_choices(wire, stride, rank, row, ids + t * kTopK, weights + t * kTopK);
  }
  if (blockIdx.x == 0) put_count(wire, stride, words, rank, tokens);
  close_grid(Peers{base, stride, kWorld}, &words->send_blocks, share, opens_step, where);
}

// ---- sum -----------------------------------------------------------------------------------------------

constexpr int kInFlight = 4;  // experts of a row that a thread loads before it adds the first

// The whole warp: sum over the row's experts, in k order, of weight * y, rounded once.
__device__ __forceinline__ void sum_row(const char* y, const int* ids, const float* weights, char* partial,
                                        i64 row, int chunk) {
  int lane = threadIdx.x & 31;
  bool choice = lane < kTopK && ids[row * kTopK + lane] >= 0;
  float weight = choice ? weights[row * kTopK + lane] : 0.f;
  u32 left = __ballot_sync(kWarp, choice);
  if (left == 0) return;
  float total[kLanes] = {};
  while (left) {
    uint4 v[kInFlight];
    float w[kInFlight];
    int n = 0;
#pragma unroll
    for (int i = 0; i < kInFlight; i++) {
      if (left == 0) continue;  // uniform in the warp
      int k = __ffs(left) - 1;
      left &= left - 1;
      w[i] = __shfl_sync(kWarp, weight, k);
      v[i] = make_uint4(0, 0, 0, 0);
      if (chunk < kActChunks)
        v[i] = load_once(y + ((row * kTopK + k) * kActChunks + chunk) * 16);
      n = i + 1;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; i++) {
      if (i >= n) continue;
      float f[kLanes];
      unpack(v[i], f);
      // Not fused: the oracle rounds the product, too.
#pragma unroll
      for (int j = 0; j < kLanes; j++) total[j] = __fadd_rn(total[j], __fmul_rn(w[i], f[j]));
    }
  }
  if (chunk < kActChunks) *reinterpret_cast<uint4*>(partial + (row * kActChunks + chunk) * 16) = pack(total);
}

// ---- pull ----------------------------------------------------------------------------------------------

__device__ __forceinline__ void add(float (&total)[kLanes], uint4 v) {
  float f[kLanes];
  unpack(v, f);
#pragma unroll
  for (int j = 0; j < kLanes; j++) total[j] = __fadd_rn(total[j], f[j]);
}

// Slot of rank r.
__device__ __forceinline__ int slot_of(int r, int rank) { return r >= rank ? r - rank : r - rank + kWorld; }

// One thread's 16 bytes of the partial sums of `slots`, straight from the peers, all in flight at once.
__device__ __forceinline__ void pull_direct(const char* mine, i64 stride, int rank, u32 slots, bool active,
                                            float (&total)[kLanes]) {
  uint4 v[kWorld];
#pragma unroll
  for (int r = 0; r < kWorld; r++) {
    int slot = slot_of(r, rank);
    v[r] = make_uint4(0, 0, 0, 0);
    if (active && slots >> slot & 1) v[r] = load_once(mine + slot * stride);
  }
  // A rank that is not asked adds +0, which changes no bit: the total is never -0.
#pragma unroll
  for (int r = 0; r < kWorld; r++) add(total, v[r]);
}

// The block's part of the same rows by bulk copies into shared memory: few, large requests, no registers.
struct BulkRows {
  alignas(128) uint4 rows[kBulk ? kWorld : 1][kBulk ? kPullThreads : 1];
  u64 barrier;
};

__device__ __forceinline__ u32 shared_at(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Thread 0. part: first byte of the block's part in slot 0; part_bytes: its length.
__device__ __forceinline__ void bulk_start(BulkRows& shared, const char* part, i64 stride, u32 slots,
                                           int part_bytes) {
  u32 barrier = shared_at(&shared.barrier);
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier) : "memory");
  // The acquire of the peers' signals was for ordinary loads; the copy engine reads through another proxy.
  asm volatile("fence.proxy.async;" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(__popc(slots) * part_bytes)
               : "memory");
#pragma unroll
  for (int i = 1; i <= kWorld; i++) {
    int slot = i % kWorld;
    if (slots >> slot & 1)
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared_at(shared.rows[slot])),
                   "l"(part + slot * stride), "r"(part_bytes), "r"(barrier)
                   : "memory");
  }
}

__device__ __forceinline__ void bulk_wait(BulkRows& shared) {
  int done = 0;
  while (!done)
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], 0; selp.s32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(shared_at(&shared.barrier))
        : "memory");
}

// First warp of a block: until the signals of `slots` are here, or the run is stopped.
__device__ __forceinline__ void wait_for(const Peers& p, u32 slots, Where where) {
  int lane = threadIdx.x;
  Control* own = p.control(0);
  wait_all<Poll::kAcquire>(&own->state, where, lane > 0 && slots >> lane & 1,
                           &own->tag[lane % kWorld * LOCKSTEP_SPACING],
                           [](int value) { return value <= 0; });
}

}  // namespace

// ---- kernels -------------------------------------------------------------------------------------------
//
// base, stride: as in Peers. words: int32 [4] of this rank. layer: for the record of a late rank.

// x: e4m3 [tokens, kHidden] and scale: fp32 [tokens, kGroups]; or, without kFp8, act rows and no scale.
// ids: int32 [tokens, kTopK], global, -1 for none. weights: fp32 [tokens, kTopK]. recv_*: see Wire.
extern "C" __global__ void __launch_bounds__(kSendThreads)
    rdep_send(char* base, i64 stride, const char* x, const float* scale, const int* ids, const float* weights,
              char* recv_x, float* recv_scale, int* recv_ids, float* recv_weights, int* recv_count,
              Words* words, int tokens, int share, int layer, int operation, int opens_step) {
  send<false>(base, stride, x, scale, ids, weights, {recv_x, recv_scale, recv_ids, recv_weights, recv_count},
              words, tokens, share, opens_step, {layer, operation});
}

#if RDEP_FP8
// The same of x: act [tokens, kHidden], quantised here; scale is not read.
extern "C" __global__ void __launch_bounds__(kSendThreads)
    rdep_send_quantized(char* base, i64 stride, const char* x, const float* scale, const int* ids,
                        const float* weights, char* recv_x, float* recv_scale, int* recv_ids,
                        float* recv_weights, int* recv_count, Words* words, int tokens, int share,
                        int layer, int operation, int opens_step) {
  send<true>(base, stride, x, scale, ids, weights, {recv_x, recv_scale, recv_ids, recv_weights, recv_count},
             words, tokens, share, opens_step, {layer, operation});
}
#endif

// y: act [kWorld * kCapacity * kTopK, kHidden]; rows of id -1 are not read. partial: act [kWorld * kCapacity,
// kHidden], symmetric; rows without an expert here are not written.
extern "C" __global__ void __launch_bounds__(kSumThreads)
    rdep_sum(char* base, i64 stride, const char* y, const int* recv_ids, const float* recv_weights,
             const int* recv_count, char* partial, Words* words, int share) {
  wait_for_prior_kernels();
  let_next_kernel_start();
  int ends[kWorld], total = 0;
#pragma unroll
  for (int s = 0; s < kWorld; s++) ends[s] = total += recv_count[s];
  for (int item = blockIdx.x; item < total * kSumParts; item += gridDim.x) {
    int i = item / kSumParts, part = item % kSumParts, row = i;
#pragma unroll
    for (int s = 0; s < kWorld; s++)
      if (i >= ends[s]) row = (s + 1) * kCapacity + i - ends[s];
    sum_row(y, recv_ids, recv_weights, partial, row, part * kSumThreads + threadIdx.x);
  }
  Peers p{base, stride, kWorld};
  if (share) {
    __syncthreads();  // before the block's release
    if (threadIdx.x < 32) signal_share(p, threadIdx.x, share);
  } else if (last_block(&words->sum_blocks, gridDim.x) && threadIdx.x < 32) {
    tag_signal(p, threadIdx.x);
  }
}

// ids: int32 [tokens, kTopK], as sent. shared, out: act [tokens, kHidden]; shared may be null. Block b does part
// b % kPullParts of token b / kPullParts.
extern "C" __global__ void __launch_bounds__(kPullThreads)
    rdep_pull(char* base, i64 stride, const char* partial, const int* ids, const char* shared, char* out,
              const Words* words, int layer, int operation) {
  __shared__ BulkRows bulk;
  wait_for_prior_kernels();
  let_next_kernel_start();
  int t = blockIdx.x / kPullParts, part = blockIdx.x % kPullParts, chunk = part * kPullThreads + threadIdx.x;
  bool active = chunk < kActChunks;
  int rank = words->rank;
  i64 at = ((i64)t * kActChunks + chunk) * 16;
  uint4 extra = make_uint4(0, 0, 0, 0);
  if (shared != nullptr && active) extra = load_once(shared + at);  // in flight while we wait
  u32 slots = owner_slots(ids + t * kTopK, rank);
  const char* mine = partial + ((i64)(rank * kCapacity + t) * kActChunks + part * kPullThreads) * 16;
  if (threadIdx.x < 32) {
    // A block waits for the ranks that it reads, and the first for all: so this kernel's end means that every
    // rank has read what it received, and the next `send` may overwrite it.
    wait_for(Peers{base, stride, kWorld}, blockIdx.x == 0 ? kAllRanks : slots, {layer, operation});
    if constexpr (kBulk) {
      __syncwarp();  // every lane's acquire before the one thread that starts the copies
      int bytes = min(kPullThreads, kActChunks - part * kPullThreads) * 16;
      if (threadIdx.x == 0) bulk_start(bulk, mine, stride, slots, bytes);
    }
  }
  __syncthreads();
  float total[kLanes] = {};
  if constexpr (kBulk) {
    bulk_wait(bulk);
#pragma unroll
    for (int r = 0; r < kWorld; r++) {
      int slot = slot_of(r, rank);
      if (slots >> slot & 1) add(total, bulk.rows[slot][threadIdx.x]);
    }
  } else {
    pull_direct(mine + threadIdx.x * 16, stride, rank, slots, active, total);
  }
  add(total, extra);
  if (active) *reinterpret_cast<uint4*>(out + at) = pack(total);
}
