"""Bad inputs as users make them: one sentence that helps, exit code 2, nothing written.

Each case makes its files in the working directory and returns the command line. Its number is that
of the list of bad inputs that this battery began with, 0 where it came later. All messages as a
table: python -m pytest tests/test_bad_inputs.py -k table -s
"""

import fcntl
import json
import math
import os
import pickle
import re
import resource
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from resource import RLIMIT_AS, RLIMIT_FSIZE

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hybridzoo import HybridConfig, HybridLM, cli
from hybridzoo.checkpoint.golden import seal
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


def case(number, message):
    """A function that makes a bad input, and the regular expression that stderr must match."""

    def add(make):
        assert make.__name__ not in CASES
        CASES[make.__name__] = (number, make, message)
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


JAMBA = {
    "pattern": "MFAE",
    "tie_embeddings": False,
    "layers": {
        "M": {"kind": "mamba1", "d_state": 4, "x_norm": "learned"},
        "A": {"kind": "attention", "n_heads": 2, "n_kv_heads": 1},
        "F": {"kind": "mlp", "d_ff": 24},
        "E": {"kind": "moe", "d_ff": 24, "n_experts": 3, "top_k": 2},
    },
}
MAMBA = {"pattern": "3M", "layers": {"M": {"kind": "mamba1", "d_state": 4}}}
FALCON = {
    "pattern": "3M",
    "layers": {"M": {"kind": "mamba1", "d_state": 4, "x_norm": "weightless"}},
}
PUBLISHED = {"jamba": JAMBA, "mamba": MAMBA, "falcon_mamba": FALCON, "state_spaces": MAMBA}


def published(family, *, drop=(), **keys):
    """A family's whole directory in dir/, keys of its config.json changed."""
    config = HybridConfig.from_dict(MODEL | PUBLISHED[family])
    HybridLM(config).save_pretrained("dir", layout=family)
    path = Path("dir/config.json")
    found = json.loads(path.read_text())
    # a change of nothing would test nothing
    assert all(repr(found.get(key, keys)) != repr(value) for key, value in keys.items())
    found = {k: v for k, v in (found | keys).items() if k not in drop}
    path.write_text(json.dumps(found))
    return ["info", "dir"]


def edit_weights(change, path=WEIGHTS):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_header(change, path=WEIGHTS):
    raw = Path(path).read_bytes()
    n = int.from_bytes(raw[:8], "little")
    text = change(raw[8 : 8 + n])
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :])


def edit_entries(change, path=WEIGHTS):
    def edit(text):
        entries = json.loads(text)
        change(entries)
        return json.dumps(entries).encode()

    edit_header(edit, path)


def sharded(family=None):
    """A whole checkpoint in dir/ of several files, and their names."""
    if family is None:
        config, layout = HybridConfig.from_dict(MODEL), "native"
    else:
        config, layout = HybridConfig.from_dict(MODEL | PUBLISHED[family]), family
    HybridLM(config).save_pretrained("dir", layout=layout, max_shard_bytes=8_000)
    return sorted(map(str, Path("dir").glob("model-*.safetensors")))


def edit_index(change):
    found = json.loads(Path(INDEX).read_text())
    change(found)
    Path(INDEX).write_text(json.dumps(found))


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


@case(11, r"model.yaml: pattern: unknown character '-' at column 2; .*\n  M-F\n   \^\n$")
def pattern_typo():
    return info(pattern="M-F")


@case(11, r"pattern: '\|' cuts pipeline stages and is allowed at top level only at column 4; .*\n")
def cut_inside_a_group():
    return info(pattern="2(M|F)")


@case(13, r"pattern: .*column 1.*\n.*\n")
def empty_pattern():
    return info(pattern="")


@case(14, r"pattern: .*100,000 places.*\n.*\n")
def pattern_without_end():
    return info(pattern="9999999(9999999(M))")


@case(11, r"pattern: letter X has no entry in layers \(M, A, F\)\. Add 'layers\.X'")
def letter_without_entry():
    return info(pattern="MX")


@case(12, r"layers_at: no such place \(4\); the pattern has places 0\.\.3")
def layers_at_out_of_range():
    return info(layers_at={4: {"d_ff": 8}})


# the config


@case(5, r"model.yaml: d_modle is not a key of a model config; did you mean d_model\?")
def unknown_key():
    return info(d_modle=16)


@case(5, r"layers\.M\.headdim is not a key of mamba1; .*its keys: ")
def unknown_key_of_a_layer():
    return info(layers=MODEL["layers"] | {"M": {"kind": "mamba1", "headdim": 4}})


@case(4, r"layers\.M\.?\w*: .*\('mamba7'\).*mamba1")
def unknown_kind():
    return info(layers=MODEL["layers"] | {"M": {"kind": "mamba7"}})


@case(6, r"model.yaml: d_model: wrong type \('wide'\); expected a whole number")
def wrong_type():
    return info(d_model="wide")


@case(5, r"vocab_size is missing; a model config needs it")
def missing_key():
    return info_text(yaml.safe_dump({k: v for k, v in MODEL.items() if k != "vocab_size"}))


@case(7, r"model.yaml: d_model: too small \(0\); it must be at least 1")
def zero_width():
    return info(d_model=0)


@case(14, r"model.yaml: d_model: too large \(1099511627776\); it must be at most 2147483647")
def absurd_width():
    return info(d_model=2**40)


@case(14, r"model.yaml: config: [\d,]+ parameters; more than .* are a typing error")
def absurd_number_of_parameters():
    return info(d_model=2**31 - 2**10)


@case(8, r"layers\.A\.n_heads: \(3\) must divide d_model \(16\)\. Use a divisor")
def heads_that_do_not_divide():
    return info(layers=MODEL["layers"] | {"A": {"kind": "attention", "n_heads": 3}})


@case(2, r"model.yaml: not YAML at line 2 \(the key d_model is given twice\)")
def duplicate_key():
    return info_text("d_model: 16\nd_model: 32\n")


@case(2, r"model.yaml: not YAML at line 2 \(.*tab|model.yaml: not YAML at line 2 \(.*'\\t'")
def tab_in_yaml():
    return info_text("layers:\n\tM: {kind: mamba1}\n")


@case(3, r"model.yaml: a model config: expected keys of a model config \(\['M', 'A'\]\)")
def config_is_a_list():
    return info_text("[M, A]")


@case(3, r"model.yaml: .*\(None\).*mapping")
def config_is_empty():
    return info_text("")


@case(2, r"model.json: not JSON at line 1")
def json_cut_short():
    Path("model.json").write_text('{"d_model": 16,')
    return ["info", "model.json"]


@case(2, r"model.yaml: not UTF-8 text \(byte 2\)")
def config_is_binary():
    Path("model.yaml").write_bytes(b"ab\xff\xfe")
    return ["info", "model.yaml"]


@case(2, r"layers_at\.0\.d_state: wrong type \(\[\[.*\.\.\.\]\); expected a whole number")
def aliases_that_unfold_to_billions():
    lists = ["&a0 [x]", *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
    return info_text(f"{yaml.safe_dump(MODEL)}layers_at:\n  0: {{d_state: [{', '.join(lists)}]}}\n")


@case(3, r"text.txt: a model config: expected keys of a model config \(\"All the .{60,80}\"\);")
def text_instead_of_config():
    Path("text.txt").write_text(TEXT)
    return ["info", "text.txt"]


# names and paths


@case(1, r"runs/none: no such file or directory; .*Check the path")
def missing_path():
    return ["generate", "runs/none"]


@case(1, r"recipe.yaml: no such file; a config or a recipe is a \.yaml or \.json file")
def missing_recipe():
    return ["train", "recipe.yaml"]


@case(1, r"folder: is a directory; a config or a recipe is a \.yaml or \.json file")
def directory_instead_of_recipe():
    Path("folder").mkdir()
    return ["train", "folder"]


@case(
    1, r"model.yaml: is a file; a checkpoint is a directory\. .*HybridConfig\.load\('model.yaml'\)"
)
def file_instead_of_directory():
    info()
    return ["generate", "model.yaml"]


@case(1, r"'shakespear' is not a model of the zoo, .*did you mean shakespeare\?")
def unknown_name():
    return ["generate", "shakespear"]


@case(16, r"jamba-v0\.1: its weights do not ship with hybridzoo \(51,570,323,328 parameters")
def name_without_weights():
    return ["generate", "jamba-v0.1"]


@case(16, r"jamba-v0\.1: its weights do not ship")
def name_without_weights_to_convert():
    return ["convert", "jamba-v0.1", "out"]


# checkpoints


@case(1, r"dir/config\.json: missing; a checkpoint has this file")
def empty_directory():
    Path("dir").mkdir()
    return ["generate", "dir"]


@case(1, r"config\.json: missing; .*Name one inside \(best, step-00000001\), or")
def directory_of_a_run():
    for name in ("step-00000001", "best"):
        Path("dir", name).mkdir(parents=True)
        Path("dir", name, "config.json").write_text("{}")
    return ["generate", "dir"]


@case(4, r"dir/config\.json: unknown model_type \('bert'\); .*known: hybridzoo, .*jamba")
def unknown_family():
    saved()
    Path("dir/config.json").write_text('{"model_type": "bert"}')
    return ["generate", "dir"]


@case(16, r"dir: no weights; expected model\.safetensors or ")
def weights_missing():
    saved()
    Path(WEIGHTS).unlink()
    return ["generate", "dir"]


@case(25, r"dir: only pickled weights \(pytorch_model\.bin\); .*--from-pickle")
def only_pickled_weights():
    saved()
    Path(WEIGHTS).unlink()
    torch.save({}, "dir/pytorch_model.bin")
    return ["generate", "dir"]


@case(17, r"dir/model\.safetensors: .*0 bytes.*a safetensors file has a header")
def zero_bytes():
    return weights(b"")


@case(19, r"dir/model\.safetensors: .*truncated \(\d+ bytes\).*promises \d+")
def truncated():
    saved()
    return weights(Path(WEIGHTS).read_bytes()[:-5])


@case(20, r"dir/model\.safetensors: .*trailing bytes")
def trailing_bytes():
    saved()
    return weights(Path(WEIGHTS).read_bytes() + b"x")


@case(18, r"dir/model\.safetensors: .*a header of 9223372036854775808 bytes")
def header_without_end():
    return weights((2**63).to_bytes(8, "little") + b"{}")


@case(23, r"dir/model\.safetensors: .*a web page.*Download the file itself")
def web_page():
    return weights(b"<!DOCTYPE html><html><body>404: Not Found</body></html>")


@case(22, r"dir/model\.safetensors: .*git-lfs pointer.*git lfs pull")
def lfs_pointer():
    return weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@case(24, r"dir/model\.safetensors: a pickle; .*Name it pytorch_model\.bin, .*--from-pickle")
def renamed_pickle():
    return weights(pickle.dumps({"embed.weight": [1.0]}))


@case(24, r"dir/model\.safetensors: .*zip file \(a PyTorch pickle\).*--from-pickle")
def renamed_torch_file():
    torch.save({"embed.weight": torch.ones(2)}, "weights.pt")
    return weights(Path("weights.pt").read_bytes())


@case(26, r"dir/model-00001-of-00002\.safetensors: missing; .*Download it again")
def shard_absent():
    return index({"embed.weight": "model-00001-of-00002.safetensors"})


@case(27, r"index\.json: embed\.weight is in an illegal file \('\.\./model\.safetensors'\)")
def shard_outside():
    Path("model.safetensors").write_bytes(b"")
    return index({"embed.weight": "../model.safetensors"})


@case(27, r"dir/model\.safetensors: .*leads out of the directory \(.*secret")
def link_outside():
    saved()
    Path(WEIGHTS).rename("secret")
    Path(WEIGHTS).symlink_to("../secret")
    return ["generate", "dir"]


@case(31, r"blocks\.1\.layer\.\w+\.weight is \(.*\), the config wants \(")
def shapes_of_another_config():
    saved()
    text = Path("dir/config.json").read_text()
    Path("dir/config.json").write_text(text.replace('"d_ff": 24', '"d_ff": 32'))
    return ["generate", "dir"]


@case(35, r"dir/words\.json: missing; the model reads text through this file\. Copy it there")
def tokenizer_missing():
    return saved(tokenizer="words.json")


@case(35, r"tokenizer: dir/words\.json is not a tokenizers JSON \(")
def tokenizer_of_another_kind():
    saved(tokenizer="words.json")
    Path("dir/words.json").write_text("{}")
    return ["generate", "dir"]


# published families: config.json


@case(1, r"dir/config\.json: missing; a checkpoint has this file")
def published_config_missing():
    published("mamba")
    Path("dir/config.json").unlink()
    return ["convert", "dir", "out"]


@case(2, r"dir/config\.json: not JSON \(Expecting .*line 1.*\); .*Download it again")
def published_config_cut_short():
    published("jamba")
    Path("dir/config.json").write_text('{"model_type": "jamba", ')
    return ["info", "dir"]


@case(2, r"dir/config\.json: not JSON \(.{1,200}\); expected an object")
def published_config_of_endless_brackets():
    published("jamba")
    Path("dir/config.json").write_text("[" * 10**6)
    return ["generate", "dir"]


@case(2, r"dir/config\.json: 1000000000000 bytes; no such file exceeds")
def published_config_of_a_terabyte():
    published("mamba")
    os.truncate("dir/config.json", 10**12)
    return ["verify", "dir"]


@case(3, r"dir/config\.json: a list, not an object")
def published_config_a_list():
    published("jamba")
    Path("dir/config.json").write_text("[1]")
    return ["convert", "dir", "out"]


@case(4, r"dir/config\.json: unknown model_type \('mamba3'\); did you mean mamba")
def published_type_of_tomorrow():
    return published("mamba", model_type="mamba3")


@case(4, r"dir/config\.json: unknown model_type \(\['mamba'\]\); .*known: ")
def published_type_a_list():
    return published("mamba", model_type=["mamba"])


@case(5, r"dir/config\.json: state_sise is not a key of mamba \(16\); did you mean state_size\?")
def published_unknown_key():
    return published("mamba", state_sise=16)


@case(5, r"dir/config\.json: quantization_config is set .*; .* Use an unquantised checkp")
def published_quantized():
    return published("mamba", quantization_config={"quant_method": "gptq", "bits": 4})


@case(5, r"dir/config\.json: quantization_config is set .*; .* Use an unquantised checkp")
def published_quantized_jamba():
    published("jamba", quantization_config={"quant_method": "fp8"})
    return ["convert", "dir", "out"]


@case(6, r"dir/config\.json: hidden_size: wrong type \('16'\); expected a whole number")
def published_width_as_text():
    return published("jamba", hidden_size="16")


@case(6, r"dir/config\.json: use_bias: wrong type \(0\); expected true or false")
def published_number_for_a_switch():
    return published("mamba", use_bias=0)


@case(7, r"dir/config\.json: state_size: too small \(-4\); it must be at least")
def published_negative_width():
    return published("mamba", state_size=-4)


@case(7, r"dir/config\.json: hidden_size: too small \(0\); it must be at least 1")
def published_zero_width():
    return published("mamba", hidden_size=0)


@case(7, r"dir/config\.json: vocab_size: too small \(0\); it must be at least 1")
def published_vocabulary_of_none():
    return published("jamba", vocab_size=0)


@case(7, r"dir/config\.json: d_model: too small \(0\); it must be at least 1")
def original_zero_width():
    return published("state_spaces", d_model=0)


@case(8, r"dir/config\.json: layers\.A\.n_heads: \(3\) must divide d_model \(16\)")
def published_heads_that_do_not_divide():
    return published("jamba", num_attention_heads=3)


@case(9, r"layers\.A\.n_kv_heads: \(3\) must divide n_heads \(4\)")
def kv_heads_that_do_not_divide():
    return info(
        layers=MODEL["layers"] | {"A": {"kind": "attention", "n_heads": 4, "n_kv_heads": 3}}
    )


@case(9, r"dir/config\.json: layers\.A\.n_kv_heads: \(3\) must divide n_heads \(2\)")
def published_kv_heads_that_do_not_divide():
    return published("jamba", num_key_value_heads=3)


@case(10, r"layers\.M\.n_groups: \(3\) must divide n_heads \(4\)")
def groups_that_do_not_divide():
    mamba2 = {"kind": "mamba2", "head_dim": 8, "n_groups": 3}
    return info(layers=MODEL["layers"] | {"M": mamba2})


@case(12, r"dir/config\.json: layers_block_type \(\[.*\]\) disagrees with attn_layer_period")
def published_layer_list_that_disagrees():
    return published("jamba", layers_block_type=["attention"] * 2)


@case(13, r"dir/config\.json: num_hidden_layers: too small \(0\); it must be at least 1")
def published_no_layers():
    return published("jamba", num_hidden_layers=0)


@case(13, r"dir/config\.json: .*n_layer.*\(0\)")
def original_no_layers():
    return published("state_spaces", n_layer=0)


@case(14, r"dir/config\.json: .*too large \(1099511627776\)")
def published_absurd_width():
    published("mamba", hidden_size=2**40)
    return ["generate", "dir"]


@case(14, r"dir/config\.json: num_hidden_layers: too large \(1000000000\)")
def published_absurd_depth():
    published("mamba", num_hidden_layers=10**9)
    return ["generate", "dir"]


@case(14, r"dir/config\.json: .*n_layer.*too large \(1000000000\)")
def original_absurd_depth():
    published("state_spaces", n_layer=10**9)
    return ["info", "dir"]


@case(14, r"dir/config\.json: num_experts: too large \(1000000000\)")
def published_absurd_number_of_experts():
    published("jamba", num_experts=10**9)
    return ["verify", "dir"]


@case(14, r"dir/config\.json: config: [\d,]+ parameters; more than .* are a typing error")
def published_absurd_number_of_parameters():
    published("mamba", vocab_size=2**31 - 1, hidden_size=2**20, intermediate_size=2**21)
    return ["generate", "dir"]


@case(15, r"layers\.E\.top_k: \(5\) exceeds the experts that a token may pick from \(3\)")
def more_experts_picked_than_there_are():
    return info(
        pattern="ME",
        layers=MODEL["layers"] | {"E": {"kind": "moe", "d_ff": 8, "n_experts": 3, "top_k": 5}},
    )


@case(
    15,
    r"dir/config\.json: layers\.E\.top_k: \(5\) exceeds the experts .* \(3\)",
)
def published_more_experts_picked_than_there_are():
    return published("jamba", num_experts_per_tok=5)


@case(4, r"dir/config\.json: .*model_type.* mamba.*Set model_type to falcon_mamba")
def falcon_that_says_mamba():
    published("falcon_mamba", model_type="mamba")
    return ["convert", "dir", "out"]


@case(4, r"dir/config\.json: .*(unknown model_type \(None\)|model_type)")
def type_missing():
    return published("mamba", drop=["model_type"])


# published families: weights


@case(16, r"dir: no weights; expected model\.safetensors or ")
def published_weights_missing():
    published("jamba")
    Path(WEIGHTS).unlink()
    return ["verify", "dir"]


@case(17, r"dir/model\.safetensors: 0 bytes")
def published_zero_bytes():
    published("mamba")
    Path(WEIGHTS).write_bytes(b"")
    return ["convert", "dir", "out"]


@case(19, r"dir/model\.safetensors: truncated \(\d+ bytes\).*promises \d+.*Download it again")
def published_truncated():
    published("jamba")
    os.truncate(WEIGHTS, Path(WEIGHTS).stat().st_size - 5)
    return ["verify", "dir"]


@case(20, r"dir/model-00001-of-\d+\.safetensors: trailing bytes")
def published_trailing_bytes():
    first = sharded("mamba")[0]
    with open(first, "ab") as file:
        file.write(b"x")
    return ["convert", "dir", "out"]


def _overlap(entries):
    last = max(
        (n for n in entries if n != "__metadata__"), key=lambda n: entries[n]["data_offsets"]
    )
    start, stop = entries[last]["data_offsets"]
    entries[last]["data_offsets"] = [start - 4, stop - 4]


@case(21, r"dir/model\.safetensors: .* overlaps the tensor before it \(byte \d+\)")
def tensors_that_overlap():
    saved()
    edit_entries(_overlap)
    return ["generate", "dir"]


@case(21, r"dir/model\.safetensors: .* follows a hole \(byte \d+\)")
def tensors_with_a_hole():
    published("mamba")
    edit_entries(lambda entries: entries.pop("backbone.embeddings.weight"))
    return ["verify", "dir"]


@case(14, r"dir/model\.safetensors: .*shape \[1099511627776, 1099511627776\]; a tensor has < 2")
def tensor_of_absurd_shape():
    saved()
    edit_entries(lambda entries: entries["embed.weight"].update(shape=[2**40, 2**40]))
    return ["generate", "dir"]


@case(25, r"dir/pytorch_model\.bin: .*builtins exec|pytorch_model\.bin: not .*exec")
def pickle_that_runs_code():
    """--from-pickle reads tensors and runs nothing: no file `owned` appears."""

    class Attack:
        def __reduce__(self):
            return exec, ("open('owned', 'w')",)

    saved()
    Path(WEIGHTS).unlink()
    torch.save({"embed.weight": Attack()}, "dir/pytorch_model.bin")
    return ["convert", "dir", "out", "--from-pickle"]


@case(25, r"dir/pytorch_model\.bin: .*(posix|os) system|pytorch_model\.bin: not .*system")
def old_pickle_that_runs_code():
    class Attack:
        def __reduce__(self):
            return os.system, ("touch owned",)

    published("mamba")
    Path(WEIGHTS).unlink()
    Path("dir/pytorch_model.bin").write_bytes(pickle.dumps({"a": Attack()}, 2))
    return ["convert", "dir", "out", "--from-pickle"]


@case(25, r"dir/pytorch_model\.bin: ")
def pickle_that_unfolds_to_terabytes():
    """A zip whose entry of a megabyte inflates a thousandfold, at an offset of its own."""
    saved()
    Path(WEIGHTS).unlink()
    torch.save({"embed.weight": torch.ones(2)}, "dir/pytorch_model.bin")
    with zipfile.ZipFile("dir/pytorch_model.bin") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile("dir/pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, bytes(2**27) if name.endswith("data.pkl") else content)
    return ["convert", "dir", "out", "--from-pickle"]


def bin_with(content):
    Path("dir").mkdir()
    Path("dir/config.json").write_text(json.dumps({"d_model": 16, "n_layer": 1}))
    Path("dir/pytorch_model.bin").write_bytes(content)
    return ["convert", "dir", "target", "--from-pickle"]


@case(22, r"dir/pytorch_model\.bin: a git-lfs pointer; expected PyTorch's format\. Run `git lfs")
def bin_is_an_lfs_pointer():
    return bin_with(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")


@case(22, r"dir/config\.json: a git-lfs pointer; expected JSON\. Run `git lfs pull`")
def config_is_an_lfs_pointer():
    saved()
    Path("dir/config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    return ["info", "dir"]


@case(19, r"dir/pytorch_model\.bin: a broken zip archive .* Download it again")
def bin_is_truncated():
    torch.save({"a": torch.ones(1000)}, "whole.bin")
    return bin_with(Path("whole.bin").read_bytes()[:2000])


@case(25, r"dir/pytorch_model\.bin: a pickle of protocol 4 or more, .* torch\.save's own protocol")
def bin_of_another_protocol():
    torch.save({"a": torch.ones(3)}, "other.bin", pickle_protocol=4)
    return bin_with(Path("other.bin").read_bytes())


@case(
    26, r"dir: pytorch_model-00002-of-00002\.bin is missing; pytorch_model\.bin\.index\.json lists"
)
def bin_shard_is_absent():
    arguments = bin_with(b"")
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    Path("dir/pytorch_model.bin").rename(f"dir/{names[0]}")
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    Path("dir/pytorch_model.bin.index.json").write_text(json.dumps(index))
    return arguments


@case(
    26, r"dir: model\.safetensors\.index\.json is missing beside model-00001-of-0000\d\.safetensors"
)
def index_is_absent():
    arguments = saved()
    Path(WEIGHTS).rename("dir/model-00001-of-00002.safetensors")
    return arguments


@case(33, r"small: its logits for this prompt are NaN; .*`hybridzoo verify`")
def generates_from_nan():
    arguments = saved()
    edit_weights(lambda tensors: tensors["norm.weight"].fill_(math.nan))
    return arguments


@case(0, r"layout: unknown \('Jamba'\); did you mean jamba\?")
def layout_in_capitals():
    saved()
    return ["convert", "dir", "target", "--layout", "Jamba"]


@case(25, r"dir: no pickled weights; expected files ending in \.bin, \.pt, \.pth")
def no_pickle_to_convert():
    saved()
    return ["convert", "dir", "out", "--from-pickle"]


@case(26, r"dir/model-00002-of-\d+\.safetensors: missing; .*Download it again")
def published_shard_absent():
    Path(sharded("jamba")[1]).unlink()
    return ["verify", "dir"]


@case(27, r"index\.json: \S+ is in an illegal file \('/etc/model\.safetensors'\)")
def published_shard_of_an_absolute_path():
    sharded("mamba")
    edit_index(
        lambda i: i["weight_map"].update({"backbone.norm_f.weight": "/etc/model.safetensors"})
    )
    return ["convert", "dir", "out"]


@case(27, r"dir/model-00001-of-\d+\.safetensors: leads out of the directory \(.*secret")
def published_shard_linked_outside():
    first = Path(sharded("jamba")[0])
    first.rename("secret")
    first.symlink_to("../secret")
    return ["verify", "dir"]


@case(27, r"dir/config\.json: leads out of the directory \(/etc/passwd\)")
def config_linked_outside():
    published("mamba")
    Path("dir/config.json").unlink()
    Path("dir/config.json").symlink_to("/etc/passwd")
    return ["info", "dir"]


@case(28, r"dir/model-00002-of-\d+\.safetensors: \S+ is also in model-00001-of-\d+\.safetensors")
def tensor_in_two_shards():
    first, second, *_ = sharded("mamba")
    edit_weights(lambda tensors: tensors.update(load_file(first)), second)
    return ["verify", "dir"]


@case(28, r"dir/model\.safetensors: 'embed\.weight' is there twice; names are unique")
def tensor_twice_in_a_header():
    saved()
    edit_header(lambda text: text.rstrip()[:-1] + b"," + text[text.index(b'"embed') :].rstrip())
    return ["generate", "dir"]


@case(28, r"config\.json: .*(d_model|not JSON).*twice")
def key_twice_in_a_published_config():
    published("mamba")
    path = Path("dir/config.json")
    path.write_text(path.read_text()[:-1] + ', "hidden_size": 32}')
    return ["info", "dir"]


@case(29, r"dir: backbone\.layers\.1\.mixer\.D is missing; .*Is this config\.json these weights'\?")
def published_tensor_missing():
    published("mamba")
    edit_weights(lambda tensors: tensors.pop("backbone.layers.1.mixer.D"))
    return ["generate", "dir"]


@case(29, r"dir: blocks\.0\.layer\.A_log is missing; .*Is this config\.json these weights'\?")
def tensor_missing():
    saved()
    edit_weights(lambda tensors: tensors.pop("blocks.0.layer.A_log"))
    return ["verify", "dir"]


@case(30, r"dir: extra is not in the config; every tensor must have its place")
def published_tensor_unexpected():
    published("jamba")
    edit_weights(lambda tensors: tensors.update(extra=torch.ones(3)))
    return ["convert", "dir", "out"]


@case(31, r"dir/model\.safetensors: \S+ is \(\d+.*\), the config wants \(")
def published_shapes_of_another_config():
    published("jamba", intermediate_size=32)
    return ["generate", "dir"]


@case(31, r"dir: .*(missing|not in the config).*Is this config\.json these weights'\?")
def config_of_another_family():
    """Mamba's config.json beside Jamba's weights."""
    published("mamba")
    text = Path("dir/config.json").read_text()
    published("jamba")
    Path("dir/config.json").write_text(text)
    return ["convert", "dir", "out"]


@case(31, r"dir.*Is this config\.json these weights'\?")
def mamba_config_beside_mamba2_weights():
    """The two share most names; the shapes of A_log and in_proj tell them apart."""
    published("mamba")
    edit_weights(
        lambda tensors: tensors.update(
            {n: torch.ones(4) for n in tensors if n.endswith((".A_log", ".D"))}
        )
    )
    return ["generate", "dir"]


@case(31, r"dir: \S*lm_head\.weight differs from \S+, but config\.json ties them")
def published_head_that_is_not_tied():
    published("jamba", tie_word_embeddings=True)
    return ["convert", "dir", "out"]


@case(31, r"dir: head\.weight is not in the config")
def head_that_is_not_tied():
    saved(tie_embeddings=False)
    text = Path("dir/config.json").read_text()
    Path("dir/config.json").write_text(
        text.replace('"tie_embeddings": false', '"tie_embeddings": true')
    )
    return ["verify", "dir"]


@case(31, r"dir: head\.weight is missing")
def head_that_is_missing():
    saved()
    path = Path("dir/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_embeddings": False}))
    return ["generate", "dir"]


@case(32, r"model\.safetensors: \S+ is F8_E4M3; weights are one of .*unquantised")
def published_weights_of_eight_bits():
    published("mamba")
    name = "backbone.layers.0.mixer.in_proj.weight"
    edit_weights(lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    return ["generate", "dir"]


@case(32, r"model\.safetensors: embed\.weight has dtype 'F4'; known are .*\. Use an unquantised ch")
def unknown_stored_dtype():
    saved()
    edit_entries(lambda entries: entries["embed.weight"].update(dtype="F4"))
    return ["verify", "dir"]


@case(32, r"model\.safetensors: norm\.weight is I32; weights are one of ")
def weights_of_whole_numbers():
    saved()
    edit_weights(lambda tensors: tensors.update({"norm.weight": tensors["norm.weight"].int()}))
    return ["generate", "dir"]


@case(33, r"model\.safetensors: blocks\.2\.norm\.weight has 1 NaN and 2 Inf in 16 values")
def weights_that_are_not_numbers():
    saved()
    broken = torch.tensor([math.nan, math.inf, -math.inf])
    edit_weights(lambda tensors: tensors["blocks.2.norm.weight"][:3].copy_(broken))
    return ["verify", "dir"]


@case(33, r"model\.safetensors: lm_head\.weight has 1 NaN and 0 Inf in 5,120 values")
def published_weights_that_are_not_numbers():
    published("jamba")
    edit_weights(lambda tensors: tensors["lm_head.weight"].view(-1)[7:8].fill_(math.nan))
    return ["verify", "dir"]


@case(34, r"dir/model\.safetensors: its SHA-256 is not that in SHA256SUMS; .*Download it again")
def flipped_bit():
    published("mamba")
    seal("dir")
    data = bytearray(Path(WEIGHTS).read_bytes())
    data[-1] ^= 1
    Path(WEIGHTS).write_bytes(data)
    return ["verify", "dir"]


@case(34, r"dir/tokenizer\.json: missing; SHA256SUMS lists it")
def listed_file_that_is_missing():
    published("mamba")
    Path("dir/SHA256SUMS").write_text(f"{'0' * 64}  tokenizer.json\n")
    return ["verify", "dir"]


@case(34, r"dir/SHA256SUMS: line 1 is not a checksum and a name \('<html>'\)")
def sums_that_are_a_web_page():
    saved()
    Path("dir/SHA256SUMS").write_text("<html>")
    return ["verify", "dir"]


@case(34, r"secret: leads out of the directory")
def sums_that_lead_outside():
    saved()
    Path("secret").write_text("")
    Path("dir/SHA256SUMS").write_text(f"{'0' * 64}  ../secret\n")
    return ["verify", "dir"]


@case(0, r"index\.json: a total_size of 1; its files hold \d+ bytes of tensors")
def total_size_that_lies():
    sharded("mamba")
    edit_index(lambda i: i["metadata"].update(total_size=1))
    return ["verify", "dir"]


@case(0, r"golden\.safetensors: the logits differ; .* is allowed: .*These are not the weights")
def golden_values_of_other_weights():
    saved()
    seal("dir")
    edit_weights(lambda tensors: tensors["blocks.0.layer.D"].mul_(2))
    Path("dir/SHA256SUMS").unlink()
    return ["verify", "dir"]


# resources


@case(35, r"dir/tokenizer\.json: 400 ids; the embedding has 320 rows")
def published_tokenizer_larger_than_the_embedding():
    published("mamba")
    write_words("dir/tokenizer.json", [f"w{i}" for i in range(400)])
    return ["verify", "dir"]


@case(35, r"model: vocab_size \(320\) is below the 400 ids of the tokenizer .*Raise vocab_size")
def tokenizer_of_a_recipe_larger_than_the_vocabulary():
    write_words("words.json", [f"w{i}" for i in range(400)])
    return train(data={"tokenizer": "words.json"})


@case(
    38, r"cache: 1 x 1,000,000,000,000,000 tokens need [\d,]+ GiB of state; cpu has \d+ GiB in all"
)
def more_tokens_than_any_memory_holds():
    saved()
    return ["generate", "dir", "--max-new-tokens", str(10**15)]


@case(39, r"out: cannot be written \(File too large\); .*Free space")
def disk_that_is_full():
    saved()
    return ["LIMITED", "convert", "dir", "out"]


@case(40, r"/proc/none: cannot be written \(.*\); |/proc/none: ")
def directory_that_cannot_be_written():
    saved()
    return ["convert", "dir", "/proc/none"]


@case(41, r"out: another process is saving to it; .*choose another directory")
def directory_that_another_process_writes():
    saved()
    Path("out").mkdir()
    return ["LOCKED", "convert", "dir", "out"]


@case(43, r"seed: changed since run/step-00000002 was written")
def seed_changed_since():
    cli_run(train())
    return train("--resume", seed=1)


@case(44, r"run: none of 1 checkpoints is intact \(the oldest: model\.safetensors is damaged\)")
def only_checkpoint_of_a_run_is_cut():
    cli_run(train())
    for path in Path("run/step-00000002").glob("*.safetensors"):
        os.truncate(path, 100)
    return train("--resume", steps=4)


@case(47, r"data: text\.txt.*(UTF-8|utf-8).*byte")
def data_in_another_encoding():
    write_words("words.json", [f"w{i}" for i in range(40)])
    command = train(data={"tokenizer": "words.json"})
    Path("text.txt").write_bytes(("Ein Märchen. " * 100).encode("latin-1"))
    return command


@case(47, r"data: .*tokens\.bin.*(0 bytes|empty)")
def token_file_empty():
    Path("tokens.bin").write_bytes(b"")
    return train(data={"source": "tokens.bin"})


@case(48, r"data: .*tokens\.npy")
def token_file_cut():
    np.save("tokens.npy", np.arange(2000, dtype=np.uint16) % 200)
    os.truncate("tokens.npy", 500)
    return train(data={"source": "tokens.npy"})


@case(48, r"data: .*tokens\.npy")
def token_file_of_objects():
    np.save("tokens.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    return train(data={"source": "tokens.npy"})


@case(48, r"data: .*tokens\.npy.*ids")
def token_file_of_another_tokenizer():
    np.save("tokens.npy", np.arange(2000, dtype=np.uint16))
    return train(data={"source": "tokens.npy"})


@case(48, r"data: .*tokens\.bin")
def token_file_of_half_a_token():
    Path("tokens.bin").write_bytes(bytes(1001))
    return train(data={"source": "tokens.bin"})


# options of generate


def write_words(path, tokens):
    from tokenizers import Tokenizer, models

    backend = models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0])
    Tokenizer(backend).save(path)


def words(tokens):
    saved(tokenizer="words.json", vocab_size=2)
    write_words("dir/words.json", tokens)
    return ["generate", "dir"]


@case(37, r"--prompt: empty \(''\); .*no token that starts a text\. Write a word")
def empty_prompt_without_a_start():
    return [*words(["a", "b"]), "--prompt", ""]


@case(37, r"tokenizer: the text holds a raw byte or a lone surrogate \(U\+DCFF at character 1\)")
def raw_bytes_for_a_tokenizer_of_text():
    return [*words(["a", "b"]), "--prompt", "a\udcff"]


@case(36, r"input_ids holds 2; the model's ids are 0 to 1\. Use the model's own tokenizer")
def tokenizer_larger_than_the_vocabulary():
    return [*words(["a", "b", "c"]), "--prompt", "c"]


@case(0, r"temperature cannot be -1\.0; it is finite and >= 0; 0 is greedy")
def temperature_below_zero():
    return option("--temperature", "-1")


@case(0, r"temperature cannot be nan")
def temperature_not_a_number():
    return option("--temperature", "nan")


@case(0, r"top_p cannot be 2\.0; it is a mass, > 0 and <= 1")
def top_p_above_one():
    return option("--top-p", "2")


@case(0, r"top_k cannot be 0; it is a count >= 1")
def top_k_of_none():
    return option("--top-k", "0")


@case(0, r"max_new_tokens is 0; it counts tokens, >= 1")
def no_new_tokens():
    return option("--max-new-tokens", "0")


@case(0, r"seed is -1.*from 0 to 2\*\*63 - 1")
def seed_below_zero():
    return option("--seed", "-1")


@case(0, r"--max-new-tokens.*integer.*Try `hybridzoo generate --help`")
def word_for_a_number():
    return option("--max-new-tokens", "many")


@case(0, r"--dtype: unknown dtype \(fp8\); use auto, fp32, bf16 or stored")
def unknown_dtype():
    return option("--dtype", "fp8")


@case(0, r"--device: unknown device \(tpu\); use auto, cpu, cuda or cuda:N")
def unknown_device():
    return option("--device", "tpu")


@case(49, r"--device: no such GPU \(cuda:99\); torch sees \d+\. Use auto or cpu")
def absent_gpu():
    return option("--device", "cuda:99")


@case(50, r"attention: backend 'tritn' does not exist; there are: .*sdpa, reference")
def unknown_backend():
    return option("--kernels", "attention=tritn")


@case(50, r"kernels: op 'atention' does not exist; .*Did you mean 'attention'\?")
def unknown_op():
    return option("--kernels", "atention=sdpa")


@case(50, r"--kernels: 'sdpa' is not op=backend; write ssd=reference")
def backend_without_op():
    return option("--kernels", "sdpa")


@case(
    50, r"attention: backend 'flash_attn' was asked for but .*Drop the request; 'sdpa' supports it"
)
def backend_that_cannot_run():
    return option("--kernels", "attention=flash_attn", "--device", "cpu")


@case(0, r"No such option: --tokens.*Try `hybridzoo generate --help`")
def unknown_option():
    return option("--tokens", "3")


@case(0, r"No such command 'chat'.*Try `hybridzoo --help`")
def unknown_command():
    return ["chat"]


# convert


@case(4, r"layout: unknown \('lamba'\); did you mean mamba\? known: native, ")
def unknown_layout():
    saved()
    return ["convert", "dir", "out", "--layout", "lamba"]


@case(12, r"jamba: cannot express the pattern \(MAM\); .*Save in the native layout")
def stack_that_the_family_cannot_say():
    saved(pattern="MAM")
    return ["convert", "dir", "out", "--layout", "jamba"]


@case(39, r"out: exists and is not empty; .*Choose another")
def target_not_empty():
    saved()
    Path("out").mkdir()
    Path("out/precious").write_text("")
    return ["convert", "dir", "out"]


@case(40, r"file/out: cannot be written \(Not a directory\)")
def target_under_a_file():
    saved()
    Path("file").write_text("")
    return ["convert", "dir", "file/out"]


# train


@case(5, r"recipe.yaml: lerning_rate is not a key of a recipe; .*its keys: ")
def unknown_key_of_a_recipe():
    return train(lerning_rate=1e-3)


@case(5, r"recipe.yaml: data\.seqlen is not a key of a recipe's data; did you mean seq_len\?")
def unknown_key_of_data():
    return train(data={"seqlen": 8})


@case(8, r"recipe.yaml: accumulate: \(3\) must divide batch_size \(2\)")
def accumulation_that_does_not_divide():
    return train(accumulate=3)


@case(1, r"none\.yaml: no such file")
def model_of_a_recipe_missing():
    return train(model="none.yaml")


@case(47, r"data: none\.txt does not exist; data is a corpus of the zoo \(shakespeare\)")
def data_missing():
    return train(data={"source": "none.txt"})


@case(47, r"data: text\.txt is empty \(0 bytes\)")
def data_empty():
    return train(text="")


@case(47, r"data: text\.txt, split 'train', has 7 tokens; .*seq_len \+ 1 \(17\)\. Lower seq_len")
def data_shorter_than_a_window():
    return train(text="brief")


@case(42, r"output: run already holds step-\d+/; .*--resume, or choose another")
def output_taken():
    cli_run(train())
    return ["train", "recipe.yaml"]


@case(43, r"lr: changed since run/step-00000002 was written; .*Restore the value")
def recipe_changed_since():
    cli_run(train())
    return train("--resume", lr=2e-3)


@case(43, r"model: model\.yaml is not the model that run/step-00000002 holds")
def model_changed_since():
    cli_run(train())
    command = train("--resume")
    info(pattern="MF")
    return command


@case(40, r"file/run: Not a directory\. Check the path")
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
        for path in (Path(root, name) for name in names):
            # a sparse file of a terabyte is one of the cases
            found[str(path)] = path.read_bytes() if path.stat().st_size < 2**30 else path.stat()
    return found


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # a --kernels that is refused late has been set for the process
    monkeypatch.setattr(dispatch, "_asked", {})


def said_by(name, capsys):
    """What stderr says to a case, after every check but that of the words."""
    number, make, _ = CASES[name]
    arguments = make()
    before = files()
    capsys.readouterr()
    start = time.process_time()
    with hindered(arguments):
        code = cli_run(arguments)
    seconds = time.process_time() - start
    out, err = capsys.readouterr()
    assert code == 2, out + err
    assert seconds < 5
    # verify reports on what holds, too
    assert out == "" or (arguments[0] == "verify" and "failed" in out)
    assert files() == before
    # resuming tells which checkpoints it passes over
    assert err.startswith("hybridzoo: ") or number == 44
    return err[err.index("hybridzoo: ") :]


@pytest.mark.parametrize("name", CASES)
def test_mistake_is_one_sentence_and_leaves_no_trace(name, capsys):
    check_sentence(said_by(name, capsys), CASES[name][2])


@contextmanager
def hindered(arguments):
    """A GiB more memory than now; a full disk or a busy directory where the first word asks so."""
    hindrance = arguments.pop(0) if arguments[0].isupper() else ""
    limits = {which: resource.getrlimit(which) for which in (RLIMIT_AS, RLIMIT_FSIZE)}
    n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft = {RLIMIT_AS: n_pages * resource.getpagesize() + 2**30}
    if hindrance == "LIMITED":
        soft[RLIMIT_FSIZE] = 2**12
    holder = os.open("out", os.O_RDONLY) if hindrance == "LOCKED" else None
    if holder is not None:
        fcntl.flock(holder, fcntl.LOCK_EX)
    for which, most in soft.items():
        resource.setrlimit(which, (most, limits[which][1]))
    try:
        yield
    finally:
        for which, limit in limits.items():
            resource.setrlimit(which, limit)
        if holder is not None:
            os.close(holder)


@pytest.mark.slow
def test_table_of_messages(tmp_path, capsys, monkeypatch):
    """Every message to read, with -s; each number of the list that files and configs can meet."""
    rows = []
    for name, (number, _, _) in CASES.items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setattr(dispatch, "_asked", {})
        rows.append(
            (number or 99, name, said_by(name, capsys).removeprefix("hybridzoo: ").rstrip())
        )
    with capsys.disabled():
        for number, name, message in sorted(rows, key=lambda row: row[0]):
            sys.stdout.write(f"{number if number < 99 else '-':>2}  {name}: {message}\n")
    # 42 is test_kill's; 45 and 46 need a hub, 49's estimate a GPU that is too small
    assert {number for number, _, _ in rows} >= {*range(1, 51)} - {42, 45, 46, 49}


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
    _, make, message = CASES[name]
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
import sys
from hybridzoo.cli import main
try:
    main()
finally:
    # not ru_maxrss, which keeps what the process had before exec: a vfork of the test's own process
    print(next(l.split()[1] for l in open("/proc/self/status") if "VmHWM" in l), file=sys.stderr)
"""
