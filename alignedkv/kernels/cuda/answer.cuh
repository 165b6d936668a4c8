// A head's answer, once the sums of its blocks are one: output, bound, and what the next step is told.

#include "merge.cuh"

// The next step's theta (policy.py, feedback_theta).
__device__ __forceinline__ float feedback(float theta, float bound, float tau, float margin) {
  const float bits = log2_fast(tau / fmaxf(bound, 0x1p-126f)) - margin;
  const float next = theta * fminf(fmaxf(exp2_fast(kFeedbackGain * bits), 0.25f), 4.0f);
  return fminf(fmaxf(next, kLeastTheta * tau), kMostTheta * tau);
}

// And its margin (policy.py, feedback_margin).
__device__ __forceinline__ float feedback_margin(float margin, bool missed) {
  const float known = margin == margin ? margin : kStartMargin;
  return fminf(fmaxf(known + (missed ? kMarginRise : -kMarginFall), kLeastMargin), kMostMargin);
}

// What an answer needs that was known before: fetched while the sums are on their way.
struct Before {
  float spread, margin, rest, sink_logit;
  float mean[(kHeadDim + 31) / 32];

  __device__ __forceinline__ void fetch(const DecodeArguments& a, i64 of_head, int g) {
    const i64 query_head = of_head * kGroup + g;
    spread = a.state.spread[query_head], margin = a.state.margin[query_head];
    rest = a.state.rest[query_head];
    sink_logit = -infinity();
    if constexpr (kSinks) sink_logit = a.sinks[query_head % (a.cache.kv_heads * kWholeGroup)];
    const float* means = a.cache.value_mean + of_head / kSubgroups * kHeadDim;
#pragma unroll
    for (int i = 0; i < (kHeadDim + 31) / 32; ++i) {
      const int channel = 32 * i + lane_of_thread();
      mean[i] = channel < kHeadDim ? means[channel] : 0.0f;
    }
  }
};

// One warp: output, bound and state of query head g of the group.  Returns whether its bound missed.
__device__ __forceinline__ bool answer(
    const DecodeArguments& a, const DecodeShared& shared, const Merge& merge, const Before& before,
    i64 of_head, int g) {
  const int lane = thread_index() % 32;
  const i64 query_head = of_head * kGroup + g;
  const Partial& whole = merge.whole;
  // Without tokens the output is 0, certainly, and all of log Z is the sink's.
  const bool empty = whole.reference[g] == kNever && shared.query.length >= 0;
  const float hint = shared.constants[kHint][g], top = empty ? 0.0f : whole.reference[g];
  const float logit = before.sink_logit;
  float sink = 0;
  if constexpr (kSinks) {
    sink = empty ? 0.0f : exp2_fast(fmaf(logit, kLog2e, -hint - top));
  }
  const float total = whole.sums[kTotal][g] + sink;
  const float inverse = empty ? 0.0f : 1.0f / total;
  float classes = 0;
  for (int s = lane; s < kDitherRows; s += 32) classes += whole.classes[s][g];
  classes = warp_sum(classes);
  const float constant = whole.sums[kOffsets][g];
  float size = 0, spread = 0, largest_mean = 0;
  bool is_nan = false;
#pragma unroll
  for (int i = 0; i < (kHeadDim + 31) / 32; ++i) {
    const int channel = 32 * i + lane;
    if (channel >= kHeadDim) break;
    float correction = 0;
#pragma unroll
    for (int share = 0; share < kShares; ++share) correction += merge.correction[share][g][channel];
    constexpr float kUnitOfDither = 1.0f / (1 << (kScaleShift + kDitherFractionBits));
    const float centred =
        (fmaf(-kUnitOfDither, correction, whole.output[g][channel]) + constant) * inverse;
    const float mean = before.mean[i];
    const float rest = empty ? -mean : fmaf(-sink * inverse, mean, centred);
    float output = mean + rest;
    if (shared.query.length < 0) output = __int_as_float(0x7fc00000);
    is_nan |= !(fabsf(output) < __int_as_float(0x7f800000));
    size = fmaxf(size, fabsf(output)), spread = fmaxf(spread, fabsf(rest));
    largest_mean = fmaxf(largest_mean, fabsf(mean));
    a.result.output[query_head * kHeadDim + channel] = from_float<kQueryDtype>(output);
  }
  size = warp_max(size), spread = warp_max(spread), largest_mean = warp_max(largest_mean);
  is_nan = __any_sync(kAllLanes, is_nan);

  HeadTotals head;
#pragma unroll
  for (int i = 0; i < Sums::kCount; ++i) {
    const float scale = is_square(kFirstBound + i) ? inverse * inverse : inverse;
    head.sums[i] = whole.sums[kFirstBound + i][g] * scale;
  }
  head.classes = classes * inverse;
  head.sink = sink * inverse;
  head.spread_hint = before.spread, head.spread = spread;
  head.size = size + largest_mean;
  const float draw = whole.extremes[kDraw][g];
  head.largest_draw = shared.theta[g] * shared.sampling_share *
                      fmaxf(exp2_fast(draw - top) * inverse, draw < 0 ? 0.0f : exp2_fast(kPlannedDraw));
  float bound;
  if constexpr (kSettled) {
    bound = statistical_bound(a.step, shared.query, head, whole, g, inverse, largest_mean);
  } else {
    bound = bound_of(head, a.step.deviations);
  }
  if (empty) bound = 0.0f;
  if (!(bound >= 0) || is_nan) bound = __int_as_float(0x7f800000);
  const bool missed = !(bound <= a.step.tolerance * (size - bound));
  if (lane != 0) return missed;

  a.result.bound[query_head] = bound;
  a.result.size[query_head] = is_nan ? __int_as_float(0x7fc00000) : size;
  a.result.missed[query_head] = missed;
  // A denominator outside the floats says only that the hint was wrong: NaN, no hint (decode.cu).
  const bool known = total > 0 && total < __int_as_float(0x7f800000);
  const float ln2 = 0.693147181f;
  const float log_z = empty   ? logit
                      : known ? fmaf(ln2, hint + top, logf(total))
                              : __int_as_float(0x7fc00000);
  a.state.log_z[query_head] = log_z;
  if (kUsesNearRows && a.pass == 0 && !empty) {
    const float(&numbers)[kNumbers][kHeads] = shared.query.numbers;
    a.state.rest[query_head] =
        remembered(before.rest, log_z, numbers[kNear][g], numbers[kExplained][g]);
  }
  if (!is_nan) a.state.spread[query_head] = spread;
  const float tau = a.step.tolerance * size, theta = shared.theta[g];
  if (a.pass == 0 && tau > 0 && !is_nan) {
    const float margin = feedback_margin(before.margin, missed);
    a.state.margin[query_head] = margin;
    a.state.theta[query_head] = feedback(theta, bound, tau, margin);
  }
  const float finer = fminf(0.5f, 0.5f * tau / bound);
  a.workspace.retry_theta[query_head] = missed ? theta * (finer >= 0 ? finer : 0.0f) : theta;
  return missed;
}
