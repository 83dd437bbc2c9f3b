"""Properties that hold for every input: VQA's text clean-up, and which samples the training samplers draw.

The cases are drawn by hypothesis from fixed seeds, so each run tries the same ones.
"""

import itertools
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lavis_lite.runners.sampling import TrainSampler, dataset_shares, hash_seed
from lavis_lite.tasks.metrics.vqa_accuracy import (
    ARTICLES,
    CONTRACTIONS,
    NUMBER_WORDS,
    PUNCTUATION,
    clean_answer,
    strip_punctuation,
    vqa_accuracy,
)

repeatable = settings(derandomize=True, deadline=None, max_examples=100)
WORDS = [*NUMBER_WORDS, *ARTICLES, *itertools.islice(CONTRACTIONS, 0, None, 9), "T-shirt", "1,000", "3.5", "Hund", "猫"]
texts = st.lists(st.sampled_from(WORDS) | st.text(alphabet=f"ab 1.'\n{PUNCTUATION}", max_size=6), max_size=6).map(
    " ".join
)


# VQA accuracy


@repeatable
@given(
    st.lists(st.sampled_from(["red ball", "dog", "2", "t shirt", "isn't", "3.5", "naïve"]), max_size=5).map(" ".join)
)
def test_cleaning_leaves_clean_answers_alone(text: str) -> None:
    assert clean_answer(text) == text


@repeatable
@example("a.b.")
@given(texts)
def test_cleaned_answers_are_clean_words(text: str) -> None:
    cleaned = clean_answer(text)
    assert not set(cleaned) & set(PUNCTUATION)
    assert cleaned == " ".join(cleaned.split()) == cleaned.lower()
    assert not ARTICLES & set(cleaned.split())
    assert not NUMBER_WORDS.keys() & set(cleaned.split())


@repeatable
@given(texts)
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    assert clean_answer(clean_answer(text)) == clean_answer(text)


def test_at_most_32_periods_are_removed() -> None:
    """So cleaning twice removes more than cleaning once, as in the official script."""
    assert clean_answer("." * 40) == "." * 8


@repeatable
@given(st.text(alphabet=f"ab1 {PUNCTUATION}"), st.sampled_from(PUNCTUATION))
def test_a_mark_beside_a_space_is_deleted_and_else_blanked(text: str, mark: str) -> None:
    others = "".join(letter for letter in text if letter not in PUNCTUATION)
    assert strip_punctuation(f"x{mark}y{others}") == f"x y{others}"
    assert strip_punctuation(f"x{mark} y{others}") == f"x y{others}"
    assert strip_punctuation(f"x{mark}y{others}1,2") == f"xy{others}12"


@repeatable
@given(st.integers(0, 10), st.permutations(range(10)), st.sampled_from(["official", "lavis"]))
def test_accuracy_is_that_of_leaving_each_human_out(count: int, order: list[int], variant: str) -> None:
    """Antol et al. 2015, by hand: the mean over ten sets of nine of min(1, matches / 3); the order does not count."""
    answers = ["cat" if i < count else "dog" for i in order]
    by_hand = sum(min(1, (count - (answer == "cat")) / 3) for answer in answers) / 10
    assert vqa_accuracy("cat", answers, variant=variant) == pytest.approx(by_hand)
    assert vqa_accuracy("Cat.", answers, variant=variant) == pytest.approx(
        by_hand if variant == "lavis" or 0 < count < 10 else 0
    )


# Samplers


sizes = st.dictionaries(st.sampled_from("abc"), st.integers(1, 40), min_size=1)


def mixed(lengths: dict[str, int], *, seed: int, batch: int, rank: int = 0, world: int = 1) -> TrainSampler:
    return TrainSampler(lengths, None, batch_size=batch, seed=seed, rank=rank, world=world)


def drawn(lengths: dict[str, int], *, seed: int, batch: int, rank: int = 0, world: int = 1) -> TrainSampler:
    shares = dataset_shares(lengths, sampling="sqrt")
    return TrainSampler(lengths, shares, batch_size=batch, seed=seed, rank=rank, world=world)


@repeatable
@given(sizes, st.integers(0, 5), st.integers(1, 8))
def test_an_epoch_has_every_sample_at_most_once(lengths: dict[str, int], seed: int, batch: int) -> None:
    """Exactly once where the batch divides the number of samples; the rest of an epoch is dropped otherwise."""
    total = sum(lengths.values())
    batch = min(batch, total)
    sampler = mixed(lengths, seed=seed, batch=batch)
    for epoch in range(2):
        first = epoch * sampler.steps_per_epoch
        batches = list(itertools.islice(sampler, first, first + sampler.steps_per_epoch))
        keys = [(key.dataset, key.position) for keys in batches for key in keys]
        assert len(set(keys)) == len(keys) == total // batch * batch
        assert all(0 <= index < lengths[name] for name, index in keys)
        counts = sampler.counts_between(first, first + sampler.steps_per_epoch)
        assert {name: count for name, count in counts.items() if count} == Counter(name for name, _ in keys)


@repeatable
@given(sizes, st.integers(0, 5), st.integers(1, 4))
def test_an_epoch_of_one_dataset_of_several_has_every_sample(lengths: dict[str, int], seed: int, batch: int) -> None:
    lengths = {name: -(-length // batch) * batch for name, length in lengths.items()}  # the batch divides them
    sampler = drawn(lengths, seed=seed, batch=batch)
    seen: dict[str, Counter[int]] = {name: Counter() for name in lengths}
    for keys in itertools.islice(sampler, 60):
        (name,) = {key.dataset for key in keys}
        seen[name].update(key.position for key in keys)
    for name, counts in seen.items():
        repeats = [counts[index] for index in range(lengths[name])]
        assert max(repeats) - min(repeats) <= 1


@repeatable
@pytest.mark.parametrize("make", [mixed, drawn])
@given(sizes, st.integers(0, 5), st.sampled_from([1, 2, 3, 4]), st.integers(1, 3))
def test_ranks_together_draw_what_one_process_draws(
    make: type, lengths: dict[str, int], seed: int, world: int, batch: int
) -> None:
    lengths = {name: length + world * batch for name, length in lengths.items()}
    alone = itertools.islice(make(lengths, seed=seed, batch=world * batch), 30)
    ranks = [make(lengths, seed=seed, batch=batch, rank=rank, world=world) for rank in range(world)]
    together = zip(*ranks, strict=True)
    for expected, parts in zip(alone, together, strict=False):
        assert [key for keys in parts for key in keys] == expected


@repeatable
@pytest.mark.parametrize("make", [mixed, drawn])
@given(sizes, st.integers(0, 5), st.integers(0, 40))
def test_a_resumed_sampler_continues_at_any_step(make: type, lengths: dict[str, int], seed: int, start: int) -> None:
    lengths = {name: length + 3 for name, length in lengths.items()}
    whole = list(itertools.islice(make(lengths, seed=seed, batch=3), start + 5))
    resumed = make(lengths, seed=seed, batch=3)
    resumed.start_step = start
    assert list(itertools.islice(resumed, 5)) == whole[start:]


@repeatable
@given(st.lists(st.integers() | st.text(), max_size=4))
def test_seeds_have_63_bits(parts: list[object]) -> None:
    assert hash_seed(*parts) == hash_seed(*parts)
    assert 0 <= hash_seed(*parts) < 2**63
