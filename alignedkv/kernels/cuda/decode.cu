// One decode step of attention over digit planes (theory.md 9), split over the tokens.
//
// Grid (splits, B Hkv).  A warp works alone on tiles of 32 tokens, a token a lane, in two stages:
//   open   scores from the first key plane; the plan of the token; fetch what it asks for
//   close  finer scores, weights, sums of the bound; the plan of the value planes; value products
// and opens a tile between the weights and the value products of the one before, so that everything a
// plan asks for is in flight while tensor cores work.  The last block of a head merges (merge.cuh).

#include "arguments.cuh"
#include "bounds.cuh"
#include "copies.cuh"
#include "merge.cuh"
#include "mma.cuh"
#include "products.cuh"
#include "query.cuh"
#include "rows.cuh"
#include "tiles.cuh"

static_assert(kWidths[0] == 4, "a first plane has four bits");
static_assert(kWidths[1] <= 4, "a second plane has at most four bits");

// log2 of the factor by which n planes are finer than the first alone.
__device__ __forceinline__ constexpr int gain(int planes) { return kUnread[0] - kUnread[planes - 1]; }

// 2^-gain of a plane count that is known at run time only.
__device__ __forceinline__ float step_of(int planes) {
  float step = 1.0f;
  if (planes >= 2) step = 1.0f / (1 << gain(2));
  if constexpr (kStoredPlanes >= 3) step = planes >= 3 ? 1.0f / (1 << gain(3)) : step;
  if constexpr (kStoredPlanes >= 4) step = planes >= 4 ? 1.0f / (1 << gain(4)) : step;
  return step;
}

// Rule (6.2): plane n + 1 is read iff n planes leave the addend above theta.
__device__ __forceinline__ int planes_for(float excess) {
  int planes = 1 + (excess > gain(1));
  if constexpr (kStoredPlanes >= 3) planes += excess > gain(2);
  if constexpr (kStoredPlanes >= 4) planes += excess > gain(3);
  return planes;
}

__device__ __forceinline__ void load_heads(float (&x)[kGroup], const float* from) {
#pragma unroll
  for (int block = 0; block < kHeadBlocks; ++block) {
    const float4 four = reinterpret_cast<const float4*>(from)[block];
    const float by_index[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * block + i < kGroup) x[4 * block + i] = by_index[i];
    }
  }
}

// What a warp does, and its state between the stages.
class Worker {
 public:
  __device__ __forceinline__ Worker(
      const DecodeArguments& arguments, DecodeShared& shared, int of_head, int warp)
      : a(arguments),
        block(shared),
        mine(shared.tiles[warp]),
        sequence(of_head / arguments.cache.kv_heads),
        head(of_head % arguments.cache.kv_heads),
        warp(warp),
        lane(lane_of_thread()),
        r(lane_of_thread() / 4),
        c(lane_of_thread() % 4) {}

  // Fetch the first key plane and the scales of a tile into a stage.
  __device__ __forceinline__ void fetch(const Range& range, int token, const TileRows& rows, int stage) const {
    const u32 to = shared_address(mine.key_first[stage]);
    if (token + kTile <= range.end) {
      copy_tile<Side::Key, 0>(to, a.cache.key_planes[0], rows, lane);
    } else {
      const u32 inside = (1u << (range.end - token)) - 1;
      copy_rows<Side::Key, 0, Absent::Left>(to, a.cache.key_planes[0], rows, inside, lane);
    }
    // Scales of tokens that are not attended are 0: nothing that lies there can leak.
    const bool valid = range.holds(token + lane);
    copy_async_or_zero<4>(shared_address(&mine.scales[stage][lane]),
                          a.cache.scales + (valid ? rows.of_row(lane) : 0), valid);
  }

  // Fetch the value rows of a tile before its scores are known.
  __device__ __forceinline__ void fetch_values(
      const Range& range, int token, const TileRows& rows) const {
    const int left = range.end - token;
    const u32 inside = left >= kTile ? 0xffffffffu : (1u << left) - 1;
    copy_rows<Side::Value, 0, Absent::Left>(
        shared_address(mine.value_first[0]), a.cache.value_planes[0], rows, inside, lane);
  }

  __device__ __forceinline__ void open(const Range& range, int token, const TileRows& at, int stage,
                                       int buffer, bool values_fetched);
  __device__ __forceinline__ void run(const Range& range, const Course& course, bool trusted);
  __device__ __forceinline__ void settle_reference(bool trusted);
  __device__ __forceinline__ void refine();
  __device__ __forceinline__ void plan_values();
  __device__ __forceinline__ void weigh();
  __device__ __forceinline__ void add_values(int token, int buffer);
  __device__ __forceinline__ void add_exact_rows(const Range& range, int split, int splits);
  __device__ __forceinline__ void leave_sums();
  __device__ __forceinline__ void add_rare_planes();
  __device__ __forceinline__ float round_weight(
      u16* digits, float weight, float largest, float& lost) const;
  __device__ __forceinline__ void load_weights(const u16 (*numbers)[kTile + 16]);
  template <int kPiece>
  __device__ __forceinline__ void add_piece(int token, int buffer);
  __device__ __forceinline__ void count_reads();
  __device__ __forceinline__ void leave_reads();
  template <int kPlane, int kPiece>
  __device__ __forceinline__ void add_late_values(int token);

  __device__ __forceinline__ TileRows rows_of_tile() const {
    if constexpr (kPageTokens > 0) return paged_rows;
    return TileRows::of(a.cache, sequence, head, token_of_tile);
  }
  __device__ __forceinline__ float key_scale() const { return scale_of(scales & 0xffff); }
  __device__ __forceinline__ float value_scale() const { return scale_of(scales >> 16); }
  __device__ __forceinline__ bool is_wanted() const { return wanted_rows >> lane & 1; }

  // log2 of a weight relative to the hint, from the score before the cap.
  __device__ __forceinline__ float capped(float x, int g) const {
    if constexpr (!kSoftcap) return x;
    // tanh x = 1 - 2 / (e^2x + 1)
    const float tanh = 1.0f - 2.0f * reciprocal_fast(exp2_fast(2 * kLog2e * x) + 1.0f);
    return fmaf(a.step.softcap * kLog2e, tanh, -block.constants[kHint][g]);
  }

  const DecodeArguments& a;
  DecodeShared& block;
  WarpTiles& mine;
  const int sequence, head, warp, lane, r, c;

  // The tile that is open.
  int token_of_tile;
  TileRows paged_rows;              // contiguous rows are found again from the token
  u32 scales;                       // of this lane's token: key in the low half, value in the high
  float score[kGroup];              // log2 units, relative to the hint
  float uncapped[kSoftcap ? kGroup : 1];
  float chance;
  int key_planes, value_planes;     // read, of this lane's token
  u32 wanted_rows, second_rows;     // masks over the tile
  u32 third_rows;                   // key planes >= 3

  // The tile whose values are being added.
  u32 weights[kHeadBlocks][2];
  float weight_scale[kHeadBlocks];
  bool has_fine_weights;
  u32 value_rows[kStoredPlanes];

  float output[kHeadBlocks][kOutputs] = {};
  float total[kGroup] = {};         // sum of weights
  float halves[kGroup] = {};        // of weights times the middle of digits that were read
  Sums sums;
  float largest_draw = kNever;      // log2 of M / theta_s, times the denominator
  bool shifted = false;             // the reference is not the hint
};

// The tiles of the course: open each between the weights and the value products of the one before.
__device__ __forceinline__ void Worker::run(const Range& range, const Course& course, bool trusted) {
  if (course.token >= course.end) return;
  int stage = 0, buffer = 0;
  auto open_and_fetch = [&](int token, int into, bool is_first) {
    open(range, token, TileRows::of(a.cache, sequence, head, token), stage, into,
         kEagerValues && is_first);
    if (is_first) settle_reference(trusted);
    const int ahead = token + kKeyStages * course.step;
    if (ahead < course.end) {
      fetch(range, ahead, TileRows::of(a.cache, sequence, head, ahead), stage);
    }
    commit_copies();
    stage = stage + 1 < kKeyStages ? stage + 1 : 0;
  };
  open_and_fetch(course.token, buffer, true);
  for (int token = course.token; token < course.end; token += course.step) {
    // Copy groups in order: this tile's rows, key planes ahead, second value planes; then again.
    await_copies<1>();
    __syncwarp();
    refine();
    plan_values();
    weigh();
    const int next = token + course.step;
    if (next < course.end) {
      if constexpr (kKeyStages == 1) {
        await_copies<1>();
        __syncwarp();
      }
      open_and_fetch(next, buffer ^ 1, false);
    } else {
      commit_copies();
      commit_copies();
    }
    await_copies<2>();
    __syncwarp();
    add_values(token, buffer);
    __syncwarp();
    buffer ^= 1;
  }
}

// ---- open -----------------------------------------------------------------------------------------

__device__ __forceinline__ void Worker::open(
    const Range& range, int token, const TileRows& at, int stage, int buffer, bool values_fetched) {
  paged_rows = at, token_of_tile = token;
  scales = mine.scales[stage][lane];
  const float key_scale = this->key_scale(), value_scale = this->value_scale();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int x[kHeadBlocks][2];
    key_products<4>(x, mine.key_first[stage] + half * 16 * kPlaneRowBytes[0], block.query, lane);
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
      mine.scores[half * 16 + r][4 * b + c] = static_cast<float>(x[b][0]);
      mine.scores[half * 16 + r + 8][4 * b + c] = static_cast<float>(x[b][1]);
    }
  }
  __syncwarp();
  const int token_class = dither_class(token + lane);
  const bool valid = range.holds(token + lane);
  {
    float product[kGroup], of_class[kGroup], unit[kGroup], offset[kGroup];
    load_heads(product, mine.scores[lane]);
    load_heads(of_class, block.query.classes[token_class]);
    load_heads(unit, block.query.numbers[kUnit16]);
    load_heads(offset, block.constants[kOffset]);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const float x = fmaf(key_scale, fmaf(unit[g], product[g], of_class[g]), offset[g]);
      if constexpr (kSoftcap) uncapped[g] = x;
      score[g] = valid ? capped(x, g) : kNever;
    }
  }

  float excess = kNever, above = kNever;
  {
    float margin[kGroup], size[kGroup], spread[kGroup], wish[kGroup];
    load_heads(margin, block.constants[kMargin]);
    load_heads(size, block.constants[kReachSize]);
    load_heads(spread, block.constants[kReachSpread]);
    load_heads(wish, block.constants[kWanted]);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const float plausible = fminf(fmaf(margin[g], key_scale, score[g]), 0.0f);
      const float addend = key_scale * fmaf(size[g], value_scale, spread[g]);
      excess = fmaxf(excess, plausible + log2_fast(addend));
      above = fmaxf(above, plausible + wish[g]);
    }
    above += log2_fast(value_scale);
  }
  key_planes = planes_for(valid ? excess : kNever);
  bool wanted = valid && above > 0.0f;
  chance = 1.0f;
  if constexpr (kSampleValues) {
    // sampling.py: a row below theta_s is drawn with its chance, a multiple of 2^-24.
    constexpr float kDraws = 1 << 24;
    const float allowed = fmaxf(ceilf(exp2_fast(fminf(above, 0.0f)) * kDraws), 1.0f);
    const u32 draw = mix((static_cast<u32>(token + lane) * kSpread) ^ block.query.stream) >> 8;
    const bool drawn = static_cast<float>(draw) < allowed;
    if (above < 0.0f) chance = allowed * (1.0f / kDraws);
    wanted = valid && (above >= 0.0f || drawn);
  }
  if (kExactRows && valid && range.is_exact(a.cache, token + lane)) {
    // Its turn comes in add_exact_rows.
    key_planes = 1, wanted = false, chance = 1.0f;
#pragma unroll
    for (int g = 0; g < kGroup; ++g) score[g] = kNever;
  }

  wanted_rows = __ballot_sync(kAllLanes, wanted);
  second_rows = __ballot_sync(kAllLanes, key_planes >= 2);
  if (!values_fetched) {
    copy_rows<Side::Value, 0, Absent::Left>(
        shared_address(mine.value_first[buffer]), a.cache.value_planes[0], at, wanted_rows, lane);
  }
  copy_rows<Side::Key, 1, Absent::Left>(
      shared_address(mine.key_second), a.cache.key_planes[1], at, second_rows, lane);
  if constexpr (kStoredPlanes >= 3) {
    third_rows = second_rows ? __ballot_sync(kAllLanes, key_planes >= 3) : 0;
    if (third_rows) {
      const int place = __popc(third_rows & ((1u << lane) - 1));
      if (key_planes >= 3) mine.order[place] = lane;
      __syncwarp();
      copy_rare_rows<2>(shared_address(mine.key_rare), a.cache.key_planes[2], at, mine.order,
                        min(__popc(third_rows), kRareRows), third_rows, lane);
    }
  }
  commit_copies();
}

// ---- close ----------------------------------------------------------------------------------------

// Weights are relative to the hint exp(L). Where the hint is off so far that they would leave the
// floats, the warp counts from the largest score of its first tile instead.
__device__ __forceinline__ void Worker::settle_reference(bool trusted) {
  constexpr float kHighest = 20.0f, kLowest = -100.0f;  // log2
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    const float largest = warp_max(score[g]);
    const bool is_high = largest > kHighest;
    const bool is_low = !trusted && largest < kLowest && largest > 0.5f * kNever;
    const float reference = is_high || is_low ? largest : 0.0f;
    shifted |= is_high || is_low;
    if (lane == 0) block.reference[warp][g] = reference;
  }
  __syncwarp();
}

// Scores from all key planes that were read.
__device__ __forceinline__ void Worker::refine() {
  if (!second_rows) return;
  constexpr int kWidth = kWidths[1];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int x[kHeadBlocks][2];
    key_products<kWidth>(x, mine.key_second + half * 16 * kPlaneRowBytes[1], block.query, lane);
    // In the unit of the first plane's products: kUnit16.
    constexpr float kScale = 1.0f / (1 << gain(2));
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
      mine.scores[half * 16 + r][4 * b + c] = kScale * static_cast<float>(x[b][0]);
      mine.scores[half * 16 + r + 8][4 * b + c] = kScale * static_cast<float>(x[b][1]);
    }
  }
  __syncwarp();
  if constexpr (kStoredPlanes >= 3) {
    if (third_rows) add_rare_planes();
  }
  if (key_planes >= 2) {
    float finer[kGroup], unit[kGroup], half[kGroup];
    load_heads(finer, mine.scores[lane]);
    load_heads(unit, block.query.numbers[kUnit16]);
    load_heads(half, block.query.numbers[kHalf]);
    const float key_scale = this->key_scale();
    const float middle = 0.5f * step_of(key_planes) - 0.5f;  // of the digits read, less the first's
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const float added = key_scale * fmaf(half[g], middle, unit[g] * finer[g]);
      if constexpr (kSoftcap) {
        uncapped[g] += added;
        if (score[g] > 0.5f * kNever) score[g] = capped(uncapped[g], g);
      } else {
        score[g] += added;
      }
    }
  }
  __syncwarp();
}

// Third and later planes, 16 rows at a time; the first round's third plane is there already.
__device__ __forceinline__ void Worker::add_rare_planes() {
  const int count = __popc(third_rows);
  for (int first = 0; first < count; first += kRareRows) {
    const int rows_here = min(count - first, kRareRows);
    const u8* order = mine.order + first;
    unrolled<2, kStoredPlanes>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value, kWidth = kWidths[kPlane];
      u32 having = third_rows;
      if constexpr (kPlane == 3) having = __ballot_sync(kAllLanes, key_planes >= 4);
      if (!having) return;
      if (kPlane > 2 || first > 0) {
        copy_rare_rows<kPlane>(shared_address(mine.key_rare), a.cache.key_planes[kPlane], rows_of_tile(),
                               order, rows_here, having, lane);
        commit_copies();
        await_copies<0>();
        __syncwarp();
      }
      int x[kHeadBlocks][2];
      key_products<kWidth>(x, mine.key_rare, block.query, lane);
      constexpr float kScale =
          16.0f * kDigitsPerProduct<kWidth> / static_cast<float>(1 << gain(kPlane + 1));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (r + 8 * i >= rows_here) continue;
        float* scores = mine.scores[order[r + 8 * i]];
#pragma unroll
        for (int b = 0; b < kHeadBlocks; ++b) scores[4 * b + c] += kScale * static_cast<float>(x[b][i]);
      }
      __syncwarp();
    });
  }
}

// Planes of the value rows, from the scores as they are now; fetch the second.
__device__ __forceinline__ void Worker::plan_values() {
  float margin[kGroup], wish[kGroup];
  load_heads(margin, block.constants[kMargin]);
  load_heads(wish, block.constants[kValueGain]);
  const float step = key_scale() * step_of(key_planes);
  float excess = kNever;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    excess = fmaxf(excess, fminf(fmaf(margin[g], step, score[g]), 0.0f) + wish[g]);
  }
  excess += log2_fast(value_scale());
  value_planes = is_wanted() ? planes_for(excess) : 0;
  if (kSampleValues && chance < 1.0f) value_planes = is_wanted() ? 1 : 0;

  value_rows[0] = wanted_rows;
  value_rows[1] = __ballot_sync(kAllLanes, value_planes >= 2);
  if (value_rows[1]) {
    copy_rows<Side::Value, 1, Absent::Zeroed>(
        shared_address(mine.value_second), a.cache.value_planes[1], rows_of_tile(), value_rows[1], lane);
  }
#pragma unroll
  for (int n = 3; n <= kStoredPlanes; ++n) {
    value_rows[n - 1] = value_rows[1] ? __ballot_sync(kAllLanes, value_planes >= n) : 0;
  }
  commit_copies();
  count_reads();
}

// Rows read of each plane, for the report.
__device__ __forceinline__ void Worker::count_reads() {
  Reads& reads = block.lane_reads[warp][lane];
  const u32 keys = reads.keys + 0x01000000u + (0x00010101u >> (32 - 8 * key_planes));
  const u32 values = reads.values + (value_planes ? 0x01010101u >> (32 - 8 * value_planes) : 0);
  reads.keys = keys, reads.values = values;
  if (keys >= 0xff000000u) leave_reads();
}

// Counts of the lanes to the block's, before a byte overflows.
__device__ __forceinline__ void Worker::leave_reads() {
  Reads& reads = block.lane_reads[warp][lane];
#pragma unroll
  for (int plane = 0; plane < kStoredPlanes; ++plane) {
    const u32 keys = plane == 0 ? 0 : reads.keys >> (8 * (plane - 1)) & 0xff;
    const u32 of_keys = __reduce_add_sync(kAllLanes, keys);
    const u32 of_values = __reduce_add_sync(kAllLanes, reads.values >> (8 * plane) & 0xff);
    if (lane == 0) {
      atomicAdd(block.reads + plane, of_keys);
      atomicAdd(block.reads + kStoredPlanes + plane, of_values);
    }
  }
  reads = {0, 0};
}

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
    const float weight = exp2_fast(score[g]);
    total[g] += weight;
    sums.add(g, weight, shared, first[g], second[g]);
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

// ---- rows kept exact ------------------------------------------------------------------------------

// Rows kept in the input type: their scores and values have no error and read no plane.  They are few
// and shared out over the warps of a head.
__device__ __forceinline__ void Worker::add_exact_rows(
    const Range& range, int split, int splits) {
  const int from_start = min(a.cache.exact_first, range.end - range.start);
  const int to_end = min(a.cache.exact_last, range.end - range.start - from_start);
  const i64 of_head = head_index(a.cache, sequence, head);
  for (int i = split * kWarps + warp; i < from_start + to_end; i += splits * kWarps) {
    const int token = i < from_start ? range.start + i : range.end - to_end + (i - from_start);
    if (!range.holds(token)) continue;
    const bool is_first = block.reference[warp][0] == kNever;  // and the warp has no tile
    const int slot = exact_slot(a.cache, token, range.start, range.end);
    const RowBits* key = a.cache.exact_keys + exact_offset(a.cache, of_head, slot);
    const RowBits* value = a.cache.exact_values + exact_offset(a.cache, of_head, slot);
    float x[kPerLane];
    load_row<kRowDtype>(x, key);
    float weight[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      float q[kPerLane], dot = 0;
      load_row<kQueryDtype>(q, a.query + (of_head * kGroup + g) * kHeadDim);
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) dot = fmaf(q[k], x[k], dot);
      dot = warp_sum(dot) * a.step.scaling;
      if constexpr (kSoftcap) {
        weight[g] = capped(dot / a.step.softcap, g);
      } else {
        weight[g] = fmaf(dot, kLog2e, -block.constants[kHint][g]);
      }
      __syncwarp();
      if (is_first && lane == 0) block.reference[warp][g] = block.trusted ? 0.0f : weight[g];
      __syncwarp();
      weight[g] = exp2_fast(weight[g] - block.reference[warp][g]);
      if (lane == 0) total[g] += weight[g], sums.add_exact(g, weight[g]);
    }
    unrolled<0, kPieces>([&](auto piece) {
      constexpr int kPiece = decltype(piece)::value;
#pragma unroll
      for (int j = 0; j < 2 * kPieceChannels<kPiece>; ++j) {
        const int channel = value_byte<kPiece>(r) + j / 2 + (j % 2) * (kChannels / 2);
        if (channel >= kHeadDim) continue;
        const float centred = to_float<kRowDtype>(value[channel]) -
                              a.cache.value_mean[of_head * kHeadDim + channel];
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          float& out = output[g / 4][8 * kPiece + j];
          if (g % 4 == c) out = fmaf(weight[g], centred, out);
        }
      }
    });
  }
}

// ---- the end of a warp ----------------------------------------------------------------------------

__device__ __forceinline__ void Worker::leave_sums() {
  leave_reads();
  float(&to)[kSumCount][kHeads] = block.sums[warp];
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    const int head_of = g < kGroup ? g : 0;
    const bool exists = g < kGroup;
    const float whole = exists ? warp_sum(total[head_of]) : 0.0f;
    const float half = exists ? warp_sum(halves[head_of]) : 0.0f;
    if (lane == 0) to[kTotal][g] = whole, to[kHalves][g] = half;
    unrolled<0, Sums::kCount>([&](auto i) {
      constexpr int kSum = decltype(i)::value;
      const float sum = exists ? warp_sum(sums.template at<kSum>(head_of)) : 0.0f;
      if (lane == 0) to[kFirstBound + kSum][g] = sum;
    });
  }
  if constexpr (kSampleValues) {
    const float most = warp_max(largest_draw);
    if (lane == 0) block.largest_draw[warp] = most;
  }
}

// Value products of the block's warps, four heads at a time.
__device__ __forceinline__ void leave_outputs(Worker& worker, DecodeShared& shared, Partial& part) {
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    float* to = shared.outputs.of[worker.warp][worker.c];
    unrolled<0, kPieces>([&](auto piece) {
      constexpr int kPiece = decltype(piece)::value;
#pragma unroll
      for (int j = 0; j < 2 * kPieceChannels<kPiece>; ++j) {
        to[value_byte<kPiece>(worker.r) + j / 2 + (j % 2) * (kChannels / 2)] =
            worker.output[b][8 * kPiece + j];
      }
    });
    __syncthreads();
    constexpr int kLast = kGroup - 4 * (kHeadBlocks - 1);
    const int heads = b + 1 < kHeadBlocks ? 4 : kLast;
    for (int i = threadIdx.x; i < heads * kChannels; i += kThreads) {
      const int g = i / kChannels, channel = i % kChannels;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sum = fmaf(shared.factor[w][4 * b + g], shared.outputs.of[w][g][channel], sum);
      }
      store_past_l1(&part.output[4 * b + g][channel], sum);
    }
    __syncthreads();
  }
}

// ---- the kernel -----------------------------------------------------------------------------------

// What the hints of a head make of its numbers.
__device__ __forceinline__ void set_constants(
    const DecodeArguments& a, DecodeShared& shared, const Query& query, i64 of_head, int g) {
  const i64 query_head = of_head * kGroup + g;
  const float infinity = __int_as_float(0x7f800000);
  const float log_z = a.state.log_z[query_head], spread = a.state.spread[query_head];
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
  to[kMargin][g] = a.step.plan_margin * kLog2e * deviation;
  to[kReachSize][g] = kHalfRange * error;
  to[kReachSpread][g] = spread * error;
  to[kValueGain][g] = log2_fast((kCertain ? 0.5f : 0.288675135f) / theta);
  const float share = a.step.skip_share * (kSampleValues ? kSamplingFactor : 1.0f);
  to[kWanted][g] = share > 0 ? log2_fast(kHalfRange / (share * theta)) : infinity;
  to[kError][g] = kCertain ? worst : deviation;
  to[kCoarse][g] = theta * (2.0f * kLargestWeight / kLargestPrefix);
  to[kErrorMore][g] = kCertain ? query.numbers[kShift][g] : spread;
  shared.theta[g] = theta;
  shared.sampling_share = share;
}

// A head's queries and what its hints make of them.
__device__ __forceinline__ void load_query(const DecodeArguments& a, DecodeShared& shared, i64 of_head) {
  const Query& query = reinterpret_cast<const Query*>(a.workspace.queries)[of_head];
  const u8* from = reinterpret_cast<const u8*>(&query);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(Query)) / 16; i += kThreads) {
    copy_async<16>(shared_address(&shared.query) + 16 * i, from + 16 * i);
  }
  commit_copies();  // a wait is for committed copies only
  if (threadIdx.x < kGroup) set_constants(a, shared, query, of_head, threadIdx.x);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSm) decode(
    const __grid_constant__ DecodeArguments a) {
  extern __shared__ __align__(16) u8 memory[];
  DecodeShared& shared = *reinterpret_cast<DecodeShared*>(memory);
  const int warp = threadIdx.x / 32, lane = lane_of_thread();
  const int block = blockIdx.y * gridDim.x + blockIdx.x, heads = gridDim.y;
  const bool again = a.pass > 0;
  const u32* missed = again ? a.workspace.retry + (a.pass - 1) % 2 * heads : nullptr;
  u32* missed_now = a.workspace.retry + a.pass % 2 * heads;
  if (again) {
    await_previous_kernel();
    // A head that is not read again does not miss again.
    if (block < heads && !missed[block] && threadIdx.x == 0) missed_now[block] = 0;
  }
  const Share share =
      again ? Share::of_missed(missed, heads, block, gridDim.x * gridDim.y)
            : Share{static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x),
                    static_cast<int>(gridDim.x)};
  if (share.splits == 0) return;
  const int split = share.split, splits = share.splits, of_head = share.head;
  Worker worker(a, shared, of_head, warp);

  // The first tiles whose rows are older than this step need not wait for prepare.cu.
  bool fetched[kKeyStages] = {};
  if (!again && a.step.window == 0 && kStridedTiles) {
    // prepare.cu may or may not have counted the new token: rows before both are safe.
    const int length = min(a.cache.lengths[worker.sequence], a.cache.capacity);
    const Range range = Range::of(a.cache.starts[worker.sequence], length, 0);
    const Course course = Course::of(range, split, splits, warp);
#pragma unroll
    for (int stage = 0; stage < kKeyStages; ++stage) {
      const int token = course.token + stage * course.step;
      if (token + kTile < range.end) {
        const TileRows rows = TileRows::of(a.cache, worker.sequence, worker.head, token);
        worker.fetch(range, token, rows, stage);
        if (kEagerValues && stage == 0) worker.fetch_values(range, token, rows);
        fetched[stage] = true;
      }
    }
  }
  float4* classes = reinterpret_cast<float4*>(shared.classes[warp]);
  for (int i = lane; i < kDitherRows * kHeadBlocks; i += 32) classes[i] = make_float4(0, 0, 0, 0);
  if (lane < kHeads) shared.reference[warp][lane] = kNever;
  shared.lane_reads[warp][lane] = {0, 0};
  if (threadIdx.x < 2 * kStoredPlanes) shared.reads[threadIdx.x] = 0;
  if (threadIdx.x == 0) shared.trusted = true;
  for (int i = threadIdx.x; i < kConstants * kHeads; i += kThreads) (&shared.constants[0][0])[i] = 0;
  __syncthreads();
  if (!again) await_previous_kernel();
  load_query(a, shared, of_head);
  await_copies<0>();
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.range = Range::of(a.cache.starts[worker.sequence], shared.query.length, a.step.window);
  }
  __syncthreads();
  const Range& range = shared.range;  // read again where it is needed: registers are scarce
  const Course course = Course::of(range, split, splits, warp);
#pragma unroll
  for (int stage = 0; stage < kKeyStages; ++stage) {
    const int token = course.token + stage * course.step;
    if (token < course.end && !fetched[stage]) {
      const TileRows rows = TileRows::of(a.cache, worker.sequence, worker.head, token);
      worker.fetch(range, token, rows, stage);
      if (kEagerValues && stage == 0) worker.fetch_values(range, token, rows);
    }
    commit_copies();
  }
  await_copies<0>();
  __syncwarp();
  worker.run(range, course, shared.trusted);

  release_next_kernel();
  if constexpr (kExactRows) worker.add_exact_rows(range, split, splits);
  worker.leave_sums();
  await_copies<0>();
  Partial& part = reinterpret_cast<Partial*>(a.workspace.partials)[block];
  const Partial* parts = &part - split;
  __syncthreads();
  set_warp_factors(shared, part);
  __syncthreads();
  leave_outputs(worker, shared, part);
  leave_block_sums(shared, part);
  u32* reads = a.result.reads + of_head * 2 * kStoredPlanes;
  if (threadIdx.x < 2 * kStoredPlanes && shared.reads[threadIdx.x]) {
    atomicAdd(reads + threadIdx.x, shared.reads[threadIdx.x]);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    shared.is_last = atomicAdd(a.workspace.arrived + of_head, 1) == splits - 1;
    __threadfence();
  }
  __syncthreads();
  if (!shared.is_last) return;

  Merge& merge = *reinterpret_cast<Merge*>(shared.tiles);
  const i16* dither = dither_row(a.cache, 1, 0);
  DitherShare entries;
  if (threadIdx.x < kShares * kChannels) {
    entries.fetch(dither, threadIdx.x / kChannels * kSharedClasses, threadIdx.x % kChannels);
  }
  set_factors(merge.factor, merge.whole, parts, splits);
  __syncthreads();
  sum_parts(merge.whole, parts, merge.factor, splits);
  __syncthreads();
  correct_dither(merge, dither, entries);
  if (threadIdx.x == 0) {
    a.workspace.arrived[of_head] = 0;
    shared.is_last = false;  // from here on: whether a head missed
    const int exact = kExactRows ? range.exact_tokens(a.cache) : 0;
    atomicAdd(reads, max(range.end - range.first, 0) - exact);
  }
  __syncthreads();
  for (int g = warp; g < kGroup; g += kWarps) {
    if (answer(a, shared, merge, of_head, g) && lane == 0) shared.is_last = true;
  }
  __syncthreads();
  if (threadIdx.x == 0) missed_now[of_head] = shared.is_last;
}
