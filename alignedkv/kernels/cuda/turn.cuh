// The queries of a KV head as decode.cu wants them: digits, numbers, and products with the dither rows.

#include "arguments.cuh"
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
