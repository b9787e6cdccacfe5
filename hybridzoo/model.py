"""The stack: Block = x + layer(norm(x)), HybridLM = embedding, blocks, norm, head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.comm import SINGLE, Parallel
from hybridzoo.config import Branch, HybridConfig, branch_prefix
from hybridzoo.errors import CheckpointError
from hybridzoo.layers import Layer, Param, Sequence, State
from hybridzoo.layers.init import seeded
from hybridzoo.layers.norm import LayerNorm, RMSNorm, stream_norm
from hybridzoo.layers.state import check_shapes


class Block(nn.Module):
    """One residual sublayer: h += multiplier * delta; the layer of norm(h) gives the next delta.

    The add waits for the next block's norm so that the two fuse. Several layers (a parallel place)
    read the same normed input and are summed; under tensor parallelism one collective enters and
    one leaves, however many they are.
    """

    def __init__(
        self,
        config: HybridConfig,
        place: tuple[Branch, ...],
        shared: nn.ModuleDict,
        norm: RMSNorm | LayerNorm,
        **where: Any,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.place, self.tp = place, where["parallel"].tp
        self.residual_multiplier, self.dropout = config.residual_multiplier, config.dropout
        own = {b.letter: b.config.build(config.d_model, **where) for b in place if b.shared is None}
        if len(place) > 1:
            self.branch = nn.ModuleDict(own)
        elif own:
            self.layer = own[place[0].letter]
        # shared layers are registered once, by the model; a tuple keeps them out of this block's
        # own parameters.
        self._shared = (shared,)

    def forward(
        self, h: Tensor, delta: Tensor | None, state: list[State] | None, ctx: Sequence
    ) -> tuple[Tensor, Tensor]:
        """(h, delta) -> (h, delta).

        The residual stream h is (b, l, d), delta what is still to be added to it.
        """
        x, h = self.normed(h, delta)
        x = self.tp.copy_in(x)
        outs = []
        for i, (branch, layer) in enumerate(zip(self.place, self.layers(), strict=True)):
            y = layer(_scaled(x, branch.config.input_multiplier), state[i] if state else None, ctx)
            outs.append(_scaled(y, branch.config.output_multiplier))
        delta = self.tp.sum_out(sum(outs[1:], outs[0]))
        return h, F.dropout(delta, self.dropout, self.training)

    def layers(self) -> list[Layer]:
        """One layer a branch, looked up each time: a module put in a layer's place is used."""
        (shared,) = self._shared

        def find(branch: Branch) -> Layer:
            if branch.shared:
                return shared[branch.shared]
            return self.branch[branch.letter] if len(self.place) > 1 else self.layer

        return [find(branch) for branch in self.place]

    def normed(self, h: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(h + multiplier * delta), h + multiplier * delta)."""
        if delta is None:
            # nothing to add yet, but the dtypes and roundings of every other block
            delta = self.norm.weight.new_zeros(()).expand(h.shape)
        return self.norm(_scaled(delta, self.residual_multiplier), residual=h)

    def init_state(self, batch: int, max_len: int) -> list[State]:
        """One empty State a branch."""
        return [layer.init_state(batch, max_len) for layer in self.layers()]


class HybridLM(nn.Module):
    """A language model built from a HybridConfig.

    Args:
        config: the architecture.
        seed: of the initial weights, which do not depend on tp.
        parallel: this process's place among tensor-parallel ranks.
        device: where the parameters live; "meta" builds without memory.
        dtype: of the parameters; A_log, D and dt_bias stay at least fp32 (model.to(dtype) casts
            them with the rest, as torch does).
        init: False leaves the parameters' memory as it is, for a loader to fill.
    """

    def __init__(
        self,
        config: HybridConfig,
        *,
        seed: int = 0,
        parallel: Parallel = SINGLE,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        init: bool = True,
    ) -> None:
        super().__init__()
        config.check_tp(parallel.tp.world)
        self.config, self.parallel = config, parallel
        where = {"device": device, "dtype": dtype, "parallel": parallel}
        d = config.d_model

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        # from_pretrained: no default draw, which init_weights or a loader would overwrite.
        self.embed = nn.Embedding.from_pretrained(empty(config.vocab_size, d), freeze=False)
        shared = nn.ModuleDict(
            {name: layer.build(d, **where) for name, layer in config.shared.items()}
        )
        self.shared = shared
        rules = (partial(empty, d), config.norm_eps, config.norm_weight_fp32)
        self.blocks = nn.ModuleList(
            Block(config, place, shared, stream_norm(config.norm, *rules), **where)
            for place in config.places
        )
        self.norm = stream_norm(config.norm, *rules)
        # on meta first: a tied head needs no memory of its own
        self.head = nn.Linear(d, config.vocab_size, bias=False, device="meta")
        if config.tie_embeddings:
            self._tie()
        else:
            self.head.weight = empty(config.vocab_size, d)
        if init and self.embed.weight.device.type != "meta":
            self.init_weights(seed)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        state: list[list[State]] | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Logits.

        Args:
            input_ids: (b, l) integers below vocab_size.
            attention_mask: (b, l), nonzero at real tokens. Padding is on the left of a sequence's
                first token, maybe over several calls; without a state it may be on the right.
            state: from init_state; continued and updated.
            cu_seqlens: (s + 1,) int32 starts of packed sequences; then b == 1 and a state has s
                rows.
            max_seqlen: longest packed sequence.
            slots: (b,) rows of the state that these sequences use; negative rows are computed and
                dropped.

        Returns:
            (b, l, vocab_size) in the model's dtype.

        Raises:
            ConfigError: the shapes of these do not fit together.
        """
        check_shapes(input_ids, attention_mask, state, cu_seqlens, slots)
        ctx = Sequence.build(
            input_ids.shape[1],
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            slots=slots,
        )
        return self.logits(self.hidden(input_ids, state, ctx))

    def hidden(self, input_ids: Tensor, state: list[list[State]] | None, ctx: Sequence) -> Tensor:
        """The final norm's output, (b, l, d)."""
        h = _scaled(self.embed(input_ids), self.config.embedding_multiplier)
        if self.config.residual_fp32:
            h = h.to(torch.promote_types(h.dtype, torch.float32))
        ctx, delta = replace(ctx, embed0=h), None
        for i, block in enumerate(self.blocks):
            h, delta = block(h, delta, state[i] if state else None, ctx)
        return self.norm(_scaled(delta, self.config.residual_multiplier), residual=h)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, vocab_size)."""
        return _scaled(self.head(hidden), self.config.logits_multiplier)

    def init_state(self, batch: int, max_len: int) -> list[list[State]]:
        """Empty states for `batch` sequences of at most `max_len` tokens, by block and branch."""
        return [block.init_state(batch, max_len) for block in self.blocks]

    def named_layers(self) -> Iterator[tuple[str, Layer]]:
        """Every layer with its checkpoint prefix, a shared one once."""
        for i, block in enumerate(self.blocks):
            for branch, layer in zip(block.place, block.layers(), strict=True):
                if branch.shared is None:
                    yield branch_prefix(i, branch.letter, len(block.place) > 1), layer
        for name, layer in self.shared.items():
            yield f"shared.{name}.", layer

    def local_names(self) -> Iterator[tuple[str, Param, dict[str, str]]]:
        """Each canonical parameter: name, declaration, {name in its cut: name in this module}."""
        layers = dict(self.named_layers())
        for name, p in self.config.params():
            prefix = next((k for k in layers if name.startswith(k)), "")
            pieces = p.cut.pieces(name[len(prefix) :], self.parallel.tp.world)
            yield name, p, {piece: prefix + piece for piece in pieces}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As torch's; of a tied model `head.weight` may be absent, and stays tied.

        CheckpointError where it is there and differs from `embed.weight`.
        """
        embed, head = state_dict.get("embed.weight"), state_dict.get("head.weight")
        if self.config.tie_embeddings and embed is not None:
            if head is not None and not (head.is_meta or torch.equal(head, embed)):
                raise CheckpointError(
                    "head.weight: differs from embed.weight; tie_embeddings makes them one. "
                    "Load these weights into a model with tie_embeddings: false."
                )
            state_dict = {**state_dict, "head.weight": embed}
        found = super().load_state_dict(state_dict, *args, **kwargs)
        self._tie()
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # to_empty and moves off "meta" give each module a parameter of its own
        super()._apply(fn, recurse)
        self._tie()
        return self

    def _tie(self) -> None:
        # an adapter in the place of either looks after itself
        is_plain = isinstance(self.head, nn.Linear) and isinstance(self.embed, nn.Embedding)
        if self.config.tie_embeddings and is_plain:
            self.head.weight = self.embed.weight

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every parameter from generators seeded by its name."""
        layers = dict(self.named_layers())
        for name, p in self.config.params():
            if not name.startswith(tuple(layers)):
                self.get_parameter(name).copy_(p.init(p.shape, seeded(seed, name)))
        for prefix, layer in layers.items():
            layer.init_weights(seed, prefix, len(self.blocks))

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Continue (b, l) to (b, l + new); options as in inference.generate."""
        from hybridzoo.inference.generate import generate

        return generate(self, input_ids, **options)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """Load a zoo name, a native directory or a family's published directory.

        Options as in zoo.load.
        """
        from hybridzoo.zoo import load

        return load(source, **options)

    def save_pretrained(self, directory: str | Path, **options: Any) -> None:
        """Write config.json and safetensors; options as in checkpoint.save."""
        from hybridzoo.checkpoint import save

        save(self, directory, **options)


def _scaled(x: Tensor, multiplier: float) -> Tensor:
    return x if multiplier == 1.0 else x * multiplier
