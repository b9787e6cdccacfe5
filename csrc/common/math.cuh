// Functions of one float on the special-function and multiply-add units.
#pragma once

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LOG2E_LOW = 1.925963e-8f;  // what fp32 leaves off it
constexpr float LN2 = 0.6931471805599453f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// 2 ** x: one instruction, error 2 ** -22; results below 2 ** -126 are zero.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// What exp2_approx leaves off an exponent on average: 0.7e-8 to 4e-8, least near 0 (measured on an
// H200). Added within its multiplication it costs nothing, and 2 ** it is 1. A product of thousands
// of factors would sum the lack up.
constexpr float EXP2_LACK = 1e-8f;

// 2 ** (x y), to be multiplied with others of its kind
__device__ __forceinline__ float exp2_factor(float x, float y) {
    return exp2_approx(fmaf(x, y, EXP2_LACK));
}

// exp(x), off by |x| / 2 ** 24 besides: what rounding the exponent to fp32 costs.
__device__ __forceinline__ float exp_approx(float x) { return exp2_approx(LOG2E * x); }

// exp(x) without that: the rest of the exponent, in two parts, is multiplied in. x is at most 88;
// below -126 the result is zero, and so is the rest, which would be infinite.
__device__ __forceinline__ float exp_accurate(float x) {
    x = x < -126.0f ? -126.0f : x;
    const float exponent = LOG2E * x;
    const float rest = fmaf(x, LOG2E_LOW, fmaf(x, LOG2E, -exponent));
    const float power = exp2_approx(exponent);
    return fmaf(power, rest * LN2, power);
}

// 1 / x: one instruction, error one unit in the last place.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Terms FROM down to TO, by Horner's rule, of log(1 + e) / e for e in [0, 1]: minimax with 1 at 0,
// degree 8, 1.7e-7 of the value in fp32 and a tenth of that on average. log2(1 + e) would lose what
// a small e adds to 1.
template <int FROM, int TO>
__device__ __forceinline__ float softplus_terms(float sum, float e) {
    constexpr float TERMS[] = {1.0f,          -0.499996483f, 0.33321324f,
                               -0.248571634f, 0.191536546f,  -0.137538016f,
                               0.0792045295f, -0.030065788f, 0.00536482316f};
#pragma unroll
    for (int k = FROM; k >= TO; --k) sum = fmaf(sum, e, TERMS[k]);
    return sum;
}
