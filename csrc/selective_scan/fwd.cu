// The forward of hybridzoo.kernels.selective_scan (Mamba, arXiv 2312.00752, Algorithm 2):
//
//     h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]          y[t] = (C[t] h[t] + D x[t]) silu(z[t])
//
// The exponential is the limit: one for each token, channel and state, 16 a clock and
// multiprocessor. So a thread has two jobs that take turns within every token. In the recurrence
// (recurrence.cuh) it walks through time with CPT channels and SPT states of each in registers;
// LANES lanes share a channel. What is of an element and not of a state (elementwise.cuh) it does
// once: it reads VEC channels of one token as a vector, makes floats (dt, dt x) of them in shared
// memory, and later gates the sums over states and writes them. The jobs are on neighbouring tiles
// of T tokens (tile.cuh): while tile k is walked, tile k + 1 is prepared in its first half and tile
// k - 1 written in its second, in eight stages an element, so that the exponential unit is asked
// for little and often. The walk reads and makes ahead what its next tokens need, across tiles too.
// Warps of a block share B and C: one barrier a tile, at which they arrive in its middle and wait
// before its last four tokens. A team of warps also reads and writes together, in longer rows, and
// then needs each other's sums: another barrier, at which they arrive behind a tile and wait in the
// middle of the next.
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
#include "selective_scan/elementwise.cuh"
#include "selective_scan/recurrence.cuh"

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

    // ---- its elements
    Elementwise elementwise;
    elementwise.token = member / ROW_LANES;
    // whose channels it reads and writes, and from which of that warp's
    const int its_warp = member % ROW_LANES / WARP_LANES, first = member % WARP_LANES * VEC;
    elementwise.column = (team * TEAM + its_warp) * CH + first;
    elementwise.step_at =
        (team * T + elementwise.token) * STEP_ROW + its_warp * STEP_WARP + 2 * first;
    elementwise.sum_at =
        (team * T + elementwise.token) * SUM_ROW + its_warp * SUM_WARP + padded(LANES * first);
    elementwise.dt_min = dt_min, elementwise.dt_max = dt_max;
    const i64 io_channel = block_channel + elementwise.column;
    const int io_valid = int(max(min(group_end - io_channel, i64(VEC)), i64(0)));
    // those whose channels begin a sector of 32 bytes bring it into the L2 cache
    const bool leads = io_valid > 0 && member % ROW_LANES * VEC * int(sizeof(element)) % 32 == 0;
    x += row * x_b + (start + elementwise.token) * x_l + io_channel;
    dt += row * dt_b + (start + elementwise.token) * dt_l + io_channel;
    const int map_token = threadIdx.x * MAPS / N_PAD, map_state = threadIdx.x * MAPS % N_PAD;
    const int map_valid = map_token < T ? int(min(d_state - map_state, i64(MAPS))) : 0;
    elementwise.map_at =
        map_token * LANES * RUN + map_state / SPT * CHUNK + in_chunks(map_state % SPT);
    B += row * B_b + (start + map_token) * B_l + group * B_g + map_state;
#if !ENDS
    C += row * C_b + (start + map_token) * C_l + group * C_g + map_state;
    const element* late_x = x;
#if GATED
    z += row * z_b + (start + elementwise.token) * z_l + io_channel;
#endif
    y += (row * length + start + elementwise.token) * n_channels + io_channel;
#endif
    for (int k = threadIdx.x; k < BLOCK_CH; k += THREADS) {
        const bool is_real = block_channel + k < group_end;
        shared.dt_bias[k] = is_real && dt_bias ? dt_bias[block_channel + k] : 0.0f;
#if !ENDS
        shared.D[k] = is_real && D ? D[block_channel + k] : 0.0f;
#endif
    }

    // ---- its part of the recurrence
    Recurrence recurrence;
    const i64 channel = block_channel + warp * CH + lane / LANES * CPT;
    const int state = lane % LANES * SPT;
    recurrence.n_channels = int(max(min(group_end - channel, i64(CPT)), i64(0)));
    recurrence.n_states = int(max(min(d_state - state, i64(SPT)), i64(0)));
    recurrence.d_state = int(d_state);
    recurrence.step_at = team * T * STEP_ROW + warp % TEAM * STEP_WARP + lane / LANES * 2 * CPT;
    recurrence.map_at = lane % LANES * CHUNK;
    recurrence.sum_at = team * T * SUM_ROW + warp % TEAM * SUM_WARP + padded(lane * CPT);
    const i64 own = channel * d_state + state;  // this thread's first, of a row's states
    const i64 states = n_channels * d_state;    // of one row
    recurrence.load(recurrence.A, A + own);
#pragma unroll
    for (int k = 0; k < CPT; ++k) {
        recurrence.dt_sum[k] = 0.0f;
#pragma unroll
        for (int n = 0; n < SPT; ++n) recurrence.A[k][n] *= LOG2E;
    }

    // ---- the first sequence that has not ended before `start`, and the state there
    [[maybe_unused]] bool has_begun = false;  // another sequence, within this segment
    i64 sequence = row;
    if (initial_state) initial_state += own;
    auto begin_sequence = [&] {
        recurrence.load(recurrence.h, initial_state ? initial_state + sequence * states : nullptr);
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
        recurrence.load(recurrence.h, nullptr);
#if !ENDS
    final_state += own;
#if CHECKPOINTS
    const i64 n_checkpoints = (length + checkpoint_every - 1) / checkpoint_every;
    checkpoints += (row * n_checkpoints + start / checkpoint_every) * states + own;
#endif
#endif

    // `at` is the tile's first token, of the segment's
    auto load_early = [&](int at) {
        const int valid = at + elementwise.token < count ? io_valid : 0;
        elementwise.x = load_packed<VEC>(x, valid);
        elementwise.dt = load_packed<VEC>(dt, valid);
        x += T * x_l, dt += T * dt_l;
        if (leads && at + T + elementwise.token < count) prefetch(x), prefetch(dt);
        const int maps = at + map_token < count ? map_valid : 0;
        elementwise.B = load_packed<MAPS>(B, maps);
        B += T * B_l;
#if !ENDS
        elementwise.C = load_packed<MAPS>(C, maps);
        C += T * C_l;
#endif
    };
#if !ENDS
    auto load_late = [&](int at) {
        const int valid = at + elementwise.token < count ? io_valid : 0;
        elementwise.late_x = load_packed<VEC>(late_x, valid);
        late_x += T * x_l;
#if GATED
        elementwise.z = load_packed<VEC>(z, valid);
        z += T * z_l;
        if (leads && at + T + elementwise.token < count) prefetch(z);
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
        store_packed<VEC>(y, pack<VEC>(elementwise.out),
                          at >= 0 && at + elementwise.token < count ? io_valid : 0);
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
    for (int item = 0; item < 8 * VEC; ++item) elementwise.prepare(shared, 0, item / 8, item % 8);
    if (elementwise.token >= count) elementwise.prepare_nothing(shared, 0);
    elementwise.prepare_maps(shared, 0);
    load_early(T);
#if !ENDS
    elementwise.late_x = elementwise.z =
        Packed<VEC>();  // of the tile before the first, which is not written
#endif
    __syncthreads();

#if !ENDS
    // ---- what the segments before this one left
    // loads of several segments in flight: they wait for memory once, not once each
#pragma unroll 4
    for (int s = 0; s < int(blockIdx.y); ++s) {
        const i64 at = row * (n_segments - 1) + s;
        float end[CPT][SPT];
        recurrence.load(end, ends + at * states + own);
#pragma unroll
        for (int k = 0; k < CPT; ++k) {
            const float sum =
                k < recurrence.n_channels ? dt_sums[at * n_channels + channel + k] : 0.0f;
#pragma unroll
            for (int n = 0; n < SPT; ++n) {
                const float kept = exp2_approx(sum * recurrence.A[k][n]) * recurrence.h[k][n];
                recurrence.h[k][n] = sum == infinity() ? end[k][n] : kept + end[k][n];
            }
        }
    }
#endif

    // the state before a tile's second half, where tiles are twice as long as checkpoints are apart
    auto save_in_the_middle = [&]([[maybe_unused]] int at) {
#if CHECKPOINTS && !ENDS
        if (T > 16 && checkpoint_every < T && at + T / 2 < count) {
            recurrence.save_checkpoint(checkpoints);
            checkpoints += states;
        }
#endif
    };
    Place here = {0, 0};
    recurrence.begin(shared, here);
    for (int at = 0, parity = 0; at < count; at += T, parity ^= 1) {
        const int next_maps = here.maps == 2 ? 0 : here.maps + 1;
        const Place next = {TEAM > 1 ? next_maps : here.steps ^ 1, next_maps};
        // of the tile before, whose sums are written
        [[maybe_unused]] const int last = TEAM > 1 ? 3 - here.maps - next_maps : next.steps;
#if CHECKPOINTS && !ENDS
        if ((at & int(checkpoint_every - 1)) == 0) {
            recurrence.save_checkpoint(checkpoints);
            checkpoints += states;
        }
#endif
#if PACKED
        if (sequence_end < start + min(at + T, count)) {
            // rare, so plain: the jobs one after another, and the tile in parts
#pragma unroll
            for (int item = 0; item < 8 * VEC; ++item)
                elementwise.prepare(shared, next.steps, item / 8, item % 8);
            if (at + T + elementwise.token >= count)
                elementwise.prepare_nothing(shared, next.steps);
            elementwise.prepare_maps(shared, next_maps);
#if !ENDS
            wait_for_sums(parity ^ 1);
#pragma unroll
            for (int item = 0; item < 8 * VEC; ++item)
                elementwise.finish(shared, last, item / 8, item % 8);
            elementwise.finish_last(VEC - 1);
#endif
            arrive(&shared.tile_written);
            load_early(at + 2 * T);
            wait(&shared.tile_written, parity);
            int t = 0;
            for (;;) {
                const bool is_last = sequence + 1 == n_rows;  // it should end at length
                const int until = is_last ? T : int(min(sequence_end - start - at, i64(T)));
#pragma unroll 1
                for (; t < until; ++t) {
                    if (t == T / 2) save_in_the_middle(at);
                    recurrence.walk(shared, here, next, t, [](int) {});
                }
                if (is_last || sequence_end >= start + min(at + T, count)) break;
#if !ENDS
                recurrence.save(final_state + sequence * states);
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
                recurrence.walk(shared, here, next, t, [&](int slot) {
                    Elementwise::spread(t * SPT * CPT + slot, [&](int k, int stage) {
                        elementwise.prepare(shared, next.steps, k, stage);
                    });
                });
            }
            if (at + T + elementwise.token >= count)
                elementwise.prepare_nothing(shared, next.steps);
            elementwise.prepare_maps(shared, next_maps);
            arrive(&shared.tile_written);
            load_early(at + 2 * T);
            save_in_the_middle(at);
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
                recurrence.walk(shared, here, next, t, [&](int slot) {
#if !ENDS
                    Elementwise::spread((t - T / 2) * SPT * CPT + slot, [&](int k, int stage) {
                        elementwise.finish(shared, last, k, stage);
                    });
#endif
                });
            }
#if !ENDS
            elementwise.finish_last(VEC - 1);
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
    recurrence.save(ends + at * states + own);
#pragma unroll
    for (int k = 0; k < CPT; ++k)
        if (lane % LANES == 0 && k < recurrence.n_channels)
            dt_sums[at * n_channels + channel + k] = has_begun ? infinity() : recurrence.dt_sum[k];
#else
    const int n_tiles_walked = (count + T - 1) / T;
    const int last = TEAM > 1 ? (here.steps + 2) % 3 : here.steps ^ 1;
    wait_for_sums((n_tiles_walked - 1) & 1);
#pragma unroll
    for (int item = 0; item < 8 * VEC; ++item) elementwise.finish(shared, last, item / 8, item % 8);
    elementwise.finish_last(VEC - 1);
    write(n_tiles_walked * T - T);
#if PACKED
    if (start + count == length)
        for (;;) {
            recurrence.save(final_state + sequence * states);
            if (++sequence == n_rows) break;
            begin_sequence();
        }
#else
    if (start + count == length) recurrence.save(final_state + row * states);
#endif
#endif
}
