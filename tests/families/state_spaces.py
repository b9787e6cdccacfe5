"""The original layout's tiny models; their reference is the arithmetic in plain torch.

mamba_ssm runs on no CPU, so this is written from the papers and from shared/research: one token
after the other, nothing fused. The modules have the files' names: a state_dict() is a file.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.checkpoint.convert import state_spaces
from tests.families.base import Family, Variant

EPS = 1e-5


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in groups."""

    def __init__(self, width: int, n_groups: int = 1) -> None:
        super().__init__()
        self.weight, self.n_groups = nn.Parameter(torch.ones(width)), n_groups

    def forward(self, x: Tensor) -> Tensor:
        """(.., width) -> the same."""
        groups = x.unflatten(-1, (self.n_groups, -1))
        return (groups / (groups.square().mean(-1, keepdim=True) + EPS).sqrt()).flatten(
            -2
        ) * self.weight


def conv1d(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """Each channel's last taps, itself included."""
    return conv(F.pad(x.transpose(1, 2), (conv.kernel_size[0] - 1, 0))).transpose(1, 2)


def depthwise(width: int, taps: int, bias: bool) -> nn.Conv1d:
    """One filter a channel."""
    return nn.Conv1d(width, width, taps, groups=width, bias=bias)


class Mamba1(nn.Module):
    """arXiv 2312.00752, algorithm 2."""

    def __init__(self, d_model: int, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        i, self.n = int(cfg.get("expand", 2) * d_model), cfg.get("d_state", 16)
        rank = cfg.get("dt_rank", "auto")
        self.rank = math.ceil(d_model / 16) if rank == "auto" else rank
        bias = cfg.get("bias", False)
        self.in_proj = nn.Linear(d_model, 2 * i, bias=bias)
        self.conv1d = depthwise(i, cfg.get("d_conv", 4), cfg.get("conv_bias", True))
        self.x_proj = nn.Linear(i, self.rank + 2 * self.n, bias=False)
        self.dt_proj = nn.Linear(self.rank, i)
        self.A_log, self.D = nn.Parameter(torch.zeros(i, self.n)), nn.Parameter(torch.ones(i))
        self.out_proj = nn.Linear(i, d_model, bias=bias)

    def forward(self, u: Tensor) -> Tensor:
        """(b, l, d) -> the same."""
        x, z = self.in_proj(u).chunk(2, -1)
        x = F.silu(conv1d(self.conv1d, x))
        dt, B, C = self.x_proj(x).split([self.rank, self.n, self.n], -1)
        dt, A = F.softplus(self.dt_proj(dt)), -self.A_log.exp()
        h, ys = x.new_zeros(*x[:, 0].shape, self.n), []  # (b, i, n)
        for t in range(x.shape[1]):
            step = dt[:, t, :, None]
            h = (step * A).exp() * h + step * B[:, t, None] * x[:, t, :, None]
            ys.append((h * C[:, t, None]).sum(-1) + self.D * x[:, t])
        return self.out_proj(torch.stack(ys, 1) * F.silu(z))


class Mamba2(nn.Module):
    """arXiv 2405.21060, section 7; one scalar decay a head."""

    def __init__(self, d_model: int, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        self.i, self.p = int(cfg.get("expand", 2) * d_model), cfg.get("headdim", 64)
        self.g, self.n = cfg.get("ngroups", 1), cfg.get("d_state", 128)
        self.limit = cfg.get("dt_limit", [0.0, math.inf])
        self.is_norm_first, bias = cfg.get("norm_before_gate", False), cfg.get("bias", False)
        h, width = self.i // self.p, self.i + 2 * self.g * self.n
        self.in_proj = nn.Linear(d_model, self.i + width + h, bias=bias)
        self.conv1d = depthwise(width, cfg.get("d_conv", 4), cfg.get("conv_bias", True))
        self.dt_bias, self.A_log = nn.Parameter(torch.zeros(h)), nn.Parameter(torch.zeros(h))
        self.D = nn.Parameter(torch.ones(h))
        self.norm = RMSNorm(self.i, self.g) if cfg.get("rmsnorm", True) else None
        self.out_proj = nn.Linear(self.i, d_model, bias=bias)

    def forward(self, u: Tensor) -> Tensor:
        """(b, l, d) -> the same."""
        h, gn = self.i // self.p, self.g * self.n
        z, xBC, dt = self.in_proj(u).split([self.i, self.i + 2 * gn, h], -1)
        x, B, C = F.silu(conv1d(self.conv1d, xBC)).split([self.i, gn, gn], -1)
        dt = F.softplus(dt + self.dt_bias).clamp(*self.limit)
        x = x.unflatten(-1, (h, self.p))
        # head k reads the group k // (heads / groups)
        B, C = (t.unflatten(-1, (self.g, self.n)).repeat_interleave(h // self.g, 2) for t in (B, C))
        state, ys = x.new_zeros(*x[:, 0].shape, self.n), []  # (b, h, p, n)
        for t in range(x.shape[1]):
            decay = (-self.A_log.exp() * dt[:, t]).exp()[..., None, None]
            grown = dt[:, t, :, None, None] * x[:, t, ..., None] * B[:, t, :, None]
            state = decay * state + grown
            ys.append((state * C[:, t, :, None]).sum(-1) + self.D[:, None] * x[:, t])
        y, gate = torch.stack(ys, 1).flatten(2), F.silu(z)
        if self.norm is None:
            return self.out_proj(y * gate)
        return self.out_proj(self.norm(y) * gate if self.is_norm_first else self.norm(y * gate))


class MHA(nn.Module):
    """Attention with a convolution over q, k and v, and gated units beside the heads."""

    def __init__(self, d_model: int, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        self.h, self.rotary = cfg["num_heads"], cfg.get("rotary_emb_dim", 0)
        self.hk, self.p = cfg.get("num_heads_kv", self.h), cfg.get("head_dim", d_model // self.h)
        self.scale = cfg.get("softmax_scale", self.p**-0.5)
        self.base = cfg.get("rotary_emb_base", 10000.0)
        self.mlp = 256 * math.ceil(cfg.get("mlp_dim", 0) / 256)
        self.qkv, bias = (self.h + 2 * self.hk) * self.p, cfg.get("qkv_proj_bias", True)
        self.in_proj = nn.Linear(d_model, self.qkv + self.mlp, bias=bias)
        taps = cfg.get("d_conv", 0)
        self.conv1d = depthwise(self.qkv, taps, True) if taps else None
        bias = cfg.get("out_proj_bias", True)
        self.out_proj = nn.Linear(self.h * self.p + self.mlp // 2, d_model, bias=bias)

    def forward(self, u: Tensor) -> Tensor:
        """(b, l, d) -> the same."""
        qkv, up, gate = self.in_proj(u).split([self.qkv, self.mlp // 2, self.mlp // 2], -1)
        if self.conv1d is not None:
            qkv = conv1d(self.conv1d, qkv)
        heads = qkv.unflatten(-1, (-1, self.p)).transpose(1, 2)  # (b, h + 2 hk, l, p)
        q, k, v = heads.split([self.h, self.hk, self.hk], 1)
        q, k = self.turned(q), self.turned(k)
        k, v = (t.repeat_interleave(self.h // self.hk, 1) for t in (k, v))
        scores = q @ k.transpose(2, 3) * self.scale
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        o = (scores.masked_fill(later, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.out_proj(torch.cat([o, up * F.silu(gate)], -1))

    def turned(self, x: Tensor) -> Tensor:
        """Rotary embedding of a head's first channels, halves paired."""
        if not self.rotary:
            return x
        waves = self.base ** (-torch.arange(0, self.rotary, 2, dtype=x.dtype) / self.rotary)
        angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * waves
        a, b, rest = x.split([self.rotary // 2, self.rotary // 2, self.p - self.rotary], -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class GatedMLP(nn.Module):
    """The value before the gate."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        width = 128 * math.ceil(width / 128)
        self.fc1 = nn.Linear(d_model, 2 * width, bias=False)
        self.fc2 = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d) -> the same."""
        value, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(value * F.silu(gate))


class Layer(nn.Module):
    """A mixer, and a feed-forward layer where the model has any."""

    def __init__(self, config: Mapping[str, Any], i: int) -> None:
        super().__init__()
        d_model, ssm = config["d_model"], config["ssm_cfg"]
        norm = RMSNorm if config["rms_norm"] else nn.LayerNorm
        is_attention = i in config.get("attn_layer_idx", [])
        mixers = {"Mamba1": Mamba1, "Mamba2": Mamba2}
        self.norm = norm(d_model)
        self.mixer = (
            MHA(d_model, config["attn_cfg"])
            if is_attention
            else mixers[ssm.get("layer", "Mamba1")](d_model, ssm)
        )
        if config.get("d_intermediate", 0):
            self.norm2, self.mlp = norm(d_model), GatedMLP(d_model, config["d_intermediate"])

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d) -> the same."""
        x = x + self.mixer(self.norm(x))
        return x + self.mlp(self.norm2(x)) if hasattr(self, "mlp") else x


class Reference(nn.Module):
    """A model of the original config.json."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config, d_model = config, config["d_model"]
        multiple = config.get("pad_vocab_size_multiple", 8)
        n_rows = multiple * math.ceil(config["vocab_size"] / multiple)
        self.backbone = nn.Module()
        self.backbone.embedding = nn.Embedding(n_rows, d_model)
        self.backbone.layers = nn.ModuleList(Layer(config, i) for i in range(config["n_layer"]))
        self.backbone.norm_f = (RMSNorm if config["rms_norm"] else nn.LayerNorm)(d_model)
        self.lm_head = nn.Linear(d_model, n_rows, bias=False)
        if config.get("tie_embeddings", True):
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(b, l) -> (b, l, rows): those of padding are predicted like others."""
        x = self.backbone.embedding(ids)
        for layer in self.backbone.layers:
            x = layer(x)
        return self.lm_head(self.backbone.norm_f(x))


def read(directory: Path) -> Reference:
    """A directory as mamba_ssm reads one: every key an argument, every tensor there and known."""
    config = json.loads((directory / "config.json").read_text())
    known = {
        *("d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx"),
        *("attn_cfg", "rms_norm", "residual_in_fp32", "fused_add_norm"),
        *("pad_vocab_size_multiple", "tie_embeddings"),
    }
    assert config.keys() <= known, config.keys() - known
    model = Reference(config).eval()
    model.load_state_dict(torch.load(directory / "pytorch_model.bin"), strict=True)
    return model


def _write(model: nn.Module, directory: Path) -> None:
    text = json.dumps(model.config, indent=4)
    (directory / "config.json").write_text(text)
    torch.save(model.state_dict(), directory / "pytorch_model.bin")


def _write_half(model: nn.Module, directory: Path) -> None:
    _write(model, directory)
    stored = model.state_dict()
    for name, tensor in list(stored.items()):
        if not is_wide(name):
            stored[name] = tensor.bfloat16()
    stored["lm_head.weight"] = stored["backbone.embedding.weight"]
    torch.save(stored, directory / "pytorch_model.bin")


def is_wide(name: str) -> bool:
    """Whether the bf16 variant stores a tensor in fp32."""
    return name.endswith(("A_log", ".D"))


@torch.no_grad()
def _round(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if not is_wide(name):
            p.copy_(p.bfloat16())


# as the first files say it: what is left out is the package's default.
BASE = {
    "d_model": 48,
    "n_layer": 3,
    "vocab_size": 125,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
_MAMBA2 = {
    **BASE,
    "vocab_size": 113,
    "d_intermediate": 0,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 7, "headdim": 12},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
_ATTENTION = {
    "causal": True,
    "d_conv": 4,
    "head_dim": 12,
    "num_heads": 4,
    "out_proj_bias": False,
    "qkv_proj_bias": False,
    "rotary_emb_dim": 6,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "every": {
        **_MAMBA2,
        "n_layer": 5,
        "d_intermediate": 96,
        "ssm_cfg": {
            "layer": "Mamba2",
            "d_state": 7,
            "d_conv": 3,
            "expand": 3,
            "headdim": 18,
            "ngroups": 2,
            "norm_before_gate": True,
            "A_init_range": [2, 9],
            "dt_min": 0.01,
            "dt_max": 0.2,
            "dt_init_floor": 0.002,
            "dt_limit": [0.05, 0.8],
            "bias": True,
            "conv_bias": False,
            "chunk_size": 8,
            "d_ssm": 144,
            "use_mem_eff_path": False,
        },
        "attn_layer_idx": [1, 4],
        "attn_cfg": {
            **_ATTENTION,
            "d_conv": 3,
            "num_heads_kv": 2,
            "head_dim": 10,
            "mlp_dim": 300,
            "out_proj_bias": True,
            "qkv_proj_bias": True,
            "rotary_emb_base": 100.0,
            "softmax_scale": 0.5,
        },
        "rms_norm": False,
        "residual_in_fp32": False,
        "fused_add_norm": False,
        "tie_embeddings": False,
    },
    "mamba": BASE,
    "mamba_options": {
        **BASE,
        "ssm_cfg": {
            **{"d_state": 7, "d_conv": 3, "expand": 1.5, "dt_rank": 5, "bias": True},
            **{"conv_bias": False, "dt_init": "constant", "dt_scale": 2.0, "use_fast_path": False},
        },
    },
    "layer_norm": {**BASE, "rms_norm": False},
    "mamba2": _MAMBA2,
    "no_norm": {**_MAMBA2, "ssm_cfg": {**_MAMBA2["ssm_cfg"], "rmsnorm": False, "ngroups": 4}},
    # mamba2attn-2.7b in small.
    "mamba2attn": {**_MAMBA2, "n_layer": 5, "attn_layer_idx": [1, 4], "attn_cfg": _ATTENTION},
    # what fms-fsdp trains.
    "fms": {
        **_MAMBA2,
        "vocab_size": 128,
        "d_intermediate": 96,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 24},
        "attn_layer_idx": [2],
        "attn_cfg": {**_ATTENTION, "d_conv": 0, "num_heads_kv": 2},
        "tie_embeddings": False,
    },
    "attention_only": {**_MAMBA2, "n_layer": 2, "attn_layer_idx": [0, 1], "attn_cfg": _ATTENTION},
}


def _variant(config: Mapping[str, Any]) -> Variant:
    return Variant(lambda: Reference(config).eval(), _write, None)


STATE_SPACES = Family(
    layout="state_spaces",
    variants={name: _variant(config) for name, config in CONFIGS.items()}
    | {"bf16": Variant(lambda: Reference(BASE).eval(), _write_half, None, prepare=_round)},
    keys=frozenset(state_spaces.KEYS.table),
    moves={
        "d_model": 64,
        "d_intermediate": 160,
        "n_layer": 4,
        "vocab_size": 129,
        "ssm_cfg": {**CONFIGS["every"]["ssm_cfg"], "norm_before_gate": False},
        "attn_layer_idx": [1, 3],
        "attn_cfg": {**CONFIGS["every"]["attn_cfg"], "softmax_scale": 0.6},
        "rms_norm": True,
        "tie_embeddings": True,
    },
    idle={"residual_in_fp32": True, "pad_vocab_size_multiple": 128},
)
