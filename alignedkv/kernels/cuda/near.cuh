// What a step learns of its softmax before it plans: the log-sum-exp of the near rows' first scores.
//
// Near rows are the first and the last attended ones but the newest (policy.py, NEAR_FIRST).  They and
// the query's size hold most of what changes from token to token; the rest is remembered (state.rest).

#include "products.cuh"
#include "tiles.cuh"

constexpr bool kUsesNearRows = !kSettled;

// Tiles that may hold near rows: the first kNearFirst tokens lie in two at most.
constexpr int kNearTiles = 2 + (kNearLast + kTile - 1) / kTile + 1;

// What a tile's near rows come to; logarithms to base 2.
struct NearSums {
  float top[kHeads], sum[kHeads];  // of exp2(score - top)
  float square;                    // of key scales
  int count;
};

struct alignas(16) NearTile {
  u8 keys[kTile * kPlaneRowBytes[0]];
};

// The near rows of one tile, for one warp.
struct NearRows {
  int token;  // of the tile's first row
  u32 rows;   // mask of near rows
  u32 scale;  // bits of this lane's key scale

  __device__ __forceinline__ static bool is_near(const Range& range, int token) {
    const int end = range.end - 1;
    return token >= range.first && token < end &&
           (token < range.first + kNearFirst || token >= end - kNearLast);
  }
  // Tiles that hold the first rows, and the next that may hold some of the last.
  struct Tiles {
    int first, behind_first, last;

    __device__ __forceinline__ static Tiles of(const Range& range) {
      const int first = range.first / kTile;
      const int behind = (range.first + kNearFirst - 1) / kTile + 1;
      return {first, behind, max(behind, max(range.end - 1 - kNearLast, 0) / kTile)};
    }
    __device__ __forceinline__ int tile(int index) const {
      return first + index < behind_first ? first + index : last + index - (behind_first - first);
    }
  };
  __device__ __forceinline__ static NearRows of(const Range& range, int index) {
    const int tile = Tiles::of(range).tile(index);
    NearRows near;
    near.token = tile * kTile, near.scale = 0;
    near.rows = __ballot_sync(kAllLanes, is_near(range, near.token + lane_of_thread()));
    return near;
  }

  __device__ __forceinline__ void fetch(const Cache& cache, int sequence, int head, NearTile& to) {
    const int lane = lane_of_thread();
    if (!rows) return;
    const TileRows at = TileRows::of(HeadRows(cache, sequence, head), token);
    copy_rows<0>(shared_address(to.keys), cache.key_planes[0], at, rows, lane);
    commit_copies();  // a wait is for committed copies only
    if (rows >> lane & 1) scale = cache.scales[at.of_row(lane)] & 0xffff;
  }

  // Scores of the tile's near rows, summed.
  __device__ __forceinline__ void add_up(
      const DecodeArguments& a, const Query& query, const NearTile& tile, NearSums& to) const {
    const int lane = lane_of_thread(), r = lane / 4, c = lane % 4;
    const float key_scale = scale_of(scale);
    float score[kHeadBlocks][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int x[kHeadBlocks][2];
      key_products<4>(x, tile.keys + half * 16 * kPlaneRowBytes[0], query, lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 16 * half + r + 8 * i;
        const float of_row = __shfl_sync(kAllLanes, key_scale, row);
        const float* classes = query.classes[dither_class(token + row)];
#pragma unroll
        for (int b = 0; b < kHeadBlocks; ++b) {
          const int g = 4 * b + c;
          const float unit = query.numbers[kUnit16][g];
          float s = fmaf(of_row, fmaf(unit, static_cast<float>(x[b][i]), classes[g]),
                         query.numbers[kBase][g]);
          if constexpr (kSoftcap) s = a.step.softcap * kLog2e * tanhf(s);
          score[b][2 * half + i] = rows >> row & 1 ? s : -infinity();
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
      float top = -infinity(), sum = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) top = fmaxf(top, score[b][i]);
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, distance));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // NaN stays NaN; a row that is not near adds nothing, whatever lies there.
        if (score[b][i] != -infinity()) sum += exp2_fast(score[b][i] - top);
      }
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, distance);
      }
      if (r == 0) to.top[4 * b + c] = top, to.sum[4 * b + c] = sum;
    }
    float square = key_scale * key_scale;
#pragma unroll
    for (int distance = 16; distance; distance /= 2) {
      square += __shfl_xor_sync(kAllLanes, square, distance);
    }
    if (lane == 0) to.square = square, to.count = __popc(rows);
  }
};

constexpr float kLn2 = 0.693147181f;

// log(e^a + e^b); -infinity adds nothing.
__device__ __forceinline__ float log_add_exp(float a, float b) {
  const float larger = fmaxf(a, b), smaller = fminf(a, b);
  if (smaller == -infinity()) return larger;
  return fmaf(kLn2, log2_fast(1.0f + exp2_fast(kLog2e * (smaller - larger))), larger);
}

// The hint of log Z of one query head, from all near tiles and what is remembered of the other rows.
__device__ __forceinline__ void set_hint(
    const DecodeArguments& a, const NearSums (&tiles)[kNearTiles], Query& query, float rest, int g) {
  float top = -infinity(), sum = 0, square = 0;
  int count = 0;
  for (const NearSums& tile : tiles) {
    top = fmaxf(top, tile.top[g]);
    square += tile.square, count += tile.count;
  }
  for (const NearSums& tile : tiles) {
    if (tile.count) sum += tile.sum[g] * exp2_fast(tile.top[g] - top);
  }
  const float near = count ? kLn2 * (top + log2_fast(sum)) : -infinity();
  const float base = query.numbers[kBase][g], deviation = query.numbers[kDeviation][g];
  float explained;
  if constexpr (kSoftcap) {
    explained = a.step.softcap * tanhf(base);
  } else {
    // deviation is lambda ||q'|| / (2 sqrt 3).
    const float mean_square = square * reciprocal_fast(static_cast<float>(max(count, 1)));
    explained = fmaf(kNearSpread * 12.0f * deviation * deviation, mean_square, kLn2 * base);
  }
  query.numbers[kNear][g] = near;
  query.numbers[kExplained][g] = explained;
  query.numbers[kLogZ][g] =
      log_add_exp(near, rest == rest ? rest + explained : -infinity());
}

// What the other rows come to, for the next step; unchanged where this step cannot tell.
__device__ __forceinline__ float remembered(float rest, float log_z, float near, float explained) {
  if (near != -infinity() && !(log_z > near + 0x1p-10f)) return rest;
  const float share = exp2_fast(kLog2e * (near - log_z));
  const float found = fmaf(kLn2, log2_fast(1.0f - share), log_z) - explained;
  if (!(fabsf(found) < infinity())) return rest;
  return fabsf(rest) < infinity() ? fmaf(kRestGain, found - rest, rest) : found;
}
