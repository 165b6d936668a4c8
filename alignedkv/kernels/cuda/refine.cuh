// Closing a tile, first half: finer scores, the value rows' plan, the count of what was read.

#include "worker.cuh"

// Weights are relative to the hint exp(L). Where the hint is off so far that they would leave the
// floats, the warp counts from the largest score of its first tile instead.
__device__ __forceinline__ void Worker::settle_reference(bool trusted) {
  constexpr float kHighest = 20.0f, kLowest = -100.0f;  // log2
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    const float largest = warp_max(score[g]);
    const bool is_high = largest > kHighest;
    const bool is_low = !trusted && largest < kLowest && largest > 0.5f * kNever;
    const float reference = is_high || is_low ? largest : 0.0f;
    shifted |= is_high || is_low;
    if (lane == 0) block.reference[warp][g] = reference;
  }
  __syncwarp();
}

// Scores from all key planes that were read.
__device__ __forceinline__ void Worker::refine() {
  if (!second_rows) return;
  constexpr int kWidth = kWidths[1];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int x[kHeadBlocks][2];
    key_products<kWidth>(x, mine.key_second + half * 16 * kPlaneRowBytes[1], block.query, lane);
    // In the unit of the first plane's products: kUnit16.
    constexpr float kScale = 1.0f / (1 << gain(2));
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
      mine.scores[half * 16 + r][4 * b + c] = kScale * static_cast<float>(x[b][0]);
      mine.scores[half * 16 + r + 8][4 * b + c] = kScale * static_cast<float>(x[b][1]);
    }
  }
  __syncwarp();
  if constexpr (kStoredPlanes >= 3) {
    if (third_rows) add_rare_planes();
  }
  if (key_planes >= 2) {
    float finer[kGroup], unit[kGroup], half[kGroup];
    load_heads(finer, mine.scores[lane]);
    load_heads(unit, block.query.numbers[kUnit16]);
    load_heads(half, block.query.numbers[kHalf]);
    const float key_scale = this->key_scale();
    const float middle = 0.5f * step_of(key_planes) - 0.5f;  // of the digits read, less the first's
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const float added = key_scale * fmaf(half[g], middle, unit[g] * finer[g]);
      if constexpr (kSoftcap) {
        uncapped[g] += added;
        if (score[g] > 0.5f * kNever) score[g] = capped(uncapped[g], g);
      } else {
        score[g] += added;
      }
    }
  }
  __syncwarp();
}

// Third and later planes, 16 rows at a time; the first round's third plane is there already.
__device__ __forceinline__ void Worker::add_rare_planes() {
  const int count = __popc(third_rows);
  for (int first = 0; first < count; first += kRareRows) {
    const int rows_here = min(count - first, kRareRows);
    const u8* order = mine.order + first;
    unrolled<2, kStoredPlanes>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value, kWidth = kWidths[kPlane];
      u32 having = third_rows;
      if constexpr (kPlane == 3) having = __ballot_sync(kAllLanes, key_planes >= 4);
      if (!having) return;
      if (kPlane > 2 || first > 0) {
        copy_rare_rows<kPlane>(shared_address(mine.key_rare), a.cache.key_planes[kPlane], rows_of_tile(),
                               order, rows_here, having, lane);
        commit_copies();
        await_copies<0>();
        __syncwarp();
      }
      int x[kHeadBlocks][2];
      key_products<kWidth>(x, mine.key_rare, block.query, lane);
      constexpr float kScale =
          16.0f * kDigitsPerProduct<kWidth> / static_cast<float>(1 << gain(kPlane + 1));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (r + 8 * i >= rows_here) continue;
        float* scores = mine.scores[order[r + 8 * i]];
#pragma unroll
        for (int b = 0; b < kHeadBlocks; ++b) scores[4 * b + c] += kScale * static_cast<float>(x[b][i]);
      }
      __syncwarp();
    });
  }
}

// Planes of the value rows, from the scores as they are now; fetch the second.
__device__ __forceinline__ void Worker::plan_values() {
  float margin[kGroup], wish[kGroup];
  load_heads(margin, block.constants[kMargin]);
  load_heads(wish, block.constants[kValueGain]);
  const float step = key_scale() * step_of(key_planes);
  float excess = kNever;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    excess = fmaxf(excess, fminf(fmaf(margin[g], step, score[g]), 0.0f) + wish[g]);
  }
  excess += log2_fast(value_scale());
  value_planes = is_wanted() ? planes_for(excess) : 0;
  if (kSampleValues && chance < 1.0f) value_planes = is_wanted() ? 1 : 0;

  value_rows[0] = wanted_rows;
  value_rows[1] = __ballot_sync(kAllLanes, value_planes >= 2);
  if (value_rows[1]) {
    copy_rows<Side::Value, 1, Absent::Zeroed>(
        shared_address(mine.value_second), a.cache.value_planes[1], rows_of_tile(), value_rows[1], lane);
  }
#pragma unroll
  for (int n = 3; n <= kStoredPlanes; ++n) {
    value_rows[n - 1] = value_rows[1] ? __ballot_sync(kAllLanes, value_planes >= n) : 0;
  }
  commit_copies();
  count_reads();
}

// Rows read of each plane, for the report.
__device__ __forceinline__ void Worker::count_reads() {
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
