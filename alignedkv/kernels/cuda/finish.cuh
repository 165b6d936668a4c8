// The end of a block: what it leaves for its head, and, for the head's last block, the merge.

#include "leave.cuh"
#include "merge.cuh"

// Whether heads missed in this pass.
__device__ __forceinline__ u32* missed_now(const DecodeArguments& a, int heads) {
  return a.workspace.retry + a.pass % 2 * heads;
}

// A tile takes about as long as so many rows do, each of which wants a second plane of its key or its
// value.
constexpr u32 kRowsPerTile = 40;

__device__ __forceinline__ void finish(const DecodeArguments& a, DecodeShared& shared, Worker& worker) {
  const Share share = shared.share;
  const int thread = thread_index(), warp = uniform(thread / 32), lane = thread % 32;
  const int heads = gridDim.y;
  const bool again = a.pass > 0;
  const int block = blockIdx.y * gridDim.x + blockIdx.x;
  Partial& part = reinterpret_cast<Partial*>(a.workspace.partials)[block];
  const Partial* parts = &part - share.split;
  __syncthreads();
  set_warp_factors(shared, part);
  __syncthreads();
  leave_outputs(worker, shared, part);
  leave_block_sums(shared, part);
  u32* reads = a.result.reads + share.head / kSubgroups * 2 * kStoredPlanes;
  if (thread_index() < 2 * kStoredPlanes && shared.reads[thread_index()]) {
    atomicAdd(reads + thread_index(), shared.reads[thread_index()]);
  }
  __syncthreads();
  if (thread_index() == 0) {
    if (kShareByWork && !again) {
      atomicAdd(a.workspace.work_so_far + share.head,
                shared.reads[1] + shared.reads[kStoredPlanes]);
    }
    __threadfence();
    shared.is_last = atomicAdd(a.workspace.arrived + share.head, 1) == share.splits - 1;
    __threadfence();
  }
  __syncthreads();
  if (!shared.is_last) return;

  Merge& merge = *reinterpret_cast<Merge*>(shared.tiles);
  const i16* dither = dither_row(a.cache, 1, 0);
  DitherShare entries;
  if (thread_index() < kShares * kChannels) {
    entries.fetch(dither, thread_index() / kChannels * kSharedClasses, thread_index() % kChannels);
  }
  PartColumns columns;
  if (thread_index() < kColumns) columns.fetch(parts, thread_index(), 0, share.splits);
  Before before;
  if (warp < kGroup) before.fetch(a, share.head, warp);
  u32 work = 0;
  if (kShareByWork && thread_index() == 0) work = load_past_l1(a.workspace.work_so_far + share.head);
  set_factors(merge.factor, merge.whole, parts, share.splits);
  __syncthreads();
  sum_parts(merge.whole, parts, columns, merge.factor, share.splits);
  __syncthreads();
  correct_dither(merge, dither, entries);
  if (thread_index() == 0) {
    a.workspace.arrived[share.head] = 0;
    if (kShareByWork && !again) {
      a.workspace.work[share.head] = work + kRowsPerTile * shared.range.tiles();
      a.workspace.work_so_far[share.head] = 0;
    }
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
  if (thread_index() == 0) missed_now(a, heads)[share.head] = shared.is_last;
}
