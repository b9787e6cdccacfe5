// What csrc takes from CUDA, for g++. One block runs at a time.
#pragma once
#include <algorithm>
#include <barrier>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

using std::max;
using std::min;
#define __device__
#define __host__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

struct Index { unsigned x, y, z; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <class T>
T __ldg(const T* p) { return *p; }
inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { return __uint_as_float(unsigned(x)); }
inline unsigned pack_bf16(float high, float low) {
    auto round = [](float x) {
        unsigned bits = __float_as_uint(x);
        return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    };
    return round(high) << 16 | round(low);
}

inline thread_local Index threadIdx, blockIdx;
inline Index gridDim;
inline float4 memory[1 << 14];
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
inline void __syncthreads() { block_barrier->arrive_and_wait(); }
inline void __syncwarp() { warp_barriers[threadIdx.x / 32]->arrive_and_wait(); }

inline float exchanged[32][32];
inline float __shfl_xor_sync(unsigned, float value, int bits) {
    float(&lanes)[32] = exchanged[threadIdx.x / 32];
    lanes[threadIdx.x % 32] = value;
    __syncwarp();
    const float found = lanes[threadIdx.x % 32 ^ bits];
    __syncwarp();
    return found;
}

// barrier.cuh, by a lock; the words in shared memory only name them
struct Barrier { unsigned size, missing, phase; };
inline std::mutex barrier_lock;
inline std::condition_variable barrier_turn;
inline std::map<unsigned long long*, Barrier> barriers;
inline void init_barrier(unsigned long long* barrier, unsigned n_warps) {
    std::lock_guard guard(barrier_lock);
    barriers[barrier] = {n_warps, n_warps, 0};
}
inline void arrive(unsigned long long* barrier) {
    __syncwarp();
    if (threadIdx.x % 32) return;
    std::lock_guard guard(barrier_lock);
    Barrier& found = barriers.at(barrier);
    if (--found.missing == 0) {
        found.missing = found.size, ++found.phase;
        barrier_turn.notify_all();
    }
}
inline void wait(unsigned long long* barrier, int parity) {
    {
        std::unique_lock guard(barrier_lock);
        const Barrier& found = barriers.at(barrier);
        const bool is_over = barrier_turn.wait_for(guard, std::chrono::seconds(100), [&] {
            return (found.phase & 1) != unsigned(parity);
        });
        // a deadlock ends the process, as nothing else could
        if (!is_over) std::abort();
    }
    __syncwarp();
}

template <class Kernel>
void on_cpu(int grid_x, int grid_y, int threads, Kernel kernel) {
    gridDim = {unsigned(grid_x), unsigned(grid_y), 1};
    for (int y = 0; y < grid_y; ++y)
        for (int x = 0; x < grid_x; ++x) {
            // what a block before left there, no kernel may read
            for (float4& four : memory) four = {NAN, NAN, NAN, NAN};
            block_barrier = std::make_unique<std::barrier<>>(threads);
            warp_barriers.clear();
            for (int w = 0; w < threads / 32; ++w)
                warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
            std::vector<std::thread> all;
            for (int t = 0; t < threads; ++t)
                all.emplace_back([&, t] {
                    threadIdx = {unsigned(t), 0, 0}, blockIdx = {unsigned(x), unsigned(y), 0};
                    kernel();
                });
            for (std::thread& one : all) one.join();
        }
}
