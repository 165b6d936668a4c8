// The decode step of the AlignedKV paper (arXiv 2409.16546), so that its claims can be measured on
// today's GPUs: keys and values in fp16, cut into planes of 8, 4 and 4 bits.
//
//   bits 15 .. 8  high    sign, exponent, two bits of fraction
//   bits  7 .. 4  middle
//   bits  3 .. 0  low
//
// Keys are read with as many planes per channel, values with as many per token, as the exponent of
// the addend leaves of use in the sum; the unread bits are taken in the middle of their range.  The
// rule is the paper's with its slips mended: channels by their largest |k|, exponents as signed
// numbers, the output's exponents from the step before (as ours) instead of a probe, accumulation in
// float32, tokens split over the GPU.  With gaps that no exponent reaches, the same kernels read all
// planes.

#include "paper_planes.cuh"
#include "paper_scores.cuh"
#include "warps.cuh"

// ---- encode ---------------------------------------------------------------------------------------

// Store a prefill.  A warp takes a tile of 128 tokens.  grid: (T / 128, B * Hkv); block: 32
extern "C" __global__ void __launch_bounds__(kWarpSize)
    paper_encode(const __grid_constant__ PaperArguments a) {
  const Head head = head_of_block(a);
  const int tile = blockIdx.x, lane = threadIdx.x, first = tile * kPaperTile;
  const Planes keys(a.key_high, a.key_middle, a.key_low);
  const Planes values(a.value_high, a.value_middle, a.value_low);
  const i64 row_of_tile = head.index * a.capacity + first;
  for (int c = 0; c < kHeadDim; ++c) {
    u16 bits[kPaperVector];
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kPaperVector; ++i) {
      bits[i] = a.keys[(row_of_tile + kPaperVector * lane + i) * kHeadDim + c];
      largest = fmaxf(largest, fabsf(to_float<Float::F16>(bits[i])));
    }
    keys.store(key_group(a, head.index, tile, c), bits);
    largest = warp_max(largest);
    if (lane == 0) raise(a.key_largest + head.index * kHeadDim + c, largest);
  }
  float largest[kPaperVector] = {};
  for (int t = 0; t < kPaperTile; ++t) {
    u16 bits[kPaperVector];
#pragma unroll
    for (int i = 0; i < kPaperVector; ++i) {
      bits[i] = a.values[(row_of_tile + t) * kHeadDim + kPaperVector * lane + i];
      largest[i] = fmaxf(largest[i], fabsf(to_float<Float::F16>(bits[i])));
    }
    values.store(value_group(a, head.index, first + t), bits);
  }
#pragma unroll
  for (int i = 0; i < kPaperVector; ++i) {
    raise(a.value_largest + head.index * kHeadDim + kPaperVector * lane + i, largest[i]);
  }
}

// ---- plan -----------------------------------------------------------------------------------------

// Planes of each key channel, the most that a head of the group wants; channels in descending order
// of planes, so that `paper_scores` runs three loops without a branch; and each head's exponent from
// which on weights are read in full.  grid: (1, B * Hkv); block: D
extern "C" __global__ void __launch_bounds__(kHeadDim)
    paper_plan(const __grid_constant__ PaperArguments a) {
  __shared__ int largest[kWholeGroup], smallest[kWholeGroup];
  __shared__ int planes[kHeadDim];
  const Head head = head_of_block(a);
  const int c = threadIdx.x;
  const int key = exponent(a.key_largest[head.index * kHeadDim + c]);
  const int value = exponent(a.value_largest[head.index * kHeadDim + c]);
  const QueryBits* queries = a.query + head.index * kWholeGroup * kHeadDim;
  int mine[kWholeGroup];
  if (c < kWholeGroup) largest[c] = -1000, smallest[c] = 1000;
  __syncthreads();
#pragma unroll
  for (int g = 0; g < kWholeGroup; ++g) {
    mine[g] = exponent(fabsf(to_float<kQueryDtype>(queries[g * kHeadDim + c]))) + key;
    atomicMax(&largest[g], mine[g]);
    // A weight moves channel c by up to 2^(its exponent + value): compared with half of the output.
    const i64 of_head = head.index * kWholeGroup + g;
    const int output = exponent(fabsf(a.expected[of_head * kHeadDim + c]));
    atomicMin(&smallest[g], output - 1 - value);
  }
  __syncthreads();
  if (c < kWholeGroup) a.value_exponent[head.index * kWholeGroup + c] = smallest[c];
  int wanted = 1;
#pragma unroll
  for (int g = 0; g < kWholeGroup; ++g) {
    const int gap = largest[g] - mine[g];
    wanted = max(wanted, planes_of_gap(gap, a.key_gap_of_two, a.key_gap_of_one));
  }
  planes[c] = wanted;
  __syncthreads();
  int place = 0, with_two = 0, with_three = 0;
  for (int i = 0; i < kHeadDim; ++i) {
    place += planes[i] > wanted || (planes[i] == wanted && i < c);
    with_two += planes[i] >= 2;
    with_three += planes[i] >= 3;
  }
  a.channel_order[head.index * kHeadDim + place] = c;
  u32* reads = a.reads + head.index * 2 * kPaperPlanes;
  if (c == 0) {
    reads[0] = kHeadDim, reads[1] = with_two, reads[2] = with_three;
    reads[kPaperPlanes] = a.lengths[head.sequence];
    reads[kPaperPlanes + 1] = reads[kPaperPlanes + 2] = 0;
  }
}

// ---- values ---------------------------------------------------------------------------------------

struct ValueShared {
  float largest[kWholeGroup], inverse_sum[kWholeGroup];
  float weights[kPaperWarps][kWarpSize][kWholeGroup];
  float output[kWholeGroup][kHeadDim];
};

// Weighted values of a split's tokens.  grid: (splits, B * Hkv)
extern "C" __global__ void __launch_bounds__(kPaperThreads)
    paper_values(const __grid_constant__ PaperArguments a) {
  __shared__ ValueShared shared;
  const Head head = head_of_block(a);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int length = a.lengths[head.sequence];
  const Planes values(a.value_high, a.value_middle, a.value_low);
  for (int g = warp; g < kWholeGroup; g += kPaperWarps) {
    const i64 of_head = head.index * kWholeGroup + g;
    float top = -infinity(), all = 0;
    for (int s = lane; s < a.splits; s += kWarpSize) {
      top = fmaxf(top, a.split_largest[of_head * a.splits + s]);
    }
    top = warp_max(top);
    for (int s = lane; s < a.splits; s += kWarpSize) {
      const float of_split = a.split_largest[of_head * a.splits + s];
      all += a.split_sum[of_head * a.splits + s] * __expf(of_split - top);
    }
    all = warp_sum(all);
    if (lane == 0) {
      shared.largest[g] = top, shared.inverse_sum[g] = 1 / all;
    }
  }
  for (int i = threadIdx.x; i < kWholeGroup * kHeadDim; i += kPaperThreads) {
    shared.output[i / kHeadDim][i % kHeadDim] = 0;
  }
  __syncthreads();

  float output[kWholeGroup][kPaperVector] = {};
  u32 with_two = 0, with_three = 0;
  const int step = gridDim.x * kPaperWarps * kWarpSize;
  for (int first = (blockIdx.x * kPaperWarps + warp) * kWarpSize; first < length; first += step) {
    const int token = first + lane;
    const bool valid = token < length;
    int planes = 1;
    float (&weights)[kWarpSize][kWholeGroup] = shared.weights[warp];
#pragma unroll
    for (int g = 0; g < kWholeGroup; ++g) {
      const i64 of_head = head.index * kWholeGroup + g;
      const float score = valid ? a.scores[of_head * a.capacity + token] : -infinity();
      const float weight = __expf(score - shared.largest[g]) * shared.inverse_sum[g];
      const float gap = a.value_exponent[of_head] - linear_log2(weight);
      planes = max(planes, planes_of_gap(gap, a.value_gap_of_two, a.value_gap_of_one));
      weights[lane][g] = weight;
    }
    if (!valid) planes = 1;
    const u32 two = __ballot_sync(kAllLanes, planes >= 2);
    const u32 three = __ballot_sync(kAllLanes, planes >= 3);
    with_two += __popc(two), with_three += __popc(three);
    __syncwarp();
    const int count = min(kWarpSize, length - first);
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      const i64 group = value_group(a, head.index, first + i);
      const bool has_two = two >> i & 1, has_three = three >> i & 1;
      const u32 high = __ldcs(values.high + group);
      const u32 middle = has_two ? __ldcs(values.middle + group) : 0x8888u;
      const u32 low = has_three ? __ldcs(values.low + group) : has_two ? 0x8888u : 0u;
      float v[kPaperVector];
      assemble<3>(v, high, middle, low);  // the middle of what was not read stands in its place
#pragma unroll
      for (int g = 0; g < kWholeGroup; ++g) {
#pragma unroll
        for (int j = 0; j < kPaperVector; ++j) output[g][j] += weights[i][g] * v[j];
      }
    }
    __syncwarp();
  }
#pragma unroll
  for (int g = 0; g < kWholeGroup; ++g) {
#pragma unroll
    for (int j = 0; j < kPaperVector; ++j) {
      atomicAdd(&shared.output[g][kPaperVector * lane + j], output[g][j]);
    }
  }
  if (lane == 0) {
    u32* reads = a.reads + (head.index * 2 + 1) * kPaperPlanes;
    if (with_two) atomicAdd(reads + 1, with_two);
    if (with_three) atomicAdd(reads + 2, with_three);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kWholeGroup * kHeadDim; i += kPaperThreads) {
    const i64 of_head = head.index * kWholeGroup + i / kHeadDim;
    const i64 at = (of_head * a.splits + blockIdx.x) * kHeadDim + i % kHeadDim;
    a.partial_output[at] = shared.output[i / kHeadDim][i % kHeadDim];
  }
}

// Sum over the splits.  grid: (G, B * Hkv); block: D
extern "C" __global__ void __launch_bounds__(kHeadDim)
    paper_merge(const __grid_constant__ PaperArguments a) {
  const i64 of_head = static_cast<i64>(blockIdx.y) * kWholeGroup + blockIdx.x;
  const float* partial = a.partial_output + of_head * a.splits * kHeadDim + threadIdx.x;
  float sum = 0;
  for (int s = 0; s < a.splits; ++s) sum += partial[s * kHeadDim];
  a.output[of_head * kHeadDim + threadIdx.x] = sum;
}
