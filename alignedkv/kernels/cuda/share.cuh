// How the blocks of a launch share the KV heads.

#include "copies.cuh"
#include "warps.cuh"

// The blocks of a launch.  Each head keeps a party of 2^`party` whatever its work: they know their first
// tile before they know how many blocks the head has.  They come last, since the last start last.
struct Blocks {
  int block, count, heads, party;
  bool all_free;  // no head keeps any

  __device__ __forceinline__ int kept() const { return all_free ? 0 : 1 << party; }
  __device__ __forceinline__ int free() const { return count - kept() * heads; }
  __device__ __forceinline__ bool is_kept() const { return block >= free(); }
  // Of a block that is kept.
  __device__ __forceinline__ int head() const { return (block - free()) >> party; }
  __device__ __forceinline__ int split() const { return (block - free()) & ((1 << party) - 1); }
};

// Which part of which head a block takes.
struct Share {
  int head, split, splits;  // splits = 0: nothing to do
  int place;                // of the head's first block, where heads lie one behind the other

  // The share of a block in heads of `work_of(head)` each; a head without work gets no blocks, and then
  // none are kept.  For all lanes of a warp.
  //
  // The largest load of a block is about as small as whole blocks allow: heads get ceil(work / load)
  // blocks, of 32 loads the smallest for which there are enough.
  template <class WorkOf>
  __device__ __forceinline__ static Share of(const Blocks& blocks, WorkOf work_of) {
    const int lane = lane_of_thread(), heads = blocks.heads, kept = blocks.kept();
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
    if (working == 0) return {0, 0, 0, 0};
    total = warp_sum(total), largest = warp_max(largest);
    // The last of the loads suffices: heads get count / working blocks at most.
    const float least = total / blocks.count;
    const float most = (1.0f + 0x1p-20f) * largest / (blocks.count / working);
    const float per_load = 1.0f / fmaf(most - least, lane * (1.0f / (kWarpSize - 1)), least);
    const auto splits_of = [&](float work, float per_load) {
      const int wanted = min(static_cast<int>(ceilf(work * per_load)), kMaxSplits);
      return work > 0 ? max(wanted, kept) : 0;
    };
    int wanted = 0;
    for (int first = 0; first < heads; first += kWarpSize) {
      const float work = work_at(first);
      for (int i = 0; i < min(heads - first, kWarpSize); ++i) {
        wanted += splits_of(__shfl_sync(kAllLanes, work, i), per_load);
      }
    }
    const u32 enough = __ballot_sync(kAllLanes, wanted <= blocks.count) | 1u << (kWarpSize - 1);
    const float chosen = __shfl_sync(kAllLanes, per_load, __ffs(enough) - 1);

    Share share = {0, 0, 0, 0};
    int before = 0;  // free blocks that heads before have taken
    for (int first = 0; first < heads; first += kWarpSize) {
      const int splits = splits_of(work_at(first), chosen), taken = max(splits - kept, 0);
      int behind = taken;
#pragma unroll
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const int other = __shfl_up_sync(kAllLanes, behind, distance);
        if (lane >= distance) behind += other;
      }
      const int first_taken = before + behind - taken;
      int split = kept + blocks.block - first_taken;
      bool is_mine = split >= kept && split < splits;
      if (blocks.is_kept()) is_mine = first + lane == blocks.head(), split = blocks.split();
      const u32 here = __ballot_sync(kAllLanes, is_mine);
      if (here) {
        const int owner = __ffs(here) - 1;
        share = {first + owner, __shfl_sync(kAllLanes, split, owner),
                 __shfl_sync(kAllLanes, splits, owner),
                 __shfl_sync(kAllLanes, first_taken, owner) + kept * (first + owner)};
      }
      before += __shfl_sync(kAllLanes, behind, kWarpSize - 1);
    }
    return share;
  }
};
