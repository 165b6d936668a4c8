// Integer tensor-core products of digit planes.
//
// m16n8k32, row (r = lane / 4) and column group (c = lane % 4) of a lane, bytes from the lowest:
//   A  a0: row r     k = 4c ..       a2: row r     k = 16 + 4c ..
//      a1: row r + 8 k = 4c ..       a3: row r + 8 k = 16 + 4c ..
//   B  b0: column r  k = 4c ..       b1: column r  k = 16 + 4c ..
//   D  d0: (r, 2c)   d1: (r, 2c + 1)   d2: (r + 8, 2c)   d3: (r + 8, 2c + 1)
// A holds digits (unsigned bytes), B two signed digits each of four heads: column 2h the high one,
// 2h + 1 the low one, so d0 256 + d1 is head c's product with the 16-bit number.  All sums are exact.

#include "dtypes.cuh"

__device__ __forceinline__ void multiply_add(
    int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same without the sum.
__device__ __forceinline__ void multiply(
    int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(0));
}

// The sum over 16 k more: a0, a1 and b0 alone.
__device__ __forceinline__ void multiply_add(int (&d)[4], u32 a0, u32 a1, u32 b0) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

// Signed bytes in A too: the high bytes of dither entries.
__device__ __forceinline__ void multiply_add_signed(
    int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A 16-bit number as two signed digits, n = 256 high + low; the bytes of n + 128 are high and low + 128.
__device__ __forceinline__ int joined(int high, int low) { return high * 256 + low; }

// Largest |n| whose digits are signed bytes.
constexpr int kLargestNumber = 127 * 256;

// ---- digits in words ------------------------------------------------------------------------------

// A word of a plane's row holds four neighbouring channels of the lower half of the row and, 4 bits
// higher, the four that lie C/2 above (planes.py, pack_plane).  Masked in place, both are operands;
// the upper ones are 16 times their digits:
//   width 4:  7 6 5 4 | 3 2 1 0          width 2, after a shift:  . . 5 4 | . . 1 0
//              upper  |  lower                                     upper  |  lower
// A plane of 8 bits has a word for each half.
template <int kWidth>
struct Digits {
  static constexpr u32 kByte = (1u << kWidth) - 1;
  static constexpr u32 kLower = kByte * 0x01010101u;
  static constexpr u32 kUpper = kLower << 4;
  static constexpr bool kTwoWords = kWidth == 8;
};

// Bits of x where the mask has ones, of y elsewhere; the compiler would take two instructions.
__device__ __forceinline__ u32 chosen(u32 mask, u32 x, u32 y) {
  u32 z;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(z) : "r"(x), "r"(y), "r"(mask));
  return z;
}

// Four 8 x 8 matrices of byte pairs, transposed: row i of matrix m lies at the address of lane 8 m + i,
// and lane (r, c) gets in x[m] pair r of rows 2 c and, above, 2 c + 1.
__device__ __forceinline__ void load_matrices(u32 (&x)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}
