"""What the fuzzers share: each parser of files that strangers write, and whole files to spoil.

A parser either takes the bytes or refuses them with one of our errors, in one short line.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from hybridzoo import HybridConfig, HybridLM
from hybridzoo.checkpoint import open_source, read_config
from hybridzoo.checkpoint.convert import CONVERTERS
from hybridzoo.checkpoint.golden import GOLDEN, read_golden, read_sums, seal
from hybridzoo.checkpoint.pickled import PickleReader
from hybridzoo.checkpoint.reader import Reader
from hybridzoo.checkpoint.recorded import SourceLayout
from hybridzoo.errors import HybridzooError
from hybridzoo.parallel.recipe import Recipe
from hybridzoo.pattern import Pattern
from hybridzoo.tokenizer import load_tokenizer

MAX_MESSAGE = 600
MAX_SECONDS = 5.0

_MODEL = {"name": "tiny", "d_model": 8, "vocab_size": 40}
_MAMBA = {"pattern": "2M", "layers": {"M": {"kind": "mamba1", "d_state": 4}}}
# a tiny stack that each published family can say.
PUBLISHED = {
    "jamba": {
        "pattern": "MFAE",
        "tie_embeddings": False,
        "layers": {
            "M": {"kind": "mamba1", "d_state": 4, "x_norm": "learned"},
            "A": {"kind": "attention", "n_heads": 2, "n_kv_heads": 1},
            "F": {"kind": "mlp", "d_ff": 24},
            "E": {"kind": "moe", "d_ff": 24, "n_experts": 3, "top_k": 2},
        },
    },
    "mamba": _MAMBA,
    "mamba2": {"pattern": "2M", "layers": {"M": {"kind": "mamba2", "d_state": 4, "n_heads": 4}}},
    "falcon_mamba": {
        "pattern": "2M",
        "layers": {"M": {"kind": "mamba1", "d_state": 4, "x_norm": "weightless"}},
    },
    "state_spaces": _MAMBA,
}
_NATIVE = _MODEL | {
    "pattern": "2(M [AN]) | FE",
    "layers": {
        "M": {"kind": "mamba1", "d_state": 4, "dt_limit": [0.0, 1.0]},
        "A": {"kind": "attention", "n_heads": 2, "n_kv_heads": 1, "window_size": 3},
        "N": {"shared": "base"},
        "F": {"kind": "mlp", "d_ff": 12},
        "E": {"kind": "moe", "d_ff": 8, "n_experts": 3, "top_k": 2},
    },
    "shared": {"base": {"kind": "mamba2", "d_state": 4, "n_heads": 2, "norm": "norm_first"}},
    "layers_at": {4: {"d_ff": 16}},
    "eos_token_id": 2,
}
_RECIPE = {
    "model": "model.yaml",
    "data": {"source": "text.txt", "seq_len": 16, "tokenizer": "words.json"},
    "output": "run",
    "steps": 2,
    "batch_size": 4,
    "lr": 1e-3,
    "accumulate": 2,
    "schedule": "wsd",
    "betas": [0.9, 0.99],
    "clip_norm": None,
    "seed": 3,
}


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        path: the file that it reads.
        read: reads it.
        seeds: contents that it takes.
    """

    path: Path
    read: Callable[[Path], object]
    seeds: tuple[bytes, ...]

    def feed(self, content: bytes) -> str | None:
        """Give it these bytes: None if it takes them, else what it says; anything else raises.

        Afterwards the file is whole again, for the other targets of its directory.
        """
        self.path.write_bytes(content)
        start = time.process_time()
        try:
            self.read(self.path)
        except HybridzooError as error:
            said = str(error)
            # a mistake in a pattern shows the pattern, and a caret
            first, *caret = said.split("\n")
            assert len(first) <= MAX_MESSAGE and len(caret) in (0, 2), said
            assert first.isprintable(), said
            return said
        finally:
            self.path.write_bytes(self.seeds[0])
            assert time.process_time() - start < MAX_SECONDS
        return None


def targets(root: Path) -> dict[str, Target]:
    """Every parser with its file below `root`, in directories that are whole but for it."""
    found = {
        "pattern": Target(root / "pattern", _pattern, (b"2(M [MA]) | 3(MF)AF",)),
        "megatron": Target(root / "megatron", _megatron, (b"M-M*E|M-",)),
        "yaml": Target(root / "m.yaml", HybridConfig.load, (yaml.safe_dump(_NATIVE).encode(),)),
        "json": Target(root / "m.json", HybridConfig.load, (json.dumps(_NATIVE).encode(),)),
        "recipe": Target(root / "r.yaml", Recipe.load, (yaml.safe_dump(_RECIPE).encode(),)),
        "tokenizer": _tokenizer(root),
    }
    for family in CONVERTERS:
        directory = root / family
        config = HybridConfig.from_dict(_MODEL | PUBLISHED[family])
        HybridLM(config).save_pretrained(directory, layout=family)
        found[family] = _target(directory / "config.json", _config)
    native = root / "native"
    HybridLM(HybridConfig.from_dict(_NATIVE)).save_pretrained(native, max_shard_bytes=4_000)
    seal(native)
    found["index"] = _target(native / "model.safetensors.index.json", lambda p: Reader(p.parent))
    found["shard"] = _target(min(native.glob("model-*")), lambda p: Reader(p.parent))
    found["sums"] = _target(native / "SHA256SUMS", read_sums)
    found["golden"] = _target(native / GOLDEN, lambda path: read_golden(path, 40))
    # one that remembers the files it was converted from
    HybridLM(open_source(root / "jamba").config).save_pretrained(root / "remembered")
    found["native"] = _target(root / "remembered" / "config.json", _config)
    found["pickle"] = _pickle(root / "pickle")
    return found


def _target(path: Path, read: Callable[[Path], object]) -> Target:
    return Target(path, read, (path.read_bytes(),))


def _pattern(path: Path) -> None:
    pattern = Pattern.parse(path.read_bytes().decode(errors="replace"))
    assert Pattern.parse(pattern.compact()).places == pattern.places


def _megatron(path: Path) -> None:
    pattern = Pattern.from_megatron(path.read_bytes().decode(errors="replace"))
    assert Pattern.from_megatron(pattern.to_megatron()).places == pattern.places


def _config(path: Path) -> None:
    config = read_config(path.parent)
    SourceLayout.of(config)
    open_source(path.parent, from_pickle=(path.parent / "pytorch_model.bin").exists())


def _tokenizer(root: Path) -> Target:
    """Words, and pieces with a normalizer, a template, a length to cut to and one to fill up to."""
    path = root / "tokenizer.json"
    made = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    made.save(str(path))
    words = path.read_bytes()
    made = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0), ("<s>", -3.0)], 0))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("x", "y")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    made.enable_truncation(5)
    made.enable_padding()
    made.save(str(path))

    def read(path: Path) -> None:
        tokenizer = load_tokenizer(path)
        tokenizer.decode(tokenizer.encode_prompt("a b z"))

    return Target(path, read, (path.read_bytes(), words))


def _pickle(directory: Path) -> Target:
    """A .bin of both kinds that torch has written."""
    directory.mkdir()
    path = directory / "pytorch_model.bin"
    tensors = {"a": torch.ones(3, 2), "b": torch.ones(2).bfloat16()}
    torch.save(tensors, path)
    new = path.read_bytes()
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    return Target(path, lambda path: PickleReader(path.parent), (new, old))
