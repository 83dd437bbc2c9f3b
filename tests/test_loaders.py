"""Sampling, seeding, mixing, sharding, unreadable samples."""

import random
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from host_waits import DEVICE, simulated
from torch.utils.data import Dataset

from lavis_lite.common.errors import UnreadableSample
from lavis_lite.common.transfer import to_device
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.runners.loaders import EvalLoader, TrainLoader, eval_sets, train_sets
from lavis_lite.runners.sampling import TrainSampler
from lavis_lite.runners.workers import loader_workers


class Noisy(Dataset):
    """Samples with their index, three random numbers (one per generator), and some that cannot be read."""

    def __init__(self, length: int, *, offset: int = 0, broken: Iterable[int] = ()) -> None:
        self.length, self.offset, self.broken = length, offset, set(broken)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.broken:
            raise UnreadableSample(f"image broken{index}.jpg is cut short.")
        noise = [random.random(), float(np.random.rand()), torch.rand(()).item()]
        return {"id": index + self.offset, "noise": noise}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Stacks."""
        return {"id": torch.tensor([s["id"] for s in samples]), "noise": torch.tensor([s["noise"] for s in samples])}


def run_config(**changes: Any) -> SimpleNamespace:
    fields: dict[str, Any] = {
        "batch_size_train": 4,
        "accum_grad_iters": 1,
        "batch_size_eval": 4,
        "num_workers": 0,
        "prefetch_factor": None,
        "seed": 7,
        "mixing": "per_step",
        "train_dataset_sampling": "size",
        "train_dataset_factors": None,
        "train_dataset_ratios": None,
        "max_unreadable_share": 0.0,
    }
    return SimpleNamespace(**{**fields, **changes})


def take(loader: Any, count: int) -> list[dict[str, torch.Tensor]]:
    return list(islice(iter(loader), count))


def ids(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return torch.cat([batch["id"] for batch in batches]).tolist()


def test_every_epoch_is_another_permutation() -> None:
    loader = TrainLoader({"a": Noisy(11)}, run_config(batch_size_train=3))
    assert loader.sampler.steps_per_epoch == 3
    first, second = ids(take(loader, 3)), ids(take(loader, 6)[3:])
    assert len(set(first)) == len(set(second)) == 9
    assert set(first + second) <= set(range(11))
    assert first != second
    assert ids(take(TrainLoader({"a": Noisy(11)}, run_config(batch_size_train=3)), 3)) == first
    assert ids(take(TrainLoader({"a": Noisy(11)}, run_config(batch_size_train=3, seed=8)), 3)) != first


def test_no_order_is_drawn_twice_however_many_datasets_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of millions of samples it takes a second."""
    lengths = {f"set{number}": 100 for number in range(40)}
    sampler = TrainSampler(lengths, dict.fromkeys(lengths, 1 / 40), batch_size=2, seed=0)
    seeds, generator = [], np.random.PCG64
    monkeypatch.setattr(np.random, "PCG64", lambda seed: seeds.append(seed) or generator(seed))
    assert len({key for batch in islice(sampler, 400) for key in batch}) == 800
    assert len(seeds) == len(set(seeds)) == 40


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_see_together_what_one_process_sees(world: int) -> None:
    data = {"a": Noisy(25), "b": Noisy(40, offset=100)}
    alone = take(TrainLoader(data, run_config(batch_size_train=2 * world)), 12)
    ranks = [
        take(TrainLoader(data, run_config(batch_size_train=2), rank=rank, world=world), 12) for rank in range(world)
    ]
    for step, batch in enumerate(alone):
        for key in ("id", "noise"):
            torch.testing.assert_close(torch.cat([r[step][key] for r in ranks]), batch[key], rtol=0, atol=0)


def test_workers_and_position_change_nothing() -> None:
    data = {"a": Noisy(13), "b": Noisy(29, offset=100)}
    straight = take(TrainLoader(data, run_config()), 25)
    workers = take(TrainLoader(data, run_config(num_workers=2)), 25)
    sought = TrainLoader(data, run_config(num_workers=1))
    sought.sampler.start_step = sought.sampler.steps_per_epoch + 7
    assert sought.sampler.steps_per_epoch == (13 + 29) // 4
    torch.testing.assert_close(workers, straight, rtol=0, atol=0)
    torch.testing.assert_close(take(sought, 8), straight[17:], rtol=0, atol=0)


def test_samples_have_their_own_noise_each_epoch() -> None:
    batches = take(TrainLoader({"a": Noisy(8)}, run_config()), 4)
    noise = torch.cat([batch["noise"] for batch in batches]).double()
    for column in noise.t():
        assert len(set(column.tolist())) == 16


def test_global_generators_are_left_alone() -> None:
    for number in (random.seed, np.random.seed, torch.manual_seed):
        number(3)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    for number in (random.seed, np.random.seed, torch.manual_seed):
        number(3)
    take(TrainLoader({"a": Noisy(8)}, run_config()), 3)
    take(TrainLoader({"a": Noisy(8)}, run_config(num_workers=1)), 1)
    list(EvalLoader(Noisy(0), run_config()))
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_mixing_follows_sizes_or_ratios() -> None:
    data = {"a": Noisy(10), "b": Noisy(30, offset=100)}
    for ratios, expected in ((None, 0.25), ({"a": 3, "b": 1}, 0.75), ({"a": 0, "b": 1}, 0.0)):
        sampler = TrainLoader(data, run_config(train_dataset_ratios=ratios)).sampler
        share = Counter(sampler.dataset_at(step) for step in range(4000))["a"] / 4000
        assert share == pytest.approx(expected, abs=0.03)
    batches = take(TrainLoader(data, run_config()), 20)
    assert all(len({i >= 100 for i in batch["id"].tolist()}) == 1 for batch in batches)


def test_splits_laid_out_for_evaluation_are_not_trained_on() -> None:
    """They would teach the instruction as if it were a caption, or end in a KeyError in the midst of an epoch."""

    class Evaluated(Noisy, BaseDataset):
        training = False

    text = r"run\.train_splits: 'a' lays out 'val' for evaluation.*annotations\.train"
    for splits in (["val"], ["train", "val"]):
        with pytest.raises(ValueError, match=text):
            train_sets({"a": {"train": Noisy(4), "val": Evaluated(4)}}, splits)
    with pytest.raises(ValueError, match=text):
        train_sets({"a": {"train": Noisy(4), "val": type("Other", (Noisy,), {})(4)}}, ["train", "val"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch_size_train": 9}, r"'a' has 8 training samples.*global batch of 9.*batch_size_train"),
        ({"train_dataset_ratios": {"c": 1}}, r"\['c'\].*\['a'\]"),
        ({"train_dataset_ratios": {"a": 0}}, "not all 0"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TrainLoader({"a": Noisy(8)}, run_config(**changes))


def test_no_training_data() -> None:
    with pytest.raises(ValueError, match="train_splits"):
        TrainLoader({}, run_config())


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_sample_stops_by_default(workers: int) -> None:
    loader = TrainLoader({"a": Noisy(8, broken=[3])}, run_config(num_workers=workers))
    with pytest.raises(UnreadableSample, match=r"^image broken3\.jpg is cut short\. .*max_unreadable_share"):
        take(loader, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_allowed_share_is_replaced_and_counted(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    run = run_config(num_workers=workers, max_unreadable_share=0.25, batch_size_train=8)
    loader = TrainLoader({"a": Noisy(8, broken=[3, 4])}, run)
    batch = take(loader, 1)[0]
    assert Counter(batch["id"].tolist()) == Counter([0, 1, 2, 5, 5, 5, 6, 7])
    assert (loader.seen, loader.unreadable) == (8, 2)
    assert "2 of 8" in caplog.text
    assert "broken3.jpg" in caplog.text


def test_too_many_unreadable_samples() -> None:
    loader = TrainLoader({"a": Noisy(100, broken=range(0, 100, 2))}, run_config(max_unreadable_share=0.1))
    with pytest.raises(UnreadableSample, match=r"1[1-4] of \d+ training samples are unreadable.*0\.1.*broken"):
        take(loader, 25)
    nothing = TrainLoader({"a": Noisy(8, broken=range(8))}, run_config(max_unreadable_share=1.0))
    with pytest.raises(UnreadableSample, match="unreadable"):
        take(nothing, 1)


@pytest.mark.parametrize(("length", "world"), [(10, 1), (10, 3), (2, 4), (0, 2)])
def test_evaluation_sees_each_sample_once(length: int, world: int) -> None:
    dataset = Noisy(length)
    loaders = [EvalLoader(dataset, run_config(batch_size_eval=2), rank=r, world=world) for r in range(world)]
    seen = [[i for batch in loader for i in batch["id"].tolist()] for loader in loaders]
    assert [index for part in seen for index in part] == list(range(length))
    assert {len(part) for part in seen} <= {length // world, -(-length // world)}
    assert [len(loader) for loader in loaders] == [-(-len(part) // 2) for part in seen]
    assert loaders[0].dataset is dataset


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_never_skips(workers: int) -> None:
    loader = EvalLoader(Noisy(4, broken=[2]), run_config(num_workers=workers, max_unreadable_share=1.0))
    with pytest.raises(UnreadableSample, match=r"^image broken2\.jpg"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_task_chooses_batches_and_leaves_out_unreadable_samples(workers: int) -> None:
    """`positions` are the indices of those that are there, also where none of a batch is."""
    dataset, batches = Noisy(8, offset=100, broken=[2, 6]), [range(5, 8), [2], range(3)]
    run = run_config(num_workers=workers, max_unreadable_share=0.5)
    loader = EvalLoader(dataset, run, rank=1, world=2, batches=batches)
    assert len(loader) == 3
    found = list(loader)
    assert [batch["positions"] for batch in found] == [[5, 7], [], [0, 1]]
    assert [batch["id"].tolist() for batch in (found[0], found[2])] == [[105, 107], [100, 101]]
    assert (loader.seen, loader.unreadable) == (7, 3)


@pytest.mark.parametrize(("share", "words"), [(0.0, "To skip"), (0.2, "2 of 4 samples.*0.2")])
def test_more_unreadable_samples_than_allowed_end_the_evaluation(share: float, words: str) -> None:
    run = run_config(max_unreadable_share=share)
    with pytest.raises(UnreadableSample, match=words):
        list(EvalLoader(Noisy(8, broken=[2, 3]), run, batches=[range(4), range(4, 8)]))


def test_to_device_is_nested() -> None:
    batch = {"image": torch.ones(2), "more": [(torch.ones(1), "text"), {"n": 3}]}
    moved = to_device(batch, "meta")
    assert moved["image"].is_meta
    assert moved["more"][0][0].is_meta
    assert moved["more"][0][1] == "text"
    assert moved["more"][1] == {"n": 3}


def test_splits() -> None:
    a, b, c, d = Noisy(3), Noisy(5, offset=10), Noisy(2), Noisy(4)
    datasets = {"x": {"train": a, "extra": b, "val": c}, "y": {"val": d}}
    sets = train_sets(datasets, ["train", "extra"])
    assert list(sets) == ["x"]
    assert [sets["x"][i]["id"] for i in range(8)] == [0, 1, 2, 10, 11, 12, 13, 14]
    assert sets["x"].collater([sets["x"][7]])["id"].tolist() == [14]
    assert train_sets(datasets, ["train"])["x"] is a
    assert eval_sets(datasets, ["extra", "val"]) == {"extra": b, "x_val": c, "y_val": d}
    with pytest.raises(ValueError, match=r"'test'.*'y': \['val'\]"):
        train_sets(datasets, ["val", "test"])


@pytest.mark.parametrize(("length", "division"), [(50, (2, 4, 1)), (50, (4, 1, 2)), (51, (2, 2, 2))])
@pytest.mark.parametrize("mixing", ["concat", "per_step"])
def test_accumulated_batches_and_ranks_divide_one_global_batch(
    length: int, division: tuple[int, int, int], mixing: str
) -> None:
    """In each step, batches and ranks in order hold the samples of one process with the whole batch of 8."""
    accumulate, world, batch_size = division
    data = {"a": Noisy(length), "b": Noisy(30, offset=100)}
    whole = take(TrainLoader(data, run_config(batch_size_train=8, mixing=mixing)), 25)
    run = run_config(batch_size_train=batch_size, accum_grad_iters=accumulate, mixing=mixing)
    loaders = [TrainLoader(data, run, rank=rank, world=world) for rank in range(world)]
    assert {loader.sampler.steps_per_epoch for loader in loaders} == {(length + 30) // 8}
    ranks = [take(loader, 25 * accumulate) for loader in loaders]
    for step, batch in enumerate(whole):
        parts = [ranks[rank][step * accumulate + number] for number in range(accumulate) for rank in range(world)]
        for key in ("id", "noise"):
            torch.testing.assert_close(torch.cat([part[key] for part in parts]), batch[key], rtol=0, atol=0)


def test_seeking_counts_steps() -> None:
    run = run_config(batch_size_train=2, accum_grad_iters=3)
    straight = take(TrainLoader({"a": Noisy(20)}, run), 24)
    later = TrainLoader({"a": Noisy(20)}, run)
    later.sampler.start_step = 5
    torch.testing.assert_close(take(later, 9), straight[15:], rtol=0, atol=0)


def test_the_rest_of_an_epoch_is_another_in_each() -> None:
    """Of 11 samples a global batch of 8 leaves 3 out of an epoch, but none out of all."""
    batches = take(TrainLoader({"a": Noisy(11)}, run_config(accum_grad_iters=2)), 2 * 20)
    epochs = [ids(batches[start : start + 2]) for start in range(0, 40, 2)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert set().union(*epochs) == set(range(11))


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(2, 1, 1), (1, 1, 1), (16, 1, 15), (16, 4, 3), (64, 2, 16), (4, 8, 1)]
)
def test_workers_are_chosen_from_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, workers: int
) -> None:
    monkeypatch.setattr("lavis_lite.runners.workers.num_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert loader_workers(run_config(num_workers="auto")) == workers
    assert loader_workers(run_config(num_workers=3)) == 3


@pytest.mark.parametrize(("workers", "given", "factor"), [(0, 5, None), (1, 5, 5), (1, None, 2)])
def test_workers_read_ahead_as_far_as_they_are_told(workers: int, given: int | None, factor: int | None) -> None:
    run = run_config(num_workers=workers, prefetch_factor=given)
    for loader in (TrainLoader({"a": Noisy(8)}, run), EvalLoader(Noisy(8), run)):
        assert loader.loader.prefetch_factor == factor


def test_an_accelerator_copies_one_batch_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are the same; what is read ahead does not count as seen."""
    run = run_config(batch_size_train=2)
    expected = take(TrainLoader({"a": Noisy(6)}, run), 4)
    data = Noisy(6)
    read: list[int] = []
    plain = Noisy.__getitem__
    monkeypatch.setattr(Noisy, "__getitem__", lambda self, index: read.append(index) or plain(self, index))
    with simulated(monkeypatch):
        loader = TrainLoader({"a": data}, run, device=DEVICE)
        batches = iter(loader)
        for number, known in enumerate(expected, start=1):
            batch = next(batches)
            assert batch["id"].device == DEVICE
            assert (loader.seen, len(read)) == (2 * number, 2 * number + 2)
            assert batch["id"].tolist() == known["id"].tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_that_are_copied_ahead_arrive_whole() -> None:
    """Each batch is read by a kernel that runs while later ones are copied."""
    run, device = run_config(batch_size_train=4), torch.device("cuda", 0)
    expected = take(TrainLoader({"a": Noisy(40)}, run), 30)
    found = []
    for batch in islice(iter(TrainLoader({"a": Noisy(40)}, run, device=device)), 30):
        torch.cuda._sleep(1_000_000)
        found.append({key: value + 0 for key, value in batch.items()})
    for own, other in zip(found, expected, strict=True):
        assert all(torch.equal(own[key].cpu(), other[key]) for key in other)
