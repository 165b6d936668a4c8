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
