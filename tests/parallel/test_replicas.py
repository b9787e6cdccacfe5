"""What several tp ranks hold stays equal to the bit, though they hold other rows of a vocabulary.

Of three numbers the order counts in which they are added, and that depends on where an element lies
in DeepSpeed's buffers: behind more rows on one rank than on the other.
"""

import os
from dataclasses import dataclass

import pytest

from hybridzoo.config import HybridConfig
from hybridzoo.model import HybridLM
from hybridzoo.parallel import groups
from hybridzoo.parallel.engine import Engine, initialize
from hybridzoo.parallel.stages import stages
from tests import gloo
from tests.models import tiny
from tests.parallel.test_pipeline import OPTIONS, Case, check, train

pytestmark = pytest.mark.slow

# B and C are whole on both; wide, for a small one would show nothing
WIDE = {**OPTIONS["layers"], "M": tiny("mamba2", n_groups=1, d_state=256)}
SIZES = {"vocab_size": 159, "d_model": 64, "layers": WIDE, "tie_embeddings": True}


@dataclass(frozen=True, kw_only=True)
class Uneven(Case):
    tp: int = 2
    dp: int = 3
    pattern: str = "M M M F"

    def config(self):
        return HybridConfig.from_dict({**OPTIONS, **SIZES, "pattern": self.pattern})


def job(_, case):
    os.environ["LOCAL_RANK"] = "0"
    parallel = groups.init(tp=case.tp, pp=case.pp, ep=case.ep)
    part = stages(case.config(), case.pp, "auto")[parallel.pp.rank]
    model = HybridLM(case.config(), seed=5, parallel=parallel, stage=part)
    seen = train(initialize(model, case.recipe()), case, [parallel.dp.rank])
    seen.place = (parallel.pp.rank, parallel.dp.rank, parallel.tp.rank)
    return seen


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_copies_of_tp_ranks_are_equal_at_three_data_parallel_ranks(zero):
    case = Uneven(zero=zero)
    check(case, gloo.run(case.world, job, case))


# a tied embedding and a shared layer of two stages; norms, which two tp ranks hold
FROZEN = ("embed", "shared", "norm", "blocks.0.norm")


def freeze(model):
    for name, _, locals_ in model.local_names():
        for local in locals_.values() if name.startswith(FROZEN) else ():
            model.get_parameter(local).requires_grad_(False)
    return model


def frozen(_, case):
    os.environ["LOCAL_RANK"] = "0"
    parallel = groups.init(tp=case.tp, pp=case.pp)
    part = stages(case.config(), case.pp, "auto")[parallel.pp.rank]
    model = freeze(HybridLM(case.config(), seed=5, parallel=parallel, stage=part))
    engine = initialize(model, case.recipe())
    return [engine.step(case.parts(i, parallel.dp.rank), 0.01) for i in range(2)]


@pytest.mark.parametrize(
    "change",
    [{"pp": 2, "tp": 1, "dp": 1, "pattern": "F S F | F S F"}, {"zero": 0}],
    ids=["pp", "tp"],
)
def test_what_a_user_froze_stays_out_of_it(change):
    case = Uneven(**change)
    engine = Engine(freeze(HybridLM(case.config(), seed=5)), case.recipe())
    for i, seen in enumerate(zip(*gloo.run(case.world, frozen, case), strict=True)):
        expected = engine.step([b for dp in range(case.dp) for b in case.parts(i, dp)], 0.01)
        for outcome in seen:
            assert outcome.nats == pytest.approx(expected.nats, rel=1e-5)
            assert outcome.norm == pytest.approx(expected.norm, rel=1e-4)


@pytest.mark.soak
@pytest.mark.parametrize(
    "change",
    [
        {"dp": 6, "ep": 2, "pattern": "M E M E", "zero": 0},
        {"dp": 6, "ep": 2, "pattern": "M E M E", "zero": 1},
        {"pp": 2, "pattern": "M S M | M S M", "zero": 0},
        {"pp": 2, "pattern": "M S M | M S M", "zero": 1},
    ],
)
def test_also_with_experts_and_stages(change):
    case = Uneven(**change)
    check(case, gloo.run(case.world, job, case))
