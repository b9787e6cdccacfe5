// The recurrence of selective_scan, a thread walking through time; the macros are fwd.cu's.
#pragma once

#include "common/math.cuh"
#include "selective_scan/tile.cuh"

// A thread's part of it.
struct Recurrence {
    float h[CPT][SPT];
    float A[CPT][SPT];                  // times log2(e)
    float dt_sum[CPT];                  // of selective_scan_ends
    int n_channels, n_states, d_state;  // those that exist of CPT and of SPT; the model's
    int step_at, map_at, sum_at;        // where its operands and sums lie in a row

    // of the token that is walked, all; of the one behind it, dt and the decays; of the one behind
    // that, dt
    float step[2 * CPT], next_step[2 * CPT], decay[CPT][SPT];
    Maps maps;

    // from (i, n), this thread's own first; zeros for what does not exist, or where `from` is null
    __device__ __forceinline__ void load(float (&to)[CPT][SPT], const float* from) const {
#pragma unroll
        for (int k = 0; k < CPT; ++k)
#pragma unroll
            for (int n = 0; n < SPT; ++n)
                to[k][n] = from && k < n_channels && n < n_states ? from[k * d_state + n] : 0.0f;
    }

    __device__ __forceinline__ void save(float* to) const {
#pragma unroll
        for (int k = 0; k < CPT; ++k)
#pragma unroll
            for (int n = 0; n < SPT; ++n)
                if (k < n_channels && n < n_states) to[k * d_state + n] = h[k][n];
    }

    // as save(), a channel's states in as few stores as there can be
    __device__ __forceinline__ void save_checkpoint(float* to) const {
        constexpr int WIDTH = SPT % 4 == 0 ? 4 : 2;
        if (n_channels < CPT || n_states < SPT || d_state % WIDTH != 0) return save(to);
#pragma unroll
        for (int k = 0; k < CPT; ++k)
#pragma unroll
            for (int n = 0; n < SPT; n += WIDTH) {
                float* at = to + k * d_state + n;
                if constexpr (WIDTH == 4)
                    *reinterpret_cast<float4*>(at) =
                        make_float4(h[k][n], h[k][n + 1], h[k][n + 2], h[k][n + 3]);
                else
                    *reinterpret_cast<float2*>(at) = make_float2(h[k][n], h[k][n + 1]);
            }
    }

    __device__ __forceinline__ void read_step(float (&to)[2 * CPT], const Shared& shared,
                                              int buffer, int t) const {
        read_row(to, &shared.step[buffer][t * STEP_ROW + step_at]);
    }

    __device__ __forceinline__ static Maps read_maps(const map_element* from) {
#if SPT == 2
        return read_packed<RUN, LANES * CHUNK>(from);
#else
        Maps maps;
#pragma unroll
        for (int k = 0; k < RUN; k += CHUNK) {
            float chunk[CHUNK];
            read_row(chunk, from + in_chunks(k));
#pragma unroll
            for (int j = 0; j < CHUNK; ++j) maps.values[k + j] = chunk[j];
        }
        return maps;
#endif
    }

    // for the first token of the first tile
    __device__ __forceinline__ void begin(const Shared& shared, Place here) {
        read_step(step, shared, here.steps, 0);
        read_step(next_step, shared, here.steps, 1);
        maps = read_maps(&shared.maps[here.maps][map_at]);
#pragma unroll
        for (int k = 0; k < CPT; ++k)
#pragma unroll
            for (int n = 0; n < SPT; ++n) decay[k][n] = exp2_factor(step[2 * k], A[k][n]);
    }

    // Token t of a tile. What the two behind it need, which may lie in the next tile, is read and
    // made meanwhile; after each of its SPT * CPT states, work(slot) may do something else.
    template <class Work>
    __device__ __forceinline__ void walk(Shared& shared, Place here, Place next, int t, Work work) {
        float later_step[2 * CPT];
        read_step(later_step, shared, t + 2 < T ? here.steps : next.steps, (t + 2) % T);
        const Maps next_maps = read_maps(
            &shared.maps[t + 1 < T ? here.maps : next.maps][(t + 1) % T * LANES * RUN + map_at]);
#if !ENDS
        float sum[CPT];
#endif
#pragma unroll
        for (int n = 0; n < SPT; ++n) {
#pragma unroll
            for (int k = 0; k < CPT; ++k) {
                h[k][n] = fmaf(decay[k][n], h[k][n], step[2 * k + 1] * unpack(maps, n));
                decay[k][n] = exp2_factor(next_step[2 * k], A[k][n]);
#if !ENDS
                const float C = unpack(maps, SPT + n);
                sum[k] = n == 0 ? h[k][n] * C : fmaf(h[k][n], C, sum[k]);
#endif
                work(n * CPT + k);
            }
        }
#pragma unroll
        for (int k = 0; k < CPT; ++k)
#if ENDS
            dt_sum[k] += step[2 * k];
#else
            shared.sum[here.steps][t * SUM_ROW + sum_at + k] = sum[k];
#endif
#pragma unroll
        for (int k = 0; k < 2 * CPT; ++k) step[k] = next_step[k], next_step[k] = later_step[k];
        maps = next_maps;
    }
};
