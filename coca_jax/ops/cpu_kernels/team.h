// What the kernels for a CPU share: threads that work through phases together, and memory of their
// own.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

// Lets handlers take the pool as a plain argument.
template <>
struct ffi::CtxBinding<ffi::ThreadPool> {
  using Ctx = ffi::ThreadPool;
};

namespace {

// What threads of one kernel share. `phase` numbers count up in each of them alike.
struct Shared {
  static constexpr int kPhases = 8;
  std::atomic<int64_t> next[kPhases] = {}, done[kPhases] = {};
};

// One thread's way through a kernel.
class Member {
 public:
  Member(Shared& shared, int64_t members) : shared_(shared), members_(members) {}

  // Calls work(part, following) for the parts that this thread claims of 0 ... count - 1, and
  // returns when all threads' are done. `following` is the part that it will most likely do next;
  // `count` or more: none.
  template <typename Work>
  void Each(int64_t count, const Work& work) {
    auto& next = shared_.next[phase_];
    auto& done = shared_.done[phase_++];
    for (int64_t part; (part = next.fetch_add(1)) < count;) {
      work(part, part + members_);
      done.fetch_add(1, std::memory_order_release);
    }
    for (int tries = 0; done.load(std::memory_order_acquire) < count;)
      if (++tries > 1000) std::this_thread::yield();
  }

 private:
  Shared& shared_;
  const int64_t members_;
  int phase_ = 0;
};

// Runs body(member) on this thread and on idle ones of the pool, `most` in all, which must all go
// through the same phases. This thread claims parts too, so a pool that is busy (with callers of
// this function, even) costs speed but cannot block. `body` must hold what it needs by value: a
// helper that starts after the end goes through it once more, claims nothing, and finds only what
// it holds.
template <typename Body>
void Together(ffi::ThreadPool& pool, int64_t most, const Body& body) {
  struct State : Shared {
    explicit State(const Body& body) : body(body) {}
    Body body;
  };
  auto state = std::make_shared<State>(body);
  const int64_t members = std::min<int64_t>(pool.num_threads(), most);
  for (int64_t i = 1; i < members; ++i)
    pool.Schedule([state, members] {
      Member member(*state, members);
      state->body(member);
    });
  Member member(*state, members);
  state->body(member);
}

// At least `size` floats of this thread's own, whole lines of the cache; one buffer for each `use`.
template <int use>
float* Scratch(int64_t size) {
  struct alignas(4 * kLine) Line {
    float values[kLine];
  };
  static thread_local std::vector<Line> buffer;
  const size_t lines = (size + kLine - 1) / kLine;
  if (buffer.size() < lines) buffer.resize(lines);
  return buffer.data()->values;
}

}  // namespace
