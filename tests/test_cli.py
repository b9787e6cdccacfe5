"""The command line: what goes to stdout and stderr, and that options reach what they name."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import hybridzoo
from hybridzoo import HybridConfig, HybridLM, cli, list_models
from hybridzoo.checkpoint import load
from hybridzoo.describe import facts
from hybridzoo.inference import generate as generation
from hybridzoo.kernels import dispatch, loader, sources
from tests.families import tiny

ROOT = Path(cli.__file__).parents[1]
CONFIG = {
    "name": "small",
    "d_model": 16,
    "vocab_size": 320,
    "pattern": "MFAE",
    "layers": {
        "M": {"kind": "mamba1", "d_state": 4},
        "A": {"kind": "attention", "n_heads": 2},
        "F": {"kind": "mlp", "d_ff": 24},
        "E": {"kind": "moe", "d_ff": 8, "n_experts": 3, "top_k": 2},
    },
    "eos_token_id": 256,
}
COMMANDS = ["list", "info", "generate", "convert", "verify", "download", "publish", "train"]
COMMANDS += ["doctor"]


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dispatch, "_asked", {})


@pytest.fixture
def small():
    """A bf16 checkpoint in small/ whose eos no draw makes likely."""
    model = HybridLM(HybridConfig.from_dict(CONFIG), seed=5)
    model.save_pretrained("small", dtype=torch.bfloat16)
    return "small"


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a command line in this process; its exit code, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hybridzoo", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capfd.readouterr()

    return call


@pytest.fixture
def text_of(run):
    """What `generate` prints, after a check that it says nothing else."""

    def call(*arguments):
        code, out, err = run("generate", "--quiet", *arguments)
        assert (code, err) == (0, "")
        return out

    return call


def in_a_process(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "hybridzoo.cli", *arguments],
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        **options,
    )


# help


def test_help_names_every_command(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert re.findall(r"^│ (\w+)  ", out, re.MULTILINE) == COMMANDS
    assert run() == (0, out, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_says_what_it_does(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: hybridzoo {command}" in out


def test_version_is_the_package_s(run):
    assert run("--version") == (0, f"{hybridzoo.__version__}\n", "")


# list and info


def test_list_has_a_row_a_model(run):
    code, out, err = run("list")
    assert (code, err) == (0, "")
    for entry in list_models():
        (row,) = [line for line in out.splitlines() if f" {entry.name} " in line]
        assert entry.weights in row
        assert entry.licence in row


def test_list_as_json_is_what_the_library_lists(run):
    code, out, _ = run("list", "--json")
    assert code == 0
    assert json.loads(out) == [entry.to_dict() for entry in list_models()]


@pytest.mark.parametrize("source", ["shakespeare", "model.yaml", "small"])
def test_info_of_a_name_a_file_and_a_directory(run, small, source):
    Path("model.yaml").write_text(yaml.safe_dump(CONFIG))
    config = hybridzoo.zoo.find_config(source)
    code, out, err = run("info", source)
    assert (code, err) == (0, "")
    assert out.startswith(f"{config.name}  {config.pattern}\n")
    assert f"{config.n_params():,}" in out
    assert f"{config.n_active_params():,}" in out
    code, out, _ = run("info", source, "--json")
    # JSON has no other keys than text
    assert json.loads(out) == json.loads(json.dumps(facts(config)))


def test_info_draws_each_place(run):
    config = CONFIG | {"pattern": "9(MF) | [MA]E", "layers_at": {0: {"d_state": 5}}}
    Path("model.yaml").write_text(yaml.safe_dump(config))
    _, out, _ = run("info", "model.yaml")
    rows = ["   0  " + " ".join("MF" * 8), "  16  M F | [MA] E"]
    assert out.splitlines()[1:3] == rows


# generate


def test_stdout_is_the_prompt_and_its_continuation(text_of, small):
    prompt = "Ein Märchen: "
    ids = torch.tensor([list(prompt.encode())])
    model = load(small, dtype=torch.float32)
    new = model.generate(ids, max_new_tokens=12, seed=4, stop=256)[0, ids.shape[1] :].tolist()
    out = text_of(small, "--prompt", prompt, "--max-new-tokens", "12", "--seed", "4")
    assert out == prompt + bytes(i for i in new if i < 256).decode(errors="replace") + "\n"


def test_stderr_has_one_line_of_facts_unless_quiet(run, small):
    code, out, err = run("generate", small, "--max-new-tokens", "3", "--seed", "1")
    assert code == 0
    n = hybridzoo.zoo.find_config(small).n_params()
    assert err.count("\n") == 1
    assert err.startswith(f"small: {n / 1000:.2f} K parameters, cpu, float32; kernels: attention ")
    assert run("generate", small, "--max-new-tokens", "3", "--seed", "1", "--quiet") == (0, out, "")


def test_default_model_talks_the_same_for_a_seed_and_otherwise_for_another(text_of):
    texts = [
        text_of("--prompt", "ROMEO:", "--max-new-tokens", "24", "--seed", seed) for seed in "0120"
    ]
    assert len(set(texts)) == 3
    assert texts[0] == texts[3]
    assert all(text.startswith("ROMEO:") and len(text) > 20 for text in texts)


def test_temperature_zero_needs_no_seed(text_of, small):
    words = (small, "--temperature", "0", "--max-new-tokens", "8")
    assert text_of(*words) == text_of(*words)
    assert text_of(*words) == text_of(*words, "--seed", "7")


def test_text_ends_at_the_model_s_eos_though_generate_without_stop_goes_on(text_of, monkeypatch):
    config = HybridConfig.from_dict(CONFIG | {"eos_token_id": ord("\n")})
    HybridLM(config, seed=1).save_pretrained("ends")
    drawn = iter([*b"one\ntwo\n"] * 2)
    monkeypatch.setattr(generation, "sample", lambda *_, **__: torch.tensor([next(drawn)]))
    # the end of the text is printed as drawn, then the line ends
    assert text_of("ends", "--prompt", "> ", "--max-new-tokens", "8") == "> one\n\n"
    drawn = iter(b"one\ntwo\n")
    ids = load("ends").generate(torch.tensor([[62]]), max_new_tokens=8)
    assert bytes(ids[0].tolist()) == b">one\ntwo\n"


def test_sampling_options_reach_the_sampler(text_of, small, monkeypatch):
    seen = {}

    def sample(logits, *, generator, previous, **options):
        seen.update(options)
        return torch.tensor([65])

    monkeypatch.setattr(generation, "sample", sample)
    options = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1}
    options["repetition_penalty"] = 1.5
    words = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    assert text_of(small, *words, "--max-new-tokens", "2") == "\nAA\n"
    assert seen == options


@pytest.mark.parametrize(
    "words, dtype",
    [
        ([], "float32"),
        (["--dtype", "fp32"], "float32"),
        (["--dtype", "bf16"], "bfloat16"),
        (["--dtype", "stored", "--device", "cpu"], "bfloat16"),
    ],
)
def test_cpu_computes_in_fp32_unless_told_otherwise(run, small, words, dtype):
    code, _, err = run("generate", small, "--max-new-tokens", "1", "--device", "cpu", *words)
    assert code == 0
    assert f", cpu, {dtype}; " in err


def test_kernels_asked_for_are_those_named(run, small):
    words = ("generate", small, "--max-new-tokens", "2", "--seed", "3", "--device", "cpu")
    _, default, before = run(*words)
    code, out, err = run(*words, "--kernels", "attention=reference")
    assert (code, out) == (0, default)
    assert "attention sdpa" in before
    assert "attention reference" in err


def test_empty_prompt_starts_where_a_text_does(text_of, small):
    model = load(small, dtype=torch.float32)
    # the byte tokenizer's bos
    new = model.generate(torch.tensor([[257]]), max_new_tokens=6, seed=2)[0, 1:].tolist()
    expected = bytes(i for i in new if i < 256).decode(errors="replace") + "\n"
    assert text_of(small, "--prompt", "", "--max-new-tokens", "6", "--seed", "2") == expected


def test_raw_bytes_of_a_prompt_come_out_as_they_went_in(small):
    words = ["generate", small, "--prompt", b"\xff\xc3", "--max-new-tokens", "1", "--quiet"]
    done = in_a_process(*words)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"\xff\xc3")


# convert, train, doctor


def test_published_directory_goes_to_ours_and_back_byte_for_byte(run, tmp_path):
    source = tiny("jamba", "dense", tmp_path / "published").directory
    code, out, err = run("convert", str(source), "native")
    assert (code, out, err) == (0, "native: written in the native layout\n", "")
    assert run("convert", "native", "back", "--layout", "jamba")[0] == 0
    for name in ("model.safetensors", "config.json"):
        assert Path("back", name).read_bytes() == (source / name).read_bytes()
    assert run("generate", str(source), "--temperature", "0")[0] == 2  # no tokenizer beside it


def test_original_files_convert_when_their_pickle_may_be_read(run, tmp_path):
    tiny("state_spaces", "mamba", tmp_path)
    (tmp_path / "source").mkdir()
    for path in tmp_path.glob("*.*"):
        path.rename(tmp_path / "source" / path.name)
    code, _, err = run("convert", "source", "native")
    assert code == 2 and "--from-pickle" in err
    assert run("convert", "source", "native", "--from-pickle")[0] == 0
    assert run("convert", "native", "back", "--layout", "state_spaces")[0] == 0
    for path in Path("source").iterdir():
        assert (Path("back") / path.name).read_bytes() == path.read_bytes()
    assert run("convert", "native", "small", "--unpad-vocab")[0] == 0
    sizes = {
        name: json.loads(run("info", name, "--json")[1])["vocab_size"]
        for name in ("source", "native", "small")
    }
    assert sizes == {"source": 128, "native": 128, "small": 125}


def test_name_of_the_zoo_converts_too(run):
    assert run("convert", "shakespeare", "copy")[0] == 0
    copy, ours = load("copy").state_dict(), hybridzoo.load("shakespeare").state_dict()
    assert copy.keys() == ours.keys()
    assert all(torch.equal(copy[name], ours[name]) for name in ours)


def test_trained_model_generates_from_its_best(run, text_of):
    Path("model.yaml").write_text(yaml.safe_dump(CONFIG))
    Path("text.txt").write_text("All the world's a stage. " * 60)
    recipe = {
        "model": "model.yaml",
        "data": {"source": "text.txt", "seq_len": 24},
        "output": "elsewhere",
        "steps": 4,
        "batch_size": 2,
        "lr": 1e-3,
        "device": "cpu",
        "eval_every": 2,
        "save_every": 2,
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, out, err = run("train", "recipe.yaml", "--output", "run")
    assert (code, out) == (0, "")
    assert "small: " in err
    assert not Path("elsewhere").exists()
    assert len(text_of("run/best", "--prompt", "All", "--max-new-tokens", "5")) > 4
    # longer, from where it stopped
    recipe["steps"] = 6
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = run("train", "recipe.yaml", "--output", "run", "--resume")
    assert code == 0
    assert "resuming after step 4" in err
    assert Path("run/latest").read_text() == "step-00000006\n"


def test_doctor_has_a_row_a_backend_and_says_which_is_chosen(run):
    code, out, err = run("doctor", "--device", "cpu")
    assert (code, err) == (0, "")
    rows = dispatch.explain("cpu")
    assert {row.op for row in rows} == set(dispatch.list_ops())
    for row in rows:
        (line,) = [x for x in out.splitlines() if re.match(rf"│ {row.op} +│ {row.backend} ", x)]
        assert ("chosen" in line) == row.chosen
        assert row.reason is None or row.reason.split()[0] in line
    code, out, _ = run("doctor", "--device", "cpu", "--json")
    assert json.loads(out)["backends"] == [row._asdict() for row in rows]


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            (None, [], "13.0", "/c", 3),
            "compiled at first use by NVRTC 13.0, cached in /c (3 kernels)",
        ),
        ((None, ["sm_80", "sm_90"], "", "/c", 0), "packaged for sm_80, sm_90"),
        (
            (None, ["sm_90"], "13.0", "/c", 1),
            "packaged for sm_90, else compiled at first use by NVRTC 13.0, cached in /c (1 kernel)",
        ),
        (("there is no compiler", ["sm_90"], "", "/c", 1), "not used, there is no compiler"),
    ],
)
def test_doctor_says_where_cuda_sources_are_compiled(run, monkeypatch, found, sentence):
    monkeypatch.setattr(loader, "status", lambda device: loader.Status(*found))
    code, out, err = run("doctor", "--device", "cpu")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"CUDA sources: {sentence}"


def test_doctor_counts_what_is_cached(run, monkeypatch, tmp_path):
    # longer than the line that a pipe gets
    folder = tmp_path / ("long " * 40)
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(folder))
    for count in range(2):
        out = run("doctor", "--device", "cpu", "--json")[1]
        assert json.loads(out)["cuda_sources"] == {
            "reason": "it needs CUDA, the tensors are on cpu",
            "packaged": sources.packaged_archs(),
            "compiler": sources.find_compiler().version,
            "cache": f"{folder}/kernels",
            "n_cached": count,
        }
        sources._write_cached("one.cubin", b"code")
    monkeypatch.setattr(loader, "available", lambda device: None)
    line = run("doctor", "--device", "cpu")[1].splitlines()[-1]
    assert line.endswith(f"cached in {folder}/kernels (1 kernel)")


# as a process


def test_reader_that_goes_away_is_no_error(small):
    command = f"{sys.executable} -m hybridzoo.cli generate {small} --max-new-tokens 400 | head -c 5"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", f"{command} >/dev/null; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode in (0, 1)
    assert "Error" not in done.stderr
    assert done.stderr.startswith("small: ")
    assert done.stderr.count("\n") == 1


def test_debug_shows_the_traceback_and_nothing_else_does():
    done = in_a_process("--debug", "info", "none.yaml", text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("hybridzoo.errors.ConfigError: ")
    done = in_a_process("info", "none.yaml", text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("hybridzoo: ")
    assert done.stderr.count("\n") == 1
