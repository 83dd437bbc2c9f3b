"""Training sets mixed within each batch: each sample once per epoch, exact resume, keys, image ids, wrong sets."""

import json
import logging
import signal
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cli_helpers
import pytest
import test_runner
import torch
import warm
from test_mixture import by_dataset
from test_runner import ToyTask, assert_equal, last, losses, make, mixed_data, rows
from torch.utils.data import Dataset

from lavis_lite.common.errors import UnreadableSample
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.datasets.vqa import VQATrainDataset
from lavis_lite.runners.loaders import SeededDatasets, TrainLoader, train_sets
from lavis_lite.runners.sampling import Key, TrainSampler

LENGTHS = {"a": 3, "b": 17, "c": 30}
concat = {"test_splits": [], "log_freq": 4, "checkpoint_every": 3, "train_dataset_mixing": "concat"}


def sampler(*, rank: int = 0, world: int = 1, batch_size: int = 4) -> TrainSampler:
    return TrainSampler(LENGTHS, None, batch_size=batch_size, seed=5, rank=rank, world=world)


def run_config(**changes: Any) -> SimpleNamespace:
    fields = {
        "batch_size_train": 4,
        "accum_grad_iters": 1,
        "num_workers": 0,
        "prefetch_factor": None,
        "seed": 7,
        "mixing": "concat",
    }
    fields |= {"max_unreadable_share": 0.0, "train_dataset_sampling": "size"}
    fields |= {"train_dataset_factors": None, "train_dataset_ratios": None}
    return SimpleNamespace(**{**fields, **changes})


class Pairs(BaseDataset):
    """Samples with an image of `size` and further fields; nothing is read from files."""

    long_keys = ("image_id",)

    def __init__(self, length: int, *, size: int = 2, broken: tuple[int, ...] = (), **more: Any) -> None:
        self.length, self.size, self.broken, self.more = length, size, broken, more

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.broken:
            raise UnreadableSample(f"image broken{index}.jpg is cut short.")
        more = {key: value(index) if callable(value) else value for key, value in self.more.items()}
        return {"image": torch.full((3, self.size, self.size), float(index)), "text_input": f"text {index}", **more}


def joint(datasets: dict[str, Dataset], **changes: Any) -> list[dict[str, Any]]:
    """The batches of one epoch."""
    loader = TrainLoader(datasets, run_config(**changes))
    return list(islice(iter(loader), loader.sampler.steps_per_epoch))


def test_an_epoch_is_one_permutation_of_all_samples() -> None:
    every = {(name, index) for name, length in LENGTHS.items() for index in range(length)}
    epochs = [[key for batch in islice(sampler(), n * 12, (n + 1) * 12) for key in batch] for n in range(3)]
    for keys in epochs:
        found = [(key.dataset, key.position) for key in keys]
        assert len(found) == len(set(found)) == 48  # of 50, in batches of 4
        assert set(found) <= every
    orders = [tuple((key.dataset, key.position) for key in keys) for keys in epochs]
    assert len(set(orders)) == 3
    assert len({key.seed for keys in epochs for key in keys}) == 3 * 48
    mixed = [len({key.dataset for key in batch}) for batch in islice(sampler(), 12)]
    assert max(mixed) > 1


def test_the_position_in_a_batch_does_not_depend_on_the_dataset() -> None:
    """Of 300 epochs, each place of a batch holds each set as often as the set is large."""
    first = Counter(batch[0].dataset for batch in islice(sampler(), 12 * 300))
    for name, length in LENGTHS.items():
        assert first[name] / 3600 == pytest.approx(length / 50, abs=0.03)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_see_together_what_one_process_sees(world: int) -> None:
    ranks = [islice(sampler(rank=rank, world=world, batch_size=2), 40) for rank in range(world)]
    alone = islice(sampler(batch_size=2 * world), 40)
    for whole, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        assert [key for part in parts for key in part] == whole


def test_starting_later_is_the_tail() -> None:
    straight = list(islice(sampler(), 40))
    for start in (1, 11, 12, 39):
        late = sampler()
        late.start_step = start
        assert list(islice(late, 40 - start)) == straight[start:]


def test_samples_are_counted_without_reading_any() -> None:
    batches = list(islice(sampler(), 40))
    for first, end in ((0, 12), (0, 40), (5, 6), (11, 37), (7, 7)):
        found = Counter(key.dataset for batch in batches[first:end] for key in batch)
        assert sampler().counts_between(first, end) == {name: found[name] for name in LENGTHS}


def test_datasets_may_be_smaller_than_a_batch_if_all_together_are_not() -> None:
    assert sampler(batch_size=25).steps_per_epoch == 2
    with pytest.raises(ValueError, match=r"3 datasets together have 50 training samples, fewer than .* 51"):
        sampler(batch_size=51)
    with pytest.raises(ValueError, match="dataset 'b' has no training samples"):
        TrainSampler({"a": 9, "b": 0}, None, batch_size=2, seed=0)
    with pytest.raises(ValueError, match=r"'a' has 3 training samples.*or mix within batches"):
        TrainSampler(LENGTHS, dict.fromkeys(LENGTHS, 1 / 3), batch_size=4, seed=0)


def test_a_single_set_is_read_as_ever() -> None:
    """Its order and the seeds of its samples do not depend on the setting."""
    loaders = [TrainLoader({"a": Pairs(11)}, run_config(mixing=mixing, **draws)) for mixing, draws in DRAWS.items()]
    one, other = (list(islice(loader.sampler, 9)) for loader in loaders)
    assert one == other


DRAWS: dict[str, dict[str, Any]] = {
    mixing: {"train_dataset_sampling": "size", "train_dataset_factors": None, "train_dataset_ratios": None}
    for mixing in ("concat", "per_step")
}


def test_batches_keep_the_order_and_the_keys_that_all_have() -> None:
    data = {"coco": Pairs(6, image_id=lambda i: i // 2), "vg": Pairs(9, instance_id=str)}
    loader = TrainLoader(data, run_config())
    keys = list(islice(loader.sampler, 3))
    for batch, drawn in zip(loader, keys, strict=False):
        assert list(batch) == ["image", "text_input"]
        assert batch["image"].shape == (4, 3, 2, 2)
        assert batch["image"][:, 0, 0, 0].tolist() == [key.position for key in drawn]
        assert batch["text_input"] == [f"text {key.position}" for key in drawn]
    assert loader.left_out == {"image_id": ["vg"], "instance_id": ["coco"]}


def test_answers_of_two_sets_are_one_flat_list() -> None:
    """VQA's batches hold all answers flat, with their number for each question."""

    class Questions(Pairs, VQATrainDataset):
        """As Pairs, collated as questions are."""

    def fields(stem: str, count: int) -> dict[str, Any]:
        return {
            "answer": lambda i: [f"{stem}{i}.{j}" for j in range(count)],
            "weight": [1.0 / count] * count,
            "n_answers": count,
        }

    data = {"coco": Questions(5, **fields("c", 3)), "vg": Questions(5, **fields("v", 1))}
    for batch in joint(data):
        assert batch["n_answers"].tolist() == [3 if a.startswith("c") else 1 for a in first_answers(batch)]
        assert len(batch["answer"]) == len(batch["weight"]) == sum(batch["n_answers"])


def first_answers(batch: dict[str, Any]) -> list[str]:
    starts = [sum(batch["n_answers"][:i]) for i in range(4)]
    return [batch["answer"][start] for start in starts]


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (
            Pairs(9, size=3),
            r"'coco' and 'vg' cannot share a batch: 'image' is a tensor \(B, 3, 2, 2\) of float32",
        ),
        (Pairs(9, label=torch.tensor(1)), r"'label' is a list in the first, a tensor \(B\) of int64 in the second"),
    ],
)
def test_sets_that_do_not_fit_are_named_before_the_first_step(other: Pairs, text: str) -> None:
    with pytest.raises(ValueError, match=text + r".*per_step"):
        TrainLoader({"coco": Pairs(6, label="x"), "vg": other}, run_config())


def test_a_sample_without_its_set_s_keys_is_named() -> None:
    data = {"coco": Pairs(6, label=str), "vg": Pairs(9, label=str)}
    reader = SeededDatasets(data, skip_unreadable=False, keys=["image", "label", "prompt"])
    with pytest.raises(ValueError, match="a sample of coco has no 'prompt'"):
        reader.__getitems__([Key("coco", 0, 0), Key("vg", 1, 1)])


def test_unreadable_samples_are_replaced_from_their_own_set() -> None:
    data = {"coco": Pairs(4, source="coco", broken=(0, 2)), "vg": Pairs(8, source="vg")}
    batches = joint(data, max_unreadable_share=1.0)
    sources = [source for batch in batches for source in batch["source"]]
    assert Counter(sources) == {"coco": 4, "vg": 8}
    values = [int(v) for batch in batches for v in batch["image"][:, 0, 0, 0]]
    assert {v for v, s in zip(values, sources, strict=True) if s == "coco"} == {1, 3}


def test_image_ids_of_two_splits_do_not_coincide() -> None:
    splits = {"train": Pairs(4, image_id=lambda i: i), "extra": Pairs(4, image_id=lambda i: i)}
    (both,) = train_sets({"coco": splits}, ["train", "extra"]).values()
    assert [both[i]["image_id"] for i in range(8)] == [0, 1, 2, 3, *(2**40 + i for i in range(4))]
    found = joint({"vg": Pairs(8, image_id=lambda i: i), "coco": both})
    assert len({int(i) for batch in found for i in batch["image_id"]}) == 16


@pytest.mark.parametrize("mixing", ["concat", "per_step"])
def test_image_five_of_two_sets_is_not_the_same_picture(mixing: str) -> None:
    data = {name: Pairs(8, image_id=lambda i: i // 2) for name in ("coco", "vg")}
    found = joint(data, mixing=mixing, **({} if mixing == "concat" else DRAWS["per_step"]))
    ids = torch.cat([batch["image_id"] for batch in found])
    values = torch.cat([batch["image"][:, 0, 0, 0] for batch in found]).long() // 2
    assert set(ids[ids < 8].tolist()) == {0, 1, 2, 3}  # the first set's are as without the second
    assert len(set(ids.tolist())) == 8
    assert all(int(i) % 2**48 == v for i, v in zip(ids, values, strict=True))


@pytest.mark.slow
def test_a_queue_of_two_sets_takes_no_image_for_another() -> None:
    """blip_retrieval counts a queued text as true of an image with the same id."""
    model = cli_helpers.build("retrieval", alpha=0.0, queue_size=8).train()
    size = model.visual_encoder.image_size
    data = {name: Pairs(4, size=size, image_id=lambda i: i) for name in ("coco", "vg")}
    batches = joint(data)
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def itc(ids: list[torch.Tensor]) -> float:
        """The second batch's contrast, with the first one in the queue, when their images have these ids."""
        model.load_state_dict(state)
        torch.manual_seed(1)
        for batch, own in zip(batches, ids, strict=True):
            output = model({**batch, "image_id": own, "epoch": 0, "iters": 0, "num_iters_per_epoch": 1})
        return float(output["loss_itc"])

    given = [batch["image_id"] for batch in batches]
    assert itc(given) == itc(list(torch.arange(8).split(4)))
    assert itc(given) != itc([ids % 2**48 for ids in given])


def test_the_log_tells_what_was_mixed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make(tmp_path, data=mixed_data(), **concat).train()
    found = rows(tmp_path)
    assert found[0] == {"mixture": {"few": {"samples": 8, "share": 0.25}, "many": {"samples": 24, "share": 0.75}}}
    assert by_dataset(tmp_path) == [{"few": {"samples": 8}, "many": {"samples": 24}}] * 2
    assert "each batch mixes the samples of 2 datasets:" in caplog.text
    assert "mixed batches have no" not in caplog.text


@pytest.mark.usefixtures("shapes_data")
def test_the_log_and_the_dry_run_tell_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cli_helpers.project(
        tmp_path,
        "pretrain",
        {
            "datasets": {"shapes_caption": cli_helpers.SHAPES},
            "run": {"max_iters": 1, "valid_splits": [], "test_splits": []},
        },
    )
    assert cli_helpers.train(path, flags=["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "left out    image_id, which shapes_pairs lacks\n" in out
    assert "share       shapes_caption: 8" in out
    assert "% of the samples\n" in out
    assert cli_helpers.train(path) == 0
    assert (
        capsys.readouterr().err.count("mixed batches have no 'image_id', which the samples of shapes_pairs lack") == 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("die_at", [1, 5, 8, 14])
def test_killed_anywhere_and_resumed_ends_the_same(tmp_path: Path, die_at: int) -> None:
    options = [f"{key}={json.dumps(value)}" for key, value in concat.items()]
    killed = warm.start(test_runner.__file__, tmp_path / "killed", "mixed=true", *options, f"die_at={die_at}")
    make(tmp_path / "straight", data=mixed_data(), **concat).train()
    assert killed.wait(300) == -signal.SIGKILL
    make(tmp_path / "killed", data=mixed_data(), resume="auto", **concat).train()
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert by_dataset(tmp_path / "killed") == by_dataset(tmp_path / "straight")
    for key in ("model", "optimizer", "plan", "metrics", "ranks"):
        assert_equal(last(tmp_path / "killed")[key], last(tmp_path / "straight")[key])


@pytest.mark.slow
def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    changes = {**concat, "max_epoch": 1, "dropout": 0, "log_freq": 1}
    options = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    ranks = warm.start(test_runner.__file__, tmp_path / "two", "mixed=true", "batch_size_train=2", *options, world=2)
    make(tmp_path / "one", data=mixed_data(), **changes).train()
    assert ranks.wait(300) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert by_dataset(tmp_path / "two") == by_dataset(tmp_path / "one")


def test_batches_of_both_sets_reach_the_task(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    class Recorder(ToyTask):
        """Writes down which sets each batch's samples are from."""

        def train_step(self, model: torch.nn.Module, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
            """The model's losses."""
            seen.append({instance.rstrip("0123456789") for instance in samples["instance_id"]})
            return super().train_step(model, samples)

    make(tmp_path, task=Recorder(), data=mixed_data(), max_epoch=1, test_splits=[]).train()
    assert {"few", "many"} in seen


def test_instructions_and_plain_texts_share_no_batch() -> None:
    """Without its `prompt`, which the other set lacks, an instruction would be put into a prompt once more."""
    sets = {"plain": Pairs(8), "instruct": Pairs(8, prompt="{}")}
    with pytest.raises(ValueError, match=r"'instruct' and 'plain' cannot share a batch: .*per_step"):
        joint(sets)
