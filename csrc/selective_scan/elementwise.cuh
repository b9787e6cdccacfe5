// What selective_scan does for an element and not for a state; the macros are fwd.cu's.
#pragma once

#include "common/math.cuh"
#include "selective_scan/tile.cuh"

// where dt has half precision, its own rounding is a thousand times what exp_accurate saves
#if DTYPE == FP32
#define EXP exp_accurate
#else
#define EXP exp_approx
#endif

// A thread's part of it: it reads and writes VEC channels of token `token` of each tile.
struct Elementwise {
    int token, column;            // its token of a tile, its first channel of the block's
    int step_at, sum_at, map_at;  // where they lie in a buffer, and what it reads of B and C
    float dt_min, dt_max;
    Packed<VEC> x, dt, late_x, z;  // of the tile to be prepared; of the tile to be written
    Packed<MAPS> B, C;
    float value, power, total, value_z, gate;  // of the element in work
    float bias[AT_ONCE], pairs[2 * AT_ONCE], sums[AT_ONCE * LANES], skip[AT_ONCE];
    float out[VEC];

    // stage(element, its stage) for what falls to `slot` of half a tile's tokens times their states
    template <class Stage>
    __device__ __forceinline__ static void spread(int slot, Stage stage) {
        constexpr int AT_A_SLOT = N_PAD < 16 ? 16 / N_PAD : 1, EVERY = N_PAD > 16 ? N_PAD / 16 : 1;
        static_assert(T / 2 * SPT * CPT * AT_A_SLOT == 8 * VEC * EVERY, "eight stages an element");
        if (slot % EVERY == 0)
#pragma unroll
            for (int item = slot / EVERY * AT_A_SLOT; item < slot / EVERY * AT_A_SLOT + AT_A_SLOT;
                 ++item)
                stage(item / 8, item % 8);
    }

    // Element k of the tile to be prepared, in eight stages.
    __device__ __forceinline__ void prepare(Shared& shared, int buffer, int k, int stage) {
        const int j = k % AT_ONCE;
        if (stage == 0) {
            if (j == 0) read_row(bias, &shared.dt_bias[column + k]);
            value = unpack(dt, k) + bias[j];
        }
#if SOFTPLUS
        // log(1 + exp(x)) = max(x, 0) + log(1 + e), with e = exp(-|x|) from 0 to 1
        if (stage == 1) power = EXP(-fabsf(value));
        if (stage == 2) value = fmaxf(value, 0.0f);
        if (stage == 4) total = softplus_terms<8, 6>(0.0f, power);
        if (stage == 5) total = softplus_terms<5, 3>(total, power);
        if (stage == 6) total = softplus_terms<2, 0>(total, power);
        if (stage == 7) value = fmaf(total, power, value);
#endif
        if (stage == 7) {
#if LIMITS
            // not fmaxf and fminf, which would make a number of NaN
            value = value < dt_min ? dt_min : value;
            value = value > dt_max ? dt_max : value;
#endif
            pairs[2 * j] = value;
            pairs[2 * j + 1] = value * unpack(x, k);
            if (j == AT_ONCE - 1) write_row(&shared.step[buffer][step_at + 2 * (k - j)], pairs);
        }
    }

    // behind the last token nothing decays, and nothing is added
    __device__ __forceinline__ void prepare_nothing(Shared& shared, int buffer) const {
        const float pairs[2 * VEC] = {};
        write_row(&shared.step[buffer][step_at], pairs);
    }

    __device__ __forceinline__ void prepare_maps(Shared& shared, int buffer) const {
        if (T * N_PAD < THREADS && threadIdx.x * MAPS >= T * N_PAD) return;
#pragma unroll
        for (int k = 0; k < MAPS; k += PART) {
            map_element* to = &shared.maps[buffer][map_at + k / SPT * CHUNK + in_chunks(k % SPT)];
#if SPT == 2
            write_packed<PART>(to, B, k / PART);
#if !ENDS
            write_packed<PART>(to + in_chunks(SPT), C, k / PART);
#endif
#else
#pragma unroll
            for (int j = 0; j < PART; ++j) {
                to[j] = unpack(B, k + j);
#if !ENDS
                to[in_chunks(SPT) + j] = unpack(C, k + j);
#endif
            }
#endif
        }
    }

#if !ENDS
    // Element k of the tile to be written, in eight stages, and a last one in the next element's:
    // the sum over the lanes of its channel, skip, gate.
    __device__ __forceinline__ void finish(const Shared& shared, int buffer, int k, int stage) {
        const int j = k % AT_ONCE;
        if (stage == 1 && k > 0) finish_last(k - 1);
        if (stage == 2 && j == 0) {
            read_row(sums, &shared.sum[buffer][sum_at + padded(k * LANES)]);
            read_row(skip, &shared.D[column + k]);
        }
#if GATED
        if (stage == 0) value_z = unpack(z, k);
        if (stage == 2) power = exp_approx(-value_z);
        if (stage == 4) power = 1.0f + power;
        if (stage == 5) power = reciprocal(power);
#endif
        if (stage == 6) {
            const int first = j / CPT * CPT * LANES + j % CPT;
            total = sums[first];
#pragma unroll
            for (int part = 1; part < LANES; ++part) total += sums[first + part * CPT];
        }
        if (stage == 7) {
            total = fmaf(skip[j], unpack(late_x, k), total);
            gate = value_z;
        }
    }

    __device__ __forceinline__ void finish_last(int k) {
#if GATED
        out[k] = total * (gate * power);
#else
        out[k] = total;
#endif
    }
#endif
};
