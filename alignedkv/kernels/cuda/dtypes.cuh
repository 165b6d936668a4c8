// Names of numbers: NVRTC compiles without headers, so fixed widths are named here and conversions
// are instructions.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i16 = short;
using i32 = int;
using i64 = long long;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// How a number of a dtype lies in memory.
template <Float kDtype>
struct Storage {
  using Bits = u16;
};
template <>
struct Storage<Float::F32> {
  using Bits = u32;
};
using RowBits = Storage<kRowDtype>::Bits;      // keys and values as given, and rows kept exact
using QueryBits = Storage<kQueryDtype>::Bits;  // queries and outputs

// Exact: every dtype is a subset of float32.
template <Float kDtype>
__device__ __forceinline__ float to_float(typename Storage<kDtype>::Bits bits) {
  if constexpr (kDtype == Float::F16) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  } else if constexpr (kDtype == Float::BF16) {
    return __uint_as_float(static_cast<u32>(bits) << 16);
  } else {
    return __uint_as_float(bits);
  }
}

// To nearest, ties to even.
template <Float kDtype>
__device__ __forceinline__ typename Storage<kDtype>::Bits from_float(float value) {
  if constexpr (kDtype == Float::F32) {
    return __float_as_uint(value);
  } else {
    u16 bits;
    if constexpr (kDtype == Float::F16) {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    } else {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    }
    return bits;
  }
}
