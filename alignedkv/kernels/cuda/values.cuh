// Closing a tile, second half: weights, their bound sums, and the products with values.

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

// Weights of the tile: to the sums, and as digits to the registers of the value products.
__device__ __forceinline__ void Worker::weigh() {
  if constexpr (kSampleValues) {
    float wish[kGroup], most = kNever;
    load_heads(wish, block.constants[kWanted]);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) most = fmaxf(most, score[g] + wish[g]);
    // Prefixes reach 8 row scales, sizes are 7.5.
    most += log2_fast(value_scale() / chance) + 0.0931095f;
    if (chance < 1.0f) largest_draw = fmaxf(largest_draw, most);
  }
  if (shifted) {
    float reference[kGroup];
    load_heads(reference, block.reference[warp]);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) score[g] -= reference[g];
  }
  Token token;
  token.key_scale = key_scale(), token.value_scale = value_scale();
  token.key_step = step_of(key_planes), token.value_step = step_of(value_planes);
  token.has_value = is_wanted(), token.chance = chance;
  const auto shared = Sums::shared_of(token);
  float first[kGroup], second[kGroup], classes[kGroup];  // coefficients of the bound's addends
  load_heads(first, block.constants[kError]);
  load_heads(second, block.constants[kErrorMore]);
  float* of_class = block.classes[warp][dither_class(token_of_tile + lane)];
  load_heads(classes, of_class);
  const float unit = is_wanted() ? value_scale() / (kSampleValues ? chance : 1.0f) : 0.0f;
  const float middle = 0.5f * token.value_step - 0.5f;
  float scaled[kGroup], largest[kHeads] = {};
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    const float weight = sums.add(g, score[g], shared, first[g], second[g]);
    total[g] += weight;
    scaled[g] = weight * unit;
    // Non-negative floats are ordered like their bits, NaN last.
    largest[g] = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(scaled[g])));
  }
  // Half a unit of rounding times the largest prefix is an addend like any other: where that is above
  // theta, what rounding loses gets digits of its own.
  float coarse[kGroup];
  load_heads(coarse, block.constants[kCoarse]);
  has_fine_weights = false;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) has_fine_weights |= largest[g] > coarse[g];
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
    // All sums have the rounded weight: the numerator alone differs, by what is lost now.
    sums.add_rounding(g, lost);
    classes[g] += rounded;
    if (value_rows[1]) halves[g] = fmaf(rounded, middle, halves[g]);
  }
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    float four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = 4 * b + i < kGroup ? classes[4 * b + i] : 0.0f;
    reinterpret_cast<float4*>(of_class)[b] = make_float4(four[0], four[1], four[2], four[3]);
  }
  __syncwarp();
  load_weights(mine.weights);
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    const float* of = largest + 4 * b;
    weight_scale[b] = (c == 0 ? of[0] : c == 1 ? of[1] : c == 2 ? of[2] : of[3]) *
                      (1.0f / kLargestWeight);
  }
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

// Value products of the tile that was weighed, and where it matters the same with what the rounding of
// its weights lost.
__device__ __forceinline__ void Worker::add_values(int token, int buffer) {
  if (!value_rows[0]) return;
#pragma unroll 1
  for (bool is_fine = false;; is_fine = true) {
    unrolled<0, kPieces>([&](auto piece) { add_piece<decltype(piece)::value>(token, buffer); });
    if (is_fine || !has_fine_weights) break;
    load_weights(mine.fine_weights);
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) weight_scale[b] = mine.fine_scales[4 * b + c];
  }
}

// One piece: the first two planes, whose rows are in shared memory, and those behind.
template <int kPiece>
__device__ __forceinline__ void Worker::add_piece(int token, int buffer) {
  constexpr int kCount = kPieceChannels<kPiece>;
  const u8* first = mine.value_first[buffer] + c * kPlaneRowBytes[0];
  const u8* second = mine.value_second + c * kPlaneRowBytes[1];
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
    if (value_rows[kPlane]) add_late_values<kPlane, kPiece>(token);
  });
}

// A piece of a third or later plane, straight from the cache: few rows have one.
template <int kPlane, int kPiece>
__device__ __forceinline__ void Worker::add_late_values(int token) {
  constexpr int kWidth = kWidths[kPlane];
  const u8* plane = a.cache.value_planes[kPlane];
  const TileRows at = TileRows::of(a.cache, sequence, head, token);
  int d[kHeadBlocks][4][4];
  value_products<kWidth, kPiece>(
      d,
      [&](int i, bool upper) {
        const int row = c + 4 * i;
        if (!(value_rows[kPlane] >> row & 1)) return 0u;
        return value_word<kWidth, kPiece>(
            plane + at.of_row(row) * kPlaneRowBytes[kPlane], 0, r, upper);
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
