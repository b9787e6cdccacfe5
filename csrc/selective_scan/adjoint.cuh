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
// and of the orders of one token's B or C: threads that write neighbouring tokens meet in no bank
constexpr int MAP_ROW = ORDERS * N_PAD + (N_PAD < 32 ? N_PAD : 0);
// A sum over channels halves what a lane has while it has two values of a kind; where lanes are
// left then, dB and dC go different ways once.
constexpr int HALVED_BITS = CHANNEL_BITS < log2_of(SPT) ? CHANNEL_BITS : log2_of(SPT);
constexpr bool PARTS_KINDS = HALVED_BITS < CHANNEL_BITS;
// Whether a walk reads dt and dt x of two tokens at once: half the loads, and from all banks, while
// those halves of `element` lie in half of them. It takes room, so only four channels do.
constexpr bool READS_PAIRS = CPT == 4 && SUB % 4 == 0 && !CARRIES;
static_assert(32 % LANES == 0 && CH % VEC == 0 && VEC >= 1 && T % SUB == 0 && SUB % 2 == 0 &&
                  T <= 32,
              "mapping");
static_assert(N_PAD % MAPS == 0 && SPT == 4 && (CPT & (CPT - 1)) == 0, "mapping");

// Where channel c of token t lies: first come the channels of an even and of an odd token that
// lanes have first of their VEC, then those that they have second. Neither lanes that take theirs
// nor those that walk neighbouring channels of one token meet in a bank, by the room behind each of
// these.
constexpr int WALKED_AT_ONCE = 16 / LANES * CPT < 8 ? 16 / LANES * CPT : 8;
constexpr int EVERY = 2 * ROW_LANES + (VEC > 1 ? WALKED_AT_ONCE / VEC : 0), PAIR = VEC * EVERY;
__host__ __device__ constexpr int place_of(int t, int c) {
    return t / 2 * PAIR + c % VEC * EVERY + t % 2 * ROW_LANES + c / VEC;
}

// a thread's own, side by side
template <int COUNT>
struct alignas(4 * COUNT) Floats {
    float at[COUNT];
};

struct Shared {
    // dt, dt x, g, slope of the step; behind them sums over states: of C h, of B dh, of A w
    float4 element[WARPS][(T + (CARRIES ? 0 : SUB)) / 2 * PAIR];
    // dt, dt x of an even token and of the one behind it: a pair lies where a token's element would
    float4 steps[WARPS][READS_PAIRS ? T / 4 * PAIR : 1];
    alignas(16) float B[T][MAP_ROW], C[T][MAP_ROW];
#if !CARRIES
    // sums over time of each thread's elements; of dD, apart, those of the last SUM_TOKENS / 8
    // tokens: there is no other error in it than that of long sums
    Floats<VEC> dD[THREADS], dD_part[THREADS], ddt_bias[THREADS];
    // the first state of each walk but the last
    float4 before[SUBS > 1 ? SUBS - 1 : 1][CPT * SPT / 4][THREADS];
    float dB_dC[WARPS][T][2][N_PAD];
    float D[BLOCK_CH];
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

// Sums over the lanes of a state's channels, of dB and dC of one token; where PARTS_KINDS the first
// value of either is then that of the kind that the lane keeps.
__device__ __forceinline__ void sum_over_channels(float (&dB)[SPT], float (&dC)[SPT],
                                                  [[maybe_unused]] bool keeps_dC) {
    sum_over_lanes<STATE_BITS, HALVED_BITS>(dB);
    sum_over_lanes<STATE_BITS, HALVED_BITS>(dC);
    if constexpr (PARTS_KINDS) {
        float kept = keeps_dC ? dC[0] : dB[0];
        kept += __shfl_xor_sync(~0u, keeps_dC ? dB[0] : dC[0], 1 << (STATE_BITS + HALVED_BITS));
#pragma unroll
        for (int bit = STATE_BITS + HALVED_BITS + 1; bit < 5; ++bit)
            kept += __shfl_xor_sync(~0u, kept, 1 << bit);
        dB[0] = kept;
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

    // as load(), but a channel's states in the order in which they lie; put_in_order() follows
    __device__ __forceinline__ void load_unordered(float4 (&to)[CPT], const float* from) const {
        // then a channel's four begin on a border of 16 bytes
        const bool are_fours = d_state % 4 == 0 && n_channels == CPT && n_states == SPT;
#pragma unroll
        for (int k = 0; k < CPT; ++k) {
            const int c = k ^ channel_order;
            const float* const p = from + first + c * d_state;
            const int n = c < n_channels ? n_states : 0;
            if (are_fours)
                to[k] = *reinterpret_cast<const float4*>(p);
            else
                to[k] = make_float4(n > 0 ? p[0] : 0.0f, n > 1 ? p[1] : 0.0f, n > 2 ? p[2] : 0.0f,
                                    n > 3 ? p[3] : 0.0f);
        }
    }

    __device__ __forceinline__ void put_in_order(float (&to)[CPT][SPT],
                                                 const float4 (&loaded)[CPT]) const {
        const bool swaps_pairs = state_order & 2, swaps_neighbours = state_order & 1;
#pragma unroll
        for (int k = 0; k < CPT; ++k) {
            const float4 v = loaded[k];
            const float a = swaps_pairs ? v.z : v.x, b = swaps_pairs ? v.w : v.y;
            const float c = swaps_pairs ? v.x : v.z, d = swaps_pairs ? v.y : v.w;
            to[k][0] = swaps_neighbours ? b : a, to[k][1] = swaps_neighbours ? a : b;
            to[k][2] = swaps_neighbours ? d : c, to[k][3] = swaps_neighbours ? c : d;
        }
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

// A tensor's rows of a tile. What a warp's threads share, the compiler keeps once for all of them:
// a thread's own is the way to its channels.
template <class Number>
struct Stream {
    Number* tile;  // the block's first channel of the tile's first token
    i64 step;      // to the next token
    // to this thread's channels of its token; bwd.py sees to it that 32 bits are enough
    unsigned mine;

    // of the thread's token of those that begin at `first`
    __device__ __forceinline__ Number* at(int first) const {
        return tile + (mine + unsigned(first) * unsigned(step));
    }
};

template <class Number>
__device__ __forceinline__ Stream<Number> stream_of(Number* tile, i64 step, int token,
                                                    int channel) {
    return {tile, step, token * unsigned(step) + channel};
}

// VEC elements of one token, of each tensor.
struct Row {
    Packed<VEC> x, dt, z, dy;
};

// A thread's elements: VEC channels, from `column` of its warp's on, of token `token` of each SUB.
struct Elementwise {
    int token, column;
    float dt_min, dt_max;
    Stream<const element> x, dt, z, dy;

    __device__ __forceinline__ Row load(int first, int valid) const {
        Row row;
        row.dt = load_packed<VEC>(dt.at(first), valid);
        row.dy = load_packed<VEC>(dy.at(first), valid);
#if GATED
        row.z = load_packed<VEC>(z.at(first), valid);
#endif
#if !CARRIES
        row.x = load_packed<VEC>(x.at(first), valid);
#endif
        return row;
    }

    // what finish() needs
    __device__ __forceinline__ Row load_again(int first, int valid) const {
        Row row;
        row.x = load_packed<VEC>(x.at(first), valid);
#if GATED
        row.z = load_packed<VEC>(z.at(first), valid);
        row.dy = load_packed<VEC>(dy.at(first), valid);
#endif
        return row;
    }

    // to the tile before this one
    __device__ __forceinline__ void move() {
        x.tile -= T * x.step, dt.tile -= T * dt.step, dy.tile -= T * dy.step;
#if GATED
        z.tile -= T * z.step;
#endif
    }

    // Bring the tile before this one to the L2 cache: a lane a sector of 32 bytes of the warp's
    // channels, which begin at `channel` of the block's; `n_channels` of them exist.
    __device__ __forceinline__ void prefetch_tile_before(int lane, int channel,
                                                         i64 n_channels) const {
        constexpr int SECTOR = 32 / sizeof(element), SECTORS = CH > SECTOR ? CH / SECTOR : 1;
        const int first = lane % SECTORS * SECTOR;
        if (first >= n_channels) return;
#pragma unroll
        for (int k = 0; k < T * SECTORS; k += 32) {
            const int before = (k + lane) / SECTORS - T;
            if (T * SECTORS < 32 && lane >= T * SECTORS) return;
            auto bring = [&](const Stream<const element>& s) {
                prefetch(s.tile + before * s.step + channel + first);
            };
            bring(x), bring(dt), bring(dy);
#if GATED
            bring(z);
#endif
        }
    }

    // of a row, what walks read of it; `elements` and `steps` begin at the thread's own
    __device__ __forceinline__ void prepare(const Row& row, float4* elements, float2* steps,
                                            const float (&dt_bias)[VEC], bool exists) const {
#pragma unroll
        for (int k = 0; k < VEC; ++k) {
            float step = unpack(row.dt, k) + dt_bias[k], slope = 1.0f;
#if SOFTPLUS
            // as the forward: log(1 + exp(x)) = max(x, 0) + log(1 + e), with e = exp(-|x|)
            const float e = EXP(-fabsf(step));
            slope = reciprocal(1.0f + e);
            slope = step < 0.0f ? e * slope : slope;
            step = fmaf(softplus_terms<7, 0>(softplus_terms<8, 8>(0.0f, 0.0f), e), e,
                        fmaxf(step, 0.0f));
#endif
#if LIMITS
            slope = step < dt_min || step > dt_max ? 0.0f : slope;
            step = step < dt_min ? dt_min : step;
            step = step > dt_max ? dt_max : step;
#endif
            float g = unpack(row.dy, k);
#if GATED
            const float gate = unpack(row.z, k);
            g *= gate * reciprocal(1.0f + exp_approx(-gate));
#endif
#if CARRIES
            const float value = 0.0f;  // is not asked for
#else
            const float value = unpack(row.x, k);
#endif
            // behind the last token nothing decays, nor is anything added: what is read is zero
            step = exists ? step : 0.0f, slope = exists ? slope : 0.0f;
            elements[k * EVERY] = make_float4(step, step * value, g, slope);
            if constexpr (READS_PAIRS) steps[2 * k * EVERY] = make_float2(step, step * value);
        }
    }

#if !CARRIES
    // the gradients of x, dt and z from that and from sums over states, and y once more
    __device__ __forceinline__ void finish(const Row& row, const float4* elements,
                                           const float4* sums, const float* D, Floats<VEC>& dD_part,
                                           Floats<VEC>& ddt_bias, float (&dx)[VEC],
                                           float (&ddt)[VEC], float (&dz)[VEC],
                                           float (&y)[VEC]) const {
        Floats<VEC> sum_of_dD = dD_part, sum_of_ddt = ddt_bias;
#pragma unroll
        for (int k = 0; k < VEC; ++k) {
            const float4 now = elements[k * EVERY], sum = sums[k * EVERY];
            const float value = unpack(row.x, k), skip = D[k];
            dx[k] = fmaf(now.x, sum.y, skip * now.z);
            ddt[k] = fmaf(value, sum.y, LN2 * sum.z) * now.w;
            sum_of_dD.at[k] = fmaf(now.z, value, sum_of_dD.at[k]);
            sum_of_ddt.at[k] += ddt[k];
#if GATED
            const float gate = unpack(row.z, k), share = reciprocal(1.0f + exp_approx(-gate));
            const float slope = share * fmaf(gate, 1.0f - share, 1.0f);
            const float ungated = fmaf(skip, value, sum.x);
            dz[k] = unpack(row.dy, k) * ungated * slope;
            y[k] = ungated * (gate * share);
#endif
        }
        dD_part = sum_of_dD, ddt_bias = sum_of_ddt;
    }
#endif
};
