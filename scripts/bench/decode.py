"""A whole Mamba-1 model beside mamba-ssm's on one GPU: prefill, decode, and where the time goes.

    python scripts/bench/decode.py [prefill decode] [--out FILE] [--profile] [--batch 1 64 128]
        [--length 65536] [--kernels op=backend,...] [--device cpu --tiny]

Both models have the same random weights: 1.37 B parameters (d_model 2,048, 48 layers, vocabulary
50,288), bf16. Prefill: the logits of the last of 65,536 tokens, as a forward and with the states
kept; medians in the order ours, theirs, ours. Decode: greedy after 1,024 tokens, both with their
CUDA graph; milliseconds a token from the difference of a long and a short generation, each the
best of three a pass, both warmed at the long one. First of all a small model's logits are compared
with float64's.
"""

import argparse
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import (
    by_part,
    error,
    import_peer,
    kernels,
    machine,
    print_parts,
    print_table,
    sample,
    save,
    sync,
)
from torch import Tensor

from hybridzoo.config import HybridConfig
from hybridzoo.inference.generate import generate
from hybridzoo.kernels.dispatch import list_ops, parse_backends, set_backends, use
from hybridzoo.layers import Sequence
from hybridzoo.model import HybridLM

# new tokens; what a generation costs beside them (prefill, capture) varies by some 50 ms
SHORT, LONG = 40, 552
# a mixed-precision kernel may round otherwise than torch's ops do, but not lose more
WORSE = 2.0


def config_of(d_model: int, n_layers: int, vocab_size: int) -> HybridConfig:
    """As mamba-ssm builds Mamba-1: tied embedding, fp32 residual."""
    return HybridConfig(
        name="mamba1", d_model=d_model, vocab_size=vocab_size, pattern=f"{n_layers}M",
        layers={"M": {"kind": "mamba1", "d_state": 16}}, residual_fp32=True, norm_weight_fp32=True,
    )  # fmt: skip


@torch.no_grad()
def model_of(config: HybridConfig, args: argparse.Namespace, dtype: torch.dtype) -> HybridLM:
    """A model in eval mode, its weights drawn where it lives: seconds instead of minutes."""
    model = HybridLM(config, device=args.device, dtype=dtype, init=False).eval()
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith("A_log"):
            p.copy_(torch.arange(1, p.shape[1] + 1, device=p.device).log().expand_as(p))
        elif name.endswith("dt_bias"):
            p.uniform_(-6.9, -2.3)
        elif name.endswith(("norm.weight", ".D")):
            p.fill_(1.0)
        else:
            p.normal_(std=p.shape[-1] ** -0.5 if p.dim() > 1 and "embed" not in name else 0.02)
    return model


@torch.no_grad()
def peer_of(model: HybridLM) -> tuple[Any, str]:
    """mamba-ssm's model with the same weights, or why there is none."""
    make, why = import_peer("mamba_ssm.models.mixer_seq_simple", "MambaLMHeadModel")
    config_type, _ = import_peer("mamba_ssm.models.config_mamba", "MambaConfig")
    if make is None:
        return None, why
    c = model.config
    config = config_type(
        d_model=c.d_model, n_layer=len(c.places), vocab_size=c.vocab_size,
        ssm_cfg={"layer": "Mamba1"},
    )  # fmt: skip
    peer = make(config, device=model.device, dtype=model.embed.weight.dtype).eval()
    theirs = dict(peer.named_parameters())
    for name, p in model.named_parameters():
        if name != "head.weight":
            target = theirs.pop(peer_name(name))
            target.copy_(p.view_as(target))
    theirs.pop("lm_head.weight", None)
    assert not theirs, f"not copied: {sorted(theirs)}"
    return peer, ""


def peer_name(name: str) -> str:
    """Where mamba-ssm keeps one of our weights."""
    name = name.replace("blocks.", "layers.").replace(".layer.", ".mixer.")
    name = name.replace("conv_weight", "conv1d.weight").replace("conv_bias", "conv1d.bias")
    name = name.replace("dt_bias", "dt_proj.bias").replace("embed.weight", "embedding.weight")
    return "backbone." + ("norm_f.weight" if name == "norm.weight" else name)


@torch.no_grad()
def last_logits(model: HybridLM, ids: Tensor, state: Any = None) -> Tensor:
    hidden = model.hidden(ids, state, Sequence.build(ids.shape[1]))
    return model.logits(hidden[:, -1])


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Errors against float64, prompt and steps, of the chosen kernels and of plain torch."""
    config = config_of(64 if args.tiny else 512, 4, 512)
    half = torch.bfloat16
    model, truth = model_of(config, args, half), model_of(config, args, torch.float64)
    truth.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    ids = torch.randint(0, config.vocab_size, (2, 97), device=args.device)
    plain = dict.fromkeys(list_ops(), "reference")
    with use(**plain):
        wanted, expected = steps(truth, ids), steps(model, ids)
    found = steps(model, ids)
    errors = {
        name: {"ours": error(found[name], t)["norm"], "torch": error(expected[name], t)["norm"]}
        for name, t in wanted.items()
    }
    # in float64 nothing is rounded: a step is the prompt's next token
    gap = error(wanted["steps"], wanted["prompt"][:, -wanted["steps"].shape[1] :])["norm"]
    is_right = all(e["ours"] <= WORSE * e["torch"] for e in errors.values()) and gap < 1e-9
    return {"errors": errors, "steps_to_prompt": gap, "is_right": is_right}


@torch.no_grad()
def steps(model: HybridLM, ids: Tensor) -> dict[str, Tensor]:
    """Logits of a prompt, and of its last 8 tokens taken one by one."""
    state, n = model.init_state(*ids.shape), ids.shape[1] - 8
    found = [model(ids[:, :n], state=state)[:, -1:]]
    found += [model(ids[:, t : t + 1], state=state) for t in range(n, ids.shape[1])]
    return {"prompt": model(ids), "steps": torch.cat(found, 1)}


def prefill(model: HybridLM, peer: Any, args: argparse.Namespace) -> list[dict]:
    """Milliseconds to the last token's logits, without and with the states kept."""
    ids = torch.randint(0, model.config.vocab_size, (1, args.length), device=args.device)
    params = import_peer("mamba_ssm.utils.generation", "InferenceParams")[0] if peer else None

    def ours(is_kept: bool) -> Tensor:
        return last_logits(model, ids, model.init_state(1, args.length) if is_kept else None)

    @torch.no_grad()
    def theirs(is_kept: bool) -> Tensor:
        kept = {"inference_params": params(args.length, 1)} if is_kept else {}
        return peer(ids, num_last_tokens=1, **kept).logits[:, -1]

    return [prefilled(is_kept, ours, theirs if peer else None, args) for is_kept in (False, True)]


def prefilled(
    is_kept: bool,
    ours: Callable[[bool], Tensor],
    theirs: Callable[[bool], Tensor] | None,
    args: argparse.Namespace,
) -> dict:
    """One row: ours, theirs, ours again."""
    row: dict = {"what": "prefill, states kept" if is_kept else "prefill", "batch": 1}
    row |= {"tokens": args.length, "passes": {}, "peak_gib": {}}
    for name, call in (("ours", ours), ("theirs", theirs), ("again", ours)):
        if call is not None:
            peak_gib(args, reset=True)
            found = sample([partial(call, is_kept)], args.device, args.budget)
            row["passes"][name], row["peak_gib"][name] = found._asdict(), peak_gib(args)
    row["ours_ms"] = (row["passes"]["ours"]["ms"] + row["passes"]["again"]["ms"]) / 2
    if args.profile:
        row["parts"] = {"ours": parts(partial(ours, is_kept), args)}
    if theirs:
        row["theirs_ms"] = row["passes"]["theirs"]["ms"]
        row["difference"] = error(ours(is_kept), theirs(is_kept).double())["norm"]
        if args.profile:
            row["parts"]["theirs"] = parts(partial(theirs, is_kept), args)
    return row


def peak_gib(args: argparse.Namespace, *, reset: bool = False) -> float | None:
    """Most memory since the last reset."""
    if args.device.type != "cuda":
        return None
    found = torch.cuda.max_memory_allocated(args.device) / 2**30
    if reset:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(args.device)
    return found


def decode(model: HybridLM, peer: Any, args: argparse.Namespace, batch: int) -> dict:
    """Milliseconds a token of both sides at one batch, beside the time to read the weights once."""
    length = 16 if args.tiny else 1024
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=args.device)

    def ours(n: int) -> Tensor:
        return generate(model, ids, max_new_tokens=n, temperature=0)

    def theirs(n: int) -> Tensor:
        return peer.generate(ids, max_length=length + n, cg=True, top_k=1)

    if peer:
        # its graph belongs to the largest batch and length that it has seen
        peer._decoding_cache = None
    passes = {"ours": per_token(ours, args), "theirs": None, "again": None}
    if peer:
        passes |= {"theirs": per_token(theirs, args), "again": per_token(ours, args)}
    row: dict = {"what": "decode", "batch": batch, "tokens": length, "passes": passes}
    # the best of each length: the smaller of two differences would be the luckier
    row["ours_ms"] = ms_a_token(*(p for name, p in passes.items() if p and name != "theirs"))
    row["floor_ms"] = 2 * model.config.n_params() / args.rates["copy_bytes_per_s"] * 1e3
    if peer:
        row["theirs_ms"] = ms_a_token(passes["theirs"])
        same = ours(LONG)[:, length:] == theirs(LONG)[:, length:]
        row["same_first_8_tokens"] = float(same[:, :8].double().mean())
    if args.profile:
        row["parts"] = {"ours": parts_per_token(ours, args)}
        row["parts"] |= {"theirs": parts_per_token(theirs, args)} if peer else {}
    return row


def per_token(call: Callable[[int], Any], args: argparse.Namespace) -> dict[str, float]:
    """Seconds at each length, the best of three after one."""
    best = {}
    for name, n in (("long_s", LONG), ("short_s", SHORT)):
        call(n)
        found = []
        for _ in range(3):
            sync(args.device)
            start = time.perf_counter()
            call(n)
            sync(args.device)
            found.append(time.perf_counter() - start)
        best[name] = min(found)
    return best


def ms_a_token(*passes: dict[str, float]) -> float:
    """Of the tokens that a long generation has and a short one has not."""
    long_s, short_s = (min(p[name] for p in passes) for name in ("long_s", "short_s"))
    return (long_s - short_s) / (LONG - SHORT) * 1e3


def parts(call: Callable[[], Any], args: argparse.Namespace) -> dict[str, Any]:
    call()
    return by_part(kernels(call, args.device))


def parts_per_token(call: Callable[[int], Any], args: argparse.Namespace) -> dict[str, Any]:
    found = kernels(lambda: call(LONG), args.device)
    found.subtract(kernels(lambda: call(SHORT), args.device))
    return by_part(Counter({k: ms / (LONG - SHORT) for k, ms in found.items()}))


def show(report: dict[str, Any]) -> None:
    """Parts first, the table last."""
    for row in report["rows"]:
        for side, found in row.get("parts", {}).items():
            print_parts(f"{row['what']} {row['batch']} {side}", found)
    print("check:", report["check"])
    head = ("what", "batch", "tokens", "ours ms", "theirs ms", "ratio", "floor ms", "ours / floor")
    cells = []
    for row in report["rows"]:
        theirs, floor = row.get("theirs_ms"), row.get("floor_ms")
        cells.append([row["what"], str(row["batch"]), str(row["tokens"]), f"{row['ours_ms']:.3f}"])
        cells[-1] += [f"{theirs:.3f}", f"{theirs / row['ours_ms']:.2f}"] if theirs else ["", ""]
        cells[-1] += [f"{floor:.3f}", f"{floor / row['ours_ms']:.0%}"] if floor else ["", ""]
    print_table(head, cells)
    print(report["peer"] or "", report["machine"], f"{report['seconds']:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], "prefill", "decode"], help="both if none")
    parser.add_argument("--out", type=Path, help="JSON, written after every row")
    parser.add_argument("--kernels", default="", help="op=backend,...: as hybridzoo's --kernels")
    parser.add_argument("--profile", action="store_true", help="time by kind of kernel")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 128])
    parser.add_argument("--length", type=int, default=65536, help="tokens of the prefill")
    parser.add_argument("--budget", type=float, default=4000, help="milliseconds a pass of prefill")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true", help="a size that a CPU can do, for tests")
    args = parser.parse_args()
    set_backends(parse_backends(args.kernels))
    args.rates = machine(args.device, 2**24 if args.tiny else 2**31)
    start = time.perf_counter()
    report: dict[str, Any] = {"machine": args.rates, "kernels": args.kernels, "rows": []}
    report["check"] = check(args)
    model = model_of(
        config_of(*((32, 2, 64) if args.tiny else (2048, 48, 50288))), args, torch.bfloat16
    )
    peer, report["peer"] = peer_of(model)
    report["n_params"] = model.config.n_params()
    jobs: list[Callable[[], list[dict]]] = []
    if "prefill" in args.parts or not args.parts:
        jobs.append(lambda: prefill(model, peer, args))
    if "decode" in args.parts or not args.parts:
        jobs += [lambda b=batch: [decode(model, peer, args, b)] for batch in args.batch]
    for job in jobs:
        report["rows"] += job()
        report["seconds"] = time.perf_counter() - start
        save(report, args.out)
    show(report)
    return not report["check"]["is_right"]


if __name__ == "__main__":
    sys.exit(main())
