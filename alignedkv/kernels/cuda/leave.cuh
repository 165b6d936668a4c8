// Rows kept exact, and what a warp leaves to its block when all tiles are done.

#include "warps.cuh"
#include "worker.cuh"

// ---- rows kept exact ------------------------------------------------------------------------------

// Rows kept in the input type: their scores and values have no error and read no plane.  They are few
// and shared out over the warps of a head.
__device__ __forceinline__ void Worker::add_exact_rows(
    const Range& range, int split, int splits) {
  const int from_start = min(a.cache.exact_first, range.end - range.start);
  const int to_end = min(a.cache.exact_last, range.end - range.start - from_start);
  const i64 of_head = head_index(a.cache, sequence, head);
  for (int i = split * kWarps + warp; i < from_start + to_end; i += splits * kWarps) {
    const int token = i < from_start ? range.start + i : range.end - to_end + (i - from_start);
    if (!range.holds(token)) continue;
    const bool is_first = block.reference[warp][0] == kNever;  // and the warp has no tile
    const int slot = exact_slot(a.cache, token, range.start, range.end);
    const RowBits* key = a.cache.exact_keys + exact_offset(a.cache, of_head, slot);
    const RowBits* value = a.cache.exact_values + exact_offset(a.cache, of_head, slot);
    float x[kPerLane];
    load_row<kRowDtype>(x, key);
    float weight[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      float q[kPerLane], dot = 0;
      const i64 query_head = (of_head * kSubgroups + part) * kGroup + g;
      load_row<kQueryDtype>(q, a.query + query_head * kHeadDim);
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) dot = fmaf(q[k], x[k], dot);
      dot = warp_sum(dot) * a.step.scaling;
      if constexpr (kSoftcap) {
        weight[g] = capped(dot / a.step.softcap, g);
      } else {
        weight[g] = fmaf(dot, kLog2e, -block.constants[kHint][g]);
      }
      __syncwarp();
      if (is_first && lane == 0) block.reference[warp][g] = block.trusted ? 0.0f : weight[g];
      __syncwarp();
      weight[g] = exp2_fast(weight[g] - block.reference[warp][g]);
      if (lane == 0) total[g] += weight[g], sums.add_exact(g, weight[g]);
    }
    unrolled<0, kPieces>([&](auto piece) {
      constexpr int kPiece = decltype(piece)::value;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int channel = value_byte<kPiece>(r) + j / 2 + (j % 2) * (kChannels / 2);
        if (channel >= kHeadDim) continue;
        const float centred = to_float<kRowDtype>(value[channel]) -
                              a.cache.value_mean[of_head * kHeadDim + channel];
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          float& out = output[g / 4][4 * kPiece + j];
          if (g % 4 == c) out = fmaf(weight[g], centred, out);
        }
      }
    });
  }
}

// ---- the end of a warp ----------------------------------------------------------------------------

// A lane's part of a sum of `DecodeShared::sums`.
template <int kSum>
__device__ __forceinline__ float Worker::sum_of_lane(int g) {
  if constexpr (kSum == kTotal) return total[g];
  if constexpr (kSum == kOffsets) return offsets[g];
  if constexpr (kSum >= kFirstBound) return sums.template at<kSum - kFirstBound>(g);
}

__device__ __forceinline__ void Worker::leave_sums() {
  constexpr int kAtOnce = 16, kAll = kSumCount * kHeads;
  float* to = &block.sums[warp][0][0];
  unrolled<0, (kAll + kAtOnce - 1) / kAtOnce>([&](auto part) {
    constexpr int kFirst = kAtOnce * decltype(part)::value;
    float x[kAtOnce];
    unrolled<0, kAtOnce>([&](auto i) {
      constexpr int kIndex = kFirst + decltype(i)::value, kSum = kIndex / kHeads, g = kIndex % kHeads;
      x[kIndex - kFirst] = 0.0f;
      if constexpr (kIndex < kAll && g < kGroup) x[kIndex - kFirst] = sum_of_lane<kSum>(g);
    });
    const float sum = warp_sums(x);
    if (lane < kAtOnce && kFirst + lane < kAll) to[kFirst + lane] = sum;
  });
  leave_classes();
  if constexpr (kSettled) leave_extremes();
  if constexpr (kSampleValues) {
    const float most = warp_max(largest_draw);
    if (lane == 0) block.extremes[warp][kDraw] = most;
  }
}

// Value products of four heads, to the memory of the warp's tiles.
template <int kHeadBlock>
__device__ __forceinline__ void Worker::leave_outputs() {
  float* to = block.outputs_of(warp).of[c];
  unrolled<0, kPieces>([&](auto piece) {
    constexpr int kPiece = decltype(piece)::value;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      to[value_byte<kPiece>(r) + j / 2 + (j % 2) * (kChannels / 2)] = output[kHeadBlock][4 * kPiece + j];
    }
  });
}
