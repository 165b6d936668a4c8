// How a row becomes digit planes, and how it comes back: bit for bit what planes.py does in float32.

#include "rows.cuh"

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
