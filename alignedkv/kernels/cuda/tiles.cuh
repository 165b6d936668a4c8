// Which tokens a warp takes, where their rows lie, and how they come to shared memory.

#include "arguments.cuh"
#include "copies.cuh"
#include "products.cuh"
#include "rows.cuh"
#include "share.cuh"

static_assert(kDitherRows % kTile == 0, "the classes of a tile lie in one block of dither rows");
static_assert(kPageTokens == 0 || kPageTokens % 16 == 0, "a page holds half a tile at least");

template <int kValue>
struct Index {
  static constexpr int value = kValue;
};

// f(Index<kFrom>()), ..., f(Index<kTo - 1>()): a loop whose counter is a constant.
template <int kFrom, int kTo, class Body>
__device__ __forceinline__ void unrolled(Body body) {
  if constexpr (kFrom < kTo) {
    body(Index<kFrom>());
    unrolled<kFrom + 1, kTo>(body);
  }
}

// Tokens that are attended, and the tiles that hold them.
struct Range {
  int start, first, end;  // of the sequence; of the attended tokens, and their end

  __device__ __forceinline__ static Range of(int start, int length, int window) {
    return {start, max(start, window ? length - window : 0), length};
  }
  __device__ __forceinline__ int first_tile() const { return first / kTile; }
  __device__ __forceinline__ int tiles() const {
    return end > first ? (end - 1) / kTile + 1 - first_tile() : 0;
  }
  __device__ __forceinline__ bool holds(int token) const { return token >= first && token < end; }
  __device__ __forceinline__ bool is_exact(const Cache& cache, int token) const {
    return token < start + cache.exact_first || token >= end - cache.exact_last;
  }
  // Attended tokens that are kept exact.
  __device__ __forceinline__ int exact_tokens(const Cache& cache) const {
    const int at_start = max(0, min(start + cache.exact_first, end) - first);
    const int behind = max(end - cache.exact_last, max(start + cache.exact_first, first));
    return at_start + max(0, end - behind);
  }
};

// Sums per dither class.  The classes of a tile are one block of 32 dither rows, and every kDitherRows
// tokens hold a tile of each block.  Warps take the tiles in the order of their blocks there, and so
// meet every kBlocksApart-th block only: class sums of a warp are for these, of one block as a rule.
constexpr int kClassBlocks = kDitherRows / kTile;

constexpr int common_divisor(int a, int b) { return b ? common_divisor(b, a % b) : a; }
constexpr int kBlocksApart = common_divisor(kClassBlocks, kWarps);
constexpr int kOwnClasses = kDitherRows / kBlocksApart;

// Where a class lies among those that a warp meets.
__device__ __forceinline__ int own_class(int of_token) {
  if constexpr (kBlocksApart == 1) return of_token;
  return of_token / (kTile * kBlocksApart) * kTile + of_token % kTile;
}

// A warp's tiles, as tokens they begin with.  Taken in turn by all warps of a head, since important
// tokens come in runs; else each block has a run of neighbours.
struct Course {
  int token, end, step;

  __device__ __forceinline__ static Course of(const Range& range, int split, int splits, int warp) {
    // Whole blocks of dither rows; of those at the ends, tiles that nobody attends to are left out.
    const int first = range.first / kDitherRows * kClassBlocks;
    const int end = (range.end + kDitherRows - 1) / kDitherRows * kClassBlocks;
    const int tiles = range.end > range.first ? end - first : 0;
    Course course = of_tiles(first, tiles, split, splits, warp);
    if (course.token < course.end && tile_at(course.token) + kTile <= range.first) {
      course.token += course.step;
    }
    if (course.token < course.end) {
      const int steps = (course.end - 1 - course.token) / course.step;
      const int last = course.token + steps * course.step;
      if (tile_at(last) >= range.end) course.end = last;
    }
    return course;
  }

  // The tile at a place of the course.
  __device__ __forceinline__ static int tile_at(int token) {
    constexpr int kBlocks = (kDitherRows - 1) & ~(kTile - 1);
    return (token & ~(kDitherRows - 1)) | (dither_class(token) & kBlocks);
  }

  // Which of the kBlocksApart sorts of blocks it meets.
  __device__ __forceinline__ int first_block() const { return token / kTile % kBlocksApart; }

 private:
  __device__ __forceinline__ static Course of_tiles(
      int first_tile, int tiles, int split, int splits, int warp) {
    Course course;
    int first, end, step;
    if constexpr (kStridedTiles) {
      first = warp * splits + split, end = tiles, step = splits * kWarps;
    } else {
      const int begin = static_cast<int>(static_cast<i64>(tiles) * split / splits);
      first = begin + warp, step = kWarps;
      end = static_cast<int>(static_cast<i64>(tiles) * (split + 1) / splits);
    }
    course.token = (first_tile + first) * kTile;
    course.end = (first_tile + end) * kTile;
    course.step = step * kTile;
    return course;
  }
};

// Row i of a tile is row `low + i` of the planes, or `high + i` from 16 on (pages of 16 tokens).
struct TileRows {
  u32 low, high;

  __device__ __forceinline__ static TileRows of(const HeadRows& head, int token) {
    TileRows rows;
    rows.low = head.of(token);
    rows.high = rows.low;
    if constexpr (kPageTokens == 16) {
      const int above = token + 16;
      const bool exists = above / 16 < head.cache.max_pages;
      rows.high = head.of(exists ? above : token) - 16;
    }
    return rows;
  }
  __device__ __forceinline__ u32 of_row(int i) const {
    return kPageTokens == 16 && i >= 16 ? high + i : low + i;
  }
};

// The wanted rows of a tile to their places at `to`, zeros to the others; kAll: all are wanted.
template <int kPlane, bool kAll = false>
__device__ __forceinline__ void copy_rows(
    u32 to, const u8* plane, const TileRows& rows, u32 wanted, int lane) {
  constexpr int kWidth = kWidths[kPlane], kRowBytes = kPlaneRowBytes[kPlane];
  constexpr int kChunk = kRowBytes % 16 == 0 ? 16 : 8, kPerRow = kRowBytes / kChunk;
  const int row = lane / kPerRow, chunk = lane % kPerRow;
  // The rows that a lane copies are 32 / kPerRow apart: their swizzles are the same, or differ in one
  // bit for every other row.
  constexpr int kChange = swizzle_of<kWidth>(32 / kPerRow);
  const int swizzle = swizzle_of<kWidth>(row);
  to += row * kRowBytes;
  const u8* low = plane + row_offset(rows.low, kRowBytes) + lane * kChunk;
  const u8* high = plane + row_offset(rows.high, kRowBytes) + lane * kChunk;
  const u32 mine = wanted >> row;
  unrolled<0, kPerRow>([&](auto i) {
    constexpr int kIndex = decltype(i)::value, kOffset = kIndex * 32 * kChunk;
    u32 on;
    bool is_high;
    if constexpr (32 % kPerRow == 0) {
      on = mine & (1u << (32 / kPerRow * kIndex));
      is_high = kPerRow == 1 ? row >= 16 : kIndex >= kPerRow / 2;
    } else {
      const int this_row = (lane + 32 * kIndex) / kPerRow;
      on = wanted >> this_row & 1;
      is_high = this_row >= 16;
    }
    const u8* from = kPageTokens == 16 && is_high ? high : low;
    const u32 at = to + (chunk ^ swizzle ^ (kIndex % 2 ? kChange : 0)) * kChunk;
    if constexpr (kAll) {
      copy_async<kChunk, kOffset, kOffset>(at, from);
    } else {
      copy_async_or_zero<kChunk, kOffset, kOffset>(at, from, on);
    }
  });
}

// Row `row` of a plane, by one lane, to a slot of the tile at `to`.
template <int kPlane>
__device__ __forceinline__ void copy_row(u32 to, int slot, const u8* plane, u32 row) {
  constexpr int kWidth = kWidths[kPlane], kRowBytes = kPlaneRowBytes[kPlane];
  constexpr int kChunk = kRowBytes % 16 == 0 ? 16 : 8;
  const u32 at = to + slot * kRowBytes + swizzle_of<kWidth>(slot) * kChunk;
  const u8* from = plane + row_offset(row, kRowBytes);
  unrolled<0, kRowBytes / kChunk>([&](auto i) {
    constexpr int kByte = decltype(i)::value * kChunk;
    if constexpr (kSwizzled<kWidth>) {
      copy_async<kChunk, kByte & ~127, kByte>(at ^ (kByte & 127), from);
    } else {
      copy_async<kChunk, kByte, kByte>(at, from);
    }
  });
}

// Value rows of a plane that few of 32 slots have, zeros for the others.  Of 8 bits, the half of a row
// that starts at `plane`, as a row of 4 bits.
template <int kPlane, class RowOf>
__device__ __forceinline__ void copy_late_rows(
    u32 to, const u8* plane, RowOf row_of, u32 wanted, int lane) {
  constexpr int kWidth = kWidths[kPlane] == 8 ? 4 : kWidths[kPlane], kRowBytes = kRowBytesOf<kWidth>;
  constexpr int kChunk = kRowBytes % 16 == 0 ? 16 : 8, kPerRow = kRowBytes / kChunk;
#pragma unroll 1
  for (int id = lane; id < kTile * kPerRow; id += 32) {
    const int slot = id / kPerRow, chunk = id % kPerRow;
    const bool is_wanted = wanted >> slot & 1;
    const u32 row = is_wanted ? row_of(slot) : 0;
    const u8* from = plane + row_offset(row, kPlaneRowBytes[kPlane]) + chunk * kChunk;
    const u32 at = to + slot * kRowBytes + (chunk ^ swizzle_of<kWidth>(slot)) * kChunk;
    copy_async_or_zero<kChunk>(at, from, is_wanted);
  }
}
