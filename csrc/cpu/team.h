// Threads that work on one thing and meet between its parts.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>

namespace omni {

// Who is there first looks out for the others for some microseconds, which is how long they take on a quiet machine, and
// then sleeps: where other programs run, whoever spins takes the time of the thread that is waited for.
class Team {
 public:
  void meet() {
    const uint32_t turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(omp_get_num_threads())) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.fetch_add(1, std::memory_order_release);
      turn_.notify_all();
      return;
    }
    for (int look = 0; look < kLooks; look++) {
      if (turn_.load(std::memory_order_acquire) != turn) return;
      __builtin_ia32_pause();
    }
    while (turn_.load(std::memory_order_acquire) == turn) turn_.wait(turn, std::memory_order_acquire);
  }

 private:
  static constexpr int kLooks = 1000;

  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> turn_{0};
};

}  // namespace omni
