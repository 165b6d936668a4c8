// Scores of the paper's decode step (paper.cu), from as many planes of each key channel as its plan asks
// for.

#include "paper_planes.cuh"
#include "warps.cuh"

struct ScoreShared {
  float query[kHeadDim][kWholeGroup];  // in the order of the channels
  int order[kHeadDim];
  float largest[kPaperWarps][kWholeGroup], sum[kPaperWarps][kWholeGroup];
};

// Add channels first .. end - 1 of the order to the scores of a lane's four tokens.
template <int kRead>
__device__ __forceinline__ void add_channels(
    float (&scores)[kWholeGroup][kPaperVector], const PaperArguments& a, const ScoreShared& shared,
    i64 head, int tile, int first, int end) {
  const Planes keys(a.key_high, a.key_middle, a.key_low);
#pragma unroll 8
  for (int i = first; i < end; ++i) {
    const i64 group = key_group(a, head, tile, shared.order[i]);
    const u32 high = __ldcs(keys.high + group);
    const u32 middle = kRead >= 2 ? __ldcs(keys.middle + group) : 0;
    const u32 low = kRead >= 3 ? __ldcs(keys.low + group) : 0;
    float k[kPaperVector];
    assemble<kRead>(k, high, middle, low);
#pragma unroll
    for (int g = 0; g < kWholeGroup; ++g) {
#pragma unroll
      for (int j = 0; j < kPaperVector; ++j) scores[g][j] += shared.query[i][g] * k[j];
    }
  }
}

// Scores, and each split's maximum and sum of exponentials.  grid: (splits, B * Hkv)
extern "C" __global__ void __launch_bounds__(kPaperThreads)
    paper_scores(const __grid_constant__ PaperArguments a) {
  __shared__ ScoreShared shared;
  const Head head = head_of_block(a);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int length = a.lengths[head.sequence];
  const u32* reads = a.reads + head.index * 2 * kPaperPlanes;
  const int with_two = reads[1], with_three = reads[2];
  for (int i = threadIdx.x; i < kHeadDim; i += kPaperThreads) {
    const int c = a.channel_order[head.index * kHeadDim + i];
    shared.order[i] = c;
    for (int g = 0; g < kWholeGroup; ++g) {
      const QueryBits q = a.query[(head.index * kWholeGroup + g) * kHeadDim + c];
      shared.query[i][g] = to_float<kQueryDtype>(q) * a.scaling;
    }
  }
  __syncthreads();
  float largest[kWholeGroup], sum[kWholeGroup];
#pragma unroll
  for (int g = 0; g < kWholeGroup; ++g) largest[g] = -infinity(), sum[g] = 0;
  const int tiles = (length + kPaperTile - 1) / kPaperTile;
  for (int tile = blockIdx.x * kPaperWarps + warp; tile < tiles; tile += gridDim.x * kPaperWarps) {
    float scores[kWholeGroup][kPaperVector] = {};
    add_channels<3>(scores, a, shared, head.index, tile, 0, with_three);
    add_channels<2>(scores, a, shared, head.index, tile, with_three, with_two);
    add_channels<1>(scores, a, shared, head.index, tile, with_two, kHeadDim);
    const int token = tile * kPaperTile + kPaperVector * lane;
#pragma unroll
    for (int g = 0; g < kWholeGroup; ++g) {
      float* out = a.scores + (head.index * kWholeGroup + g) * a.capacity + token;
      float here = largest[g];
#pragma unroll
      for (int j = 0; j < kPaperVector; ++j) {
        if (token + j >= length) scores[g][j] = -infinity();
        here = fmaxf(here, scores[g][j]);
        out[j] = scores[g][j];
      }
      if (here == -infinity()) continue;
      sum[g] *= __expf(largest[g] - here);
      largest[g] = here;
#pragma unroll
      for (int j = 0; j < kPaperVector; ++j) sum[g] += __expf(scores[g][j] - here);
    }
  }
#pragma unroll
  for (int g = 0; g < kWholeGroup; ++g) {
    const float top = warp_max(largest[g]);
    const float all = warp_sum(top == -infinity() ? 0 : sum[g] * __expf(largest[g] - top));
    if (lane == 0) shared.largest[warp][g] = top, shared.sum[warp][g] = all;
  }
  __syncthreads();
  if (threadIdx.x >= kWholeGroup) return;
  const int g = threadIdx.x;
  float top = -infinity(), all = 0;
  for (int w = 0; w < kPaperWarps; ++w) top = fmaxf(top, shared.largest[w][g]);
  for (int w = 0; w < kPaperWarps && top > -infinity(); ++w) {
    all += shared.sum[w][g] * __expf(shared.largest[w][g] - top);
  }
  const i64 at = (head.index * kWholeGroup + g) * a.splits + blockIdx.x;
  a.split_largest[at] = top;
  a.split_sum[at] = all;
}
