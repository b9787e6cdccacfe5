// Functions of one float on the special-function and multiply-add units.
#pragma once

constexpr float LOG2E = 1.4426950408889634f;

// 2 ** x: one instruction, error 2 ** -22; results below 2 ** -126 are zero.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x: one instruction, error one unit in the last place.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x / (1 + exp(-x))
__device__ __forceinline__ float silu(float x) { return x * reciprocal(1.0f + exp2_approx(-LOG2E * x)); }

// Terms `from` down to `to` of a polynomial by Horner's rule: log(1 + e) / e for e in [0, 1], minimax,
// degree 8, 1.8e-7 in fp32.
template <int FROM, int TO>
__device__ __forceinline__ float softplus_terms(float sum, float e) {
    constexpr float TERMS[] = {0.99999997f,  -0.499994931f, 0.333190968f,  -0.248429822f, 0.191060068f,
                               -0.136632458f, 0.0782259521f, -0.0295052389f, 0.0052326943f};
#pragma unroll
    for (int k = FROM; k >= TO; --k) sum = fmaf(sum, e, TERMS[k]);
    return sum;
}

// log(1 + exp(x)) to 3e-7 of its value for every x: exp(-|x|) lies in (0, 1]. log2(1 + e) would lose
// what a small e adds to 1.
__device__ __forceinline__ float softplus(float x) {
    const float e = exp2_approx(-LOG2E * fabsf(x));
    return fmaf(softplus_terms<8, 0>(0.0f, e), e, fmaxf(x, 0.0f));
}
