"""verify: a whole checkpoint passes every check, and each kind of damage fails the right one."""

import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridzoo.checkpoint import golden, load, save
from hybridzoo.checkpoint import verify as verifying
from hybridzoo.checkpoint.golden import read_golden, read_sums, seal, write_sums
from hybridzoo.checkpoint.verify import verify
from hybridzoo.errors import CheckpointError
from hybridzoo.kernels.attention import reference, sdpa
from hybridzoo.zoo import find_directory
from tests.families import FAMILIES
from tests.families.base import make
from tests.models import make_config, make_model

CHECKS = ["files", "tensors", "values", "checksums", "tokenizer", "golden"]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sealed checkpoint of every kind, in bf16, over bytes."""
    directory = tmp_path_factory.mktemp("whole")
    save(make_model(make_config(vocab_size=260)), directory, dtype=torch.bfloat16)
    seal(directory)
    return directory


@pytest.fixture
def sealed(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "sealed"))


@pytest.fixture
def sharded(tmp_path):
    save(make_model(make_config(vocab_size=260)), tmp_path / "sharded", max_shard_bytes=100_000)
    return tmp_path / "sharded"


def statuses(found):
    return {f.check: f.status for f in found}


def failed(directory, **options):
    """Check -> sentence of every failed finding, the first of a check."""
    found = [f for f in verify(directory, **options) if f.status == "failed"]
    return {f.check: f.detail for f in reversed(found)}


def edit_weights(directory, change):
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS, {"format": "pt"})


# whole checkpoints


def test_embedded_model_holds_in_every_check():
    found = verify(find_directory("shakespeare"))
    assert [(f.check, f.status) for f in found] == [(check, "ok") for check in CHECKS]


def test_whole_checkpoint_of_every_kind_holds_and_nothing_is_written(whole):
    before = {p: p.read_bytes() for p in whole.iterdir()}
    assert set(statuses(verify(whole)).values()) == {"ok"}
    assert {p: p.read_bytes() for p in whole.iterdir()} == before


def test_checkpoint_that_ships_nothing_to_compare_with_is_not_called_checked(sharded):
    found = statuses(verify(sharded))
    assert found == dict.fromkeys(CHECKS, "ok") | {"checksums": "not there", "golden": "not there"}


def test_published_directory_is_checked_as_it_is(tmp_path):
    directory = make(FAMILIES["jamba"].variants["sharded"], tmp_path).directory
    found = statuses(verify(directory))
    missing = dict.fromkeys(["checksums", "tokenizer", "golden"], "not there")
    assert found == dict.fromkeys(CHECKS, "ok") | missing
    seal(directory)
    assert statuses(verify(directory)) == dict.fromkeys(CHECKS, "ok") | {"tokenizer": "not there"}


def test_readers_of_published_directories_pass_over_the_two_files(tmp_path):
    variant = FAMILIES["jamba"].variants["sharded"]
    tiny = make(variant, tmp_path)
    seal(tiny.directory)
    with torch.no_grad():
        assert torch.equal(variant.reload(tiny.directory)(tiny.ids), tiny.logits)


# files and tensors


def test_total_size_that_lies_is_told(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for said in (index["metadata"]["total_size"] - 1, "many", 1e3, True):
        index["metadata"]["total_size"] = said
        path.write_text(json.dumps(index))
        assert (
            str(path) in failed(sharded)["files"] and "a total_size of" in failed(sharded)["files"]
        )
    del index["metadata"]["total_size"]
    path.write_text(json.dumps(index))
    assert not failed(sharded)


@pytest.mark.parametrize(
    "damage, status, sentence",
    [
        pytest.param(
            lambda d: os.truncate(d / WEIGHTS, 9_000),
            {"files": "failed", "tensors": "not run", "values": "not run", "checksums": "failed"},
            "truncated",
            id="cut",
        ),
        pytest.param(
            lambda d: (d / "config.json").unlink(),
            {"tensors": "failed", "checksums": "failed", "tokenizer": "not run"},
            "config.json: missing",
            id="no config",
        ),
        pytest.param(
            lambda d: edit_weights(d, lambda w: w.pop("norm.weight")),
            {"tensors": "failed", "checksums": "failed", "golden": "not run"},
            "norm.weight is missing",
            id="missing tensor",
        ),
        pytest.param(
            lambda d: edit_weights(d, lambda w: w.update(extra=torch.ones(2))),
            {"tensors": "failed", "checksums": "failed", "golden": "not run"},
            "extra is not in the config",
            id="unexpected tensor",
        ),
        pytest.param(
            lambda d: edit_weights(d, lambda w: w.update({"norm.weight": torch.ones(15)})),
            {"tensors": "failed", "checksums": "failed", "golden": "not run"},
            r"norm\.weight is \(15,\), the config wants \(16,\)",
            id="shape",
        ),
        pytest.param(
            lambda d: edit_weights(d, lambda w: w.update({"norm.weight": torch.ones(16).int()})),
            {"tensors": "failed", "checksums": "failed", "golden": "not run"},
            r"norm\.weight is I32",
            id="dtype",
        ),
        pytest.param(
            lambda d: (d / "config.json").write_text(
                (d / "config.json").read_text().replace('"bfloat16"', '"float16"')
            ),
            {"tensors": "failed", "checksums": "failed"},
            r"config\.json: a dtype of 'float16'; its weights are bfloat16, float32",
            id="dtype of the config",
        ),
    ],
)
def test_damage_fails_its_check_and_leaves_the_others_running(sealed, damage, status, sentence):
    damage(sealed)
    found = verify(sealed)
    assert statuses(found).items() >= status.items()
    assert [f.check for f in found if f.check not in ("values", "checksums")] == [
        c for c in CHECKS if c not in ("values", "checksums")
    ]
    first = next(f for f in found if f.status == "failed")
    with pytest.raises(CheckpointError, match=sentence):
        raise CheckpointError(first.detail)


# values


def test_nan_and_inf_are_counted_by_tensor(sharded, monkeypatch):
    # blocks smaller than a tensor, so that a count spans several
    monkeypatch.setattr(verifying, "_BLOCK", 64)
    shards = sorted(sharded.glob("model-*.safetensors"))
    first, last = load_file(shards[0]), load_file(shards[-1])
    one, two = min(first), max(last)
    first[one].view(-1)[-3:] = math.nan
    last[two].view(-1)[:2] = torch.tensor([-math.inf, math.nan], dtype=last[two].dtype)
    save_file(first, shards[0])
    save_file(last, shards[-1])
    details = [f.detail for f in verify(sharded) if f.check == "values"]
    n = [f"{t.numel():,} values" for t in (first[one], last[two])]
    assert details[0].startswith(f"{shards[0]}: {one} has 3 NaN and 0 Inf in {n[0]}; ")
    assert details[1].startswith(f"{shards[-1]}: {two} has 1 NaN and 1 Inf in {n[1]}; ")
    assert len(details) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_nan_of_every_float_dtype_is_seen(tmp_path, dtype):
    model = make_model(dtype=dtype)
    with torch.no_grad():
        model.blocks[1].layer.in_proj.weight[2, 3] = math.nan
    save(model, tmp_path)
    assert "blocks.1.layer.in_proj.weight has 1 NaN" in failed(tmp_path)["values"]


def test_of_many_tensors_with_nan_some_are_named_and_all_are_counted(sealed, monkeypatch):
    monkeypatch.setattr(verifying, "_MAX_NAMED", 3)
    edit_weights(sealed, lambda w: [t.view(-1)[:1].fill_(math.inf) for t in w.values()])
    details = [f.detail for f in verify(sealed) if f.check == "values"]
    assert len(details) == 4
    assert details[-1] == f"{len(load_file(sealed / WEIGHTS)) - 3} more tensors hold NaN or Inf."


def test_checking_values_and_sums_takes_little_memory(tmp_path):
    """A sparse file of 256 MiB, of which blocks of 8 MiB are in memory."""
    n = 2**26
    header = json.dumps({"x": {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]}}).encode()
    header += b" " * (-len(header) % 8)
    with open(tmp_path / WEIGHTS, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * n)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {WEIGHTS}\n")
    code = "import sys; from hybridzoo.checkpoint.verify import verify\n"
    code += "import resource; start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    code += "found = verify(sys.argv[1]); print([f.status for f in found])\n"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    said, kib = done.stdout.splitlines()
    assert eval(said) == ["ok", "failed", "ok", "failed", "not run", "not run"]
    # a few blocks and what torch first needs, not the file
    assert int(kib) < 100 * 2**10


# checksums


def test_sums_are_sha256sum_s(whole):
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=whole,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert set(read_sums(whole / "SHA256SUMS")) == {"config.json", WEIGHTS, "golden.safetensors"}


@pytest.mark.parametrize("flag", ["--text", "--binary"])
def test_sha256sum_s_are_read(sealed, flag):
    done = subprocess.run(
        ["sha256sum", flag, "config.json", WEIGHTS, "golden.safetensors"],
        cwd=sealed,
        capture_output=True,
        check=True,
    )
    ours = read_sums(sealed / "SHA256SUMS")
    (sealed / "SHA256SUMS").write_bytes(done.stdout.replace(b"\n", b"\r\n"))
    assert read_sums(sealed / "SHA256SUMS") == ours


def test_flipped_bit_is_told_though_the_model_still_loads(sealed):
    path = sealed / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    load(sealed)
    said = failed(sealed)
    assert said["checksums"].startswith(f"{path}: its SHA-256 is not that in SHA256SUMS; ")
    # and the file of the golden values is not touched
    assert "golden.safetensors" not in said["checksums"]


def test_missing_file_fails_and_an_unlisted_one_is_named(sealed):
    (sealed / "README.md").write_text("")
    (sealed / ".hidden").write_text("")
    (finding,) = [f for f in verify(sealed) if f.check == "checksums"]
    assert (finding.status, finding.detail) == ("ok", "3 files; not listed: README.md")
    write_sums(sealed)
    (sealed / "README.md").unlink()
    assert failed(sealed) == {
        "checksums": f"{sealed}/README.md: missing; SHA256SUMS lists it. Download it again."
    }


@pytest.mark.parametrize(
    "line, sentence",
    [
        (f"{'0' * 64}  ../secret", r"leads out of the directory \(.*secret\)"),
        (f"{'0' * 64}  /etc/passwd", r"leads out of the directory \(/etc/passwd\)"),
        (f"{'0' * 63}  config.json", r"line 1 is not a checksum and a name \('0000"),
        (f"{'0' * 64} config.json", r"line 1 is not a checksum and a name"),
        (f"\\{'0' * 64}  a\\nb", r"line 1 is not a checksum and a name"),
        (f"{'0' * 64}  a\n{'0' * 64}  a", r"line 2 is listed twice"),
        ("<html>", r"line 1 is not a checksum and a name \('<html>'\)"),
        ("\0" * 2**23, r"8388608 bytes; a list of checksums has at most"),
    ],
)
def test_sums_nobody_should_follow_are_refused(sealed, line, sentence):
    (sealed.parent / "secret").write_text("")
    (sealed / "SHA256SUMS").write_text(line)
    with pytest.raises(CheckpointError, match=sentence):
        raise CheckpointError(failed(sealed)["checksums"])


def test_pipe_in_the_list_is_not_waited_for(sealed):
    os.mkfifo(sealed / "pipe")
    (sealed / "SHA256SUMS").write_text(f"{'0' * 64}  pipe\n")
    assert "pipe: missing" in failed(sealed)["checksums"]


# tokenizer


def words(path, ids):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({f"w{i}": i for i in ids}, unk_token=f"w{ids[0]}")).save(str(path))


@pytest.mark.parametrize(
    "ids, status", [(range(23), "ok"), (range(24), "failed"), ([0, 1, 23], "failed")]
)
def test_every_id_of_the_tokenizer_needs_a_row(tmp_path, ids, status):
    """Also the highest of a vocabulary with holes."""
    save(make_model(make_config(tokenizer="words.json")), tmp_path)
    assert statuses(verify(tmp_path))["tokenizer"] == "not there"
    words(tmp_path / "words.json", ids)
    assert statuses(verify(tmp_path))["tokenizer"] == status


def test_bytes_need_259_rows(tmp_path):
    save(make_model(), tmp_path)
    assert failed(tmp_path) == {
        "tokenizer": "bytes: 259 ids; the embedding has 23 rows and every id needs one. Use the "
        "model's own tokenizer."
    }


# golden values


def test_golden_values_are_the_model_s_in_float64(whole):
    held = read_golden(whole / "golden.safetensors", 260)
    assert held.input_ids.shape == (2, 24) and held.logits.shape == (2, 24, 260)
    with torch.no_grad():
        exact = load(whole, dtype=torch.float64)(held.input_ids)
    # nothing but the rounding of the stored fp32: half a unit in the last place
    assert torch.equal(held.logits, exact.float())
    noise = (load(whole, dtype=torch.float32)(held.input_ids).double() - exact).abs().max()
    assert noise < held.tolerance < 100 * noise


def test_large_vocabulary_keeps_the_last_positions(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "_MAX_LOGITS", 2 * 23 * 5)
    save(make_model(), tmp_path)
    seal(tmp_path)
    held = read_golden(tmp_path / "golden.safetensors", 23)
    assert held.logits.shape == (2, 5, 23)
    model = load(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        # the tolerance is 20 times this model's own fp32 noise
        assert (model(held.input_ids)[:, -5:] - held.logits).abs().max() <= held.tolerance
    assert statuses(verify(tmp_path))["golden"] == "ok"


def test_backend_that_computes_wrongly_is_named(sealed, monkeypatch):
    right = sdpa.run
    monkeypatch.setattr(sdpa, "run", lambda *a, **k: right(*a, **k) * 1.01)
    said = failed(sealed)["golden"]
    assert "Wrong here: attention=sdpa; use another backend" in said
    assert "attention=reference" not in said


def test_backend_that_is_not_chosen_is_checked_too(sealed, monkeypatch):
    right = sdpa.run
    monkeypatch.setattr(sdpa, "run", lambda *a, **k: right(*a, **k) * 1.01)
    with verifying.references():
        assert "Wrong here: attention=sdpa; use" in failed(sealed)["golden"]


def test_backends_that_only_fail_together_are_told_so(sealed, monkeypatch):
    right = sdpa.run
    monkeypatch.setattr(sdpa, "run", lambda *a, **k: right(*a, **k) * 1.01)
    monkeypatch.setattr(verifying, "explain", lambda device: [])
    assert "agree one by one" in failed(sealed)["golden"]


def test_backend_that_cannot_take_the_model_is_passed_over(sealed, monkeypatch):
    monkeypatch.setattr(sdpa, "why_not", lambda *a, **k: "heads of another width")
    finding = verify(sealed)[-1]
    assert finding.status == "ok" and "attention=sdpa" not in finding.detail


def test_reference_that_differs_accuses_the_weights(sealed, monkeypatch):
    edit_weights(sealed, lambda w: w["blocks.1.layer.in_proj.weight"].mul_(1.05))
    assert "These are not the weights or the config" in failed(sealed)["golden"]
    right = reference.run
    monkeypatch.setattr(reference, "run", lambda *a, **k: right(*a, **k) * 1.01)
    assert "These are not the weights or the config" in failed(sealed)["golden"]


def test_logits_of_nan_are_no_agreement(sealed):
    edit_weights(sealed, lambda w: w["norm.weight"].fill_(math.nan))
    assert "references nan" in failed(sealed)["golden"]
    with pytest.raises(CheckpointError, match="not finite numbers"):
        seal(sealed)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda t: t.pop("logits"), "no golden values"),
        (lambda t: t.update(extra=torch.ones(1)), "no golden values"),
        (lambda t: t.update(input_ids=t["input_ids"].int()), "no golden values"),
        (lambda t: t.update(input_ids=t["input_ids"][0]), "no golden values"),
        (lambda t: t.update(input_ids=t["input_ids"][:, :0]), "no golden values"),
        (lambda t: t.update(input_ids=torch.zeros(2, 2**16).long()), "no golden values"),
        (lambda t: t.update(logits=t["logits"][:1]), "no golden values"),
        (lambda t: t.update(logits=t["logits"][:, :0]), "no golden values"),
        (lambda t: t.update(logits=t["logits"].repeat(1, 2, 1)), "no golden values"),
        (lambda t: t.update(logits=t["logits"][..., 1:].clone()), "no golden values"),
        (lambda t: t.update(logits=t["logits"].double()), "no golden values"),
        (lambda t: t["input_ids"].view(-1)[3:4].fill_(260), "input_ids outside"),
        (lambda t: t["input_ids"].view(-1)[3:4].fill_(-1), "input_ids outside"),
    ],
)
def test_golden_file_that_cannot_be_one_is_refused(sealed, change, sentence):
    path = sealed / "golden.safetensors"
    tensors = load_file(path)
    change(tensors)
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    save_file(tensors, path, {"tolerance": "1e-3"})
    with pytest.raises(CheckpointError, match=rf"golden\.safetensors: {sentence}"):
        raise CheckpointError(failed(sealed)["golden"])


@pytest.mark.parametrize("tolerance", [None, "much", "nan", "inf", "-1", "0"])
def test_tolerance_is_a_positive_number(sealed, tolerance):
    path = sealed / "golden.safetensors"
    save_file(load_file(path), path, None if tolerance is None else {"tolerance": tolerance})
    assert "no tolerance in its metadata" in failed(sealed)["golden"]


def test_seal_waits_for_no_other_save(sealed):
    before = {p: p.read_bytes() for p in sealed.iterdir()}
    holder = os.open(sealed, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another process is saving"):
        seal(sealed)
    os.close(holder)
    assert {p: p.read_bytes() for p in sealed.iterdir()} == before


def test_seal_is_of_a_save_that_was_cut_after_its_commit(sealed, monkeypatch):
    replace = os.replace

    def cut(start, end):
        if Path(end) == sealed / WEIGHTS:
            raise KeyboardInterrupt
        replace(start, end)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            save(make_model(make_config(vocab_size=260), seed=9), sealed)
    assert (sealed / ".saved" / WEIGHTS).is_file()
    seal(sealed)
    assert not (sealed / ".saved").exists()
    assert statuses(verify(sealed)) == dict.fromkeys(CHECKS, "ok")


def test_name_that_a_list_of_sums_cannot_hold_is_refused(sealed):
    (sealed / "a\nb").write_text("")
    with pytest.raises(CheckpointError, match=r"a file's name \('a\\nb'\)"):
        write_sums(sealed)


def test_progress_ends_at_the_whole(whole):
    seen = {}
    verify(whole, progress=lambda check, done, total: seen.update({check: (done, total)}))
    assert seen.keys() == {"values", "checksums"}
    assert all(done == total > 0 for done, total in seen.values())


def test_links_in_a_circle_and_names_of_a_page_lead_to_no_file(sealed):
    (sealed / "SHA256SUMS").write_text(f"{'0' * 64}  {'a' * 300}\n")
    (sealed / "config.json").unlink()
    (sealed / "config.json").symlink_to("config.json")
    said = failed(sealed)
    assert f"{sealed}: 'config.json' leads to no file" in said["tensors"]
    assert "leads to no file" in said["checksums"]
