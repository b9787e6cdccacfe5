"""Every published family, every variant: the reference's function, and the same bytes on export.

Where the reference is wrong, only its full forward over a row alone is compared with: it restarts
Mamba-1's state when several tokens continue a cache, forgets time_step_limit in one-token steps,
and lets padding leak where in_proj has a bias (shared/research/families.md, section 4).
"""

import copy
import hashlib
import json
import shutil

import pytest
import torch

from hybridzoo.checkpoint import convert, load, save
from hybridzoo.checkpoint.convert import CONVERTERS
from hybridzoo.errors import CheckpointError, HybridzooError
from hybridzoo.model import HybridLM
from tests import gloo
from tests.families import FAMILIES
from tests.families.base import LENGTH, N_GREEDY, change_tensors, is_pickled, opened

PAIRS = [(layout, variant) for layout, family in FAMILIES.items() for variant in family.variants]
# the files alone differ: their function is another variant's
RESPELLED = {"sparse", "first_names", "sharded", "bf16", "legacy", "fused"}
FUNCTIONS = [pair for pair in PAIRS if pair[1] not in RESPELLED]
# the other ways out differ in our own machinery, not in what a family's files are
EXPORTS = [
    pytest.param(*pair, way, marks=[pytest.mark.slow] if way != "convert" else [])
    for pair in PAIRS
    for way in ("convert", "save", "through native")
]
RELOADED = [(x, y) for x, y in PAIRS if FAMILIES[x].variants[y].reload]
TIED = [("jamba", "tied"), ("mamba", "plain"), ("mamba2", "one_group"), ("falcon_mamba", "plain")]
MOVES = [(layout, key) for layout, family in FAMILIES.items() for key in family.moves]
IDLE = [(layout, key) for layout, family in FAMILIES.items() for key in family.idle]


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request, made):
    return made(*request.param)


@pytest.fixture(params=FUNCTIONS, ids="-".join)
def function(request, made):
    return made(*request.param)


def close(got, want, tiny):
    """Tiny.tolerance: 20 times what fp32 rounding moves the reference's own logits."""
    torch.testing.assert_close(got, want, atol=tiny.tolerance, rtol=0)


@torch.no_grad()
def test_logits_are_the_references(pair):
    tiny, ours = pair
    close(ours(tiny.ids), tiny.logits, tiny)


@torch.no_grad()
def test_greedy_ids_are_the_references(function):
    tiny, ours = function
    ids = tiny.ids
    for _ in range(N_GREEDY):
        ids = torch.cat([ids, ours(ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids[:, LENGTH:], tiny.greedy)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(1,) * LENGTH, (8, 8, 5)], ids=["tokens", "chunks"])
def test_states_continue_the_sequence(function, chunks):
    tiny, ours = function
    state = ours.init_state(2, LENGTH)
    got = torch.cat([ours(part, state=state) for part in tiny.ids.split(chunks, 1)], 1)
    close(got, tiny.logits, tiny)


@torch.no_grad()
def test_left_padded_rows_are_the_rows_alone(function):
    tiny, ours = function
    alone = tiny.reference(tiny.ids[1:, 6:])
    ids, mask = tiny.ids.clone(), torch.ones_like(tiny.ids)
    ids[1, :6], mask[1, :6] = 0, 0
    got = ours(ids, attention_mask=mask)
    close(got[1:, 6:], alone, tiny)
    close(got[:1], tiny.logits[:1], tiny)


@torch.no_grad()
def test_packed_rows_are_the_rows_alone(function):
    # causal: the first 13 logits of a row are those of its first 13 ids alone
    tiny, ours = function
    ids = torch.cat([tiny.ids[0], tiny.ids[1, :13]])[None]
    starts = torch.tensor([0, LENGTH, LENGTH + 13], dtype=torch.int32)
    got = ours(ids, cu_seqlens=starts, max_seqlen=LENGTH)[0]
    close(got[:LENGTH], tiny.logits[0], tiny)
    close(got[LENGTH:], tiny.logits[1, :13], tiny)


def test_parameters_are_counted_like_the_references(pair):
    tiny, ours = pair
    assert ours.config.n_params() == sum(p.numel() for p in tiny.model.parameters())


def hashes(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


@pytest.mark.parametrize(("layout", "variant", "way"), EXPORTS)
def test_export_is_the_same_files_byte_for_byte(made, layout, variant, way, tmp_path):
    tiny, ours = made(layout, variant)
    target = tmp_path / "export"
    if way == "save":
        save(ours, target, layout=layout)
    elif way == "convert":
        convert(tiny.directory, target, layout=layout, from_pickle=is_pickled(tiny.directory))
    else:
        convert(tiny.directory, tmp_path / "native", from_pickle=is_pickled(tiny.directory))
        save(load(tmp_path / "native"), target, layout=layout)
    assert hashes(target) == hashes(tiny.directory)


@torch.no_grad()
def test_native_directory_computes_the_same(function, tmp_path):
    tiny, ours = function
    save(ours, tmp_path, max_shard_bytes=100_000)
    again = load(tmp_path)
    assert again.config == ours.config
    assert torch.equal(again(tiny.ids), ours(tiny.ids))


@pytest.mark.parametrize(("layout", "variant"), [pair for pair in RELOADED if pair in FUNCTIONS])
def test_reference_reads_the_newest_dialect(made, layout, variant, tmp_path):
    """Without source_layout nothing is remembered: every file is ours."""
    tiny, ours = made(layout, variant)
    fresh = HybridLM(ours.config.with_options(source_layout=None), init=False)
    fresh.load_state_dict(ours.state_dict())
    save(fresh, tmp_path, layout=layout, max_shard_bytes=50_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    theirs = FAMILIES[layout].variants[variant].reload(tmp_path)
    with torch.no_grad():
        close(theirs(tiny.ids), tiny.logits, tiny)


# transformers 5 has forgotten this first name of the embedding, and draws it at random instead.
@pytest.mark.parametrize(
    ("layout", "variant"), [pair for pair in RELOADED if pair != ("mamba", "first_names")]
)
def test_reference_reads_the_files_alike(made, layout, variant):
    """Old dialects and stale keys mean to us what they mean to it."""
    tiny, _ = made(layout, variant)
    with torch.no_grad():
        close(
            FAMILIES[layout].variants[variant].reload(tiny.directory)(tiny.ids), tiny.logits, tiny
        )


def sharded_logits(parallel, directory, ids):
    with torch.no_grad():
        return opened(directory, parallel=parallel)(ids)


@pytest.mark.slow
@pytest.mark.parametrize("layout", FAMILIES)
def test_two_ranks_compute_the_same(made, layout):
    tiny, _ = made(layout, "every")
    for logits in gloo.run(2, sharded_logits, tiny.directory, tiny.ids):
        close(logits, tiny.logits, tiny)


@torch.no_grad()
@pytest.mark.parametrize(("layout", "key"), MOVES)
def test_key_moves_the_logits_or_is_refused(made, layout, key, tmp_path):
    """Negative control: the comparison with the reference would see each key read wrongly."""
    tiny, _ = made(layout, "every")
    target = tiny.edited(tmp_path / "changed", **{key: FAMILIES[layout].moves[key]})
    try:
        moved = opened(target)(tiny.ids) - tiny.logits
    except HybridzooError as refused:
        assert str(target) in str(refused) and "\n" not in str(refused)
    else:
        assert moved.abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("layout", "key"), IDLE)
def test_key_that_computes_nothing_is_ignored(made, layout, key, tmp_path):
    tiny, ours = made(layout, "every")
    target = tiny.edited(tmp_path / "changed", **{key: FAMILIES[layout].idle[key]})
    # 1e-5: another chunk_size rounds the scan otherwise
    torch.testing.assert_close(opened(target)(tiny.ids), ours(tiny.ids), atol=1e-5, rtol=0)


def test_every_family_is_tested():
    assert set(FAMILIES) == set(CONVERTERS)


@pytest.mark.parametrize("layout", FAMILIES)
def test_every_key_is_known_to_move_the_logits_or_not(layout):
    family = FAMILIES[layout]
    assert family.keys <= family.moves.keys() | family.idle.keys()
    assert not family.moves.keys() & family.idle.keys()


@pytest.mark.parametrize("layout", FAMILIES)
def test_bf16_file_keeps_each_tensors_dtype(made, layout, tmp_path):
    tiny, ours = made(layout, "bf16")
    model = opened(tiny.directory)
    for name, p in model.config.params():
        stays = torch.float32 if p.fp32 else torch.bfloat16
        assert model.get_parameter(name).dtype == stays, name
    save(model, tmp_path / "export", layout=layout)
    assert hashes(tmp_path / "export") == hashes(tiny.directory)
    save(model, tmp_path / "wide", layout=layout, dtype=torch.float32)
    if not is_pickled(tiny.directory):
        assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float32"
    wide = opened(tmp_path / "wide")
    for name, t in ours.state_dict().items():
        assert torch.equal(wide.state_dict()[name], t) and wide.state_dict()[name].dtype == t.dtype


@torch.no_grad()
@pytest.mark.parametrize("layout", [layout for layout, variant in RELOADED if variant == "bf16"])
def test_bf16_errs_no_more_than_the_reference_in_bf16(made, layout):
    """The residual's dtype and the norms' casts are the family's; 2: two ways to round alike."""
    tiny, _ = made(layout, "bf16")
    theirs = copy.deepcopy(tiny.model).bfloat16()(tiny.ids) - tiny.logits
    ours = load(tiny.directory)(tiny.ids) - tiny.logits
    assert ours.square().mean() <= 2**2 * theirs.square().mean()


@pytest.mark.parametrize(("layout", "variant"), TIED)
def test_tied_head_written_out_is_read_and_written_again(made, layout, variant, tmp_path):
    tiny, ours = made(layout, variant)
    source = tmp_path / "copy"
    shutil.copytree(tiny.directory, source)

    def write_out(tensors):
        (embed,) = (t for name, t in tensors.items() if "embed" in name)
        return tensors | {"lm_head.weight": embed.clone()}

    change_tensors(source, write_out)
    model = load(source)
    assert model.config.n_params() == ours.config.n_params()
    save(model, tmp_path / "export", layout=layout)
    assert hashes(tmp_path / "export") == hashes(source)
    change_tensors(source, lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1})
    with pytest.raises(CheckpointError, match="tied weights are one"):
        load(source)
