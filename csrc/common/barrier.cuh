// A barrier in shared memory at which warps arrive early and wait later. Phases follow each other;
// a wait names its phase by its parity.
//   EVERY_LANE_ARRIVES  1 for compute-sanitizer's racecheck, which counts a warp's first lane alone
//   as having arrived, whatever __syncwarp() there was before
#pragma once

#ifndef EVERY_LANE_ARRIVES
#define EVERY_LANE_ARRIVES 0
#endif

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// By one thread, before the block's first __syncthreads.
__device__ __forceinline__ void init_barrier(unsigned long long* barrier, unsigned n_warps) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(EVERY_LANE_ARRIVES ? 32 * n_warps : n_warps)
                 : "memory");
}

// By whole warps: what they wrote before is seen by those that wait.
__device__ __forceinline__ void arrive(unsigned long long* barrier) {
    __syncwarp();
    if (EVERY_LANE_ARRIVES || threadIdx.x % 32 == 0)
        asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(
                         shared_address(barrier))
                     : "memory");
}

__device__ __forceinline__ void wait(unsigned long long* barrier, int parity) {
    int is_over;
    do {
        asm volatile(
            "{ .reg .pred p;\n"
#if __CUDA_ARCH__ >= 900
            "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
#else
            "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
#endif
            "selp.b32 %0, 1, 0, p; }"
            : "=r"(is_over)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!is_over);
    __syncwarp();
}
