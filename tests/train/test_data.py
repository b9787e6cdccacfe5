"""data: windows as a pure function of the step, document isolation, evaluation, refusals."""

import collections
import hashlib
import itertools

import pytest
import torch

from hybridzoo.errors import ConfigError
from hybridzoo.tokenizer import load_tokenizer
from hybridzoo.train.data import IGNORE, PackedData, corpus

BYTES = load_tokenizer("bytes")
BOS, EOS = BYTES.bos_id, BYTES.eos_id
# bytes that name their document and place, so that any crossing shows; 7 is shorter than a window
SIZES = [37, 7, 61, 20, 113]


def make_documents():
    return [
        bytes([17 * i + 3] + [(17 * i + j) % 251 for j in range(size - 1)])
        for i, size in enumerate(SIZES)
    ]


def make_data(**options):
    options = {"seq_len": 11, "batch_size": 4, "split": "all", "seed": 5} | options
    return PackedData(make_documents(), BYTES, **options)


def streams():
    """Each document as the ids it becomes."""
    return [[BOS, *text, EOS] for text in make_documents()]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])), key


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_a_batch_depends_on_seed_and_step_alone(packing):
    first, again = make_data(packing=packing), make_data(packing=packing)
    forward = [first.batch_at(step) for step in range(40)]
    # a resumed run starts anywhere, in a fresh object
    for step in (39, 17, 0, 18):
        assert_same(again.batch_at(step), forward[step])
    ids = torch.stack([batch["input_ids"] for batch in forward])
    other = make_data(packing=packing, seed=6)
    assert not torch.equal(ids, torch.stack([other.batch_at(s)["input_ids"] for s in range(40)]))


def test_the_order_is_the_one_of_every_numpy():
    # pinned: a resume on another machine must meet the same windows
    data = PackedData("shakespeare", BYTES, seq_len=512, batch_size=64, packing="documents")
    digest = hashlib.sha256()
    for step in range(3):
        digest.update(data.batch_at(step)["input_ids"].numpy().tobytes())
    expected = "3a7c3f29bf2f67b038463ef5f5f008f4166f3a06e4cfcfcab9c37f4be54cb69a"
    assert digest.hexdigest() == expected


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("packing", ["none", "documents"])
def test_ranks_take_slices_of_the_whole_batch(packing, world):
    whole = make_data(packing=packing)
    ranks = [make_data(packing=packing, rank=r, world=world) for r in range(world)]
    for step in (0, 3, 50):
        batches = [rank.batch_at(step) for rank in ranks]
        for key in ("input_ids", "labels"):
            dim = 0 if packing == "none" else 1
            joined = torch.cat([batch[key] for batch in batches], dim)
            assert torch.equal(joined, whole.batch_at(step)[key])
        if packing == "documents":
            width = 44 // world
            cuts = {int(c) + r * width for r in range(world) for c in batches[r]["cu_seqlens"]}
            assert cuts == set(whole.batch_at(step)["cu_seqlens"].tolist())


def test_windows_without_packing_stay_inside_a_document():
    spans = ["".join(map(chr, stream)) for stream in streams()]
    data, n_filled_up = make_data(), 0
    for step in range(300):
        batch = data.batch_at(step)
        assert batch["input_ids"].shape == batch["labels"].shape == (4, 11)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            n = int((labels != IGNORE).sum())
            read = "".join(map(chr, [*ids[:n].tolist(), int(labels[n - 1])]))
            assert torch.equal(ids[1:n], labels[: n - 1])
            assert any(read in span for span in spans)
            # only the 9 tokens of the short document need filling up
            assert n == 11 or read == spans[1]
            assert n == 11 or ids[n + 1 :].tolist() == [0] * (10 - n)
            n_filled_up += n < 11
    assert n_filled_up > 0


def test_packed_documents_are_pieces_that_no_label_leaves():
    spans = ["".join(map(chr, stream)) for stream in streams()]
    data = make_data(packing="documents")
    for step in range(60):
        batch = data.batch_at(step)
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        cuts = batch["cu_seqlens"].tolist()
        assert batch["cu_seqlens"].dtype == torch.int32
        assert (cuts[0], cuts[-1]) == (0, 44) and set(range(0, 45, 11)) <= set(cuts)
        lengths = [b - a for a, b in itertools.pairwise(cuts)]
        assert min(lengths) > 0 and batch["max_seqlen"] == max(lengths)
        for a, b in itertools.pairwise(cuts):
            piece = "".join(map(chr, ids[a:b].tolist()))
            assert torch.equal(ids[a + 1 : b], labels[a : b - 1])
            if labels[b - 1] == IGNORE:
                assert any(span.endswith(piece) for span in spans)
            else:
                assert any(piece + chr(labels[b - 1]) in span for span in spans)


def test_an_epoch_of_packed_documents_meets_each_token_once():
    n_tokens = sum(len(stream) for stream in streams())
    n_windows = n_tokens // 11
    data = make_data(packing="documents", batch_size=1)
    everything = collections.Counter(itertools.chain.from_iterable(streams()))
    for epoch in (0, 1, 7):
        seen = collections.Counter()
        for i in range(n_windows):
            seen.update(data.batch_at(epoch * n_windows + i)["input_ids"].flatten().tolist())
        # what does not fill a window is left out, from another place in each epoch
        assert not seen - everything
        assert (everything - seen).total() == n_tokens - 11 * n_windows


def test_epochs_differ_in_offset_and_order():
    data = make_data(packing="documents", batch_size=1)
    n_windows = sum(len(stream) for stream in streams()) // 11
    firsts = {
        tuple(data.batch_at(epoch * n_windows)["input_ids"][0].tolist()) for epoch in range(20)
    }
    assert len(firsts) > 15


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 500])
def test_every_byte_is_a_target_once_with_half_a_window_before_it(seq_len):
    texts = [*make_documents(), b"x" * 600]
    data = PackedData(texts, BYTES, seq_len=seq_len, batch_size=3, split="all")
    documents = data.documents("all")
    scored = collections.Counter()
    n_labels = 0
    for batch in data.eval_batches("all"):
        assert batch["input_ids"].shape == batch["labels"].shape == (3, seq_len)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            places = (labels != IGNORE).nonzero().flatten().tolist()
            n_labels += len(places)
            scored.update(labels[places].tolist())
            for i in places:
                assert i + 1 >= seq_len / 2 or ids[0] == BOS
                if i + 1 in places:
                    assert ids[i + 1] == labels[i]
    text = b"".join(texts)
    assert scored == collections.Counter(text)
    assert n_labels == documents.n_targets == documents.n_bytes == len(text)


def test_evaluation_windows_are_the_text_in_order():
    data = PackedData([bytes(range(1, 101))], BYTES, seq_len=8, batch_size=1, split="all")
    labels = torch.cat([batch["labels"][0] for batch in data.eval_batches("all")])
    assert labels[labels != IGNORE].tolist() == list(range(1, 101))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_evaluation_and_run_equally_many_batches(world):
    whole = list(make_data().eval_batches("all"))
    ranks = [list(make_data(rank=r, world=world).eval_batches("all")) for r in range(world)]
    assert {len(batches) for batches in ranks} == {len(whole)}
    for i, batch in enumerate(whole):
        joined = torch.cat([batches[i]["labels"] for batches in ranks])
        assert torch.equal(joined, batch["labels"])


def test_evaluation_of_the_corpus_scores_its_val_bytes():
    data = PackedData("shakespeare", BYTES, seq_len=1024, batch_size=16)
    n = sum(int((batch["labels"] != IGNORE).sum()) for batch in data.eval_batches("val"))
    assert n == sum(map(len, corpus("shakespeare", "val"))) == data.documents("val").n_bytes


@pytest.mark.parametrize(
    "options, text",
    [
        ({"seq_len": 248}, r"has 248 tokens; a window and its labels need seq_len \+ 1 \(249\)"),
        ({"seq_len": 0}, "seq_len cannot be 0; "),
        ({"batch_size": 0}, "batch_size cannot be 0; "),
        ({"world": 3}, r"rank 0 of 3 cannot share batch_size \(4\); "),
        ({"world": 2, "rank": 2}, "rank 2 of 2 cannot share"),
        ({"seed": -1}, "seed cannot be -1; "),
        ({"packing": "rows"}, "'rows' is not a packing; the packings: documents, none"),
    ],
)
def test_options_that_cannot_work_are_refused(options, text):
    with pytest.raises(ConfigError, match=f"^data: .*{text}"):
        make_data(**options)


def test_one_window_is_enough():
    assert sum(len(stream) for stream in streams()) == 248
    assert make_data(seq_len=247, packing="documents").batch_at(3)["labels"].shape == (1, 988)
