// One decode step of attention over digit planes (theory.md 9), split over the tokens.
//
// A head here is a subgroup of the queries of a KV head (spec.py); blocks share the heads by their work
// (share.cuh).  A warp works alone on tiles of 32 tokens (worker.cuh).  The last block of a head merges
// (finish.cuh).

#include "answer.cuh"
#include "arguments.cuh"
#include "bounds.cuh"
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

// What the hints of a head make of its numbers.
__device__ __forceinline__ void set_constants(
    const DecodeArguments& a, DecodeShared& shared, const Query& query, i64 of_head, int g) {
  const i64 query_head = of_head * kGroup + g;
  const float infinity = __int_as_float(0x7f800000);
  // A repair knows what the pass before it found; the settled rule must not.
  const bool as_told = kSettled || a.pass == 0;
  const float log_z = as_told ? query.numbers[kLogZ][g] : a.state.log_z[query_head];
  const float spread = kSettled ? query.numbers[kToldSpread][g] : a.state.spread[query_head];
  float theta = a.pass == 0 ? a.state.theta[query_head] : a.workspace.retry_theta[query_head];
  if (a.pass > 0 && a.pass == a.step.repairs) theta = 0.0f;
  const bool known = fabsf(log_z) < infinity;
  if (!known || theta == infinity) shared.trusted = false;  // a probe knows nothing yet
  const float hint = known ? log_z * kLog2e : 0.0f;
  const float deviation = query.numbers[kDeviation][g], worst = query.numbers[kWorst][g];
  const float error = (kCertain ? worst : deviation) / theta;
  float(&to)[kConstants][kHeads] = shared.constants;
  to[kHint][g] = hint;
  to[kOffset][g] = kSoftcap ? query.numbers[kBase][g] : query.numbers[kBase][g] - hint;
  const float margin = kSettled ? a.step.deviations : a.step.plan_margin;
  to[kMargin][g] = margin * kLog2e * deviation;
  to[kReachSize][g] = kHalfRange * error;
  to[kReachSpread][g] = spread * error;
  constexpr float kOfPlane = kCertain ? 0.5f : 0.288675135f;
  to[kValueGain][g] = log2_fast(kOfPlane / theta);
  const float share = a.step.skip_share * (kSampleValues ? kSamplingFactor : 1.0f);
  shared.skip_gain = share > 0 ? log2_fast(kHalfRange / (share * kOfPlane)) : infinity;
  to[kError][g] = kCertain ? worst : deviation * deviation;
  // A probe's weights are too large for any unit, as it were.
  const float unit = theta < infinity ? theta * (1.0f / kUnitsInTheta) : 0.0f;
  to[kWeightUnit][g] = fminf(fmaxf(unit, 0x1p-100f), 0x1p100f);
  to[kPerWeightUnit][g] = 1.0f / to[kWeightUnit][g];
  to[kErrorMore][g] = kCertain ? query.numbers[kShift][g] : spread;
  // Non-negative floats are ordered like their bits.
  atomicMax(reinterpret_cast<u32*>(&shared.largest_square), __float_as_uint(deviation * deviation));
  shared.theta[g] = theta;
  shared.sampling_share = share;
}

// A head's queries, what its hints make of them, and the tokens they attend to.
__device__ __forceinline__ void load_query(
    const DecodeArguments& a, DecodeShared& shared, i64 of_head, int start) {
  const Query& query = reinterpret_cast<const Query*>(a.workspace.queries)[of_head];
  const u8* from = reinterpret_cast<const u8*>(&query);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(Query)) / 16; i += kThreads) {
    copy_async<16>(shared_address(&shared.query) + 16 * i, from + 16 * i);
  }
  commit_copies();  // a wait is for committed copies only
  if (threadIdx.x == 32) shared.range = Range::of(start, query.length, a.step.window);
  if (threadIdx.x >= 32) return;
  if (threadIdx.x == 0) shared.trusted = true, shared.largest_square = 0;
  __syncwarp();
  if (threadIdx.x < kGroup) set_constants(a, shared, query, of_head, threadIdx.x);
}

// How much work a head made, for the shares of the next step: rows read, of all planes.  A head a thread;
// where there are more, each has a block or two and no choice.
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
#pragma unroll
    for (int g = 0; g < kGroup; ++g) a.state.work[thread * kGroup + g] = sum;
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSm) decode(
    const __grid_constant__ DecodeArguments a) {
  extern __shared__ __align__(128) u8 memory[];
  DecodeShared& shared = *reinterpret_cast<DecodeShared*>(held_address(memory));
  const int warp = uniform(threadIdx.x / 32), lane = lane_of_thread();
  const int block = blockIdx.x, blocks = gridDim.x, heads = a.heads;
  const bool again = a.pass > 0;
  const u32* missed = again ? a.workspace.retry + (a.pass - 1) % 2 * heads : nullptr;
  if (again) {
    await_previous_kernel();
    // A head that is not read again does not miss again.
    if (block < heads && !missed[block] && threadIdx.x == 0) missed_now(a, heads)[block] = 0;
  }
  // Told before it is known whether there is anything to do: both wait for memory.
  const bool tells = a.pass == 1 && a.by_work && block == blocks - 1;
  RowsRead rows_read;
  if (tells) rows_read.fetch(a, missed, threadIdx.x);
  Share share = Share::even(heads, block, blocks);
  if (again || a.by_work) {
    if (warp == 0) {
      share = Share::of(heads, block, blocks, [&](int head) {
        if (again) return load_past_l1(missed + head) ? 1.0f : 0.0f;
        const float work = load_past_l1(a.state.work + head * kGroup);
        // A wrong hint must not cost a head its blocks.
        return work > 0 ? fminf(work, 0x1p40f) : 1.0f;
      });
      if (lane == 0) shared.share = share;
    }
    if (tells) rows_read.tell(a, threadIdx.x);
    __syncthreads();
    share = shared.share;
  } else if (threadIdx.x == 0) {
    shared.share = share;
  }
  const int of_head = uniform(share.head), split = uniform(share.split);
  const int splits = uniform(share.splits);
  if (splits == 0) return;
  Worker worker(a, shared, of_head, warp);

  // The first tiles whose rows are older than this step need not wait for prepare.cu.
  bool fetched[kKeyStages] = {};
  const int start = a.cache.starts[worker.sequence];
  if (!again && a.step.window == 0 && kStridedTiles) {
    // prepare.cu may or may not have counted the new token: rows before both are safe.
    const int length = min(a.cache.lengths[worker.sequence], a.cache.capacity);
    const Range range = Range::of(start, length, 0);
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
  // Of heads that do not exist.
  for (int i = threadIdx.x; i < kConstants * (kHeads - kGroup); i += kThreads) {
    shared.constants[i / max(kHeads - kGroup, 1)][kGroup + i % max(kHeads - kGroup, 1)] = 0;
  }
  if (!again) await_previous_kernel();
  load_query(a, shared, of_head, start);
  await_copies<0>();
  __syncthreads();
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
