// Rows in, digit planes out: a whole prefill (or any number of new tokens) in one launch, and the
// statistics that the transforms are fitted to.

#include "append.cuh"
#include "rows.cuh"

constexpr int kEncodeThreads = kEncodeWarps * kWarpSize;

// First element of row (sequence, head, i) among new rows.
__device__ __forceinline__ const RowBits* new_row(
    const RowBits* rows, const i64 (&strides)[3], int sequence, int head, int i) {
  return rows + sequence * strides[0] + head * strides[1] + i * strides[2];
}

// A warp encodes one token.  grid: (ceil(S / kEncodeWarps), B * Hkv)
extern "C" __global__ void __launch_bounds__(kEncodeThreads)
    encode(const __grid_constant__ EncodeArguments arguments) {
  __shared__ Words words[kEncodeWarps];
  const Cache& cache = arguments.cache;
  const NewRows& rows = arguments.rows;
  const int warp = threadIdx.x / kWarpSize;
  const int i = blockIdx.x * kEncodeWarps + warp;
  if (i >= rows.tokens) return;
  const int sequence = blockIdx.y / cache.kv_heads, head = blockIdx.y % cache.kv_heads;
  const int length = cache.lengths[sequence] + rows.tokens;
  const int token = length - rows.tokens + i;
  if (token >= cache.capacity) return;  // see `overfull`
  encode_token(cache, sequence, head, token, length,
               new_row(rows.keys, rows.key_strides, sequence, head, i),
               new_row(rows.values, rows.value_strides, sequence, head, i), words[warp]);
}

// Count the tokens that `encode` has written.  grid: B; block: 1
extern "C" __global__ void advance(const __grid_constant__ EncodeArguments arguments) {
  arguments.cache.lengths[blockIdx.x] += arguments.rows.tokens;
}

// ---- statistics ---------------------------------------------------------------------------------

constexpr int kFitRows = 32;  // rows that a block reads at once

// Sums of one channel.  In float64: a mean far from zero must not eat the spread around it.
struct Sums {
  double key, key_square, value;
  int keys, values;  // numbers that went in
};

__device__ __forceinline__ void add(Sums& sums, const Sums& other) {
  sums.key += other.key;
  sums.key_square += other.key_square;
  sums.value += other.value;
  sums.keys += other.keys;
  sums.values += other.values;
}

// Set key_mean and value_mean, and leave the keys' root mean square around their mean in `balance`
// if it is to be fitted.  NaN and infinity stay out: they may sit in rows that nobody attends.
// grid: (ceil(D / 32), B * Hkv); block: (32, kFitRows), x over channels
extern "C" __global__ void __launch_bounds__(kWarpSize * kFitRows)
    fit(const __grid_constant__ FitArguments arguments) {
  __shared__ Sums partial[kFitRows][kWarpSize];
  const Cache& cache = arguments.cache;
  const NewRows& rows = arguments.rows;
  const int sequence = blockIdx.y / cache.kv_heads, head = blockIdx.y % cache.kv_heads;
  const int c = blockIdx.x * kWarpSize + threadIdx.x;
  const int padding = max(0, cache.starts[sequence] - cache.lengths[sequence]);
  Sums sums = {};
  if (c < kHeadDim) {
    for (int i = padding + threadIdx.y; i < rows.tokens; i += kFitRows) {
      const RowBits key = new_row(rows.keys, rows.key_strides, sequence, head, i)[c];
      const RowBits value = new_row(rows.values, rows.value_strides, sequence, head, i)[c];
      const float k = to_float<kRowDtype>(key), v = to_float<kRowDtype>(value);
      if (isfinite(k)) {
        const double wide = k;
        add(sums, {wide, wide * wide, 0.0, 1, 0});
      }
      if (isfinite(v)) add(sums, {0.0, 0.0, v, 0, 1});
    }
  }
  partial[threadIdx.y][threadIdx.x] = sums;
  __syncthreads();
  if (threadIdx.y != 0 || c >= kHeadDim) return;
  for (int y = 1; y < kFitRows; ++y) add(sums, partial[y][threadIdx.x]);
  const i64 at = head_index(cache, sequence, head) * kHeadDim + c;
  const double keys = max(sums.keys, 1), values = max(sums.values, 1);
  const float mean = static_cast<float>(sums.key / keys);
  cache.key_mean[at] = mean;
  cache.value_mean[at] = static_cast<float>(sums.value / values);
  if (arguments.query_size != nullptr) {
    const double m = mean;
    const double square = sums.key_square / keys - 2 * m * (sums.key / keys) + m * m;
    cache.balance[at] = static_cast<float>(sqrt(max(square, 0.0)));
  }
}

// log2 of a channel's size, as if none were 2^-20 times smaller than the largest: a channel that no
// query uses, or whose keys are all alike, has no say in the balance of others (transform.py).
__device__ __forceinline__ double log2_floored(double x, double largest) {
  return log2(max(x, max(largest * 0x1p-20, 0x1p-1022)));
}

// Turn the spread that `fit` left in `balance` into powers of two (transform.py, _balance).
// grid: B * Hkv; block: D threads
extern "C" __global__ void __launch_bounds__(kHeadDim)
    fit_balance(const __grid_constant__ FitArguments arguments) {
  __shared__ double exponents[kHeadDim];
  constexpr double kMaxExponent = 13;  // transform.py, MAX_BALANCE_EXPONENT
  constexpr int kHalf = kHeadDim / 2;  // channels i and i + D/2 are a rotary pair
  const i64 first = static_cast<i64>(blockIdx.x) * kHeadDim;
  float* balance = arguments.cache.balance + first;
  const float* size = arguments.query_size + first;
  const auto spread_of = [&](int i) {
    const double a = balance[i], b = balance[i + kHalf];
    return sqrt((a * a + b * b) / 2);
  };
  const auto size_of = [&](int i) { return (static_cast<double>(size[i]) + size[i + kHalf]) / 2; };
  const int c = threadIdx.x, low = c % kHalf;
  double most_spread = 0, most_size = 0;
#pragma unroll 1
  for (int i = 0; i < kHalf; ++i) {
    most_spread = max(most_spread, spread_of(i));
    most_size = max(most_size, size_of(i));
  }
  const double spread = log2_floored(spread_of(low), most_spread);
  exponents[c] = rint((spread - log2_floored(size_of(low), most_size)) / 2);
  __syncthreads();
  double largest = exponents[0];
#pragma unroll 1
  for (int i = 1; i < kHalf; ++i) largest = max(largest, exponents[i]);
  double smallest = largest;
#pragma unroll 1
  for (int i = 0; i < kHalf; ++i) {
    smallest = min(smallest, max(exponents[i], largest - kMaxExponent));
  }
  const double mine = max(exponents[c], largest - kMaxExponent) - smallest;
  balance[c] = static_cast<float>(exp2(mine));
}
