"""CapturedStep: the one-token step as a CUDA graph, so that Python launches one graph a token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybridzoo.kernels.dispatch import find_op
from hybridzoo.layers.moe import MoE
from hybridzoo.model import HybridLM

# calls before the capture: libraries set up their handles and workspaces in them
N_WARM = 2


def why_not(model: HybridLM) -> str | None:
    """Why the model's one-token step cannot be captured, or None."""
    weight = model.embed.weight
    if weight.device.type != "cuda":
        return f"graphs need CUDA, the model is on {weight.device}"
    if model.parallel.tp.world > 1:
        return "its tensor-parallel group may be of a backend that a graph cannot hold"
    for moe in (m for m in model.modules() if isinstance(m, MoE)):
        if moe.parallel.ep.world > 1:
            return "the exchange of expert parallelism reads its counts on the host"
        for name in ("expert_up_weight", "expert_down_weight"):
            matrices = moe.get_parameter(name)
            rows = matrices.new_empty(1, matrices.shape[2])
            ends = torch.empty(len(matrices), dtype=torch.int32, device=weight.device)
            if find_op("grouped_mm").pick(rows, matrices, ends) == "reference":
                return "grouped_mm's reference reads the experts' loads on the host"
    return None


class CapturedStep:
    """A step on the GPU that is run N_WARM times, then captured, then replayed.

    Every call is one step, the first ones too: nothing is run twice and no state is set back. The
    step must keep its states in tensors that it updates in place (State.set does so without
    gradients), wait for nothing on the host and draw no random numbers.

    Args:
        step: (b, 1) int64 ids to (b, v) logits.
        batch: b.
        device: the model's.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], batch: int, device: torch.device) -> None:
        self._step = step
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._n_calls = 0

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (b, v) after ids (b, 1); the next call overwrites them."""
        self._ids.copy_(ids)
        self._n_calls += 1
        with torch.cuda.device(self._ids.device):
            if self._n_calls <= N_WARM:
                return self._warm()
            if self._graph is None:
                self._capture()
            assert self._graph is not None and self._logits is not None
            self._graph.replay()
        return self._logits

    def _warm(self) -> Tensor:
        # on a side stream, as the capture will be: workspaces belong to a stream.
        here = torch.cuda.current_stream()
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            logits = self._step(self._ids)
        here.wait_stream(self._side)
        # the allocator must not hand this memory out on the side stream while `here` reads it.
        logits.record_stream(here)
        return logits

    def _capture(self) -> None:
        # recorded, not run: the states move on only when it is replayed.
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may copy to the GPU (a data loader does) meanwhile.
        with torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
            self._logits = self._step(self._ids)
        self._graph = graph
