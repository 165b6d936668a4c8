// Tokens whose scores are final: their weights, their part of all sums but the output, and their value
// rows' plan.

#include "worker.cuh"

// Returns the planes of the value row, and weights times value scales over chances.
__device__ __forceinline__ int Worker::settle(Tokens& t, float (&scaled)[kGroup]) {
  const int value_planes = plan_value(t);
  const float per_chance = kSampleValues ? reciprocal_fast(t.chance) : 1.0f;
  count_reads(t.key_planes, value_planes);
  if constexpr (kSampleValues) {
    float wish[kGroup], most = kNever;
    load_heads(wish, block.constants[kWanted]);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) most = fmaxf(most, t.score[g] + wish[g]);
    // Prefixes reach 8 row scales, sizes are 7.5.
    most += log2_fast(t.value_scale() * per_chance) + 0.0931095f;
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
  token.key_step = step_of(t.key_planes), token.value_step = step_of(value_planes);
  token.has_value = t.wants_value, token.per_chance = per_chance;
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
  return value_planes;
}

// Value planes from the scores as they are now; 0 if the row is not wanted.
__device__ __forceinline__ int Worker::plan_value(const Tokens& t) const {
  float margin[kGroup], wish[kGroup];
  load_heads(margin, block.constants[kMargin]);
  load_heads(wish, block.constants[kValueGain]);
  float excess = kNever;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    const int planes = kSettled ? t.settled.planes_of(g) : t.key_planes;
    const float step = t.key_scale() * step_of(planes);
    excess = fmaxf(excess, fminf(fmaf(margin[g], step, t.score[g]), 0.0f) + wish[g]);
  }
  excess += log2_fast(t.value_scale());
  if (!t.wants_value) return 0;
  return kSampleValues && t.chance < 1.0f ? 1 : planes_for(excess);
}

// Weights times value scales, by dither class: B of theory.md (2.3).  Weights as they are, not as
// `add_values` rounds them: what rounding loses is then lost of a prefix without its dither.  The
// tokens of a tile are of different classes.
__device__ __forceinline__ void Worker::add_to_classes(
    const Tokens& t, const float (&scaled)[kGroup]) {
  if (t.wants_value) {
    float* of_class = block.classes[warp][own_class(dither_class(t.token))];
    float sum[kGroup];
    load_heads(sum, of_class);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) sum[g] += scaled[g];
    store_heads(of_class, sum);
  }
  __syncwarp();
}

// Wanted value rows of a tile: to the queue, where there is room.
__device__ __forceinline__ void Worker::push_values(
    const Tokens& t, const float (&scaled)[kGroup], u32 wanted, int value_planes) {
  ValueQueue& queue = mine.values;
  const u32 second = __ballot_sync(kAllLanes, value_planes >= 2), before = (1u << lane) - 1;
  if (is_dense(wanted)) {
    // A queue of its own, rows in their places.
    float weight[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) weight[g] = t.wants_value ? scaled[g] : 0.0f;
    store_heads(queue.weight[lane], weight);
    queue.token[lane] = t.token;
    queue.planes[lane] = value_planes;
    const int first_token = t.token - lane;
    const TileRows at = TileRows::of(a.cache, sequence, head, first_token);
    copy_rows<Side::Value, 0>(
        shared_address(queue.first), a.cache.value_planes[0], at, wanted, lane);
    if (second) {
      copy_rows<Side::Value, 1>(
          shared_address(queue.second), a.cache.value_planes[1], at, second, lane);
    }
    queued_values = kTile;
    return;
  }
  const int count = __popc(wanted);
  if (t.wants_value) {
    const int place = __popc(wanted & before), slot = queued_values + place;
    const u64 entry = listed(row_index(a.cache, sequence, head, t.token), slot);
    store_heads(queue.weight[slot], scaled);
    queue.token[slot] = t.token;
    queue.planes[slot] = value_planes;
    mine.rows[0][place] = entry;
    if (value_planes >= 2) mine.rows[1][__popc(second & before)] = entry;
  }
  __syncwarp();
  copy_listed<Side::Value, 0>(
      shared_address(queue.first), a.cache.value_planes[0], mine.rows[0], count, lane);
  if (second) {
    copy_listed<Side::Value, 1>(shared_address(queue.second), a.cache.value_planes[1],
                                mine.rows[1], __popc(second), lane);
  }
  queued_values += count;
  __syncwarp();
}

// Rows read of each plane, for the report.
__device__ __forceinline__ void Worker::count_reads(int key_planes, int value_planes) {
  Reads& reads = block.lane_reads[warp][lane];
  const u32 keys = reads.keys + 0x01000000u + (0x00010101u >> (32 - 8 * key_planes));
  const u32 values = reads.values + (value_planes ? 0x01010101u >> (32 - 8 * value_planes) : 0);
  reads.keys = keys, reads.values = values;
  if (keys >= 0xff000000u) leave_reads();
}

// Counts of the lanes to the block's, before a byte overflows.
__device__ __forceinline__ void Worker::leave_reads() {
  Reads& reads = block.lane_reads[warp][lane];
#pragma unroll
  for (int plane = 0; plane < kStoredPlanes; ++plane) {
    const u32 keys = plane == 0 ? 0 : reads.keys >> (8 * (plane - 1)) & 0xff;
    const u32 of_keys = __reduce_add_sync(kAllLanes, keys);
    const u32 of_values = __reduce_add_sync(kAllLanes, reads.values >> (8 * plane) & 0xff);
    if (lane == 0) {
      atomicAdd(block.reads + plane, of_keys);
      atomicAdd(block.reads + kStoredPlanes + plane, of_values);
    }
  }
  reads = {0, 0};
}
