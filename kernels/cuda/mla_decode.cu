// Decode attention over the paged latent cache, for Hopper: 64 heads of one token and one split at a time.
//
// Three warpgroups of a block, over blocks of 64 KV tokens in two stages of shared memory:
//   scores  Q·Kᵀ, the running softmax, and P·V in the first half of the columns;
//   values  P·V in the other half;
//   loads   one thread of each warp, which asks the copy engine for Q and KV as room is freed.
// P passes from `scores` to `values` through shared memory in the order of registers: the same lane of the same
// warp reads what one wrote. A KV block is nine tiles of 64 columns; V is the first eight, read transposed. Tiles
// travel and are freed in pairs (a group), the rotary tile alone.
//
// With two blocks of 64 heads a token's blocks form a cluster: each loads half of the rows of every tile, into both.
//
// A token's bits depend on its own query and KV alone: a work item is a token's split, cut at a fixed multiple,
// walked in fixed blocks, in one order.
#include "hopper.cuh"

using namespace lockstep;

#ifndef LOCKSTEP_CLUSTER
#define LOCKSTEP_CLUSTER 2  // blocks that share KV
#endif
#ifndef LOCKSTEP_BLOCKS
#define LOCKSTEP_BLOCKS 2  // blocks of a token, one for 64 heads each
#endif

namespace {

constexpr int kCluster = LOCKSTEP_CLUSTER, kBlocks = LOCKSTEP_BLOCKS;
constexpr int kOwn = 2;               // groups of value columns that `scores` multiplies itself
constexpr int kAhead = 2;             // KV blocks that L2 is asked for ahead of their load
constexpr int kWarm = 2;              // KV blocks that L2 is asked for before the inputs are known to be there
constexpr float kSlack = 8;           // powers of two that a score may pass the running maximum by before it moves
// Registers of a thread of each warpgroup: together not more than the block starts with, three times 168.
constexpr int kScoresRegisters = 240, kValuesRegisters = 216, kLoadsRegisters = 48;
constexpr u32 kMostTries = 1u << 24;  // of a wait, each 20 ns or more: far more than the microseconds that are usual
constexpr int kRows = 64;             // heads of a block, and tokens of a KV block and of a page
constexpr int kWidth = 576;
constexpr int kTileBytes = kRows * 128, kTiles = 9, kStageBytes = kTiles * kTileBytes;
constexpr int kGroups = 5, kRope = 4, kValueGroups = 4;  // groups 0 … 3: two tiles each; 4: the rotary tile
constexpr int kTheirs = kValueGroups - kOwn;
static_assert(kTheirs == 2, "`values` frees and stores two groups");
constexpr u32 kAll = 0xffffffffu;

// The i-th group to be scored, in the order in which they are freed.
__device__ __forceinline__ constexpr int in_order(int i) {
  return i == 0 ? kRope : i <= kTheirs ? kOwn + i - 1 : i - 1 - kTheirs;
}

// Bytes of shared memory.
constexpr int kQ = 0, kKv = kStageBytes, kP = 3 * kStageBytes, kFactors = kP + 8192;
constexpr int kInverses = kFactors + 1024, kBarriers = kInverses + 1024;
constexpr int kBarrierCount = 5 * kGroups + 4;
static_assert(kBarriers + 8 * kBarrierCount <= LOCKSTEP_SHARED, "shared memory");

struct Params {
  const int* page_table;  // int32 [max_rows, max_pages]
  const int* work;        // int32, as `mla_plan` lays it out
  int capacity;           // words of each of its arrays
  int work_indptr;        // where in it the clusters' items are bounded
  const TensorMap* out;     // bf16 [T * heads, 512]
  const TensorMap* part_o;  // bf16 [T * splits * heads, 512]
  float* part_lse;        // fp32 [T, splits, heads], base 2
  float scale;            // of the scores, in powers of two
  int table_entries, num_pages;
};

struct Item {
  int token, pages, part, blocks, tail;  // tail: live tokens of the last block, 1 … 64
};

// The items of this block's cluster: from, to.
struct Span {
  int first, last;
};

__device__ __forceinline__ Span own_items(const Params& p) {
  const int* at = p.work + p.work_indptr + blockIdx.x / kBlocks;
  return {at[0], at[1]};
}

__device__ __forceinline__ Item read_item(const Params& p, int slot) {
  const int* at = p.work + slot;
  int begin = at[6 * p.capacity], end = at[7 * p.capacity];
  Item item;
  item.token = at[0];
  item.pages = at[p.capacity] + begin / kRows;
  item.part = at[2 * p.capacity];
  item.blocks = (end - begin + kRows - 1) / kRows;
  item.tail = end - begin - (item.blocks - 1) * kRows;
  return item;
}

// Where barriers lie, and waits on them.
struct Shared {
  u32 base;

  __device__ u32 barrier(int index) const { return base + kBarriers + 8 * index; }
  __device__ u32 full(int stage, int group) const { return barrier(stage * kGroups + group); }
  __device__ u32 empty(int stage, int group) const { return barrier((2 + stage) * kGroups + group); }
  __device__ u32 q_full(int group) const { return barrier(4 * kGroups + group); }
  __device__ u32 q_empty() const { return barrier(5 * kGroups); }
  __device__ u32 p_full() const { return barrier(5 * kGroups + 1); }
  __device__ u32 p_empty() const { return barrier(5 * kGroups + 2); }
  __device__ u32 cleared() const { return barrier(5 * kGroups + 3); }
  __device__ u32 stage(u32 block) const { return base + kKv + (block & 1) * kStageBytes; }

  // A wait that never ends is a fault, of this code or of the device: the launch fails, rather than hang.
  __device__ __forceinline__ void wait(u32 bar, u32 parity) const {
    for (u32 tries = 0; !barrier_done(bar, parity);) {
      if (++tries == kMostTries) __trap();
    }
  }
};

__device__ __forceinline__ void arrive_once_a_warp(u32 bar) {
  __syncwarp();
  if ((threadIdx.x & 31) == 0) barrier_arrive(bar);
}

// A group of a stage may be overwritten: each block of the cluster writes half of it.
__device__ __forceinline__ void free_group(const Shared& sh, u32 block, int group) {
  u32 bar = sh.empty(block & 1, group);
  u32 lane = threadIdx.x & 31;
  if (kCluster == 1) {
    if (lane == 0) barrier_arrive(bar);
  } else if (lane < kCluster) {
    barrier_arrive_at(in_block(bar, lane));
  }
}

// -- loads ---------------------------------------------------------------------------------------

__device__ __forceinline__ void load_group(const Shared& sh, const TensorMap* kv, int group, u32 block, int page,
                                           u32 rank) {
  u32 bar = sh.full(block & 1, group);
  int first = 2 * group, tiles = group == kRope ? 1 : 2;
  barrier_expect(bar, tiles * kTileBytes);
  constexpr int kShare = kRows / kCluster;
  u32 to = sh.stage(block) + first * kTileBytes + rank * kShare * 128;
  int row = page * kRows + rank * kShare;
  for (int i = 0; i < tiles; ++i) {
    if (kCluster == 1) {
      load_box(to + i * kTileBytes, kv, (first + i) * 64, row, bar);
    } else {
      load_box_to(to + i * kTileBytes, kv, (first + i) * 64, row, bar, (1 << kCluster) - 1);
    }
  }
}

__device__ __forceinline__ void load_query(const Shared& sh, const TensorMap* q, int group, int row) {
  int first = 2 * group, tiles = group == kRope ? 1 : 2;
  barrier_expect(sh.q_full(group), tiles * kTileBytes);
  for (int i = 0; i < tiles; ++i)
    load_box(sh.base + kQ + (first + i) * kTileBytes, q, (first + i) * 64, row, sh.q_full(group));
}

// A page for L2, from each block of the cluster its share.
__device__ __forceinline__ void ask_page(const char* cache, int page, u32 rank) {
  constexpr u32 kBytes = kRows * kWidth * 2 / kCluster;
  ask_l2(cache + u64(page) * (kRows * kWidth * 2) + rank * kBytes, kBytes);
}

// A guess at what is read first, while the kernels before this one still run: what it goes by may be of the step
// before, and nothing but time depends on it. Past L1, where stale lines would stay; within bounds, whatever is read.
__device__ __forceinline__ void warm(const Params& p, const char* cache, u32 rank) {
  int slot = __ldcg(p.work + p.work_indptr + blockIdx.x / kBlocks);
  if (slot < 0 || slot >= p.capacity) return;
  int begin = __ldcg(p.work + 6 * p.capacity + slot), end = __ldcg(p.work + 7 * p.capacity + slot);
  int at = __ldcg(p.work + p.capacity + slot) + begin / kRows;
  for (int i = 0; i < kWarm && begin + i * kRows < end; ++i) {
    if (at < 0 || at + i >= p.table_entries) return;
    int page = __ldcg(p.page_table + at + i);
    if (page >= 0 && page < p.num_pages) ask_page(cache, page, rank);
  }
}

// One thread of each warp; warp w loads group w, the first one the rotary tile before it.
__device__ __forceinline__ void loads(Shared sh, const Params& p, const TensorMap* q, const TensorMap* kv,
                                      const char* cache) {
  u32 half = blockIdx.x % kBlocks, rank = kCluster > 1 ? half : 0;
  int own = (threadIdx.x >> 5) & 3;
  if (own == 0) warm(p, cache, rank);
  await_inputs();
  // With no more items than clusters each finds its own at its number: read it beside the bounds, not after them.
  int guess = blockIdx.x / kBlocks;
  Item item = read_item(p, min(guess, p.capacity - 1));
  auto [first, last] = own_items(p);
  u32 block = 0;
  for (int slot = first; slot < last; ++slot) {
    if (slot != guess) item = read_item(p, slot);
    const int* pages = p.page_table + item.pages;
    u32 turn = slot - first;
    int page = pages[0];
    int later = kAhead < item.blocks ? pages[kAhead] : -1;
    sh.wait(sh.q_empty(), (turn & 1) ^ 1);
    int query = (item.token * kBlocks + half) * kRows;
    for (int n = 0; n < item.blocks; ++n, ++block) {
      int next = n + 1 < item.blocks ? pages[n + 1] : 0;
      if (own == 0) {
        if (n == 0) load_query(sh, q, kRope, query);
        sh.wait(sh.empty(block & 1, kRope), ((block >> 1) & 1) ^ 1);
        load_group(sh, kv, kRope, block, page, rank);
      }
      if (n == 0) load_query(sh, q, own, query);
      sh.wait(sh.empty(block & 1, own), ((block >> 1) & 1) ^ 1);
      load_group(sh, kv, own, block, page, rank);
      if (own == 0) {
        if (later >= 0) ask_page(cache, later, rank);
        int ahead = n + 1 + kAhead;
        later = ahead < item.blocks ? pages[ahead] : -1;
      }
      page = next;
    }
  }
}

// -- the product of P and V -------------------------------------------------------------------------

// One group of columns: o += P · V.
__device__ __forceinline__ void multiply_values(float (&o)[64], const u32 (&weights)[16], u32 stage, int group) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
    wgmma_128(o, weights + 4 * k, operand(rows_along_k(stage) + (2 * group * kTileBytes + k * 2048) / 16), 1);
}

template <int kCount>
__device__ __forceinline__ void clear(float (&o)[kCount][64]) {
#pragma unroll
  for (int i = 0; i < kCount * 64; ++i) o[i / 64][i % 64] = 0.0f;
}

template <int kCount>
__device__ __forceinline__ void rescale(float (&o)[kCount][64], float f0, float f1) {
  if (!__any_sync(kAll, f0 != 1.0f || f1 != 1.0f)) return;
#pragma unroll
  for (int g = 0; g < kCount; ++g) {
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      o[g][4 * c] *= f0;
      o[g][4 * c + 1] *= f0;
      o[g][4 * c + 2] *= f1;
      o[g][4 * c + 3] *= f1;
    }
  }
}

// `kCount` groups of columns from `first` on, each row times its factor, as bf16: through shared memory where Q was,
// 16 rows of a tile at a time.
template <int kCount>
__device__ __forceinline__ void store_values(const Shared& sh, const Params& p, const Item& item, int first,
                                             const float (*o)[64], float2 factor) {
  int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  u32 own = sh.base + kQ + 2 * first * kTileBytes + warp * 2048;
  u32 row = own + (lane & 15) * 128, side = lane >> 4;  // matrices: upper and lower rows, then eight columns further
#pragma unroll
  for (int g = 0; g < kCount; ++g) {
#pragma unroll
    for (int c = 0; c < 16; c += 2) {
      const float* v = &o[g][4 * c];
      u32 at = row + (2 * g + c / 8) * kTileBytes + (((c % 8 + side) ^ (lane & 7)) * 16);
      store_matrices(at, pack_bf16(v[0] * factor.x, v[1] * factor.x), pack_bf16(v[2] * factor.y, v[3] * factor.y),
                     pack_bf16(v[4] * factor.x, v[5] * factor.x), pack_bf16(v[6] * factor.y, v[7] * factor.y));
    }
  }
  fence_async();
  __syncwarp();
  if (lane == 0) {
    const TensorMap* to = item.part < 0 ? p.out : p.part_o;
    int at = item.part < 0 ? item.token * kBlocks * kRows : item.part;
    at += blockIdx.x % kBlocks * kRows + warp * 16;
    for (int i = 0; i < 2 * kCount; ++i) store_box(to, (2 * first + i) * 64, at, own + i * kTileBytes);
  }
}

// The results have left shared memory: the next item's Q may come.
__device__ __forceinline__ void end_item(const Shared& sh) {
  if ((threadIdx.x & 31) == 0) {
    end_stores();
    barrier_arrive(sh.q_empty());
  }
}

// -- scores --------------------------------------------------------------------------------------

__device__ __forceinline__ void multiply_tile(float (&s)[32], const Shared& sh, u32 stage, int tile, bool add) {
  u32 q = columns_along_k(sh.base + kQ), kv = columns_along_k(stage);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    int step = (tile * kTileBytes + k * 32) / 16;
    wgmma_64(s, operand(q + step), operand(kv + step), k > 0 || add);
  }
}

// s = Q · Kᵀ over groups in_order(kFrom … kTo - 1), as they arrive.
template <int kFrom, int kTo>
__device__ __forceinline__ void multiply_scores(float (&s)[32], Shared& sh, u32 block, int query_parity = -1) {
#pragma unroll
  for (int i = kFrom; i < kTo; ++i) {
    int group = in_order(i);
    if (query_parity >= 0) sh.wait(sh.q_full(group), query_parity);
    sh.wait(sh.full(block & 1, group), (block >> 1) & 1);
    wgmma_fence();
    multiply_tile(s, sh, sh.stage(block), 2 * group, i > 0);
    if (group != kRope) multiply_tile(s, sh, sh.stage(block), 2 * group + 1, true);
    wgmma_commit();  // the compiler would do so anyhow, where it waits
  }
}

// Running maximum and sum of two rows; of a lane, the sum is of its own columns.
struct Softmax {
  float high0, high1, total0, total1;
};

// What no token stands for weighs nothing.
__device__ __forceinline__ void mask_scores(float (&s)[32], int live) {
  if (live == kRows) return;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    int col = i / 4 * 8 + (threadIdx.x & 3) * 2 + (i & 1);
    if (col >= live) s[i] = -LOCKSTEP_INFINITY;
  }
}

// The running maxima with these scores, and what the rows' earlier results are to be multiplied by.
__device__ __forceinline__ float2 raise(const float (&s)[32], Softmax& x, float scale) {
  float most[4];  // two of each row: the shorter the chains, the better
#pragma unroll
  for (int i = 0; i < 4; ++i) most[i] = fmaxf(s[2 * i], s[2 * i + 1]);
#pragma unroll
  for (int i = 4; i < 16; ++i) most[i & 3] = fmaxf(most[i & 3], fmaxf(s[2 * i], s[2 * i + 1]));
  float new0 = fmaxf(most[0], most[2]), new1 = fmaxf(most[1], most[3]);
  new0 = quad_max(new0) * scale;
  new1 = quad_max(new1) * scale;
  float2 factor = make_float2(1.0f, 1.0f);
  if (new0 > x.high0 + kSlack) {
    factor.x = exp2_fast(x.high0 - new0);
    x.high0 = new0;
  }
  if (new1 > x.high1 + kSlack) {
    factor.y = exp2_fast(x.high1 - new1);
    x.high1 = new1;
  }
  return factor;
}

// Scores to weights in bf16.
__device__ __forceinline__ void weigh(const float (&s)[32], Softmax& x, float2 factor, u32 (&weights)[16],
                                      float scale) {
  float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    float a = exp2_fast(fmaf(s[4 * c], scale, -x.high0)), b = exp2_fast(fmaf(s[4 * c + 1], scale, -x.high0));
    float d = exp2_fast(fmaf(s[4 * c + 2], scale, -x.high1)), e = exp2_fast(fmaf(s[4 * c + 3], scale, -x.high1));
    sum0 += a + b;
    sum1 += d + e;
    weights[2 * c] = pack_bf16(a, b);
    weights[2 * c + 1] = pack_bf16(d, e);
  }
  x.total0 = x.total0 * factor.x + sum0;
  x.total1 = x.total1 * factor.y + sum1;
}

// Two rows' numbers for the same lane of `values`; `where` is kFactors or kInverses.
__device__ __forceinline__ void give_pair(Shared& sh, int where, float2 factor) {
  u32 at = sh.base + where + (threadIdx.x & 127) * 8;
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(factor.x), "f"(factor.y) : "memory");
}

__device__ __forceinline__ void give_weights(Shared& sh, const u32 (&w)[16]) {
  u32 at = sh.base + kP + (threadIdx.x & 127) * 16;
#pragma unroll
  for (int k = 0; k < 4; ++k)
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at + k * 2048), "r"(w[4 * k]), "r"(w[4 * k + 1]),
                 "r"(w[4 * k + 2]), "r"(w[4 * k + 3])
                 : "memory");
}

// `values` has taken the last weights that it was given. The compiler moves arithmetic over waits for products, but not
// over the loop of this one.
__device__ __forceinline__ void await_taken(Shared& sh, u32 given) { sh.wait(sh.p_empty(), (given & 1) ^ 1); }

// The product with the first columns of V is through.
__device__ __forceinline__ void end_values(Shared& sh, u32 block) {
#pragma unroll
  for (int g = 0; g < kOwn; ++g) free_group(sh, block, g);
}

__device__ __forceinline__ void hand_over(Shared& sh, const u32 (&weights)[16], float2 factor, u32& given) {
  give_weights(sh, weights);
  give_pair(sh, kFactors, factor);
  arrive_once_a_warp(sh.p_full());
  ++given;
}

__device__ __forceinline__ void multiply_own(float (&o)[kOwn][64], const u32 (&weights)[16], u32 stage) {
  wgmma_fence();
#pragma unroll
  for (int g = 0; g < kOwn; ++g) multiply_values(o[g], weights, stage, g);
  wgmma_commit();
}

// With an item's last weights: what its results are to be multiplied by, in the end.
__device__ __forceinline__ float2 give_inverses(Shared& sh, Softmax& x) {
  x.total0 = quad_sum(x.total0);
  x.total1 = quad_sum(x.total1);
  float2 inverse = make_float2(1.0f / x.total0, 1.0f / x.total1);
  give_pair(sh, kInverses, inverse);
  return inverse;
}

// For the merge: of what the rows' weights add up to, the logarithms.
__device__ __forceinline__ void store_sums(const Params& p, const Item& item, const Softmax& x) {
  if (item.part < 0 || (threadIdx.x & 3) != 0) return;
  int row = (threadIdx.x >> 5) * 16 + (threadIdx.x & 31) / 4;
  float* lse = p.part_lse + item.part + blockIdx.x % kBlocks * kRows + row;
  lse[0] = x.high0 + log2_fast(x.total0);
  lse[8] = x.high1 + log2_fast(x.total1);
}

// The scores of a block to weights, for both warpgroups. Of a pair's first block, the second one's scores are on their
// way; of its second, the first one's weights are being multiplied, which is to end here.
// Returns, with the last weights, what the results are to be multiplied by.
template <bool kSecond, bool kLast>
__device__ __forceinline__ float2 take_scores(Shared& sh, const Params& p, float (&s)[32], Softmax& x,
                                            u32 (&weights)[16], float (&o)[kOwn][64], u32 block, u32& given, int live) {
  free_group(sh, block, kRope);
  mask_scores(s, live);
  float2 factor = raise(s, x, p.scale);
  weigh(s, x, factor, weights, p.scale);
  await_taken(sh, given);
  if (kSecond) {
    wgmma_wait<0>();
    end_values(sh, block - 1);
  }
  float2 inverse = kLast ? give_inverses(sh, x) : factor;
  hand_over(sh, weights, factor, given);
  rescale(o, factor.x, factor.y);
  return inverse;
}

// KV blocks in pairs: Q·Kᵀ of both, one behind the other. While the first one's softmax runs, so does the product of
// the second; while the second one's softmax runs, the product of the first one's weights with V; and while the
// second one's weights are multiplied, the next pair arrives.
__device__ __forceinline__ void scores(Shared sh, const Params& p) {
  await_inputs();
  auto [first, last] = own_items(p);
  u32 block = 0, given = 0, tails = 0;
  float o[kOwn][64], even[32], odd[32];
  u32 weights[16], others[16];  // of even and odd blocks
  for (int slot = first; slot < last; ++slot) {
    Item item = read_item(p, slot);
    u32 turn = slot - first;
    Softmax x = {-LOCKSTEP_INFINITY, -LOCKSTEP_INFINITY, 0.0f, 0.0f};
    multiply_scores<0, kGroups>(even, sh, block, turn & 1);
    clear(o);
    int left = item.blocks;
    for (; left > 2; left -= 2) {
      multiply_scores<0, kGroups>(odd, sh, block + 1);
      wgmma_wait<kGroups>();
      take_scores<false, false>(sh, p, even, x, weights, o, block, given, kRows);
      multiply_own(o, weights, sh.stage(block));
      wgmma_wait<1>();
      take_scores<true, false>(sh, p, odd, x, others, o, block + 1, given, kRows);
      block += 2;
      multiply_own(o, others, sh.stage(block - 1));
      multiply_scores<0, 2>(even, sh, block);
      wgmma_wait<2>();
      end_values(sh, block - 1);
      multiply_scores<2, kGroups>(even, sh, block);
    }
    float2 inverse;
    if (left == 2) {
      multiply_scores<0, kGroups>(odd, sh, block + 1);
      wgmma_wait<kGroups>();
      take_scores<false, false>(sh, p, even, x, weights, o, block, given, kRows);
      multiply_own(o, weights, sh.stage(block));
      wgmma_wait<1>();
      ++block;
      inverse = take_scores<true, true>(sh, p, odd, x, others, o, block, given, item.tail);
#pragma unroll
      for (int i = 0; i < 16; ++i) weights[i] = others[i];
    } else {
      wgmma_wait<0>();
      inverse = take_scores<false, true>(sh, p, even, x, weights, o, block, given, item.tail);
    }
    if (item.tail < kRows) sh.wait(sh.cleared(), tails++ & 1);
    multiply_own(o, weights, sh.stage(block));
    wgmma_wait<0>();
    end_values(sh, block);
    ++block;
    if (slot + 1 == last) release_dependents();
    store_values<kOwn>(sh, p, item, 0, o, inverse);
    end_item(sh);
    store_sums(p, item, x);
  }
}

// -- values --------------------------------------------------------------------------------------

__device__ __forceinline__ float2 take_pair(const Shared& sh, int where) {
  u32 at = sh.base + where + (threadIdx.x & 127) * 8;
  float2 factor;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(factor.x), "=f"(factor.y) : "r"(at) : "memory");
  return factor;
}

__device__ __forceinline__ void take_weights(const Shared& sh, u32 (&w)[16]) {
  u32 at = sh.base + kP + (threadIdx.x & 127) * 16;
#pragma unroll
  for (int k = 0; k < 4; ++k)
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[4 * k]), "=r"(w[4 * k + 1]), "=r"(w[4 * k + 2]), "=r"(w[4 * k + 3])
                 : "r"(at + k * 2048)
                 : "memory");
}

// Zero the rows of the last KV block that hold no token: their weight is 0, but what they hold may be NaN.
__device__ __forceinline__ void clear_tail(Shared& sh, u32 block, int live) {
#pragma unroll
  for (int g = 0; g < kValueGroups; ++g) sh.wait(sh.full(block & 1, g), (block >> 1) & 1);
  for (int i = threadIdx.x & 127; i < (kRows - live) * 64; i += 128) {
    u32 at = sh.stage(block) + (i % 64 / 8) * kTileBytes + (live + i / 64) * 128 + i % 8 * 16;
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
  }
  fence_async();
  arrive_once_a_warp(sh.cleared());
}

// The weights of a KV block, and the earlier results rescaled for them. Returns the inverses that come with the last.
// The block's own tiles need no wait here: `scores` has waited for all of them before it gave the weights.
__device__ __forceinline__ float2 take_block(Shared& sh, float (&o)[kTheirs][64], u32 (&weights)[16], u32 block,
                                             u32& taken) {
  sh.wait(sh.p_full(), taken & 1);
  take_weights(sh, weights);
  float2 factor = take_pair(sh, kFactors), inverse = take_pair(sh, kInverses);
  arrive_once_a_warp(sh.p_empty());
  ++taken;
  rescale(o, factor.x, factor.y);
  return inverse;
}

__device__ __forceinline__ void multiply_theirs(Shared& sh, float (&o)[kTheirs][64], const u32 (&weights)[16],
                                                u32 block) {
  wgmma_fence();
#pragma unroll
  for (int g = 0; g < kTheirs; ++g) {
    multiply_values(o[g], weights, sh.stage(block), kOwn + g);
    wgmma_commit();
  }
}

__device__ __forceinline__ void values(Shared sh, const Params& p) {
  await_inputs();
  auto [first, last] = own_items(p);
  u32 block = 0, taken = 0, tails = 0;
  float o[kTheirs][64];
  u32 weights[16];
  for (int slot = first; slot < last; ++slot) {
    Item item = read_item(p, slot);
    bool partial = item.tail < kRows;
    clear(o);
    if (partial && item.blocks == 1) clear_tail(sh, block, item.tail);
    for (int n = 1; n < item.blocks; ++n, ++block) {
      take_block(sh, o, weights, block, taken);
      multiply_theirs(sh, o, weights, block);
      wgmma_wait<1>();
      free_group(sh, block, kOwn);
      wgmma_wait<0>();
      free_group(sh, block, kOwn + 1);
      if (partial && n + 1 == item.blocks) clear_tail(sh, block + 1, item.tail);
    }
    float2 inverse = take_block(sh, o, weights, block, taken);
    if (partial) sh.wait(sh.cleared(), tails++ & 1);
    multiply_theirs(sh, o, weights, block);
    // Each group leaves while the next is multiplied.
    wgmma_wait<1>();
    free_group(sh, block, kOwn);
    store_values<1>(sh, p, item, kOwn, o, inverse);
    wgmma_wait<0>();
    free_group(sh, block, kOwn + 1);
    store_values<1>(sh, p, item, kOwn + 1, o + 1, inverse);
    end_item(sh);
    ++block;
  }
}

__device__ __forceinline__ void prepare_barriers(const Shared& sh) {
  for (int stage = 0; stage < 2; ++stage) {
    for (int group = 0; group < kGroups; ++group) {
      barrier_init(sh.full(stage, group), 1);
      barrier_init(sh.empty(stage, group), 4 * kCluster);
    }
  }
  for (int group = 0; group < kGroups; ++group) barrier_init(sh.q_full(group), 1);
  barrier_init(sh.q_empty(), 8);
  for (u32 bar : {sh.p_full(), sh.p_empty(), sh.cleared()}) barrier_init(bar, 4);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

}  // namespace

extern "C" __global__ void __launch_bounds__(384, 1)
    hopper_mla(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap kv_map,
               const __grid_constant__ TensorMap out_map, const __grid_constant__ TensorMap part_map,
               const char* cache, const int* page_table, const int* work, float* part_lse, int capacity,
               int work_indptr, int table_entries, int num_pages, float scale) {
  extern __shared__ __align__(1024) char memory[];
  Shared sh{shared_address(memory)};
  Params p{page_table, work, capacity, work_indptr, &out_map, &part_map, part_lse, scale, table_entries, num_pages};
  int role = __shfl_sync(kAll, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    prepare_barriers(sh);
    ask_map(&q_map);
    ask_map(&kv_map);
  }
  if (kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  if (role == 0) {
    take_registers<kScoresRegisters>();
    scores(sh, p);
  } else if (role == 1) {
    take_registers<kValuesRegisters>();
    values(sh, p);
  } else {
    leave_registers<kLoadsRegisters>();
    if (threadIdx.x % 32 == 0) loads(sh, p, &q_map, &kv_map, cache);
  }
  if (kCluster > 1) {
    // A neighbour may still write here, and arrive here.
    __syncwarp();
    cluster_sync();
  }
}
