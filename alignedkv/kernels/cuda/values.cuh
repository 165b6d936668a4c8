// The queue of values, emptied: weights as digits, and their products with the rows.

#include "worker.cuh"

// 1.5 2^23 + n + 128 as a float has n + 128 in its low bits, whatever the sign of n (mma.cuh).
constexpr float kNumberZero = 0x1.8p23f + 128.0f;

// Leave the digits of n, of a number kNumberZero + n; returns n.
__device__ __forceinline__ float Worker::leave_digits(u16* digits, float number) const {
  digits[weight_slot(lane)] = static_cast<u16>(__float_as_uint(number));
  return number - kNumberZero;
}

// Largest of the lanes' sizes.  They are ordered like their bits, NaN last.
__device__ __forceinline__ float largest_size(float x) {
  return __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(x) & 0x7fffffffu));
}

// x in the unit that makes the largest of the lanes' a number of two digits.
__device__ __forceinline__ float number_of(float x, float largest, float& unit) {
  unit = largest * (1.0f / kLargestNumber);
  return fmaf(x, reciprocal_fast(fmaxf(unit, 0x1p-124f)), kNumberZero);
}

// The queue's weights: as digits to shared memory, and what rounding changes to the sums.
//
// Rounding errs like any other addend.  As a rule its unit follows from theta (set_constants), so that it
// errs by little; a dither of the row's own keeps rows that repeat from erring alike.  Where weights are
// too large for that unit, the queue's largest sets it; and where this leaves more than theta, what
// rounding lost gets digits of its own.
__device__ __forceinline__ WeightDigits Worker::leave_weights(int token, Plan plan) {
  const bool valid = lane < queued_values;
  float scaled[kGroup], unit[kGroup], number[kGroup];
  load_heads(scaled, mine.values.weight[lane]);
  load_heads(unit, block.constants[kWeightUnit]);
  bool is_large = false;
  {
    float per_unit[kGroup];
    load_heads(per_unit, block.constants[kPerWeightUnit]);
    const u32 turns = static_cast<u32>(token) * kSpread + block.query.stream;
    const float dither = 0x1p-32f * static_cast<float>(static_cast<i32>(turns));
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      if (!valid) scaled[g] = 0.0f;
      number[g] = fmaf(scaled[g], per_unit[g], dither) + kNumberZero;
      is_large |= !(number[g] <= kNumberZero + kLargestNumber);  // NaN, too
    }
  }
  WeightDigits digits = WeightDigits::UnitOfTheta;
  if (__any_sync(kAllLanes, is_large)) {
    bool loses_much = false;
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const float largest = largest_size(scaled[g]), theta = unit[g] * kUnitsInTheta;
      loses_much |= !(largest <= theta * (2.0f * kLargestNumber / kLargestPrefix));
      number[g] = number_of(scaled[g], largest, unit[g]);
      if (lane == 0) mine.weight_units[0][g] = unit[g];
    }
    digits = loses_much ? WeightDigits::Fine : WeightDigits::OwnUnit;
  }
  // What digits of offset binary stand for: their middle, less half the range.
  const float offset = 0.5f * plan.step() - (0.5f + kHalfRange);
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    const float multiple = leave_digits(mine.weights[0][g], number[g]);
    float rounded = multiple * unit[g], lost = fmaf(-multiple, unit[g], scaled[g]);
    if (digits == WeightDigits::Fine) {
      float fine;
      const float finer = number_of(lost, largest_size(lost), fine);
      const float more = leave_digits(mine.weights[1][g], finer);
      if (lane == 0) mine.weight_units[1][g] = fine;
      rounded = fmaf(more, fine, rounded), lost = fmaf(-more, fine, lost);
    }
    // All other sums have the weight as it was.
    sums.add_rounding(g, lost);
    offsets[g] = fmaf(rounded, offset, offsets[g]);
  }
  __syncwarp();
  return digits;
}

__device__ __forceinline__ void Worker::add_values() {
  const auto row = mine.values.row[lane];
  const Plan plan = lane < queued_values ? row.plan : Plan::one_plane();
  const WeightDigits digits = leave_weights(row.token, plan);
  const bool has_second = __any_sync(kAllLanes, plan.reads(2));
  const ValueRows<kWidths[0]> first(mine.values.first, lane);
  const ValueRows<kWidths[1]> second(mine.values.second, lane);
  with_weights(digits, [&] {
    if (has_second) {
      unrolled<0, kPieces>([&](auto i) { add_two_planes<decltype(i)::value>(first, second); });
    } else {
      unrolled<0, kPieces>([&](auto i) { add_plane<0, decltype(i)::value>(first); });
    }
  });
  if (kStoredPlanes > 2 && __any_sync(kAllLanes, plan.reads(3))) {
    unrolled<2, kStoredPlanes>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value;
      if (plan.reads(kPlane + 1)) atomicAdd(block.reads + kStoredPlanes + kPlane, 1u);
    });
    with_weights(digits, [&] {
      unrolled<2, kStoredPlanes>([&](auto plane) {
        constexpr int kPlane = decltype(plane)::value;
        const u32 wanted = __ballot_sync(kAllLanes, plan.reads(kPlane + 1));
        if (wanted) add_late_plane<kPlane>(wanted);
      });
    });
  }
  __syncwarp();
  if (has_second) clear_second_values();
  queued_values = 0;
}

// Rows without a second plane are zeros there.
__device__ __forceinline__ void Worker::clear_second_values() {
  float4* rows = reinterpret_cast<float4*>(mine.values.second);
#pragma unroll 1
  for (int i = lane; i < static_cast<int>(sizeof mine.values.second) / 16; i += 32) {
    rows[i] = make_float4(0, 0, 0, 0);
  }
  __syncwarp();
}

// Digits of weights as operands: high ones are bytes 1 and 3 of a pair, low ones bytes 0 and 2, 128 too
// large.
__device__ __forceinline__ void Worker::load_weights(int pass, WeightDigits digits) {
  const bool is_own = digits != WeightDigits::UnitOfTheta;
  const float* units = is_own ? mine.weight_units[pass] : block.constants[kWeightUnit];
  const u32 select = r % 2 ? 0x6420 : 0x7531, sign = r % 2 ? 0x80808080u : 0;
  const u32 of_pass = weights_at + pass * sizeof mine.weights[0];
  const u8* of_lane = static_cast<const u8*>(__cvta_shared_to_generic(of_pass));
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    weight_unit[b] = units[4 * b + c];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const u8* at = of_lane + 4 * b * sizeof mine.weights[0][0] + 16 * k * sizeof(u16);
      const uint2 four = *reinterpret_cast<const uint2*>(at);
      weights[b][k] = __byte_perm(four.x, four.y, select) ^ sign;
    }
  }
}

// body() with the digits of the weights and, if there are, again with those of what rounding lost.
template <class Body>
__device__ __forceinline__ void Worker::with_weights(WeightDigits digits, Body body) {
#pragma unroll 1
  for (int pass = 0; pass <= (digits == WeightDigits::Fine); ++pass) {
    load_weights(pass, digits);
    body();
  }
}

// A piece of the first two planes; rows without a second digit have a zero there.
template <int kPiece>
__device__ __forceinline__ void Worker::add_two_planes(
    const ValueRows<kWidths[0]>& first, const ValueRows<kWidths[1]>& second) {
  __syncwarp();  // else the compiler loads all pieces at once, and spills
  Operands one, two, lower, upper;
  first.load<kPiece>(one, r, c);
  second.load<kPiece>(two, r, c);
  join_digits<kWidths[1]>(lower, upper, one, two);
  constexpr float kStep = 1.0f / (1 << kWidths[1]);
  add_products<kPiece>(lower, upper, kStep, kStep);
}

// A piece of one plane of up to 4 bits.
template <int kPlane, int kPiece>
__device__ __forceinline__ void Worker::add_plane(const ValueRows<kWidths[kPlane]>& rows) {
  constexpr int kWidth = kWidths[kPlane];
  if constexpr (kPieces > 4) __syncwarp();  // as above
  Operands words, lower, upper;
  rows.template load<kPiece>(words, r, c);
  split_digits<kWidth>(lower, upper, words);
  constexpr float kStep = 1.0f / (1 << gain(kPlane + 1));
  add_products<kPiece>(lower, upper, kStep, kStep * kDigitsPerProduct<kWidth>);
}

// Half a piece of a plane of 8 bits.
template <int kPlane, int kPiece>
__device__ __forceinline__ void Worker::add_half(const ValueRows<4>& rows, bool is_upper) {
  Operands words;
  rows.load<kPiece>(words, r, c);
  constexpr float kStep = 1.0f / (1 << gain(kPlane + 1));
  add_products<kPiece>(words, words, is_upper ? 0.0f : kStep, is_upper ? kStep : 0.0f);
}

// Products of a third or later plane, fetched now: few rows have one.  First digits make room, which
// is half a row of 8 bits.
template <int kPlane>
__device__ __forceinline__ void Worker::add_late_plane(u32 wanted) {
  constexpr int kWidth = kWidths[kPlane];
  u8* tile = mine.values.first;
  const auto row_of = [&](int slot) { return rows.of(mine.values.row[slot].token); };
#pragma unroll 1
  for (int half = 0; half < (kWidth == 8 ? 2 : 1); ++half) {
    __syncwarp();
    copy_late_rows<kPlane>(shared_address(tile), a.cache.value_planes[kPlane] + half * kChannels / 2,
                           row_of, wanted, lane);
    commit_copies();
    await_copies<0>();
    __syncwarp();
    unrolled<0, kPieces>([&](auto i) {
      constexpr int kPiece = decltype(i)::value;
      if constexpr (kWidth == 8) {
        add_half<kPlane, kPiece>(ValueRows<4>(tile, lane), half);
      } else {
        add_plane<kPlane, kPiece>(ValueRows<kWidth>(tile, lane));
      }
    });
  }
}

// A piece's products to the outputs; steps are those of products in units of first digits.
template <int kPiece>
__device__ __forceinline__ void Worker::add_products(
    const Operands& lower_digits, const Operands& upper_digits, float lower_step, float upper_step) {
  int d[kHeadBlocks][2][4];
  value_products(d, lower_digits, upper_digits, weights);
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    const float lower = weight_unit[b] * lower_step, upper = weight_unit[b] * upper_step;
    float* out = output[b] + 4 * kPiece;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      out[2 * j] = fmaf(lower, static_cast<float>(joined(d[b][j][0], d[b][j][1])), out[2 * j]);
      out[2 * j + 1] =
          fmaf(upper, static_cast<float>(joined(d[b][j][2], d[b][j][3])), out[2 * j + 1]);
    }
  }
}
