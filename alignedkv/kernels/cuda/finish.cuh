// The end of a block: what it leaves for its head, and, for the head's last block, the merge.

#include "answer.cuh"
#include "leave.cuh"

// Whether heads missed in this pass.
__device__ __forceinline__ u32* missed_now(const DecodeArguments& a, int heads) {
  return a.workspace.retry + a.pass % 2 * heads;
}

__device__ __forceinline__ void finish(const DecodeArguments& a, DecodeShared& shared, Worker& worker) {
  const Share share = shared.share;
  const int thread = thread_index(), warp = uniform(thread / 32), lane = thread % 32;
  const int heads = a.heads;
  Partial& part = reinterpret_cast<Partial*>(a.workspace.partials)[blockIdx.x];
  const Partial* parts = &part - share.split;
  worker.leave_sums();
  worker.leave_outputs<0>();
  __syncthreads();
  set_warp_factors(shared, part);
  __syncthreads();
  leave_block_sums(shared, part);
  leave_block_outputs<0>(shared, part);
  unrolled<1, kHeadBlocks>([&](auto head_block) {
    constexpr int kHeadBlock = decltype(head_block)::value;
    __syncthreads();
    worker.leave_outputs<kHeadBlock>();
    __syncthreads();
    leave_block_outputs<kHeadBlock>(shared, part);
  });
  u32* reads = a.result.reads + share.head / kSubgroups * 2 * kStoredPlanes;
  if (thread < 2 * kStoredPlanes && shared.reads[thread]) atomicAdd(reads + thread, shared.reads[thread]);
  __syncthreads();
  u32 arrived = 0;
  if (thread == 0) arrived = arrive(a.workspace.arrived + share.head);
  // What the last block needs, while it waits to hear that it is the last.
  const i16* dither = dither_row(a.cache, 1, 0);
  DitherShare entries;
  if (thread < kShares * kChannels) {
    entries.fetch(dither, thread / kChannels * kSharedClasses, thread % kChannels);
  }
  Before before;
  if (warp < kGroup) before.fetch(a, share.head, warp);
  if (thread == 0) shared.is_last = arrived == share.splits - 1;
  __syncthreads();
  if (!shared.is_last) return;

  Merge& merge = *reinterpret_cast<Merge*>(shared.tiles);
  PartTops tops;
  if (warp < kHeads) tops.fetch(parts, lane, share.splits, warp);
  PartColumns columns;
  columns.fetch(parts, PartColumns::first_column(), PartColumns::first_split(), share.splits);
  set_factors(merge.factor, merge.whole, parts, tops, share.splits);
  __syncthreads();
  sum_parts(merge.whole, parts, columns, merge.factor, share.splits);
  __syncthreads();
  correct_dither(merge, dither, entries);
  if (thread == 0) {
    a.workspace.arrived[share.head] = 0;
    shared.is_last = false;  // from here on: whether a head missed
    const Range& range = shared.range;
    const int exact = kExactRows ? range.exact_tokens(a.cache) : 0;
    atomicAdd(reads, max(range.end - range.first, 0) - exact);
  }
  __syncthreads();
  for (int g = warp; g < kGroup; g += kWarps) {
    if (g != warp) before.fetch(a, share.head, g);
    if (answer(a, shared, merge, before, share.head, g) && lane == 0) shared.is_last = true;
  }
  __syncthreads();
  if (thread == 0) missed_now(a, heads)[share.head] = shared.is_last;
}
