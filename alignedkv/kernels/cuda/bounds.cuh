// The sums over tokens from which a head's bound follows, and the bound.
//
// All terms are non-negative and weights unnormalised (w = exp(score - reference)), so sums of splits
// add.  Rounding, of these sums too, is paid for at the end (theory.md 7.2).

#include "copies.cuh"
#include "query.cuh"
#include "tiles.cuh"

// What only a statistical bound wants to know of a token (settled_rule.cuh).
struct SettledToken {
  float finest[kGroup];  // scores from all planes that were read, used or not, relative to the hint
  u32 used;              // two bits a head: planes of its score, less one
  bool errs;             // not a row that is kept exact, or that nobody attends to
  int of_class;          // among the warp's own

  __device__ __forceinline__ int planes_of(int g) const { return (used >> 2 * g & 3) + 1; }
};

// What a token brings to the sums of all heads of its group.
struct Token {
  float key_scale, value_scale;
  float key_step;    // 2^-bits: half step of the key planes read over that of the first
  float value_step;  // likewise; of no meaning where no value plane was read
  bool has_value;
  float per_chance;  // 1 / probability with which the value row was read; 1 if for certain
  SettledToken settled;
};

// x - 1 for a fast reciprocal x of a chance, not below what it stands for; 0 where the row is certain.
__device__ __forceinline__ float less_one(float x) {
  return x > 1.0f ? fmaf(x, 1.0f + 0x1p-21f, -1.0f) : 0.0f;
}

// Whether score errors are counted at their worst.
constexpr bool kCertain = kBound == Bound::Deterministic;

// Whether weights are freed of what a random score error adds to them on average (theory.md 5.1).  A
// cap bends scores, and what is added then depends on where.
constexpr bool kMeanCorrection = kBound == Bound::Estimate && !kSoftcap;

// 1 - e^-x <= x / (1 + x/2), since it is 2t / (1 + t) with t = tanh(x/2) <= x/2.
__device__ __forceinline__ float one_minus_exp(float x) {
  return x * reciprocal_fast(fmaf(0.5f, x, 1.0f));
}

// e^x - 1 <= x + (e - 2) x^2 for 0 <= x <= 1: all terms of the series are positive.
__device__ __forceinline__ float expm1_below_1(float x) { return fmaf(0.7183f * x, x, x); }

// e^x - 1 <= x e^(x/2) e^(x^2/24), since sinh(y) <= y e^(y^2/6).
__device__ __forceinline__ float expm1_over(float x) {
  return x * exp2_fast(x * fmaf(x, kLog2e / 24, kLog2e / 2));
}

// e^x - 1 for a score error x, from above (theory.md 7.2).  Beyond 60 the argument's rounding counts,
// and no weight is so small that a clamp would be sound: infinity, or NaN at weight 0, is a miss.
__device__ __forceinline__ float expm1_above(float x) {
  if (x > 60.0f) return __int_as_float(0x7f800000);
  return x < 0x1p-6f ? fmaf(x, x, x) : fmaf(1.0f + 0x1p-17f, exp2_fast(x * kLog2e), -1.0f);
}

// Relative rounding of a computed weight, (7.2) of theory.md with |score - reference| up to 88.
constexpr float kWeightRounding = 0x1p-15f;
// A prefix without its dither is at most so many row scales (a+ of sampling.md, Theorem S1).
constexpr float kLargestPrefix = 8.0f;

// The value error of a row that was read, without its weight.  0.01 units: the rounding of a stored
// value (theory.md 2).
__device__ __forceinline__ float read_error(const Token& token) {
  return token.value_scale * fmaf(0.5f, token.value_step, 0.01f / (1 << kScaleShift));
}

template <Bound kKind>
struct SumsOf;

// Estimate 9, (5.7) of theory.md, with the tokens' sums of one kind kept together: the variance of
// keys, values and sampling, and what is added outright, skipped rows and the bias of weights.
template <>
struct SumsOf<Bound::Estimate> {
  static constexpr int kCount = 2;
  float variance[kGroup] = {}, certain[kGroup] = {};

  // Coefficients of a token that all heads share.
  struct Shared {
    float size, value_variance, skipped, square_step, bias;
    bool is_coarse;  // some sigma^2 exceeds 1, of any token of the warp
  };
  // `most`: the largest sigma(1)^2 / g^2 of the heads.
  __device__ __forceinline__ static Shared shared_of(const Token& token, float most) {
    Shared s;
    s.size = kHalfRange * token.value_scale;
    const float step = token.key_scale * token.key_step;
    s.square_step = step * step;
    // Errors are uniform sums, not normal: e^(sigma^2/2) is too large by sigma^4 / 20 at most.
    const float variance = most * s.square_step;
    s.bias = 0.05f * variance * variance;
    s.is_coarse = __any_sync(kAllLanes, variance > 1.0f);
    const float half_step = token.value_scale * token.value_step * 0.288675135f;  // / (2 sqrt 3)
    s.value_variance = token.has_value ? half_step * half_step : 0.0f;
    s.skipped = token.has_value ? 0.0f : s.size;
    if constexpr (kSampleValues) {
      // sampling.md, Corollary: a row left to chance varies, and is not skipped.
      const float largest = kLargestPrefix * token.value_scale;
      const float drawn = largest * largest * less_one(token.per_chance);
      s.value_variance = fmaf(half_step, half_step, drawn);
    }
    return s;
  }

  // A token's terms; returns its weight.
  template <bool kIsCoarse>
  __device__ __forceinline__ float add(
      int g, float score, const Shared& s, float square_deviation, float spread) {
    const float x = square_deviation * s.square_step, size = s.size + spread;  // sigma^2, R
    float weight, reach, of_square;
    if constexpr (!kMeanCorrection) {
      weight = exp2_fast(score), reach = weight * size, of_square = expm1_over(x);
      certain[g] = fmaf(reach, x, certain[g]);
    } else {
      if constexpr (kIsCoarse) {
        // w^2 (e^(sigma^2) - 1) is u^2 (1 - e^(-sigma^2)): nothing overflows.
        const float uncorrected = exp2_fast(score);
        weight = uncorrected * exp2_fast(-0.5f * kLog2e * x);
        reach = uncorrected * size, of_square = one_minus_exp(x);
      } else {
        weight = exp2_fast(fmaf(-0.5f * kLog2e, x, score));
        reach = weight * size, of_square = expm1_below_1(x);
      }
      certain[g] = fmaf(weight * size, s.bias, certain[g]);
    }
    variance[g] = fmaf(reach * reach, of_square, variance[g]);
    variance[g] = fmaf(weight * weight, s.value_variance, variance[g]);
    if constexpr (!kSampleValues) certain[g] = fmaf(weight, s.skipped, certain[g]);
    return weight;
  }

  // What rounding took from a weight times its value scale, taken for random.
  __device__ __forceinline__ void add_rounding(int g, float lost) {
    const float error = kLargestPrefix * lost;
    variance[g] = fmaf(error, error, variance[g]);
  }

  // A row kept exact has no error.
  __device__ __forceinline__ void add_exact(int, float) {}

  template <int kSum>
  __device__ __forceinline__ float& at(int g) {
    return kSum == 0 ? variance[g] : certain[g];
  }
  // Sums of squares of weights scale with the square of the reference.
  __device__ __forceinline__ static constexpr bool is_square(int sum) { return sum == 0; }
};

// Theorem 5 in its scalar form (4.3).
template <>
struct SumsOf<Bound::Deterministic> {
  static constexpr int kCount = 4;
  float score[kGroup] = {}, score_size[kGroup] = {}, value[kGroup] = {}, smallest[kGroup] = {};

  struct Shared {
    float size, value_error, scale, step;
    static constexpr bool is_coarse = false;
  };
  __device__ __forceinline__ static Shared shared_of(const Token& token, float) {
    Shared s;
    s.size = kHalfRange * token.value_scale;
    s.scale = token.key_scale;
    s.step = token.key_scale * token.key_step;
    s.value_error = token.has_value ? read_error(token) : s.size;
    return s;
  }

  // A token's terms; returns its weight.
  template <bool>
  __device__ __forceinline__ float add(
      int g, float of_score, const Shared& s, float worst, float shift) {
    const float weight = exp2_fast(of_score);
    const float e = fmaf(worst, s.step, fmaf(shift, s.scale, kWeightRounding));
    const float grown = weight * expm1_above(e);
    score[g] += grown;
    score_size[g] = fmaf(grown, s.size, score_size[g]);
    value[g] = fmaf(weight, s.value_error, value[g]);
    smallest[g] = fmaf(weight, exp2_fast(-kLog2e * e), smallest[g]);
    return weight;
  }

  __device__ __forceinline__ void add_rounding(int g, float lost) {
    value[g] = fmaf(kLargestPrefix, fabsf(lost), value[g]);
  }

  // A row kept exact has no error but that of its weight.
  __device__ __forceinline__ void add_exact(int g, float weight) {
    smallest[g] = fmaf(weight, 1.0f - kWeightRounding, smallest[g]);
  }

  template <int kSum>
  __device__ __forceinline__ float& at(int g) {
    return kSum == 0 ? score[g] : kSum == 1 ? score_size[g] : kSum == 2 ? value[g] : smallest[g];
  }
  __device__ __forceinline__ static constexpr bool is_square(int) { return false; }
};

#include "settled_sums.cuh"

using Sums = SumsOf<kBound>;

// ---- the bound ------------------------------------------------------------------------------------

// What a head's bound is made of, once its sums are complete.
struct HeadTotals {
  float sums[Sums::kCount];   // divided by the denominator, or by its square
  float classes;              // sum of weights times value scales, divided
  float sink;                 // weight of the sink logit
  float spread_hint, spread;  // rho
  float size;                 // of the output
  float largest_draw;         // M of sampling.md, Theorem S1
};

// Sums of up to 2^13 roundings are within 2^-11 of exact (theory.md 7.2).
constexpr float kPaid = 1.0f + 0x1p-9f;

// Sums in float32 of the value products, over the tiles of a warp, warps and splits.
__device__ __forceinline__ float value_rounding(const HeadTotals& head) {
  return 0x1p-18f * (2 * 16 * head.classes + head.size);
}

__device__ __forceinline__ float estimate(const HeadTotals& head, float z) {
  // The spread in R was the hint; where it came out larger, R grew at most in proportion.
  const float stale = head.spread > head.spread_hint ? head.spread / head.spread_hint : 1.0f;
  float random = z * sqrtf(head.sums[0]);
  if constexpr (kSampleValues) {
    // Bernstein's form of (S2): needs the variances only together.
    const float draw = z * z * head.largest_draw * (1.0f / 6);
    random = draw + sqrtf(fmaf(draw, draw, random * random));
  }
  return kPaid * (stale * (random + head.sums[1]) + value_rounding(head));
}

// Theorem 5, from the first sums.
__device__ __forceinline__ float certain_bound(const HeadTotals& head) {
  const float value = head.sums[2] + value_rounding(head);
  const float smallest = (head.sums[3] + head.sink) * (1.0f - 0x1p-10f);
  return kPaid * (value + (head.sums[1] + (head.spread + value) * head.sums[0]) / smallest);
}

// Bound on the largest error of a channel.
__device__ __forceinline__ float bound_of(const HeadTotals& head, float z) {
  return kCertain ? certain_bound(head) : estimate(head, z);
}
