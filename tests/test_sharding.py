"""sharding: cuts of fused dimensions, their joins, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridzoo.errors import CheckpointError, ConfigError
from hybridzoo.sharding import Part, Replicate, Split, check_tp, shared_name

HEADS = Part(8, 4, "n_heads")
GROUPS = Part(6, 2, "n_groups", replicates=True)
FUSED = Split(0, (HEADS, GROUPS, Part(4, 4, "n_heads")))


def rows(tensor):
    return tensor[:, 0].tolist()


def numbered(n):
    return torch.arange(float(n))[:, None].expand(n, 3).contiguous()


def test_each_rank_takes_its_units_of_every_part():
    full = numbered(18)
    first, second = (FUSED.shard("in_proj.weight", full, 2, r)["in_proj.weight"] for r in range(2))
    assert rows(first) == [0, 1, 2, 3, 8, 9, 10, 14, 15]
    assert rows(second) == [4, 5, 6, 7, 11, 12, 13, 16, 17]


def test_fewer_units_than_ranks_live_beside_the_cut_parts():
    full = numbered(18)
    shards = [FUSED.shard("in_proj.weight", full, 4, rank) for rank in range(4)]
    assert [rows(s["in_proj.weight"]) for s in shards] == [
        [0, 1, 14],
        [2, 3, 15],
        [4, 5, 16],
        [6, 7, 17],
    ]
    # ranks 0 and 1 hold the first group, 2 and 3 the second
    assert [rows(s["in_proj_weight_shared"]) for s in shards] == [[8, 9, 10]] * 2 + [
        [11, 12, 13]
    ] * 2
    assert shared_name("in_proj.weight") == "in_proj_weight_shared"


def test_pieces_and_shapes_tell_what_a_rank_holds():
    assert FUSED.pieces("w", 2) == {"w": (0, 1, 2)}
    assert FUSED.pieces("w", 4) == {"w": (0, 2), "w_shared": (1,)}
    assert FUSED.local_shapes("w", (18, 3), 4, 0) == {"w": (3, 3), "w_shared": (3, 3)}
    assert Split(1, (HEADS,)).local_shapes("w", (5, 8), 4, 0) == {"w": (5, 2)}
    assert Split(0, (GROUPS,)).pieces("w", 4) == {"w": (0,)}
    assert Replicate().local_shapes("w", [5, 8], 4, 0) == {"w": (5, 8)}


parts = st.builds(
    lambda units, size, replicates: Part(units * size, units, "n", replicates),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 3),
    st.booleans(),
)


@given(st.lists(parts, min_size=1, max_size=4), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2))
def test_join_undoes_shard_wherever_the_cut_is_legal(parts, world, dim):
    cut = Split(dim, tuple(parts))
    shape = [2, 3, 4]
    shape[dim] = sum(p.width for p in parts)
    full = torch.randn(shape)
    if not all(p.is_legal(world) for p in parts):
        with pytest.raises(ConfigError, match=f"here: tp={world} must divide n"):
            check_tp("here", [cut], world)
        return
    check_tp("here", [cut], world)
    shards = [cut.shard("a.b", full, world, rank) for rank in range(world)]
    for rank, shard in enumerate(shards):
        assert {k: tuple(t.shape) for k, t in shard.items()} == cut.local_shapes(
            "a.b", shape, world, rank
        )
    assert torch.equal(cut.join("a.b", shards), full)


@pytest.mark.parametrize("rank", [1, 3])
def test_copies_that_differ_are_refused(rank):
    shards = [FUSED.shard("A.weight", numbered(18), 4, r) for r in range(4)]
    shards[rank] = {k: t + k.endswith("_shared") for k, t in shards[rank].items()}
    with pytest.raises(CheckpointError, match=r"A\.weight: its replicated copies differ between"):
        FUSED.join("A.weight", shards)
    with pytest.raises(CheckpointError, match="norm: its replicated copies differ"):
        Replicate().join("norm", [{"norm": torch.zeros(2)}, {"norm": torch.ones(2)}])


def test_the_error_names_every_rule_and_the_legal_tp():
    with pytest.raises(ConfigError) as error:
        check_tp("mamba2", [Split(0, (Part(64, 8, "n_heads"), Part(64, 4, "n_groups", True)))], 3)
    assert str(error.value) == (
        "mamba2: tp=3 must divide n_heads (8), and divide or be a multiple of n_groups (4). "
        "Use tp=1, 2, 4 or 8."
    )
    with pytest.raises(ConfigError, match=r"mlp: tp=2 must divide d_ff \(7\)\. Use tp=1 or 7\."):
        check_tp("mlp", [Split(0, (Part(7, 7, "d_ff"),))], 2)
    with pytest.raises(ConfigError, match=r"must divide d_ff \(1\)\. Use tp=1\."):
        check_tp("mlp", [Split(0, (Part(1, 1, "d_ff"),))], 2)
    check_tp("norm", [Replicate()], 3)


@pytest.mark.parametrize(
    ("size", "world", "starts"),
    [
        # few rows a rank: as even as it goes
        (23, 4, [0, 5, 11, 17]),
        (3, 3, [0, 1, 2]),
        (127, 2, [0, 63]),
        # 64 rows a rank and more: boundaries at multiples of 16, below the even ones
        (128, 2, [0, 64]),
        (320, 4, [0, 80, 160, 240]),
        (330, 4, [0, 80, 160, 240]),
        (50277, 2, [0, 25136]),
        (50277, 4, [0, 12560, 25136, 37696]),
        (50277, 3, [0, 16752, 33504]),
    ],
)
def test_a_vocabulary_is_cut_into_neighbours_without_a_made_up_row(size, world, starts):
    part = Part(size, size, "vocab_size", uneven=True)
    spans = [part.range(world, rank) for rank in range(world)]
    assert [start for start, _ in spans] == starts
    assert [start + n for start, n in spans] == [*starts[1:], size]


@given(st.integers(1, 300_000), st.integers(1, 64))
def test_a_vocabularys_shares_are_whole_and_nearly_even(size, world):
    part = Part(size, size, "vocab_size", uneven=True)
    if size < world:
        assert not part.is_legal(world)
        return
    spans = [part.range(world, rank) for rank in range(world)]
    assert [start for start, _ in spans] == [sum(n for _, n in spans[:r]) for r in range(world)]
    assert sum(n for _, n in spans) == size
    lengths = [n for _, n in spans]
    assert min(lengths) >= 1
    # a boundary moves by less than 16 rows
    assert max(lengths) - min(lengths) <= 32


def test_a_vocabulary_smaller_than_the_ranks_is_refused():
    with pytest.raises(
        ConfigError, match=r"embed: tp=4 must not exceed vocab_size \(3\)\. Use tp="
    ):
        check_tp("embed", [Split(0, (Part(3, 3, "vocab_size", uneven=True),))], 4)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_join_undoes_an_uneven_shard(world):
    cut, full = Split(0, (Part(330, 330, "vocab_size", uneven=True),)), torch.randn(330, 2)
    shards = [cut.shard("embed.weight", full, world, rank) for rank in range(world)]
    for rank, shard in enumerate(shards):
        shapes = cut.local_shapes("embed.weight", full.shape, world, rank)
        assert {k: tuple(t.shape) for k, t in shard.items()} == shapes
    assert torch.equal(cut.join("embed.weight", shards), full)
