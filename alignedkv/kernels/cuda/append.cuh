// Tokens into the cache: both rows by one warp (encode.cu), or a side of the newest each (prepare.cu).

#include "arguments.cuh"
#include "digits.cuh"
#include "rows.cuh"

// Write one token: planes and scales of its key and value, and its exact rows if it has a slot.
__device__ __forceinline__ void encode_token(
    const Cache& cache, int sequence, int head, int token, int length,
    const RowBits* key /* [D] */, const RowBits* value /* [D] */, Words& words) {
  const int lane = lane_of_thread();
  const i64 of_head = head_index(cache, sequence, head);
  const u32 row = HeadRows(cache, sequence, head).of(token);
  const int row_class = dither_class(token);
  float x[kPerLane];

  load_row<kRowDtype>(x, key);
  transform_key(x, cache, of_head);
  const u32 key_scale = encode_row(x, dither_row(cache, 0, row_class), words);
  store_planes(words, cache.key_planes, row);

  load_row<kRowDtype>(x, value);
  centre_value(x, cache, of_head);
  const u32 value_scale = encode_row(x, dither_row(cache, 1, row_class), words);
  store_planes(words, cache.value_planes, row);

  if (lane == 0) cache.scales[row] = key_scale | value_scale << 16;
  if constexpr (kExactRows) {
    const int slot = exact_slot(cache, token, cache.starts[sequence], length);
    if (slot < 0) return;
    const i64 offset = exact_offset(cache, of_head, slot);
    for (int c = lane; c < kHeadDim; c += kWarpSize) {
      cache.exact_keys[offset + c] = key[c];
      cache.exact_values[offset + c] = value[c];
    }
  }
}

// Half of a row's scales: the key's is the lower one.
__device__ __forceinline__ void store_scale(const Cache& cache, u32 row, int side, u32 scale_bits) {
  reinterpret_cast<u16*>(cache.scales + row)[side] = static_cast<u16>(scale_bits);
}

// The key (side 0) or the value (side 1) of the new token.
__device__ __forceinline__ const RowBits* new_row(
    const DecodeArguments& a, int sequence, int head, int side) {
  const auto& strides = side == 0 ? a.rows.key_strides : a.rows.value_strides;
  return (side == 0 ? a.rows.keys : a.rows.values) + sequence * strides[0] + head * strides[1];
}

// One warp: append it, in x, as `encode_token` does one side after the other.
__device__ void append(float (&x)[kPerLane], const DecodeArguments& a, Words& words, int sequence,
                       int head, int side, int token, int length) {
  const Cache& cache = a.cache;
  const i64 of_head = head_index(cache, sequence, head);
  const u32 row = HeadRows(cache, sequence, head).of(token);
  if (side == 0) {
    transform_key(x, cache, of_head);
  } else {
    centre_value(x, cache, of_head);
  }
  const u32 scale = encode_row(x, dither_row(cache, side, dither_class(token)), words);
  store_planes(words, side == 0 ? cache.key_planes : cache.value_planes, row);
  if (lane_of_thread() == 0) store_scale(cache, row, side, scale);
  if constexpr (kExactRows) {
    const int slot = exact_slot(cache, token, cache.starts[sequence], length);
    if (slot < 0) return;
    const RowBits* from = new_row(a, sequence, head, side);
    RowBits* to = (side == 0 ? cache.exact_keys : cache.exact_values) +
                  exact_offset(cache, of_head, slot);
    for (int c = lane_of_thread(); c < kHeadDim; c += kWarpSize) to[c] = from[c];
  }
}
