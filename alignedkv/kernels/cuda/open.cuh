// Opening a tile: first scores, the plan that follows from them, and the loads that it asks for.

#include "worker.cuh"

__device__ __forceinline__ void Worker::open(
    const Range& range, int token, const TileRows& at, int stage, int buffer, bool values_fetched) {
  paged_rows = at, token_of_tile = token;
  scales = mine.scales[stage][lane];
  const float key_scale = this->key_scale(), value_scale = this->value_scale();
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
  const int token_class = dither_class(token + lane);
  const bool valid = range.holds(token + lane);
  {
    float product[kGroup], of_class[kGroup], unit[kGroup], offset[kGroup];
    load_heads(product, mine.scores[lane]);
    load_heads(of_class, block.query.classes[token_class]);
    load_heads(unit, block.query.numbers[kUnit16]);
    load_heads(offset, block.constants[kOffset]);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const float x = fmaf(key_scale, fmaf(unit[g], product[g], of_class[g]), offset[g]);
      if constexpr (kSoftcap) uncapped[g] = x;
      score[g] = valid ? capped(x, g) : kNever;
    }
  }

  float excess = kNever, above = kNever;
  {
    float margin[kGroup], size[kGroup], spread[kGroup], wish[kGroup];
    load_heads(margin, block.constants[kMargin]);
    load_heads(size, block.constants[kReachSize]);
    load_heads(spread, block.constants[kReachSpread]);
    load_heads(wish, block.constants[kWanted]);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const float plausible = fminf(fmaf(margin[g], key_scale, score[g]), 0.0f);
      const float addend = key_scale * fmaf(size[g], value_scale, spread[g]);
      excess = fmaxf(excess, plausible + log2_fast(addend));
      above = fmaxf(above, plausible + wish[g]);
    }
    above += log2_fast(value_scale);
  }
  key_planes = planes_for(valid ? excess : kNever);
  bool wanted = valid && above > 0.0f;
  chance = 1.0f;
  if constexpr (kSampleValues) {
    // sampling.py: a row below theta_s is drawn with its chance, a multiple of 2^-24.
    constexpr float kDraws = 1 << 24;
    const float allowed = fmaxf(ceilf(exp2_fast(fminf(above, 0.0f)) * kDraws), 1.0f);
    const u32 draw = mix((static_cast<u32>(token + lane) * kSpread) ^ block.query.stream) >> 8;
    const bool drawn = static_cast<float>(draw) < allowed;
    if (above < 0.0f) chance = allowed * (1.0f / kDraws);
    wanted = valid && (above >= 0.0f || drawn);
  }
  if (kExactRows && valid && range.is_exact(a.cache, token + lane)) {
    // Its turn comes in add_exact_rows.
    key_planes = 1, wanted = false, chance = 1.0f;
#pragma unroll
    for (int g = 0; g < kGroup; ++g) score[g] = kNever;
  }

  wanted_rows = __ballot_sync(kAllLanes, wanted);
  second_rows = __ballot_sync(kAllLanes, key_planes >= 2);
  if (!values_fetched) {
    copy_rows<Side::Value, 0, Absent::Left>(
        shared_address(mine.value_first[buffer]), a.cache.value_planes[0], at, wanted_rows, lane);
  }
  copy_rows<Side::Key, 1, Absent::Left>(
      shared_address(mine.key_second), a.cache.key_planes[1], at, second_rows, lane);
  if constexpr (kStoredPlanes >= 3) {
    third_rows = second_rows ? __ballot_sync(kAllLanes, key_planes >= 3) : 0;
    if (third_rows) {
      const int place = __popc(third_rows & ((1u << lane) - 1));
      if (key_planes >= 3) mine.order[place] = lane;
      __syncwarp();
      copy_rare_rows<2>(shared_address(mine.key_rare), a.cache.key_planes[2], at, mine.order,
                        min(__popc(third_rows), kRareRows), third_rows, lane);
    }
  }
  commit_copies();
}
