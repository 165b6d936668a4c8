// Shared memory of a block of decode.cu, and what it leaves for the block that merges.

#include "arguments.cuh"
#include "bounds.cuh"
#include "plan.cuh"
#include "query.cuh"
#include "tiles.cuh"

constexpr int kThreads = 32 * kWarps;

// Units in which weights are rounded.  An estimate takes what that loses for random, 0.1 theta a row; a
// bound that is proved adds it all up.
constexpr float kUnitsInTheta = kBound == Bound::Estimate ? 32.0f : 512.0f;

// Numbers of a head that a step's hints fix; logarithms are to base 2.
enum Constant {
  kOffset,       // of a score relative to the hint L (softcap: of the score before the cap)
  kHint,         // L
  kMargin,       // of the score of a planned weight, per key scale: margin sigma(1) / g
  kReachSize,    // error of an addend in units of theta: key scale (this value scale + next)
  kReachSpread,
  kValueGain,    // error of a value addend in units of theta, per weight and value scale
  kError,        // estimate: (sigma(1) / g)^2      deterministic: e(1) / g
  kErrorMore,    // estimate: hint of the spread    deterministic: (b + e^a) / g
  kWeightUnit,   // of weights times value scales, when they are rounded: theta / kUnitsInTheta
  kPerWeightUnit,
  kConstants
};

// Sums of a head over tokens, in the order of a Partial.
constexpr int kTotal = 0;                                  // weights
constexpr int kOffsets = 1;                                // weights times what digits stand for
constexpr int kFirstBound = 2;                             // those of the bound ...
constexpr int kSumCount = kFirstBound + Sums::kCount;

constexpr int kClassSums = kSettled ? kAllClassSums : 1;
constexpr int kClassRows = kClassSums * kDitherRows;

// log2 of M / theta_s where chances are from a row's own plan: prefixes reach 8 row scales, and rows are
// planned by 7.5 of them.  (A plan takes no weight for more than the denominator.)
constexpr float kPlannedDraw = 0.0931095f;

// Maxima over tokens.
enum Extreme {
  kDraw,  // log2 of M / theta_s of sampling.md, Theorem S1, times the denominator; kPlannedDraw: or that
  kKeyScale,
  kValueScale,
  kAllExtremes
};
constexpr int kExtremes = kSettled ? kAllExtremes : 1;

__device__ __forceinline__ constexpr bool is_kept(int extreme) {
  return extreme == kDraw ? kSampleValues : kSettled;
}

__device__ __forceinline__ constexpr bool is_square(int sum) {
  return sum >= kFirstBound && Sums::is_square(sum - kFirstBound);
}

// What a block found, relative to exp2(reference).
struct alignas(16) Partial {
  float output[kGroup][kChannels];      // digits times weights
  float classes[kClassRows][kHeads];
  float sums[kSumCount][kHeads];
  float reference[kHeads];
  float extremes[kExtremes][kHeads];
};
static_assert(sizeof(Partial) == 4 * kPartialFloats);
static_assert(sizeof(Query) == kQueryBytes);

// Keys with a third plane or more are few: so many at a time.
constexpr int kRareRows = 16;

constexpr int rare_bytes() {
  int most = 0;
  for (int plane = 2; plane < kStoredPlanes; ++plane) {
    most = kPlaneRowBytes[plane] > most ? kPlaneRowBytes[plane] : most;
  }
  return kRareRows * most;
}

// Finer key planes of an open tile: rows of the second, and where the rare ones lie among those.
struct alignas(kTileAlignment) FinerKeys {
  u8 second[kTile * kPlaneRowBytes[1]];
  u8 rare[rare_bytes() > 0 ? rare_bytes() : 16];
  u8 order[kRareRows];
};

// Tokens of any tiles whose value rows are wanted, until there are enough for a tile.  Rows without a
// second plane are 0 there.
struct alignas(kTileAlignment) ValueQueue {
  u8 first[kTile * kPlaneRowBytes[0]];
  u8 second[kTile * kPlaneRowBytes[1]];
  float weight[kTile][kHeads];  // times the value scale, over the chance
  struct {
    i32 token;
    Plan plan;
  } row[kTile];
};

struct WarpTiles {
  u8 key_first[kKeyStages][kTile * kPlaneRowBytes[0]];
  ValueQueue values;
  FinerKeys finer;
  float scores[kTile][kHeads];
  u16 weights[2][kHeads][kTile + 16];  // by weight_slot; what their rounding lost
  float weight_units[2][kHeads];  // of those, where they are the queue's own
  u32 scales[kKeyStages][kTile];
};

// Value products of a warp and four heads.  The rows of two lanes that share a bank are a channel apart.
struct Outputs {
  float of[4][kChannels + 1];
};
static_assert(sizeof(Outputs) <= sizeof(WarpTiles));

// What warps work in; with a statistical bound's sums, which lie behind the tiles.
template <bool kHasSums>
struct WarpMemory {
  WarpTiles tiles[kWarps];
  SettledSums::Memory sums[kWarps];
  __device__ __forceinline__ SettledSums::Memory& settled(int warp) { return sums[warp]; }
  __device__ __forceinline__ const SettledSums::Memory& settled(int warp) const {
    return sums[warp];
  }
};
template <>
struct WarpMemory<false> {
  WarpTiles tiles[kWarps];
  __device__ SettledSums::Memory& settled(int warp) const;  // nobody calls it
};

struct DecodeShared {
  Query query;
  float constants[kConstants][kHeads];
  float classes[kWarps][kOwnClasses][kHeads];
  int first_block[kWarps];  // of those that its classes are of
  float reference[kWarps][kHeads];
  float factor[kWarps][kHeads];
  float sums[kWarps][kSumCount][kHeads];
  float theta[kHeads];
  float extremes[kWarps][kExtremes];
  float largest_square;  // most of (sigma(1) / g)^2
  float sampling_share;  // theta_s / theta
  float skip_gain;       // what a skipped row errs more than one read at a plane, log2
  u32 reads[2 * kStoredPlanes];
  Range range;
  Share share;
  int trusted;
  int is_last;
  union {
    WarpTiles tiles[kWarps];
    WarpMemory<kSettled> warps;
  };

  // In the place of the warp's tiles.
  __device__ __forceinline__ Outputs& outputs_of(int warp) {
    return reinterpret_cast<Outputs&>(tiles[warp]);
  }
};
static_assert(sizeof(DecodeShared) <= kSharedBytes);
