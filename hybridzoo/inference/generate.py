"""Generation: ids continued token by token, as they come (`stream`) or all at once (`generate`)."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hybridzoo.errors import ConfigError
from hybridzoo.inference.cache import Cache
from hybridzoo.inference.cuda_graph import CapturedStep, why_not
from hybridzoo.inference.sampling import check_sampling, sample
from hybridzoo.layers import Sequence as Context
from hybridzoo.model import HybridLM

# a capture costs about as much as this many eager steps
MIN_CAPTURED = 32

Stop = int | Sequence[int] | Sequence[Sequence[int]]


def generate(
    model: HybridLM,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Stop | None = None,
    seed: int | Sequence[int] | None = None,
    prefill_chunk: int | None = None,
) -> Tensor:
    """Continue every row of input_ids.

    A row's tokens do not depend on the other rows, but for rounding: padding, other prompts and
    other rows' draws do not reach it. Runs without gradients and dropout; the model's training
    flags are left as they were. On CUDA the one-token step becomes a graph where it can.

    Args:
        model: the model.
        input_ids: prompts, (b, l) integers below vocab_size; moved to the model's device.
        attention_mask: (b, l), nonzero at real tokens; padding is on the left of each row.
        max_new_tokens: tokens to add at most.
        temperature: divides the logits; 0 takes the best id (greedy).
        top_k: keep so many best ids.
        top_p: keep the smallest set of best ids with at least this mass.
        min_p: keep ids with at least this share of the best one's probability.
        repetition_penalty: > 1 makes ids of the prompt and of the new tokens less likely.
        stop: what ends a row: an id, several ids, or several sequences of ids, each wholly among
            the new tokens. The row keeps the stop and repeats its last id until all rows have
            ended. None: nothing does, whatever eos_token_id the config names.
        seed: of the draws: the same seed on the same device gives the same tokens. Row i of an int
            draws alike in every batch; of one seed a row, row i draws as it would alone with its
            seed. None: a fresh one.
        prefill_chunk: tokens of the prompt computed at once; fewer take less memory and change
            nothing but rounding. None: all.

    Returns:
        (b, l + new) int64 on the model's device, the prompts in front; new is max_new_tokens, or
        fewer where all rows ended before.

    Raises:
        ConfigError: an argument is out of its range, or the model is a pipeline stage or
            sequence-parallel, and nothing has run; or the model computes NaN for the prompt.
    """
    new = stream(
        model,
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
        prefill_chunk=prefill_chunk,
    )
    prompt = input_ids.to(model.embed.weight.device, torch.int64)
    return torch.cat([prompt, torch.stack(list(new), 1)], 1)


def stream(
    model: HybridLM,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Stop | None = None,
    seed: int | Sequence[int] | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[Tensor]:
    """The new ids of `generate`, (b,) int64 a step, each as soon as it is drawn.

    Arguments and errors are those of `generate`; they are checked at the call, before the first
    step is asked for.
    """
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    check_sampling(**sampling)
    model.check_state()
    for name, count in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
        if count is not None and count < 1:
            raise ConfigError(f"generate: {name} is {count}; it counts tokens, >= 1. Raise it.")
    ids = _checked_prompt(model, input_ids)
    mask = _checked_mask(ids, attention_mask)
    stops = _checked_stop(model, stop)
    sampling["generator"] = _generators(model, seed, len(ids)) if temperature else None
    return _steps(model, ids, mask, max_new_tokens, stops, sampling, prefill_chunk)


# as a decorator it leaves the caller's grad mode alone between two steps
@torch.no_grad()
def _steps(
    model: HybridLM,
    ids: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    stops: list[Tensor],
    sampling: dict[str, Any],
    prefill_chunk: int | None,
) -> Iterator[Tensor]:
    (b, l), end = ids.shape, ids.shape[1] + max_new_tokens
    # the last new token is never fed back
    cache = Cache.alloc(model, b, end - 1)

    def eager(new: Tensor) -> Tensor:
        return model.logits(_last_hidden(model, new, cache, None))

    step: Callable[[Tensor], Tensor] = eager
    if max_new_tokens >= MIN_CAPTURED and why_not(model) is None:
        step = CapturedStep(eager, b, ids.device)
    for start in range(0, l, prefill_chunk or l):
        chunk = slice(start, start + (prefill_chunk or l))
        hidden = _last_hidden(model, ids[:, chunk], cache, None if mask is None else mask[:, chunk])
    logits = model.logits(hidden)
    _check_numbers(model, logits)
    # -1, at padding and at tokens to come, is no id: the penalty and the stops pass over it
    seen = ids.new_full((b, end), -1)
    seen[:, :l] = ids if mask is None else ids.masked_fill(~mask, -1)
    has_ended = torch.zeros(b, dtype=torch.bool, device=ids.device)
    for t in range(l, end):
        new = sample(logits, previous=seen, **sampling)
        if t > l:
            new = torch.where(has_ended, seen[:, t - 1], new)
        seen[:, t] = new
        yield new
        if stops:
            has_ended |= _completes(seen[:, l : t + 1], stops)
            if has_ended.all():
                return
        if t + 1 < end:
            logits = step(seen[:, t : t + 1])


def _check_numbers(model: HybridLM, logits: Tensor) -> None:
    # once a call, after the prompt: a wait for the device at every step would cost more
    if logits.isnan().any():
        raise ConfigError(
            f"{model.config.name}: its logits for this prompt are NaN; a model's are numbers. Run "
            "`hybridzoo verify` on its directory to find the weights at fault, or load it in fp32."
        )


def _last_hidden(model: HybridLM, ids: Tensor, cache: Cache, mask: Tensor | None) -> Tensor:
    """The final hidden state after ids (b, l), (b, d): the head reads no other position."""
    with _evaluating(model):
        context = Context.build(ids.shape[1], attention_mask=mask)
        return model.hidden(ids, cache.states, context)[:, -1]


@contextmanager
def _evaluating(model: HybridLM) -> Iterator[None]:
    # a forward at a time, so that nobody finds the model in eval mode between two steps; module by
    # module, because part of a model may be in eval mode on purpose.
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _completes(new: Tensor, stops: list[Tensor]) -> Tensor:
    """Whether the newest of the ids new (b, t) completes one of the sequences, (b,) bool."""
    found = torch.zeros(len(new), dtype=torch.bool, device=new.device)
    for stop in stops:
        if len(stop) <= new.shape[1]:
            found |= (new[:, -len(stop) :] == stop).all(1)
    return found


def _checked_prompt(model: HybridLM, input_ids: Tensor) -> Tensor:
    shape, dtype = tuple(input_ids.shape), input_ids.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or len(shape) != 2:
        raise ConfigError(
            f"generate: input_ids is {dtype} of shape {shape}; prompts are integers, (b, l). "
            "Write torch.tensor([ids])."
        )
    if 0 in shape:
        raise ConfigError(
            f"generate: input_ids is empty {shape}; a prompt has at least one token. Start with "
            "the tokenizer's bos_id, or a newline."
        )
    low, high = (int(t) for t in input_ids.aminmax())
    size = model.config.vocab_size
    if low < 0 or high >= size:
        raise ConfigError(
            f"generate: input_ids holds {low if low < 0 else high}; the model's ids are 0 to "
            f"{size - 1}. Use the model's own tokenizer."
        )
    return input_ids.to(model.embed.weight.device, torch.int64)


def _checked_mask(ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask as bool; None where nothing is padding."""
    if attention_mask is None:
        return None
    if attention_mask.shape != ids.shape:
        raise ConfigError(
            f"generate: attention_mask is {tuple(attention_mask.shape)} for input_ids of "
            f"{tuple(ids.shape)}; each id has one entry. Give the two one shape."
        )
    mask = attention_mask.to(ids.device).bool()
    is_legal = mask[:, -1] & (mask[:, 1:] >= mask[:, :-1]).all(1)
    if not is_legal.all():
        row = int(is_legal.int().argmin())
        raise ConfigError(
            f"generate: attention_mask has padding at or before the end of row {row} "
            f"({_short(mask[row].int().tolist())}); a row is 0s, then at least one 1, to the end. "
            "Pad on the left: tokenizer.padding_side = 'left'."
        )
    return None if mask.all() else mask


def _checked_stop(model: HybridLM, stop: Stop | None) -> list[Tensor]:
    """The sequences of ids that end a row, each (n,)."""
    if stop is None:
        return []
    several = [stop] if isinstance(stop, int) else stop
    sequences = [[s] if isinstance(s, int) else list(s) for s in several]
    size = model.config.vocab_size
    for sequence in sequences:
        if not sequence or not all(isinstance(i, int) and 0 <= i < size for i in sequence):
            raise ConfigError(
                f"generate: stop holds {sequence}; it is an id, several, or sequences of at least "
                f"one, each from 0 to {size - 1}. Encode text with the model's tokenizer."
            )
    return [torch.tensor(s, device=model.embed.weight.device) for s in sequences]


def _generators(
    model: HybridLM, seed: int | Sequence[int] | None, batch: int
) -> list[torch.Generator]:
    """One generator a row, so that no row's draws depend on how many others there are."""
    device, tp = model.embed.weight.device, model.parallel.tp
    if seed is None:
        # the ranks of a group must draw alike: all take the first one's seed
        own = torch.tensor(secrets.randbits(62) if tp.rank == 0 else 0, device=device)
        seed = int(tp.all_reduce(own) if tp.world > 1 else own)
    seeds = [_row_seed(seed, i) for i in range(batch)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch or not all(0 <= s < 2**63 for s in seeds):
        raise ConfigError(
            f"generate: seed is {_short(seeds)}; it is one number, or one for each row ({batch}), "
            "from 0 to 2**63 - 1. Choose others."
        )
    return [torch.Generator(device).manual_seed(s) for s in seeds]


def _row_seed(seed: int, row: int) -> int:
    # hashed, because seed + row would give row 1 of one seed the draws of row 0 of the next.
    if row == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{row}".encode()).digest()[:8], "little") >> 1


def _short(values: list[int]) -> str:
    return ", ".join(map(str, values[:16])) + (", ..." if len(values) > 16 else "")
