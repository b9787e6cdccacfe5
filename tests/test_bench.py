"""scripts/bench and scripts/gpu_check.sh, kept alive on the CPU: tiny shapes, peers in plain torch.

The peers' modules are stood in for by functions of the same signatures, so that the layouts and
arguments that they are called with are checked before a GPU is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "scripts" / "bench"

SCAN = """
import torch
def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False):
    dt = torch.nn.functional.softplus(delta.float() + delta_bias[:, None])
    h, ys = torch.zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        h = torch.exp(dt[:, :, t, None] * A) * h
        h = h + (dt * u.float())[:, :, t, None] * B[:, None, :, t].float()
        ys.append((h * C[:, None, :, t].float()).sum(-1))
    y = torch.stack(ys, 2) + D[:, None] * u.float()
    y = (y * torch.nn.functional.silu(z.float())).to(u.dtype)
    return (y, h) if return_last_state else y
"""
STEP = """
import torch
def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    dt = torch.nn.functional.softplus(dt.float() + dt_bias)[..., None]
    state.copy_(torch.exp(dt * A) * state + dt * x.float()[..., None] * B.float()[:, None])
    y = (state * C.float()[:, None]).sum(-1) + D * x.float()
    return (y * torch.nn.functional.silu(z.float())).to(x.dtype)
"""
NORM = """
import torch
def layer_norm_fn(x, weight, bias, residual=None, eps=1e-6, prenorm=False, residual_in_fp32=False,
                  is_rms_norm=False):
    assert bias is None and prenorm and is_rms_norm
    h = x.float() + residual.float()
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.float()
    return y.to(x.dtype), h if residual_in_fp32 else h.to(x.dtype)
"""
CONV = """
import torch
def causal_conv1d_fn(x, weight, bias=None, activation=None):
    wide = torch.nn.functional.pad(x.float(), (3, 0))
    y = torch.nn.functional.conv1d(wide, weight.float()[:, None], bias.float(), groups=len(weight))
    return torch.nn.functional.silu(y).to(x.dtype)
def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None):
    seen = torch.cat([conv_state, x[..., None]], -1)
    conv_state.copy_(seen[..., 1:])
    y = (seen.float() * weight.float()).sum(-1) + bias.float()
    return torch.nn.functional.silu(y).to(x.dtype)
"""
PEERS = {
    "mamba_ssm/ops/selective_scan_interface.py": SCAN,
    "mamba_ssm/ops/triton/selective_state_update.py": STEP,
    "mamba_ssm/ops/triton/layer_norm.py": NORM,
    "causal_conv1d.py": CONV,
}
TINY = ["--device", "cpu", "--tiny", "--budget", "3"]


def run(name: str, out: Path, *options: str, path: Path | None = None) -> tuple[int, dict, str]:
    """(exit status, report, table) of one of the benches."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, (ROOT, path))))
    command = [sys.executable, BENCH / name, *TINY, "--out", out, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert out.exists(), done.stderr
    return done.returncode, json.loads(out.read_text()), done.stdout


@pytest.fixture
def peers(tmp_path):
    folder = tmp_path / "peers"
    for name, text in PEERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_kernels_are_checked_and_timed_beside_their_peers(tmp_path, peers):
    status, report, table = run("kernel.py", tmp_path / "kernel.json", path=peers)
    assert status == 0
    rows = report["rows"]
    assert {(row["op"], row["peer"]) for row in rows} == {
        ("scan", "mamba_ssm"),
        ("scan fwd+bwd", "mamba_ssm"),
        ("conv", "causal_conv1d (b,d,l)"),
        ("conv", "causal_conv1d channel-last"),
        ("conv fwd+bwd", "causal_conv1d (b,d,l)"),
        ("conv fwd+bwd", "causal_conv1d channel-last"),
        ("step", "mamba_ssm"),
        ("conv_step", "causal_conv1d"),
        ("norm", "torch"),
        ("norm", "mamba_ssm"),
        ("norm fwd+bwd", "torch"),
        ("norm fwd+bwd", "mamba_ssm"),
    }
    for row in rows:
        for side in ("error", "peer_error"):
            for name, error in row[side].items():
                # bf16 has 8 bits; what stays fp32 has 24
                is_half = name not in ("h", "state") or row["shape"].endswith(",16")
                # of a backward the reference in bf16 rounds on the way as well
                limit = (1e-2 if "bwd" in row["op"] else 5e-3) if is_half else 1e-5
                assert error["norm"] < limit, (row["op"], side, name)
        assert 0 < row["ours"]["low"] <= row["ours"]["ms"] <= row["ours"]["high"]
        assert row["ratio"] == pytest.approx(row["theirs"]["ms"] / row["ours"]["ms"])
        assert 0 < row["of_floor"]["copy"] < 1
        assert row["op"] in table
    assert {line["op"] for line in report["summary"]} == {row["op"] for row in rows}
    for line in report["summary"]:
        # the mean of one ratio is it but for rounding
        assert line["min"] <= line["geometric_mean"] * (1 + 1e-9)
        assert line["geometric_mean"] <= line["max"] * (1 + 1e-9)


def test_only_what_is_named_runs_and_missing_peers_are_said(tmp_path):
    options = ("conv", "norm", "--shape", "2,37,6", "--shape", "5,24,16")
    options += ("--kernels", "rms_norm=reference")
    status, report, table = run("kernel.py", tmp_path / "kernel.json", *options)
    assert status == 0
    assert {row["shape"] for row in report["rows"]} == {"2,37,6", "5,24,16"}
    assert {row["backend"] for row in report["rows"] if row["op"] == "norm"} == {"reference"}
    missing = [row for row in report["rows"] if "missing" in row]
    assert {row["peer"] for row in missing} == {
        "causal_conv1d (b,d,l)",
        "causal_conv1d channel-last",
        "mamba_ssm",
    }
    assert all(row["ours"]["ms"] > 0 for row in missing)
    assert "mamba_ssm: missing" in table
    assert {line["peer"] for line in report["summary"]} == {"torch"}


def test_a_peer_that_fails_leaves_ours_and_ours_that_fails_is_the_exit_status(tmp_path, peers):
    (peers / "mamba_ssm/ops/triton/layer_norm.py").write_text(
        "def layer_norm_fn(*args, **options):\n    raise RuntimeError('no such kernel')\n"
    )
    options = ("norm", "conv", "--kernels", "causal_conv1d=triton")
    status, report, _ = run("kernel.py", tmp_path / "k.json", *options, path=peers)
    assert status == 1
    rows = {(row["op"], row.get("peer")): row for row in report["rows"]}
    assert "no such kernel" in rows["norm", "mamba_ssm"]["missing"]
    assert rows["norm", "mamba_ssm"]["ours"]["ms"] > 0
    assert rows["norm", "torch"]["ratio"] > 0
    # not on a CPU
    assert "BackendError" in rows["conv", None]["failed"]


def test_a_model_is_checked_and_timed(tmp_path):
    options = ("--length", "32", "--batch", "2")
    status, report, table = run("decode.py", tmp_path / "decode.json", *options)
    assert status == 0
    assert report["check"]["is_right"]
    assert all(0 < e["ours"] < 0.05 for e in report["check"]["errors"].values())
    found = [(row["what"], row["batch"]) for row in report["rows"]]
    assert found == [("prefill", 1), ("prefill, states kept", 1), ("decode", 2)]
    assert all(row["ours_ms"] > 0 for row in report["rows"])
    assert "mamba_ssm" in report["peer"]
    assert "prefill, states kept" in table


def test_gpu_check_runs_the_parts_it_is_asked_for(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    environment |= {"KERNEL": f"norm {' '.join(TINY)}", "OMP_NUM_THREADS": "1"}
    command = ["bash", ROOT / "scripts" / "gpu_check.sh"]
    done = subprocess.run([*command, "kernel"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "kernel.json").read_text())["rows"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kernel.json", "kernel.log"]
    environment["KERNEL"] += " --kernels rms_norm=nothing"
    done = subprocess.run([*command, "kernel"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "failed: kernel" in done.stderr
    assert (
        subprocess.run([*command, "kernels"], env=environment, capture_output=True).returncode == 2
    )
