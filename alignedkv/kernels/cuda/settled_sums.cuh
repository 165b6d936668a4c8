// The sums of a statistical bound (theory.md, Corollary 8 under the settled rule).
//
// They are more than a lane has registers for: it keeps them in shared memory, and adds to them there.

// Sums of a head over the tokens of each class.
enum ClassSum {
  kDither,      // B of theory.md (2.3): weights times value scales
  kLinear,      // of a statistical bound, with p^U for p: p sigma ...
  kLinearSize,  // ... times the row's size
  kSquare,      // p gamma sigma^2 ...
  kSquareSize,  // ... times the row's size
  kValueError,  // p times the value row's error
  kAllClassSums
};

// Gamma(x) = (e^x - 1 - x) / x^2 for x >= 0, from above.
__device__ __forceinline__ float curvature(float x) {
  if (x < 0.5f) {
    const float tail = fmaf(x, fmaf(x, fmaf(x, 1.0f / 660, 1.0f / 120), 1.0f / 24), 1.0f / 6);
    return (1.0f + 0x1p-20f) * fmaf(x, tail, 0.5f);
  }
  const float beyond = fmaf(1.0f + 0x1p-17f, exp2_fast(x * kLog2e), -1.0f) - x;
  return beyond * reciprocal_fast(x * x);
}

template <>
struct SumsOf<Bound::Statistical> {
  // Theorem 5's come first: it may be the smaller bound.  Of an output that left rows out it says
  // nothing.
  static constexpr int kCertainSums = kSampleValues ? 0 : SumsOf<Bound::Deterministic>::kCount;
  static constexpr int kLikely = kCertainSums;      // weights at their smallest that is likely
  static constexpr int kShifted = kLikely + 1;      // weights at their largest, times e^shift - 1 ...
  static constexpr int kShiftedSize = kLikely + 2;  // ... times the row's size
  static constexpr int kOutright = kLikely + 3;     // skipped rows, means of errors, rounding
  static constexpr int kDrawn = kLikely + 4;        // variance of sampling
  static constexpr int kCount = kLikely + 4 + kSampleValues;

  // Of a warp, in shared memory.
  struct Memory {
    float lanes[kCount][kGroup][32];
    float classes[kAllClassSums - 1][kGroup][kOwnClasses];
    float largest_scales[2][32];  // of keys that err, and of all values; by lane
  };
  Memory* memory;
  const float (*numbers)[kHeads];    // of the query
  const float (*constants)[kHeads];  // of the hints
  const float* reference;

  // Coefficients of a token that all heads share: zeros where its row is kept exact or nobody attends
  // to it.
  struct Shared {
    SettledToken token;
    float key_scale, value_scale, read_step;
    float size;         // a
    float value_error;  // half step of the value planes; 0 for a row that is skipped
    float certain_value, outright, drawn;
    static constexpr bool is_coarse = false;
  };
  __device__ __forceinline__ Shared shared_of(const Token& token, float) const;

  // A token's terms; returns its weight.
  template <bool>
  __device__ __forceinline__ float add(int g, float score, const Shared& s, float, float);

  // A weight's rounding errs like a value.
  __device__ __forceinline__ void add_rounding(int g, float lost) {
    const float error = kLargestPrefix * fabsf(lost);
    if constexpr (!kSampleValues) add_to(2, g, error);
    add_to(kOutright, g, error);
  }

  // A row kept exact has no error but that of its weight.
  __device__ __forceinline__ void add_exact(int g, float weight) {
    const float smallest = weight * (1.0f - kWeightRounding);
    if constexpr (!kSampleValues) add_to(3, g, smallest);
    add_to(kLikely, g, smallest);
  }

  template <int kSum>
  __device__ __forceinline__ float at(int g) const {
    return memory->lanes[kSum][g][lane_of_thread()];
  }
  __device__ __forceinline__ static constexpr bool is_square(int sum) { return sum == kDrawn; }

 private:
  __device__ __forceinline__ void add_to(int sum, int g, float term) {
    memory->lanes[sum][g][lane_of_thread()] += term;
  }
  __device__ __forceinline__ float stops(
      int g, const SettledToken& token, float first_spread, float spread, float reach) const;
};
using SettledSums = SumsOf<Bound::Statistical>;
