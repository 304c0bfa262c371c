// Runs barriers/cuda/head.cu on a CPU, all ranks at once, a thread a block; emulated.h says how.
//
// Every word that travels says who sent it and in which step, so what is read too early, or overwritten too early,
// is found. Given by the build: HEAD_* as for head.cu, with blocks of 32 threads.
#define EMULATED_LANES 32
#define EMULATED_CODE "head.cu"
#include "emulated.h"

#include <algorithm>
#include <random>

namespace {

constexpr int kHead = 4, kSample = 5;  // of OPERATIONS in barriers/watch.py
constexpr int kWords = kRowBytes / 4;  // of a row
constexpr i64 kRowsAt = 4096, kPartAt = kRowsAt + kWorld * kCapacity * kRowBytes;
constexpr i64 kWordsAt = kPartAt + 4ll * kWorld * kCapacity * kPer;
constexpr i64 kStride = (kWordsAt + sizeof(Words) + 4095) / 4096 * 4096;
constexpr u32 kUntouched = 0x7f7f7f7f;

u32 mix(u32 a, u32 b) { return (a ^ b * 0x9e3779b9u) * 0x85ebca6bu + (a >> 15); }
// Word w of row t of rank s in a step; the product of that word by the rank that holds a column of its slice.
u32 sent(int s, int t, int step, int w) { return mix(mix(mix(s + 1, t), step), w); }
u32 product(u32 word, int holder, int column) { return mix(mix(word, holder + 77), column); }
// Rows of rank s in a step: others on each rank, and often another number than before.
int rows_of(int s, int step) { return 1 + mix(s, step) / 7 % kCapacity; }

struct Heads : Ranks {
  explicit Heads(u64 deadline_ms) : Ranks(kWorld, deadline_ms, kStride) {
    for (int r = 0; r < kWorld; r++) words(r)->rank = r;
  }
  char* rows(int rank) { return views[rank] + kRowsAt; }
  char* part(int rank) { return views[rank] + kPartAt; }
  Words* words(int rank) { return reinterpret_cast<Words*>(views[rank] + kWordsAt); }

  // A grid of one rank; blocks begin in any order.
  void grid(int blocks, std::mt19937& random, const std::function<void()>& kernel) {
    std::vector<int> order(blocks);
    for (int i = 0; i < blocks; i++) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    std::vector<std::thread> threads;
    for (int b : order)
      threads.emplace_back([&, b, delay = random() % 4 ? 0 : random() % 300] {
        usleep(delay);
        blockIdx.x = b;
        gridDim.x = blocks;
        Warp w;
        w.run([&](int) { kernel(); });
      });
    for (std::thread& t : threads) t.join();
  }

  void send(int rank, int step, std::mt19937& random, bool opens_step) {
    int count = rows_of(rank, step), blocks = 1 + random() % 3, share = random() % 2 ? kTag / blocks : 0;
    std::vector<u32> final(count * kWords);
    for (int t = 0; t < count; t++)
      for (int w = 0; w < kWords; w++) final[t * kWords + w] = sent(rank, t, step, w);
    grid(blocks, random, [&] {
      head_send(views[rank], stride, reinterpret_cast<char*>(final.data()), rows(rank), words(rank), count, share,
                -1, kHead, opens_step);
    });
  }

  // All rows that were sent are here, and stay for as long as the product takes.
  void multiply(int rank, int step, std::mt19937& random) {
    if (random() % 3 == 0) usleep(random() % 500);
    const u32* from = reinterpret_cast<u32*>(rows(rank));
    u32* to = reinterpret_cast<u32*>(part(rank));
    for (int row = 0; row < kWorld * kCapacity; row++) {
      int s = row / kCapacity, t = row % kCapacity;
      for (int w = 0; w < kWords && t < rows_of(s, step); w++)
        CHECK(from[row * kWords + w] == sent(s, t, step, w), "step %d: word %d of row %d of rank %d at rank %d", step,
              w, t, s, rank);
      for (int c = 0; c < kPer; c++)
        to[row * kPer + c] = rank * kPer + c < kVocab ? product(from[row * kWords + c % kWords], rank, c) : ~0u;
    }
  }

  void pull(int rank, int step, std::mt19937& random) {
    // Rows that are whole pieces apart, and rows that are not.
    int count = rows_of(rank, step), pitch = random() % 2 ? kVocab : (kVocab + 7) / 4 * 4;
    std::vector<uint4> memory((count * pitch + 3) / 4, make_uint4(kUntouched, kUntouched, kUntouched, kUntouched));
    u32* out = &memory[0].x;
    grid(1 + random() % 4, random, [&] {
      head_pull(views[rank], stride, part(rank), reinterpret_cast<float*>(out), pitch, words(rank), count, -1,
                kSample);
    });
    if (peers(rank).control(0)->state.poison) return;
    for (int t = 0; t < count; t++)
      for (int c = 0; c < (t + 1 < count ? pitch : kVocab); c++) {
        int holder = c / kPer, column = c % kPer;
        u32 want = c < kVocab ? product(sent(rank, t, step, column % kWords), holder, column) : kUntouched;
        CHECK(out[t * pitch + c] == want, "step %d: row %d, column %d of rank %d", step, t, c, rank);
      }
  }
};

// Every rank its own number of rows and its own grids in every step; other barriers in between, as a layer has.
void steps(int count) {
  Heads ranks(20000);
  ranks.run([&](int rank) {
    std::mt19937 random(rank);
    for (int step = 0; step < count; step++) {
      bool opens_step = step % 3 == 0;
      ranks.peers(rank).control(0)->state.own_step = step;
      ranks.send(rank, step, random, opens_step);
      ranks.multiply(rank, step, random);
      ranks.pull(rank, step, random);
      for (int i = 0; i < step % 3; i++)
        ranks.grid(1, random, [&] {
          CHECK(tag_barrier(ranks.peers(rank), threadIdx.x, Where{0, 3}), "stopped");
        });
      CHECK(!ranks.peers(rank).control(0)->state.poison, "rank %d gave up in step %d", rank, step);
    }
  });
  for (int r = 0; r < kWorld; r++) {
    for (int k = 0; k < kWorld; k++) CHECK(ranks.peers(r).control(0)->tag[k] == 0, "a tag word is not back at zero");
    CHECK(ranks.words(r)->rank == r && ranks.words(r)->send_blocks == 0, "the words are not as they were");
  }
}

// The last rank does nothing from its `send` or its `pull` on; the others name it, and the operation.
void late_rank(int operation) {
  Heads ranks(300);
  ranks.run([&](int rank) {
    std::mt19937 random(rank);
    ranks.send(rank, 0, random, true);
    ranks.multiply(rank, 0, random);
    ranks.pull(rank, 0, random);
    ranks.peers(rank).control(0)->state.own_step = 812;
    if (rank == kWorld - 1 && operation == kHead) return;
    ranks.send(rank, 1, random, false);
    if (rank == kWorld - 1) return;
    ranks.pull(rank, 1, random);
  });
  for (int rank = 0; rank < kWorld - 1; rank++) {
    Record& r = ranks.records[rank];
    CHECK(r.stop == kDeadline && r.operation == operation && r.layer == -1 && r.step == 812,
          "rank %d: stop %d, operation %d, step %lld", rank, r.stop, r.operation, (long long)r.step);
    CHECK(r.missing == 1ull << (kWorld - 1 - rank), "rank %d blames %llx", rank, r.missing);
  }
}

// The last rank is one step ahead.
void other_step() {
  Heads ranks(5000);
  ranks.run([&](int rank) {
    std::mt19937 random(rank);
    ranks.peers(rank).control(0)->state.own_step = rank == kWorld - 1 ? 6 : 5;
    ranks.send(rank, 0, random, true);
  });
  for (int rank = 0; rank < kWorld; rank++) {
    Record& r = ranks.records[rank];
    CHECK(r.stop == kStepMismatch && r.operation == kHead, "rank %d: stop %d", rank, r.stop);
  }
}

}  // namespace

int main(int, char** arguments) {
  steps(std::atoi(arguments[1]));
  if (kWorld > 1) {
    late_rank(kHead);
    late_rank(kSample);
    other_step();
  }
  std::puts("fine");
  return 0;
}
