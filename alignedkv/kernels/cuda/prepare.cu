// Everything of a step that is done once per KV head: append the new token, turn the queries, and
// leave a `Query` for the blocks of decode.cu, which start while this kernel still runs.
//
// Grid (Hkv, B), one block a KV head.

#include "append.cuh"
#include "arguments.cuh"
#include "copies.cuh"
#include "near.cuh"
#include "query.cuh"
#include "turn.cuh"

extern "C" __global__ void __launch_bounds__(kPrepareWarps * 32) prepare(
    const __grid_constant__ DecodeArguments a) {
  __shared__ PrepareShared shared;
  const int warp = threadIdx.x / 32, kv_head = blockIdx.x, sequence = blockIdx.y;
  const int lane = lane_of_thread();
  const i64 of_head = head_index(a.cache, sequence, kv_head);
  await_previous_kernel();
  release_next_kernel();

  float x[kPerLane];  // what the warp has to work on first
  if (warp < kGroup) load_query(x, a, of_head, 0, warp);
  if (warp >= kQueryWarps && a.rows.tokens == 1) {
    load_row<kRowDtype>(x, new_row(a, sequence, kv_head, warp - kQueryWarps));
  }
  const int before = a.cache.lengths[sequence], length = before + a.rows.tokens;
  const u32 step = *a.state.step;
  const bool fits = !overfull(a.cache, length);
  const Range range = Range::of(a.cache.starts[sequence], fits ? length : 0, a.step.window);
  NearRows near = {};
  if (kUsesNearRows && warp < kNearTiles) {
    near = NearRows::of(range, warp);
    near.fetch(a.cache, sequence, kv_head, shared.tiles[warp]);
  }
  __syncthreads();  // all threads of the block have read the length and the step
  if (warp >= kQueryWarps) {
    const int side = warp - kQueryWarps;
    // When all blocks of a sequence have read its length, and all blocks the counter of steps, the
    // last may advance them.
    if (side == 0 && lane == 0) {
      if (atomicAdd(a.workspace.prepared + sequence, 1) == gridDim.x - 1) {
        a.workspace.prepared[sequence] = 0;
        if (fits) a.cache.lengths[sequence] = length;
      }
    }
    if (side == 1 && lane == 0) {
      if (atomicAdd(a.workspace.all_prepared, 1) == gridDim.x * gridDim.y - 1) {
        *a.workspace.all_prepared = 0;
        *a.state.step = step + 1;
      }
    }
    if (lane < kStoredPlanes) {
      a.result.reads[(of_head * 2 + side) * kStoredPlanes + lane] = 0;
    }
    if (a.rows.tokens == 1 && fits) {
      append(x, a, shared.words[side], sequence, kv_head, side, before, length);
    }
    return;
  }
  if (threadIdx.x == 32 * (kQueryWarps - 1)) {
    shared.query.length = fits ? length : -1;
    shared.query.stream =
        mix(mix(mix(a.step.seed + kSpread) ^ step) ^ static_cast<u32>(of_head));
  }
#pragma unroll 1
  for (int part = 0; part < kSubgroups; ++part) {
    if (part > 0) await_query_warps();  // the part before has been left
    // Known from the step before; wanted when the near rows are summed.
    const i64 of_part = of_head * kSubgroups + part, query_head = of_part * kGroup + threadIdx.x;
    float rest = 0, log_z = 0, spread = 0;
    if (threadIdx.x < kGroup) {
      if constexpr (kUsesNearRows) {
        rest = a.state.rest[query_head];
      } else {
        log_z = a.state.log_z[query_head], spread = a.state.spread[query_head];
      }
    }
    turn_queries(x, a, shared, of_head, part, warp);
    await_copies<0>();  // of near rows
    await_query_warps();
    if constexpr (kUsesNearRows) {
      if (warp < kNearTiles) near.add_up(a, shared.query, shared.tiles[warp], shared.near[warp]);
      await_query_warps();
      if (threadIdx.x < kGroup) set_hint(a, shared.near, shared.query, rest, threadIdx.x);
    } else if (threadIdx.x < kGroup) {
      shared.query.numbers[kLogZ][threadIdx.x] = log_z;
      shared.query.numbers[kToldSpread][threadIdx.x] = spread;
    }
    await_query_warps();
    uint4* to = reinterpret_cast<uint4*>(a.workspace.queries + of_part * sizeof(Query));
    const uint4* from = reinterpret_cast<const uint4*>(&shared.query);
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(Query)) / 16; i += 32 * kQueryWarps) {
      to[i] = from[i];
    }
  }
}
