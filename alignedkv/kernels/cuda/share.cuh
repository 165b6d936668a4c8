// How the blocks of a launch share the KV heads.

#include "copies.cuh"
#include "warps.cuh"

// Which part of which KV head a block takes.
struct Share {
  int head, split, splits;  // splits = 0: nothing to do

  // Heads of equal work.
  __device__ __forceinline__ static Share even(int heads, int block, int blocks) {
    const int splits = blocks / heads, head = block / splits;
    return {head, block % splits, head < heads ? splits : 0};
  }

  // The share of a block in `heads` heads of `work_of(head)` each; a head without work gets no blocks.
  // For all lanes of a warp.
  //
  // The largest load of a block is as small as whole blocks allow, to a 31st of what may be gained:
  // heads get ceil(work / load) blocks each, of 32 loads the smallest for which there are enough.
  template <class WorkOf>
  __device__ __forceinline__ static Share of(int heads, int block, int blocks, WorkOf work_of) {
    const int lane = lane_of_thread();
    const auto work_of_lane = [&](int first) {
      return first + lane < heads ? work_of(first + lane) : 0.0f;
    };
    const float first_work = work_of_lane(0);  // there are seldom more heads
    const auto work_at = [&](int first) { return first == 0 ? first_work : work_of_lane(first); };
    float total = 0, largest = 0;
    int working = 0;
    for (int first = 0; first < heads; first += kWarpSize) {
      const float work = work_at(first);
      total += work, largest = fmaxf(largest, work);
      working += __popc(__ballot_sync(kAllLanes, work > 0));
    }
    if (working == 0) return {0, 0, 0};
    total = warp_sum(total), largest = warp_max(largest);
    // The last of the loads is always one for which blocks suffice, whatever is rounded: a block a head,
    // or ceil(x) < x + 1 of them.
    const float least = total / blocks, spare = blocks - working;
    const float enough_load = spare > 0 ? fminf(largest, total / spare) : largest;
    const float most = enough_load * (1.0f + 0x1p-20f);
    const float per_load = 1.0f / fmaf(most - least, lane * (1.0f / (kWarpSize - 1)), least);
    int wanted = 0;
    for (int first = 0; first < heads; first += kWarpSize) {
      const float work = work_at(first);
      for (int i = 0; i < min(heads - first, kWarpSize); ++i) {
        wanted += splits_of(__shfl_sync(kAllLanes, work, i), per_load);
      }
    }
    const u32 enough = __ballot_sync(kAllLanes, wanted <= blocks) | 1u << (kWarpSize - 1);
    const float chosen = __shfl_sync(kAllLanes, per_load, __ffs(enough) - 1);
    Share share = {0, 0, 0};
    int before = 0;  // blocks of the heads before
    for (int first = 0; first < heads; first += kWarpSize) {
      const int splits = splits_of(work_at(first), chosen);
      int behind = splits;
#pragma unroll
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const int other = __shfl_up_sync(kAllLanes, behind, distance);
        if (lane >= distance) behind += other;
      }
      const int split = block - before - (behind - splits);
      const u32 here = __ballot_sync(kAllLanes, split >= 0 && split < splits);
      if (here) {
        const int owner = __ffs(here) - 1;
        share = {first + owner, __shfl_sync(kAllLanes, split, owner),
                 __shfl_sync(kAllLanes, splits, owner)};
      }
      before += __shfl_sync(kAllLanes, behind, kWarpSize - 1);
    }
    return share;
  }

 private:
  __device__ __forceinline__ static int splits_of(float work, float per_load) {
    const int splits = min(static_cast<int>(ceilf(work * per_load)), kMaxSplits);
    return work > 0 ? max(splits, 1) : 0;  // a product may vanish
  }
};
