// One row (one token of one KV head) in the hands of one warp: where it lies, and its transform.  Bit
// for bit what transform.py does in float32: every product and sum that could be contracted into a
// fused one is spelled as a rounded operation.

#include "lanes.cuh"

// ---- scales -------------------------------------------------------------------------------------

// A bfloat16 is the upper half of a float32.
__device__ __forceinline__ float scale_of(u32 scale_bits) {
  return __uint_as_float(scale_bits << 16);
}

// Smallest bfloat16 not below x >= 0: codes are ordered like the numbers, so round the code.
__device__ __forceinline__ u32 bf16_bits_round_up(float x) {
  return (__float_as_uint(x) + 0xffffu) >> 16;
}

// Scale of a row that holds NaN or infinity: every bound and every output that reads it becomes
// infinite or NaN, and the step reports a miss.
constexpr u32 kInfiniteScale = 0x7f80u;

// ---- where a row lies ---------------------------------------------------------------------------

// KV head `head` of sequence `sequence` among all: the index into [B, Hkv].
__device__ __forceinline__ i64 head_index(const Cache& cache, int sequence, int head) {
  return static_cast<i64>(sequence) * cache.kv_heads + head;
}

// THE address function: which row of a plane or of the scales holds a token of a KV head.  A cache has
// fewer than 2^32 rows (storage.py).
struct HeadRows {
  const Cache& cache;
  int sequence, head;
  u32 first;  // without pages: the row of token 0

  __device__ __forceinline__ HeadRows(const Cache& cache, int sequence, int head)
      : cache(cache), sequence(sequence), head(head), first(0) {
    if constexpr (kPageTokens == 0) {
      first = static_cast<u32>(head_index(cache, sequence, head) * cache.capacity);
      first = held(first);
    }
  }
  __device__ __forceinline__ u32 of(int token) const {
    if constexpr (kPageTokens == 0) return first + token;
    constexpr int kPage = kPageTokens > 0 ? kPageTokens : 1;
    const i64 entry = static_cast<i64>(sequence) * cache.max_pages + token / kPage;
    const u32 page = cache.block_table[entry];
    return (page * cache.kv_heads + head) * kPage + token % kPage;
  }
};

// Byte `row` of those `bytes` long.
__device__ __forceinline__ u64 row_offset(u32 row, u32 bytes) { return static_cast<u64>(row) * bytes; }

// Slot of a token among the exact rows, -1 if it has none (arrays.py, exact_keys).  `length` is the
// sequence's length once the token and those behind it are in.
__device__ __forceinline__ int exact_slot(const Cache& cache, int token, int start, int length) {
  const int from_start = token - start;
  if (from_start >= 0 && from_start < cache.exact_first) return from_start;
  if (token >= length - cache.exact_last) return cache.exact_first + token % cache.exact_last;
  return -1;
}

// First element of a slot of exact_keys or exact_values.
__device__ __forceinline__ i64 exact_offset(const Cache& cache, i64 head, int slot) {
  return (head * (cache.exact_first + cache.exact_last) + slot) * kHeadDim;
}

// A length past the capacity (launch.py cannot see it without waiting for the device): rows beyond
// are not written, and a step over such a sequence must answer NaN.
__device__ __forceinline__ bool overfull(const Cache& cache, int length) {
  return length > cache.capacity;
}

// Class s(t): the dither row of a token (planes.py, dither_class).
__device__ __forceinline__ int dither_class(int token) {
  const u32 number = token, mixed = number / kDitherRows * 0x9e3779b1u;
  return (number ^ mixed >> 16) % kDitherRows;
}

// Dither row of a class: keys (0) or values (1) [C].
__device__ __forceinline__ const i16* dither_row(const Cache& cache, int side, int dither_class) {
  return cache.dither + static_cast<i64>(side * kDitherRows + dither_class) * kChannels;
}

// ---- the transform ------------------------------------------------------------------------------

// A row as given, zero in the padding.
template <Float kDtype>
__device__ __forceinline__ void load_row(
    float (&x)[kPerLane], const typename Storage<kDtype>::Bits* row /* [D] */) {
  const int lane = lane_of_thread();
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int c = channel(i, lane);
    x[i] = c < kHeadDim ? to_float<kDtype>(row[c]) : 0.0f;
  }
}

// Unnormalised Walsh-Hadamard transform of each block of kHadamardBlock channels.  Distances 1 to
// 16 lie across lanes, 32 and more across registers:
//   distance d: (low, high) -> (low + high, low - high), low = channel without bit d, high = with
__device__ __forceinline__ void hadamard(float (&x)[kPerLane]) {
  const int lane = lane_of_thread();
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const bool is_high = lane & distance;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, x[i], distance);
      x[i] = __fadd_rn(other, is_high ? -x[i] : x[i]);
    }
  }
#pragma unroll
  for (int step = 1; step < kHadamardBlock / kWarpSize; step *= 2) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i & step) continue;
      const float low = x[i], high = x[i + step];
      x[i] = __fadd_rn(low, high);
      x[i + step] = __fsub_rn(low, high);
    }
  }
}

// k -> k' in place.  Scaling by the power of two first is exact, and no k can overflow.
__device__ __forceinline__ void transform_key(float (&x)[kPerLane], const Cache& cache, i64 head) {
  const int lane = lane_of_thread();
  const float* mean = cache.key_mean + head * kHeadDim;
  const float* balance = cache.balance + head * kHeadDim;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int c = channel(i, lane);
    if (c < kHeadDim) {
      const float gain = __fdiv_rn(1.0f / kHadamardBlock, balance[c]);
      x[i] = __fsub_rn(__fmul_rn(x[i], gain), __fmul_rn(mean[c], gain));
    }
    x[i] *= cache.signs[c];
  }
  hadamard(x);
}

// q -> q' in place.
__device__ __forceinline__ void transform_query(
    float (&x)[kPerLane], const Cache& cache, i64 head) {
  const int lane = lane_of_thread();
  const float* balance = cache.balance + head * kHeadDim;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int c = channel(i, lane);
    if (c < kHeadDim) x[i] *= balance[c];
    x[i] *= cache.signs[c];
  }
  hadamard(x);
}

// k' -> k in place: the unnormalised Hadamard matrix is its own inverse times the block size, which
// the key side has divided by already.
__device__ __forceinline__ void restore_key(float (&x)[kPerLane], const Cache& cache, i64 head) {
  const int lane = lane_of_thread();
  hadamard(x);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int c = channel(i, lane);
    if (c >= kHeadDim) continue;
    x[i] = cache.signs[c] * x[i] * cache.balance[head * kHeadDim + c];
    x[i] = __fadd_rn(x[i], cache.key_mean[head * kHeadDim + c]);
  }
}

// v -> v' in place.
__device__ __forceinline__ void centre_value(float (&x)[kPerLane], const Cache& cache, i64 head) {
  const int lane = lane_of_thread();
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int c = channel(i, lane);
    if (c < kHeadDim) x[i] = __fsub_rn(x[i], cache.value_mean[head * kHeadDim + c]);
  }
}
