"""scripts/bench/train.py on the CPU: a tiny model beside mamba-ssm's in plain torch."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.peers import LAYER, write_peers
from tests.test_bench import ROOT, run

PASSES = ("ours", "mamba-ssm", "ours again", "ours, recompute: mixer", "ours, loss in pieces")
# seconds here, where the other benches' are milliseconds
BUDGET = ("--budget", "500")
# of d_model 32, 2 layers, vocabulary 64: embedding, norms; in_proj, conv, x_proj, dt_proj, A_log,
# D, out_proj
N_PARAMS = 64 * 32 + 3 * 32 + 2 * (128 * 32 + 64 * 5 + 34 * 64 + 64 * 3 + 64 * 16 + 64 + 32 * 64)


@pytest.fixture
def peers(tmp_path):
    return write_peers(tmp_path / "peers")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(report, table, folder) of all parts beside the peer, on a text of its own."""
    folder = tmp_path_factory.mktemp("whole")
    text = "".join(f"{i} bottles stand upon the wall, and {i % 7} fall. " for i in range(99))
    (folder / "text.txt").write_text(text)
    options = ("--curve", str(folder / "text.txt"), *BUDGET)
    peers = write_peers(folder / "peers")
    status, report, table = run("train.py", folder / "train.json", *options, path=peers)
    assert status == 0, table
    return report, table, folder


def rows_of(report: dict, part: str) -> dict[str, dict]:
    return {row["row"]: row for row in report["rows"] if row["part"] == part}


def test_a_model_trains_beside_its_peer(whole):
    report, table, _ = whole
    rows = rows_of(report, "model")
    assert tuple(rows) == ("check", *PASSES)
    assert rows["check"]["is_right"]
    assert all(0 < e["ours"] < 0.05 for e in rows["check"]["errors"].values())
    first = rows["ours"]["losses"]
    for name in PASSES:
        row = rows[name]
        assert row["n_params"] == N_PARAMS
        assert row["n_steps"] == 2
        # one warm, two timed; of these the first has the warm one's tokens, after an update
        assert row["losses"] == pytest.approx(first, abs=2e-3)
        assert len(row["losses"]) == 3
        assert row["losses"][1] < row["losses"][0] - 5e-4
        assert 0 < row["low"] <= row["ms"] <= row["high"]
        # the median of three phases' sums and the sum of their medians: two steps here, so equal
        assert all(ms > 0 for ms in row["phases_ms"].values())
        assert sum(row["phases_ms"].values()) == pytest.approx(row["ms"])
        assert row["ms"] <= row["whole_loop_ms"] * 1.001
        assert row["tokens_per_s"] == pytest.approx(2 * 16 / row["ms"] * 1e3)
        assert row["model_flops_per_s"] == pytest.approx(6 * N_PARAMS * row["tokens_per_s"])
    assert rows["ours"]["losses"] == rows["ours again"]["losses"]
    assert rows["ours"]["backends"]["selective_scan"] == ["reference"]
    assert rows["mamba-ssm"]["backends"] == {}
    assert "cross_entropy" in rows["ours, loss in pieces"]["backends"]
    summary = report["summary"]["model"]
    mine = (rows["ours"]["ms"] + rows["ours again"]["ms"]) / 2
    assert summary["ratio"] == pytest.approx(rows["mamba-ssm"]["ms"] / mine)
    assert summary["bars"] == {"ratio >= 1.4": summary["ratio"] >= 1.4}
    assert 0 < summary["difference"] < 0.03
    assert "MFU = 6 N" in table


def test_no_kernel_of_a_step_is_dropped(whole):
    report, table, _ = whole
    # which names can tell apart on a CPU: the peer here convolves by torch's op
    for name, named in (("ours", ("projections",)), ("mamba-ssm", ("projections", "conv"))):
        found = rows_of(report, "model")[name]["breakdown"]
        sums = {part: sum(ways.values()) for part, ways in found["parts"].items()}
        for part, ms in sums.items():
            listed = sum(k["ms"] for k in found["kernels"] if k["part"] == part)
            assert ms == pytest.approx(listed), part
        assert sum(sums.values()) == pytest.approx(found["total"])
        phases = {(k["phase"], k["part"]) for k in found["kernels"]}
        assert phases == {
            *((phase, part) for phase in ("forward", "backward") for part in (*named, "rest")),
            *((phase, "head + loss") for phase in ("head forward", "head backward")),
            ("optimizer", "optimizer"),
        }
        for way in ("forward", "backward"):
            assert found["parts"]["projections"][way] > 0
        products = [k for k in found["kernels"] if k["name"] == "aten::mm"]
        assert {k["part"] for k in products} >= {"projections"}
        rest = max((k for k in found["kernels"] if k["part"] == "rest"), key=lambda k: k["ms"])
        assert f"{rest['phase']}: {rest['name']}" in table


def test_a_layer_is_timed_beside_its_peer(whole):
    rows = rows_of(whole[0], "layer")
    assert list(rows) == ["2, 16", "1, 33"]
    for row in rows.values():
        assert set(row["difference"]) == {"y", "dx"}
        assert all(0 < d < 0.02 for d in row["difference"].values())
        passes = row["passes"]
        assert list(passes) == ["ours", "theirs", "ours again"]
        for part in ("forward", "whole"):
            mine = (passes["ours"][part]["ms"] + passes["ours again"][part]["ms"]) / 2
            assert row["ratio"][part] == pytest.approx(passes["theirs"][part]["ms"] / mine)
        times = row["ours_ms"]
        assert times["backward"] == pytest.approx(times["whole"] - times["forward"])
        # the device's memory is what is asked
        assert passes["ours"]["kept_bytes"] is None
        assert set(row["backends"]) == {"causal_conv1d", "selective_scan"}


def test_curves_of_the_chosen_kernels_and_of_plain_torch(whole):
    report, table, folder = whole
    rows = rows_of(report, "curve")
    assert list(rows) == ["chosen", "reference", "rows reversed", "fp32"]
    for row in rows.values():
        assert len(row["losses"]) == 6
        # from a uniform guess of 320 ids, down
        assert 5.6 < row["losses"][0] < 5.9
        assert row["losses"][-1] < row["losses"][0] - 0.02
        assert row["source"] == str(folder / "text.txt")
    found = report["summary"]["curve"]
    # on a CPU the references are what is chosen
    assert found["chosen"] == {"largest": 0, "mean": 0}
    for name in ("rows reversed", "fp32"):
        gaps = [
            abs(a - b)
            for a, b in zip(rows[name]["losses"], rows["reference"]["losses"], strict=True)
        ]
        assert found[name]["largest"] == max(gaps) > 0
        assert found[name]["mean"] == pytest.approx(sum(gaps) / 6)
    # the same function in another order, against other roundings everywhere
    assert found["rows reversed"]["mean"] < found["fp32"]["mean"] < 2e-3
    assert report["summary"]["plot"] == str(folder / "train.png")
    assert (folder / "train.png").read_bytes().startswith(b"\x89PNG")
    assert "rows reversed" in table


@pytest.mark.parametrize("part", ["model", "layer"])
def test_a_peer_that_computes_something_else_is_the_exit_status(part, tmp_path, peers):
    layer = peers / "mamba_ssm/modules/mamba_simple.py"
    layer.write_text(LAYER.replace(" + self.D * x", " - self.D * x"))
    options = ("--parts", part, *BUDGET)
    status, report, _ = run("train.py", tmp_path / "train.json", *options, path=peers)
    assert status == 1
    if part == "model":
        assert report["summary"]["model"]["difference"] > 0.1
    for row in rows_of(report, "layer").values():
        assert min(row["difference"].values()) > 0.1


def test_a_peer_that_fails_leaves_ours(tmp_path, peers):
    layer = peers / "mamba_ssm/modules/mamba_simple.py"
    layer.write_text(LAYER.replace("x, z = ", "raise RuntimeError('no such kernel'); x, z = "))
    options = ("--parts", "model,layer", *BUDGET)
    status, report, table = run("train.py", tmp_path / "train.json", *options, path=peers)
    assert status == 0
    rows = rows_of(report, "model")
    assert "no such kernel" in rows["mamba-ssm"]["failed"]
    assert rows["ours again"]["ms"] > 0
    assert "ratio" not in report["summary"]["model"]
    for row in rows_of(report, "layer").values():
        assert "no such kernel" in row["missing"]
        assert row["ours_ms"]["whole"] > 0
    assert "no such kernel" in table


def test_what_is_measured_is_on_disk_when_the_script_breaks(tmp_path, peers):
    layer = peers / "mamba_ssm/modules/mamba_simple.py"
    # no kernel fails so
    layer.write_text(LAYER.replace("x, z = ", "raise KeyError('a mistake'); x, z = "))
    options = ("--parts", "model", *BUDGET)
    status, report, _ = run("train.py", tmp_path / "train.json", *options, path=peers)
    assert status == 1
    rows = rows_of(report, "model")
    assert list(rows) == ["check", "ours"]
    assert rows["ours"]["ms"] > 0


def test_what_fails_of_ours_is_the_exit_status_and_the_rest_runs(tmp_path):
    # not on a CPU
    options = ("--parts", "layer,curve", "--kernels", "causal_conv1d=triton", *BUDGET)
    status, report, table = run("train.py", tmp_path / "train.json", *options)
    assert status == 1
    for part, name in (("layer", "2, 16"), ("curve", "chosen")):
        assert "BackendError" in rows_of(report, part)[name]["failed"]
    assert list(report["summary"]["curve"]) == ["rows reversed", "fp32"]
    assert "curve chosen: failed" in table


def test_no_row_begins_after_the_budget(tmp_path):
    status, report, table = run("train.py", tmp_path / "train.json", "--budget", "0")
    assert status == 0
    assert len(report["rows"]) == 12
    assert all("skipped" in row for row in report["rows"])
    assert "fp32: skipped: " in table


def test_gpu_check_trains(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    environment |= {"TRAIN": "--parts layer --device cpu --tiny", "OMP_NUM_THREADS": "1"}
    command = ["bash", ROOT / "scripts" / "gpu_check.sh", "train"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(rows_of(json.loads((tmp_path / "train.json").read_text()), "layer"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.json", "train.log"]
    environment["TRAIN"] = "--parts layers"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "layers is no part" in done.stdout


@pytest.mark.gpu
def test_on_a_gpu_memory_and_kernels_are_measured(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    options = ("--parts", "model,layer", "--device", "cuda", *BUDGET)
    status, report, table = run("train.py", tmp_path / "train.json", *options)
    assert status == 0, table
    rows = rows_of(report, "model")
    for name in (p for p in PASSES if p != "mamba-ssm"):
        row = rows[name]
        # parameters, gradients and two moments, 2 bytes each at least; nothing of another pass
        assert row["peak_gib"] * 2**30 > 8 * N_PARAMS
        assert row["held_before_gib"] < row["peak_gib"]
        assert sum(row["phases_ms"].values()) == pytest.approx(row["ms"], rel=0.05)
        assert row["losses"] == pytest.approx(rows["ours"]["losses"], abs=2e-3)
    parts = rows["ours"]["breakdown"]["parts"]
    for part in ("projections", "scan", "conv", "norms", "head + loss", "optimizer"):
        assert parts[part]["forward"] > 0, part
    for part in ("projections", "scan", "head + loss"):
        assert parts[part]["backward"] > 0, part
    for shape, row in rows_of(report, "layer").items():
        b, l = map(int, shape.split(","))
        # y, and at least what in_proj read and wrote
        least = b * l * (32 + 32 + 128) * 2
        for side in ("ours", "ours again"):
            assert least < row["passes"][side]["kept_bytes"] < 100 * least
