// The exchange of a head that is cut by vocabulary, over peer memory: send, pull.
//
//   send  this rank's final hidden rows go to every rank; the kernel ends when the rows of all ranks are here
//         (a tag barrier, carried by its blocks)
//   ...   the product of all ranks' rows with this rank's slice of the head, into symmetric memory
//   pull  tells the peers that this rank's product is there, and copies this rank's rows of every rank's product
//         into its logits: of its own while the signals fly, of the others' when all of them have come
//
// Why nothing is overwritten too early: a rank signals `pull` after its product has read all ranks' rows, and
// whoever sends again has ended its own `pull`, which takes all those signals; a rank signals `send` after its
// last `pull` has read the peers' products, and a product is written again only after a `send` that takes all
// those signals. So two signals a step protect both buffers, and it does not matter how many of rdep's signals
// come between two steps of this.
//
// The tag words are those of rdep's kernels: every rank launches all of them in the same order on one stream, and
// the word of a peer is what it owes, whoever of its kernels pays. In `pull` every block waits, but only one
// signals, so what the peers owe for `pull` must be put down before any of its blocks can look: a block that
// looked earlier would find the word at zero and read what is not there yet. `send` puts it down, after its own
// wait; between the two kernels nobody may wait on these words.
//
// Slots are relative (slot 0 is this rank, slot k is rank + k); rows on the wire are [source rank, kCapacity].
// Every rank may have another number of rows and use another grid: a signal is always worth kTag in all.
#include "exchange.cuh"

using namespace lockstep;

namespace {

constexpr int kWorld = HEAD_WORLD;
constexpr int kCapacity = HEAD_CAPACITY;
constexpr int kVocab = HEAD_VOCAB;
constexpr int kPer = HEAD_PER;            // columns of a rank's slice, padding included
constexpr int kRowBytes = HEAD_ROW_BYTES; // of a final hidden row
constexpr int kSendThreads = HEAD_SEND_THREADS;
constexpr int kPullThreads = HEAD_PULL_THREADS;

constexpr int kRowPieces = kRowBytes / 16;  // 16-byte pieces of a final hidden row
constexpr int kSendParts = (kRowPieces + kSendThreads - 1) / kSendThreads;  // blocks' worth of it
constexpr int kLanes = 4;                   // fp32 in 16 bytes
constexpr int kPartPieces = kPer / kLanes;  // of a row of a slice's product
constexpr int kInFlight = 4;                // that a thread loads before it stores the first
constexpr int kPullSpan = kPullThreads * kInFlight;
constexpr int kPullParts = (kPartPieces + kPullSpan - 1) / kPullSpan;

static_assert(kWorld <= 8 && kRowBytes % 16 == 0 && kPer % 128 == 0, "see VocabularyConfig");
static_assert((long long)kPer * kWorld >= kVocab, "the slices hold the whole vocabulary");
static_assert(kSendThreads % 32 == 0 && kPullThreads % 32 == 0, "whole warps");

// Own memory of this rank, int32.
struct Words {
  int rank;
  int send_blocks;  // for last_block
  int reserved[2];
};

// The whole warp: from here on the peers owe this rank the signal of `pull`.
__device__ __forceinline__ void put_down_debts(const Peers& p, int lane) {
  if (lane > 0 && lane < p.n) red_add_relaxed_sys(&p.control(0)->tag[lane * LOCKSTEP_SPACING], kTag);
}

// The whole warp, in one block: pay the same to the peers. The release carries everything that happened before
// this kernel, the product among it; it pairs with the acquire in the peers' waits.
__device__ __forceinline__ void pay_debts(const Peers& p, int lane) {
  if (lane > 0 && lane < p.n)
    red_add_release_sys(&p.control(lane)->tag[p.us_at(lane) * LOCKSTEP_SPACING], -kTag);
}

// Up to four logits, as many as `left` columns.
__device__ __forceinline__ void put_logits(float* to, uint4 v, int left, bool wide) {
  if (wide && left >= kLanes) {
    *reinterpret_cast<uint4*>(to) = v;
    return;
  }
  const u32 w[kLanes] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < kLanes; i++)
    if (i < left) to[i] = __uint_as_float(w[i]);
}

// The whole block: one part of one row of the product of the rank in `slot`.
//
// Args: row: of this rank's product, fp32 [kPer]. to: of the logits, fp32 [kVocab]. wide: `to` is aligned to 16 bytes.
__device__ __forceinline__ void copy_part(const char* row, i64 stride, int slot, int rank, int part, float* to,
                                          bool wide) {
  int holder = rank + slot < kWorld ? rank + slot : rank + slot - kWorld;
  int columns = min(kPer, kVocab - holder * kPer);  // none where a small vocabulary has ended
  int first = part * kPullSpan + threadIdx.x;
  to += holder * kPer;
  uint4 v[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; i++) {
    int piece = first + i * kPullThreads;
    v[i] = make_uint4(0, 0, 0, 0);
    // Whole pieces: a slice is padded, so the last one's other columns are there to be read.
    if (piece * kLanes < columns) v[i] = load_once(row + slot * stride + piece * 16);
  }
#pragma unroll
  for (int i = 0; i < kInFlight; i++) {
    int piece = first + i * kPullThreads, left = columns - piece * kLanes;
    if (left > 0) put_logits(to + piece * kLanes, v[i], left, wide);
  }
}

}  // namespace

// ---- kernels -------------------------------------------------------------------------------------------
//
// base, stride: as in Peers. words: int32 [4] of this rank. count: this rank's rows. layer: for the record of a late
// rank.

// final: act [count, H]. rows: act [kWorld * kCapacity, H], symmetric. share, opens_step: as in close_grid.
extern "C" __global__ void __launch_bounds__(kSendThreads)
    head_send(char* base, i64 stride, const char* final, char* rows, Words* words, int count, int share, int layer,
              int operation, int opens_step) {
  wait_for_prior_kernels();
  let_next_kernel_start();
  int rank = words->rank;
  for (int item = blockIdx.x; item < count * kSendParts; item += gridDim.x) {
    int t = item / kSendParts, piece = item % kSendParts * kSendThreads + threadIdx.x;
    if (piece >= kRowPieces) continue;
    uint4 bytes = *reinterpret_cast<const uint4*>(final + ((i64)t * kRowPieces + piece) * 16);
    char* to = rows + ((i64)(rank * kCapacity + t) * kRowPieces + piece) * 16;
#pragma unroll
    for (int i = 1; i <= kWorld; i++) *reinterpret_cast<uint4*>(to + i % kWorld * stride) = bytes;  // peers first
  }
  Peers p{base, stride, kWorld};
  if (close_grid(p, &words->send_blocks, share, opens_step, {layer, operation})) put_down_debts(p, threadIdx.x);
}

// part: fp32 [kWorld * kCapacity, kPer], symmetric. out: fp32 [count, kVocab], rows `pitch` elements apart.
extern "C" __global__ void __launch_bounds__(kPullThreads)
    head_pull(char* base, i64 stride, const char* part, float* out, i64 pitch, const Words* words, int count,
              int layer, int operation) {
  wait_for_prior_kernels();
  let_next_kernel_start();
  Peers p{base, stride, kWorld};
  if (blockIdx.x == 0 && threadIdx.x < 32) pay_debts(p, threadIdx.x);
  int rank = words->rank;
  bool wide = reinterpret_cast<u64>(out) % 16 == 0 && pitch % kLanes == 0;
  const char* mine = part + (i64)rank * kCapacity * kPartPieces * 16;
  for (int item = blockIdx.x; item < count * kPullParts; item += gridDim.x) {
    int t = item / kPullParts;
    copy_part(mine + (i64)t * kPartPieces * 16, stride, 0, rank, item % kPullParts, out + t * pitch, wide);
  }
  // Every block waits for all ranks: so this kernel's end means that all of them have read what they received,
  // and the next `send` may overwrite it.
  if (threadIdx.x < 32) tag_wait(p, threadIdx.x, {layer, operation});
  __syncthreads();
  constexpr int kOthers = kWorld > 1 ? kWorld - 1 : 1;
  // Neighbouring blocks read from different peers: all links are busy at once.
  for (int item = blockIdx.x; kWorld > 1 && item < count * kPullParts * kOthers; item += gridDim.x) {
    int slot = 1 + item % kOthers, i = item / kOthers, t = i / kPullParts;
    copy_part(mine + (i64)t * kPartPieces * 16, stride, slot, rank, i % kPullParts, out + t * pitch, wide);
  }
}
