// Products of a tile of 32 rows with the queries (channels are summed) and with the weights (tokens
// are summed), plane by plane.

#include "mma.cuh"
#include "query.cuh"

constexpr int kTile = 32;  // tokens of a tile: one per lane

// Bytes of a row of a plane of kWidth bits.
template <int kWidth>
constexpr int kRowBytesOf = kChannels * kWidth / 8;

// ---- swizzles --------------------------------------------------------------------------------------
// Rows lie one behind the other; where the rows that one load touches would start in the same banks,
// 16-byte chunks change places within their row.

// Keys: a quarter warp loads 16 bytes each of rows 2i and 2i + 1.
template <int kWidth>
__device__ __forceinline__ constexpr int key_swizzle(int row) {
  return kRowBytesOf<kWidth> % 128 == 0 ? (row & 1) * 4 : 0;
}

// Values: a warp loads 32 bytes of four rows that lie side by side.
template <int kWidth>
__device__ __forceinline__ constexpr int value_swizzle(int row) {
  if constexpr (kRowBytesOf<kWidth> % 128 == 0) return (row & 3) * 2;
  if constexpr (kRowBytesOf<kWidth> % 128 == 64) return (row & 2);
  return 0;
}

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
  const int swizzle = key_swizzle<kWidth>(r);  // r + 8 alike
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
// Tokens are k, so that bytes of four tokens must share a word: lane (r, c) takes, of tokens c + 4 i,
// the word of channels 4 (r + 8 p) .. of piece p, and transposes.  Token c + 4 i is k = 4 c + i for
// i < 4 and 12 + 4 c + i above; `weight_slot` is that k, where its weight lies.  At C = 96 the second
// piece is half a word: channels 32 + 2 r.

constexpr int kPieces = (kChannels + 63) / 64;
constexpr int kOutputs = kChannels / 8;  // per lane and block of heads

__device__ __forceinline__ int weight_slot(int token) {
  return (token & 16) + 4 * (token & 3) + (token >> 2 & 3);
}

template <int kPiece>
constexpr int kPieceChannels = 64 * kPiece + 64 > kChannels ? 2 : 4;

// A lane's byte of a row of the lower half's channels, and its channels 0 .. kPieceChannels - 1.
template <int kPiece>
__device__ __forceinline__ int value_byte(int r) {
  return 32 * kPiece + kPieceChannels<kPiece> * r;
}

// A piece of one row: digits of the lower half masked by kLower, of the upper by kUpper.
template <int kWidth, int kPiece>
__device__ __forceinline__ u32 value_word(const u8* row, int swizzle, int r, bool upper) {
  int byte = value_byte<kPiece>(r) + (upper ? kChannels / 2 : 0), shift = 0;
  if constexpr (kWidth == 2) {
    shift = byte >= kChannels / 4 ? 2 : 0;
    byte -= byte >= kChannels / 4 ? kChannels / 4 : 0;
  }
  byte ^= swizzle * 16;
  u32 word;
  if constexpr (kPieceChannels<kPiece> == 4) {
    word = *reinterpret_cast<const u32*>(row + byte);
  } else {
    word = *reinterpret_cast<const u16*>(row + byte);
  }
  return kWidth == 2 ? word >> shift : word;
}

// Digits of a piece times the weights; `load(i, upper)` is the word of token c + 4 i.
// `d[block][j]`: rows r and r + 8 are channel j of the piece in the lower and the upper half.
template <int kWidth, int kPiece, class Load>
__device__ __forceinline__ void value_products(
    int (&d)[kHeadBlocks][4][4], Load load, const u32 (&weights)[kHeadBlocks][2]) {
  u32 words[8], t[2][4], t_upper[2][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) words[i] = load(i, false);
  transpose(t[0], words[0], words[1], words[2], words[3]);
  transpose(t[1], words[4], words[5], words[6], words[7]);
  if constexpr (Digits<kWidth>::kTwoWords) {
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = load(i, true);
    transpose(t_upper[0], words[0], words[1], words[2], words[3]);
    transpose(t_upper[1], words[4], words[5], words[6], words[7]);
  }
#pragma unroll
  for (int j = 0; j < kPieceChannels<kPiece>; ++j) {
    u32 a[2], a_upper[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      a[k] = t[k][j] & Digits<kWidth>::kLower;
      a_upper[k] = Digits<kWidth>::kTwoWords ? t_upper[k][j] : t[k][j] & Digits<kWidth>::kUpper;
    }
#pragma unroll
    for (int block = 0; block < kHeadBlocks; ++block) {
      multiply(d[block][j], a[0], a_upper[0], a[1], a_upper[1], weights[block][0], weights[block][1]);
    }
  }
}
