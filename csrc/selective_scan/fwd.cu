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
// that the exponential unit is asked for little and often. A walker reads and makes ahead what its
// next tokens need, across tiles too. Warps of a block share B and C: one barrier a tile, at which
// they arrive in its middle and wait before its last four tokens. A team of warps also reads and
// writes together, in longer rows, and then needs each other's sums: another barrier, at which they
// arrive behind a tile and wait in the middle of the next.
//
// A long sequence with few channels is cut into segments of whole tiles, which run side by side:
// selective_scan_ends, compiled with ENDS = 1, finds the state with which each segment would end
// had it begun at zero, and its sum of step sizes, of which the decay over the segment is made;
// then each segment of selective_scan_fwd begins from what those before it left.
//
//   DTYPE ALIGNED   see io.cuh
//   SPT CPT LANES   states and channels a thread, lanes a channel; SPT * LANES >= d_state
//   WARPS TEAM      warps a block, and of those how many read and write together: 1 or more
//   TOKENS          tokens a tile
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
constexpr int WARP_LANES = CH / VEC;                        // lanes a token, of a warp
constexpr int ROW_LANES = TEAM * WARP_LANES;                // and of a team
// 4 floats behind every 32 of the sums, and behind a warp's steps, spread the banks
__host__ __device__ constexpr int padded(int at) { return at + at / 32 * 4; }
// floats a token of (dt, dt x), and of sums over SPT states
constexpr int STEP_WARP = 2 * CH + 4, STEP_ROW = TEAM * STEP_WARP;
constexpr int SUM_WARP = padded(32 * CPT), SUM_ROW = TEAM * SUM_WARP;
// What a walker reads of B and C for a token is its states of B, then those of C. Lanes read it in
// chunks of 16 bytes, or all at once where it is less, and neighbours' chunks lie side by side.
// Where a thread has two states, reading limits more than instructions do: then halves stay halves.
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

// A thread as walker.
struct Walker {
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

// A lane as reader of VEC channels of token `token` of each tile, and as writer of the same.
struct Clerk {
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
    const int team = warp / TEAM, member = threadIdx.x % (32 * TEAM);

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
    clerk.token = member / ROW_LANES;
    // whose channels it reads and writes, and from which of that warp's
    const int its_warp = member % ROW_LANES / WARP_LANES, first = member % WARP_LANES * VEC;
    clerk.column = (team * TEAM + its_warp) * CH + first;
    clerk.step_at = (team * T + clerk.token) * STEP_ROW + its_warp * STEP_WARP + 2 * first;
    clerk.sum_at = (team * T + clerk.token) * SUM_ROW + its_warp * SUM_WARP + padded(LANES * first);
    clerk.dt_min = dt_min, clerk.dt_max = dt_max;
    const i64 io_channel = block_channel + clerk.column;
    const int io_valid = int(max(min(group_end - io_channel, i64(VEC)), i64(0)));
    // those whose channels begin a sector of 32 bytes bring it into the L2 cache
    const bool leads = io_valid > 0 && member % ROW_LANES * VEC * int(sizeof(element)) % 32 == 0;
    x += row * x_b + (start + clerk.token) * x_l + io_channel;
    dt += row * dt_b + (start + clerk.token) * dt_l + io_channel;
    const int map_token = threadIdx.x * MAPS / N_PAD, map_state = threadIdx.x * MAPS % N_PAD;
    const int map_valid = map_token < T ? int(min(d_state - map_state, i64(MAPS))) : 0;
    clerk.map_at = map_token * LANES * RUN + map_state / SPT * CHUNK + in_chunks(map_state % SPT);
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
    walker.step_at = team * T * STEP_ROW + warp % TEAM * STEP_WARP + lane / LANES * 2 * CPT;
    walker.map_at = lane % LANES * CHUNK;
    walker.sum_at = team * T * SUM_ROW + warp % TEAM * SUM_WARP + padded(lane * CPT);
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
        if (leads && at + T + clerk.token < count) prefetch(x), prefetch(dt);
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
        if (leads && at + T + clerk.token < count) prefetch(z);
#endif
    };
    // A team's sums come from all its warps: each arrives behind a tile, and waits in the middle of
    // the next one. Before the first there is nothing to wait for, as a barrier takes the phase
    // before its first for over.
    auto wait_for_sums = [&]([[maybe_unused]] int parity) {
#if TEAM > 1
        wait(&shared.sums_written, parity);
#endif
    };
    auto write = [&](int at) {
        store_packed<VEC>(y, pack<VEC>(clerk.out),
                          at >= 0 && at + clerk.token < count ? io_valid : 0);
        if (at >= 0) y += T * n_channels;
    };
#endif

    if (threadIdx.x == 0) {
        init_barrier(&shared.tile_written, WARPS);
#if TEAM > 1 && !ENDS
        init_barrier(&shared.sums_written, WARPS);
#endif
    }
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

#if !ENDS
    // ---- what the segments before this one left
    // loads of several segments in flight: they wait for memory once, not once each
#pragma unroll 4
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
#endif

    Place here = {0, 0};
    walker.begin(shared, here);
    for (int at = 0, parity = 0; at < count; at += T, parity ^= 1) {
        const int next_maps = here.maps == 2 ? 0 : here.maps + 1;
        const Place next = {TEAM > 1 ? next_maps : here.steps ^ 1, next_maps};
        // of the tile before, whose sums are written
        [[maybe_unused]] const int last = TEAM > 1 ? 3 - here.maps - next_maps : next.steps;
#if CHECKPOINTS && !ENDS
        if ((at & int(checkpoint_every - 1)) == 0) {
            walker.save(checkpoints);
            checkpoints += states;
        }
#endif
#if PACKED
        if (sequence_end < start + min(at + T, count)) {
            // rare, so plain: the jobs one after another, and the tile in parts
#pragma unroll
            for (int item = 0; item < 8 * VEC; ++item)
                clerk.prepare(shared, next.steps, item / 8, item % 8);
            if (at + T + clerk.token >= count) clerk.prepare_nothing(shared, next.steps);
            clerk.prepare_maps(shared, next_maps);
#if !ENDS
            wait_for_sums(parity ^ 1);
#pragma unroll
            for (int item = 0; item < 8 * VEC; ++item)
                clerk.finish(shared, last, item / 8, item % 8);
            clerk.finish_last(VEC - 1);
#endif
            arrive(&shared.tile_written);
            load_early(at + 2 * T);
            wait(&shared.tile_written, parity);
            int t = 0;
            for (;;) {
                const bool is_last = sequence + 1 == n_rows;  // it should end at length
                const int until = is_last ? T : int(min(sequence_end - start - at, i64(T)));
#pragma unroll 1
                for (; t < until; ++t) walker.walk(shared, here, next, t, [](int) {});
                if (is_last || sequence_end >= start + min(at + T, count)) break;
#if !ENDS
                walker.save(final_state + sequence * states);
#endif
                has_begun = true;
                sequence_end = cu_seqlens[++sequence + 1];
                begin_sequence();
            }
        } else
#endif
        {
#pragma unroll
            for (int t = 0; t < T / 2; ++t) {
                if (t > 0 && t % 4 == 0) __syncwarp();
                walker.walk(shared, here, next, t, [&](int slot) {
                    Clerk::spread(t * SPT * CPT + slot, [&](int k, int stage) {
                        clerk.prepare(shared, next.steps, k, stage);
                    });
                });
            }
            if (at + T + clerk.token >= count) clerk.prepare_nothing(shared, next.steps);
            clerk.prepare_maps(shared, next_maps);
            arrive(&shared.tile_written);
            load_early(at + 2 * T);
            // this one and those every four tokens are for the compiler, which spreads the
            // exponentials better between them
            __syncwarp();
#if !ENDS
            wait_for_sums(parity ^ 1);
#endif
#pragma unroll
            for (int t = T / 2; t < T; ++t) {
                if (t > T / 2 && t % 4 == 0) __syncwarp();
                // every warp has written its part of the next tile, of which the last tokens read
                // ahead; and none reads any more of the tile before this one, whose place is the
                // next one's
                if (t == T - 4) wait(&shared.tile_written, parity);
                walker.walk(shared, here, next, t, [&](int slot) {
#if !ENDS
                    Clerk::spread((t - T / 2) * SPT * CPT + slot,
                                  [&](int k, int stage) { clerk.finish(shared, last, k, stage); });
#endif
                });
            }
#if !ENDS
            clerk.finish_last(VEC - 1);
#endif
        }
#if !ENDS
        write(at - T);
#endif
#if TEAM > 1 && !ENDS
        arrive(&shared.sums_written);
#else
        __syncwarp();
#endif
        here = next;
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
    const int n_tiles_walked = (count + T - 1) / T;
    const int last = TEAM > 1 ? (here.steps + 2) % 3 : here.steps ^ 1;
    wait_for_sums((n_tiles_walked - 1) & 1);
#pragma unroll
    for (int item = 0; item < 8 * VEC; ++item) clerk.finish(shared, last, item / 8, item % 8);
    clerk.finish_last(VEC - 1);
    write(n_tiles_walked * T - T);
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
