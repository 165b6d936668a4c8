// Everything of a step that is done once per KV head: append the new token, turn the queries, and
// leave a `Query` for the blocks of decode.cu, which start while this kernel still runs.
//
// Grid (Hkv, B), one block a KV head.

#include "arguments.cuh"
#include "copies.cuh"
#include "mma.cuh"
#include "near.cuh"
#include "query.cuh"
#include "rows.cuh"
#include "warps.cuh"

// Warps that turn queries and look at near rows, one that encodes the new key, one the new value.
constexpr int kQueryWarps = 8;
constexpr int kPrepareWarps = kQueryWarps + 2;
static_assert(kGroup <= kQueryWarps, "a warp turns one query at first");
static_assert(kNearTiles <= kQueryWarps, "a warp looks at one tile of near rows");
static_assert(kDitherRows % 16 == 0, "dither rows are multiplied 16 at a time");

struct PrepareShared {
  Query query;  // of the part of the group in hand
  i16 numbers[kHeads][kChannels];  // q' in units of its largest over kLargestNumber
  float unit[kHeads];
  float sum[kHeads];
  Words words[2];
  NearSums near[kNearTiles];
  NearTile tiles[kUsesNearRows ? kNearTiles : 1];
};
static_assert(sizeof(PrepareShared) <= 48 * 1024);

// Wait for the warps that turn queries, not for those that encode.
__device__ __forceinline__ void await_query_warps() {
  asm volatile("bar.sync 1, %0;" :: "n"(32 * kQueryWarps) : "memory");
}

// Bring what no kernel before this one has written close, while that one still runs.
__device__ __forceinline__ void touch(const void* from, int bytes) {
  for (int i = 128 * threadIdx.x; i < bytes; i += 128 * 32 * kPrepareWarps) {
    u32 word;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(word) : "l"(static_cast<const u8*>(from) + i));
  }
}

// Query head g of a part of a KV head's group.
__device__ __forceinline__ void load_query(
    float (&x)[kPerLane], const DecodeArguments& a, i64 of_head, int part, int g) {
  load_row<kQueryDtype>(x, a.query + ((of_head * kSubgroups + part) * kGroup + g) * kHeadDim);
}

// One warp: query head g, in x -> its numbers and 16-bit integers.
__device__ void turn_query(
    float (&x)[kPerLane], const DecodeArguments& a, PrepareShared& shared, i64 of_head, int g) {
  const int lane = lane_of_thread();
  float base = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int c = channel(i, lane);
    if (c < kHeadDim) base += x[i] * a.cache.key_mean[of_head * kHeadDim + c];
  }
  transform_query(x, a.cache, of_head);
  float largest = 0, norm1 = 0, norm2 = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    largest = fmaxf(largest, fabsf(x[i]));
    norm1 += fabsf(x[i]);
    norm2 += x[i] * x[i];
  }
  largest = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(largest)));
  const float unit = fmaxf(largest, 1e-30f) * (1.0f / kLargestNumber), inverse = 1.0f / unit;
  float rounding = 0;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int n = min(max(__float2int_rn(x[i] * inverse), -kLargestNumber), kLargestNumber);
    shared.numbers[g][channel(i, lane)] = static_cast<i16>(n);
    rounding += fabsf(x[i] - unit * n);
    sum += n;
  }
  const float parts[4] = {base, norm1, norm2, rounding};
  const float total = warp_sums(parts);
  base = __shfl_sync(kAllLanes, total, 0), norm1 = __shfl_sync(kAllLanes, total, 1);
  norm2 = sqrtf(__shfl_sync(kAllLanes, total, 2)), rounding = __shfl_sync(kAllLanes, total, 3);
  sum = __reduce_add_sync(kAllLanes, sum);
  if (lane != 0) return;

  const float lambda = a.step.scaling;
  const float in_score = kSoftcap ? 1.0f / a.step.softcap : kLog2e;
  const float unit_score = lambda * unit * in_score;
  shared.unit[g] = unit_score;
  shared.sum[g] = static_cast<float>(sum);
  // theory.md (3.1), in units of g = 4096 f, and (7.1); gamma_n = n u.
  constexpr float kUnitRoundoff = 0x1p-24f, kRootC = kChannels == 64 ? 8.0f : 16.0f;
  constexpr float kStages = 9.0f;  // log2 of a Hadamard block, plus one, at most
  const float encoder =
      ((0x1p-5f + 0x1p-8f) * norm1 + 0.002f * kStages * kRootC * norm2) * 0x1p-12f;
  const float arithmetic =
      8.5f * (rounding + kUnitRoundoff * (9.0f * norm1 + kStages * kRootC * norm2));
  const float slack = 1.0f + 0x1p-16f;  // the sums above are rounded themselves
  float(&numbers)[kNumbers][kHeads] = shared.query.numbers;
  numbers[kUnit16][g] = unit_score * (1.0f / 16);
  numbers[kHalf][g] = unit_score * sum;
  numbers[kBase][g] = lambda * base * in_score;
  numbers[kDeviation][g] = lambda * norm2 * slack * 0.288675135f;  // 1 / (2 sqrt 3)
  numbers[kWorst][g] = lambda * norm1 * slack * 0.5f;
  numbers[kShift][g] = lambda * slack * (encoder + arithmetic);
}

// Four channels of a query column as its high or low digits.
__device__ __forceinline__ u32 digit_word(const i16* numbers, bool low) {
  u32 word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 digits = static_cast<u32>(numbers[i] + (low ? 0 : 128));
    word |= ((low ? digits : digits >> 8) & 0xff) << (8 * i);
  }
  return word;
}

// Half of a row's scales: the key's is the lower one.
__device__ __forceinline__ void store_scale(const Cache& cache, u32 row, int side, u32 scale_bits) {
  reinterpret_cast<u16*>(cache.scales + row)[side] = static_cast<u16>(scale_bits);
}

// The key (side 0) or the value (side 1) of the new token.
__device__ __forceinline__ const RowBits* new_row(
    const DecodeArguments& a, int sequence, int head, int side) {
  const auto& strides = side == 0 ? a.rows.key_strides : a.rows.value_strides;
  return (side == 0 ? a.rows.keys : a.rows.values) + sequence * strides[0] + head * strides[1];
}

// One warp: append it, in x, as `encode_token` of rows.cuh does one side after the other.
__device__ void append(float (&x)[kPerLane], const DecodeArguments& a, Words& words, int sequence,
                       int head, int side, int token, int length) {
  const Cache& cache = a.cache;
  const i64 of_head = head_index(cache, sequence, head);
  const u32 row = HeadRows(cache, sequence, head).of(token);
  if (side == 0) {
    transform_key(x, cache, of_head);
  } else {
    centre_value(x, cache, of_head);
  }
  const u32 scale = encode_row(x, dither_row(cache, side, dither_class(token)), words);
  store_planes(words, side == 0 ? cache.key_planes : cache.value_planes, row);
  if (lane_of_thread() == 0) store_scale(cache, row, side, scale);
  if constexpr (kExactRows) {
    const int slot = exact_slot(cache, token, cache.starts[sequence], length);
    if (slot < 0) return;
    const RowBits* from = new_row(a, sequence, head, side);
    RowBits* to = (side == 0 ? cache.exact_keys : cache.exact_values) +
                  exact_offset(cache, of_head, slot);
    for (int c = lane_of_thread(); c < kHeadDim; c += kWarpSize) to[c] = from[c];
  }
}

// 16 dither rows, as a lane multiplies them: rows r and r + 8 of each slot.
struct DitherRows {
  uint2 entries[kSlots][2];

  __device__ __forceinline__ void fetch(const i16* dither, int first_row) {
    const int r = lane_of_thread() / 4, c = lane_of_thread() % 4;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const i16* row = dither + (first_row + r + 8 * k) * kChannels;
        entries[s][k] = *reinterpret_cast<const uint2*>(row + slot_channel(s, c));
      }
    }
  }
};

// 16 dither rows times the queries of four heads -> what a class adds to a score, per unit of g:
// 7.5 for the middle of the first digit and the offset of the words, and the dither itself.
__device__ __forceinline__ void class_products(
    const DitherRows& rows, PrepareShared& shared, int first_row, int block) {
  const int lane = lane_of_thread(), r = lane / 4, c = lane % 4;
  int high[4] = {}, low[4] = {};
#pragma unroll
  for (int s = 0; s < kSlots; s += 2) {
    u32 upper[4], lower[4], q[2];
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // a0 .. a3: row r + 8 (k % 2), slot s + k / 2
      const uint2 entries = rows.entries[s + k / 2][k % 2];
      upper[k] = __byte_perm(entries.x, entries.y, 0x7531);
      lower[k] = __byte_perm(entries.x, entries.y, 0x6420);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      q[k] = shared.query.digits[block][(s + k) / kSlotVector][lane][(s + k) % kSlotVector];
    }
    multiply_add_signed(high, upper[0], upper[1], upper[2], upper[3], q[0], q[1]);
    multiply_add(low, lower[0], lower[1], lower[2], lower[3], q[0], q[1]);
  }
  const int head = 4 * block + c;
  const float unit = shared.unit[head], half = -kHalfRange * shared.sum[head];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const float product = 256.0f * joined(high[2 * k], high[2 * k + 1]) +
                          static_cast<float>(joined(low[2 * k], low[2 * k + 1]));
    constexpr float kUnitOfDither = 1.0f / (1 << (kScaleShift + kDitherFractionBits));
    shared.query.classes[first_row + r + 8 * k][head] = unit * (half - product * kUnitOfDither);
  }
}

// The warps that turn queries: digits, numbers and class products of a part of a KV head's group.
// `x`: query head `warp` of the first part.
__device__ __forceinline__ void turn_queries(
    float (&x)[kPerLane], const DecodeArguments& a, PrepareShared& shared, i64 of_head, int part,
    int warp) {
  const int lane = lane_of_thread();
  // The dither does not wait for queries.
  DitherRows rows;
  if (16 * (warp / kHeadBlocks) < kDitherRows) {
    rows.fetch(a.cache.dither, 16 * (warp / kHeadBlocks));
  }
  for (int g = kGroup + warp; g < kHeads; g += kQueryWarps) {
    for (int c = lane; c < kChannels; c += 32) shared.numbers[g][c] = 0;
    if (lane == 0) shared.unit[g] = shared.sum[g] = 0;
    if (lane < kNumbers) shared.query.numbers[lane][g] = 0;
  }
  for (int g = warp; g < kGroup; g += kQueryWarps) {
    if (part > 0 || g != warp) load_query(x, a, of_head, part, g);
    turn_query(x, a, shared, of_head, g);
  }
  await_query_warps();
  for (int i = threadIdx.x; i < kHeadBlocks * kSlots * 32; i += 32 * kQueryWarps) {
    const int block = i / (kSlots * 32), in_block = i % (kSlots * 32);
    const int slot = in_block / (32 * kSlotVector) * kSlotVector + in_block % kSlotVector;
    const int of_lane = in_block / kSlotVector % 32, column = of_lane / 4;
    const i16* numbers = shared.numbers[4 * block + column / 2] + slot_channel(slot, of_lane % 4);
    (&shared.query.digits[0][0][0][0])[i] = digit_word(numbers, column % 2);
  }
  await_query_warps();
  for (int i = warp; i < kDitherRows / 16 * kHeadBlocks; i += kQueryWarps) {
    const int first_row = i / kHeadBlocks * 16;
    if (i != warp) rows.fetch(a.cache.dither, first_row);
    class_products(rows, shared, first_row, i % kHeadBlocks);
  }
}

extern "C" __global__ void __launch_bounds__(kPrepareWarps * 32) prepare(
    const __grid_constant__ DecodeArguments a) {
  __shared__ PrepareShared shared;
  const int warp = threadIdx.x / 32, kv_head = blockIdx.x, sequence = blockIdx.y;
  const int lane = lane_of_thread();
  const i64 of_head = head_index(a.cache, sequence, kv_head);
  touch(a.cache.balance + of_head * kHeadDim, kHeadDim * 4);
  touch(a.cache.key_mean + of_head * kHeadDim, kHeadDim * 4);
  touch(a.cache.value_mean + of_head * kHeadDim, kHeadDim * 4);
  touch(a.cache.signs, kChannels * 4);
  touch(a.cache.dither, 2 * kDitherRows * kChannels * 2);
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
