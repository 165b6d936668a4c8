// Finer scores of a tile, and the reference of all weights.

#include "worker.cuh"

// Weights are relative to the hint exp(L). Where the hint is off so far that they would leave the
// floats, the warp counts from the largest score of its first tile instead.
__device__ __forceinline__ void Worker::settle_reference(const Tokens& t) {
  constexpr float kHighest = 20.0f, kLowest = -100.0f;  // log2
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    const float largest = warp_max(t.score[g]);
    const bool is_high = largest > kHighest;
    const bool is_low = !block.trusted && largest < kLowest && largest > 0.5f * kNever;
    const float reference = is_high || is_low ? largest : 0.0f;
    shifted |= is_high || is_low;
    if (lane == 0) block.reference[warp][g] = reference;
  }
  __syncwarp();
}

// Scores from all key planes that were read.
__device__ __forceinline__ void Worker::refine(Tokens& t, FinerKeys& keys) {
  if constexpr (kSettled) start_settling(t);
  const FinerLanes lanes = finer_lanes(t);
  if (!lanes.second) return;
  const int place = place_in(lanes.second), count = __popc(lanes.second);
  constexpr int kWidth = kWidths[1];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (count + (lanes.share_rows ? __popc(lanes.third) : 0) <= 16 * half) break;
    int x[kHeadBlocks][2];
    key_products<kWidth>(x, keys.second + half * 16 * kPlaneRowBytes[1], block.query, lane);
    // In the unit of the first plane's products: kUnit16.
    constexpr float kScale = 1.0f / (1 << gain(2));
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
      mine.scores[half * 16 + r][4 * b + c] = kScale * static_cast<float>(x[b][0]);
      mine.scores[half * 16 + r + 8][4 * b + c] = kScale * static_cast<float>(x[b][1]);
    }
  }
  __syncwarp();
  if constexpr (kSettled) {
    keep_or_drop<2>(t, place, t.key.reads(2));
    __syncwarp();
  }
  add_rare_planes<2>(t, place, lanes.share_rows, keys);
  if constexpr (!kSettled) {
    // For all lanes alike: a branch of some costs more.
    const bool is_finer = t.key.reads(2);
    float finer[kGroup], unit[kGroup], half[kGroup];
    load_heads(finer, mine.scores[is_finer ? place : 0]);
    if (kThirdIsLikeSecond && lanes.third && lanes.share_rows) {
      const bool has_third = t.key.reads(3);
      const float scale = has_third ? 1.0f / (1 << (gain(3) - gain(2))) : 0.0f;
      float third[kGroup];
      load_heads(third, mine.scores[has_third ? count + place_in(lanes.third) : 0]);
#pragma unroll
      for (int g = 0; g < kGroup; ++g) finer[g] = fmaf(scale, third[g], finer[g]);
    }
    load_heads(unit, block.query.numbers[kUnit16]);
    load_heads(half, block.query.numbers[kHalf]);
    const float key_scale = is_finer ? t.key_scale() : 0.0f;
    const float middle = 0.5f * t.key.step() - 0.5f;  // of the digits read, less the first's
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const float added = key_scale * fmaf(half[g], middle, unit[g] * finer[g]);
      if constexpr (kSoftcap) {
        // Not of tokens without weight: their scores are no caps of anything.
        t.score[g] = is_finer ? capped(t.uncapped[g] + added, g) : t.score[g];
      } else {
        t.score[g] += added;
      }
    }
    t.value = plan_value(t, is_finer);
  }
  __syncwarp();
}

// Planes from kPlane on, kRareRows rows at a time; the first of the third are there already.  `place`: of
// this lane's row in `mine.scores`; `has_third`: whether all of the third are in there as well.
template <int kPlane>
__device__ __forceinline__ void Worker::add_rare_planes(
    Tokens& t, int place, bool has_third, FinerKeys& keys) {
  if constexpr (kPlane < kStoredPlanes) {
    constexpr int kWidth = kWidths[kPlane];
    const u32 having = __ballot_sync(kAllLanes, t.key.reads(kPlane + 1));
    if (!having) return;
    const int count = kPlane == 2 && has_third ? 0 : __popc(having), place_here = place_in(having);
#pragma unroll 1
    for (int first = 0; first < count; first += kRareRows) {
      if (kPlane > 2 || first > 0) {
        fetch_rare<kPlane>(t, place, place_here - first, keys);
        commit_copies();
        await_copies<0>();
        __syncwarp();
      }
      int x[kHeadBlocks][2];
      key_products<kWidth>(x, keys.rare, block.query, lane);
      constexpr float kScale =
          16.0f * kDigitsPerProduct<kWidth> / static_cast<float>(1 << gain(kPlane + 1));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (first + r + 8 * i >= count) continue;
        float* scores = mine.scores[keys.order[r + 8 * i]];
#pragma unroll
        for (int b = 0; b < kHeadBlocks; ++b) scores[4 * b + c] += kScale * static_cast<float>(x[b][i]);
      }
      __syncwarp();
      if constexpr (kSettled) {
        const bool is_here = place_here >= first && place_here < first + kRareRows;
        keep_or_drop<kPlane + 1>(t, place, is_here && t.key.reads(kPlane + 1));
        __syncwarp();
      }
    }
    add_rare_planes<kPlane + 1>(t, place, has_third, keys);
  }
}
