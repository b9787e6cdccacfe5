"""mamba-ssm's layer and model in plain torch, written where a bench looks for the package."""

from pathlib import Path

# the modules' names, parameters and calls are mamba-ssm's, so that weights can be copied
LAYER = """
import torch, torch.nn.functional as F
from torch import nn
class Mamba(nn.Module):
    def __init__(self, d, d_state=16, d_conv=4, expand=2, device=None, dtype=None):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.r, self.n, i = -(-d // 16), d_state, expand * d
        self.in_proj = nn.Linear(d, 2 * i, bias=False, **where)
        self.conv1d = nn.Conv1d(i, i, d_conv, groups=i, padding=d_conv - 1, **where)
        self.x_proj = nn.Linear(i, self.r + 2 * d_state, bias=False, **where)
        self.dt_proj = nn.Linear(self.r, i, **where)
        self.A_log = nn.Parameter(torch.zeros(i, d_state, device=device))
        self.D = nn.Parameter(torch.zeros(i, device=device))
        self.out_proj = nn.Linear(i, d, bias=False, **where)
    def forward(self, u, inference_params=None):
        x, z = self.in_proj(u).chunk(2, -1)
        x = F.silu(self.conv1d(x.mT)[..., :u.shape[1]]).mT
        dt, B, C = self.x_proj(x).split([self.r, self.n, self.n], -1)
        dt, A = F.softplus(self.dt_proj(dt).float()), -self.A_log.exp()
        h, ys = torch.zeros(u.shape[0], *A.shape), []
        for t in range(u.shape[1]):
            new = (dt * x)[:, t, :, None] * B[:, t, None]
            h = (dt[:, t, :, None] * A).exp() * h + new
            ys.append((h * C[:, t, None]).sum(-1))
        y = torch.stack(ys, 1) + self.D * x
        return self.out_proj((y * F.silu(z.float())).to(u.dtype))
"""
CONFIG = """
class MambaConfig:
    def __init__(self, d_model, n_layer, vocab_size, ssm_cfg):
        assert ssm_cfg == {"layer": "Mamba1"}
        self.sizes = d_model, n_layer, vocab_size
"""
MODEL = """
from types import SimpleNamespace
import torch
from torch import nn
from mamba_ssm.modules.mamba_simple import Mamba
class Norm(nn.Module):
    def __init__(self, d, **where):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d, **where))
    def forward(self, x):
        y = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.weight
        return y.to(self.weight.dtype)
class Block(nn.Module):
    def __init__(self, d, **where):
        super().__init__()
        self.norm, self.mixer = Norm(d, **where), Mamba(d, **where)
class Backbone(nn.Module):
    def __init__(self, d, n, v, **where):
        super().__init__()
        self.embedding = nn.Embedding(v, d, **where)
        self.layers = nn.ModuleList(Block(d, **where) for _ in range(n))
        self.norm_f = Norm(d, **where)
    def forward(self, ids):
        h = self.embedding(ids).float()
        for block in self.layers:
            h = h + block.mixer(block.norm(h))
        return self.norm_f(h)
class MambaLMHeadModel(nn.Module):
    def __init__(self, config, **where):
        super().__init__()
        d, n, v = config.sizes
        self.backbone = Backbone(d, n, v, **where)
        self.lm_head = nn.Linear(d, v, bias=False, **where)
        self.lm_head.weight = self.backbone.embedding.weight
"""
PEERS = {
    "mamba_ssm/modules/mamba_simple.py": LAYER,
    "mamba_ssm/models/config_mamba.py": CONFIG,
    "mamba_ssm/models/mixer_seq_simple.py": MODEL,
}


def write_peers(folder: Path) -> Path:
    for name, text in PEERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
