// The bound of a statistical policy from a head's complete sums: Corollary 8 of theory.md under the
// settled rule (Theorem 7), or Theorem 5's where that is smaller.  reference_bounds.py, `statistical`,
// says why it holds.
//
// A warp works on one head: class sums are spread over its lanes.

#include "block.cuh"
#include "warps.cuh"

// Norms over the classes, normalised, with R_t = a_t + rho; `_one`: with 1 for R.
struct ClassNorms {
  float linear, linear_one;        // sqrt(V)
  float quadratic, quadratic_one;  // Q
  float value;                     // variance of the value rows
};

// Q of (5.1): sum, sum of squares and maximum over the classes.
__device__ __forceinline__ float chi_square(float sum, float square, float most, float z) {
  constexpr float kRoot2 = 1.41421356f;
  return warp_sum(sum) + kRoot2 * z * sqrtf(warp_sum(square)) + z * z * warp_max(most);
}

// `upper` times a weight's upper value is p^U.
__device__ __forceinline__ ClassNorms norms_of(
    const Partial& whole, int g, float upper, float inverse, float rho, float z) {
  float linear = 0, linear_one = 0, value = 0;
  float sum = 0, square = 0, most = 0, sum_one = 0, square_one = 0, most_one = 0;
  for (int s = threadIdx.x % 32; s < kDitherRows; s += 32) {
    const float(*of_class)[kHeads] = whole.classes + s;
    const float one = upper * of_class[kLinear * kDitherRows][g];
    const float all = fmaf(rho, one, upper * of_class[kLinearSize * kDitherRows][g]);
    const float w_one = upper * of_class[kSquare * kDitherRows][g];
    const float w = fmaf(rho, w_one, upper * of_class[kSquareSize * kDitherRows][g]);
    const float error = inverse * of_class[kValueError * kDitherRows][g];
    linear = fmaf(all, all, linear), linear_one = fmaf(one, one, linear_one);
    sum += w, square = fmaf(w, w, square), most = fmaxf(most, w);
    sum_one += w_one, square_one = fmaf(w_one, w_one, square_one), most_one = fmaxf(most_one, w_one);
    value = fmaf(error, error, value);
  }
  ClassNorms norms;
  norms.linear = sqrtf(warp_sum(linear)), norms.linear_one = sqrtf(warp_sum(linear_one));
  norms.quadratic = chi_square(sum, square, most, z);
  norms.quadratic_one = chi_square(sum_one, square_one, most_one, z);
  norms.value = warp_sum(value) * (1.0f / 3);
  return norms;
}

// z_V sqrt(V) of (5.3) at V = x^2, y = floor^2; infinite where nothing was known to fix y by.
__device__ __forceinline__ float mixture(float x, float floor, float z) {
  if (!(floor > 0)) return infinity();
  const float ratio = x / floor;
  return floor * sqrtf(fmaf(ratio, ratio, 1.0f) * (z * z + log1pf(ratio * ratio)));
}

// beta of (S2), sampling.md: Bennett's form at the best of 48 slopes, or Bernstein's.
__device__ __forceinline__ float sampling_bound(
    float variance, float drawn, float largest_draw, float z) {
  const float total = variance + drawn, draw = z * z * largest_draw * (1.0f / 6);
  float best = draw + sqrtf(fmaf(draw, draw, z * z * total));
  if (total > 0) {
    for (int i = threadIdx.x % 32; i < 48; i += 32) {
      const float slope = z / sqrtf(total) * exp2_fast(-0.125f * i);
      const float bennett = slope * fmaf(0.5f, variance, drawn * curvature(slope * largest_draw)) +
                            z * z / (2.0f * slope);
      best = fminf(best, bennett);
    }
  }
  return -warp_max(-best);
}

// `inverse`: of the denominator; `largest_mean`: of the values' mean.
template <class Totals>
__device__ __forceinline__ float statistical_bound(
    const Step& step, const Query& query, const Totals& head, const Partial& whole, int g,
    float inverse, float largest_mean) {
  constexpr float kMore = 1.0f + 0x1p-10f, kLess = 1.0f - 0x1p-10f;  // theory.md 7.2
  const float z = step.deviations, rho = head.spread;
  // The largest score error that is not random: (3.1), (7.1) and (7.2) of theory.md.  Weights may err
  // by e^shift, and so may the sum that bounds log Z from below.
  const float shift =
      fmaf(query.numbers[kShift][g], whole.extremes[kKeyScale][g], kWeightRounding);
  const float likely = (head.sums[SettledSums::kLikely] + head.sink) * kLess;
  const float upper = expf(2.0f * shift) / likely;
  const ClassNorms norms = norms_of(whole, g, upper * inverse, inverse, rho, z);

  // y of (5.3), and the slope of z_V sqrt(V) at the largest error that is possible.
  const float floor_one = kRootVarianceFloor * step.tolerance / z;
  const float floor = floor_one * query.numbers[kToldSpread][g];
  const float largest_value = kHalfRange * whole.extremes[kValueScale][g];
  const float farthest = rho + fmaxf(largest_value, largest_mean);
  const float ratio = fmaf(farthest, norms.linear_one, norms.linear) / floor;
  const float level = z * z + log1pf(ratio * ratio);
  const float slope = sqrtf(level) + 1.0f / sqrtf(level);

  float value = head.sums[SettledSums::kOutright] + value_rounding(head);
  if constexpr (kSampleValues) {
    value += sampling_bound(norms.value, head.sums[SettledSums::kDrawn], head.largest_draw, z);
  } else {
    value += z * sqrtf(norms.value);
  }
  const float delta = 1.0f - kMore * mixture(norms.linear_one, floor_one, z);
  const float room = delta - kMore * fmaf(slope, norms.linear_one, norms.quadratic_one);
  float random = infinity();
  if (delta > 0 && room > 0) {
    random = (mixture(norms.linear, floor, z) + norms.quadratic + delta * value) / room;
  }
  // What is not random, by Theorem 4.
  const float grown = expf(shift) * upper;
  const float shifted = grown * head.sums[SettledSums::kShifted];
  const float bound =
      kPaid * (random * (1.0f + shifted) + grown * head.sums[SettledSums::kShiftedSize] + rho * shifted);
  if constexpr (kSampleValues) return bound;
  return fminf(bound, certain_bound(head));  // the number, where one is NaN
}
