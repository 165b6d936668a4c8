// The queue of values, emptied: weights as digits, and their products with the rows.

#include "worker.cuh"

// Round a weight to a multiple of largest / kLargestWeight, leave the multiple's digits, and say what
// was lost.
__device__ __forceinline__ float Worker::round_weight(
    u16* digits, float weight, float largest, float& lost) const {
  const float per_unit = kLargestWeight * reciprocal_fast(fmaxf(largest, 0x1p-110f));
  // 1.5 2^23 + n + 128 as a float has n + 128 in its low bits, whatever the sign of n (mma.cuh).
  constexpr float kMagic = 0x1.8p23f + 128.0f;
  const float number = fmaf(weight, per_unit, kMagic);
  digits[weight_slot(lane)] = static_cast<u16>(__float_as_uint(number));
  const float unit = largest * (1.0f / kLargestWeight);
  lost = fmaf(kMagic - number, unit, weight);
  return (number - kMagic) * unit;
}

__device__ __forceinline__ void Worker::add_values() {
  arrive();
  const bool valid = lane < queued_values;
  const int planes = valid ? mine.values.planes[lane] : 0;
  float scaled[kGroup], largest[kHeads] = {};
  load_heads(scaled, mine.values.weight[lane]);
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    if (!valid) scaled[g] = 0.0f;
    // Non-negative floats are ordered like their bits, NaN last.
    largest[g] = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(scaled[g])));
  }
  // Half a unit of rounding times the largest prefix is an addend like any other: where that is above
  // theta, what rounding loses gets digits of its own.
  float coarse[kGroup];
  load_heads(coarse, block.constants[kCoarse]);
  bool has_fine_weights = false;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) has_fine_weights |= largest[g] > coarse[g];
  // What digits of offset binary stand for: their middle, less half the range.
  const float offset = 0.5f * step_of(planes) - (0.5f + kHalfRange);
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    float lost;
    float rounded = round_weight(mine.weights[g], scaled[g], largest[g], lost);
    if (has_fine_weights) {
      const u32 bits = __float_as_uint(lost) & 0x7fffffffu;
      const float most = __uint_as_float(__reduce_max_sync(kAllLanes, bits));
      if (lane == 0) mine.fine_scales[g] = most * (1.0f / kLargestWeight);
      rounded += round_weight(mine.fine_weights[g], lost, most, lost);
    }
    // All other sums have the weight as it was.
    sums.add_rounding(g, lost);
    offsets[g] = fmaf(rounded, offset, offsets[g]);
  }
  value_rows[0] = (2u << (queued_values - 1)) - 1;
#pragma unroll
  for (int n = 2; n <= kStoredPlanes; ++n) {
    value_rows[n - 1] = n == 2 || value_rows[1] ? __ballot_sync(kAllLanes, planes >= n) : 0;
  }
  __syncwarp();
  load_weights(mine.weights);
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    const float* of = largest + 4 * b;
    weight_scale[b] = (c == 0 ? of[0] : c == 1 ? of[1] : c == 2 ? of[2] : of[3]) *
                      (1.0f / kLargestWeight);
  }
#pragma unroll 1
  for (bool is_fine = false;; is_fine = true) {
    unrolled<0, kPieces>([&](auto piece) { add_piece<decltype(piece)::value>(); });
    if (is_fine || !has_fine_weights) break;
    load_weights(mine.fine_weights);
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) weight_scale[b] = mine.fine_scales[4 * b + c];
  }
  __syncwarp();
  if (value_rows[1]) clear_second_values();
  queued_values = 0;
}

// Rows without a second plane are zeros there.
__device__ __forceinline__ void Worker::clear_second_values() {
  float4* rows = reinterpret_cast<float4*>(mine.values.second);
  for (int i = lane; i < static_cast<int>(sizeof mine.values.second) / 16; i += 32) {
    rows[i] = make_float4(0, 0, 0, 0);
  }
  __syncwarp();
}

// Digits of weights as operands: high ones are bytes 1 and 3 of a pair, low ones bytes 0 and 2, 128 too
// large.
__device__ __forceinline__ void Worker::load_weights(const u16 (*numbers)[kTile + 16]) {
  const bool low = r % 2;
  const u32 select = low ? 0x6420 : 0x7531, sign = low ? 0x80808080u : 0;
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const u16* of_lane = numbers[4 * b + r / 2] + 4 * c + 16 * k;
      const uint2 four = *reinterpret_cast<const uint2*>(of_lane);
      weights[b][k] = __byte_perm(four.x, four.y, select) ^ sign;
    }
  }
}

// One piece: the first two planes, whose rows are in shared memory, and those behind.
template <int kPiece>
__device__ __forceinline__ void Worker::add_piece() {
  constexpr int kCount = kPieceChannels<kPiece>;
  const u8* first = mine.values.first + c * kPlaneRowBytes[0];
  const u8* second = mine.values.second + c * kPlaneRowBytes[1];
  const int swizzle1 = value_swizzle<kWidths[0]>(c), swizzle2 = value_swizzle<kWidths[1]>(c);
  int d[kHeadBlocks][4][4], product[kHeadBlocks][kCount][2];
  value_products<kWidths[0], kPiece>(
      d,
      [&](int i, bool upper) {
        return value_word<kWidths[0], kPiece>(
            first + i * 4 * kPlaneRowBytes[0], swizzle1, r, upper);
      },
      weights);
  float scale = 1.0f;
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      product[b][j][0] = joined(d[b][j][0], d[b][j][1]);
      product[b][j][1] = joined(d[b][j][2], d[b][j][3]);
    }
  }
  if (value_rows[1]) {
    // Together below 2^31: 32 tokens, weights up to kLargestWeight, digits up to 255, 16-fold.
    static_assert(u64{32} * kLargestWeight * 255 * 16 < u64{1} << 31);
    value_products<kWidths[1], kPiece>(
        d,
        [&](int i, bool upper) {
          return value_word<kWidths[1], kPiece>(
              second + i * 4 * kPlaneRowBytes[1], swizzle2, r, upper);
        },
        weights);
    scale = 1.0f / (1 << kWidths[1]);
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        constexpr int kFiner = 1 << kWidths[1];
        product[b][j][0] = product[b][j][0] * kFiner + joined(d[b][j][0], d[b][j][1]);
        product[b][j][1] = product[b][j][1] * kFiner + joined(d[b][j][2], d[b][j][3]);
      }
    }
  }
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    const float lower = weight_scale[b] * scale, upper = lower * (1.0f / 16);
    float* out = output[b] + 8 * kPiece;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      out[2 * j] = fmaf(lower, static_cast<float>(product[b][j][0]), out[2 * j]);
      out[2 * j + 1] = fmaf(upper, static_cast<float>(product[b][j][1]), out[2 * j + 1]);
    }
  }
  unrolled<2, kStoredPlanes>([&](auto plane) {
    constexpr int kPlane = decltype(plane)::value;
    if (value_rows[kPlane]) add_late_values<kPlane, kPiece>();
  });
}

// A piece of a third or later plane, straight from the cache: few rows have one.
template <int kPlane, int kPiece>
__device__ __forceinline__ void Worker::add_late_values() {
  constexpr int kWidth = kWidths[kPlane];
  const u8* plane = a.cache.value_planes[kPlane];
  int d[kHeadBlocks][4][4];
  value_products<kWidth, kPiece>(
      d,
      [&](int i, bool upper) {
        const int row = c + 4 * i;
        if (!(value_rows[kPlane] >> row & 1)) return 0u;
        return value_word<kWidth, kPiece>(
            plane + row_index(a.cache, sequence, head, mine.values.token[row]) * kPlaneRowBytes[kPlane],
            0, r, upper);
      },
      weights);
  constexpr float kScale = 1.0f / (1 << gain(kPlane + 1)), kUpper = kDigitsPerProduct<kWidth>;
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    const float lower = weight_scale[b] * kScale, upper = lower * kUpper;
    float* out = output[b] + 8 * kPiece;
#pragma unroll
    for (int j = 0; j < kPieceChannels<kPiece>; ++j) {
      out[2 * j] = fmaf(lower, static_cast<float>(joined(d[b][j][0], d[b][j][1])), out[2 * j]);
      out[2 * j + 1] =
          fmaf(upper, static_cast<float>(joined(d[b][j][2], d[b][j][3])), out[2 * j + 1]);
    }
  }
}
