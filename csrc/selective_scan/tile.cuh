// A tile of selective_scan: the sizes that fwd.cu's macros make, and a block's shared memory.
#pragma once

#include "common/io.cuh"

constexpr int T = TOKENS;
constexpr int N_PAD = SPT * LANES;
constexpr int CH = 32 / LANES * CPT;  // channels a warp
constexpr int BLOCK_CH = CH * WARPS;  // channels a block
constexpr int VEC = CH * T / 32;      // channels of one token that a lane prepares and writes
constexpr int AT_ONCE = VEC % 2 ? VEC : 2 > CPT ? 2 : CPT;  // of those, between two tokens
constexpr int WARP_LANES = CH / VEC;                        // lanes a token, of a warp
constexpr int ROW_LANES = TEAM * WARP_LANES;                // and of a team
// 4 floats behind every 32 of the sums, and behind a warp's steps, spread the banks
__host__ __device__ constexpr int padded(int at) { return at + at / 32 * 4; }
// floats a token of (dt, dt x), and of sums over SPT states
constexpr int STEP_WARP = 2 * CH + 4, STEP_ROW = TEAM * STEP_WARP;
constexpr int SUM_WARP = padded(32 * CPT), SUM_ROW = TEAM * SUM_WARP;
// What a walking thread reads of B and C for a token is its states of B, then those of C. Lanes
// read it in chunks of 16 bytes, or all at once where it is less, and neighbours' chunks lie side
// by side. Where a thread has two states, reading limits more than instructions do: then halves
// stay halves.
constexpr int RUN = ENDS ? SPT : 2 * SPT;
#if SPT == 2
typedef element map_element;
typedef Packed<RUN> Maps;
#else
typedef float map_element;
struct Maps {
    float values[RUN];
};
__device__ __forceinline__ float unpack(const Maps& maps, int k) { return maps.values[k]; }
#endif
constexpr int CHUNK = RUN * sizeof(map_element) < 16 ? RUN : 16 / sizeof(map_element);
// where the at-th element of lane 0's lies
__host__ __device__ constexpr int in_chunks(int at) {
    return at / CHUNK * LANES * CHUNK + at % CHUNK;
}
constexpr int THREADS = 32 * WARPS;
constexpr int RING = TEAM > 1 ? 3 : 2;  // tiles of steps and of sums
// elements of B, or of C, that a thread reads of a tile; where threads outnumber them, some read
// none
constexpr int MAPS = T * N_PAD > THREADS ? T * N_PAD / THREADS : 1;
// of those, that lie side by side
constexpr int PART = MAPS < SPT ? MAPS < CHUNK ? MAPS : CHUNK : SPT < CHUNK ? SPT : CHUNK;
static_assert(32 % LANES == 0 && CH % VEC == 0 && VEC % CPT == 0 && VEC >= 1, "mapping");
static_assert(N_PAD % MAPS == 0 && SPT % 2 == 0 && T >= 8 && T % 8 == 0, "mapping");
static_assert(WARPS % TEAM == 0, "mapping");

struct Shared {
    // of the tile that is walked and of the one that is prepared or written, and of a third for
    // warps that are behind
    float step[RING][WARPS / TEAM * T * STEP_ROW];
    alignas(16) map_element maps[3][T * LANES * RUN];
#if !ENDS
    float sum[RING][WARPS / TEAM * T * SUM_ROW];
    float D[BLOCK_CH];
#endif
    float dt_bias[BLOCK_CH];
    // barriers, of warps that wrote their part of a tile: of B and C, and for a team of the steps;
    // of the team's sums
    unsigned long long tile_written;
#if TEAM > 1 && !ENDS
    unsigned long long sums_written;
#endif
};

// N floats in a row of shared memory
template <int N>
__device__ __forceinline__ void read_row(float (&to)[N], const float* from) {
    constexpr int WIDTH = N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int k = 0; k < N; k += WIDTH) {
        if constexpr (WIDTH == 1) {
            to[k] = from[k];
        } else if constexpr (WIDTH == 4) {
            float4 v = *reinterpret_cast<const float4*>(from + k);
            to[k] = v.x, to[k + 1] = v.y, to[k + 2] = v.z, to[k + 3] = v.w;
        } else {
            float2 v = *reinterpret_cast<const float2*>(from + k);
            to[k] = v.x, to[k + 1] = v.y;
        }
    }
}

template <int N>
__device__ __forceinline__ void write_row(float* to, const float (&from)[N]) {
    constexpr int WIDTH = N % 4 == 0 ? 4 : 2;
#pragma unroll
    for (int k = 0; k < N; k += WIDTH) {
        if constexpr (WIDTH == 4)
            *reinterpret_cast<float4*>(to + k) =
                make_float4(from[k], from[k + 1], from[k + 2], from[k + 3]);
        else
            *reinterpret_cast<float2*>(to + k) = make_float2(from[k], from[k + 1]);
    }
}

// Where a tile lies: which buffer of steps and of sums, and which of B and C.
struct Place {
    int steps, maps;
};
