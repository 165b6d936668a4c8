// CUDA's execution model in one host thread, as far as our kernels need it: a fiber per CUDA thread,
// run in turn from barrier to barrier, one block at a time.  Slow, exact, deterministic.  A lane runs
// ahead of its warp to the next barrier, and asynchronous copies land at once: code that counts on
// lockstep, or on a copy being late, fails here.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
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

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

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
static Barrier block_barrier, named_barrier;
alignas(128) static unsigned char dynamic[256 << 10];  // shared memory of the block
static std::vector<Barrier> warp_barriers;
static std::function<void()> kernel_body;
static uint64_t exchanged[32][32];

inline unsigned thread_number() { return threadIdx.x + threadIdx.y * blockDim.x; }

inline void wait(Barrier& barrier) {
  const unsigned mine = barrier.generation;
  ++barrier.arrived;
  barrier.release_if_full();
  while (barrier.generation == mine) swapcontext(&running->context, &scheduler);
}
inline void wait_for(unsigned threads) {
  named_barrier.size = threads;
  wait(named_barrier);
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
  block_barrier = {count}, named_barrier = {};
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
template <class T>
T of_lane(T x, unsigned from) {
  static_assert(sizeof(T) <= sizeof exchanged[0][0]);
  const unsigned warp = thread_number() / 32;
  std::memcpy(&exchanged[warp][thread_number() % 32], &x, sizeof x);
  __syncwarp();
  T theirs;
  std::memcpy(&theirs, &exchanged[warp][from], sizeof theirs);
  __syncwarp();
  return theirs;
}

template <class To, class From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float __uint_as_float(unsigned bits) { return bits_as<float>(bits); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline float __int_as_float(int bits) { return bits_as<float>(bits); }
inline int __float_as_int(float x) { return bits_as<int>(x); }

template <class T>
T __shfl_sync(unsigned, T x, int from) {
  return of_lane(x, from % 32);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int distance) {
  return of_lane(x, thread_number() % 32 ^ distance);
}
template <class T>
T __shfl_up_sync(unsigned, T x, unsigned distance) {
  const unsigned lane = thread_number() % 32;
  return of_lane(x, lane >= distance ? lane - distance : lane);
}
template <class T, class Join>
T over_warp(T x, Join join) {
  for (int d = 16; d > 0; d /= 2) x = join(x, __shfl_xor_sync(0, x, d));
  return x;
}
template <class T>
T __reduce_max_sync(unsigned, T x) {
  return over_warp(x, [](T a, T b) { return max(a, b); });
}
template <class T>
T __reduce_add_sync(unsigned, T x) {
  return over_warp(x, [](T a, T b) { return a + b; });
}
inline unsigned __ballot_sync(unsigned, bool holds) {
  return over_warp(unsigned{holds} << thread_number() % 32, std::bit_or<unsigned>());
}
inline bool __any_sync(unsigned mask, bool holds) { return __ballot_sync(mask, holds) != 0; }
inline void __threadfence() {}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline float __expf(float x) { return std::exp(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
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
T atomicAdd(T* at, std::type_identity_t<T> x) {
  return std::exchange(*at, *at + x);
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> x) {
  return std::exchange(*at, max(*at, x));
}
template <class T>
T atomicMin(T* at, std::type_identity_t<T> x) {
  return std::exchange(*at, min(*at, x));
}

// ---- instructions ---------------------------------------------------------------------------------

// Shared memory by 32-bit addresses, counted from `dynamic`.
inline long __cvta_generic_to_shared(const void* at) {
  return static_cast<const unsigned char*>(at) - dynamic;
}
inline void* __cvta_shared_to_generic(unsigned long at) { return dynamic + at; }
inline void copy(unsigned to, const void* from, long offset, unsigned given, unsigned size) {
  unsigned char* target = dynamic + static_cast<int>(to);
  std::memset(target, 0, size);
  std::memcpy(target, static_cast<const unsigned char*>(from) + offset, given);
}

inline float half_to_float(unsigned short bits) { return bits_as<_Float16>(bits); }
inline unsigned short float_to_half(float x) {
  return bits_as<unsigned short>(static_cast<_Float16>(x));
}
inline unsigned short float_to_bfloat16(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Four 8 x 8 matrices of 16-bit numbers as ldmatrix.x4.trans spreads them over a warp: lane 8 m + i has
// the address of row i of matrix m.
inline void load_transposed(std::array<unsigned*, 4> to, unsigned address) {
  const unsigned lane = thread_number() % 32, r = lane / 4, c = lane % 4;
  for (unsigned m = 0; m < 4; ++m) {
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned row = of_lane(address, 8 * m + 2 * c + i);
      std::memcpy(reinterpret_cast<unsigned short*>(to[m]) + i, dynamic + row + 2 * r, 2);
    }
  }
}

struct Fragments {
  unsigned a[4], b[2];
};
static Fragments fragments[32][32];

// d += A B, 16 x 32 by 32 x 8 bytes spread over a warp as mma.sync.m16n8k32 has them (mma.cuh).
template <class Byte>
void multiply_tiles(int (&d)[4], std::array<unsigned, 4> a, std::array<unsigned, 2> b) {
  const unsigned lane = thread_number() % 32, r = lane / 4, c = lane % 4;
  Fragments* of = fragments[thread_number() / 32];
  of[lane] = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const unsigned row = r + 8 * (i / 2), column = 2 * c + i % 2;
    for (unsigned k = 0; k < 32; ++k) {
      const unsigned shift = 8 * (k % 4), group = k / 4 % 4, upper = k / 16;
      const unsigned left = of[row % 8 * 4 + group].a[row / 8 + 2 * upper] >> shift;
      const unsigned right = of[column * 4 + group].b[upper] >> shift;
      d[i] += static_cast<Byte>(left) * static_cast<signed char>(right);
    }
  }
  __syncwarp();
}
