"""The embedding and head of a tensor-parallel rank: its own rows of the vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.comm import Axis


class VocabEmbedding(nn.Embedding):
    """An Embedding of some of the vocabulary's rows; the ranks' outputs are summed.

    Its first row is the token `start`.
    """

    start = 0

    def forward(self, input: Tensor) -> Tensor:
        """(b, l) ids -> (b, l, d): the rows of the ids it has, zeros for the others."""
        row = input - self.start
        is_elsewhere = (row < 0) | (row >= len(self.weight))
        return F.embedding(row.masked_fill(is_elsewhere, 0), self.weight).masked_fill(
            is_elsewhere[..., None], 0
        )


def vocab_embedding(weight: nn.Parameter, start: int, axis: Axis) -> nn.Embedding:
    """The embedding of the rows weight (v, d) of the vocabulary, from the token `start` on."""
    # from_pretrained: no default draw, which init_weights or a loader would overwrite.
    if axis.world == 1:
        return nn.Embedding.from_pretrained(weight, freeze=False)
    embedding = VocabEmbedding.from_pretrained(weight, freeze=False)
    embedding.start = start
    return embedding


def vocab_head(weight: nn.Parameter) -> nn.Linear:
    """The head of those rows: (.., d) -> (.., v)."""
    # on meta first: a tied one needs no memory of its own
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = weight
    return head
