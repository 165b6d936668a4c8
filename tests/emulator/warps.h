// CUDA's execution model on host threads, as far as the simple kernels need it: one thread per lane,
// barriers per warp and per block, one block at a time.  Slow and exact; tensor cores, asynchronous
// copies and streams are not here.
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using std::isfinite;
using std::max;
using std::min;

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
thread_local Index3 threadIdx, blockIdx;
static Index3 blockDim, gridDim;

static std::unique_ptr<std::barrier<>> block_barrier;
static std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
static unsigned exchanged[32][32];
static std::mutex atomics;

inline unsigned thread_number() { return threadIdx.x + threadIdx.y * blockDim.x; }
inline void __syncthreads() { block_barrier->arrive_and_wait(); }
inline void __syncwarp() { warp_barriers[thread_number() / 32]->arrive_and_wait(); }

// What lane `from` gives as x.
inline unsigned of_lane(unsigned x, unsigned from) {
  const unsigned warp = thread_number() / 32;
  exchanged[warp][thread_number() % 32] = x;
  __syncwarp();
  const unsigned theirs = exchanged[warp][from];
  __syncwarp();
  return theirs;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __shfl_xor_sync(unsigned, float x, int distance) {
  return __uint_as_float(of_lane(__float_as_uint(x), thread_number() % 32 ^ distance));
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  for (int d = 16; d > 0; d /= 2) x = max(x, of_lane(x, thread_number() % 32 ^ d));
  return x;
}
inline unsigned __ballot_sync(unsigned, bool holds) {
  unsigned mask = unsigned{holds} << thread_number() % 32;
  for (int d = 16; d > 0; d /= 2) mask |= of_lane(mask, thread_number() % 32 ^ d);
  return mask;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline float __expf(float x) { return std::exp(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline double max(int a, double b) { return a > b ? a : b; }
template <class T>
T __ldcs(const T* from) {
  return *from;
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = low | uint64_t{high} << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}

template <class T, class Change>
T change_atomically(T* at, Change change) {
  std::lock_guard<std::mutex> guard(atomics);
  const T before = *at;
  *at = change(before);
  return before;
}
template <class T>
T atomicAdd(T* at, T x) {
  return change_atomically(at, [&](T old) { return old + x; });
}
template <class T>
T atomicMax(T* at, T x) {
  return change_atomically(at, [&](T old) { return max(old, x); });
}
template <class T>
T atomicMin(T* at, T x) {
  return change_atomically(at, [&](T old) { return min(old, x); });
}

// Run a grid.  A thread that returns early leaves its block's barrier; warps return as a whole.
template <class Kernel>
void launch(Kernel kernel, Index3 grid, Index3 block) {
  gridDim = grid, blockDim = block;
  const unsigned count = block.x * block.y;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      block_barrier = std::make_unique<std::barrier<>>(count);
      warp_barriers.clear();
      for (unsigned first = 0; first < count; first += 32) {
        warp_barriers.push_back(std::make_unique<std::barrier<>>(min(32u, count - first)));
      }
      std::vector<std::thread> threads;
      for (unsigned t = 0; t < count; ++t) {
        threads.emplace_back([=] {
          threadIdx = {t % block.x, t / block.x, 0}, blockIdx = {x, y, 0};
          kernel();
          block_barrier->arrive_and_drop();
        });
      }
      for (std::thread& thread : threads) thread.join();
    }
  }
}
