// The last step of hybridzoo.kernels.selective_scan's backward: what bwd.cu's blocks wrote in parts,
// added up in the order of parts and without loss, for all five gradients in one launch. A thread
// has four columns.
//
//   DTYPE    of dB and dC, see io.cuh; the others stay fp32
//   ALIGNED  1 where the columns of dB, dA and dD are a multiple of four
#include "common/io.cuh"
#include "common/math.cuh"

// Adds to a sum, and to `lost` what rounding lost of it (Knuth, TAOCP 2, 4.2.2).
__device__ __forceinline__ void add_to(float& sum, float& lost, float value) {
    const float next = sum + value, added = next - sum;
    lost += (sum - (next - added)) + (value - added);
    sum = next;
}

// Of four columns from `column` on, `columns` of which there are.
__device__ __forceinline__ void add_up(float (&sum)[4], const float* __restrict__ parts,
                                       i64 n_parts, i64 columns, i64 column) {
    float lost[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k] = lost[k] = 0.0f;
    // loads in flight together: each waits for memory
#pragma unroll 8
    for (i64 part = 0; part < n_parts; ++part) {
        const float* from = parts + part * columns + column;
        float value[4];
#if ALIGNED
        const float4 four = *reinterpret_cast<const float4*>(from);
        value[0] = four.x, value[1] = four.y, value[2] = four.z, value[3] = four.w;
#else
#pragma unroll
        for (int k = 0; k < 4; ++k) value[k] = column + k < columns ? from[k] : 0.0f;
#endif
#pragma unroll
        for (int k = 0; k < 4; ++k) add_to(sum[k], lost[k], value[k]);
    }
    // nothing is lost of what is infinite, and the difference to it is no number
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k] += fabsf(sum[k]) < infinity() ? lost[k] : 0.0f;
}

extern "C" __global__ void __launch_bounds__(128, 9) selective_scan_sums(
    element* __restrict__ dB, element* __restrict__ dC,  // (b, l, g, n)
    float* __restrict__ dA,                              // (i, n)
    float* __restrict__ dD, float* __restrict__ ddt_bias,  // (i)
    const float* __restrict__ dB_parts, const float* __restrict__ dC_parts,
    const float* __restrict__ dA_parts, const float* __restrict__ dD_parts,
    const float* __restrict__ ddt_bias_parts, i64 n_maps, i64 n_map_parts, i64 n_states,
    i64 n_channels, i64 n_sums) {
    const i64 maps = (n_maps + 3) / 4, states = (n_states + 3) / 4, channels = (n_channels + 3) / 4;
    i64 at = i64(blockIdx.x) * 128 + threadIdx.x;
    float sum[4];
    if (at < 2 * maps) {
        const bool is_C = at >= maps;
        const i64 column = (is_C ? at - maps : at) * 4;
        add_up(sum, is_C ? dC_parts : dB_parts, n_map_parts, n_maps, column);
        store_packed<4>((is_C ? dC : dB) + column, pack<4>(sum), int(min(n_maps - column, i64(4))));
        return;
    }
    at -= 2 * maps;
    const bool is_A = at < states, is_D = at < states + channels;
    if (at >= states + 2 * channels) return;
    const i64 column = (is_A ? at : is_D ? at - states : at - states - channels) * 4;
    const i64 columns = is_A ? n_states : n_channels;
    add_up(sum, is_A ? dA_parts : is_D ? dD_parts : ddt_bias_parts, n_sums, columns, column);
    float* to = (is_A ? dA : is_D ? dD : ddt_bias) + column;
#pragma unroll
    for (int k = 0; k < 4; ++k)
        if (column + k < columns) to[k] = sum[k];
}
