// How many planes of a row are read.

#include "dtypes.cuh"

// A score so low that its weight is 0 whatever it is added to.
constexpr float kNever = -1e30f;

// log2 of the factor by which n planes are finer than the first alone.
__device__ __forceinline__ constexpr int gain(int planes) { return kUnread[0] - kUnread[planes - 1]; }

// 2^-gain of a plane count that is known at run time only.
__device__ __forceinline__ float step_of(int planes) {
  float step = 1.0f;
  if (planes >= 2) step = 1.0f / (1 << gain(2));
  if constexpr (kStoredPlanes >= 3) step = planes >= 3 ? 1.0f / (1 << gain(3)) : step;
  if constexpr (kStoredPlanes >= 4) step = planes >= 4 ? 1.0f / (1 << gain(4)) : step;
  return step;
}

// How many planes of a row are read.  Rule (6.2): plane n + 1 iff n planes leave the addend above theta.
struct Plan {
  float excess;  // log2 of the error that one plane leaves, in units of theta

  __device__ __forceinline__ static Plan skip() { return {2 * kNever}; }
  __device__ __forceinline__ static Plan one_plane() { return {-1.0f}; }
  __device__ __forceinline__ static Plan of_planes(int planes) {
    float excess = -1.0f;
    if (planes >= 2) excess = gain(2) - 1.0f;
    if constexpr (kStoredPlanes >= 3) excess = planes >= 3 ? gain(3) - 1.0f : excess;
    if constexpr (kStoredPlanes >= 4) excess = planes >= 4 ? gain(4) - 1.0f : excess;
    return {excess};
  }
  __device__ __forceinline__ bool reads_any() const { return excess > 2 * kNever; }
  // Whether the n-th plane is read, n > 1.
  __device__ __forceinline__ bool reads(int n) const { return excess > gain(n - 1); }
  // 2^-gain of the planes read.
  __device__ __forceinline__ float step() const {
    float step = 1.0f;
    if (reads(2)) step = 1.0f / (1 << gain(2));
    if constexpr (kStoredPlanes >= 3) step = reads(3) ? 1.0f / (1 << gain(3)) : step;
    if constexpr (kStoredPlanes >= 4) step = reads(4) ? 1.0f / (1 << gain(4)) : step;
    return step;
  }
};
