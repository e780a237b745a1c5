"""Micro-batches: a step holds the same samples in every layout, each label counts once, a resumed feed continues."""

import itertools
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from indexes import random_documents, random_masks, write_index
from recipes import make_recipe

from megazh.index.loader import training_batches
from megazh.index.mixture import Mixture
from megazh.model.document_map import decode_sample_numbers, encode_document_map
from megazh.training.course import Course
from megazh.training.feed import MicroBatch, ValidationFeed, training_feed
from megazh.training.layout import Layout

SEQ, BATCH = 64, 12
COURSE = make_recipe(seq_len=SEQ, global_batch_size=BATCH).course
CHANGING = make_recipe(
    seq_len=SEQ,
    global_batch_size=BATCH,
    **{"schedule.batch": {0: BATCH, 1500: 24, 3100: 36}, "schedule.length": {0: 5, 1500: 16, 3100: 64}},
).course
"""Two steps of 12 samples, one of 24 and then steps of 36, the first of which are cut."""


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mixture:
    monkeypatch.setenv("MEGAZH_CACHE", str(tmp_path / "cache"))
    write_index(tmp_path / "a", random_documents(1, 300))
    path = tmp_path / "mix.yaml"
    path.write_text("validation: {fraction: 0.2}\ncorpora:\n  - {name: a, prefix: a, weight: 1}\n")
    return Mixture(path, SEQ)


@pytest.fixture
def replay(mixture: Mixture) -> Mixture:
    """Conversations of which some tokens are trained, and plain text."""
    documents = random_documents(2, 200)
    write_index(mixture.path.with_name("chat"), documents, masks=random_masks(2, documents))
    path = mixture.path.with_name("replay.yaml")
    path.write_text(
        "validation: {fraction: 0.2}\ncorpora:\n"
        "  - {name: chat, prefix: chat, weight: 3}\n  - {name: a, prefix: a, weight: 1}\n"
    )
    return Mixture(path, SEQ)


def layout_of(replicas: int, size: int) -> Layout:
    """A layout of one stage for steps of twelve samples."""
    return Layout(replicas, 1, replicas, size, BATCH // replicas // size)


LAYOUTS = [layout_of(*each) for each in ((1, 1), (1, 12), (1, 4), (2, 3), (2, 1), (3, 2), (3, 4))]


def steps(
    mixture: Mixture, layout: Layout, first: int, count: int, workers: int = 0, course: Course = COURSE
) -> list[list[MicroBatch]]:
    """The micro-batches of all replicas, step by step."""
    feeds = [training_feed(mixture, layout, replica, first, workers, course) for replica in range(layout.replicas)]
    return [
        [  # in the order of samples
            next(feed) for _ in range(layout.micro_batches_of(course.samples(step))) for feed in feeds
        ]
        for step in range(first, first + count)
    ]


def rows(batches: list[MicroBatch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, document maps and labels of all samples in these micro-batches."""
    return (
        torch.cat([inputs[0] for inputs, _ in batches]),
        torch.cat([inputs[1] for inputs, _ in batches]),
        torch.cat([labels[0] for _, labels in batches]),
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.replicas}x{layout.micro_batch_size}")
def test_a_step_is_the_same_samples_in_every_layout(mixture: Mixture, layout: Layout) -> None:
    for step, batches in enumerate(steps(mixture, layout, 0, 4, workers=1)):
        expected = mixture.batch(range(step * BATCH, (step + 1) * BATCH))
        tokens, document_maps, labels = rows(batches)
        assert torch.equal(tokens, torch.from_numpy(expected.tokens))
        assert torch.equal(labels, torch.from_numpy(expected.labels))
        assert torch.equal(document_maps[:, :SEQ], torch.from_numpy(expected.position_ids))
        assert torch.equal(document_maps[:, SEQ:-2], torch.from_numpy(expected.cu_seqlens))
        assert decode_sample_numbers(document_maps).tolist() == list(range(step * BATCH, (step + 1) * BATCH))
        assert {tensor.dtype for tensor in (tokens, document_maps, labels)} == {torch.int32}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.replicas}x{layout.micro_batch_size}")
@pytest.mark.parametrize("name", ["mixture", "replay"])
def test_the_sum_of_scaled_sums_is_the_mean_over_tokens(
    request: pytest.FixtureRequest, name: str, layout: Layout
) -> None:
    scales = set()
    for batches in steps(request.getfixturevalue(name), layout, 0, 3):
        losses = [torch.where(labels >= 0, labels.double().square() + 1, 0) for _, (labels, _) in batches]
        scaled = [loss.sum() * scale.double() for loss, (_, (_, scale)) in zip(losses, batches, strict=True)]
        valid = sum(int((labels >= 0).sum()) for _, (labels, _) in batches)
        assert torch.stack(scaled).sum().item() == pytest.approx(sum(loss.sum().item() for loss in losses) / valid)
        assert {(tuple(scale.shape), scale.dtype) for _, (_, scale) in batches} == {((1,), torch.float32)}
        scales.update(float(scale) for _, (_, scale) in batches)
    assert len(scales) == 3, "steps have different numbers of labels; all micro-batches of a step have one scale"


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("layout", [layout_of(1, 12), layout_of(2, 3), layout_of(3, 1)], ids=["1x12", "2x3", "3x1"])
@pytest.mark.parametrize("name", ["mixture", "replay"])
def test_batches_and_cuts_that_change_are_the_same_in_every_layout(
    request: pytest.FixtureRequest, name: str, layout: Layout, labels: bool
) -> None:
    """The batch and the cuts of each step; the scale counts exactly the labels that are left, and a resume goes on."""
    plain = request.getfixturevalue(name)
    mixture = Mixture(plain.path, SEQ, shortest_cut=5)
    assert mixture.shape.segments == plain.shape.segments + 12
    course = replace(CHANGING, label_at_cut=labels)
    whole = steps(mixture, layout, 0, 5, 0, course)
    cut_away = 0
    for step, batches in enumerate(whole):
        tokens, document_maps, found = rows(batches)
        numbers = range(course.samples_before(step), course.samples_before(step + 1))
        expected = plain.batch(numbers)
        assert decode_sample_numbers(document_maps).tolist() == list(numbers)
        assert torch.equal(tokens, torch.from_numpy(expected.tokens))
        length = course.length(step)
        for row, bounds in enumerate(expected.cu_seqlens.tolist()):
            ends = [b for begin, end in itertools.pairwise(bounds) if end > begin for b in range(begin, end, length)]
            padded = _padding(plain, numbers[row])
            ends = [b for b in ends if b <= SEQ - padded] if padded else ends
            kept = document_maps[row, SEQ:-2].tolist()
            assert kept == [*ends, *[SEQ] * (len(kept) - len(ends))]
            positions = [at - max(end for end in ends if end <= at) for at in range(SEQ)]
            assert document_maps[row, :SEQ].tolist() == positions
            whole_labels, inner = expected.labels[row].tolist(), set(ends) - set(bounds)
            cut_away += sum(whole_labels[end - 1] != -100 for end in inner)
            for end in inner:
                whole_labels[end - 1] = whole_labels[end - 1] if labels else -100
            assert found[row].tolist() == whole_labels
        valid = int((found >= 0).sum())
        assert {float(scale) for _, (_, scale) in batches} == {float(torch.tensor(1 / valid))}
    assert cut_away > 100
    for first in (1, 2, 4):
        resumed = steps(mixture, layout, first, 5 - first, 2, course)
        for left, right in zip(itertools.chain(*whole[first:]), itertools.chain(*resumed), strict=True):
            assert all(torch.equal(a, b) for a, b in zip((*left[0], *left[1]), (*right[0], *right[1]), strict=True))


def _padding(mixture: Mixture, number: int) -> int:
    """Tokens of padding in a sample."""
    corpus, _, row = mixture.locate(number)
    table = mixture.table(corpus)
    return SEQ - int(table.length[table.first_piece[row] : table.first_piece[row + 1]].sum())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("layout", [layout_of(1, 4), layout_of(3, 2)], ids=["1x4", "3x2"])
def test_resumed_feed_gives_what_an_uninterrupted_one_gives(mixture: Mixture, layout: Layout, workers: int) -> None:
    whole = steps(mixture, layout, 0, 6, workers)
    for first in (1, 5):
        resumed = steps(mixture, layout, first, 6 - first, workers)
        for left, right in zip(itertools.chain(*whole[first:]), itertools.chain(*resumed), strict=True):
            assert all(torch.equal(a, b) for a, b in zip((*left[0], *left[1]), (*right[0], *right[1]), strict=True))


def test_document_maps_are_as_the_model_encodes_them(mixture: Mixture) -> None:
    batch = next(training_batches(mixture, 4, start=12))
    expected = encode_document_map(batch["position_ids"], batch["cu_seqlens"], torch.arange(12, 16))
    assert torch.equal(batch["document_map"], expected)


def test_a_feed_that_is_closed_leaves_no_thread(mixture: Mixture) -> None:
    before = set(threading.enumerate())
    feed = training_feed(mixture, layout_of(1, 4), 0, 0, 2, COURSE)
    next(feed)
    assert set(threading.enumerate()) > before
    feed.close()
    assert set(threading.enumerate()) == before


def test_a_feed_ends_with_the_last_whole_step_of_a_mixture_that_stops(tmp_path: Path, mixture: Mixture) -> None:
    path = tmp_path / "stop.yaml"
    path.write_text("on_exhausted: stop\ncorpora:\n  - {name: a, prefix: a, weight: 1}\n")
    stopping = Mixture(path, SEQ)
    assert stopping.end is not None
    assert stopping.end % BATCH, "the last step is incomplete"
    for layout in (layout_of(1, 4), layout_of(2, 3)):
        for replica in range(layout.replicas):
            for workers in (0, 2):
                batches = list(training_feed(stopping, layout, replica, 0, workers, COURSE))
                assert len(batches) == stopping.end // BATCH * layout.micro_batches
    assert list(training_feed(stopping, layout_of(1, 4), 0, stopping.end // BATCH, 0, COURSE)) == []


@pytest.mark.parametrize("limit", [None, 1, 5, 7, 10_000])
@pytest.mark.parametrize(("replicas", "size"), [(1, 1), (1, 4), (2, 3), (3, 2), (5, 1), (3, 50)])
@pytest.mark.parametrize("name", ["mixture", "replay"])
def test_validation_counts_each_label_once(
    request: pytest.FixtureRequest, name: str, replicas: int, size: int, limit: int | None
) -> None:
    samples = request.getfixturevalue(name).validation
    count = min(limit or len(samples), len(samples))
    layout = Layout(replicas, 1, replicas, size, 1)
    feeds = [ValidationFeed(samples, layout, replica, limit) for replica in range(replicas)]
    assert len({feed.micro_batches for feed in feeds}) == 1
    assert len(set(feeds[0].numbers)) == count
    batches = [list(feed) for feed in feeds]
    assert {len(each) for each in batches} == {feeds[0].micro_batches}
    assert {tuple(labels.shape) for each in batches for _, (labels, _) in each} == {(size, SEQ)}
    tokens, document_maps, labels = rows([each[number] for number in range(feeds[0].micro_batches) for each in batches])
    counted = (labels >= 0).any(1)  # other rows are filled up
    expected = samples.batch(feeds[0].numbers)
    assert torch.equal(tokens[counted], torch.from_numpy(expected.tokens))
    assert torch.equal(labels[counted], torch.from_numpy(expected.labels))
    assert torch.equal(document_maps[counted, SEQ:-2], torch.from_numpy(expected.cu_seqlens))
    by_corpus = [0] * len(samples.names)
    for feed, own in zip(feeds, batches, strict=True):
        for corpus, (_, (labels, _)) in zip(feed.corpora, own, strict=True):
            by_corpus[corpus] += int((labels >= 0).sum())
    assert by_corpus == [
        sum(samples.valid_labels(number) for number in feeds[0].numbers if samples.corpus_of(number) == corpus)
        for corpus in range(len(samples.names))
    ], "a micro-batch holds samples of one corpus"
    valid = int((expected.labels >= 0).sum())
    assert {feed.valid for feed in feeds} == {valid}
    scaled = [(labels >= 0).sum() * scale for each in batches for _, (labels, scale) in each]
    assert torch.stack(scaled).sum().item() == pytest.approx(1.0), "the mean of ones is one"


def test_validation_may_be_gone_through_again(mixture: Mixture) -> None:
    feed = ValidationFeed(mixture.validation, Layout(2, 1, 2, 3, 1), 1, 8)
    first, again = list(feed), list(feed)
    assert len(first) == 2
    for left, right in zip(first, again, strict=True):
        assert torch.equal(left[0][0], right[0][0])
        assert torch.equal(left[1][0], right[1][0])


def test_a_limit_takes_samples_from_everywhere(mixture: Mixture) -> None:
    samples = mixture.validation
    numbers = ValidationFeed(samples, Layout(1, 1, 1, 1, 1), 0, 4).numbers
    assert len(samples) > 12
    gaps = {b - a for a, b in itertools.pairwise([*numbers, len(samples)])}
    assert numbers[0] == 0
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_a_rollback_passed_over_are_taken_by_no_step(mixture: Mixture, workers: int) -> None:
    """Step n takes what step n + 2 takes without it, in every layout; the last step is the same sample's."""
    passed = 2 * BATCH
    for layout in LAYOUTS[::3]:
        feeds = [
            itertools.chain.from_iterable(zip(*(
                training_feed(mixture, layout, replica, first, workers, COURSE, number)
                for replica in range(layout.replicas)
            ), strict=True)) for first, number in ((3, passed), (5, 0))
        ]  # fmt: skip
        for moved, plain in itertools.islice(zip(*feeds, strict=True), 3 * layout.micro_batches * layout.replicas):
            for one, other in zip(itertools.chain(*moved), itertools.chain(*plain), strict=True):
                assert torch.equal(one, other)


def test_cuts_follow_the_step_and_not_the_samples_that_were_passed_over(mixture: Mixture) -> None:
    """Where twelve samples were passed over, step 1 has the cuts and the batch of step 1 on later samples."""
    feed = training_feed(Mixture(mixture.path, SEQ, shortest_cut=5), layout_of(1, 12), 0, 1, 0, CHANGING, BATCH)
    for step in (1, 2, 3):
        batches = [next(feed) for _ in range(CHANGING.samples(step) // BATCH)]
        tokens, document_maps, labels = rows(batches)
        begin = CHANGING.samples_before(step) + BATCH
        numbers = list(range(begin, begin + CHANGING.samples(step)))
        assert decode_sample_numbers(document_maps).tolist() == numbers
        assert torch.equal(tokens, torch.from_numpy(mixture.batch(numbers).tokens))
        segments = document_maps[:, SEQ:-2].diff(dim=1).max()
        assert int(segments) <= max(CHANGING.length(step), max(_padding(mixture, number) for number in numbers))
        assert all(float(batch[1][1]) == pytest.approx(1 / int((labels >= 0).sum())) for batch in batches)
