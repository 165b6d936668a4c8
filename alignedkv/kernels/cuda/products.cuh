// Products of a tile of 32 rows with the queries (channels are summed) and with the weights (tokens
// are summed), plane by plane.

#include "copies.cuh"
#include "mma.cuh"
#include "query.cuh"

constexpr int kTile = 32;  // tokens of a tile: one per lane

// Bytes of a row of a plane of kWidth bits.
template <int kWidth>
constexpr int kRowBytesOf = kChannels * kWidth / 8;

// ---- swizzles --------------------------------------------------------------------------------------
// Rows lie one behind the other; where the rows that one load touches would start in the same banks,
// 16-byte chunks change places within their row.

// Eight lanes copy, and ldmatrix loads, the same 16 bytes of eight rows that lie side by side; a quarter
// warp loads 16 bytes each of four neighbours of keys 2i and 2i + 1.  (Rows of 96 bytes meet in pairs.)
template <int kWidth>
__device__ __forceinline__ constexpr int swizzle_of(int row) {
  if constexpr (kRowBytesOf<kWidth> % 128 == 0) return (row & 1) * 4 + (row >> 1 & 3);
  if constexpr (kRowBytesOf<kWidth> % 128 == 64) return row >> 1 & 3;
  if constexpr (kRowBytesOf<kWidth> % 128 == 32) return row >> 2 & 1;
  return 0;
}
template <int kWidth>
constexpr bool kSwizzled = swizzle_of<kWidth>(7) != 0;

// So that 16 bytes of a swizzled row are found by an exclusive or, and the banks of a row are known.
constexpr int kTileAlignment = 128;

// ---- keys ------------------------------------------------------------------------------------------

// A lane's words of one half of a plane's row, in the order of a query's slots.
template <int kWidth>
__device__ __forceinline__ void key_words(
    u32 (&words)[kLaneWords], const u8* row, int swizzle, int c, bool upper) {
#pragma unroll
  for (int p = 0; p < kLaneWords / kPieceWords; ++p) {
    int byte = kPieceBytes * (c + 4 * p) + (upper ? kChannels / 2 : 0);
    int shift = 0;
    if constexpr (kWidth == 2) {  // a byte holds four channels that lie C/4 apart
      shift = byte >= kChannels / 4 ? 2 : 0;
      byte -= byte >= kChannels / 4 ? kChannels / 4 : 0;
    }
    byte ^= swizzle * 16;
    u32* piece = words + p * kPieceWords;
    if constexpr (kPieceBytes == 16) {
      const uint4 x = *reinterpret_cast<const uint4*>(row + byte);
      piece[0] = x.x, piece[1] = x.y, piece[2] = x.z, piece[3] = x.w;
    } else if constexpr (kPieceBytes == 8) {
      const uint2 x = *reinterpret_cast<const uint2*>(row + byte);
      piece[0] = x.x, piece[1] = x.y;
    } else {
      piece[0] = *reinterpret_cast<const u32*>(row + byte);
    }
    if constexpr (kWidth == 2) {
#pragma unroll
      for (int i = 0; i < kPieceWords; ++i) piece[i] >>= shift;
    }
  }
}

// A lane's digits of a block's queries.
__device__ __forceinline__ void query_digits(u32 (&q)[kSlots], const Query& query, int block, int lane) {
#pragma unroll
  for (int v = 0; v < kSlots / kSlotVector; ++v) {
    const u32* from = query.digits[block][v][lane];
    if constexpr (kSlotVector == 4) {
      const uint4 x = *reinterpret_cast<const uint4*>(from);
      q[4 * v] = x.x, q[4 * v + 1] = x.y, q[4 * v + 2] = x.z, q[4 * v + 3] = x.w;
    } else {
      const uint2 x = *reinterpret_cast<const uint2*>(from);
      q[2 * v] = x.x, q[2 * v + 1] = x.y;
    }
  }
}

// Sum over one half of the channels, rows r and r + 8.
__device__ __forceinline__ void half_products(
    int (&d)[4], const u32 (&a)[kLaneWords], const u32 (&a8)[kLaneWords], u32 mask, const u32* q) {
  multiply(d, a[0] & mask, a8[0] & mask, a[1] & mask, a8[1] & mask, q[0], q[1]);
#pragma unroll
  for (int i = 2; i + 1 < kLaneWords; i += 2) {
    multiply_add(d, a[i] & mask, a8[i] & mask, a[i + 1] & mask, a8[i + 1] & mask, q[i], q[i + 1]);
  }
  if constexpr (kLaneWords % 2 == 1) {
    multiply_add(d, a[kLaneWords - 1] & mask, a8[kLaneWords - 1] & mask, q[kLaneWords - 1]);
  }
}

// What a product is, in digits: planes of up to 4 bits come out 16-fold.
template <int kWidth>
constexpr float kDigitsPerProduct = kWidth == 8 ? 1.0f : 1.0f / 16;

// Digits of 16 rows of a plane times the queries.  `x[block][i]`: row r + 8 i, head 4 block + c.
template <int kWidth>
__device__ __forceinline__ void key_products(
    int (&x)[kHeadBlocks][2], const u8* rows, const Query& query, int lane) {
  constexpr int kRowBytes = kRowBytesOf<kWidth>;
  const int r = lane / 4, c = lane % 4;
  const u8 *row = rows + r * kRowBytes, *row8 = row + 8 * kRowBytes;
  const int swizzle = swizzle_of<kWidth>(r);  // r + 8 alike
  u32 a[kLaneWords], a8[kLaneWords];
  key_words<kWidth>(a, row, swizzle, c, false);
  key_words<kWidth>(a8, row8, swizzle, c, false);
#pragma unroll
  for (int block = 0; block < kHeadBlocks; ++block) {
    u32 q[kSlots];
    query_digits(q, query, block, lane);
    int lower[4], upper[4];
    if constexpr (Digits<kWidth>::kTwoWords) {
      u32 b[kLaneWords], b8[kLaneWords];
      key_words<kWidth>(b, row, swizzle, c, true);
      key_words<kWidth>(b8, row8, swizzle, c, true);
      half_products(lower, a, a8, 0xffffffffu, q);
      half_products(upper, b, b8, 0xffffffffu, q + kLaneWords);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        x[block][i] = joined(lower[2 * i] + upper[2 * i], lower[2 * i + 1] + upper[2 * i + 1]);
      }
    } else {
      half_products(lower, a, a8, Digits<kWidth>::kLower, q);
      half_products(upper, a, a8, Digits<kWidth>::kUpper, q + kLaneWords);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        x[block][i] = 16 * joined(lower[2 * i], lower[2 * i + 1]) +
                      joined(upper[2 * i], upper[2 * i + 1]);
      }
    }
  }
}

// ---- values ----------------------------------------------------------------------------------------
// Tokens are k, so that bytes of four tokens must share a word.  A piece is 16 bytes of a row, of which
// lane (r, c) takes bytes 2 r and 2 r + 1.  ldmatrix brings it both of tokens 8 m + 2 c and 8 m + 2 c + 1
// in word m; two such words make one of four tokens for either byte.  So k = 4 c .. 4 c + 3 are tokens
// 2 c, 2 c + 1, 8 + 2 c, 9 + 2 c, and k + 16 the tokens 16 behind; `weight_slot` is that k, where a
// token's weight lies.

constexpr int kValuePieceBytes = 16;
constexpr int kPieces = kChannels / (2 * kValuePieceBytes);
constexpr int kOutputs = kChannels / 8;  // per lane and block of heads, four a piece
static_assert(kOutputs == 4 * kPieces, "a row is made of whole pieces");

__device__ __forceinline__ int weight_slot(int token) {
  return (token & 16) + 4 * (token >> 1 & 3) + 2 * (token >> 3 & 1) + (token & 1);
}

// A lane's first byte of a piece, and its first channel in the lower half of the row.
template <int kPiece>
__device__ __forceinline__ int value_byte(int r) {
  return kValuePieceBytes * kPiece + 2 * r;
}

// Words of a piece, a byte of four tokens each: [byte][k / 16].
using Operands = u32[2][2];

// Rows of kWidth bits of a tile, side by side in shared memory.
template <int kWidth>
struct ValueRows {
  static constexpr int kBytes = kRowBytesOf<kWidth>;

  const u8* tile;
  u32 row;  // where the lane's row starts, swizzled

  __device__ __forceinline__ ValueRows(const u8* tile, int lane) : tile(tile) {
    row = shared_address(tile) + lane * kBytes + 16 * swizzle_of<kWidth>(lane);
  }

  // A piece's words: digits of the lower half where Digits<kWidth>::kLower is set, of the upper one
  // where kUpper is.
  template <int kPiece>
  __device__ __forceinline__ void load(Operands& words, int r, int c) const {
    constexpr int kFirst = kValuePieceBytes * kPiece;
    u32 pairs[4];
    int shift = 0;
    if constexpr (kBytes % 16 == 0) {
      constexpr bool kIsSecond = kWidth == 2 && kFirst >= kBytes;
      constexpr int kByte = kFirst - (kIsSecond ? kBytes : 0);
      shift = kIsSecond ? 2 : 0;
      load_matrices(pairs, kSwizzled<kWidth> ? row ^ kByte : row + kByte);
    } else {
      static_assert(kWidth == 2, "ldmatrix takes rows of 16 bytes");
      const int byte = kFirst + 2 * r;
      const bool is_second = byte >= kBytes;
      shift = is_second ? 2 : 0;
      const u8* of_lane = tile + 2 * c * kBytes + byte - (is_second ? kBytes : 0);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const u8* two = of_lane + 8 * m * kBytes;
        pairs[m] = *reinterpret_cast<const u16*>(two) |
                   *reinterpret_cast<const u16*>(two + kBytes) << 16;
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      words[0][k] = __byte_perm(pairs[2 * k], pairs[2 * k + 1], 0x6420) >> shift;
      words[1][k] = __byte_perm(pairs[2 * k], pairs[2 * k + 1], 0x7531) >> shift;
    }
  }
};

// A plane's digits as operands of both halves.
template <int kWidth>
__device__ __forceinline__ void split_digits(Operands& lower, Operands& upper, const Operands& words) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      lower[j][k] = words[j][k] & Digits<kWidth>::kLower;
      upper[j][k] = words[j][k] & Digits<kWidth>::kUpper;
    }
  }
}

// Digits of a first plane, of 4 bits, and of the second, of kWidth, as one: 2^kWidth first + second.
template <int kWidth>
__device__ __forceinline__ void join_digits(
    Operands& lower, Operands& upper, const Operands& first, const Operands& second) {
  constexpr u32 kFirst = Digits<4>::kLower << kWidth, kBoth = kFirst | Digits<kWidth>::kLower;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      lower[j][k] = chosen(kFirst, first[j][k] << kWidth, second[j][k]) & kBoth;
      upper[j][k] = chosen(kFirst, first[j][k] >> (4 - kWidth), second[j][k] >> 4) & kBoth;
    }
  }
}

// Digits times the weights.  `d[block][j]`: rows r and r + 8 are byte j's channels in the lower and the
// upper half.
__device__ __forceinline__ void value_products(
    int (&d)[kHeadBlocks][2][4], const Operands& lower, const Operands& upper,
    const u32 (&weights)[kHeadBlocks][2]) {
  // Two digits of a channel are below 2^8.
  static_assert(u64{32} * kLargestNumber * 255 < u64{1} << 31);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int block = 0; block < kHeadBlocks; ++block) {
      multiply(d[block][j], lower[j][0], upper[j][0], lower[j][1], upper[j][1], weights[block][0],
               weights[block][1]);
    }
  }
}
