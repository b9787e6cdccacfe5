"""The stack: embedding, blocks, norm, head; or one pipeline stage of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from hybridzoo.block import Block, scaled, stage_places
from hybridzoo.comm import SINGLE, Parallel
from hybridzoo.config import HybridConfig, branch_prefix
from hybridzoo.errors import CheckpointError, ConfigError
from hybridzoo.kernels.dispatch import autocast_dtype
from hybridzoo.layers import Layer, Param, Sequence, State
from hybridzoo.layers.embedding import vocab_embedding, vocab_head
from hybridzoo.layers.init import seeded
from hybridzoo.layers.norm import stream_norm
from hybridzoo.layers.state import check_shapes


class HybridLM(nn.Module):
    """A language model built from a HybridConfig, or this rank's part of one.

    Args:
        config: the architecture.
        seed: of the initial weights, which do not depend on how the model is spread.
        parallel: this process's place among the ranks that share the model.
        stage: places of the stack that this pipeline stage holds, the others being None in
            `blocks`; the first stage has the embedding, the last norm and head. None: all.
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
        stage: range | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        init: bool = True,
    ) -> None:
        super().__init__()
        config.check_parallel(parallel)
        self.config, self.parallel = config, parallel
        n = len(config.places)
        self.stage = stage_places(stage, n)
        self.is_first, self.is_last = self.stage.start == 0, self.stage.stop == n
        self.vocab_range = config.vocab_ranges(parallel.tp.world)[parallel.tp.rank]
        self._build(device=device, dtype=dtype, parallel=parallel)
        if init and next(self.parameters()).device.type != "meta":
            self.init_weights(seed)

    def _build(self, **where: Any) -> None:
        config, d, rows = self.config, self.config.d_model, len(self.vocab_range)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=where["device"], dtype=where["dtype"]))

        rules = (partial(empty, d), config.norm_eps, config.norm_weight_fp32, self.parallel)
        self.embed = self.norm = self.head = None
        if self.is_first or (self.is_last and config.tie_embeddings):
            self.embed = vocab_embedding(empty(rows, d), self.vocab_range.start, self.parallel.tp)
        used = {b.shared for i in self.stage for b in config.places[i]}
        self.shared = nn.ModuleDict(
            {name: layer.build(d, **where) for name, layer in config.shared.items() if name in used}
        )
        self.blocks = nn.ModuleList(
            Block(config, place, self.shared, stream_norm(config.norm, *rules), **where)
            if i in self.stage
            else None
            for i, place in enumerate(config.places)
        )
        if self.is_last:
            self.norm = stream_norm(config.norm, *rules)
            self.head = vocab_head(self.embed.weight if config.tie_embeddings else empty(rows, d))

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
        """The final norm's output, (b, l, d), for this rank's head to read."""
        self._check_whole()
        h = self.embedded(input_ids)
        return self.finish(*self.stream(h, state, replace(ctx, embed0=h)))

    def embedded(self, input_ids: Tensor) -> Tensor:
        """The residual stream's start, (b, l, d); with sequence_parallel this rank's tokens."""
        tp, l = self.parallel.tp, input_ids.shape[1]
        if self.parallel.sequence_parallel and l % tp.world:
            raise ConfigError(
                f"sequence_parallel: {l} tokens cannot be shared by tp={tp.world} ranks; it must "
                "divide them. Change seq_len, or leave sequence_parallel out."
            )
        h = self.parallel.leave(self.embed(input_ids))
        h = scaled(h, self.config.embedding_multiplier)
        if self.config.residual_fp32:
            h = h.to(torch.promote_types(h.dtype, torch.float32))
        return h

    def stream(
        self, h: Tensor, state: list[list[State]] | None, ctx: Sequence
    ) -> tuple[Tensor, Tensor]:
        """(h, delta) after this model's blocks: the residual stream, and what is to be added."""
        delta = None
        if not self.is_first:
            # what the stage before added is in h: zero, in the dtype that its delta had
            dtype = autocast_dtype(h.device) or self.blocks[self.stage.start].norm.weight.dtype
            delta = h.new_zeros((), dtype=dtype).expand(h.shape)
        for i in self.stage:
            h, delta = self.blocks[i](h, delta, state[i] if state else None, ctx)
        return h, delta

    def flushed(self, h: Tensor, delta: Tensor) -> Tensor:
        """The residual stream with delta added: what one pipeline stage hands to the next."""
        return h + scaled(delta, self.config.residual_multiplier).to(h.dtype)

    def finish(self, h: Tensor, delta: Tensor) -> Tensor:
        """The final norm's output for all tokens, (b, l, d), ready for each rank's head."""
        hidden, _ = self.norm(scaled(delta, self.config.residual_multiplier), residual=h)
        return self.parallel.enter(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, vocab_size), on every rank."""
        tp = self.parallel.tp
        sizes = [len(rows) for rows in self.config.vocab_ranges(tp.world)]
        return tp.gather_out(self.local_logits(hidden), -1, sizes)

    def local_logits(self, hidden: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, v), the logits of the ids in this rank's vocab_range."""
        return scaled(self.head(hidden), self.config.logits_multiplier)

    def init_state(self, batch: int, max_len: int) -> list[list[State]]:
        """Empty states for `batch` sequences of at most `max_len` tokens, by block and branch."""
        self.check_state()
        return [block.init_state(batch, max_len) for block in self.blocks]

    def check_state(self) -> None:
        """Raise ConfigError where this model cannot continue a state, so not generate either."""
        self._check_whole()
        if self.parallel.sequence_parallel and self.parallel.tp.world > 1:
            raise ConfigError(
                "sequence_parallel: no state can be continued with it; the ranks share a text's "
                "tokens, and a step has one. Build the model without it to generate."
            )

    def _check_whole(self) -> None:
        if not (self.is_first and self.is_last):
            raise ConfigError(
                f"stage: places {self.stage.start} to {self.stage.stop - 1} of "
                f"{len(self.blocks)} give no logits; all stages together do. Build the model "
                "without stage, or train it by parallel.engine.initialize."
            )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def named_layers(self) -> Iterator[tuple[str, Layer]]:
        """Every layer here with its checkpoint prefix, a shared one once."""
        for i in self.stage:
            block = self.blocks[i]
            for branch, layer in zip(block.place, block.layers(), strict=True):
                if branch.shared is None:
                    yield branch_prefix(i, branch.letter, len(block.place) > 1), layer
        for name, layer in self.shared.items():
            yield f"shared.{name}.", layer

    def local_names(self) -> Iterator[tuple[str, Param, dict[str, str]]]:
        """Each canonical parameter here: name, declaration, {name in its cut: name in the module}.

        Of a pipeline, the parameters of this stage; several stages may hold one.
        """
        layers = dict(self.named_layers())
        mine = {name for name, _ in self.named_parameters()}
        for name, p in self.config.params():
            prefix = next((k for k in layers if name.startswith(k)), "")
            if not prefix and name not in mine:
                continue
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
        layers, tp = dict(self.named_layers()), self.parallel.tp
        for name, p, pieces in self.local_names():
            if not name.startswith(tuple(layers)):
                full = p.init(p.shape, seeded(seed, name))
                for piece, tensor in p.cut.shard(name, full, tp.world, tp.rank).items():
                    self.get_parameter(pieces[piece]).copy_(tensor)
        for prefix, layer in layers.items():
            layer.init_weights(seed, prefix, len(self.blocks))

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Continue (b, l) to (b, l + new); options as in inference.generate."""
        from hybridzoo.inference.generate import generate

        return generate(self, input_ids, **options)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """Load a zoo name, a directory or a repository of the hub; options as in zoo.load."""
        from hybridzoo.zoo import load

        return load(source, **options)

    def save_pretrained(self, directory: str | Path, **options: Any) -> None:
        """Write config.json and safetensors; options as in checkpoint.save."""
        from hybridzoo.checkpoint import save

        save(self, directory, **options)

    def push_to_hub(self, repo: str, **options: Any) -> Any:
        """Publish at owner/name, privately unless told; options as in zoo.publish.push."""
        from hybridzoo.zoo.publish import push

        return push(self, repo, **options)
