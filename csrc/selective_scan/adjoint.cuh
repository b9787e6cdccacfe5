// What bwd.cu's walks are made of: a tile's sizes, a block's shared memory, and sums over lanes;
// the macros are bwd.cu's.
#pragma once

#include "common/io.cuh"
#include "common/math.cuh"

__host__ __device__ constexpr int log2_of(int x) { return x > 1 ? 1 + log2_of(x / 2) : 0; }

constexpr int T = TOKENS, SUBS = TOKENS / SUB;
constexpr int CH = 32 / LANES * CPT;  // channels a warp
constexpr int BLOCK_CH = CH * WARPS;
constexpr int N_PAD = SPT * LANES;
constexpr int THREADS = 32 * WARPS;
constexpr int VEC = CH * SUB / 32;   // channels of one token that a lane reads and writes
constexpr int ROW_LANES = CH / VEC;  // lanes that share a token
// elements of B, or of C, side by side, that a thread reads of a tile; where threads outnumber
// them, some read none
constexpr int MAPS = T * N_PAD > THREADS ? T * N_PAD / THREADS : 1;
// bits of a lane's number: those that tell its states apart, then those of its channels
constexpr int STATE_BITS = log2_of(LANES), CHANNEL_BITS = 5 - STATE_BITS;
// what is left in a lane of a sum over states, or over channels, and orders of B and C
constexpr int KEPT_CHANNELS = CPT > LANES ? CPT / LANES : 1;
constexpr int KEPT_STATES = SPT > 32 / LANES ? SPT * LANES / 32 : 1;
constexpr int ORDERS = SPT / KEPT_STATES, ORDER_BITS = log2_of(ORDERS);
static_assert(32 % LANES == 0 && CH % VEC == 0 && VEC >= 1 && T % SUB == 0 && SUB % 2 == 0 &&
                  T <= 32,
              "mapping");
static_assert(N_PAD % MAPS == 0 && SPT % 4 == 0 && (CPT & (CPT - 1)) == 0, "mapping");

// Where channel c of token t lies: first come the channels of an even and of an odd token that
// lanes have first of their VEC, then those that they have second. Neither lanes that take theirs
// nor those that walk neighbouring channels of one token meet in a bank, by the room behind each of
// these.
constexpr int WALKED_AT_ONCE = 16 / LANES * CPT < 8 ? 16 / LANES * CPT : 8;
constexpr int EVERY = 2 * ROW_LANES + (VEC > 1 ? WALKED_AT_ONCE / VEC : 0), PAIR = VEC * EVERY;
__host__ __device__ constexpr int place_of(int t, int c) {
    return t / 2 * PAIR + c % VEC * EVERY + t % 2 * ROW_LANES + c / VEC;
}

struct Shared {
    float4 element[WARPS][T / 2 * PAIR];  // dt, dt x, g, slope of the step
    alignas(16) float B[T][ORDERS][N_PAD], C[T][ORDERS][N_PAD];
#if !CARRIES
    float4 before[SUBS][CPT * SPT / 4][THREADS];  // each walk's first state
    float4 sum[WARPS][SUB / 2 * PAIR];            // over states: of C h, of B dh, of A w
    float dB[WARPS][T][N_PAD], dC[WARPS][T][N_PAD];
    // a thread's sums over time, and what rounding lost of them
    float dA[CPT * SPT][THREADS], dA_lost[CPT * SPT][THREADS];
    float dD[VEC][THREADS], dD_lost[VEC][THREADS], ddt_bias[VEC][THREADS];
    float ddt_bias_lost[VEC][THREADS], D[BLOCK_CH];
#endif
    float dt_bias[BLOCK_CH];
};

// COUNT values in an order of the lane's own: its v-th is the one of number v ^ mask, which the
// FIRST + s-th bit of its number changes in the bit that stage s of sum_over_lanes divides by.
template <int COUNT, int FIRST, int BITS>
__device__ __forceinline__ int order_of(int lane) {
    int mask = 0;
#pragma unroll
    for (int s = 0; s < BITS; ++s)
        if (COUNT >> (s + 1)) mask |= (lane >> (FIRST + s) & 1) * (COUNT >> (s + 1));
    return mask;
}

// Sums over the lanes that differ in these bits, each of COUNT values in its own order: the first
// max(1, COUNT >> BITS) are whole then, in its order still, and the others are spent.
template <int FIRST, int BITS, int COUNT>
__device__ __forceinline__ void sum_over_lanes(float (&values)[COUNT]) {
#pragma unroll
    for (int s = 0; s < BITS; ++s) {
        const int left = COUNT >> (s + 1);
#pragma unroll
        for (int v = 0; v < (left ? left : 1); ++v)
            values[v] += __shfl_xor_sync(~0u, values[v + left], 1 << (FIRST + s));
    }
}

// What a thread has of (i, n): CPT channels and SPT states of each, in orders of its own.
struct Own {
    i64 first;
    int d_state, n_channels, n_states;  // the model's; those that exist of CPT and of SPT
    int channel_order, state_order;

    // visit(k, n, where, whether it exists)
    template <class Visit>
    __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll
        for (int k = 0; k < CPT; ++k)
#pragma unroll
            for (int n = 0; n < SPT; ++n) {
                const int c = k ^ channel_order, s = n ^ state_order;
                visit(k, n, first + c * d_state + s, c < n_channels && s < n_states);
            }
    }

    // zeros for what does not exist, or where `from` is null
    __device__ __forceinline__ void load(float (&to)[CPT][SPT], const float* from) const {
        each([&](int k, int n, i64 at, bool exists) {
            to[k][n] = from && exists ? from[at] : 0.0f;
        });
    }

    __device__ __forceinline__ void save(float* to, const float (&values)[CPT][SPT]) const {
        if (to)
            each([&](int k, int n, i64 at, bool exists) {
                if (exists) to[at] = values[k][n];
            });
    }
};

// where it begins, or null where there is none
template <class Number>
__device__ __forceinline__ Number* row_of(Number* rows, i64 at) {
    return rows ? rows + at : rows;
}

// Adds to a sum of many what rounding lost of it before (Kahan, CACM 8, 1965).
__device__ __forceinline__ void add_to(float& sum, float& lost, float value) {
    const float rest = value - lost, next = sum + rest;
    lost = next - sum - rest;
    sum = next;
}

// from shared memory, COUNT floats on a border of 16 bytes
template <int COUNT>
__device__ __forceinline__ void read_fours(float (&to)[COUNT], const float* from) {
#pragma unroll
    for (int k = 0; k < COUNT; k += 4) {
        const float4 v = *reinterpret_cast<const float4*>(from + k);
        to[k] = v.x, to[k + 1] = v.y, to[k + 2] = v.z, to[k + 3] = v.w;
    }
}

// where dt has half precision, its own rounding is a thousand times what exp_accurate saves
#if DTYPE == FP32
#define EXP exp_accurate
#else
#define EXP exp_approx
#endif

// VEC channels of one token of each SUB, of x, dt, z or dy.
struct Stream {
    const element* at;
    i64 step;  // from each SUB tokens to the next
    Packed<VEC> value;

    __device__ __forceinline__ void load(int valid) { value = load_packed<VEC>(at, valid); }
};

// A thread's elements: VEC channels from `column` of its warp's on, of token `token` of each SUB.
struct Elementwise {
    int token, column;
    float dt_min, dt_max;
    Stream x, dt, z, dy;
    float dD[VEC], ddt_bias[VEC];  // of this tile

    __device__ __forceinline__ void load(int valid) {
        dt.load(valid), dy.load(valid);
#if GATED
        z.load(valid);
#endif
#if !CARRIES
        x.load(valid);
#endif
    }

    // what finish() needs
    __device__ __forceinline__ void load_again(int valid) {
        x.load(valid);
#if GATED
        z.load(valid), dy.load(valid);
#endif
    }

    // by so many SUB tokens
    __device__ __forceinline__ void move(int by) {
        x.at += by * x.step, dt.at += by * dt.step, dy.at += by * dy.step;
#if GATED
        z.at += by * z.step;
#endif
    }

    // Bring the tile before this one, behind which the streams are, to the L2 cache: a lane a
    // sector of 32 bytes; `n_channels` of the warp's exist.
    __device__ __forceinline__ void prefetch_tile_before(int lane, i64 n_channels) const {
        constexpr int SECTOR = 32 / sizeof(element), SECTORS = CH > SECTOR ? CH / SECTOR : 1;
        const int first = lane % SECTORS * SECTOR;
        if (first >= n_channels) return;
#pragma unroll
        for (int k = 0; k < T * SECTORS; k += 32) {
            const i64 tokens = (k + lane) / SECTORS - token - 2 * T;
            if (T * SECTORS < 32 && lane >= T * SECTORS) return;
            auto bring = [&](const Stream& s) {
                prefetch(s.at + tokens * (s.step / SUB) + first - column);
            };
            bring(x), bring(dt), bring(dy);
#if GATED
            bring(z);
#endif
        }
    }

    // of what lies there, what walks read of it
    __device__ __forceinline__ void prepare(float4* elements, const float* dt_bias,
                                            bool exists) const {
#pragma unroll
        for (int k = 0; k < VEC; ++k) {
            float step = unpack(dt.value, k) + dt_bias[column + k], slope = 1.0f;
#if SOFTPLUS
            // as the forward: log(1 + exp(x)) = max(x, 0) + log(1 + e), with e = exp(-|x|)
            const float e = EXP(-fabsf(step));
            slope = reciprocal(1.0f + e);
            slope = step < 0.0f ? e * slope : slope;
            step = fmaf(softplus_terms<8, 0>(0.0f, e), e, fmaxf(step, 0.0f));
#endif
#if LIMITS
            slope = step < dt_min || step > dt_max ? 0.0f : slope;
            step = step < dt_min ? dt_min : step;
            step = step > dt_max ? dt_max : step;
#endif
            float g = unpack(dy.value, k);
#if GATED
            const float gate = unpack(z.value, k);
            g *= gate * reciprocal(1.0f + exp_approx(-gate));
#endif
#if CARRIES
            const float value = 0.0f;  // is not asked for
#else
            const float value = unpack(x.value, k);
#endif
            // behind the last token nothing decays, and nothing is added
            elements[place_of(token, column + k)] = exists
                                                        ? make_float4(step, step * value, g, slope)
                                                        : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }

#if !CARRIES
    // the gradients of x, dt and z from that and from sums over states
    __device__ __forceinline__ void finish(const float4* elements, const float4* sums,
                                           const float* D, float (&dx)[VEC], float (&ddt)[VEC],
                                           float (&dz)[VEC]) {
#pragma unroll
        for (int k = 0; k < VEC; ++k) {
            const int place = place_of(token, column + k);
            const float4 now = elements[place], sum = sums[place];
            const float value = unpack(x.value, k), skip = D[column + k];
            dx[k] = fmaf(now.x, sum.y, skip * now.z);
            ddt[k] = fmaf(value, sum.y, LN2 * sum.z) * now.w;
            dD[k] = fmaf(now.z, value, dD[k]);
            ddt_bias[k] += ddt[k];
#if GATED
            const float gate = unpack(z.value, k), share = reciprocal(1.0f + exp_approx(-gate));
            const float slope = share * fmaf(gate, 1.0f - share, 1.0f);
            dz[k] = unpack(dy.value, k) * fmaf(skip, value, sum.x) * slope;
#endif
        }
    }

    // a tile's sums, added to all
    __device__ __forceinline__ void keep(Shared& shared) const {
        const int at = threadIdx.x;
#pragma unroll
        for (int k = 0; k < VEC; ++k) {
            add_to(shared.dD[k][at], shared.dD_lost[k][at], dD[k]);
            add_to(shared.ddt_bias[k][at], shared.ddt_bias_lost[k][at], ddt_bias[k]);
        }
    }
#endif
};
