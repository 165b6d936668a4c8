// One decode step of attention over digit planes (theory.md 9), split over the tokens.
//
// A head here is a subgroup of the queries of a KV head (spec.py); blocks share the heads by their work
// (share.cuh).  A warp works alone on tiles of 32 tokens (worker.cuh).  The last block of a head merges
// (finish.cuh).

#include "answer.cuh"
#include "arguments.cuh"
#include "bounds.cuh"
#include "constants.cuh"
#include "copies.cuh"
#include "mma.cuh"
#include "products.cuh"
#include "query.cuh"
#include "rows.cuh"
#include "tiles.cuh"
#include "worker.cuh"
#include "settled_rule.cuh"
#include "open.cuh"
#include "refine.cuh"
#include "settle.cuh"
#include "values.cuh"
#include "leave.cuh"
#include "finish.cuh"

// ---- the kernel -----------------------------------------------------------------------------------

// A head's queries with what its hints make of them, and the tokens they attend to.
__device__ __forceinline__ void load_query(
    const DecodeArguments& a, DecodeShared& shared, i64 of_head, int start) {
  const Query& query = reinterpret_cast<const Query*>(a.workspace.queries)[of_head];
  const u8* from = reinterpret_cast<const u8*>(&query);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(Query)) / 16; i += kThreads) {
    copy_async<16>(shared_address(&shared.query) + 16 * i, from + 16 * i);
  }
  commit_copies();  // a wait is for committed copies only
  if (threadIdx.x == 0) shared.range = Range::of(start, query.length, a.step.window);
}

// Hints of a repair: what the pass before has found, but for the settled rule, which must not know it.
__device__ __forceinline__ void hint_repair(
    const DecodeArguments& a, Query& query, i64 of_head, int g) {
  const i64 query_head = of_head * kGroup + g;
  const bool is_last = a.pass == a.step.repairs;
  if (!kSettled) query.numbers[kLogZ][g] = a.state.log_z[query_head];
  const float spread = kSettled ? query.numbers[kToldSpread][g] : a.state.spread[query_head];
  set_constants(a.step, query, is_last ? 0.0f : a.workspace.retry_theta[query_head], spread, g);
  set_hint_constants(query, g);
}

// How much work a head made, for the shares of the next step: rows read, of all planes.  One head a
// thread; of those behind nothing is told.
struct RowsRead {
  u32 of_plane[2 * kStoredPlanes], missed;

  __device__ __forceinline__ void fetch(const DecodeArguments& a, const u32* all_missed, int thread) {
    const int head = min(thread, a.heads - 1);
    missed = load_past_l1(all_missed + head);
    const u32* reads = a.result.reads + head / kSubgroups * 2 * kStoredPlanes;
#pragma unroll
    for (int i = 0; i < 2 * kStoredPlanes; ++i) of_plane[i] = load_past_l1(reads + i);
  }
  // Of a head that is about to be read again it is not known yet.
  __device__ __forceinline__ void tell(const DecodeArguments& a, int thread) const {
    if (thread >= a.heads || missed) return;
    u32 sum = 0;
#pragma unroll
    for (u32 rows : of_plane) sum += rows;
    a.workspace.work[thread] = sum;
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSm) decode(
    const __grid_constant__ DecodeArguments a) {
  extern __shared__ __align__(128) u8 memory[];
  DecodeShared& shared = *reinterpret_cast<DecodeShared*>(held_address(memory));
  const int warp = uniform(threadIdx.x / 32), lane = lane_of_thread();
  const int block = blockIdx.x, blocks = gridDim.x, heads = a.heads;
  const bool again = a.pass > 0;
  // Often of the only sequence: no need to wait for the share.
  const int first_start = a.cache.starts[0], first_length = a.cache.lengths[0];
  const u32* missed = again ? a.workspace.retry + (a.pass - 1) % 2 * heads : nullptr;
  if (again) {
    await_previous_kernel();
    // A head that is not read again does not miss again.
    if (block < heads && !missed[block] && threadIdx.x == 0) missed_now(a, heads)[block] = 0;
  }
  // Told before it is known whether there is anything to do: both wait for memory.
  const bool tells = a.pass == 1 && block == blocks - 1;
  RowsRead rows_read;
  if (tells) rows_read.fetch(a, missed, threadIdx.x);
  // Blocks on whose processor prepare.cu runs start when it has ended, and find their share there.
  const int late = again ? -1 : block - (blocks - a.late);
  if (late >= 0) await_previous_kernel();
  if (warp == 0) {
    if (late >= 0) {
      shared.share = reinterpret_cast<const Share*>(a.workspace.late_shares)[late];
    } else {
      shared.share = Share::of(heads, block, blocks, [&](int head) {
        return again ? (load_past_l1(missed + head) ? 1.0f : 0.0f) : work_of_head(a, head);
      });
    }
  }
  if (tells) rows_read.tell(a, threadIdx.x);
  __syncthreads();
  const int of_head = uniform(shared.share.head), split = uniform(shared.share.split);
  const int splits = uniform(shared.share.splits);
  if (splits == 0) return;
  Worker worker(a, shared, of_head, warp);

  const int start = worker.sequence == 0 ? first_start : a.cache.starts[worker.sequence];
  // The first tiles whose rows are older than this step need not wait for prepare.cu.
  bool fetched[kKeyStages] = {};
  if (!again && a.step.window == 0 && kStridedTiles) {
    // prepare.cu may or may not have counted the new token: rows before both are safe.
    const int length = worker.sequence == 0 ? first_length : a.cache.lengths[worker.sequence];
    const Range range = Range::of(start, min(length, a.cache.capacity), 0);
    const Course course = Course::of(range, split, splits, warp);
#pragma unroll
    for (int stage = 0; stage < kKeyStages; ++stage) {
      const int token = Course::tile_at(course.token + stage * course.step);
      if (token + kTile < range.end) {
        worker.fetch(range, token, stage);
        fetched[stage] = true;
      }
    }
  }
  float4* classes = reinterpret_cast<float4*>(shared.classes[warp]);
  for (int i = lane; i < kOwnClasses * kHeadBlocks; i += 32) classes[i] = make_float4(0, 0, 0, 0);
  if (lane < kHeads) shared.reference[warp][lane] = kNever;
  if (threadIdx.x < 2 * kStoredPlanes) shared.reads[threadIdx.x] = 0;
  if (!again) await_previous_kernel();
  load_query(a, shared, of_head, start);
  await_copies<0>();
  __syncthreads();
  if (again) {
    if (threadIdx.x < kGroup) hint_repair(a, shared.query, of_head, threadIdx.x);
    __syncthreads();
  }
  const Range& range = shared.range;  // read again where it is needed: registers are scarce
  const Course course = Course::of(range, split, splits, warp);
#pragma unroll
  for (int stage = 0; stage < kKeyStages; ++stage) {
    const int place = course.token + stage * course.step;
    if (place < course.end && !fetched[stage]) {
      worker.fetch(range, Course::tile_at(place), stage);
    }
    commit_copies();
  }
  await_copies<0>();
  __syncwarp();
  if (lane == 0) shared.first_block[warp] = course.first_block();
  if constexpr (kSettled) worker.start_sums(worker.sums);
  worker.run(range, course);

  release_next_kernel();
  if constexpr (kExactRows) worker.add_exact_rows(range, shared.share.split, shared.share.splits);
  finish(a, shared, worker);
}
