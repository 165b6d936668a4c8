// Asynchronous copies to shared memory, and the few instructions that CUDA C++ has no words for.

#include "dtypes.cuh"

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// x, kept in a register: left alone, the compiler makes some numbers anew wherever they are used.
__device__ __forceinline__ u32 held(u32 x) {
  asm("" : "+r"(x));
  return x;
}

// Shared memory whose address stays in a register.
__device__ __forceinline__ void* held_address(void* shared) {
  return __cvta_shared_to_generic(held(shared_address(shared)));
}

// 16 bytes bypass L1; 4 and 8 cannot.  Offsets are immediates of the instruction.
template <int kBytes, int kTo = 0, int kFrom = 0>
__device__ __forceinline__ void copy_async(u32 to, const void* from) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;"
                 :: "r"(to), "l"(from), "n"(kTo), "n"(kFrom) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0 + %2], [%1 + %3], %4;"
                 :: "r"(to), "l"(from), "n"(kTo), "n"(kFrom), "n"(kBytes) : "memory");
  }
}

// Where `on` is 0, zeros; nothing is read.  (The condition is spelled out: of a number of bytes the
// compiler makes it anew.)
template <int kBytes, int kTo = 0, int kFrom = 0>
__device__ __forceinline__ void copy_async_or_zero(u32 to, const void* from, u32 on) {
  if constexpr (kBytes == 16) {
    asm volatile("{.reg .pred p; .reg .u32 n; setp.ne.u32 p, %4, 0; selp.u32 n, 16, 0, p;\n"
                 "cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16, n;}"
                 :: "r"(to), "l"(from), "n"(kTo), "n"(kFrom), "r"(on) : "memory");
  } else {
    asm volatile("{.reg .pred p; .reg .u32 n; setp.ne.u32 p, %4, 0; selp.u32 n, %5, 0, p;\n"
                 "cp.async.ca.shared.global [%0 + %2], [%1 + %3], %5, n;}"
                 :: "r"(to), "l"(from), "n"(kTo), "n"(kFrom), "r"(on), "n"(kBytes) : "memory");
  }
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// All groups but the last `kPending` have landed, for this lane's copies.
template <int kPending>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" :: "n"(kPending) : "memory");
}

// Programmatic dependent launch (compute capability 9 and up; before that, a kernel starts when the one
// before it has ended).  What the kernel before has written is there ...
__device__ __forceinline__ void await_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ... and the kernel behind may be started.
__device__ __forceinline__ void release_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 2^x and log2 x, to 2^-22 relative and absolute (theory.md, Theorem 12); subnormals count as 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Count an arrival; what those have written who came before is there, and what this block has written
// will be there for those who come later.  Returns how many came before.
__device__ __forceinline__ u32 arrive(u32* count) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
  return before;
}

// Written by another block of this launch: past the L1.
__device__ __forceinline__ float4 load_past_l1(const float4* from) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(from) : "memory");
  return x;
}
__device__ __forceinline__ float load_past_l1(const float* from) {
  float x;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
  return x;
}
__device__ __forceinline__ u32 load_past_l1(const u32* from) {
  u32 x;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}
__device__ __forceinline__ void store_past_l1(float* to, float x) {
  asm volatile("st.global.cg.f32 [%0], %1;" :: "l"(to), "f"(x) : "memory");
}
