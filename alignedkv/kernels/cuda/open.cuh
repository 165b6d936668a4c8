// Opening a tile: first scores, and the plan that follows from them.

#include "worker.cuh"

__device__ __forceinline__ Tokens Worker::open(const Range& range, int first_token, int stage) {
  Tokens t;
  t.first_token = first_token;
  const int row = lane ^ dither_class(first_token) % kTile;  // a lane's class is the same in all tiles
  t.token = first_token + row;
  t.scales = mine.scales[stage][row];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int x[kHeadBlocks][2];
    key_products<4>(x, mine.key_first[stage] + half * 16 * kPlaneRowBytes[0], block.query, lane);
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
      mine.scores[half * 16 + r][4 * b + c] = static_cast<float>(x[b][0]);
      mine.scores[half * 16 + r + 8][4 * b + c] = static_cast<float>(x[b][1]);
    }
  }
  __syncwarp();
  const float key_scale = t.key_scale(), value_scale = t.value_scale();
  {
    float product[kGroup], of_class[kGroup], unit[kGroup], offset[kGroup];
    load_heads(product, mine.scores[row]);
    load_heads(of_class, block.query.classes[first_class(t) + lane]);
    load_heads(unit, block.query.numbers[kUnit16]);
    load_heads(offset, block.constants[kOffset]);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const float x = fmaf(key_scale, fmaf(unit[g], product[g], of_class[g]), offset[g]);
      if constexpr (kSoftcap) t.uncapped[g] = x;
      t.score[g] = capped(x, g);
    }
  }

  float excess = kNever, of_value = kNever;
  ReadingTest reading;
  {
    float margin[kGroup], size[kGroup], spread[kGroup], value_gain[kGroup];
    load_heads(margin, block.constants[kMargin]);
    load_heads(size, block.constants[kReachSize]);
    load_heads(spread, block.constants[kReachSpread]);
    load_heads(value_gain, block.constants[kValueGain]);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const float plausible = fminf(fmaf(margin[g], key_scale, t.score[g]), 0.0f);
      const float addend = key_scale * fmaf(size[g], value_scale, spread[g]);
      const float log_addend = log2_fast(addend);
      excess = fmaxf(excess, plausible + log_addend);
      if constexpr (kSettled) reading.add(t.score[g], margin[g] * key_scale, log_addend);
      of_value = fmaxf(of_value, plausible + value_gain[g]);
    }
    of_value += log2_fast(value_scale);
  }
  t.key = kSettled ? Plan::of_planes(reading.planes()) : Plan{excess};
  const float above = of_value + block.skip_gain;
  t.value = above > 0.0f ? Plan{of_value} : Plan::skip();
  t.chance = 1.0f;
  if constexpr (kSampleValues) {
    // sampling.py: a row below theta_s is drawn with its chance, a multiple of 2^-24.
    constexpr float kDraws = 1 << 24;
    const float allowed = fmaxf(ceilf(exp2_fast(fminf(above, 0.0f)) * kDraws), 1.0f);
    const u32 draw = mix((static_cast<u32>(t.token) * kSpread) ^ block.query.stream) >> 8;
    if (above < 0.0f) {
      t.chance = allowed * (1.0f / kDraws);
      t.value = static_cast<float>(draw) < allowed ? Plan::one_plane() : Plan::skip();
      largest_draw = fmaxf(largest_draw, kPlannedDraw);
    }
  }
  if (first_token < range.first || first_token + kTile > range.end) {
    if (!range.holds(t.token)) t.leave(), t.scales = 0;
  }
  // A row kept exact has its turn in add_exact_rows.
  if (kExactRows && range.is_exact(a.cache, t.token)) t.leave();
  return t;
}

__device__ __forceinline__ FinerLanes Worker::finer_lanes(const Tokens& t) const {
  FinerLanes lanes = {__ballot_sync(kAllLanes, t.key.reads(2)), 0, false};
  if constexpr (kStoredPlanes >= 3) {
    if (lanes.second) lanes.third = __ballot_sync(kAllLanes, t.key.reads(3));
  }
  lanes.share_rows = kThirdIsLikeSecond && __popc(lanes.second) + __popc(lanes.third) <= kTile;
  return lanes;
}

// Rows that the plan of a tile asks for, on their way.
__device__ __forceinline__ void Worker::fetch_finer(const Tokens& t, FinerKeys& to) {
  const FinerLanes lanes = finer_lanes(t);
  if (!lanes.second) return;
  if (t.key.reads(2)) {
    const u32 row = rows.of(t.token), at = shared_address(to.second);
    copy_row<1>(at, place_in(lanes.second), a.cache.key_planes[1], row);
    atomicAdd(block.reads + 1, 1u);
    if constexpr (kThirdIsLikeSecond) {
      if (lanes.share_rows && t.key.reads(3)) {
        copy_row<2>(at, __popc(lanes.second) + place_in(lanes.third), a.cache.key_planes[2], row);
        atomicAdd(block.reads + 2, 1u);
      }
    }
  }
  if constexpr (kStoredPlanes >= 3) {
    if (lanes.third && !lanes.share_rows) {
      fetch_rare<2>(t, place_in(lanes.second), place_in(lanes.third), to);
    }
  }
}

// Rows of a rare plane in places 0 to kRareRows - 1, counted from `place`.
template <int kPlane>
__device__ __forceinline__ void Worker::fetch_rare(
    const Tokens& t, int place_of_second, int place, FinerKeys& to) {
  if (!t.key.reads(kPlane + 1) || place < 0 || place >= kRareRows) return;
  copy_row<kPlane>(shared_address(to.rare), place, a.cache.key_planes[kPlane], rows.of(t.token));
  to.order[place] = place_of_second;
  atomicAdd(block.reads + kPlane, 1u);
}
