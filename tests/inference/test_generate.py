"""generate and stream: against the full forward, row by row, and the ways a row ends."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from hybridzoo import HybridConfig, HybridLM
from hybridzoo.errors import ConfigError
from hybridzoo.inference.generate import generate, stream
from hybridzoo.inference.sampling import sample

VOCAB = 97


def mixed_model(seed=0, **options):
    """Every kind once, float64: then rows and chunks differ by 1e-15, far below a gap of logits."""
    config = HybridConfig(
        d_model=32,
        vocab_size=VOCAB,
        pattern="MF NE AF W[MA]E",
        layers={
            "M": {"kind": "mamba1", "d_state": 4, "x_norm": "learned"},
            "N": {"kind": "mamba2", "d_state": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
            "A": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2, "rope_fraction": 0.5},
            "W": {"kind": "attention", "n_heads": 4, "window_size": 5},
            "F": {"kind": "mlp", "d_ff": 40},
            "E": {"kind": "moe", "d_ff": 24, "n_experts": 4, "top_k": 2},
        },
        tie_embeddings=False,
        **options,
    )
    return HybridLM(config, seed=seed, dtype=torch.float64)


@pytest.fixture(scope="module")
def model():
    return mixed_model()


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))


def recomputed(model, ids, n, choose):
    """What a loop of full forwards without any state gives; choose takes (b, v) logits."""
    for _ in range(n):
        with torch.no_grad():
            new = choose(model(ids)[:, -1])
        ids = torch.cat([ids, new[:, None]], 1)
    return ids


def padded(rows, fill=0):
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.full((width - len(r),), fill), r]) for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask


def test_greedy_is_the_best_id_of_a_full_forward(model, prompt):
    got = generate(model, prompt, max_new_tokens=20, temperature=0)
    expected = recomputed(model, prompt, 20, lambda logits: logits.argmax(-1))
    assert got.tolist() == expected.tolist()
    # the test would see little if the rows were constant or alike
    assert all(len(set(row)) > 5 for row in got[:, 11:].tolist())
    assert got.dtype == torch.int64


def test_one_new_token_is_one_forward(model, prompt):
    got = generate(model, prompt[:, :1], max_new_tokens=1, temperature=0)
    expected = recomputed(model, prompt[:, :1], 1, lambda logits: logits.argmax(-1))
    assert got.tolist() == expected.tolist()


def test_sampling_is_sample_on_the_logits_of_a_full_forward(model, prompt):
    options = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
    got = generate(model, prompt[:1], max_new_tokens=20, seed=5, **options)
    generator = torch.Generator().manual_seed(5)
    expected = recomputed(model, prompt[:1], 20, partial(sample, generator=generator, **options))
    assert got.tolist() == expected.tolist()


def test_repetition_penalty_sees_the_prompt_and_the_new_ids_but_no_padding(model, prompt):
    rows = [prompt[0], prompt[1, :4]]
    options = {"max_new_tokens": 30, "temperature": 0, "repetition_penalty": 1e6}
    alone = [generate(model, row[None], **options)[0, len(row) :].tolist() for row in rows]
    # the padding is the very id that its row will choose first
    ids, mask = padded(rows, fill=alone[1][0])
    got = generate(model, ids, attention_mask=mask, **options)[:, 11:].tolist()
    assert got == alone
    for new, row in zip(got, rows, strict=True):
        assert len(set(new)) == 30
        assert not set(new) & set(row.tolist())


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"seed": [7, 8, 9], "top_k": 30}], ids=["greedy", "drawn"]
)
def test_left_padded_rows_are_the_rows_alone(model, prompt, options):
    rows = [prompt[0], prompt[1, :3], prompt[2, :1]]
    # the padding's id is one that would matter if it were read
    ids, mask = padded(rows, fill=5)
    got = generate(model, ids, attention_mask=mask, max_new_tokens=15, **options)
    assert got[:, :11].tolist() == ids.tolist()
    for i, row in enumerate(rows):
        own = {**options, "seed": options["seed"][i]} if "seed" in options else options
        alone = generate(model, row[None], max_new_tokens=15, **own)
        assert got[i, 11:].tolist() == alone[0, len(row) :].tolist()


@pytest.mark.parametrize("chunk", [1, 2, 4, 10, 11, 50])
def test_chunks_of_the_prompt_change_nothing(model, prompt, chunk):
    ids, mask = padded([prompt[0], prompt[1, :3], prompt[2, :8]])
    options = {"attention_mask": mask, "max_new_tokens": 12, "temperature": 0}
    whole = generate(model, ids, **options)
    assert generate(model, ids, prefill_chunk=chunk, **options).tolist() == whole.tolist()


def test_prompt_is_prefilled_in_chunks_and_the_head_reads_one_position(model, prompt, monkeypatch):
    lengths, heads = [], []
    hidden, logits = model.hidden, model.logits
    monkeypatch.setattr(model, "hidden", lambda i, *a: lengths.append(i.shape[1]) or hidden(i, *a))
    monkeypatch.setattr(model, "logits", lambda h: heads.append(tuple(h.shape)) or logits(h))
    generate(model, prompt, max_new_tokens=3, temperature=0, prefill_chunk=4)
    assert lengths == [4, 4, 3, 1, 1]
    assert heads == [(3, 32)] * 3


def test_one_seed_gives_one_text_and_another_gives_another(model, prompt):
    first, again, other = (
        generate(model, prompt, max_new_tokens=12, seed=seed).tolist() for seed in (3, 3, 4)
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_without_a_seed_every_call_is_fresh_and_torchs_own_generator_is_left_alone(model, prompt):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = generate(model, prompt, max_new_tokens=12).tolist()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    assert generate(model, prompt, max_new_tokens=12).tolist() != first


def test_rows_of_one_seed_draw_apart_and_do_not_feel_other_rows(model, prompt):
    same = prompt[:1].expand(4, -1)
    got = generate(model, same, max_new_tokens=12, seed=3)
    assert len({tuple(row) for row in got.tolist()}) == 4
    fewer = generate(model, same[:2], max_new_tokens=12, seed=3)
    assert fewer.tolist() == got[:2].tolist()
    # row 1 of a seed is not row 0 of the next
    assert generate(model, same[:1], max_new_tokens=12, seed=4).tolist() != got[1:2].tolist()


def greedy_rows(model, prompt, n=20):
    return generate(model, prompt, max_new_tokens=n, temperature=0)[:, prompt.shape[1] :].tolist()


def test_rows_end_at_a_stop_id_by_themselves_and_repeat_it(model, prompt):
    free = greedy_rows(model, prompt)
    stop = free[0][4]
    assert stop not in free[0][:4]
    ends = [row.index(stop) if stop in row else None for row in free]
    assert len(set(ends)) > 1, "the rows should end apart for this test to see anything"
    got = generate(model, prompt, max_new_tokens=20, temperature=0, stop=stop)
    width = 20 if None in ends else max(ends) + 1
    assert got.shape == (3, 11 + width)
    for row, own, end in zip(got[:, 11:].tolist(), free, ends, strict=True):
        kept = width if end is None else end + 1
        assert row == own[:kept] + [stop] * (width - kept)


def test_any_of_several_stop_ids_ends_a_row_and_the_loop_with_the_last(model, prompt):
    free = greedy_rows(model, prompt)
    stops = [free[0][2], free[1][5], free[2][3]]
    ends = [min(row.index(s) for s in stops if s in row) for row in free]
    got = generate(model, prompt, max_new_tokens=20, temperature=0, stop=stops)[:, 11:].tolist()
    width = max(ends) + 1
    assert width < 20
    for row, own, end in zip(got, free, ends, strict=True):
        assert row == own[: end + 1] + [own[end]] * (width - end - 1)


def test_stop_sequence_ends_a_row_only_as_a_whole_and_only_in_new_tokens(model, prompt):
    free = greedy_rows(model, prompt[:1])[0]
    sequence = free[5:8]
    options = {"max_new_tokens": 20, "temperature": 0}
    got = generate(model, prompt[:1], stop=[sequence], **options)
    assert got[0, 11:].tolist() == free[:8]
    broken = [sequence[0], (sequence[1] + 1) % VOCAB, sequence[2]]
    assert generate(model, prompt[:1], stop=[broken], **options)[0, 11:].tolist() == free
    # the prompt's last id and the first new one are no stop: the sequence must be new as a whole
    across = [int(prompt[0, -1]), free[0]]
    assert generate(model, prompt[:1], stop=[across], **options).shape == (1, 31)


def test_row_that_a_sequence_ended_stays_ended(model, prompt):
    free = greedy_rows(model, prompt)
    sequence = free[0][5:8]
    options = {"max_new_tokens": 20, "temperature": 0, "stop": [sequence]}
    got = generate(model, prompt, **options)[:, 11:].tolist()
    assert got == [free[0][:8] + [sequence[-1]] * 12, *free[1:]]


def test_without_a_stop_nothing_ends_whatever_eos_the_config_names(prompt):
    free = greedy_rows(mixed_model(), prompt[:1])[0]
    named = mixed_model(eos_token_id=free[3])
    assert greedy_rows(named, prompt[:1])[0] == free
    assert generate(named, prompt[:1], max_new_tokens=20, temperature=0, stop=[]).shape == (1, 31)


def test_stream_yields_what_generate_joins(model, prompt):
    options = {"max_new_tokens": 9, "seed": 2, "stop": [[3, 4]]}
    steps = list(stream(model, prompt, **options))
    assert all(step.shape == (3,) for step in steps)
    whole = generate(model, prompt, **options)
    assert torch.stack(steps, 1).tolist() == whole[:, 11:].tolist()


def test_stream_computes_a_step_only_when_it_is_asked_for_and_records_no_gradients(
    model, prompt, monkeypatch
):
    seen = []
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda *a: seen.append(torch.is_grad_enabled()) or hidden(*a)
    )
    steps = stream(model, prompt, max_new_tokens=9)
    assert seen == []
    next(steps)
    assert seen == [False]
    next(steps)
    assert seen == [False, False]


def test_model_and_grad_mode_are_left_as_they_were(prompt):
    model = mixed_model(dropout=0.5)
    model.train()
    model.blocks[2].eval()
    flags = [module.training for module in model.modules()]
    greedy = {"max_new_tokens": 6, "temperature": 0}
    steps = stream(model, prompt, **greedy)
    got = []
    for step in steps:
        assert torch.is_grad_enabled()
        assert [module.training for module in model.modules()] == flags
        got.append(step)
    # dropout would change the tokens
    expected = generate(model.eval(), prompt, **greedy)
    assert torch.stack(got, 1).tolist() == expected[:, 11:].tolist()
    # an id that came out can go into a forward that is differentiated
    model.train()(torch.stack(got, 1)).sum().backward()


def test_training_flags_come_back_after_an_error(model, prompt, monkeypatch):
    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(model, "hidden", broken)
    model.train()
    with pytest.raises(RuntimeError):
        generate(model, prompt)
    assert model.training


def test_method_of_the_model_is_this_function(model, prompt):
    got = model.generate(prompt, max_new_tokens=3, seed=0)
    assert_close(got, generate(model, prompt, max_new_tokens=3, seed=0))


def test_ids_of_any_integer_dtype(model, prompt):
    short = generate(model, prompt.to(torch.uint8), max_new_tokens=3, temperature=0)
    assert_close(short, generate(model, prompt, max_new_tokens=3, temperature=0))


IDS = torch.tensor([[1, 2, 3]])
MISTAKES = {
    "floats": ({"input_ids": IDS.float()}, r"input_ids is torch.float32 of shape \(1, 3\)"),
    "flat": ({"input_ids": IDS[0]}, r"of shape \(3,\); prompts are integers, \(b, l\)"),
    "empty prompt": ({"input_ids": IDS[:, :0]}, r"empty \(1, 0\); a prompt has at least one token"),
    "empty batch": ({"input_ids": IDS[:0]}, r"empty \(0, 3\)"),
    "id above": ({"input_ids": IDS + 94}, "holds 97; the model's ids are 0 to 96"),
    "id below": ({"input_ids": IDS - 2}, "holds -1; the model's ids are 0 to 96"),
    "mask shape": ({"attention_mask": IDS[0]}, r"mask is \(3,\) for input_ids of \(1, 3\)"),
    "right padding": ({"attention_mask": torch.tensor([[1, 1, 0]])}, r"row 0 \(1, 1, 0\).*left"),
    "hole": (
        {"input_ids": IDS.expand(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])},
        r"end of row 1 \(1, 0, 1\).*left",
    ),
    "all padding": ({"attention_mask": torch.zeros(1, 3)}, r"row 0 \(0, 0, 0\)"),
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens is 0; it counts tokens, >= 1"),
    "chunk": ({"prefill_chunk": 0}, "prefill_chunk is 0"),
    "temperature": ({"temperature": -1.0}, "temperature cannot be -1.0"),
    "top_k": ({"top_k": 0}, "top_k cannot be 0"),
    "stop id": ({"stop": 97}, r"stop holds \[97\].*from 0 to 96"),
    "empty stop": ({"stop": [[3], []]}, r"stop holds \[\]"),
    "seeds": ({"seed": [1, 2]}, r"seed is 1, 2; .*each row \(1\)"),
    "seed": ({"seed": -1}, "seed is -1; "),
}  # fmt: skip


@pytest.mark.parametrize("change, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_sentence_at_the_call(model, change, message):
    """From stream, before its first step: the model has not run."""
    with pytest.raises(ConfigError, match=message) as caught:
        stream(model, **{"input_ids": IDS, **change})
    assert "\n" not in str(caught.value)
