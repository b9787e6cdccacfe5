// The forward of hybridzoo.kernels.selective_scan (Mamba, arXiv 2312.00752, Algorithm 2):
//
//     h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]          y[t] = (C[t] h[t] + D x[t]) silu(z[t])
//
// The exponential is the limit: one for each token, channel and state, 16 a clock and
// multiprocessor. So states stay in registers while a thread walks through time, and what is not of
// a state is done once: a lane reads VEC channels of one token as a vector, makes floats (dt, dt x)
// of them in shared memory, and later gates the sums over states and writes them. As walker it has
// CPT channels and SPT states of each; LANES lanes share a channel. Those two jobs take turns
// within every token, on neighbouring tiles of T tokens: while tile k is walked, tile k + 1 is
// prepared in its first half and tile k - 1 written in its second, in eight stages an element, so
// that the exponential unit is asked for little and often. A warp needs the others of its block
// only for B and C, which they share: one barrier a tile, at which they arrive half a tile before
// they wait.
//
// A long sequence with few channels is cut into segments of whole tiles, which run side by side:
// selective_scan_ends, compiled with ENDS = 1, finds the state with which each segment would end
// had it begun at zero, and its sum of step sizes, of which the decay over the segment is made;
// then each segment of selective_scan_fwd begins from what those before it left.
//
//   DTYPE ALIGNED   see io.cuh
//   SPT CPT LANES   states and channels a thread, lanes a channel; SPT * LANES >= d_state
//   WARPS TOKENS    warps a block, tokens a tile
//   MIN_BLOCKS      blocks that a multiprocessor should hold, for the compiler
//   SOFTPLUS LIMITS GATED PACKED    whether dt passes softplus, has limits; there is z; cu_seqlens
//   CHECKPOINTS     whether states are written on the way
//   ENDS            1: the kernel that finds the segments' ends
#include "common/barrier.cuh"
#include "common/io.cuh"
#include "common/math.cuh"

// where dt has half precision, its own rounding is a thousand times what exp_accurate saves
#if DTYPE == FP32
#define EXP exp_accurate
#else
#define EXP exp_approx
#endif

constexpr int T = TOKENS;
constexpr int N_PAD = SPT * LANES;
constexpr int CH = 32 / LANES * CPT;  // channels a warp
constexpr int BLOCK_CH = CH * WARPS;  // channels a block
constexpr int VEC = CH * T / 32;      // channels of one token that a lane prepares and writes
constexpr int AT_ONCE = VEC % 2 ? VEC : 2 > CPT ? 2 : CPT;  // of those, between two tokens
constexpr int ROW_LANES = CH / VEC;                         // lanes a token
constexpr int STEP_ROW = 2 * CH + 4;   // floats a token of (dt, dt x); 4 spread the banks
constexpr int SUM_ROW = 32 * CPT + 4;  // floats a token of sums over SPT states
constexpr int THREADS = 32 * WARPS;
// elements of B, or of C, that a thread reads of a tile; where threads outnumber them, some read
// none
constexpr int MAPS = T * N_PAD > THREADS ? T * N_PAD / THREADS : 1;
static_assert(32 % LANES == 0 && CH % VEC == 0 && VEC % CPT == 0 && VEC >= 1, "mapping");
static_assert(N_PAD % MAPS == 0 && SPT % 2 == 0 && T % 2 == 0, "mapping");

struct Shared {
    // of two tiles, or three, in turn; two rows more than tokens, as the walk reads ahead
    float step[2][WARPS * (T + 2) * STEP_ROW];
    float B[3][(T + 2) * N_PAD];
#if !ENDS
    float C[3][(T + 2) * N_PAD];
    float sum[2][WARPS * T * SUM_ROW];
    float D[BLOCK_CH];
#endif
    float dt_bias[BLOCK_CH];
    unsigned long long maps_written;  // a barrier: warps that wrote their part of B and C of a tile
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

// A thread as walker.
struct Walker {
    float h[CPT][SPT];
    float A[CPT][SPT];                  // times log2(e)
    float dt_sum[CPT];                  // of selective_scan_ends
    int n_channels, n_states, d_state;  // those that exist of CPT and of SPT; the model's
    int step_at, map_at, sum_at;        // where its operands and sums lie in a row

    // of the token that is walked, all; of the one behind it, dt and the decays; of the one behind
    // that, dt
    float step[2 * CPT], next_step[2 * CPT], B[SPT], decay[CPT][SPT];
#if !ENDS
    float C[SPT];
#endif

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

    __device__ __forceinline__ void read_step(float (&to)[2 * CPT], const Shared& shared,
                                              int buffer, int t) const {
        read_row(to, &shared.step[buffer][t * STEP_ROW + step_at]);
    }

    __device__ __forceinline__ void begin(const Shared& shared, int buffer, int maps, int t) {
        read_step(step, shared, buffer, t);
        read_step(next_step, shared, buffer, t + 1);
        read_row(B, &shared.B[maps][t * N_PAD + map_at]);
#if !ENDS
        read_row(C, &shared.C[maps][t * N_PAD + map_at]);
#endif
#pragma unroll
        for (int k = 0; k < CPT; ++k)
#pragma unroll
            for (int n = 0; n < SPT; ++n) decay[k][n] = exp2_approx(step[2 * k] * A[k][n]);
    }

    // One token. What the next ones need is read and made meanwhile; after each of its SPT * CPT
    // states, work(slot) may do something else.
    template <class Work>
    __device__ __forceinline__ void walk(Shared& shared, int buffer, int maps, int t, Work work) {
        float later_step[2 * CPT], next_B[SPT];
        read_step(later_step, shared, buffer, t + 2);
        read_row(next_B, &shared.B[maps][(t + 1) * N_PAD + map_at]);
#if !ENDS
        float next_C[SPT], sum[CPT];
        read_row(next_C, &shared.C[maps][(t + 1) * N_PAD + map_at]);
#endif
#pragma unroll
        for (int n = 0; n < SPT; ++n) {
#pragma unroll
            for (int k = 0; k < CPT; ++k) {
                h[k][n] = fmaf(decay[k][n], h[k][n], step[2 * k + 1] * B[n]);
                decay[k][n] = exp2_approx(next_step[2 * k] * A[k][n]);
#if !ENDS
                sum[k] = n == 0 ? h[k][n] * C[n] : fmaf(h[k][n], C[n], sum[k]);
#endif
                work(n * CPT + k);
            }
        }
#pragma unroll
        for (int k = 0; k < CPT; ++k)
#if ENDS
            dt_sum[k] += step[2 * k];
#else
            shared.sum[buffer][t * SUM_ROW + sum_at + k] = sum[k];
#endif
#pragma unroll
        for (int k = 0; k < 2 * CPT; ++k) step[k] = next_step[k], next_step[k] = later_step[k];
#pragma unroll
        for (int n = 0; n < SPT; ++n) {
            B[n] = next_B[n];
#if !ENDS
            C[n] = next_C[n];
#endif
        }
    }
};

// A lane as reader of VEC channels of token `token` of each tile, and as writer of the same.
struct Clerk {
    int token, column;    // its token of a tile, its first channel of the block's
    int step_at, sum_at;  // where they lie in a buffer
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

    __device__ __forceinline__ void prepare_maps(Shared& shared, int maps) const {
        const int at = threadIdx.x * MAPS;
        if (T * N_PAD < THREADS && at >= T * N_PAD) return;
#pragma unroll
        for (int k = 0; k < MAPS; ++k) {
            shared.B[maps][at + k] = unpack(B, k);
#if !ENDS
            shared.C[maps][at + k] = unpack(C, k);
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
            read_row(sums, &shared.sum[buffer][sum_at + k * LANES]);
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

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
#if ENDS
    selective_scan_ends
#else
    selective_scan_fwd
#endif
    (const element* __restrict__ x, const element* __restrict__ dt, const float* __restrict__ A,
     const element* __restrict__ B, const element* __restrict__ C, const float* __restrict__ D,
     const element* __restrict__ z, const float* __restrict__ dt_bias,
     const float* __restrict__ initial_state,  // (rows, i, n), a row a sequence
     const int* __restrict__ cu_seqlens,       // (rows + 1)
     element* __restrict__ y,                  // (b, l, i)
     float* __restrict__ final_state,          // like initial_state
     float* __restrict__ checkpoints,          // (b, l / checkpoint_every, i, n) or null
     float* __restrict__ ends,                 // (b, segments - 1, i, n), of selective_scan_ends
     float* __restrict__ dt_sums,  // (b, segments - 1, i); infinity: a sequence began in it
     i64 length, i64 n_channels, i64 group_channels, i64 d_state, i64 n_rows, i64 segment_length,
     i64 n_segments, i64 checkpoint_every, float dt_min, float dt_max, i64 x_b, i64 x_l, i64 dt_b,
     i64 dt_l, i64 z_b, i64 z_l, i64 B_b, i64 B_l, i64 B_g, i64 C_b, i64 C_l, i64 C_g) {
    extern __shared__ float4 memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    // ---- where: a batch row, a group's channels, a segment's tokens
    const i64 tiles_a_group = (group_channels + BLOCK_CH - 1) / BLOCK_CH;
    const i64 n_tiles = tiles_a_group * (n_channels / group_channels);
    const i64 row = blockIdx.x / n_tiles, tile = blockIdx.x % n_tiles;
    const i64 group = tile / tiles_a_group;
    const i64 block_channel = group * group_channels + tile % tiles_a_group * BLOCK_CH;
    const i64 group_end = (group + 1) * group_channels;
    const i64 start = blockIdx.y * segment_length;
    const int count = int(min(segment_length, length - start));

    // ---- as reader and writer
    Clerk clerk;
    clerk.token = lane / ROW_LANES;
    clerk.column = warp * CH + lane % ROW_LANES * VEC;
    clerk.step_at = warp * (T + 2) * STEP_ROW + clerk.token * STEP_ROW + lane % ROW_LANES * VEC * 2;
    clerk.sum_at = warp * T * SUM_ROW + clerk.token * SUM_ROW + lane % ROW_LANES * VEC * LANES;
    clerk.dt_min = dt_min, clerk.dt_max = dt_max;
    const i64 io_channel = block_channel + clerk.column;
    const int io_valid = int(max(min(group_end - io_channel, i64(VEC)), i64(0)));
    x += row * x_b + (start + clerk.token) * x_l + io_channel;
    dt += row * dt_b + (start + clerk.token) * dt_l + io_channel;
    const int map_token = threadIdx.x * MAPS / N_PAD, map_state = threadIdx.x * MAPS % N_PAD;
    const int map_valid = map_token < T ? int(min(d_state - map_state, i64(MAPS))) : 0;
    B += row * B_b + (start + map_token) * B_l + group * B_g + map_state;
#if !ENDS
    C += row * C_b + (start + map_token) * C_l + group * C_g + map_state;
    const element* late_x = x;
#if GATED
    z += row * z_b + (start + clerk.token) * z_l + io_channel;
#endif
    y += (row * length + start + clerk.token) * n_channels + io_channel;
#endif
    for (int k = threadIdx.x; k < BLOCK_CH; k += THREADS) {
        const bool is_real = block_channel + k < group_end;
        shared.dt_bias[k] = is_real && dt_bias ? dt_bias[block_channel + k] : 0.0f;
#if !ENDS
        shared.D[k] = is_real && D ? D[block_channel + k] : 0.0f;
#endif
    }

    // ---- as walker
    Walker walker;
    const i64 channel = block_channel + warp * CH + lane / LANES * CPT;
    const int state = lane % LANES * SPT;
    walker.n_channels = int(max(min(group_end - channel, i64(CPT)), i64(0)));
    walker.n_states = int(max(min(d_state - state, i64(SPT)), i64(0)));
    walker.d_state = int(d_state);
    walker.step_at = warp * (T + 2) * STEP_ROW + lane / LANES * 2 * CPT;
    walker.map_at = state;
    walker.sum_at = warp * T * SUM_ROW + lane * CPT;
    const i64 own = channel * d_state + state;  // this thread's first, of a row's states
    const i64 states = n_channels * d_state;    // of one row
    walker.load(walker.A, A + own);
#pragma unroll
    for (int k = 0; k < CPT; ++k) {
        walker.dt_sum[k] = 0.0f;
#pragma unroll
        for (int n = 0; n < SPT; ++n) walker.A[k][n] *= LOG2E;
    }

    // ---- the first sequence that has not ended before `start`, and the state there
    [[maybe_unused]] bool has_begun = false;  // another sequence, within this segment
    i64 sequence = row;
    if (initial_state) initial_state += own;
    auto begin_sequence = [&] {
        walker.load(walker.h, initial_state ? initial_state + sequence * states : nullptr);
    };
#if PACKED
    sequence = 0;
    for (i64 high = n_rows - 1; sequence < high;) {
        const i64 middle = (sequence + high) / 2;
        if (cu_seqlens[middle + 1] >= start)
            high = middle;
        else
            sequence = middle + 1;
    }
    i64 sequence_end = cu_seqlens[sequence + 1];
#endif
    if (blockIdx.y == 0)
        begin_sequence();
    else
        walker.load(walker.h, nullptr);
#if !ENDS
    // loads of several segments in flight: they wait for memory once, not once each
#pragma unroll 8
    for (int s = 0; s < int(blockIdx.y); ++s) {
        const i64 at = row * (n_segments - 1) + s;
        float end[CPT][SPT];
        walker.load(end, ends + at * states + own);
#pragma unroll
        for (int k = 0; k < CPT; ++k) {
            const float sum = k < walker.n_channels ? dt_sums[at * n_channels + channel + k] : 0.0f;
#pragma unroll
            for (int n = 0; n < SPT; ++n) {
                const float kept = exp2_approx(sum * walker.A[k][n]) * walker.h[k][n];
                walker.h[k][n] = sum == infinity() ? end[k][n] : kept + end[k][n];
            }
        }
    }
    final_state += own;
#if CHECKPOINTS
    const i64 n_checkpoints = (length + checkpoint_every - 1) / checkpoint_every;
    checkpoints += (row * n_checkpoints + start / checkpoint_every) * states + own;
#endif
#endif

    // `at` is the tile's first token, of the segment's
    auto load_early = [&](int at) {
        const int valid = at + clerk.token < count ? io_valid : 0;
        clerk.x = load_packed<VEC>(x, valid);
        clerk.dt = load_packed<VEC>(dt, valid);
        x += T * x_l, dt += T * dt_l;
        if (io_valid > 0 && at + T + clerk.token < count) prefetch(x), prefetch(dt);
        const int maps = at + map_token < count ? map_valid : 0;
        clerk.B = load_packed<MAPS>(B, maps);
        B += T * B_l;
#if !ENDS
        clerk.C = load_packed<MAPS>(C, maps);
        C += T * C_l;
#endif
    };
#if !ENDS
    auto load_late = [&](int at) {
        const int valid = at + clerk.token < count ? io_valid : 0;
        clerk.late_x = load_packed<VEC>(late_x, valid);
        late_x += T * x_l;
#if GATED
        clerk.z = load_packed<VEC>(z, valid);
        z += T * z_l;
        if (io_valid > 0 && at + T + clerk.token < count) prefetch(z);
#endif
    };
    auto write = [&](int at) {
        store_packed<VEC>(y, pack<VEC>(clerk.out),
                          at >= 0 && at + clerk.token < count ? io_valid : 0);
        if (at >= 0) y += T * n_channels;
    };
#endif

    if (threadIdx.x == 0) init_barrier(&shared.maps_written, WARPS);
    __syncthreads();
    load_early(0);
#pragma unroll
    for (int item = 0; item < 8 * VEC; ++item) clerk.prepare(shared, 0, item / 8, item % 8);
    if (clerk.token >= count) clerk.prepare_nothing(shared, 0);
    clerk.prepare_maps(shared, 0);
    load_early(T);
#if !ENDS
    clerk.late_x = clerk.z = Packed<VEC>();  // of the tile before the first, which is not written
#endif
    __syncthreads();

    int buffer = 0, maps = 0;
    for (int at = 0; at < count; at += T) {
        const int next_maps = maps == 2 ? 0 : maps + 1;
#if CHECKPOINTS && !ENDS
        if ((at & int(checkpoint_every - 1)) == 0) {
            walker.save(checkpoints);
            checkpoints += states;
        }
#endif
#if PACKED
        if (sequence_end < start + min(at + T, count)) {
            // rare, so plain: parts of the tile, one after another
            int from = 0;
            for (;;) {
                const int until = int(min(sequence_end - start - at, i64(T)));
                walker.begin(shared, buffer, maps, from);
                for (int t = from; t < until; ++t) walker.walk(shared, buffer, maps, t, [](int) {});
                from = until;
                const bool is_last = sequence + 1 == n_rows;  // it should end at length
                if (is_last || sequence_end >= start + min(at + T, count)) break;
#if !ENDS
                walker.save(final_state + sequence * states);
#endif
                has_begun = true;
                sequence_end = cu_seqlens[++sequence + 1];
                begin_sequence();
            }
#pragma unroll
            for (int item = 0; item < 8 * VEC; ++item)
                clerk.prepare(shared, buffer ^ 1, item / 8, item % 8);
#if !ENDS
#pragma unroll
            for (int item = 0; item < 8 * VEC; ++item)
                clerk.finish(shared, buffer ^ 1, item / 8, item % 8);
            clerk.finish_last(VEC - 1);
#endif
            if (at + T + clerk.token >= count) clerk.prepare_nothing(shared, buffer ^ 1);
            clerk.prepare_maps(shared, next_maps);
            arrive(&shared.maps_written);
            load_early(at + 2 * T);
        } else
#endif
        {
            walker.begin(shared, buffer, maps, 0);
#pragma unroll
            for (int t = 0; t < T / 2; ++t)
                walker.walk(shared, buffer, maps, t, [&](int slot) {
                    Clerk::spread(t * SPT * CPT + slot, [&](int k, int stage) {
                        clerk.prepare(shared, buffer ^ 1, k, stage);
                    });
                });
            if (at + T + clerk.token >= count) clerk.prepare_nothing(shared, buffer ^ 1);
            clerk.prepare_maps(shared, next_maps);
            arrive(&shared.maps_written);
            load_early(at + 2 * T);
            // arrive() has one too: this one is for the compiler, which then spreads the
            // exponentials
            __syncwarp();
#pragma unroll
            for (int t = T / 2; t < T; ++t)
                walker.walk(shared, buffer, maps, t, [&](int slot) {
#if !ENDS
                    Clerk::spread((t - T / 2) * SPT * CPT + slot, [&](int k, int stage) {
                        clerk.finish(shared, buffer ^ 1, k, stage);
                    });
#endif
                });
#if !ENDS
            clerk.finish_last(VEC - 1);
#endif
        }
#if !ENDS
        write(at - T);
#endif
        // every warp has written its part of the next tile's B and C; none reads those of the tile
        // before this one any more, which the next ones overwrite
        wait(&shared.maps_written, buffer);
        buffer ^= 1, maps = next_maps;
#if !ENDS
        load_late(at);
#endif
    }

#if ENDS
    const i64 at = row * (n_segments - 1) + blockIdx.y;
    walker.save(ends + at * states + own);
#pragma unroll
    for (int k = 0; k < CPT; ++k)
        if (lane % LANES == 0 && k < walker.n_channels)
            dt_sums[at * n_channels + channel + k] = has_begun ? infinity() : walker.dt_sum[k];
#else
    const int last = (count + T - 1) / T * T - T;
#pragma unroll
    for (int item = 0; item < 8 * VEC; ++item) clerk.finish(shared, buffer ^ 1, item / 8, item % 8);
    clerk.finish_last(VEC - 1);
    write(last);
#if PACKED
    if (start + count == length)
        for (;;) {
            walker.save(final_state + sequence * states);
            if (++sequence == n_rows) break;
            begin_sequence();
        }
#else
    if (start + count == length) walker.save(final_state + row * states);
#endif
#endif
}
