// Sums and maxima over the lanes of a warp.

#include "rows.cuh"

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// Largest of numbers of any sign, by the order of their bits.
__device__ __forceinline__ float warp_max(float x) {
  const int bits = __float_as_int(x), ordered = bits ^ (bits >> 31 & 0x7fffffff);
  const int largest = __reduce_max_sync(kAllLanes, ordered);
  return __int_as_float(largest ^ (largest >> 31 & 0x7fffffff));
}

// Sums over the lanes of many numbers at once; kCount is a power of two up to 32.  Lane i gets the sum of
// x[i % kCount]: at each distance a lane hands over the half of its numbers that it does not keep.
template <int kCount, int kOfAll = kCount>
__device__ __forceinline__ float warp_sums(const float (&x)[kCount]) {
  if constexpr (kCount > 1) {
    constexpr int kHalf = kCount / 2;
    const bool is_upper = lane_of_thread() & kHalf;
    float kept[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float given = is_upper ? x[i] : x[i + kHalf];
      kept[i] = (is_upper ? x[i + kHalf] : x[i]) + __shfl_xor_sync(kAllLanes, given, kHalf);
    }
    return warp_sums<kHalf, kOfAll>(kept);
  }
  float sum = x[0];
#pragma unroll
  for (int distance = kOfAll; distance < 32; distance *= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  return sum;
}
