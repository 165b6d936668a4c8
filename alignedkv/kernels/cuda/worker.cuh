// A warp of decode.cu: what it holds, and its walk over tiles of 32 tokens.

#include "bounds.cuh"
#include "copies.cuh"
#include "mma.cuh"
#include "products.cuh"
#include "query.cuh"
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
