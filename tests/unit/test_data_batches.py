"""The order of the data does not depend on the layout, an epoch has every sequence once, and all targets are
counted."""

import json
from pathlib import Path

import numpy as np
import pytest

from stack.config.schema import Data
from stack.data.batches import IGNORE, Batch, Batches
from stack.data.corpus import Corpus, Split
from stack.data.permutation import Permutation
from stack.data.shards import prepare
from stack.errors import DataError, LayoutError

SEQ_LEN = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder: Path = tmp_path_factory.mktemp("corpus")
    texts = [f"{number}: " + "word " * (number * 5 % 17) for number in range(90)]
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cfg = Data(
        source="files",
        paths=[str(folder)],
        root=str(folder / "data"),
        tokenizer="bpe",
        vocab_size=260,
        heldout_fraction=0.2,
    )
    return Corpus.open(prepare(cfg, seed=3, progress=False))


@pytest.fixture
def split(corpus) -> Split:
    return corpus.split("train")


def batches(split: Split, **fields) -> Batches:
    settings = {"seq_len": SEQ_LEN, "pack": True, "seed": 5, "global_size": 8, "micro_size": 2, "replicas": 1}
    return Batches(split, **{**settings, **fields})


def whole(source: Batches, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The global batch of all replicas as (input_ids, labels), each [global_size, seq_len]."""
    return joined([source.train(step, replica) for replica in range(source.replicas)])


def joined(parts: list[Batch]) -> tuple[np.ndarray, np.ndarray]:
    inputs = np.concatenate([part.input_ids.reshape(-1, part.input_ids.shape[-1]) for part in parts])
    labels = np.concatenate([part.labels.reshape(-1, part.labels.shape[-1]) for part in parts])
    return inputs, labels


def expected(split: Split, pack: bool, sequence: int) -> list[int]:
    """The tokens of a sequence, its last target included, by a simple definition."""
    if pack:
        return split.read(sequence * SEQ_LEN, (sequence + 1) * SEQ_LEN + 1).tolist()
    return split.document(sequence)[: SEQ_LEN + 1].tolist()


def expected_labels(split: Split, pack: bool, sequence: int) -> list[int]:
    """The labels of a sequence, with `IGNORE` for the last token of a document."""
    tokens = expected(split, pack, sequence)
    if not pack:
        return tokens[1:]
    starts = set(split.starts.tolist())
    return [IGNORE if sequence * SEQ_LEN + at in starts else token for at, token in enumerate(tokens)][1:]


@pytest.mark.parametrize("pack", [True, False])
def test_rows_are_the_sequences_of_the_order(split, pack):
    source = batches(split, pack=pack)
    for step in range(3):
        inputs, labels = whole(source, step)
        for row, sequence in enumerate(source.order(step)):
            tokens = expected(split, pack, sequence)
            padding = SEQ_LEN + 1 - len(tokens)
            assert inputs[row].tolist() == tokens[:-1] + [split.eos_id] * padding
            assert labels[row].tolist() == expected_labels(split, pack, sequence) + [IGNORE] * padding


def test_the_end_of_a_document_has_no_target(split):
    """In every sequence of the epoch, at the first and the last position too, a target is in the same document as its
    token."""
    source = batches(split)
    ends = np.isin(np.arange(source.num_sequences * SEQ_LEN), split.starts - 1).reshape(-1, SEQ_LEN)
    for sequence in range(source.num_sequences):
        batch = source.heldout(sequence, 1, 0)
        assert (batch.input_ids[0, 0][ends[sequence]] == split.eos_id).all()
        assert ((batch.labels[0, 0] == IGNORE) == ends[sequence]).all()
    assert ends[:, 0].any()
    assert ends[:, -1].any()


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(("replicas", "micro_size"), [(1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_every_layout_sees_the_same_global_batches(split, pack, replicas, micro_size):
    one, other = batches(split, pack=pack), batches(split, pack=pack, replicas=replicas, micro_size=micro_size)
    for step in (0, 1, 50):
        part = other.train(step, replicas - 1)
        assert part.input_ids.shape == part.labels.shape == (8 // replicas // micro_size, micro_size, SEQ_LEN)
        assert part.input_ids.dtype == part.labels.dtype == np.int64
        for mine, theirs in zip(whole(one, step), whole(other, step), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_targets_are_counted_over_all_replicas(split, pack, replicas):
    source = batches(split, pack=pack, replicas=replicas)
    for step in range(12):
        parts = [source.train(step, replica) for replica in range(replicas)]
        counted = sum(int((part.labels != IGNORE).sum()) for part in parts)
        assert {part.global_target_tokens for part in parts} == {counted}
        assert not pack or 7 * SEQ_LEN < counted < 8 * SEQ_LEN


def test_targets_are_counted_without_reading_other_replicas(split, monkeypatch):
    read: list[int] = []
    monkeypatch.setattr(split, "read", lambda start, stop: read.append(start) or np.zeros(stop - start, dtype=np.int64))
    source = batches(split, replicas=4)
    source.train(0, 1)
    assert read == (source.order(0)[2:4] * SEQ_LEN).tolist()


@pytest.mark.parametrize("global_size", [6, 500])
def test_each_epoch_has_every_sequence_once_and_its_own_order(split, global_size):
    source = batches(split, global_size=global_size)
    total = source.num_sequences
    stream = np.concatenate([source.order(step) for step in range(-(-3 * total // global_size))])
    epochs = stream[: 3 * total].reshape(3, total)
    for epoch in epochs:
        assert sorted(epoch) == list(range(total))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    others = np.concatenate([batches(split).order(step) for step in range(20)])
    np.testing.assert_array_equal(stream[:100], others[:100])


def test_order_depends_on_the_seed_and_on_nothing_that_was_read_before(split):
    source = batches(split)
    later = source.order(7)
    source.order(0)
    np.testing.assert_array_equal(source.order(7), later)
    np.testing.assert_array_equal(batches(split).order(7), later)
    assert batches(split, seed=6).order(7).tolist() != later.tolist()
    assert 7 * SEQ_LEN < source.train(10**9, 0).global_target_tokens < 8 * SEQ_LEN


def test_packed_targets_of_an_epoch_are_the_stream(split):
    source = batches(split)
    assert source.num_sequences == (split.num_tokens - 1) // SEQ_LEN
    targets = [source.heldout(sequence, 1, 0).labels[0, 0] for sequence in range(source.num_sequences)]
    stream = split.read(1, 1 + source.num_sequences * SEQ_LEN)
    # The first token of each document is no target.
    stream[split.starts[1:][split.starts[1:] <= len(stream)] - 1] = IGNORE
    np.testing.assert_array_equal(np.concatenate(targets), stream)


def test_unpacked_has_a_sequence_for_each_document(split):
    assert batches(split, pack=False).num_sequences == split.num_documents


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("replicas", [1, 4])
def test_heldout_is_in_order_and_padded_to_a_full_batch(corpus, pack, replicas):
    split = corpus.split("heldout")
    source = batches(split, pack=pack, replicas=replicas)
    start, count = 1, 3
    parts = [source.heldout(start, count, replica) for replica in range(replicas)]
    inputs, labels = joined(parts)
    for row in range(count):
        tokens = expected(split, pack, start + row)
        assert inputs[row, : len(tokens) - 1].tolist() == tokens[:-1]
        assert labels[row, : len(tokens) - 1].tolist() == expected_labels(split, pack, start + row)
    assert (inputs[count:] == split.eos_id).all()
    assert (labels[count:] == IGNORE).all()
    assert {part.global_target_tokens for part in parts} == {int((labels != IGNORE).sum())}


def test_heldout_refuses_sequences_that_do_not_exist(corpus):
    source = batches(corpus.split("heldout"))
    for start, count in [(-1, 2), (0, 0), (0, 9), (source.num_sequences, 1)]:
        with pytest.raises(ValueError, match="sequences"):
            source.heldout(start, count, 0)


def test_a_batch_that_does_not_divide_names_one_that_does(split):
    with pytest.raises(LayoutError, match=r"global_size=10 .* use batch\.global_size=8"):
        batches(split, global_size=10, micro_size=4)
    with pytest.raises(LayoutError, match=r"use batch\.global_size=16"):
        batches(split, global_size=1, micro_size=4, replicas=4)


def test_a_split_shorter_than_a_sequence_is_refused(split):
    with pytest.raises(DataError, match=f"use data.seq_len={split.num_tokens - 1} or less"):
        batches(split, seq_len=10**6)
    assert batches(split, seq_len=split.num_tokens - 1).num_sequences == 1


@pytest.mark.parametrize("size", [*range(1, 35), 1000, 65537])
def test_permutation_is_a_bijection(size):
    places = np.arange(size)
    items = Permutation(size, seed=1, epoch=0)(places)
    assert items.dtype == np.int64
    np.testing.assert_array_equal(np.sort(items), places)


def test_permutation_of_a_huge_range_is_computed_where_it_is_asked():
    size = 10**12
    items = Permutation(size, seed=2**70, epoch=3)(np.array([0, 1, size - 1]))
    assert len(set(items.tolist())) == 3
    assert ((items >= 0) & (items < size)).all()


def test_permutation_puts_every_item_everywhere():
    counts = np.zeros((5, 5))
    for epoch in range(2000):
        counts[np.arange(5), Permutation(5, seed=0, epoch=epoch)(np.arange(5))] += 1
    assert np.abs(counts - 400).max() < 100  # 90 is five standard deviations
    near = Permutation(100_000, seed=0, epoch=0)(np.arange(100_000))
    assert abs(np.corrcoef(near[:-1], near[1:])[0, 1]) < 0.02


def test_positions_start_again_in_every_document(split):
    source = batches(split)
    starts = set(split.starts.tolist())
    seen = 0
    for step in range(3):
        positions = source.train(step, 0).positions.reshape(-1, SEQ_LEN)
        for row, sequence in enumerate(source.order(step)):
            expected = []
            for token in range(sequence * SEQ_LEN, (sequence + 1) * SEQ_LEN):
                begins = not expected or token in starts
                expected.append(0 if begins else expected[-1] + 1)
                seen += token in starts and len(expected) > 1
            assert positions[row].tolist() == expected
    assert seen > 10


def test_positions_of_one_document_a_sequence_count_on(split):
    positions = batches(split, pack=False).train(0, 0).positions
    assert (positions == np.arange(SEQ_LEN)).all()
