// A warp of decode.cu: what it holds, and its walk over tiles of 32 tokens.
//
//   open    scores of a tile from first key planes, and the plan of its tokens (open.cuh)
//   refine  32 tokens of any tiles that waited for more key planes (refine.cuh)
//   settle  weights, sums of the bound, the plan of value rows (settle.cuh)
//   add     products of 32 value rows of any tiles (values.cuh)
//
// What a plan asks for is copied to a queue and used when the queue is full, a tile later or more: so
// tensor cores work on full tiles however few rows are wanted, and copies have time to arrive.

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

__device__ __forceinline__ void store_heads(float* to, const float* x) {
#pragma unroll
  for (int block = 0; block < kHeadBlocks; ++block) {
    float four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = 4 * block + i < kGroup ? x[4 * block + i] : 0.0f;
    reinterpret_cast<float4*>(to)[block] = make_float4(four[0], four[1], four[2], four[3]);
  }
}

// A token a lane: of a tile, or of a queue.
struct Tokens {
  float score[kGroup];  // log2, relative to the hint
  float uncapped[kSoftcap ? kGroup : 1];
  u32 scales;           // key in the low half, value in the high
  int token;
  float chance;         // with which the value row is read
  int key_planes;       // wanted, or read
  bool wants_value;

  __device__ __forceinline__ float key_scale() const { return scale_of(scales & 0xffff); }
  __device__ __forceinline__ float value_scale() const { return scale_of(scales >> 16); }
  // Make it a token without weight.
  __device__ __forceinline__ void leave() {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) score[g] = kNever;
    key_planes = 1, wants_value = false;
  }
};

// What a warp does, and its state between the stages.
class Worker {
 public:
  __device__ __forceinline__ Worker(
      const DecodeArguments& arguments, DecodeShared& shared, int of_head, int warp)
      : a(arguments),
        block(shared),
        mine(shared.tiles[warp]),
        sequence(of_head / kSubgroups / arguments.cache.kv_heads),
        head(of_head / kSubgroups % arguments.cache.kv_heads),
        part(of_head % kSubgroups),
        warp(warp),
        lane(lane_of_thread()),
        r(lane_of_thread() / 4),
        c(lane_of_thread() % 4) {}

  // Fetch the first key plane and the scales of a tile into a stage.
  __device__ __forceinline__ void fetch(const Range& range, int token, int stage) const {
    const TileRows rows = TileRows::of(a.cache, sequence, head, token);
    const u32 to = shared_address(mine.key_first[stage]);
    if (token + kTile <= range.end) {
      copy_tile<Side::Key, 0>(to, a.cache.key_planes[0], rows, lane);
    } else {
      const u32 inside = (1u << (range.end - token)) - 1;
      copy_rows<Side::Key, 0>(to, a.cache.key_planes[0], rows, inside, lane);
    }
    // Scales of tokens that are not attended are 0: nothing that lies there can leak.
    const bool valid = range.holds(token + lane);
    copy_async_or_zero<4>(shared_address(&mine.scales[stage][lane]),
                          a.cache.scales + (valid ? rows.of_row(lane) : 0), valid);
  }

  __device__ __forceinline__ void run(const Range& range, const Course& course, bool trusted);
  __device__ __forceinline__ Tokens open(const Range& range, int first_token, int stage);
  __device__ __forceinline__ void push_keys(const Tokens& t, u32 refined);
  __device__ __forceinline__ void settle_reference(const Tokens& t, bool trusted);
  __device__ __forceinline__ Tokens refine();
  __device__ __forceinline__ void add_rare_planes(const Tokens& t);
  __device__ __forceinline__ void settle(Tokens& t, bool has_distinct_classes);
  __device__ __forceinline__ int plan_value(const Tokens& t) const;
  __device__ __forceinline__ void add_to_classes(
      const Tokens& t, const float (&scaled)[kGroup], bool are_distinct);
  __device__ __forceinline__ void push_values(
      const Tokens& t, const float (&scaled)[kGroup], u32 wanted, int value_planes);
  __device__ __forceinline__ void count_reads(int key_planes, int value_planes);
  __device__ __forceinline__ void leave_reads();
  __device__ __forceinline__ void add_values();
  __device__ __forceinline__ float round_weight(
      u16* digits, float weight, float largest, float& lost) const;
  __device__ __forceinline__ bool leave_weights(int planes);
  __device__ __forceinline__ void load_weights(int pass);
  template <class Body>
  __device__ __forceinline__ void with_weights(bool has_fine_weights, Body body);
  template <int kPiece>
  __device__ __forceinline__ void add_two_planes(const ValueRows<kWidths[0]>& first,
                                                 const ValueRows<kWidths[1]>& second);
  template <int kPlane, int kPiece>
  __device__ __forceinline__ void add_plane(const ValueRows<kWidths[kPlane]>& rows);
  template <int kPlane, int kPiece>
  __device__ __forceinline__ void add_half(const ValueRows<4>& rows, bool is_upper);
  template <int kPlane>
  __device__ __forceinline__ void add_late_plane(u32 wanted);
  template <int kPiece>
  __device__ __forceinline__ void add_products(
      const Operands& lower_digits, const Operands& upper_digits, float lower_step, float upper_step);
  __device__ __forceinline__ void clear_second_values();
  __device__ __forceinline__ void add_exact_rows(const Range& range, int split, int splits);
  __device__ __forceinline__ void leave_sums();

  // All copies that were asked for are there.
  __device__ __forceinline__ void arrive() const {
    commit_copies();
    await_copies<0>();
    __syncwarp();
  }

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
  const int sequence, head, part, warp, lane, r, c;

  int queued_keys = 0, queued_values = 0;

  // The rows whose products are being added.
  u32 weights[kHeadBlocks][2];
  float weight_unit[kHeadBlocks];

  float output[kHeadBlocks][kOutputs] = {};
  float total[kGroup] = {};       // sum of weights
  float offsets[kGroup] = {};     // of weights times what digits are off by (values.cuh)
  Sums sums;
  float largest_draw = kNever;    // log2 of M / theta_s, times the denominator
  bool shifted = false;           // the reference is not the hint
};

// The tiles of the course, and at the end what is left in the queues.
__device__ __forceinline__ void Worker::run(const Range& range, const Course& course, bool trusted) {
  if (course.token >= course.end) return;
  clear_second_values();
  int stage = 0;
  for (int token = course.token;; token += course.step) {
    const bool is_tile = token < course.end;
    Tokens tile;
    u32 refined = 0;
    if (is_tile) {
      await_copies<kKeyStages - 1>();
      __syncwarp();
      tile = open(range, token, stage);
      if (token == course.token) settle_reference(tile, trusted);
      const int ahead = token + kKeyStages * course.step;
      if (ahead < course.end) fetch(range, ahead, stage);
      stage = stage + 1 < kKeyStages ? stage + 1 : 0;
      refined = __ballot_sync(kAllLanes, tile.key_planes >= 2);
    }
    const bool is_full = is_tile ? queued_keys + __popc(refined) > kTile : queued_keys > 0;
    // First the queue, if there is no room in it, then the tile: in one loop, so that the code of
    // `settle` stands once.
#pragma unroll 1
    for (bool is_queue = is_full; is_queue || is_tile; is_queue = false) {
      Tokens t;
      if (is_queue) {
        t = refine();
      } else {
        push_keys(tile, refined);
        t = tile;
        if (refined >> lane & 1) t.leave();
      }
      settle(t, !is_queue);
      if (!is_queue) break;
    }
    if (!is_tile) break;
    commit_copies();
  }
  if (queued_values) add_values();
}
