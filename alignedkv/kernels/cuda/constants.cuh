// What the hints of a head make of its numbers: by prepare.cu for a step, by decode.cu for a repair.

#include "arguments.cuh"
#include "copies.cuh"
#include "query.cuh"

// Units in which weights are rounded.  An estimate takes what that loses for random, 0.1 theta a row; a
// bound that is proved adds it all up.
constexpr float kUnitsInTheta = kBound == Bound::Estimate ? 32.0f : 512.0f;

// All constants of query head g but those of log Z.
__device__ __forceinline__ void set_constants(
    const Step& step, Query& query, float theta, float spread, int g) {
  const float deviation = query.numbers[kDeviation][g], worst = query.numbers[kWorst][g];
  const float error = (kCertain ? worst : deviation) / theta;
  float(&to)[kConstants][kHeads] = query.constants;
  const float margin = kSettled ? step.deviations : step.plan_margin;
  to[kMargin][g] = margin * kLog2e * deviation;
  to[kReachSize][g] = kHalfRange * error;
  to[kReachSpread][g] = spread * error;
  constexpr float kOfPlane = kCertain ? 0.5f : 0.288675135f;
  to[kValueGain][g] = log2_fast(kOfPlane / theta);
  to[kError][g] = kCertain ? worst : deviation * deviation;
  to[kErrorMore][g] = kCertain ? query.numbers[kShift][g] : spread;
  // A probe's weights are too large for any unit, as it were.
  const float unit = is_finite(theta) ? theta * (1.0f / kUnitsInTheta) : 0.0f;
  to[kWeightUnit][g] = fminf(fmaxf(unit, 0x1p-100f), 0x1p100f);
  to[kPerWeightUnit][g] = 1.0f / to[kWeightUnit][g];
  query.theta[g] = theta;
  // The same of all heads.
  float most = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) most = fmaxf(most, query.numbers[kDeviation][i]);
  query.largest_square = most * most;
  const float share = step.skip_share * (kSampleValues ? kSamplingFactor : 1.0f);
  query.sampling_share = share;
  query.skip_gain = share > 0 ? log2_fast(kHalfRange / (share * kOfPlane)) : infinity();
}

// And those of log Z, once it is known.
__device__ __forceinline__ void set_hint_constants(Query& query, int g) {
  const float log_z = query.numbers[kLogZ][g], hint = is_finite(log_z) ? log_z * kLog2e : 0.0f;
  query.constants[kHint][g] = hint;
  query.constants[kOffset][g] = kSoftcap ? query.numbers[kBase][g] : query.numbers[kBase][g] - hint;
}
