// All stored planes, or the exact row, back to rows: for chunked prefill and for queries of
// several tokens.

#include "digits.cuh"
#include "rows.cuh"

constexpr int kDequantiseThreads = kEncodeWarps * kWarpSize;

// Write the first D channels of a row.
__device__ __forceinline__ void store_row(float* row /* [D] */, const float (&x)[kPerLane]) {
  const int lane = lane_of_thread();
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int c = channel(i, lane);
    if (c < kHeadDim) row[c] = x[i];
  }
}

// A warp restores one token.  grid: (ceil(S / kEncodeWarps), B * Hkv)
extern "C" __global__ void __launch_bounds__(kDequantiseThreads)
    dequantise(const __grid_constant__ DequantiseArguments arguments) {
  const Cache& cache = arguments.cache;
  const int lane = lane_of_thread();
  const int token = blockIdx.x * kEncodeWarps + threadIdx.x / kWarpSize;
  if (token >= arguments.tokens) return;
  const int sequence = blockIdx.y / cache.kv_heads, head = blockIdx.y % cache.kv_heads;
  const i64 of_head = head_index(cache, sequence, head);
  const i64 out = (of_head * arguments.tokens + token) * kHeadDim;
  const int start = cache.starts[sequence], length = cache.lengths[sequence];
  float x[kPerLane] = {};
  if (token < start || token >= min(length, cache.capacity)) {
    store_row(arguments.keys + out, x);
    store_row(arguments.values + out, x);
    return;
  }
  if constexpr (kExactRows) {
    const int slot = exact_slot(cache, token, start, length);
    if (slot >= 0) {
      load_row<kRowDtype>(x, cache.exact_keys + exact_offset(cache, of_head, slot));
      store_row(arguments.keys + out, x);
      load_row<kRowDtype>(x, cache.exact_values + exact_offset(cache, of_head, slot));
      store_row(arguments.values + out, x);
      return;
    }
  }
  const u32 row = HeadRows(cache, sequence, head).of(token);
  const u32 scales = cache.scales[row];
  const int row_class = dither_class(token);

  decode_row(x, cache.key_planes, row, scales & 0xffffu, dither_row(cache, 0, row_class));
  restore_key(x, cache, of_head);
  store_row(arguments.keys + out, x);

  decode_row(x, cache.value_planes, row, scales >> 16, dither_row(cache, 1, row_class));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int c = channel(i, lane);
    if (c < kHeadDim) x[i] = __fadd_rn(x[i], cache.value_mean[of_head * kHeadDim + c]);
  }
  store_row(arguments.values + out, x);
}
