// Tensors of one element type between global memory, as packed words, and registers, as floats.
//   DTYPE    the element: FP32, BF16 or FP16
//   ALIGNED  1 where every pointer and stride is a multiple of 16 bytes and no run of COUNT
//   elements is cut off
#pragma once

#define FP32 0
#define BF16 1
#define FP16 2

typedef long long i64;

#if DTYPE == FP32
typedef float element;
#else
typedef unsigned short element;
#endif

// COUNT elements in a row as 32-bit words; COUNT is a power of two.
template <int COUNT>
struct Packed {
    static constexpr int WORDS = (COUNT * int(sizeof(element)) + 3) / 4;
    unsigned words[WORDS];
};

// Bring what lies there from memory to the L2 cache.
__device__ __forceinline__ void prefetch(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

__device__ __forceinline__ unsigned bits(element value) {
#if DTYPE == FP32
    return __float_as_uint(value);
#else
    return value;
#endif
}

__device__ __forceinline__ element from_bits(unsigned word) {
#if DTYPE == FP32
    return __uint_as_float(word);
#else
    return element(word);
#endif
}

// The first `valid` of COUNT elements; zeros behind them.
template <int COUNT>
__device__ __forceinline__ Packed<COUNT> load_packed(const element* from, int valid) {
    Packed<COUNT> packed;
    constexpr int WORDS = Packed<COUNT>::WORDS;
#pragma unroll
    for (int w = 0; w < WORDS; ++w) packed.words[w] = 0;
    if (valid <= 0) return packed;
#if ALIGNED
    if constexpr (COUNT * sizeof(element) >= 16) {
#pragma unroll
        for (int w = 0; w < WORDS; w += 4) {
            uint4 four = __ldg(reinterpret_cast<const uint4*>(from) + w / 4);
            packed.words[w] = four.x, packed.words[w + 1] = four.y;
            packed.words[w + 2] = four.z, packed.words[w + 3] = four.w;
        }
        return packed;
    } else if constexpr (COUNT * sizeof(element) == 8) {
        uint2 two = __ldg(reinterpret_cast<const uint2*>(from));
        packed.words[0] = two.x, packed.words[1] = two.y;
        return packed;
    } else if constexpr (COUNT * sizeof(element) == 4) {
        packed.words[0] = __ldg(reinterpret_cast<const unsigned*>(from));
        return packed;
    }
#endif
    constexpr int PER_WORD = 4 / sizeof(element);
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
        if (k < valid) packed.words[k / PER_WORD] |= bits(__ldg(from + k)) << (k % PER_WORD * 16);
    return packed;
}

template <int COUNT>
__device__ __forceinline__ void store_packed(element* to, const Packed<COUNT>& packed, int valid) {
    if (valid <= 0) return;
#if ALIGNED
    if constexpr (COUNT * sizeof(element) >= 16) {
#pragma unroll
        for (int w = 0; w < Packed<COUNT>::WORDS; w += 4)
            reinterpret_cast<uint4*>(to)[w / 4] = make_uint4(
                packed.words[w], packed.words[w + 1], packed.words[w + 2], packed.words[w + 3]);
        return;
    } else if constexpr (COUNT * sizeof(element) == 8) {
        *reinterpret_cast<uint2*>(to) = make_uint2(packed.words[0], packed.words[1]);
        return;
    } else if constexpr (COUNT * sizeof(element) == 4) {
        *reinterpret_cast<unsigned*>(to) = packed.words[0];
        return;
    }
#endif
    constexpr int PER_WORD = 4 / sizeof(element);
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
        if (k < valid) to[k] = from_bits(packed.words[k / PER_WORD] >> (k % PER_WORD * 16));
}

// Between shared memory, where all is aligned, and registers: in chunks of 16 bytes that begin
// STRIDE elements apart, or less than one.
template <int COUNT, int STRIDE>
__device__ __forceinline__ Packed<COUNT> read_packed(const element* from) {
    Packed<COUNT> packed;
    constexpr int WORDS = Packed<COUNT>::WORDS;
    static_assert(COUNT * sizeof(element) % 4 == 0 && WORDS != 3, "whole words");
    if constexpr (WORDS == 1) {
        packed.words[0] = *reinterpret_cast<const unsigned*>(from);
    } else if constexpr (WORDS == 2) {
        uint2 two = *reinterpret_cast<const uint2*>(from);
        packed.words[0] = two.x, packed.words[1] = two.y;
    } else {
#pragma unroll
        for (int w = 0; w < WORDS; w += 4) {
            uint4 four = *reinterpret_cast<const uint4*>(from + w / 4 * STRIDE);
            packed.words[w] = four.x, packed.words[w + 1] = four.y;
            packed.words[w + 2] = four.z, packed.words[w + 3] = four.w;
        }
    }
    return packed;
}

// The part-th COUNT elements of some.
template <int COUNT, int OF>
__device__ __forceinline__ void write_packed(element* to, const Packed<OF>& packed, int part) {
    if constexpr (COUNT * sizeof(element) < 4) {
        static_assert(COUNT == OF, "whole words");
        *to = from_bits(packed.words[0]);
    } else {
#pragma unroll
        for (int w = 0; w < Packed<COUNT>::WORDS; ++w)
            reinterpret_cast<unsigned*>(to)[w] = packed.words[part * Packed<COUNT>::WORDS + w];
    }
}

template <int COUNT>
__device__ __forceinline__ float unpack(const Packed<COUNT>& packed, int k) {
#if DTYPE == FP32
    return __uint_as_float(packed.words[k]);
#elif DTYPE == BF16
    unsigned word = packed.words[k / 2];
    return __uint_as_float(k % 2 ? word & 0xffff0000u : word << 16);
#else
    float value;
    unsigned short half = static_cast<unsigned short>(packed.words[k / 2] >> (k % 2 * 16));
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
#endif
}

template <int COUNT>
__device__ __forceinline__ Packed<COUNT> pack(const float (&values)[COUNT]) {
    Packed<COUNT> packed;
#if DTYPE == FP32
#pragma unroll
    for (int k = 0; k < COUNT; ++k) packed.words[k] = __float_as_uint(values[k]);
#else
#pragma unroll
    for (int w = 0; w < Packed<COUNT>::WORDS; ++w) {
        float high = 2 * w + 1 < COUNT ? values[2 * w + 1] : 0.0f;
#if DTYPE == BF16
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
            : "=r"(packed.words[w])
            : "f"(high), "f"(values[2 * w]));
#else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed.words[w]) : "f"(high), "f"(values[2 * w]));
#endif
    }
#endif
    return packed;
}
