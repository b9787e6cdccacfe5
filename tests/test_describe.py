"""A config in figures: against counts made by hand."""

import pytest

from hybridzoo import HybridConfig
from hybridzoo.describe import CONTEXTS, draw, facts, row_name

# widths small enough to count: every product below is written out from the kinds' definitions
OPTIONS = {
    "name": "hand",
    "d_model": 8,
    "vocab_size": 10,
    "pattern": "S[MA]F | SFE",
    "layers": {
        "S": {"shared": "base"},
        "M": {"kind": "mamba1", "d_state": 2, "d_conv": 3, "expand": 2, "dt_rank": 1},
        "A": {"kind": "attention", "n_heads": 2, "n_kv_heads": 1},
        "F": {"kind": "mlp", "d_ff": 5},
        "E": {"kind": "moe", "d_ff": 3, "n_experts": 4, "top_k": 2},
    },
    "shared": {"base": {"kind": "attention", "n_heads": 2, "head_dim": 3}},
    "layers_at": {4: {"d_ff": 7}},
}
# in_proj, conv and its bias, x_proj (dt, B, C), dt_proj and its bias, A_log, D, out_proj
MAMBA = 8 * 32 + 16 * 3 + 16 + 16 * (1 + 2 + 2) + 16 + 16 + 16 * 2 + 16 + 16 * 8
# q of 2 heads of 4; k and v of 1; out
ATTENTION = 8 * (8 + 4 + 4) + 8 * 8
# q, k, v of 2 heads of 3; out
SHARED = 8 * 18 + 6 * 8
# gate, up, down
MLP, WIDER = 3 * 8 * 5, 3 * 8 * 7
EXPERT, ROUTER = 3 * 8 * 3, 4 * 8
# the embedding is the head; a norm before each of 6 places, and the final one
REST = 10 * 8 + 7 * 8
K, M = CONTEXTS


def config(**changes):
    return HybridConfig.from_dict(OPTIONS | changes)


def test_parameters_are_those_counted_by_hand():
    found = facts(config())
    once = MAMBA + ATTENTION + SHARED + MLP + WIDER + ROUTER + REST
    assert found["n_params"] == once + 4 * EXPERT
    assert found["n_active_params"] == once + 2 * EXPERT
    assert found["weight_bytes_fp32"] == 4 * found["n_params"]
    # A_log, D and dt_bias stay in fp32 in a model in bf16
    assert found["weight_bytes"] == 2 * found["n_params"] + 2 * (16 * 2 + 16 + 16)


def test_stack_is_counted_in_places_and_stages():
    found = facts(config())
    assert (found["name"], found["d_model"], found["vocab_size"]) == ("hand", 8, 10)
    assert (found["n_places"], found["n_stages"]) == (6, 2)
    assert found["pattern"] == "S[MA]F | SFE"


def test_a_letter_has_a_row_with_its_places_and_one_layer_s_parameters():
    rows = {row_name(row): row for row in facts(config())["layers"]}
    assert list(rows) == ["S", "M", "A", "F at 2", "F at 4", "E"]
    counted = {letter: (r["kind"], r["count"], r["n_params"]) for letter, r in rows.items()}
    assert counted == {
        "S": ("attention", 2, SHARED),
        "M": ("mamba1", 1, MAMBA),
        "A": ("attention", 1, ATTENTION),
        "F at 2": ("mlp", 1, MLP),
        # wider by layers_at
        "F at 4": ("mlp", 1, WIDER),
        "E": ("moe", 1, ROUTER + 4 * EXPERT),
    }
    assert {letter for letter, row in rows.items() if "shared" in row} == {"S"}
    assert rows["S"]["shared"] == "base"
    assert rows["F at 2"]["options"] == {"d_ff": 5}
    assert "kind" not in rows["M"]["options"]


def test_state_is_that_of_each_place_though_weights_are_shared():
    found = facts(config())
    # fp32 scan state and bf16 window of 2 past inputs
    mamba = 16 * 2 * 4 + 16 * 2 * 2
    for context in CONTEXTS:
        # keys and values in bf16 and an int32 position
        own, shared = 2 * context * 4 * 2 + 4, 2 * context * 6 * 2 + 4
        assert found["state_bytes"][context] == mamba + own + 2 * shared


def test_operations_grow_with_the_context_by_the_attentions_alone():
    flops = facts(config())["flops_per_token"]
    # a key and a value, multiplied and added, for 8 + 2 x 6 query widths
    assert flops[M] - flops[K] == (M - K) * 2 * 2 * (8 + 6 + 6)


def test_transformer_has_the_model_s_own_attention_in_every_mixing_place():
    found = facts(config())
    # S, [MA] and S mix along the sequence; most places' attention is the shared one
    assert found["transformer"] == (
        "attention with 2 key/value heads of 3 in all 3 sequence-mixing places"
    )
    for context in CONTEXTS:
        cache = 2 * context * 6 * 2 + 4
        assert found["transformer_state_bytes"][context] == 3 * cache


def test_transformer_of_a_model_without_attention_has_heads_of_a_usual_width():
    def twin(d_model):
        layers = {"M": OPTIONS["layers"]["M"]}
        return facts(config(pattern="4M", d_model=d_model, layers=layers, layers_at={}, shared={}))

    assert "2 key/value heads of 128" in twin(256)["transformer"]
    assert "3 key/value heads of 64" in twin(192)["transformer"]
    assert "1 key/value head of 24" in twin(24)["transformer"]
    found = twin(256)
    # 2 of 4 places, keys and values of 256, bf16; the model's own does not grow
    assert found["transformer_state_bytes"][M] == 2 * (2 * 256 * 2 * M + 4)
    assert found["state_bytes"][K] == found["state_bytes"][M]


@pytest.mark.parametrize(
    "pattern, where, n",
    [
        ("4M", "2 of 4 places", 2),
        ("5M", "3 of 5 places", 3),
        ("2(MMF)", "3 of 6 places", 3),
        ("2(MF)", "all 2 sequence-mixing places", 2),
        ("FMF", "all 1 sequence-mixing places", 1),
    ],
)
def test_transformer_has_a_feed_forward_layer_for_every_attention(pattern, where, n):
    layers = {letter: OPTIONS["layers"][letter] for letter in set(pattern) & set("MF")}
    found = facts(config(pattern=pattern, layers=layers, layers_at={}, shared={}))
    assert found["transformer"].endswith(f" in {where}")
    # one head of 8, keys and values in bf16, and a position
    assert found["transformer_state_bytes"][K] == n * (2 * 8 * 2 * K + 4)


def test_parallel_place_mixes_if_one_of_its_branches_does():
    assert (
        "in all 2 sequence-mixing places"
        in facts(config(pattern="[MF]AF", layers_at={}))["transformer"]
    )


def test_model_without_a_mixer_has_no_state():
    layers = {"F": OPTIONS["layers"]["F"]}
    found = facts(config(pattern="2F", layers=layers, layers_at={}, shared={}))
    assert found["state_bytes"] == found["transformer_state_bytes"] == dict.fromkeys(CONTEXTS, 0)


def test_drawing_has_a_cell_a_place_and_a_bar_at_a_cut():
    assert draw(config()) == [(0, ["S", "[MA]", "F", "|", "S", "F", "E"])]


def test_drawing_breaks_rows_by_places_and_a_cut_opens_the_row_it_falls_on():
    assert draw(config(), per_row=3) == [(0, ["S", "[MA]", "F"]), (3, ["|", "S", "F", "E"])]
    assert draw(config(), per_row=4) == [(0, ["S", "[MA]", "F", "|", "S"]), (4, ["F", "E"])]
