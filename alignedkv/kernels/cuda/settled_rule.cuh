// The settled rule (theory.md 5.3): each head keeps or drops a score that was refined for the group,
// and knows at how many planes it may have stopped.

#include "worker.cuh"

// log2 of the error of head g's addend after one plane, per weight and in units of theta.
__device__ __forceinline__ float log_reach(
    const float (*constants)[kHeads], int g, float key_scale, float value_scale) {
  const float size = constants[kReachSize][g], spread = constants[kReachSpread][g];
  return log2_fast(key_scale * fmaf(size, value_scale, spread));
}

// ---- the rule -------------------------------------------------------------------------------------

// The reading test of (5.4), for the group, made for all planes at once from first scores.
struct ReadingTest {
  float excess[kStoredPlanes];  // of plane n + 1 at n

  __device__ __forceinline__ ReadingTest() {
#pragma unroll
    for (float& each : excess) each = kNever;
  }
  // `spread`: z sigma(1).
  __device__ __forceinline__ void add(float score, float spread, float log_addend) {
    unrolled<1, kStoredPlanes>([&](auto planes) {
      constexpr int kPlanes = decltype(planes)::value;
      constexpr float kSpreads = 1.0f + 2.0f / (1 << gain(kPlanes + 1));
      excess[kPlanes] = fmaxf(excess[kPlanes], fmaf(kSpreads, spread, score) + log_addend);
    });
  }
  __device__ __forceinline__ int planes() const {
    int count = 1;
#pragma unroll
    for (int n = 1; n < kStoredPlanes; ++n) count += excess[n] > gain(n);
    return count;
  }
};

// Before anything is refined.
__device__ __forceinline__ void Worker::start_settling(Tokens& t) const {
  t.settled.used = 0;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) t.settled.finest[g] = t.score[g];
}

// With kPlanes planes: the finer scores of this lane's token, which has them if `is_finer`, and the
// test of (5.4) for each head.  Row `place` of `mine.scores` holds what the last of these planes adds.
template <int kPlanes>
__device__ __forceinline__ void Worker::keep_or_drop(Tokens& t, int place, bool is_finer) {
  if (!is_finer) return;
  constexpr float kStep = 1.0f / (1 << gain(kPlanes)), kCoarser = 1.0f / (1 << gain(kPlanes - 1));
  const float key_scale = t.key_scale(), value_scale = t.value_scale();
  const float(&numbers)[kNumbers][kHeads] = block.query.numbers;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    float& products = mine.scores[place][g];
    const float middle = numbers[kHalf][g] * (0.5f * (kStep - kCoarser));
    const float finer =
        fmaf(key_scale, fmaf(numbers[kUnit16][g], products, middle), t.settled.finest[g]);
    products = 0;
    t.settled.finest[g] = finer;
    const float likely = fmaf(block.constants[kMargin][g], key_scale * kStep, finer);
    if (likely + log_reach(block.constants, g, key_scale, value_scale) > gain(kPlanes - 1)) {
      t.score[g] = finer;
      t.settled.used = (t.settled.used & ~(3u << 2 * g)) | (kPlanes - 1u) << 2 * g;
    }
  }
}

// What the sums want to know of a token whose score is final.
__device__ __forceinline__ SettledToken Worker::settled_token(const Tokens& t) const {
  SettledToken token = t.settled;
  token.errs = t.score[0] != kNever;
  token.of_class = own_class(first_class(t)) + lane;
  return token;
}

// ---- sums -----------------------------------------------------------------------------------------

__device__ __forceinline__ SettledSums::Shared SettledSums::shared_of(
    const Token& token, float) const {
  Shared s = {};
  s.token = token.settled, s.read_step = token.key_step;
  float(&largest)[2][32] = memory->largest_scales;
  const int lane = lane_of_thread();
  largest[1][lane] = fmaxf(largest[1][lane], token.value_scale);
  if (!token.settled.errs) return s;
  largest[0][lane] = fmaxf(largest[0][lane], token.key_scale);
  s.key_scale = token.key_scale, s.value_scale = token.value_scale;
  s.size = kHalfRange * token.value_scale;
  const bool counts_as_read = kSampleValues || token.has_value;
  if (counts_as_read) s.value_error = 0.5f * token.value_scale * token.value_step;
  s.certain_value = token.has_value ? read_error(token) : s.size;
  // (5.5): the mean of an error and the rounding of a stored value, in units; skipped rows in full.
  constexpr float kUnits = 0.5f / (1 << kDitherFractionBits) + 0.01f;
  s.outright = token.value_scale * (kUnits / (1 << kScaleShift));
  if (!counts_as_read) s.outright += s.size;
  if constexpr (kSampleValues) {
    const float most = kLargestPrefix * token.value_scale;
    s.drawn = most * most * less_one(token.per_chance);
  }
  return s;
}

template <bool>
__device__ __forceinline__ float SettledSums::add(
    int g, float score, const Shared& s, float, float) {
  const float weight = exp2_fast(score), step = step_of(s.token.planes_of(g));
  const float shift = fmaf(numbers[kShift][g], s.key_scale, kWeightRounding);
  if constexpr (!kSampleValues) {
    const float e = fmaf(numbers[kWorst][g] * s.key_scale, step, shift);
    const float grown = weight * expm1_above(e);
    add_to(0, g, grown);
    add_to(1, g, grown * s.size);
    add_to(2, g, weight * s.certain_value);
    add_to(3, g, weight * exp2_fast(-kLog2e * e));
  } else {
    add_to(kDrawn, g, weight * weight * s.drawn);
  }
  add_to(kOutright, g, weight * s.outright);

  // Every plane that was read, used or not, tells how large the exact weight may be.
  const float first_spread = constants[kMargin][g] * s.key_scale;  // z sigma(1), log2
  const float spread = first_spread * s.read_step;
  const float centre = s.token.finest[g] - reference[g];
  const float largest = exp2_fast(centre + spread);
  add_to(kLikely, g, exp2_fast(centre - spread));
  const float shifted = largest * expm1_above(shift);
  add_to(kShifted, g, shifted);
  add_to(kShiftedSize, g, shifted * s.size);

  const float sigma = numbers[kDeviation][g] * s.key_scale, linear = largest * sigma * step;
  const float reach = log_reach(constants, g, s.key_scale, s.value_scale);
  // A computed score errs by the shift, too.
  const float count = stops(g, s.token, first_spread, fmaf(kLog2e, shift, spread), reach);
  const float square = largest * sigma * sigma * count;
  const int of = s.token.of_class;  // of no other token of the tile
  memory->classes[kLinear - 1][g][of] += linear;
  memory->classes[kLinearSize - 1][g][of] += linear * s.size;
  memory->classes[kSquare - 1][g][of] += square;
  memory->classes[kSquareSize - 1][g][of] += square * s.size;
  memory->classes[kValueError - 1][g][of] += weight * s.value_error;
  return weight;
}

// gamma sigma^2 in units of sigma(1)^2, once for every plane count at which head g may stop: the exact
// score lies within `spread` of the finest one, and each test of (5.4) within its margin of that.
__device__ __forceinline__ float SettledSums::stops(
    int g, const SettledToken& token, float first_spread, float spread, float reach) const {
  constexpr float kNats = 1.0f / kLog2e;
  const float highest = token.finest[g] + spread + reach;
  const float lowest = token.finest[g] - spread + reach;
  float total = 0;
  unrolled<1, kStoredPlanes + 1>([&](auto planes) {
    constexpr int kPlanes = decltype(planes)::value;
    constexpr float kStep = 1.0f / (1 << gain(kPlanes));
    bool may = true;  // NaN leaves nothing out
    if constexpr (kPlanes > 1) {
      may &= !(fmaf(2 * kStep, first_spread, highest) <= gain(kPlanes - 1));
    }
    if constexpr (kPlanes < kStoredPlanes) may &= !(lowest > gain(kPlanes));
    if (may || token.planes_of(g) == kPlanes) {
      total = fmaf(kStep * kStep, curvature(kNats * kStep * first_spread), total);
    }
  });
  return total;
}

// ---- a warp's memory ------------------------------------------------------------------------------

template <class SumsOfBound>
__device__ __forceinline__ void Worker::start_sums(SumsOfBound& sums) {
  SettledSums::Memory& memory = block.warps.settled(warp);
  for (float* x = &memory.lanes[0][0][lane]; x <= &memory.largest_scales[1][lane]; x += 32) *x = 0;
  sums = {&memory, block.query.numbers, block.constants, block.reference[warp]};
  __syncwarp();
}

__device__ __forceinline__ void Worker::leave_extremes() {
  const SettledSums::Memory& memory = block.warps.settled(warp);
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const float most = warp_max(memory.largest_scales[side][lane]);
    if (lane == 0) block.extremes[warp][kKeyScale + side] = most;
  }
}
