"""Ranks agree: one value, one error, and none of them waits for the others."""

import pytest
import torch
import torch.distributed as dist

from hybridzoo.errors import CheckpointError, ConfigError
from hybridzoo.parallel.agree import agreed, exchange, from_first, is_first, lowest
from tests import gloo


def caught(act):
    try:
        return act()
    except (CheckpointError, ConfigError) as error:
        return type(error).__name__, str(error)


def failing(_, ranks, alike):
    def act():
        with agreed():
            if dist.get_rank() in ranks:
                number = "" if alike else dist.get_rank()
                raise CheckpointError(f"{number}the disk is full.")
        return "went on"

    return caught(act)


@pytest.mark.parametrize(
    ("ranks", "alike", "end"),
    [
        ((), True, "went on"),
        ((1,), True, ("CheckpointError", "rank 1: the disk is full.")),
        ((0, 1), True, ("CheckpointError", "the disk is full.")),
        ((0, 1), False, ("CheckpointError", "rank 0: 0the disk is full.")),
    ],
    ids=["none", "one", "all", "different"],
)
def test_an_error_of_one_rank_is_the_error_of_all(ranks, alike, end):
    assert gloo.run(2, failing, ranks, alike) == [end, end]


def nested(_):
    def act():
        with agreed(), agreed():
            if not is_first():
                raise ConfigError("lr is wrong.")

    return caught(act)


def test_blocks_inside_each_other_name_the_rank_once():
    assert gloo.run(2, nested) == [("ConfigError", "rank 1: lr is wrong.")] * 2


def values(_):
    me = dist.get_rank()
    made = from_first(lambda: {"rank": me})
    return exchange(me + 5), made, lowest(me + 5, torch.device("cpu"))


def test_values_are_exchanged_and_the_first_ranks_are_everyones():
    assert gloo.run(2, values) == [([5, 6], {"rank": 0}, 5)] * 2


def refused(_):
    def refuse():
        raise ConfigError("output: it holds another run.")

    return caught(lambda: from_first(refuse))


def test_an_error_of_the_first_rank_reaches_those_that_wait_for_its_value():
    assert gloo.run(2, refused) == [("ConfigError", "rank 0: output: it holds another run.")] * 2


def test_a_process_of_its_own_agrees_with_itself():
    assert exchange(3) == [3]
    assert from_first(lambda: 4) == 4
    assert lowest(5, torch.device("cpu")) == 5
    with pytest.raises(ConfigError, match=r"^plain\.$"), agreed():
        raise ConfigError("plain.")
