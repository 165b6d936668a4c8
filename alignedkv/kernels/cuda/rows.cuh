// One row (one token of one KV head) in the hands of one warp: where it lies, how it becomes digit
// planes and how it comes back.  Bit for bit what planes.py and transform.py do in float32: every
// product and sum that could be contracted into a fused one is spelled as a rounded operation.

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

// ---- digits -------------------------------------------------------------------------------------

// Words of a row in shared memory, from where packing picks channels that lie C/m apart.
struct alignas(8) Words {
  u16 of[kChannels];
};

// Encode a row (planes.py, encode_rows): its words go to `words`, its scale bits come back.
__device__ __forceinline__ u32 encode_row(
    const float (&x)[kPerLane], const i16* dither /* [C] */, Words& words) {
  const int lane = lane_of_thread();
  // |x| as bits: ordered like the numbers, and NaN above infinity, so that no NaN is overlooked.
  u32 largest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) largest = max(largest, __float_as_uint(x[i]) & 0x7fffffffu);
  largest = __reduce_max_sync(kAllLanes, largest);
  const bool finite = largest < 0x7f800000u;
  const float wanted = __fdiv_rn(__uint_as_float(largest), kHalfRange);
  const u32 scale_bits =
      finite ? bf16_bits_round_up(fmaxf(wanted, kSmallestScale)) : kInfiniteScale;
  const float g = scale_of(scale_bits);
  __syncwarp();  // the words of the row before have been read
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int c = channel(i, lane);
    const float scaled = finite ? __fdiv_rn(x[i], g) : 0.0f;
    const float steps = __fmul_rn(scaled, static_cast<float>(1 << kScaleShift));
    const float offset = static_cast<float>(dither[c]) * (1.0f / (1 << kDitherFractionBits));
    const int word = __float2int_rd(__fadd_rn(steps, offset)) + 32768;
    words.of[c] = static_cast<u16>(min(max(word, 0), 65535));
  }
  __syncwarp();
  return scale_bits;
}

// Four neighbouring bytes of a plane's row (planes.py, pack_plane).  With m = 8 / width channels in
// a byte, channel i + k C/m lies in bits k width .. of byte i; for width 4:
//   byte i:   7 6 5 4 | 3 2 1 0
//            i + C/2  |    i
template <int kPlane>
__device__ __forceinline__ u32 packed_bytes(const Words& words, int first_byte) {
  constexpr int kWidth = kWidths[kPlane];
  constexpr u32 kMask = (1u << kWidth) - 1;
  u32 packed = 0;
#pragma unroll
  for (int k = 0; k < 8 / kWidth; ++k) {
    const u16* part = words.of + k * kPlaneRowBytes[kPlane] + first_byte;
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) {
      const u32 digit = (static_cast<u32>(part[byte]) >> kUnread[kPlane]) & kMask;
      packed |= digit << (8 * byte + kWidth * k);
    }
  }
  return packed;
}

// All stored planes of a row from its words.
template <int kPlane = 0>
__device__ __forceinline__ void store_planes(
    const Words& words, u8* const (&planes)[kStoredPlanes], u32 row) {
  static_assert(8 % kWidths[kPlane] == 0, "kernels take planes of 1, 2, 4 or 8 bits");
  static_assert(kPlaneRowBytes[kPlane] % 4 == 0, "a plane's row is stored by 4 bytes");
  u32* bytes = reinterpret_cast<u32*>(planes[kPlane] + row_offset(row, kPlaneRowBytes[kPlane]));
  for (int j = lane_of_thread(); j < kPlaneRowBytes[kPlane] / 4; j += kWarpSize) {
    bytes[j] = packed_bytes<kPlane>(words, 4 * j);
  }
  if constexpr (kPlane + 1 < kStoredPlanes) store_planes<kPlane + 1>(words, planes, row);
}

// The row as all its stored planes tell it, (2.2) of theory.md.
__device__ __forceinline__ void decode_row(
    float (&x)[kPerLane], u8* const (&planes)[kStoredPlanes], u32 row, u32 scale_bits,
    const i16* dither /* [C] */) {
  const int lane = lane_of_thread();
  constexpr int kUnreadBits = kUnread[kStoredPlanes - 1];
  const float unit = scale_of(scale_bits) * (1.0f / (1 << kScaleShift));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int c = channel(i, lane);
    u32 word = 0;
#pragma unroll
    for (int plane = 0; plane < kStoredPlanes; ++plane) {
      const int stride = kPlaneRowBytes[plane];
      const u32 byte = planes[plane][row_offset(row, stride) + c % stride];
      const u32 digit = (byte >> (kWidths[plane] * (c / stride))) & ((1u << kWidths[plane]) - 1);
      word |= digit << kUnread[plane];
    }
    // Exact up to the last product: all terms are multiples of 2^-4 below 2^17.
    const float middle = static_cast<float>(word) + 0.5f * (1 << kUnreadBits) - 32768.0f;
    const float offset = static_cast<float>(dither[c]) * (1.0f / (1 << kDitherFractionBits));
    x[i] = __fmul_rn(unit, middle - offset);
  }
}
