// Opening a tile: first scores, and the plan that follows from them.

#include "worker.cuh"

__device__ __forceinline__ Tokens Worker::open(const Range& range, int first_token, int stage) {
  Tokens t;
  t.token = first_token + lane;
  t.scales = mine.scales[stage][lane];
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
  const bool valid = range.holds(t.token);
  {
    float product[kGroup], of_class[kGroup], unit[kGroup], offset[kGroup];
    load_heads(product, mine.scores[lane]);
    load_heads(of_class, block.query.classes[dither_class(t.token)]);
    load_heads(unit, block.query.numbers[kUnit16]);
    load_heads(offset, block.constants[kOffset]);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const float x = fmaf(key_scale, fmaf(unit[g], product[g], of_class[g]), offset[g]);
      if constexpr (kSoftcap) t.uncapped[g] = x;
      t.score[g] = valid ? capped(x, g) : kNever;
    }
  }

  float excess = kNever, above = kNever;
  ReadingTest reading;
  {
    float margin[kGroup], size[kGroup], spread[kGroup], wish[kGroup];
    load_heads(margin, block.constants[kMargin]);
    load_heads(size, block.constants[kReachSize]);
    load_heads(spread, block.constants[kReachSpread]);
    load_heads(wish, block.constants[kWanted]);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const float plausible = fminf(fmaf(margin[g], key_scale, t.score[g]), 0.0f);
      const float addend = key_scale * fmaf(size[g], value_scale, spread[g]);
      const float log_addend = log2_fast(addend);
      excess = fmaxf(excess, plausible + log_addend);
      if constexpr (kSettled) reading.add(t.score[g], margin[g] * key_scale, log_addend);
      above = fmaxf(above, plausible + wish[g]);
    }
    above += log2_fast(value_scale);
  }
  t.key_planes = kSettled ? reading.planes(valid) : planes_for(valid ? excess : kNever);
  t.wants_value = valid && above > 0.0f;
  t.chance = 1.0f;
  if constexpr (kSampleValues) {
    // sampling.py: a row below theta_s is drawn with its chance, a multiple of 2^-24.
    constexpr float kDraws = 1 << 24;
    const float allowed = fmaxf(ceilf(exp2_fast(fminf(above, 0.0f)) * kDraws), 1.0f);
    const u32 draw = mix((static_cast<u32>(t.token) * kSpread) ^ block.query.stream) >> 8;
    const bool drawn = static_cast<float>(draw) < allowed;
    if (above < 0.0f) t.chance = allowed * (1.0f / kDraws);
    t.wants_value = valid && (above >= 0.0f || drawn);
  }
  if (kExactRows && valid && range.is_exact(a.cache, t.token)) {
    // Its turn comes in add_exact_rows.
    t.leave();
    t.chance = 1.0f;
  }
  return t;
}

// Rows that the plan of a tile asks for, on their way.
__device__ __forceinline__ void Worker::fetch_finer(const Tokens& t, int first_token, FinerKeys& to) {
  const u32 second_rows = __ballot_sync(kAllLanes, t.key_planes >= 2);
  if (!second_rows) return;
  const TileRows at = TileRows::of(a.cache, sequence, head, first_token);
  copy_rows<Side::Key, 1>(
      shared_address(to.second), a.cache.key_planes[1], at, second_rows, lane);
  if constexpr (kStoredPlanes >= 3) {
    const u32 third_rows = __ballot_sync(kAllLanes, t.key_planes >= 3);
    if (!third_rows) return;
    const int place = __popc(third_rows & ((1u << lane) - 1));
    if (t.key_planes >= 3) to.order[place] = lane;
    __syncwarp();
    copy_rare_rows<2>(shared_address(to.rare), a.cache.key_planes[2], at, to.order,
                      min(__popc(third_rows), kRareRows), third_rows, lane);
  }
}
