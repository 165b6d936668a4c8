// CUDA's execution model in one host thread, as far as the simple kernels need it: a fiber per CUDA
// thread, run in turn from barrier to barrier, one block at a time.  Slow, exact, deterministic;
// tensor cores, asynchronous copies and streams are not here.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
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
static Index3 threadIdx, blockIdx, blockDim, gridDim;

// ---- fibers ---------------------------------------------------------------------------------------

constexpr std::size_t kStackBytes = 128 << 10;

struct Barrier {
  unsigned size = 0, arrived = 0, generation = 0;

  void release_if_full() {
    if (arrived == size) arrived = 0, ++generation;
  }
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Index3 thread;
  bool finished = false;
};

static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static Fiber* running;
static Barrier block_barrier;
static std::vector<Barrier> warp_barriers;
static std::function<void()> kernel_body;
static unsigned exchanged[32][32];

inline unsigned thread_number() { return threadIdx.x + threadIdx.y * blockDim.x; }

inline void wait(Barrier& barrier) {
  const unsigned mine = barrier.generation;
  ++barrier.arrived;
  barrier.release_if_full();
  while (barrier.generation == mine) swapcontext(&running->context, &scheduler);
}
inline void __syncthreads() { wait(block_barrier); }
inline void __syncwarp() { wait(warp_barriers[thread_number() / 32]); }

// A thread that returns early leaves the barriers; the rest need not wait for it.
inline void run_fiber() {
  kernel_body();
  running->finished = true;
  for (Barrier* barrier : {&block_barrier, &warp_barriers[thread_number() / 32]}) {
    --barrier->size;
    barrier->release_if_full();
  }
}

inline void run_block() {
  const unsigned count = blockDim.x * blockDim.y;
  block_barrier = {count};
  warp_barriers.assign((count + 31) / 32, {32});
  if (count % 32) warp_barriers.back().size = count % 32;
  fibers.resize(count);
  for (unsigned t = 0; t < count; ++t) {
    Fiber& fiber = fibers[t];
    fiber.thread = {t % blockDim.x, t / blockDim.x, 0}, fiber.finished = false;
    fiber.stack.resize(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (unsigned left = count; left > 0;) {
    for (Fiber& fiber : fibers) {
      if (fiber.finished) continue;
      running = &fiber, threadIdx = fiber.thread;
      swapcontext(&scheduler, &fiber.context);
      left -= fiber.finished;
    }
  }
}

template <class Kernel>
void launch(Kernel kernel, Index3 grid, Index3 block) {
  gridDim = grid, blockDim = block, kernel_body = kernel;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = {x, y, 0};
      run_block();
    }
  }
}

// ---- intrinsics -----------------------------------------------------------------------------------

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

template <class T>
T atomicAdd(T* at, T x) {
  return std::exchange(*at, *at + x);
}
template <class T>
T atomicMax(T* at, T x) {
  return std::exchange(*at, max(*at, x));
}
template <class T>
T atomicMin(T* at, T x) {
  return std::exchange(*at, min(*at, x));
}
