"""A folder of CUDA sources that tests write for themselves, and a cache of their own."""

from hybridzoo.kernels import sources

AXPY = """
#include "near.cuh"
#include "common/outer.cuh"
// y += a x, through shared memory; begins with a static array
extern "C" __global__ void axpy(float* y, const float* x, const float* bias, long long n, float a) {
    __shared__ float head[64];
    extern __shared__ float tile[];
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    head[threadIdx.x % 64] = 0;
    tile[threadIdx.x * STRIDE] = i < n ? x[i] : 0;
    __syncthreads();
    if (i < n) y[i] += scaled(a) * tile[threadIdx.x * STRIDE] + (bias ? bias[i] : head[0]);
}
"""
FILES = {
    "axpy/fwd.cu": AXPY,
    "axpy/near.cuh": "#define NEAR 1.0f\n",
    "axpy/other.cuh": "#define OTHER 1\n",
    "common/outer.cuh": '#pragma once\n#include "inner.cuh"\n',
    "common/inner.cuh": "__device__ inline float scaled(float a) { return a * NEAR * SCALE; }\n",
}
SOURCE, DEFINES = "axpy/fwd.cu", {"STRIDE": 1, "SCALE": "1.0f"}


def make_root(folder, monkeypatch):
    """The sources above in folder/csrc instead of ours, an empty cache, and no warning given."""
    root = folder / "csrc"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(sources, "csrc", lambda: root)
    monkeypatch.setattr(sources, "_has_warned", False)
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(folder / "cache"))
    return root
