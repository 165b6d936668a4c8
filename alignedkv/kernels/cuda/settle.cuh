// Tokens whose scores are final: their weights, their part of all sums but the output, and their value
// rows' plan.

#include "worker.cuh"

// `scaled`: weights times value scales over chances.
__device__ __forceinline__ void Worker::settle(Tokens& t, float (&scaled)[kGroup]) {
  if constexpr (kSettled) t.value = plan_value(t);
  const float per_chance = kSampleValues ? reciprocal_fast(t.chance) : 1.0f;
  if constexpr (kSampleValues) {
    float value_gain[kGroup], most = kNever;
    load_heads(value_gain, block.constants[kValueGain]);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) most = fmaxf(most, t.score[g] + value_gain[g]);
    // Prefixes reach 8 row scales, sizes are 7.5.
    most += log2_fast(t.value_scale() * per_chance) + (block.skip_gain + 0.0931095f);
    if (t.chance < 1.0f) largest_draw = fmaxf(largest_draw, most);
  }
  if (shifted) {
    float reference[kGroup];
    load_heads(reference, block.reference[warp]);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) t.score[g] -= reference[g];
  }
  Token token;
  token.key_scale = t.key_scale(), token.value_scale = t.value_scale();
  token.key_step = t.key.step(), token.value_step = t.value.step();
  token.has_value = t.value.reads_any(), token.per_chance = per_chance;
  if constexpr (kSettled) token.settled = settled_token(t);
  const auto shared = sums.shared_of(token, block.largest_square);
  float first[kGroup], second[kGroup];  // coefficients of the bound's addends
  load_heads(first, block.constants[kError]);
  load_heads(second, block.constants[kErrorMore]);
  const float unit = t.value_scale() * per_chance;
  const auto add = [&](auto is_coarse) {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      constexpr bool kIsCoarse = decltype(is_coarse)::value;
      const float weight =
          sums.template add<kIsCoarse>(g, t.score[g], shared, first[g], second[g]);
      total[g] += weight;
      scaled[g] = weight * unit;
    }
  };
  if (shared.is_coarse) {
    add(Index<1>());
  } else {
    add(Index<0>());
  }
  add_to_classes(t, scaled);
}

// Value planes from the scores as they are now; a row that is skipped or left to chance remains so.
__device__ __forceinline__ Plan Worker::plan_value(const Tokens& t) const {
  float margin[kGroup], value_gain[kGroup];
  load_heads(margin, block.constants[kMargin]);
  load_heads(value_gain, block.constants[kValueGain]);
  float excess = kNever;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    const float of_planes = kSettled ? step_of(t.settled.planes_of(g)) : t.key.step();
    const float step = t.key_scale() * of_planes;
    excess = fmaxf(excess, fminf(fmaf(margin[g], step, t.score[g]), 0.0f) + value_gain[g]);
  }
  excess += log2_fast(t.value_scale());
  const bool is_settled = !t.value.reads_any() || (kSampleValues && t.chance < 1.0f);
  return is_settled ? t.value : Plan{excess};
}

// Weights times value scales, by dither class: B of theory.md (2.3).  Weights as they are, not as
// `add_values` rounds them: what rounding loses is then lost of a prefix without its dither.  The
// tokens of a tile are of different classes.
__device__ __forceinline__ void Worker::add_to_classes(
    const Tokens& t, const float (&scaled)[kGroup]) {
  if (t.value.reads_any()) {
    float* of_class = block.classes[warp][own_class(class_of(t))];
    float sum[kGroup];
    load_heads(sum, of_class);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) sum[g] += scaled[g];
    store_heads(of_class, sum);
  }
  __syncwarp();
}

// Wanted value rows of a tile: to the queue, where there is room.  A lane copies its own row.
__device__ __forceinline__ void Worker::push_values(
    const Tokens& t, const float (&scaled)[kGroup], u32 wanted) {
  ValueQueue& queue = mine.values;
  if (t.value.reads_any()) {
    const int slot = queued_values + place_in(wanted);
    const u32 row = rows.of(token_of(t));
    store_heads(queue.weight[slot], scaled);
    queue.token[slot] = token_of(t);
    queue.plan[slot] = t.value;
    copy_row<0>(shared_address(queue.first), slot, a.cache.value_planes[0], row);
    atomicAdd(block.reads + kStoredPlanes, 1u);
    if (t.value.reads(2)) {
      copy_row<1>(shared_address(queue.second), slot, a.cache.value_planes[1], row);
      atomicAdd(block.reads + kStoredPlanes + 1, 1u);
    }
  }
  queued_values += __popc(wanted);
  __syncwarp();
}
