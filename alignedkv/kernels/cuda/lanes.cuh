// The lanes of a warp, and how a row lies across them.

#include "arguments.cuh"
#include "copies.cuh"

constexpr int kWarpSize = 32;
constexpr u32 kAllLanes = 0xffffffffu;
// A row lies across the lanes of a warp: x[i] of a lane is channel `channel(i, lane)`.
// Neighbouring lanes hold neighbouring channels, so loads coalesce and the short distances of the
// butterfly are shuffles.
constexpr int kPerLane = kChannels / kWarpSize;
static_assert(kChannels % kWarpSize == 0, "channels of a stored row come in multiples of 32");
static_assert(kHadamardBlock % kWarpSize == 0, "a Hadamard block is at least a warp wide");

// threadIdx.x, read anew where it is used, so that no register is kept for it.
__device__ __forceinline__ int thread_index() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
__device__ __forceinline__ int lane_of_thread() { return threadIdx.x % kWarpSize; }

// Lane 0's x.  Said of a number that all lanes have alike, it lets the compiler know: a branch on it
// then leaves the warp together, and what follows needs no code to bring lanes together again.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(kAllLanes, x, 0); }

__device__ __forceinline__ int channel(int i, int lane) { return i * kWarpSize + lane; }
