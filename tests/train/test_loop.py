"""The loop learns, accumulates, guards, logs, and refuses what cannot run."""

import io
import json
import math
import os
import shutil
import signal

import pytest
import torch
from rich.console import Console

from hybridzoo.checkpoint import load, save
from hybridzoo.comm import SINGLE, Axis, Parallel
from hybridzoo.errors import ConfigError
from hybridzoo.parallel.optim import Average
from hybridzoo.tokenizer import load_tokenizer
from hybridzoo.train import loop
from hybridzoo.train.held_out import batches, held_out
from hybridzoo.train.log import plot, read_log
from hybridzoo.train.loop import Trainer, train
from tests.train import runs


def test_a_tiny_model_overfits_a_fixed_batch(tmp_path):
    recipe = runs.recipe(tmp_path, steps=80, ema=0.0, lr=2e-2)
    trainer = Trainer(recipe, False, runs.quiet())
    for block in trainer.model.blocks:
        block.dropout = 0.0
    batches = trainer._batches(0)
    losses = [trainer._update(batches).nats for _ in range(80)]
    # nothing to learn but 96 bytes: from log(260) to almost certain
    assert losses[0] == pytest.approx(math.log(260), abs=0.2)
    assert losses[-1] < 0.2


def gradients_of(trainer, step):
    """What one step's update is made from, and its outcome."""
    seen, update = {}, trainer.engine.optimizer.step

    def watched():
        seen.update({k: p.grad.clone() for k, p in trainer.engine.params.items()})
        update()

    trainer.engine.optimizer.step = watched
    return seen, trainer._update(trainer._batches(step))


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_accumulation_is_the_large_batch(tmp_path, packing):
    """Same gradients and loss from 1, 2 and 4 parts of the same sequences.

    Without dropout, and without the balance loss, which is of each part by itself.
    """
    data = {"source": str(tmp_path / "text.txt"), "seq_len": 24, "packing": packing}
    found = []
    for n in (1, 2, 4):
        options = {"accumulate": n, "data": data, "output": str(tmp_path / f"{n}")}
        recipe = runs.recipe(tmp_path, **options, clip_norm=None)
        plain = runs.MODEL.replace("dropout: 0.2", "dropout: 0.0")
        plain = plain.replace("top_k: 2", "top_k: 2, aux_loss: 0.0")
        (tmp_path / "model.yaml").write_text(plain)
        trainer = Trainer(recipe, False, runs.quiet())
        found.append(gradients_of(trainer, 3))
    (expected, whole), *rest = found
    for got, outcome in rest:
        assert outcome.n_targets == whole.n_targets
        # fp32: its sums in another order
        assert outcome.nats == pytest.approx(whole.nats, rel=1e-6)
        # fp32: sums over the sequences in another order
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_to_the_norm(tmp_path):
    trainer = Trainer(runs.recipe(tmp_path, clip_norm=0.01), False, runs.quiet())
    gradients, outcome = gradients_of(trainer, 0)
    assert outcome.norm > 0.1
    squares = sum(g.square().sum() for g in gradients.values())
    assert squares.sqrt().item() == pytest.approx(0.01, rel=1e-3)


def test_an_update_that_is_not_finite_is_skipped_and_named(tmp_path, monkeypatch):
    """Step 3 gives NaN: weights, moments and average stay; the next step goes on."""
    console = runs.quiet()
    trainer = Trainer(runs.recipe(tmp_path, steps=4, eval_every=0), False, console)
    clip, snapshots = torch.nn.utils.clip_grad_norm_, []

    def poisoned(*args):
        norm = clip(*args)
        snapshots.append({k: p.detach().clone() for k, p in trainer.engine.params.items()})
        return torch.tensor(math.nan) if trainer.step == 2 else norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    trainer.run([])
    assert "step 3: loss" in runs.said(console)
    assert "gradient norm nan; this update is skipped." in runs.said(console)
    records = read_log(tmp_path / "run" / "log.jsonl")
    assert ["skipped" in r for r in records] == [False, False, True, False]
    runs.assert_same(snapshots[2], snapshots[3])
    assert not torch.equal(snapshots[1]["embed.weight"], snapshots[2]["embed.weight"])


def test_ten_skipped_updates_in_a_row_end_the_run(tmp_path):
    recipe = runs.recipe(tmp_path, steps=50, eval_every=0)
    trainer = Trainer(recipe, False, runs.quiet())
    with torch.no_grad():
        trainer.model.norm.weight.fill_(math.inf)
    with pytest.raises(ConfigError, match=r"10 steps in a row \(1 to 10\); the run diverged\. "):
        trainer.run([])
    assert len(read_log(tmp_path / "run" / "log.jsonl")) == 9


def test_a_run_leaves_what_it_promises(tmp_path):
    console = runs.quiet()
    last = train(runs.recipe(tmp_path), console=console)
    root = tmp_path / "run"
    assert sorted(p.name for p in root.iterdir()) == [
        *["best", "latest", "log.jsonl", "loss.png", "step-00000009", "step-00000012"]
    ]
    assert last == root / "step-00000012"
    assert (root / "latest").read_text() == "step-00000012\n"
    assert (root / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = read_log(root / "log.jsonl")
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
    assert [r["step"] for r in records if "val_loss" in r] == [4, 8, 12]
    step = next(r for r in records if "loss" in r)
    assert step.keys() == {
        *["step", "lr", "loss", "bits_per_byte", "aux", "grad_norm", "tokens_per_s"]
    }
    val = next(r for r in records if "val_loss" in r)
    assert val["val_bits_per_byte"] == pytest.approx(val["val_loss"] / math.log(2), rel=0.01)
    assert [len(share) for share in val["expert_load"].values()] == [3]
    assert sum(*val["expert_load"].values()) == pytest.approx(1)
    lines = runs.said(console).splitlines()
    n = load(last).config.n_params()
    assert lines[0].startswith(f"smallest: {n:,} parameters (")
    assert lines[0].endswith("fp32, on CPU; 12 steps of 96 tokens")
    assert lines[1].startswith("kernels: attention ")
    assert "ssd reference" in lines[1]


def test_best_holds_the_averaged_weights_of_the_lowest_loss(tmp_path):
    recipe = runs.recipe(tmp_path, steps=6, eval_every=3)
    trainer = Trainer(recipe, False, runs.quiet())
    trainer.run([])
    losses = [r["val_loss"] for r in read_log(tmp_path / "run" / "log.jsonl") if "val_loss" in r]
    assert losses[1] < losses[0] == max(losses)
    best = load(tmp_path / "run" / "best")
    assert not torch.equal(best.embed.weight, trainer.model.embed.weight)
    for name, tensor in trainer.average.tensors.items():
        assert torch.equal(best.get_parameter(name), tensor), name
    # a worse evaluation leaves it
    with torch.no_grad():
        for tensor in trainer.average.tensors.values():
            tensor.normal_()
    records = []
    trainer.log.write = records.append
    trainer._evaluate()
    assert not records[0]["is_best"]
    runs.assert_same(dict(load(tmp_path / "run" / "best").state_dict()), dict(best.state_dict()))


def test_held_out_loss_is_the_mean_over_every_held_out_byte(tmp_path):
    recipe = runs.recipe(tmp_path, ema=0.0, eval_batches=0)
    trainer = Trainer(recipe, False, runs.quiet())
    value, _ = held_out(trainer.engine, trainer.data)
    text = runs.TEXT[len(runs.TEXT) - len(runs.TEXT) // 20 :]
    assert trainer.data.documents("val").n_targets == len(text)
    counts = [int((b["labels"] != -100).sum()) for b in batches(trainer.data, 0)]
    assert sum(counts) == len(text)
    assert value == pytest.approx(math.log(260), abs=0.1)


def test_dropout_is_off_when_evaluating_and_on_again_after(tmp_path):
    def nats_of(n, step):
        recipe = runs.recipe(tmp_path, output=str(tmp_path / n))
        trainer = Trainer(recipe, False, runs.quiet())
        first, second = (held_out(trainer.engine, trainer.data) for _ in range(2))
        assert first == second
        trainer.step = step
        nats = trainer._update(trainer._batches(0)).nats
        assert trainer.model.training
        return nats

    # the same step draws the same dropout, another step another
    assert nats_of("a", 0) == nats_of("b", 0)
    assert nats_of("c", 1) != nats_of("d", 0)


def test_ranks_that_compute_the_same_values_draw_the_same_dropout(tmp_path):
    """And others do not: each data-parallel rank, stage, and share of the tokens its own."""
    recipe = runs.recipe(tmp_path)

    def seed(step=3, **options):
        axes = {k: Axis(v, 4) for k, v in options.items() if k != "sequence_parallel"}
        flags = {k: v for k, v in options.items() if k == "sequence_parallel"}
        return loop._step_seed(recipe, step, Parallel(**axes, **flags))

    # one process, whose runs of old must go on to the bit
    assert seed() == loop._step_seed(recipe, 3, SINGLE)
    assert seed(dp=0, pp=0, tp=0) == seed(tp=1) == seed(ep=1) == seed()
    others = [seed(dp=1), seed(pp=1), seed(tp=1, sequence_parallel=True), seed(step=4)]
    assert len({seed(), *others}) == 5


def test_bf16_keeps_fp32_weights_and_computes_in_bf16(tmp_path):
    recipe = runs.recipe(tmp_path, steps=2, precision="bf16", eval_every=0)
    last = train(recipe, console=runs.quiet())
    assert {t.dtype for t in runs.weights(last).values()} == {torch.float32}
    fp32 = Trainer(runs.recipe(tmp_path, output=str(tmp_path / "other")), False, runs.quiet())
    exact = fp32._update(fp32._batches(0)).nats
    rounded = read_log(tmp_path / "run" / "log.jsonl")[0]["loss"]
    # bf16 has 8 bits: near, but not the same
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=1e-2)


def test_each_block_is_compiled_when_the_recipe_asks(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__)
    )
    Trainer(runs.recipe(tmp_path, compile=True), False, runs.quiet())
    assert compiled == ["Block"] * 6


def test_training_leaves_the_callers_random_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(runs.recipe(tmp_path, steps=1, eval_every=0), console=runs.quiet())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, None), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_says_so(tmp_path, monkeypatch, number, code):
    update = Average.update

    def signalled(self, n):
        update(self, n)
        if n == 5:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Average, "update", signalled)
    console, before = runs.quiet(), signal.getsignal(number)
    recipe = runs.recipe(tmp_path)
    if code is None:
        train(recipe, console=console)
    else:
        with pytest.raises(SystemExit) as caught:
            train(recipe, console=console)
        assert caught.value.code == code
    last = tmp_path / "run" / "step-00000005"
    said = f"{signal.Signals(number).name}: stopped after step 5; resume from {last}."
    assert runs.said(console).splitlines()[-1] == said
    assert json.loads((last / "trainer.json").read_text())["step"] == 5
    assert signal.getsignal(number) == before


def test_a_terminal_gets_a_bar(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    train(runs.recipe(tmp_path, steps=4), console=console)
    said = console.file.getvalue()
    assert "4/4" in said
    assert "tokens/s" in said


def test_a_run_from_a_checkpoint_starts_with_its_weights(tmp_path):
    last = train(runs.recipe(tmp_path, steps=2, eval_every=0), console=runs.quiet())
    again = runs.recipe(tmp_path, model=str(last), output=str(tmp_path / "second"))
    trainer = Trainer(again, False, runs.quiet())
    runs.assert_same(dict(trainer.model.state_dict()), runs.weights(last))
    assert trainer.step == 0


def refusal(recipe, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        train(recipe, console=runs.quiet(), **options)
    return str(caught.value)


def test_a_new_run_refuses_a_directory_that_holds_one(tmp_path):
    recipe = runs.recipe(tmp_path, steps=1, eval_every=0)
    train(recipe, console=runs.quiet())
    assert refusal(recipe) == (
        f"output: {tmp_path / 'run'} already holds step-00000001/; a new run needs a directory of "
        "its own. Go on with --resume, or choose another."
    )


def test_the_best_weights_of_another_run_are_not_overwritten(tmp_path):
    recipe = runs.recipe(tmp_path, steps=2, eval_every=2)
    train(recipe, console=runs.quiet())
    root = tmp_path / "run"
    for path in root.glob("step-*"):
        shutil.rmtree(path)
    before = (root / "best" / "model.safetensors").read_bytes()
    assert refusal(recipe) == (
        f"output: {root} already holds best/; a new run needs a directory of its own. "
        "Move it away, or choose another."
    )
    assert (root / "best" / "model.safetensors").read_bytes() == before


def test_files_that_are_not_a_runs_stay(tmp_path):
    root = tmp_path / "run"
    (root / "tmp-notes").mkdir(parents=True)
    (root / "tmp-todo.md").write_text("write")
    (root / "tmp-step-00000004").mkdir()
    train(runs.recipe(tmp_path, steps=1, eval_every=0), console=runs.quiet())
    assert sorted(p.name for p in root.glob("tmp-*")) == ["tmp-notes", "tmp-todo.md"]


def test_too_few_rows_for_the_tokenizer_are_refused(tmp_path):
    recipe = runs.recipe(tmp_path)
    path = tmp_path / "model.yaml"
    path.write_text(runs.MODEL.replace("vocab_size: 260", "vocab_size: 256"))
    assert refusal(recipe) == (
        "model: vocab_size (256) is below the 259 ids of the tokenizer bytes; every id needs a "
        "row. Raise vocab_size."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_refused(tmp_path):
    said = refusal(runs.recipe(tmp_path, device="cuda"))
    assert said.startswith("device: torch ")
    assert said.endswith(" sees no GPU (cuda); it must. Use auto or cpu.")


def test_no_curve_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr("hybridzoo.train.log.find_spec", lambda name: None)
    assert not plot(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_tokens_json_travels_with_the_checkpoint(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"fox": 0, "dog": 1, "[UNK]": 2, "</s>": 3}
    Tokenizer(WordLevel(words, unk_token="[UNK]")).save(str(tmp_path / "words.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "dog"}')
    recipe = runs.recipe(tmp_path, steps=1, eval_every=0)
    (tmp_path / "text.txt").write_text("fox " * 200)
    data = {"source": str(tmp_path / "text.txt"), "seq_len": 1}
    data |= {"tokenizer": str(tmp_path / "words.json")}
    recipe = type(recipe).from_dict({**recipe.to_dict(), "data": data})
    last = loop.train(recipe, console=runs.quiet())
    assert load(last).config.tokenizer == "tokenizer.json"
    assert (last / "tokenizer.json").read_bytes() == (tmp_path / "words.json").read_bytes()
    assert load_tokenizer(last).eos_id == words["dog"]


def test_a_model_trained_on_bytes_is_a_model_of_bytes(tmp_path):
    """Whatever tokenizer the checkpoint had that it started from: the new one must load alone."""
    recipe = runs.recipe(tmp_path, steps=1, eval_every=0)
    save(runs.model(tokenizer="tokenizer.json"), tmp_path / "start")
    data = {**recipe.to_dict()["data"], "tokenizer": "bytes"}
    start = {"model": str(tmp_path / "start"), "data": data}
    last = loop.train(type(recipe).from_dict(recipe.to_dict() | start), console=runs.quiet())
    assert load(last).config.tokenizer == "bytes"


def test_held_out_bits_a_byte_count_the_held_out_bytes(tmp_path):
    """A token of the held-out text may stand for fewer bytes than one of the training text."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({"seventeen": 0, "a": 1, "</s>": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    recipe = runs.recipe(tmp_path, ema=0.0, eval_batches=0, steps=1, eval_every=1)
    text = "seventeen " * 190 + "a " * 50
    (tmp_path / "text.txt").write_text(text)
    data = {**recipe.to_dict()["data"], "tokenizer": str(tmp_path / "tokenizer.json")}
    recipe = type(recipe).from_dict(recipe.to_dict() | {"data": data})
    loop.train(recipe, console=runs.quiet())
    (record,) = (r for r in read_log(tmp_path / "run" / "log.jsonl") if "val_loss" in r)
    # the last 100 of 2000 bytes, "a " 50 times: two bytes a token
    assert record["val_bits_per_byte"] == pytest.approx(record["val_loss"] / math.log(2) / 2)
