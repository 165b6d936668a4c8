// A warp of decode.cu: what it holds, and its walk over tiles of 32 tokens.
//
//   open    scores from first key planes, and the plan of the tokens (open.cuh)
//   refine  scores from the other key planes (refine.cuh)
//   settle  weights, sums of the bound, the plan of value rows (settle.cuh)
//   add     products of 32 value rows, of any tiles (values.cuh)
//
// A tile is opened before the one in front of it is settled, and value rows wait in a queue until it
// is full: so a copy has about a tile's time to arrive, and tensor cores work on full tiles of values
// however few rows are wanted.

#include "bounds.cuh"
#include "copies.cuh"
#include "mma.cuh"
#include "products.cuh"
#include "query.cuh"
#include "tiles.cuh"

static_assert(kWidths[0] == 4, "a first plane has four bits");
static_assert(kWidths[1] <= 4, "a second plane has at most four bits");

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

// A token a lane.
struct Tokens {
  float score[kGroup];  // log2, relative to the hint
  float uncapped[kSoftcap ? kGroup : 1];
  u32 scales;           // key in the low half, value in the high
  int first_token;      // of the tile; -1: there is none
  int token;            // of this lane
  float chance;         // with which the value row is read
  Plan key, value;      // what is to be read, or was
  SettledToken settled;

  __device__ __forceinline__ float key_scale() const { return scale_of(scales & 0xffff); }
  __device__ __forceinline__ float value_scale() const { return scale_of(scales >> 16); }
  // Make it no token: nothing is read.
  __device__ __forceinline__ void close() { leave(), scales = 0, token = first_token = -1; }
  // Make it a token without weight.
  __device__ __forceinline__ void leave() {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) score[g] = kNever;
    key = Plan::one_plane(), value = Plan::skip(), chance = 1.0f;
  }
};

// Which lanes of a tile want more key planes than the first.
struct FinerLanes {
  u32 second, third;
  bool share_rows;  // rows of the third plane lie behind those of the second, and are multiplied with them
};
// The settled rule wants the planes' scores one after the other.
constexpr int width_of(int plane) { return plane < kStoredPlanes ? kWidths[plane] : 0; }
constexpr bool kThirdIsLikeSecond = !kSettled && width_of(2) == width_of(1);

// How the weights of a queue of values became digits (values.cuh).
enum class WeightDigits { UnitOfTheta, OwnUnit, Fine };

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
        rows(arguments.cache, sequence, head),
        part(of_head % kSubgroups),
        warp(warp),
        // Read anew, it costs more than a register, where there is one; the remainder tells its range,
        // without which loops that begin at it would be a lane's own.
        lane(kSettled || kExactRows ? lane_of_thread() : held(lane_of_thread()) % kWarpSize),
        r(lane / 4),
        c(lane % 4),
        weights_at(shared_address(&mine.weights[0][r / 2][4 * c])) {}

  // Fetch the first key plane and the scales of a tile into a stage.  Of tokens that are not attended
  // nothing is read.
  __device__ __forceinline__ void fetch(const Range& range, int token, int stage) const {
    const TileRows at = TileRows::of(rows, token);
    const u32 keys = shared_address(mine.key_first[stage]);
    const u32 scale = shared_address(&mine.scales[stage][lane]);
    const u32* scales = a.cache.scales + at.of_row(lane);
    if (token >= range.first && token + kTile <= range.end) {
      copy_rows<0, true>(keys, a.cache.key_planes[0], at, kAllLanes, lane);
      copy_async<4>(scale, scales);
    } else {
      const bool is_attended = range.holds(token + lane);
      const u32 attended = __ballot_sync(kAllLanes, is_attended);
      copy_rows<0>(keys, a.cache.key_planes[0], at, attended, lane);
      copy_async_or_zero<4>(scale, scales, is_attended);
    }
  }

  __device__ __forceinline__ void run(const Range& range, const Course& course);
  __device__ __forceinline__ Tokens open(const Range& range, int first_token, int stage);
  __device__ __forceinline__ FinerLanes finer_lanes(const Tokens& t) const;
  __device__ __forceinline__ void fetch_finer(const Tokens& t, FinerKeys& to);
  template <int kPlane>
  __device__ __forceinline__ void fetch_rare(
      const Tokens& t, int place_of_second, int place, FinerKeys& to);
  __device__ __forceinline__ void settle_reference(const Tokens& t);
  __device__ __forceinline__ void refine(Tokens& t, FinerKeys& keys);
  template <int kPlane>
  __device__ __forceinline__ void add_rare_planes(
      Tokens& t, int place, bool has_third, FinerKeys& keys);
  __device__ __forceinline__ void settle(Tokens& t, float (&scaled)[kGroup]);
  __device__ __forceinline__ Plan plan_value(const Tokens& t, bool is_finer);
  __device__ __forceinline__ void add_to_classes(const Tokens& t, const float (&scaled)[kGroup]);
  __device__ __forceinline__ void leave_classes();
  __device__ __forceinline__ void push_values(
      const Tokens& t, const float (&scaled)[kGroup], u32 wanted);
  __device__ __forceinline__ void add_values();
  __device__ __forceinline__ float leave_digits(u16* digits, float number) const;
  __device__ __forceinline__ WeightDigits leave_weights(int token, Plan plan);
  __device__ __forceinline__ void load_weights(int pass, WeightDigits digits);
  template <class Body>
  __device__ __forceinline__ void with_weights(WeightDigits digits, Body body);
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
  template <int kSum>
  __device__ __forceinline__ float sum_of_lane(int g);
  __device__ __forceinline__ void leave_sums();
  template <int kHeadBlock>
  __device__ __forceinline__ void leave_outputs();
  // The settled rule (settled_rule.cuh).
  __device__ __forceinline__ void start_settling(Tokens& t) const;
  template <int kPlanes>
  __device__ __forceinline__ void keep_or_drop(Tokens& t, int place, bool is_finer);
  __device__ __forceinline__ SettledToken settled_token(const Tokens& t) const;
  template <class SumsOfBound>
  __device__ __forceinline__ void start_sums(SumsOfBound& sums);
  __device__ __forceinline__ void leave_extremes();

  // First of the classes of a tile.  Those of its tokens differ from it in the lowest bits alone.
  __device__ __forceinline__ static int first_class(const Tokens& t) {
    return dither_class(t.first_token) & ~(kTile - 1);
  }

  // This lane's place among those of a mask.
  __device__ __forceinline__ int place_in(u32 lanes) const { return __popc(lanes & ((1u << lane) - 1)); }

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
  const int sequence, head;
  const HeadRows rows;
  const int part, warp, lane, r, c;
  const u32 weights_at;  // of the lane's digits of weights

  int queued_values = 0;

  // The rows whose products are being added.
  u32 weights[kHeadBlocks][2];
  float weight_unit[kHeadBlocks];

  float output[kHeadBlocks][kOutputs] = {};
  float total[kGroup] = {};       // sum of weights
  float offsets[kGroup] = {};     // of weights times what digits are off by (values.cuh)
  // Of weights times value scales: B of theory.md (2.3) of the class that is the lane's in a block of
  // classes, which starts at `class_place` among the warp's own.
  float of_class[kGroup] = {};
  int class_place = 0;
  Sums sums;
  float largest_draw = kNever;    // log2 of M / theta_s, times the denominator
  bool shifted = false;           // the reference is not the hint
};

// All tiles of the warp, and at the end what is left in the queue.  There are two rounds more than
// tiles, so that the code of each stage stands once: instructions are fetched slower than executed.
__device__ __forceinline__ void Worker::run(const Range& range, const Course& course) {
  if (course.token >= course.end) return;
  clear_second_values();
  Tokens t;
  int stage = 0;
  t.close();
  const int end = course.end, step = course.step;
  commit_copies();
#pragma unroll 1
  for (int token = course.token;; token += step) {
    // Two groups of copies a round: keys of the tiles ahead; values, which have time until the queue
    // is full.
    await_copies<1>();
    __syncwarp();
    const bool is_open = t.first_token >= 0;
    refine(t, mine.finer);
    const bool has_next = token < end;
    Tokens next;
    if (has_next) {
      next = open(range, Course::tile_at(token), stage);
      if (!is_open) settle_reference(next);
      fetch_finer(next, mine.finer);
      const int ahead = token + kKeyStages * step;
      if (ahead < end) fetch(range, Course::tile_at(ahead), stage);
      stage = stage + 1 < kKeyStages ? stage + 1 : 0;
    } else {
      next.close();
    }
    commit_copies();
    float weight[kGroup];  // times value scale, over the chance
    u32 wanted = 0;        // value rows
    if (is_open) {
      settle(t, weight);
      wanted = __ballot_sync(kAllLanes, t.value.reads_any());
    }
    const bool is_end = !is_open && !has_next;
    const int room_wanted = is_end ? kTile : __popc(wanted);
    if (queued_values > 0 && queued_values + room_wanted > kTile) {
      await_copies<1>();  // all but what was asked for in this round
      __syncwarp();
      add_values();
    }
    if (is_end) break;
    if (wanted) push_values(t, weight, wanted);
    commit_copies();
    t = next;
  }
}
