// The planes of the paper's kernel, where they lie, and the exponents by which they are chosen (paper.cu).

#include "lanes.cuh"

constexpr int kPaperWarps = 8;
constexpr int kPaperThreads = kPaperWarps * kWarpSize;
constexpr int kPaperPlanes = 3;
// Tokens of a tile of keys; a channel of a tile lies in one piece, so that skipping it saves bytes.
constexpr int kPaperTile = 128;
constexpr int kPaperVector = 4;  // fp16 numbers that a lane takes of a row or of a channel
static_assert(kHeadDim == kWarpSize * kPaperVector, "the paper's kernel takes 128 channels");
static_assert(kPaperTile == kWarpSize * kPaperVector, "a warp reads a channel of a tile at once");

// Exponent of x >= 0 as fp16 has it: subnormals count as 2^-15.
__device__ __forceinline__ int exponent(float x) {
  return max(static_cast<int>(__float_as_uint(x) >> 23) - 127, -15);
}

// log2 of x > 0, linear within a binade.
__device__ __forceinline__ float linear_log2(float x) {
  return static_cast<float>(__float_as_uint(x)) * 0x1p-23f - 127.0f;
}

// Planes that an addend needs whose exponent lies `gap` below the sum's.
__device__ __forceinline__ int planes_of_gap(float gap, int gap_of_two, int gap_of_one) {
  return gap >= gap_of_one ? 1 : gap >= gap_of_two ? 2 : 3;
}

// Raise a maximum of non-negative floats: they are ordered like their bits.
__device__ __forceinline__ void raise(float* largest, float x) {
  atomicMax(reinterpret_cast<u32*>(largest), __float_as_uint(x));
}

// Four nibbles of 16 bits into the lower halves of four bytes: dcba -> 0d 0c 0b 0a.
__device__ __forceinline__ u32 spread_nibbles(u32 nibbles) {
  const u32 pairs = (nibbles | nibbles << 8) & 0x00ff00ffu;
  return (pairs | pairs << 4) & 0x0f0f0f0fu;
}

// Undo `spread_nibbles`.
__device__ __forceinline__ u32 gather_nibbles(u32 bytes) {
  const u32 pairs = (bytes | bytes >> 4) & 0x00ff00ffu;
  return (pairs | pairs >> 8) & 0xffffu;
}

// Four fp16 numbers from what was read of their planes; the rest in the middle of its range.
template <int kRead>
__device__ __forceinline__ void assemble(
    float (&x)[kPaperVector], u32 high, u32 middle, u32 low) {
  u32 rest = 0x80808080u;
  if constexpr (kRead == 2) rest = spread_nibbles(middle) << 4 | 0x08080808u;
  if constexpr (kRead == 3) rest = spread_nibbles(middle) << 4 | spread_nibbles(low);
  // Bytes (high, rest) of numbers 0 and 1, then of 2 and 3.
  const u32 pair[2] = {__byte_perm(high, rest, 0x1504), __byte_perm(high, rest, 0x3726)};
#pragma unroll
  for (int i = 0; i < kPaperVector; ++i) {
    x[i] = to_float<Float::F16>(static_cast<u16>(pair[i / 2] >> 16 * (i % 2)));
  }
}

// KV head of a block.
struct Head {
  int sequence, kv_head;
  i64 index;  // into [B, Hkv]
};

__device__ __forceinline__ Head head_of_block(const PaperArguments& a) {
  const int sequence = blockIdx.y / a.kv_heads, kv_head = blockIdx.y % a.kv_heads;
  return {sequence, kv_head, static_cast<i64>(blockIdx.y)};
}

// Four neighbouring tokens of a channel of a tile, as the index of their group of four.
__device__ __forceinline__ i64 key_group(const PaperArguments& a, i64 head, int tile, int channel) {
  const i64 tiles = a.capacity / kPaperTile;
  return ((head * tiles + tile) * kHeadDim + channel) * kWarpSize + threadIdx.x % kWarpSize;
}

// Four neighbouring channels of a token.
__device__ __forceinline__ i64 value_group(const PaperArguments& a, i64 head, int token) {
  return (head * a.capacity + token) * kWarpSize + threadIdx.x % kWarpSize;
}

// The planes as groups of four numbers.
struct Planes {
  u32* high;
  u16* middle;
  u16* low;

  __device__ __forceinline__ Planes(u8* high, u8* middle, u8* low)
      : high(reinterpret_cast<u32*>(high)),
        middle(reinterpret_cast<u16*>(middle)),
        low(reinterpret_cast<u16*>(low)) {}

  __device__ __forceinline__ void store(i64 group, const u16 (&bits)[kPaperVector]) const {
    u32 high_bytes = 0, middle_nibbles = 0, low_nibbles = 0;
#pragma unroll
    for (int i = 0; i < kPaperVector; ++i) {
      high_bytes |= static_cast<u32>(bits[i] >> 8) << 8 * i;
      middle_nibbles |= (bits[i] >> 4 & 15u) << 8 * i;
      low_nibbles |= (bits[i] & 15u) << 8 * i;
    }
    high[group] = high_bytes;
    middle[group] = static_cast<u16>(gather_nibbles(middle_nibbles));
    low[group] = static_cast<u16>(gather_nibbles(low_nibbles));
  }
};
