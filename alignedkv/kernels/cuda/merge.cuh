// The end of a step: sums of warps to a block's, and of blocks to a head's.

#include "block.cuh"
#include "bounds_statistical.cuh"
#include "near.cuh"
#include "warps.cuh"

// Threads that share the dither classes of a channel: a power of two, as their number is.
constexpr int dither_shares() {
  int shares = 1;
  while (2 * shares * kChannels <= kThreads) shares *= 2;
  return shares;
}
constexpr int kShares = dither_shares();

// Shared memory of the merge, over the tiles.
struct Merge {
  Partial whole;
  float correction[kShares][kGroup][kChannels];  // shares of sum B_s U_s, in units of the dither
  float factor[kMaxSplits][kHeads];
};

// ---- warps to a block -----------------------------------------------------------------------------

// Factor of each warp's sums: 2^(its reference - the block's).
__device__ __forceinline__ void set_warp_factors(DecodeShared& shared, Partial& part) {
  const int warp = uniform(thread_index() / 32), lane = thread_index() % 32;
  for (int g = warp; g < kHeads; g += kWarps) {
    const float reference = lane < kWarps ? shared.reference[lane][g] : kNever;
    const float top = warp_max(reference);
    if (lane < kWarps) shared.factor[lane][g] = exp2_fast(reference - top);
    if (lane == 0) store_past_l1(&part.reference[g], top);
#pragma unroll
    for (int e = 0; e < kExtremes; ++e) {
      if (!is_kept(e)) continue;
      const float most = warp_max(lane < kWarps ? shared.extremes[lane][e] : kNever);
      if (lane == 0) store_past_l1(&part.extremes[e][g], most);
    }
  }
}

// Value products of the block, of head block kHeadBlock.
template <int kHeadBlock>
__device__ __forceinline__ void leave_block_outputs(DecodeShared& shared, Partial& part) {
  constexpr int kFirst = 4 * kHeadBlock, kCount = kGroup - kFirst < 4 ? kGroup - kFirst : 4;
  for (int i = thread_index(); i < kCount * kChannels; i += kThreads) {
    const int g = i / kChannels, channel = i % kChannels;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum = fmaf(shared.factor[w][kFirst + g], shared.outputs_of(w).of[g][channel], sum);
    }
    store_past_l1(&part.output[kFirst + g][channel], sum);
  }
}

// A warp's part of a class sum, by its place in Partial::classes; 0 for classes that it does not meet.
__device__ __forceinline__ float class_sum(const DecodeShared& shared, int warp, int place) {
  const int g = place % kHeads, of_token = place / kHeads % kDitherRows;
  const int sum = place / (kHeads * kDitherRows);
  if (of_token / kTile % kBlocksApart != shared.first_block[warp]) return 0.0f;
  if (!kSettled || sum == kDither) return shared.classes[warp][own_class(of_token)][g];
  return g < kGroup ? shared.warps.settled(warp).classes[sum - 1][g][own_class(of_token)] : 0.0f;
}

// Sums and class sums of the block.
__device__ __forceinline__ void leave_block_sums(const DecodeShared& shared, Partial& part) {
  for (int i = thread_index(); i < kClassRows * kHeads; i += kThreads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum = fmaf(shared.factor[w][i % kHeads], class_sum(shared, w, i), sum);
    }
    store_past_l1(&part.classes[0][0] + i, sum);
  }
  for (int i = thread_index(); i < kSumCount * kHeads; i += kThreads) {
    const bool square = is_square(i / kHeads);
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float factor = shared.factor[w][i % kHeads];
      sum = fmaf(square ? factor * factor : factor, (&shared.sums[w][0][0])[i], sum);
    }
    store_past_l1(&part.sums[0][0] + i, sum);
  }
}

// ---- blocks to a head -----------------------------------------------------------------------------

// What a split's sums are relative to, and its maxima, of one head; a split a lane.
struct PartTops {
  float reference, extremes[kExtremes];

  __device__ __forceinline__ void fetch(const Partial* parts, int split, int splits, int g) {
    reference = kNever;
#pragma unroll
    for (float& each : extremes) each = kNever;
    if (split >= splits) return;
    reference = load_past_l1(&parts[split].reference[g]);
#pragma unroll
    for (int e = 0; e < kExtremes; ++e) {
      if (is_kept(e)) extremes[e] = load_past_l1(&parts[split].extremes[e][g]);
    }
  }
};

// Factor of each split's sums: 2^(its reference - the largest).  `fetched`: the first 32 splits' of the
// warp's first head.
__device__ __forceinline__ void set_factors(
    float (*factor)[kHeads], Partial& whole, const Partial* parts, const PartTops& fetched,
    int splits) {
  const int warp = uniform(thread_index() / 32), lane = thread_index() % 32;
  for (int g = warp; g < kHeads; g += kWarps) {
    float top = kNever, most[kExtremes];
#pragma unroll
    for (float& each : most) each = kNever;
    for (int first = 0; first < splits; first += 32) {
      PartTops of_split = fetched;
      if (g != warp || first > 0) of_split.fetch(parts, first + lane, splits, g);
      if (first + lane < splits) factor[first + lane][g] = of_split.reference;
      top = fmaxf(top, of_split.reference);
#pragma unroll
      for (int e = 0; e < kExtremes; ++e) most[e] = fmaxf(most[e], of_split.extremes[e]);
    }
    top = warp_max(top);
#pragma unroll
    for (float& each : most) each = warp_max(each);
    for (int i = lane; i < splits; i += 32) factor[i][g] = exp2_fast(factor[i][g] - top);
    if (lane == 0) {
      whole.reference[g] = top;
#pragma unroll
      for (int e = 0; e < kExtremes; ++e) whole.extremes[e][g] = most[e];
    }
  }
}

// Four floats of a Partial are summed over the splits by kSplitShares threads, neighbours in a warp.
constexpr int kColumns = (kGroup * kChannels + (kClassRows + kSumCount) * kHeads) / 4;
constexpr int kSplitShares = kThreads >= 2 * kColumns ? 2 : 1;
struct PartColumns {
  static constexpr int kBatch = 9;
  float4 x[kBatch];

  __device__ __forceinline__ void fetch(const Partial* parts, int column, int first, int splits) {
    const float4* from = reinterpret_cast<const float4*>(parts) + column;
    constexpr int kStride = sizeof(Partial) / 16;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int split = first + k * kSplitShares;
      x[k] = make_float4(0, 0, 0, 0);
      if (column < kColumns && split < splits) {
        x[k] = load_past_l1(from + static_cast<i64>(split) * kStride);
      }
    }
  }
  // Of the calling thread, which sums column after column.
  __device__ __forceinline__ static int first_column() { return thread_index() / kSplitShares; }
  __device__ __forceinline__ static int first_split() { return thread_index() % kSplitShares; }
};

// All columns of all splits, weighed by their factors.  `fetched`: the thread's first batch.
__device__ __forceinline__ void sum_parts(
    Partial& whole, const Partial* parts, const PartColumns& fetched, const float (*factor)[kHeads],
    int splits) {
  constexpr int kOutputColumns = kGroup * kChannels / 4;
  constexpr int kSumColumn = kOutputColumns + kClassRows * kHeads / 4;
  constexpr int kColumnsAtOnce = kThreads / kSplitShares;
  const int mine = PartColumns::first_column(), share = PartColumns::first_split();
  for (int at = 0; at < kColumns; at += kColumnsAtOnce) {
    const int column = at + mine;
    const bool is_output = column < kOutputColumns;
    const int head = is_output ? 4 * column / kChannels : 4 * (column % kHeadBlocks);
    const bool square = column >= kSumColumn && is_square((column - kSumColumn) / kHeadBlocks);
    float4 sum = make_float4(0, 0, 0, 0);
    PartColumns batch = fetched;
    for (int first = share; first < splits; first += PartColumns::kBatch * kSplitShares) {
      if (at > 0 || first > share) batch.fetch(parts, column, first, splits);
#pragma unroll
      for (int k = 0; k < PartColumns::kBatch; ++k) {
        const int split = first + k * kSplitShares;
        if (split >= splits) break;
        const float4 x = batch.x[k];
        const float* of = factor[split] + head;
        float4 f = is_output ? make_float4(of[0], of[0], of[0], of[0])
                             : make_float4(of[0], of[1], of[2], of[3]);
        if (square) f = make_float4(f.x * f.x, f.y * f.y, f.z * f.z, f.w * f.w);
        sum.x = fmaf(f.x, x.x, sum.x), sum.y = fmaf(f.y, x.y, sum.y);
        sum.z = fmaf(f.z, x.z, sum.z), sum.w = fmaf(f.w, x.w, sum.w);
      }
    }
#pragma unroll
    for (int distance = 1; distance < kSplitShares; distance *= 2) {
      sum.x += __shfl_xor_sync(kAllLanes, sum.x, distance);
      sum.y += __shfl_xor_sync(kAllLanes, sum.y, distance);
      sum.z += __shfl_xor_sync(kAllLanes, sum.z, distance);
      sum.w += __shfl_xor_sync(kAllLanes, sum.w, distance);
    }
    if (column < kColumns && share == 0) reinterpret_cast<float4*>(&whole)[column] = sum;
  }
}

// A thread's share of the value dither: entries of one channel, fetched before they are needed.
constexpr int kSharedClasses = kDitherRows / kShares;
constexpr int kDitherBatch = kSharedClasses < 16 ? kSharedClasses : 16;
struct DitherShare {
  i16 entry[kDitherBatch];

  __device__ __forceinline__ void fetch(const i16* dither, int first, int channel) {
#pragma unroll
    for (int k = 0; k < kDitherBatch; ++k) entry[k] = dither[(first + k) * kChannels + channel];
  }
};

// sum_s B_s U_s of each channel (theory.md (2.3)), in shares.  `fetched`: the thread's first batch.
__device__ __forceinline__ void correct_dither(
    Merge& merge, const i16* dither, const DitherShare& fetched) {
  for (int i = thread_index(); i < kShares * kChannels; i += kThreads) {
    const int channel = i % kChannels, share = i / kChannels, begin = share * kSharedClasses;
    float sum[kGroup] = {};
    DitherShare batch = fetched;
    for (int first = begin; first < begin + kSharedClasses; first += kDitherBatch) {
      if (i >= kThreads || first > begin) batch.fetch(dither, first, channel);
#pragma unroll
      for (int k = 0; k < kDitherBatch; ++k) {
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          sum[g] = fmaf(merge.whole.classes[first + k][g], batch.entry[k], sum[g]);
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) merge.correction[share][g][channel] = sum[g];
  }
}
