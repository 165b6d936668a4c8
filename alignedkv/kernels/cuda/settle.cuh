// Tokens whose scores are final: their weights, their part of all sums but the output, and their value
// rows' plan.

#include "worker.cuh"

// `scaled`: weights times value scales over chances, of value rows that are read.
__device__ __forceinline__ void Worker::settle(Tokens& t, float (&scaled)[kGroup]) {
  if constexpr (kSettled) t.value = plan_value(t, true);
  const float per_chance = kSampleValues ? reciprocal_fast(t.chance) : 1.0f;
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
      scaled[g] = t.value.reads_any() ? weight * unit : 0.0f;
    }
  };
  if (shared.is_coarse) {
    add(Index<1>());
  } else {
    add(Index<0>());
  }
  add_to_classes(t, scaled);
}

// Value planes from the scores as they are now, if these are finer than those that they were planned from;
// a row that is skipped or left to chance remains so.
__device__ __forceinline__ Plan Worker::plan_value(const Tokens& t, bool is_finer) {
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
  const bool is_drawn = kSampleValues && t.chance < 1.0f;
  if constexpr (kSampleValues) {
    // Its chance is from another score.
    const float draw = excess + (block.skip_gain + kPlannedDraw) - log2_fast(t.chance);
    largest_draw = fmaxf(largest_draw, is_drawn && is_finer ? draw : kNever);
  }
  return is_drawn || !is_finer || !t.value.reads_any() ? t.value : Plan{excess};
}

// Weights as they are, not as `add_values` rounds them: what rounding loses is then lost of a prefix
// without its dither.
__device__ __forceinline__ void Worker::add_to_classes(
    const Tokens& t, const float (&scaled)[kGroup]) {
  if constexpr (kOwnClasses > kTile) {
    const int place = own_class(first_class(t));
    if (place != class_place) leave_classes(), class_place = place;
  }
#pragma unroll
  for (int g = 0; g < kGroup; ++g) of_class[g] += scaled[g];
}

// Class sums to the warp's memory.
__device__ __forceinline__ void Worker::leave_classes() {
  float* to = block.classes[warp][class_place + lane];
  float sum[kGroup];
  load_heads(sum, to);
#pragma unroll
  for (int g = 0; g < kGroup; ++g) sum[g] += of_class[g], of_class[g] = 0.0f;
  store_heads(to, sum);
}

// Wanted value rows of a tile: to the queue, where there is room.  A lane copies its own row.
__device__ __forceinline__ void Worker::push_values(
    const Tokens& t, const float (&scaled)[kGroup], u32 wanted) {
  ValueQueue& queue = mine.values;
  if (t.value.reads_any()) {
    const int slot = queued_values + place_in(wanted);
    const u32 row = rows.of(t.token);
    store_heads(queue.weight[slot], scaled);
    queue.row[slot] = {t.token, t.value};
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
