"""Bad inputs as users make them: one sentence that helps, exit code 2, nothing written.

Each case makes its files in the working directory and returns the command line.
"""

import json
import os
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from hybridzoo import HybridConfig, HybridLM, cli
from hybridzoo.kernels import dispatch

MODEL = {
    "name": "small",
    "d_model": 16,
    "vocab_size": 320,
    "pattern": "MFAF",
    "layers": {
        "M": {"kind": "mamba1", "d_state": 4},
        "A": {"kind": "attention", "n_heads": 2},
        "F": {"kind": "mlp", "d_ff": 24},
    },
}
RECIPE = {
    "model": "model.yaml",
    "data": {"source": "text.txt", "seq_len": 16},
    "output": "run",
    "steps": 2,
    "batch_size": 2,
    "lr": 1e-3,
    "device": "cpu",
    "eval_every": 0,
}
TEXT = "All the world's a stage. " * 40
WEIGHTS, INDEX = "dir/model.safetensors", "dir/model.safetensors.index.json"
CASES = {}


def case(message):
    """A function that makes a bad input, and the regular expression that stderr must match."""

    def add(make):
        CASES[make.__name__] = (make, message)
        return make

    return add


def info(**changes):
    Path("model.yaml").write_text(yaml.safe_dump(MODEL | changes, sort_keys=False))
    return ["info", "model.yaml"]


def info_text(text):
    Path("model.yaml").write_text(text)
    return ["info", "model.yaml"]


def saved(**changes):
    """A whole checkpoint in dir/, to be spoiled."""
    HybridLM(HybridConfig.from_dict(MODEL | changes)).save_pretrained("dir")
    return ["generate", "dir"]


def weights(data):
    saved()
    Path(WEIGHTS).write_bytes(data)
    return ["generate", "dir"]


def index(weight_map):
    saved()
    Path(WEIGHTS).unlink()
    Path(INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return ["generate", "dir"]


def option(*words):
    saved()
    return ["generate", "dir", *words]


def train(*words, text=TEXT, data=None, **changes):
    info()
    Path("text.txt").write_text(text)
    options = RECIPE | changes | {"data": RECIPE["data"] | (data or {})}
    Path("recipe.yaml").write_text(yaml.safe_dump(options))
    return ["train", "recipe.yaml", *words]


# the pattern


@case(r"model.yaml: pattern: unknown character '-' at column 2; .*\n  M-F\n   \^\n$")
def pattern_typo():
    return info(pattern="M-F")


@case(r"pattern: '\|' cuts pipeline stages and is allowed at top level only at column 4\n.*\n")
def cut_inside_a_group():
    return info(pattern="2(M|F)")


@case(r"pattern: .*column 1.*\n.*\n")
def empty_pattern():
    return info(pattern="")


@case(r"pattern: .*100,000 places.*\n.*\n")
def pattern_without_end():
    return info(pattern="9999999(9999999(M))")


@case(r"pattern: letter X has no entry in layers \(M, A, F\)\. Add 'layers\.X'")
def letter_without_entry():
    return info(pattern="MX")


@case(r"layers_at: no such place \(4\); the pattern has places 0\.\.3")
def layers_at_out_of_range():
    return info(layers_at={4: {"d_ff": 8}})


# the config


@case(r"model.yaml: d_modle is not a key of a model config; did you mean d_model\?")
def unknown_key():
    return info(d_modle=16)


@case(r"layers\.M\.headdim is not a key of mamba1; .*its keys: ")
def unknown_key_of_a_layer():
    return info(layers=MODEL["layers"] | {"M": {"kind": "mamba1", "headdim": 4}})


@case(r"layers\.M\.?\w*: .*\('mamba7'\).*mamba1")
def unknown_kind():
    return info(layers=MODEL["layers"] | {"M": {"kind": "mamba7"}})


@case(r"model.yaml: d_model: wrong type \('wide'\); expected a whole number")
def wrong_type():
    return info(d_model="wide")


@case(r"vocab_size is missing; a model config needs it")
def missing_key():
    return info_text(yaml.safe_dump({k: v for k, v in MODEL.items() if k != "vocab_size"}))


@case(r"model.yaml: d_model: too small \(0\); it must be at least 1")
def zero_width():
    return info(d_model=0)


@case(r"model.yaml: d_model: too large \(1099511627776\); it must be at most 2147483647")
def absurd_width():
    return info(d_model=2**40)


@case(r"model.yaml: config: [\d,]+ parameters; more than .* are a typing error")
def absurd_number_of_parameters():
    return info(d_model=2**31 - 2**10)


@case(r"layers\.A\.n_heads: \(3\) must divide d_model \(16\)\. Use a divisor")
def heads_that_do_not_divide():
    return info(layers=MODEL["layers"] | {"A": {"kind": "attention", "n_heads": 3}})


@case(r"model.yaml: not YAML at line 2 \(the key d_model is given twice\)")
def duplicate_key():
    return info_text("d_model: 16\nd_model: 32\n")


@case(r"model.yaml: not YAML at line 2 \(.*tab|model.yaml: not YAML at line 2 \(.*'\\t'")
def tab_in_yaml():
    return info_text("layers:\n\tM: {kind: mamba1}\n")


@case(r"model.yaml: a model config: expected keys of a model config \(\['M', 'A'\]\)")
def config_is_a_list():
    return info_text("[M, A]")


@case(r"model.yaml: .*\(None\).*mapping")
def config_is_empty():
    return info_text("")


@case(r"model.json: not JSON at line 1")
def json_cut_short():
    Path("model.json").write_text('{"d_model": 16,')
    return ["info", "model.json"]


@case(r"model.yaml: not UTF-8 text \(byte 2\)")
def config_is_binary():
    Path("model.yaml").write_bytes(b"ab\xff\xfe")
    return ["info", "model.yaml"]


@case(r"layers_at\.0\.d_state: wrong type \(\[\[.*\.\.\.\]\); expected a whole number")
def aliases_that_unfold_to_billions():
    lists = ["&a0 [x]", *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
    return info_text(f"{yaml.safe_dump(MODEL)}layers_at:\n  0: {{d_state: [{', '.join(lists)}]}}\n")


@case(r"text.txt: a model config: expected keys of a model config \(\"All the .{60,80}\"\);")
def text_instead_of_config():
    Path("text.txt").write_text(TEXT)
    return ["info", "text.txt"]


# names and paths


@case(r"runs/none: no such file or directory; .*Check the path")
def missing_path():
    return ["generate", "runs/none"]


@case(r"recipe.yaml: no such file; a config is a \.yaml or \.json file")
def missing_recipe():
    return ["train", "recipe.yaml"]


@case(r"folder: is a directory; a config is a \.yaml or \.json file")
def directory_instead_of_recipe():
    Path("folder").mkdir()
    return ["train", "folder"]


@case(r"model.yaml: is a file; a checkpoint is a directory\. .*HybridConfig\.load\('model.yaml'\)")
def file_instead_of_directory():
    info()
    return ["generate", "model.yaml"]


@case(r"'shakespear' is not a model of the zoo, .*did you mean shakespeare\?")
def unknown_name():
    return ["generate", "shakespear"]


@case(r"jamba-v0\.1: its weights do not ship with hybridzoo \(51,570,323,328 parameters")
def name_without_weights():
    return ["generate", "jamba-v0.1"]


@case(r"jamba-v0\.1: its weights do not ship")
def name_without_weights_to_convert():
    return ["convert", "jamba-v0.1", "out"]


# checkpoints


@case(r"dir/config\.json: missing; a checkpoint has this file")
def empty_directory():
    Path("dir").mkdir()
    return ["generate", "dir"]


@case(r"config\.json: missing; .*Name one inside: best, step-00000001 or")
def directory_of_a_run():
    for name in ("step-00000001", "best"):
        Path("dir", name).mkdir(parents=True)
        Path("dir", name, "config.json").write_text("{}")
    return ["generate", "dir"]


@case(r"dir/config\.json: unknown model_type \('bert'\); .*known: hybridzoo, jamba")
def unknown_family():
    saved()
    Path("dir/config.json").write_text('{"model_type": "bert"}')
    return ["generate", "dir"]


@case(r"dir: no weights; expected model\.safetensors or ")
def weights_missing():
    saved()
    Path(WEIGHTS).unlink()
    return ["generate", "dir"]


@case(r"dir: only pickled weights \(pytorch_model\.bin\); .*--from-pickle")
def only_pickled_weights():
    saved()
    Path(WEIGHTS).unlink()
    torch.save({}, "dir/pytorch_model.bin")
    return ["generate", "dir"]


@case(r"dir/model\.safetensors: .*0 bytes.*a safetensors file has a header")
def zero_bytes():
    return weights(b"")


@case(r"dir/model\.safetensors: .*truncated \(\d+ bytes\).*promises \d+")
def truncated():
    saved()
    return weights(Path(WEIGHTS).read_bytes()[:-5])


@case(r"dir/model\.safetensors: .*trailing bytes")
def trailing_bytes():
    saved()
    return weights(Path(WEIGHTS).read_bytes() + b"x")


@case(r"dir/model\.safetensors: .*a header of 9223372036854775808 bytes")
def header_without_end():
    return weights((2**63).to_bytes(8, "little") + b"{}")


@case(r"dir/model\.safetensors: .*a web page.*Download the file itself")
def web_page():
    return weights(b"<!DOCTYPE html><html><body>404: Not Found</body></html>")


@case(r"dir/model\.safetensors: .*git-lfs pointer.*git lfs pull")
def lfs_pointer():
    return weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@case(r"dir/model\.safetensors: a pickle; .*Name it pytorch_model\.bin, .*--from-pickle")
def renamed_pickle():
    return weights(pickle.dumps({"embed.weight": [1.0]}))


@case(r"dir/model\.safetensors: .*zip file \(a PyTorch pickle\).*--from-pickle")
def renamed_torch_file():
    torch.save({"embed.weight": torch.ones(2)}, "weights.pt")
    return weights(Path("weights.pt").read_bytes())


@case(r"dir/model-00001-of-00002\.safetensors: missing; .*Download it again")
def shard_absent():
    return index({"embed.weight": "model-00001-of-00002.safetensors"})


@case(r"index\.json: embed\.weight is in an illegal file \('\.\./model\.safetensors'\)")
def shard_outside():
    Path("model.safetensors").write_bytes(b"")
    return index({"embed.weight": "../model.safetensors"})


@case(r"dir/model\.safetensors: .*leads out of the directory \(.*secret")
def link_outside():
    saved()
    Path(WEIGHTS).rename("secret")
    Path(WEIGHTS).symlink_to("../secret")
    return ["generate", "dir"]


@case(r"blocks\.1\.layer\.\w+\.weight is \(.*\), the config wants \(")
def shapes_of_another_config():
    saved()
    text = Path("dir/config.json").read_text()
    Path("dir/config.json").write_text(text.replace('"d_ff": 24', '"d_ff": 32'))
    return ["generate", "dir"]


@case(r"tokenizer: dir/words\.json does not exist; a tokenizer is 'bytes' or")
def tokenizer_missing():
    return saved(tokenizer="words.json")


@case(r"tokenizer: dir/words\.json is not a tokenizers JSON \(")
def tokenizer_of_another_kind():
    saved(tokenizer="words.json")
    Path("dir/words.json").write_text("{}")
    return ["generate", "dir"]


# options of generate


def words(tokens):
    from tokenizers import Tokenizer, models

    saved(tokenizer="words.json", vocab_size=2)
    backend = models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0])
    Tokenizer(backend).save("dir/words.json")
    return ["generate", "dir"]


@case(r"--prompt: empty \(''\); .*no token that starts a text\. Write a word")
def empty_prompt_without_a_start():
    return [*words(["a", "b"]), "--prompt", ""]


@case(r"tokenizer: the text holds a raw byte or a lone surrogate \(U\+DCFF at character 1\)")
def raw_bytes_for_a_tokenizer_of_text():
    return [*words(["a", "b"]), "--prompt", "a\udcff"]


@case(r"input_ids holds 2; the model's ids are 0 to 1\. Use the model's own tokenizer")
def tokenizer_larger_than_the_vocabulary():
    return [*words(["a", "b", "c"]), "--prompt", "c"]


@case(r"temperature cannot be -1\.0; it is finite and >= 0; 0 is greedy")
def temperature_below_zero():
    return option("--temperature", "-1")


@case(r"temperature cannot be nan")
def temperature_not_a_number():
    return option("--temperature", "nan")


@case(r"top_p cannot be 2\.0; it is a mass, > 0 and <= 1")
def top_p_above_one():
    return option("--top-p", "2")


@case(r"top_k cannot be 0; it is a count >= 1")
def top_k_of_none():
    return option("--top-k", "0")


@case(r"max_new_tokens is 0; it counts tokens, >= 1")
def no_new_tokens():
    return option("--max-new-tokens", "0")


@case(r"seed is -1.*from 0 to 2\*\*63 - 1")
def seed_below_zero():
    return option("--seed", "-1")


@case(r"--max-new-tokens.*integer.*Try `hybridzoo generate --help`")
def word_for_a_number():
    return option("--max-new-tokens", "many")


@case(r"--dtype: unknown dtype \(fp8\); use auto, fp32, bf16 or stored")
def unknown_dtype():
    return option("--dtype", "fp8")


@case(r"--device: unknown device \(tpu\); use auto, cpu, cuda or cuda:N")
def unknown_device():
    return option("--device", "tpu")


@case(r"--device: no such GPU \(cuda:99\); torch sees \d+\. Use auto or cpu")
def absent_gpu():
    return option("--device", "cuda:99")


@case(r"attention: backend 'tritn' does not exist; there are: .*sdpa, reference")
def unknown_backend():
    return option("--kernels", "attention=tritn")


@case(r"kernels: op 'atention' does not exist; .*Did you mean 'attention'\?")
def unknown_op():
    return option("--kernels", "atention=sdpa")


@case(r"--kernels: 'sdpa' is not op=backend; write ssd=reference")
def backend_without_op():
    return option("--kernels", "sdpa")


@case(r"attention: backend 'flash_attn' was asked for but .*Drop the request; 'sdpa' supports it")
def backend_that_cannot_run():
    return option("--kernels", "attention=flash_attn", "--device", "cpu")


@case(r"No such option: --tokens.*Try `hybridzoo generate --help`")
def unknown_option():
    return option("--tokens", "3")


@case(r"No such command 'chat'.*Try `hybridzoo --help`")
def unknown_command():
    return ["chat"]


# convert


@case(r"layout: unknown \('lamba'\); did you mean jamba\? known: native, jamba\.")
def unknown_layout():
    saved()
    return ["convert", "dir", "out", "--layout", "lamba"]


@case(r"jamba: cannot express the pattern \(MAM\); .*Save in the native layout")
def stack_that_the_family_cannot_say():
    saved(pattern="MAM")
    return ["convert", "dir", "out", "--layout", "jamba"]


@case(r"out: exists and is not empty; .*Choose another")
def target_not_empty():
    saved()
    Path("out").mkdir()
    Path("out/precious").write_text("")
    return ["convert", "dir", "out"]


@case(r"file/out: cannot be written \(Not a directory\)")
def target_under_a_file():
    saved()
    Path("file").write_text("")
    return ["convert", "dir", "file/out"]


# train


@case(r"recipe.yaml: lerning_rate is not a key of a recipe; .*its keys: ")
def unknown_key_of_a_recipe():
    return train(lerning_rate=1e-3)


@case(r"recipe.yaml: data\.seqlen is not a key of a recipe's data; did you mean seq_len\?")
def unknown_key_of_data():
    return train(data={"seqlen": 8})


@case(r"recipe.yaml: accumulate: \(3\) must divide batch_size \(2\)")
def accumulation_that_does_not_divide():
    return train(accumulate=3)


@case(r"none\.yaml: no such file")
def model_of_a_recipe_missing():
    return train(model="none.yaml")


@case(r"data: none\.txt does not exist; data is a corpus of the zoo \(shakespeare\)")
def data_missing():
    return train(data={"source": "none.txt"})


@case(r"data: text\.txt is empty \(0 bytes\)")
def data_empty():
    return train(text="")


@case(r"data: text\.txt, split 'train', has 7 tokens; .*seq_len \+ 1 \(17\)\. Lower seq_len")
def data_shorter_than_a_window():
    return train(text="brief")


@case(r"output: run already holds checkpoints; .*--resume, or choose another")
def output_taken():
    cli_run(train())
    return ["train", "recipe.yaml"]


@case(r"lr: changed since run/step-00000002 was written; .*Restore the value")
def recipe_changed_since():
    cli_run(train())
    return train("--resume", lr=2e-3)


@case(r"model: model\.yaml is not the model that run/step-00000002 holds")
def model_changed_since():
    cli_run(train())
    command = train("--resume")
    info(pattern="MF")
    return command


@case(r"file/run: Not a directory\. Check the path")
def output_under_a_file():
    Path("file").write_text("")
    return train(output="file/run")


def cli_run(arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hybridzoo", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
    return exit.value.code or 0


def files():
    """Every file below the working directory with its content, every folder and link by name."""
    found = {}
    for root, folders, names in os.walk("."):
        found |= {os.path.join(root, name): None for name in folders}
        found |= {p: Path(p).read_bytes() for p in (os.path.join(root, n) for n in names)}
    return found


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # a --kernels that is refused late has been set for the process
    monkeypatch.setattr(dispatch, "_asked", {})


@pytest.mark.parametrize("name", CASES)
def test_mistake_is_one_sentence_and_leaves_no_trace(name, capsys):
    make, message = CASES[name]
    arguments = make()
    before = files()
    capsys.readouterr()
    assert cli_run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    check_sentence(err, message)
    assert files() == before


def check_sentence(err, message):
    assert re.search(message, err), err
    first, *caret = err.splitlines()
    assert first.startswith("hybridzoo: ")
    assert err.count("hybridzoo: ") == 1
    assert "Traceback" not in err
    # a mistake in a pattern shows the pattern, and a caret under the place
    assert len(caret) == (2 if ": pattern: " in first and " at column " in first else 0)
    if caret:
        assert set(caret[1]) <= {" ", "^"} and len(caret[1]) <= len(caret[0]) + 1
    else:
        # what, then a way out
        assert first.endswith((".", "?"))
        assert first.count(". ") + first.count("; ") >= 1, first
    assert len(first) < 700


MEASURED = ["absurd_width", "pattern_without_end", "header_without_end", "backend_that_cannot_run"]


@pytest.mark.parametrize("name", MEASURED)
def test_mistake_costs_a_process_little_time_and_memory(name):
    make, message = CASES[name]
    arguments = make()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    *sentence, peak_kib = done.stderr.splitlines()
    check_sentence("\n".join(sentence) + "\n", message)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    # torch alone is about 250 MiB
    assert int(peak_kib) < 2**20


MEASURE = """
import resource, sys
from hybridzoo.cli import main
try:
    main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""
