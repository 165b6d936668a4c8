// What prepare.cu hands to decode.cu for each KV head: its group's queries as digits, their products
// with the dither rows, and the numbers that turn integers into scores.

#include "dtypes.cuh"

// Tensor-core columns come in blocks of four heads (mma.cuh); heads that do not exist are zeros.
constexpr int kHeadBlocks = (kGroup + 3) / 4;
constexpr int kHeads = 4 * kHeadBlocks;
constexpr float kLog2e = 1.44269504f;
// A statistical bound wants planes by the settled rule, whose hints must not depend on this step's
// dither: they are those of the step before (theory.md 5.3).
constexpr bool kSettled = kBound == Bound::Statistical;

// Lane (r, c) of a key product holds, of row r, kLaneWords words in pieces of kPieceBytes: piece p at
// byte kPieceBytes (c + 4 p).  The piece is the widest that meets no bank twice and leaves none over.
constexpr int kLaneWords = kChannels / 32;
constexpr int kPieceBytes = kChannels == 96 ? 4 : kChannels % 128 == 0 ? 16 : 8;
constexpr int kPieceWords = kPieceBytes / 4;
// Slot s < kLaneWords of a lane is a word's lower half, s + kLaneWords its upper half.
constexpr int kSlots = 2 * kLaneWords;
constexpr int kSlotVector = kSlots % 4 == 0 ? 4 : 2;

// First of the four channels of a slot.
__device__ __forceinline__ constexpr int slot_channel(int slot, int c) {
  const int word = slot % kLaneWords;
  const int byte = kPieceBytes * (c + 4 * (word / kPieceWords)) + 4 * (word % kPieceWords);
  return byte + (slot / kLaneWords) * (kChannels / 2);
}

// Numbers of a head.  A row with scale g, first digits d and class s has the score
//   log2 e lambda q.k = base + g (unit16 (16 d.q) + classes[s]),
// where d.q is an integer product; with a softcap everything is divided by softcap / log2 e.
enum Number {
  kUnit16,     // score of 1/16 of a digit product
  kHalf,       // score of a half-digit in every channel: unit Q / 1, Q = sum of q
  kBase,       // score of the key mean
  kDeviation,  // sigma(1) / g, natural
  kWorst,      // e(1) / g, natural
  kShift,      // (b + e^a) / g, natural: (3.1) and (7.1) of theory.md
  kNear,       // log-sum-exp of the near rows' first scores, natural (policy.py, NEAR_FIRST)
  kExplained,  // what the query alone explains of the other rows' log-sum-exp, natural
  kLogZ,       // the hint of log Z that follows, natural
  kNumbers,
  kToldSpread = kNear,  // settled rule, which has no near rows: the hint of rho, repairs included
};

struct alignas(16) Query {
  u32 digits[kHeadBlocks][kSlots / kSlotVector][32][kSlotVector];
  float classes[kDitherRows][kHeads];
  float numbers[kNumbers][kHeads];
  i32 length;  // of the sequence, the appended token included; -1 beyond the capacity
  u32 stream;  // key of the sampling hash
  u32 padding[2];
};

// The finaliser of MurmurHash3 (sampling.py, mix).
__device__ __forceinline__ u32 mix(u32 word) {
  word = (word ^ word >> 16) * 0x85ebca6bu;
  word = (word ^ word >> 13) * 0xc2b2ae35u;
  return word ^ word >> 16;
}
constexpr u32 kSpread = 0x9e3779b9u;
