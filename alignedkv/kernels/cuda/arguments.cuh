// What kernels are told at run time: one struct per kernel, passed by value.
//
// THE list of arguments.  arguments.py reads this file: it lays the structs out for NumPy, finds
// each member's value by its name, and checks arrays against the shapes in the trailing comments.
// So a member is declared here and nowhere else.
//
// A member is `type name;  // [shape] what it is`.  A shape is a list of products of whole numbers
// and of the names in arguments.py, `Sizes`: B, Hkv, H, G, T, D, C, N, P, ...  `*rows` stands for
// the dimensions that hold tokens: [B, Hkv, T] contiguous, [pages, Hkv, page_tokens] paged.  After
// the shape, `or null` marks an array that may be absent, and `strided` one whose rows (its last
// dimension) need not lie one behind the other.

#include "dtypes.cuh"

// One layer's cache (arrays.py, CacheArrays).
struct Cache {
  u8* key_planes[kStoredPlanes];    // [*rows, plane_bytes] most significant first
  u8* value_planes[kStoredPlanes];  // [*rows, plane_bytes]
  u32* scales;                      // [*rows] bfloat16: key in the low half, value in the high
  float* key_mean;                  // [B, Hkv, D]
  float* balance;                   // [B, Hkv, D] powers of two
  float* value_mean;                // [B, Hkv, D]
  float* signs;                     // [C] +-1
  i16* dither;                      // [2, P, C] of keys and values, in units of 2^-4
  i32* lengths;                     // [B] tokens t < lengths[b] are valid ...
  i32* starts;                      // [B] ... from starts[b] on
  i32* block_table;                 // [B, max_pages] or null: page of every kPageTokens tokens
  RowBits* exact_keys;              // [B, Hkv, exact_slots, D] or null: see exact_slot
  RowBits* exact_values;            // [B, Hkv, exact_slots, D] or null
  i32 kv_heads;                     // Hkv
  i32 capacity;                     // T: most tokens of a sequence
  i32 max_pages;                    // columns of block_table
  i32 exact_first;                  // tokens from the start that are kept exact
  i32 exact_last;                   // tokens to the end that are kept exact
};

// What a step wants to know of each query head beforehand (arrays.py, HeadState).
struct State {
  float* log_z;   // [B, H] natural log-sum-exp of the scores
  float* rest;    // [B, H] what all but near rows add to it, less what the query explains
  float* spread;  // [B, H] rho
  float* theta;   // [B, H] absolute threshold of an addend's error
  float* margin;  // [B, H] bits below the tolerance at which feedback aims
  float* work;    // [B, H] or null: rows that the head's KV head read, of all planes
  u32* step;      // [1] counts steps
};

// Run-time numbers of a step (arrays.py, StepArguments).
struct Step {
  float scaling;      // lambda
  float tolerance;    // allowed error relative to max |o|
  float deviations;   // z
  float skip_share;   // chi
  float plan_margin;  // standard deviations added to a planned weight
  i32 window;         // last tokens seen; 0 for all
  float softcap;      // 0 for none
  u32 seed;           // of the sampling hash
  i32 repairs;        // passes over heads whose bound missed
};

// New rows: strided, so that a transposed view needs no copy.
struct NewRows {
  RowBits* keys;         // [B, Hkv, S, D] strided or null (S = 0)
  RowBits* values;       // [B, Hkv, S, D] strided or null
  i64 key_strides[3];    // elements from one sequence, head, token to the next
  i64 value_strides[3];  // likewise
  i32 tokens;            // S
};

// encode.cu: `encode` writes tokens lengths[b] .. lengths[b] + S - 1; `advance` adds S to lengths.
struct EncodeArguments {
  Cache cache;
  NewRows rows;
};

// encode.cu: `fit` sets key_mean, value_mean and balance from rows that are about to be encoded.
struct FitArguments {
  Cache cache;
  NewRows rows;
  float* query_size;  // [B, Hkv, D] or null: mean |q| per channel; without it balance is left alone
};

// dequantise.cu: all stored planes back to rows.
struct DequantiseArguments {
  Cache cache;
  float* keys;    // [B, Hkv, S, D]
  float* values;  // [B, Hkv, S, D]
  i32 tokens;     // S: tokens 0 .. S - 1; those that nobody attends to become 0
};

// What a step answers (arrays.py, DecodeResult).
struct Result {
  QueryBits* output;  // [B, H, D]
  float* bound;       // [B, H]
  float* size;        // [B, H]
  u8* missed;         // [B, H]
  u32* reads;         // [B, Hkv, 2, N]
};

// What the kernels of a step hand to one another; allocated once (workspace.py), all zero at first.
struct Workspace {
  u8* queries;         // [B, Hkv, subgroups, query_bytes] `Query` of query.cuh
  float* partials;     // [blocks, partial_floats] `Partial` of block.cuh
  float* retry_theta;  // [B, H] theta of the next pass
  u32* retry;          // [2, B, Hkv, subgroups] whether a head missed, in even and odd passes
  u32* arrived;        // [B, Hkv, subgroups] blocks that are done
  u32* prepared;       // [B] blocks of prepare.cu that are done, of a sequence
  u32* all_prepared;   // [1] and of all
};

// prepare.cu and decode.cu: one step.  `state` holds its hints on entry, those of the next step on
// return.
struct DecodeArguments {
  Cache cache;
  NewRows rows;     // one row per head to append; tokens = 0 for none
  State state;
  Step step;
  Workspace workspace;
  Result result;
  QueryBits* query;  // [B, H, D]
  float* sinks;      // [H] or null: logit of each head's sink
  i32 heads;         // B Hkv subgroups
  i32 by_work;       // whether blocks go where the work of the step before was (share.cuh)
  i32 pass;          // 0, or which of step.repairs over the heads that missed
};

// paper.cu.  Tiles of keys hold 128 tokens.
struct PaperArguments {
  RowBits* keys;          // [B, Hkv, T, D] or null: fp16, of paper_encode alone
  RowBits* values;        // [B, Hkv, T, D] or null
  u8* key_high;           // [B, Hkv, key_tiles, D, 128]
  u8* key_middle;         // [B, Hkv, key_tiles, D, 64]
  u8* key_low;            // [B, Hkv, key_tiles, D, 64]
  u8* value_high;         // [B, Hkv, T, D]
  u8* value_middle;       // [B, Hkv, T, half_dim]
  u8* value_low;          // [B, Hkv, T, half_dim]
  float* key_largest;     // [B, Hkv, D] max |k| of each channel
  float* value_largest;   // [B, Hkv, D] max |v| of each channel
  i32* lengths;           // [B]
  QueryBits* query;       // [B, H, D] or null: of the other kernels
  float* expected;        // [B, H, D] or null: the output as far as it is known beforehand
  i32* channel_order;     // [B, Hkv, D] descending in planes read
  i32* value_exponent;    // [B, H] exponent of a weight whose row deserves all its bits
  float* scores;          // [B, H, T]
  float* split_largest;   // [B, H, splits]
  float* split_sum;       // [B, H, splits]
  float* partial_output;  // [B, H, splits, D]
  float* output;          // [B, H, D]
  u32* reads;             // [B, Hkv, 2, 3] key channels, value rows of which a plane was read
  i32 kv_heads;           // Hkv
  i32 capacity;           // T
  i32 splits;             // blocks per KV head
  float scaling;          // lambda
  i32 key_gap_of_two;     // exponents below the largest channel from which two planes do
  i32 key_gap_of_one;     // ... from which one does
  i32 value_gap_of_two;   // exponents below value_exponent
  i32 value_gap_of_one;
};
