// Rows kept exact, and what a warp leaves to its block when all tiles are done.

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

__device__ __forceinline__ void Worker::leave_sums() {
  float(&to)[kSumCount][kHeads] = block.sums[warp];
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    const int head_of = g < kGroup ? g : 0;
    const bool exists = g < kGroup;
    const float whole = exists ? warp_sum(total[head_of]) : 0.0f;
    const float offset = exists ? warp_sum(offsets[head_of]) : 0.0f;
    if (lane == 0) to[kTotal][g] = whole, to[kOffsets][g] = offset;
    unrolled<0, Sums::kCount>([&](auto i) {
      constexpr int kSum = decltype(i)::value;
      const float sum = exists ? warp_sum(sums.template at<kSum>(head_of)) : 0.0f;
      if (lane == 0) to[kFirstBound + kSum][g] = sum;
    });
  }
  if constexpr (kSettled) leave_extremes();
  if constexpr (kSampleValues) {
    const float most = warp_max(largest_draw);
    if (lane == 0) block.extremes[warp][kDraw] = most;
  }
}

// Value products of the block's warps, four heads at a time.
__device__ __forceinline__ void leave_outputs(Worker& worker, DecodeShared& shared, Partial& part) {
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    float* to = shared.outputs.of[worker.warp][worker.c];
    unrolled<0, kPieces>([&](auto piece) {
      constexpr int kPiece = decltype(piece)::value;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        to[value_byte<kPiece>(worker.r) + j / 2 + (j % 2) * (kChannels / 2)] =
            worker.output[b][4 * kPiece + j];
      }
    });
    __syncthreads();
    constexpr int kLast = kGroup - 4 * (kHeadBlocks - 1);
    const int heads = b + 1 < kHeadBlocks ? 4 : kLast;
    for (int i = threadIdx.x; i < heads * kChannels; i += kThreads) {
      const int g = i / kChannels, channel = i % kChannels;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sum = fmaf(shared.factor[w][4 * b + g], shared.outputs.of[w][g][channel], sum);
      }
      store_past_l1(&part.output[4 * b + g][channel], sum);
    }
    __syncthreads();
  }
}
