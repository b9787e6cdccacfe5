// The backward of hybridzoo.kernels.selective_scan. With h[t] = a[t] h[t-1] + dt[t] B[t] x[t],
// where a[t] = exp(dt[t] A), p[t] = C[t] h[t] + D x[t] and y[t] = p[t] silu(z[t]), for each channel
//
//     g[t] = dy[t] silu(z[t])         dz[t] = dy[t] p[t] silu'(z[t])
//     dh[t] = C[t] g[t] + a[t+1] dh[t+1]                  (behind the last token dfinal_state)
//     w[t] = a[t] dh[t] h[t-1]        u[t] = sum over states of B[t] dh[t]
//     dx[t] = dt[t] u[t] + D g[t]     ddt[t] = x[t] u[t] + sum over states of A w[t]
//     dB[t] = sum over channels of dt[t] x[t] dh[t]
//     dC[t] = sum over channels of g[t] h[t]
//     dA = sum over time of dt[t] w[t], dD of g[t] x[t], dinitial_state = a[0] dh[0]
//
// and ddt reaches dt and dt_bias through the limits and softplus. Time runs backwards, a tile of T
// tokens at a time. A thread has CPT channels and SPT states of each; LANES lanes share a channel.
// A tile's states are walked from the forward's checkpoint: once to know the state before each of
// its SUB tokens, and again SUB tokens at a time, whose states and decays then lie in registers for
// the walk back over them. Instructions are the limit, and what latency two warps a scheduler do
// not hide; sums over lanes would be a fifth of the instructions: a lane gives half of what it has
// to another and gets the other half of that one's, until one is left, and in the end dB for dC. So
// that nothing need be selected, each lane numbers its channels and its states in an order of its
// own (`order_of`), and shared memory has B and C in each of these orders. What is of an element
// and not of a state is done once: prepare() makes (dt, dt x, g, slope of the step) of it before
// the walks, and finish() the gradients of x, dt and z behind each SUB tokens.
//
// Warps have channels of their own and share B and C. Their parts of dB and dC are added in shared
// memory in the order of warps, and those of blocks by sums.cu; there is no atomic.
//
// A long sequence with few channels is cut into segments of whole tiles, which run side by side:
// selective_scan_carries, compiled with CARRIES = 1, finds the a[t] dh[t] that each would hand to
// the one before it had nothing come from behind, and its sum of step sizes, of which the decay
// over it is made.
//
//   DTYPE ALIGNED   see io.cuh
//   SPT CPT LANES   states and channels a thread, lanes a channel; SPT * LANES >= d_state
//   WARPS           warps a block
//   MIN_BLOCKS      blocks that a multiprocessor should hold, for the compiler
//   TOKENS SUB      tokens a tile, which are the forward's between two checkpoints; tokens a walk
//   SUM_TOKENS      tokens whose parts of dA, dD and ddt_bias are one sum; a multiple of 8 TOKENS
//   SOFTPLUS LIMITS GATED PACKED    whether dt passes softplus, has limits; there is z; cu_seqlens
//   CARRIES         1: the kernel that finds what segments hand on
#include "selective_scan/adjoint.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
#if CARRIES
    selective_scan_carries
#else
    selective_scan_bwd
#endif
    (const element* __restrict__ x, const element* __restrict__ dt, const float* __restrict__ A,
     const element* __restrict__ B, const element* __restrict__ C, const float* __restrict__ D,
     const element* __restrict__ z, const float* __restrict__ dt_bias,
     const float* __restrict__ initial_state,  // (rows, i, n), a row a sequence
     const int* __restrict__ cu_seqlens,       // (rows + 1)
     const element* __restrict__ dy,
     const float* __restrict__ dfinal_state,  // like initial_state; null where it is zero
     const float* __restrict__ checkpoints,   // (b, l / TOKENS, i, n), of the forward
     element* __restrict__ dx, element* __restrict__ ddt, element* __restrict__ dz,  // (b, l, i)
     element* __restrict__ y,                         // of the forward; null: is not asked for
     float* __restrict__ dB, float* __restrict__ dC,  // (tiles of a group, b, l, g, n)
     // of each SUM_TOKENS tokens of a segment
     float* __restrict__ dA,                                // (b, segments, sums, i, n)
     float* __restrict__ dD, float* __restrict__ ddt_bias,  // (b, segments, sums, i)
     float* __restrict__ dinitial_state,                    // like initial_state
     float* __restrict__ carries,  // (b, segments - 1, i, n), of selective_scan_carries
     float* __restrict__ dt_sums,  // (b, segments - 1, i); infinity: a sequence began in it
     i64 length, i64 n_channels, i64 group_channels, i64 d_state, i64 n_rows, i64 segment_length,
     i64 n_segments, float dt_min, float dt_max, i64 x_b, i64 x_l, i64 dt_b, i64 dt_l, i64 z_b,
     i64 z_l, i64 B_b, i64 B_l, i64 B_g, i64 C_b, i64 C_l, i64 C_g, i64 dy_b, i64 dy_l, i64 dz_b,
     i64 dz_l) {
    extern __shared__ float4 memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    // ---- where: a batch row, a group's channels, a segment's tokens
    const i64 tiles_a_group = (group_channels + BLOCK_CH - 1) / BLOCK_CH;
    const i64 n_groups = n_channels / group_channels, n_tiles = tiles_a_group * n_groups;
    const i64 row = blockIdx.x / n_tiles, tile = blockIdx.x % n_tiles;
    const i64 group = tile / tiles_a_group;
    const i64 block_channel = group * group_channels + tile % tiles_a_group * BLOCK_CH;
    const i64 group_end = (group + 1) * group_channels;
    // the first segment hands nothing on
    const i64 segment = blockIdx.y + CARRIES, start = segment * segment_length;
    const int count = int(min(segment_length, length - start));

    // ---- its elements
    Elementwise elementwise;
    elementwise.token = lane / ROW_LANES;
    elementwise.column = lane % ROW_LANES * VEC;
    elementwise.dt_min = dt_min, elementwise.dt_max = dt_max;
    const i64 io_channel = block_channel + warp * CH + elementwise.column;
    const int io_valid = int(max(min(group_end - io_channel, i64(VEC)), i64(0)));
    for (int k = threadIdx.x; k < BLOCK_CH; k += THREADS) {
        const bool is_real = block_channel + k < group_end;
        shared.dt_bias[k] = is_real && dt_bias ? dt_bias[block_channel + k] : 0.0f;
#if !CARRIES
        shared.D[k] = is_real && D ? D[block_channel + k] : 0.0f;
#endif
    }
    // of a tensor with these strides, at the last tile
    const i64 last_tile = (count - 1) / T * T;
    const i64 first_token = start + last_tile;
    const int own_channel = warp * CH + elementwise.column;
#define STREAM(of, of_b, of_l)                                                                   \
    stream_of(of + row * (of_b) + first_token * (of_l) + block_channel, of_l, elementwise.token, \
              own_channel)
    elementwise.x = STREAM(x, x_b, x_l), elementwise.dt = STREAM(dt, dt_b, dt_l);
    elementwise.dy = STREAM(dy, dy_b, dy_l);
#if GATED
    elementwise.z = STREAM(z, z_b, z_l);
#endif
    const int own_place = place_of(elementwise.token, elementwise.column);
    const int map_token = threadIdx.x * MAPS / N_PAD, map_state = threadIdx.x * MAPS % N_PAD;
    const int map_valid = map_token < T ? int(min(d_state - map_state, i64(MAPS))) : 0;
    auto from_B =
        stream_of(B + row * B_b + first_token * B_l + group * B_g, B_l, map_token, map_state);
    auto from_C =
        stream_of(C + row * C_b + first_token * C_l + group * C_g, C_l, map_token, map_state);

    // ---- its part of the recurrence
    const int column = lane / LANES * CPT, first_state = lane % LANES * SPT;
    const i64 channel = block_channel + warp * CH + column;
    const i64 states = n_channels * d_state;  // of one row
    Own own;
    own.channel_order = order_of<CPT, 0, STATE_BITS>(lane);
    own.state_order = order_of<SPT, STATE_BITS, CHANNEL_BITS>(lane);
    own.n_channels = int(max(min(group_end - channel, i64(CPT)), i64(0)));
    own.n_states = int(max(min(d_state - first_state, i64(SPT)), i64(0)));
    own.first = channel * d_state + first_state, own.d_state = int(d_state);
    int place[CPT];  // of its channels, among elements of token 0
#pragma unroll
    for (int k = 0; k < CPT; ++k) {
        place[k] = place_of(0, column + (k ^ own.channel_order));
        // without this the compiler works it out anew at each use
        asm("" : "+r"(place[k]));
    }
    [[maybe_unused]] const bool keeps_dC = lane >> (STATE_BITS + HALVED_BITS) & 1;
    // of what it keeps of a token's dB and dC, where there are parts of both
    [[maybe_unused]] int part_place = warp * T * 2 * N_PAD + (PARTS_KINDS && keeps_dC ? N_PAD : 0) +
                                      first_state + own.state_order;
    asm("" : "+r"(part_place));
    float log_decay[CPT][SPT];  // for a step of one, of base 2
    own.load(log_decay, A);
    own.each([&](int k, int n, i64, bool) { log_decay[k][n] *= LOG2E; });

    // ---- the sequence of the token that is walked; the first one begins at 0, the last one ends
    // at length
    auto begin_of = [&](int sequence) { return sequence > 0 ? i64(cu_seqlens[sequence]) : i64(0); };
    [[maybe_unused]] auto sequence_of = [&](i64 token) {
        int low = 0;
        for (int high = int(n_rows) - 1; low < high;) {
            const int middle = (low + high + 1) / 2;
            if (begin_of(middle) <= token)
                low = middle;
            else
                high = middle - 1;
        }
        return low;
    };
    const i64 behind = start + count;
#if PACKED
    int sequence = sequence_of(behind - 1);
#else
    const int sequence = int(row);
#endif
    [[maybe_unused]] bool has_begun = false;  // a sequence, within this segment
    float carry[CPT][SPT];                    // a[t + 1] dh[t + 1]
    own.load(carry, behind == length ? row_of(dfinal_state, sequence * states) : nullptr);
    // at a sequence's first token, behind which the carry is its initial state's gradient
#if PACKED
    auto leave_sequence = [&] {
#if !CARRIES
        own.save(row_of(dinitial_state, sequence * states), carry);
#endif
        const i64 token = begin_of(sequence);
        // those that have no tokens are left out
        while (token > 0 && begin_of(sequence) == token) --sequence;
        own.load(carry, token > 0 ? row_of(dfinal_state, sequence * states) : nullptr);
        has_begun = true;
    };
#endif

#if CARRIES
    float dt_sum[CPT] = {};
#else
    // ---- what the segments behind this one hand on
    // loads of several segments in flight: they wait for memory once, not once each
#pragma unroll 4
    for (int s = int(n_segments) - 1; s > int(segment); --s) {
        const i64 at = row * (n_segments - 1) + s - 1;
        float found[CPT][SPT];
        own.load(found, carries + at * states);
#pragma unroll
        for (int k = 0; k < CPT; ++k) {
            const int c = k ^ own.channel_order;
            const float sum = c < own.n_channels ? dt_sums[at * n_channels + channel + c] : 0;
#pragma unroll
            for (int n = 0; n < SPT; ++n)
                carry[k][n] = sum == infinity() ? found[k][n]
                                                : fmaf(exp2_approx(sum * log_decay[k][n]),
                                                       carry[k][n], found[k][n]);
        }
    }
    const i64 n_checkpoints = (length + T - 1) / T;
    checkpoints += (row * n_checkpoints + start / T) * states;
    const i64 n_batch = gridDim.x / n_tiles;
    const i64 maps = (tile % tiles_a_group * n_batch + row) * length + start;
    dB += (maps * n_groups + group) * d_state, dC += (maps * n_groups + group) * d_state;
    auto to_x = STREAM(dx, length * n_channels, n_channels);
    auto to_dt = STREAM(ddt, length * n_channels, n_channels);
#if GATED
    auto to_z = STREAM(dz, dz_b, dz_l), to_y = STREAM(y, length * n_channels, n_channels);
#endif
    // sums over time, of SUM_TOKENS tokens each
    const i64 n_sums = (segment_length + SUM_TOKENS - 1) / SUM_TOKENS;
    const i64 first_sum = (row * n_segments + segment) * n_sums;
    float dA_sum[CPT][SPT];
    auto begin_sums = [&] {
        own.each([&](int k, int n, i64, bool) { dA_sum[k][n] = 0.0f; });
        shared.dD[threadIdx.x] = shared.dD_part[threadIdx.x] = shared.ddt_bias[threadIdx.x] = {};
    };
    auto save_sums = [&](i64 at) {
        own.save(dA + at * states, dA_sum);
#pragma unroll
        for (int k = 0; k < VEC; ++k) {
            float sums[2] = {shared.dD[threadIdx.x].at[k], shared.ddt_bias[threadIdx.x].at[k]};
            // lanes of the same channels have other tokens
            for (int bit = ROW_LANES; bit < 32; bit *= 2) {
                sums[0] += __shfl_xor_sync(~0u, sums[0], bit);
                sums[1] += __shfl_xor_sync(~0u, sums[1], bit);
            }
            if (lane < ROW_LANES && k < io_valid) {
                dD[at * n_channels + io_channel + k] = sums[0];
                ddt_bias[at * n_channels + io_channel + k] = sums[1];
            }
        }
    };
    begin_sums();
    // those of tokens that a last segment has not
    for (i64 k = last_tile / SUM_TOKENS + 1; k < n_sums; ++k) save_sums(first_sum + k);
#endif
    __syncthreads();

    float4* const elements = shared.element[warp];
    [[maybe_unused]] float4* const sums = elements + T / 2 * PAIR;
    [[maybe_unused]] float4* const steps = shared.steps[warp];
    float2* const own_steps =
        reinterpret_cast<float2*>(steps + place_of(elementwise.token / 2, elementwise.column)) +
        elementwise.token % 2;
    // What a tile needs is loaded while the block adds up dB and dC of the one behind it.
    struct {
        Row rows[SUBS];
        Packed<MAPS> B, C;
        float4 checkpoint[CPT];
    } loaded;
    auto load = [&](int at) {
#pragma unroll
        for (int sub = 0; sub < SUBS; ++sub) {
            const bool exists = at + sub * SUB + elementwise.token < count;
            loaded.rows[sub] = elementwise.load(sub * SUB, exists ? io_valid : 0);
        }
        const int valid = at + map_token < count ? map_valid : 0;
        loaded.C = load_packed<MAPS>(from_C.at(0), valid);
#if !CARRIES
        loaded.B = load_packed<MAPS>(from_B.at(0), valid);
        own.load_unordered(loaded.checkpoint, checkpoints + at / T * states);
#endif
    };
#if !CARRIES
    // ---- dB and dC of the block's channels, of one tile
    auto save_maps = [&](int at) {
        for (int k = threadIdx.x; k < T * N_PAD / 2; k += THREADS) {
            const int n = 4 * k % N_PAD, is_C = 4 * k / N_PAD % 2, t = 4 * k / N_PAD / 2;
            float sum[4] = {};
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                float part[4];
                read_fours(part, &shared.dB_dC[w][t][is_C][n]);
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[j] += part[j];
            }
            float* to = (is_C ? dC : dB) + (at + t) * n_groups * d_state + n;
            if (at + t < count && d_state % 4 == 0 && n < d_state)
                *reinterpret_cast<float4*>(to) = make_float4(sum[0], sum[1], sum[2], sum[3]);
            else if (at + t < count)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (n + j < d_state) to[j] = sum[j];
        }
    };
#endif
    for (int at = last_tile; at >= 0; at -= T) {
        load(at);
#if !CARRIES
        if (at < last_tile) save_maps(at + T);
#endif
        // ---- the tile's elements, B and C, which have been loaded
#if !CARRIES
        float decay[SUB][CPT][SPT], state[SUB + 1][CPT][SPT];
#endif
        if (map_token < T)
#pragma unroll
            for (int k = 0; k < MAPS; ++k)
#pragma unroll
                for (int order = 0; order < ORDERS; ++order) {
                    const int n = map_state + k ^ order_of<SPT, 0, ORDER_BITS>(order);
                    shared.C[map_token][order * N_PAD + n] = unpack(loaded.C, k);
#if !CARRIES
                    shared.B[map_token][order * N_PAD + n] = unpack(loaded.B, k);
#endif
                }
        float bias[VEC];
#pragma unroll
        for (int k = 0; k < VEC; ++k) bias[k] = shared.dt_bias[own_channel + k];
#pragma unroll
        for (int sub = 0; sub < SUBS; ++sub)
            elementwise.prepare(loaded.rows[sub], elements + own_place + place_of(sub * SUB, 0),
                                own_steps + 2 * place_of(sub * SUB / 2, 0), bias,
                                at + sub * SUB + elementwise.token < count);
#if !CARRIES
        own.put_in_order(state[0], loaded.checkpoint);
#endif
        if (at > 0) {
            const i64 first_channel = block_channel + warp * CH;
            elementwise.prefetch_tile_before(lane, warp * CH, group_end - first_channel);
#if !CARRIES
            const i64 n_floats = min(group_end - first_channel, i64(CH)) * d_state;
            for (int k = 8 * lane; k < n_floats; k += 8 * 32)
                prefetch(checkpoints + (at / T - 1) * states + first_channel * d_state + k);
#endif
        }
#if PACKED
        unsigned starts = 0;  // bits of the tokens at which a sequence begins
        for (int k = sequence; k >= 0 && begin_of(k) >= start + at; --k)
            starts |= 1u << (begin_of(k) - start - at);
#endif
        __syncthreads();

        auto read_map = [&](float (&to)[SPT], const float (&map)[T][MAP_ROW], int t) {
            read_fours(to, &map[t][lane / LANES % ORDERS * N_PAD + first_state]);
        };
        auto element = [&](int first, int t, int k) {
            return (elements + place[k] + place_of(first, 0))[place_of(t, 0)];
        };
#if CARRIES
#pragma unroll 1
        for (int first = T - SUB; first >= 0; first -= SUB)
#pragma unroll
            for (int t = SUB - 1; t >= 0; --t) {
                float C_now[SPT];
                read_map(C_now, shared.C, first + t);
#pragma unroll
                for (int k = 0; k < CPT; ++k) {
                    const float4 now = element(first, t, k);
                    dt_sum[k] += now.x;
#pragma unroll
                    for (int n = 0; n < SPT; ++n)
                        carry[k][n] = exp2_factor(now.x, log_decay[k][n]) *
                                      fmaf(C_now[n], now.z, carry[k][n]);
                }
#if PACKED
                if (__builtin_expect(starts >> (first + t) & 1, 0)) leave_sequence();
#endif
            }
#else
        // ---- the states: token t from the one before it
        [[maybe_unused]] float4 pair[CPT];
        [[maybe_unused]] auto read_pair = [&](int first, int t) {
#pragma unroll
            for (int k = 0; k < CPT; ++k)
                pair[k] = (steps + place[k] + place_of(first / 2, 0))[place_of(t / 2, 0)];
        };
        auto walk = [&](int first, int t, float (&decay)[CPT][SPT], const float (&from)[CPT][SPT],
                        float (&to)[CPT][SPT]) {
            float B_now[SPT], input[CPT][SPT];
            read_map(B_now, shared.B, first + t);
            if (READS_PAIRS && t % 2 == 0) read_pair(first, t);
#pragma unroll
            for (int k = 0; k < CPT; ++k) {
                const float4 now = !READS_PAIRS ? element(first, t, k)
                                   : t % 2      ? make_float4(pair[k].z, pair[k].w, 0.0f, 0.0f)
                                                : pair[k];
#pragma unroll
                for (int n = 0; n < SPT; ++n) {
                    decay[k][n] = exp2_factor(now.x, log_decay[k][n]);
                    input[k][n] = now.y * B_now[n];
                }
            }
#pragma unroll
            for (int k = 0; k < CPT; ++k)
#pragma unroll
                for (int n = 0; n < SPT; ++n) to[k][n] = fmaf(decay[k][n], from[k][n], input[k][n]);
        };
        auto begin_sequence = [&](int t, float (&from)[CPT][SPT]) {
#if PACKED
            if (__builtin_expect(starts >> t & 1, 0))
                own.load(from, row_of(initial_state, sequence_of(start + at + t) * states));
#endif
        };
#pragma unroll 1
        for (int sub = 0; sub < SUBS - 1; ++sub) {
#pragma unroll
            for (int k = 0; k < CPT; ++k)
#pragma unroll
                for (int n = 0; n < SPT; n += 4)
                    shared.before[sub][(k * SPT + n) / 4][threadIdx.x] = make_float4(
                        state[0][k][n], state[0][k][n + 1], state[0][k][n + 2], state[0][k][n + 3]);
#pragma unroll
            for (int t = 0; t < SUB; ++t) {
                begin_sequence(sub * SUB + t, state[0]);
                walk(sub * SUB, t, decay[0], state[0], state[0]);
            }
        }

#pragma unroll 1
        for (int sub = SUBS - 1; sub >= 0; --sub) {
            const int first = sub * SUB;
            const int valid = at + first + elementwise.token < count ? io_valid : 0;
#pragma unroll
            for (int t = 0; t < SUB; ++t) {
                begin_sequence(first + t, state[t]);
                walk(first, t, decay[t], state[t], state[t + 1]);
            }

            // ---- and back. finish() needs this row, which would take registers of the walk
            const Row row = elementwise.load_again(first, valid);
#pragma unroll
            for (int t = SUB - 1; t >= 0; --t) {
                const int token = first + t;
                float B_now[SPT], C_now[SPT];
                read_map(B_now, shared.B, token);
                read_map(C_now, shared.C, token);
                float dB_now[SPT], dC_now[SPT], p[CPT], u[CPT], Aw[CPT];
#pragma unroll
                for (int k = 0; k < CPT; ++k) {
                    const float4 now = element(first, t, k);
#pragma unroll
                    for (int n = 0; n < SPT; ++n) {
                        const float h = state[t + 1][k][n];
                        const float dh = fmaf(C_now[n], now.z, carry[k][n]);
                        dC_now[n] = k ? fmaf(now.z, h, dC_now[n]) : now.z * h;
                        dB_now[n] = k ? fmaf(now.y, dh, dB_now[n]) : now.y * dh;
                        p[k] = n ? fmaf(C_now[n], h, p[k]) : C_now[n] * h;
                        u[k] = n ? fmaf(B_now[n], dh, u[k]) : B_now[n] * dh;
                        carry[k][n] = decay[t][k][n] * dh;
                        const float w = carry[k][n] * state[t][k][n];
                        Aw[k] = n ? fmaf(log_decay[k][n], w, Aw[k]) : log_decay[k][n] * w;
                        dA_sum[k][n] = fmaf(now.x, w, dA_sum[k][n]);
                    }
                }
#if PACKED
                if (__builtin_expect(starts >> token & 1, 0)) {
                    leave_sequence();
                    // the state that the one before it ended with, in whose place stood this one's
                    // first
                    if (READS_PAIRS && t > 0) read_pair(first, t - 1);
                    if (t > 0) walk(first, t - 1, decay[t - 1], state[t - 1], state[t]);
                }
#endif
                sum_over_channels(dB_now, dC_now, keeps_dC);
#if GATED
                sum_over_lanes<0, STATE_BITS>(p);
#endif
                sum_over_lanes<0, STATE_BITS>(u);
                sum_over_lanes<0, STATE_BITS>(Aw);
                float* const kept = (&shared.dB_dC[0][0][0][0] + part_place) + token * 2 * N_PAD;
                if constexpr (PARTS_KINDS) {
                    if (lane >> (STATE_BITS + HALVED_BITS + 1) == 0) *kept = dB_now[0];
                } else {
#pragma unroll
                    for (int n = 0; n < KEPT_STATES; ++n)
                        kept[n] = dB_now[n], kept[N_PAD + n] = dC_now[n];
                }
                if (lane % LANES * KEPT_CHANNELS < CPT)
#pragma unroll
                    for (int k = 0; k < KEPT_CHANNELS; ++k)
                        (sums + place[k])[place_of(t, 0)] = make_float4(p[k], u[k], Aw[k], 0.0f);
            }
            __syncwarp();
            float into_x[VEC], into_dt[VEC], into_z[VEC], into_y[VEC];
            elementwise.finish(row, elements + own_place + place_of(first, 0), sums + own_place,
                               &shared.D[own_channel], shared.dD_part[threadIdx.x],
                               shared.ddt_bias[threadIdx.x], into_x, into_dt, into_z, into_y);
            store_packed<VEC>(to_x.at(first), pack<VEC>(into_x), valid);
            store_packed<VEC>(to_dt.at(first), pack<VEC>(into_dt), valid);
#if GATED
            store_packed<VEC>(to_z.at(first), pack<VEC>(into_z), valid);
            if (y) store_packed<VEC>(to_y.at(first), pack<VEC>(into_y), valid);
#endif
            if (sub > 0)
#pragma unroll
                for (int k = 0; k < CPT; ++k)
#pragma unroll
                    for (int n = 0; n < SPT; n += 4) {
                        const float4 v = shared.before[sub - 1][(k * SPT + n) / 4][threadIdx.x];
                        state[0][k][n] = v.x, state[0][k][n + 1] = v.y;
                        state[0][k][n + 2] = v.z, state[0][k][n + 3] = v.w;
                    }
            __syncwarp();
        }
        if (at % (SUM_TOKENS / 8) == 0) {
#pragma unroll
            for (int k = 0; k < VEC; ++k)
                shared.dD[threadIdx.x].at[k] += shared.dD_part[threadIdx.x].at[k];
            shared.dD_part[threadIdx.x] = {};
        }
        if (at % SUM_TOKENS == 0) {
            save_sums(first_sum + at / SUM_TOKENS);
            begin_sums();
        }
        to_x.tile -= T * n_channels, to_dt.tile -= T * n_channels;
#if GATED
        to_z.tile -= T * dz_l, to_y.tile -= T * n_channels;
#endif
#endif
        elementwise.move();
        from_B.tile -= T * B_l, from_C.tile -= T * C_l;
        __syncthreads();
    }

#if CARRIES
    const i64 at = row * (n_segments - 1) + segment - 1;
    own.save(carries + at * states, carry);
#pragma unroll
    for (int k = 0; k < CPT; ++k) {
        const int c = k ^ own.channel_order;
        if (lane % LANES == 0 && c < own.n_channels)
            dt_sums[at * n_channels + channel + c] = has_begun ? infinity() : dt_sum[k];
    }
#else
    save_maps(0);
#if !PACKED
    if (segment == 0) own.save(row_of(dinitial_state, sequence * states), carry);
#endif
#endif
}
