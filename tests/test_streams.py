"""Streams of shards: order, division into parts, exact resume, unreadable samples, mixtures, sources, errors."""

import bz2
import functools
import gzip
import http.server
import io
import lzma
import random
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import cli_helpers
import fsspec
import pytest
import shard_helpers
import torch
from host_waits import DEVICE, simulated
from test_loaders import Noisy, run_config

from lavis_lite.common import checkpoint
from lavis_lite.common.errors import InputError, MissingFileError, SettingError, UnreadableSample
from lavis_lite.common.registry import registry
from lavis_lite.common.rng import hash_seed
from lavis_lite.datasets import streams
from lavis_lite.datasets.base import BaseBuilder
from lavis_lite.datasets.stream_shards import read_shard
from lavis_lite.datasets.streams import Item, Part, StreamDataset
from lavis_lite.runners.loaders import TrainLoader, train_sets
from lavis_lite.runners.resume import annotation_digests
from lavis_lite.runners.streaming import merged_positions

SIZES = [7, 5, 9, 4, 1, 6]
TOTAL = sum(SIZES)
EYE = {name: {"name": "blip_image_eval", "image_size": 16} for name in ("train", "eval")}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return shard_helpers.write_shards(tmp_path_factory.mktemp("shards"), SIZES)


def builder(
    storage: Any, *, layout: str = "caption", more: dict[str, Any] | None = None, **settings: Any
) -> BaseBuilder:
    settings = {"epoch_length": 24, "shuffle_buffer": 4, **settings}
    info = {"annotations": {"train": {"storage": storage}}}
    return registry.get_builder_class(layout)(build_info=info, stream=settings, vis_processor=EYE, **(more or {}))


def stream(storage: Any, **settings: Any) -> StreamDataset:
    if isinstance(storage, list):
        storage = list(map(str, storage))
    dataset = builder(storage, **settings).build()["train"]
    assert isinstance(dataset, StreamDataset)
    return dataset


def number(item: Item) -> int:
    """The sample's number, as its text and its picture tell it."""
    assert item.sample is not None, item.problem
    told = int(item.sample["text_input"].split()[-1])
    return told


def take(dataset: StreamDataset, part: Part, count: int, **options: Any) -> list[Item]:
    return list(islice(dataset.items(part, seed=3, **options), count))


@pytest.mark.parametrize("num_parts", [1, 2, 3, 6])
def test_each_pass_gives_every_sample_once_to_one_part(shards: list[Path], num_parts: int) -> None:
    dataset = stream(shards)
    owners: dict[int, int] = {}
    for part in range(num_parts):
        draws = len(range(part, len(SIZES), num_parts))
        first_pass = [dataset.shard_at(Part(part, num_parts), draw, seed=3) for draw in range(draws)]
        size = sum(SIZES[int(Path(name).stem[-4:])] for name in first_pass)
        numbers = [number(item) for item in take(dataset, Part(part, num_parts), size, block_size=1)]
        assert len(set(numbers)) == size
        assert not owners.keys() & set(numbers)
        owners |= dict.fromkeys(numbers, part)
    assert sorted(owners) == list(range(TOTAL))


def test_passes_and_seeds_differ_and_a_block_is_a_permutation(shards: list[Path]) -> None:
    dataset = stream(shards)
    numbers = [number(item) for item in take(dataset, Part(0, 1), 3 * TOTAL)]
    passes = [numbers[:TOTAL], numbers[TOTAL : 2 * TOTAL], numbers[2 * TOTAL :]]
    assert passes[0] != passes[1] != passes[2]
    ordered = [number(item) for item in take(dataset, Part(0, 1), 3 * TOTAL, block_size=1)]
    assert numbers != ordered
    for first in range(0, 3 * TOTAL - 4, 4):
        assert sorted(numbers[first : first + 4]) == sorted(ordered[first : first + 4])
    other = [number(item) for item in islice(dataset.items(Part(0, 1), seed=4), TOTAL)]
    assert other != numbers[:TOTAL]


@pytest.mark.parametrize(
    ("part", "resampled", "positions"),
    [(0, False, range(1, 24)), (1, False, [4, 13]), (0, True, [4, 13]), (1, True, [5])],
)
def test_resume_at_any_position(shards: list[Path], part: int, resampled: bool, positions: Sequence[int]) -> None:
    dataset = stream(shards, resampled=resampled)
    whole = take(dataset, Part(part, 2), 24)
    for taken in positions:
        rest = take(dataset, Part(part, 2), min(24 - taken, 6), start=whole[taken - 1].position)
        expected = whole[taken : taken + 6]
        cli_helpers.assert_same_state([item.sample for item in expected], [item.sample for item in rest])
        assert [item.position for item in rest] == [item.position for item in expected]


def test_shards_before_the_position_are_not_opened(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = stream(shards)
    whole = take(dataset, Part(0, 1), TOTAL)
    opened = []
    read = streams.read_part
    monkeypatch.setattr(streams, "read_part", lambda name: opened.append(name) or read(name))
    (following,) = take(dataset, Part(0, 1), 1, start=whole[-2].position)
    assert number(following) == number(whole[-1])
    draw = whole[-2].position.draw
    assert draw >= 3
    assert opened == [dataset.shard_at(Part(0, 1), n, seed=3) for n in range(draw, draw + len(opened))]


def test_resampled_shards_are_drawn_with_replacement(shards: list[Path]) -> None:
    dataset = stream(shards, resampled=True)
    counts = Counter(dataset.shard_at(Part(0, 1), draw, seed=3) for draw in range(6000))
    assert set(counts) == set(map(str, shards))
    assert all(850 < count < 1150 for count in counts.values())
    runs = [dataset.shard_at(Part(0, 1), draw, seed=3) for draw in range(100)]
    assert any(len(set(runs[first : first + 6])) < 6 for first in range(0, 96, 6))


def test_members_that_do_not_follow_each_other_are_named(tmp_path: Path) -> None:
    """As `tar` writes them that is given all images, and then all texts."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for suffix, content in {"png": shard_helpers.png, "txt": lambda n: f"text {n}".encode()}.items():
            for number in range(12):
                info = tarfile.TarInfo(f"{number:03}.{suffix}")
                info.size = len(content(number))
                tar.addfile(info, io.BytesIO(content(number)))
    with pytest.raises(InputError, match=r"a\.tar: sample 000: .*000\.png, and later 000\.txt.*sort") as caught:
        stream([path])
    assert "`stream`" in str(caught.value)
    again = shard_helpers.write_shard(tmp_path / "b.tar", [shard_helpers.sample(n) for n in (0, 1, 0)])
    assert [loaded.record["__key__"] for loaded in read_shard(str(again))] == ["000000", "000001", "000000"]


def test_image_ids_are_unique_over_blocks_and_parts(tmp_path: Path) -> None:
    """Two captions of one picture share its id; no two pictures do."""
    samples = [{**shard_helpers.sample(n), "json": {"caption": [f"a {n}", f"b {n}"]}} for n in range(12)]
    for one in samples:
        del one["txt"]
    shards = [shard_helpers.write_shard(tmp_path / f"{k}.tar", samples[6 * k : 6 * k + 6]) for k in range(2)]
    dataset = stream(shards, shuffle_buffer=3)
    ids: dict[int, set[int]] = {}
    for part in range(2):
        for item in take(dataset, Part(part, 2), 12):
            ids.setdefault(item.sample["image_id"], set()).add(number(item))
    assert len(ids) == 12
    assert all(len(numbers) == 1 for numbers in ids.values())


# Loaders


def loaded_numbers(batches: Sequence[dict[str, Any]]) -> list[list[int]]:
    return [[int(text.split()[-1]) for text in batch["text_input"]] for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_a_loader_continues_after_the_batch_that_training_took(
    shards: list[Path], world: int, num_workers: int
) -> None:
    run = run_config(num_workers=num_workers, batch_size_train=3)
    make = functools.partial(TrainLoader, {"web": stream(shards)}, run, world=world)
    whole = [list(islice(iter(make(rank=rank)), 12)) for rank in range(world)]
    for taken in (1, 4, 7):
        states = [state_after(make(rank=rank), taken) for rank in range(world)]
        for rank in range(world):
            second = make(rank=rank)
            second.streams["web"].load_state_dict(merged_positions(states))
            cli_helpers.assert_same_state(whole[rank][taken:], list(islice(iter(second), 12 - taken)))


def state_after(loader: TrainLoader, taken: int) -> dict[str, Any]:
    """The stream's position after batches that were taken, with others read ahead."""
    batches = iter(loader)
    for _ in range(taken):
        next(batches)
    return loader.streams["web"].state_dict()


def global_batches(shards: list[Path], *, world: int, batch: int, accumulate: int, workers: int, **more: Any) -> Any:
    """Function from (first step, end, merged state) to the global batches, lists of samples, and the state after."""

    def take(start: int, end: int, state: dict[str, Any] | None) -> tuple[list[list[int]], dict[str, Any]]:
        steps: list[list[int]] = [[] for _ in range(start, end)]
        states = []
        run = run_config(num_workers=workers, batch_size_train=batch, accum_grad_iters=accumulate)
        loaders = [TrainLoader({"web": stream(shards, **more)}, run, rank=rank, world=world) for rank in range(world)]
        for loader in loaders:
            if state is not None:
                loader.streams["web"].load_state_dict(state)
        taken = [loaded_numbers(list(islice(iter(loader), (end - start) * accumulate))) for loader in loaders]
        for step, turn in ((step, turn) for step in range(end - start) for turn in range(accumulate)):
            for batches in taken:
                steps[step] += batches[step * accumulate + turn]
        states = [loader.streams["web"].state_dict() for loader in loaders]
        return steps, merged_positions(states)

    return take


@pytest.mark.parametrize("divisions", [[(1, 4), (2, 2), (4, 1)], [(4, 1), (1, 4), (2, 2)], [(2, 2), (4, 1), (2, 2)]])
def test_a_stream_continues_on_another_number_of_processes(
    shards: list[Path], divisions: list[tuple[int, int]]
) -> None:
    """The same global batches, sample by sample, whatever the processes and their workers are."""
    common = {"batch": 2, "parts": 4}
    expected, _ = global_batches(shards, world=1, accumulate=4, workers=0, **common)(0, 9, None)
    found, state = [], None
    for part, (world, accumulate) in enumerate(divisions):
        take_ = global_batches(shards, world=world, accumulate=accumulate, workers=part, **common)
        steps, state = take_(3 * part, 3 * part + 3, state)
        found += steps
    assert found == expected


def test_a_stream_in_other_batches_gives_every_sample_once(shards: list[Path]) -> None:
    """One process with batches of four, then two with batches of two: each part continues where it was."""
    first, state = global_batches(shards, world=1, batch=4, accumulate=1, workers=2)(0, 3, None)
    rest, _ = global_batches(shards, world=2, batch=2, accumulate=1, workers=2)(3, 40, state)
    given = [first[0] + first[2], first[1]]  # by part
    for step in rest:
        given = [given[0] + step[:2], given[1] + step[2:]]
    seed = hash_seed(run_config().seed, "stream", "web")
    for part, numbers in enumerate(given):
        items = stream(shards).items(Part(part, 2), seed=seed)
        assert numbers == [number(item) for item in islice(items, len(numbers))]
    assert {*given[0], *given[1]} == set(range(TOTAL))


def test_parts_that_processes_cannot_share(shards: list[Path]) -> None:
    _, state = global_batches(shards, world=1, batch=2, accumulate=1, workers=2)(0, 2, None)
    with pytest.raises(InputError, match=r"'web'.* 2 parts .* 3 processes: start 1, 2 of them"):
        global_batches(shards, world=3, batch=2, accumulate=1, workers=1)(2, 4, state)
    with pytest.raises(InputError, match=r"'web'.* 4 parts .* 3 processes"):
        global_batches(shards, world=3, batch=2, accumulate=1, workers=1, parts=4)(0, 2, None)


def test_what_is_copied_ahead_does_not_count_as_taken(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_config(num_workers=0, batch_size_train=3)
    whole = loaded_numbers(list(islice(iter(TrainLoader({"web": stream(shards)}, run)), 9)))
    with simulated(monkeypatch):
        first = TrainLoader({"web": stream(shards)}, run, device=DEVICE)
        batches = iter(first)
        taken = loaded_numbers([next(batches) for _ in range(4)])
        state = first.streams["web"].state_dict()
    second = TrainLoader({"web": stream(shards)}, run)
    second.streams["web"].load_state_dict(state)
    assert taken + loaded_numbers(list(islice(iter(second), 5))) == whole


def test_processes_and_workers_have_shards_of_their_own(shards: list[Path]) -> None:
    """Batches of one sample, as many as the smallest part of a pass has: no sample twice in the world."""
    run = run_config(num_workers=3, batch_size_train=1)
    seen: list[int] = []
    for rank in range(2):
        batches = list(islice(iter(TrainLoader({"web": stream(shards)}, run, rank=rank, world=2)), 3))
        seen += [numbers[0] for numbers in loaded_numbers(batches)]
    owner = {n: shard for shard, size in enumerate(SIZES) for n in range(sum(SIZES[:shard]), sum(SIZES[:shard]) + size)}
    assert sorted(owner[n] for n in seen) == list(range(6))


class Numbered(Noisy):
    """A map-style set whose samples look like a stream's."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.zeros(1), "text_input": f"own {index + 1000}"}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {"image": torch.stack([s["image"] for s in samples]), "text_input": [s["text_input"] for s in samples]}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mixture_takes_each_step_from_the_set_that_is_drawn(shards: list[Path], num_workers: int) -> None:
    sets = {"own": Numbered(20), "web": stream(shards)}
    run = run_config(num_workers=num_workers, accum_grad_iters=2, train_dataset_ratios={"own": 1, "web": 3})
    loader = TrainLoader(sets, run)
    steps = 40
    numbers = loaded_numbers(list(islice(iter(loader), 2 * steps)))
    drawn = [loader.sampler.dataset_at(step) for step in range(steps) for _ in range(2)]
    assert [("web" if batch[0] < 1000 else "own") for batch in numbers] == drawn
    assert 20 <= drawn[::2].count("web") < 40
    alone = TrainLoader({"own": Numbered(20)}, run_config(num_workers=0, accum_grad_iters=2))
    own = [batch for batch in numbers if batch[0] >= 1000]
    assert own == loaded_numbers(list(islice(iter(alone), len(own))))  # as without the stream
    web = TrainLoader({"web": stream(shards)}, run_config(num_workers=num_workers, accum_grad_iters=2))
    assert [b for b in numbers if b[0] < 1000] == loaded_numbers(list(islice(iter(web), drawn.count("web"))))


def test_a_mixture_continues_in_the_middle(shards: list[Path]) -> None:
    def make() -> TrainLoader:
        run = run_config(num_workers=2, train_dataset_ratios={"own": 1, "web": 1})
        return TrainLoader({"own": Numbered(20), "web": stream(shards)}, run)

    whole = loaded_numbers(list(islice(iter(make()), 30)))
    first, second = make(), make()
    batches = iter(first)
    for _ in range(11):
        next(batches)
    second.streams["web"].load_state_dict(merged_positions([first.streams["web"].state_dict()]))
    second.sampler.start_step = 11
    assert loaded_numbers(list(islice(iter(second), 19))) == whole[11:]


@pytest.mark.parametrize("settings", [{"mixing": "concat"}, {"num_workers": 7}])
def test_what_a_stream_cannot_do_is_refused(shards: list[Path], settings: dict[str, Any]) -> None:
    sets = {"own": Numbered(20), "web": stream(shards)}
    with pytest.raises(InputError, match="web"):
        TrainLoader(sets, run_config(**settings))


def test_splits_of_which_one_is_a_stream_are_not_joined(shards: list[Path]) -> None:
    with pytest.raises(InputError, match="web"):
        train_sets({"web": {"train": stream(shards), "val": Numbered(4)}}, ["train", "val"])


# Unreadable samples


@pytest.fixture
def bad_shards(tmp_path: Path) -> list[Path]:
    """Forty samples in four shards, of which five are bad, and the last shard is cut after 38 (with a sixth)."""
    samples = [shard_helpers.sample(n) for n in range(40)]
    samples[3]["png"] = samples[3]["png"][:40]
    del samples[11]["png"]
    del samples[12]["txt"]
    samples[21]["json"] = b"{broken"
    samples[29]["txt"] = b"\xff\xfe bad"
    shards = [shard_helpers.write_shard(tmp_path / f"{k}.tar", samples[10 * k : 10 * k + 10]) for k in range(4)]
    data = shards[3].read_bytes()
    shards[3].write_bytes(data[: data.index(b"000038.txt") - 100])
    return shards


BAD = {3, 11, 12, 21, 29, 38, 39}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_counted_and_left_out(bad_shards: list[Path], num_workers: int) -> None:
    run = run_config(num_workers=num_workers, batch_size_train=1, max_unreadable_share=0.5)
    loader = TrainLoader({"web": stream(bad_shards)}, run)
    batches = list(islice(iter(loader), 33))
    numbers = [one[0] for one in loaded_numbers(batches)]
    assert not BAD & set(numbers)
    if num_workers == 0:
        assert sorted(numbers) == sorted(set(range(40)) - BAD)
        assert loader.unreadable in (
            5,
            6,
            7,
        )  # the cut of the last shard is found after it; the next pass may have begun


def test_problems_name_shard_and_sample(bad_shards: list[Path]) -> None:
    problems = {item.problem for item in take(stream(bad_shards), Part(0, 1), 80) if item.problem}
    named = [("0.tar", "000003.png"), ("1.tar", "000011"), ("1.tar", "000012"), ("2.tar", "000021.json")]
    named += [("2.tar", "000029.txt"), ("3.tar", "8 samples")]
    assert len(problems) == len(named)
    for shard, place in named:
        assert sum(shard in problem and place in problem for problem in problems) == 1, (shard, place, problems)


def test_a_bad_sample_ends_a_run_that_allows_none(bad_shards: list[Path]) -> None:
    with pytest.raises(UnreadableSample, match="max_unreadable_share"):
        list(islice(iter(TrainLoader({"web": stream(bad_shards)}, run_config())), 40))


def test_more_bad_samples_than_allowed_end_the_run(bad_shards: list[Path]) -> None:
    run = run_config(max_unreadable_share=0.01)
    with pytest.raises(UnreadableSample, match=r"max_unreadable_share=0\.01"):
        list(islice(iter(TrainLoader({"web": stream(bad_shards, epoch_length=100)}, run)), 100))


def test_resume_among_bad_samples_counts_none_twice(bad_shards: list[Path]) -> None:
    dataset = stream(bad_shards)
    whole = [(item.problem, item.sample and number(item)) for item in take(dataset, Part(0, 1), 60)]
    items = take(dataset, Part(0, 1), 60)
    for taken in range(1, 60):
        rest = take(dataset, Part(0, 1), min(60 - taken, 5), start=items[taken - 1].position)
        assert [(item.problem, item.sample and number(item)) for item in rest] == whole[taken : taken + 5]


def test_a_stream_that_gives_nothing_more_ends(shards: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    gone = shard_helpers.write_shards(folder, [3, 3])
    dataset = stream(gone)
    for path in gone:
        path.unlink()
    items = list(dataset.items(Part(0, 1), seed=3))
    assert len(items) == streams.MOST_PROBLEMS
    assert "000" in items[0].problem
    with pytest.raises(UnreadableSample, match="train-000"):
        next(iter(TrainLoader({"web": dataset}, run_config(max_unreadable_share=1.0))))


# Sources and settings


@pytest.fixture
def web_server(shards: list[Path]) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(shards[0].parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_shards_of_any_length(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    """Whatever is unread when the tar ends, such as a checksum in a block of its own, is not taken for damage."""
    for size in range(10_160, 10_260, 4):
        path = tmp_path / f"{size}.tar.gz"
        with tarfile.open(path.with_suffix(""), "w") as tar:
            for name, content in (("0.txt", b"a wall"), ("0.bin", random.Random(size).randbytes(size - 300))):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        whole = compress(path.with_suffix("").read_bytes())
        path.write_bytes(whole)
        assert [one.problem for one in read_shard(str(path))] == [""], len(whole)
    path.write_bytes(whole[:-3])
    assert "cut, damaged" in [one.problem for one in read_shard(str(path))][-1]


@pytest.mark.parametrize("kind", ["pipe", "file", "http", "memory", "gzip", "braces"])
def test_sources(shards: list[Path], kind: str, tmp_path: Path, web_server: str) -> None:
    names = [str(path) for path in shards]
    if kind == "pipe":
        names = [f"pipe:cat {name}" for name in names]
    elif kind == "file":
        names = [f"file://{name}" for name in names]
    elif kind == "http":
        names = [f"{web_server}/{path.name}" for path in shards]
    elif kind == "memory":
        names = [f"memory://{path.name}" for path in shards]
        for name, path in zip(names, shards, strict=True):
            fsspec.open(name, "wb").open().write(path.read_bytes())
            with fsspec.open(name, "wb") as file:
                file.write(path.read_bytes())
    elif kind == "gzip":
        names = [str(tmp_path / f"{path.name}.gz") for path in shards]
        for name, path in zip(names, shards, strict=True):
            Path(name).write_bytes(gzip.compress(path.read_bytes()))
    plain, other = (
        stream(shards),
        stream(str(shards[0].parent / "train-{0000..0005}.tar") if kind == "braces" else names),
    )
    expected = [item.sample for item in take(plain, Part(0, 1), TOTAL)]
    cli_helpers.assert_same_state(expected, [item.sample for item in take(other, Part(0, 1), TOTAL)])


def test_an_address_that_does_not_answer(shards: list[Path], web_server: str) -> None:
    with pytest.raises(InputError, match=r"missing\.tar.*exit 22"):  # curl's for 404
        stream([f"{web_server}/missing.tar"])


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"epoch_length": 0}, "epoch_length"), ({"shuffle_buffer": 0}, "shuffle_buffer"), ({"bufer": 3}, "bufer")],
)
def test_wrong_settings(shards: list[Path], settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        stream(shards, **settings)


def test_a_missing_shard(shards: list[Path]) -> None:
    with pytest.raises(MissingFileError, match="absent"):
        stream([*shards, Path("/absent.tar")])


def test_a_set_without_shards_is_refused(shapes_data: Path) -> None:
    small = {"num_train": 4, "num_val": 2, "num_test": 2}
    with pytest.raises(InputError, match="stream"):
        registry.get_builder_class("shapes_caption")(stream={"epoch_length": 4}, **small).build(["train"])


def test_split_off_is_refused(shards: list[Path]) -> None:
    with pytest.raises(InputError, match="split_off"):
        stream(shards, more={"split_off": {"val": 0.1}})


def test_columns_that_no_sample_has(shards: list[Path]) -> None:
    with pytest.raises(InputError, match="alt_text"):
        stream(shards, more={"columns": {"caption": "alt_text"}})


@pytest.mark.parametrize(
    ("layout", "fields", "more"),
    [
        ("pairs", {"caption": "a red circle"}, {}),
        ("retrieval", {"caption": ["a red circle", "a disc"]}, {}),
        ("vqa", {"question": "what colour?", "answer": ["red", "red"]}, {}),
        ("classification", {"sentence": "it is red", "label": "yes"}, {"classes": ["no", "yes"]}),
        ("instruct", {"instruction": "What colour?", "output": "red"}, {}),
    ],
)
def test_samples_are_those_of_the_layout(
    layout: str, fields: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    """As from the same shards with an index, but for the ids."""
    samples = [{"__key__": f"{n}", "png": shard_helpers.png(n), "json": fields | {"own": n}} for n in range(5)]
    path = shard_helpers.write_shard(tmp_path / "a.tar", samples)
    streamed = [item.sample for item in take(stream([path], layout=layout, more=more), Part(0, 1), 5, block_size=1)]
    section = {"build_info": {"annotations": {"train": {"storage": str(path)}}}, "vis_processor": EYE}
    indexed = registry.get_builder_class(layout)(**section, **more).build()["train"]
    for found, expected in zip(streamed, [indexed[index] for index in range(5)], strict=True):
        ids = {"instance_id", "image_id"}
        assert found.keys() == expected.keys()
        if layout == "retrieval":  # two samples per image, permuted within it
            found["text_input"] = expected["text_input"]
        cli_helpers.assert_same_state(
            {key: value for key, value in found.items() if key not in ids},
            {key: value for key, value in expected.items() if key not in ids},
        )


def test_digests_follow_the_names_not_the_place(shards: list[Path]) -> None:
    plain, other = stream(shards), stream([f"pipe:cat {path}" for path in shards])
    assert annotation_digests({"web": plain}) == annotation_digests({"web": other})
    assert annotation_digests({"web": plain}) != annotation_digests({"web": stream(shards[1:])})


# The real entry points


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes_data: Path) -> Any:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))

    def make(**run: Any) -> Path:
        section = shard_helpers.stream_section(tmp_path)
        val = shard_helpers.write_shards(tmp_path, [5], name="val")
        section["build_info"]["annotations"]["val"] = {"storage": str(val[0])}
        changes = {"datasets": {"shapes_caption": None, "web": section}, "run": {"test_splits": [], **run}}
        return cli_helpers.project(tmp_path, "caption", changes)

    return make


@pytest.mark.slow
def test_other_workers_resume(project: Any) -> None:
    """Two parts from the first start on: two workers have one each, the process itself both."""
    path = project(max_iters=2, max_epoch=1)
    assert cli_helpers.train(path, "run.num_workers=2") == 0
    last = path.parent / "output" / "job" / "checkpoint_last.pth"
    assert checkpoint.load(last)["ranks"][0]["streams"]["web"]["num_batches"] == 2
    losses = []
    for job, workers in (("same", 2), ("other", 0)):
        options = ["run.max_iters=12", "run.max_epoch=4", f"run.num_workers={workers}"]
        assert cli_helpers.train(path, *options, flags=["--resume", str(last)], job=job) == 0
        losses.append([row["loss"] for row in cli_helpers.steps(last.parents[1] / job)])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10


@pytest.mark.slow
def test_dry_run(project: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_helpers.train(project(), flags=["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "web/train: 24" in out
    assert "5 image files found" in out


def test_ids_of_records_that_come_again_within_a_block(tmp_path: Path) -> None:
    samples = [{**shard_helpers.sample(n), "json": {"instance_id": f"s{n}"}} for n in range(3)]
    dataset = stream([shard_helpers.write_shard(tmp_path / "a.tar", samples)], shuffle_buffer=7)
    found = take(dataset, Part(0, 1), 21)
    assert Counter(map(number, found)) == {0: 7, 1: 7, 2: 7}
    assert [item.read()["instance_id"] for item in found] == [f"0-{n}" for n in range(21)]


def test_a_first_shard_that_is_cut_is_one_problem(tmp_path: Path) -> None:
    cut, whole = shard_helpers.write_shards(tmp_path, [3, 3])
    cut.write_bytes(cut.read_bytes()[:600])
    found = take(stream([cut, whole], shuffle_buffer=3), Part(0, 1), 20)
    assert {number(item) for item in found if item.sample} == {3, 4, 5}
    assert {str(cut) in item.problem for item in found if not item.sample} == {True}
    with pytest.raises(InputError, match=r"train-0000\.tar: none of the first samples can be used"):
        stream([cut])


def test_blank_texts_of_blocks_are_not_logged_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = [{**shard_helpers.sample(n), "txt": f"picture {n}" if n % 2 else ""} for n in range(6)]
    path = shard_helpers.write_shard(tmp_path / "a.tar", samples)
    dataset = builder([str(path)], more={"blank_texts": "skip"}, shuffle_buffer=2).build()["train"]
    assert isinstance(dataset, StreamDataset)
    assert [number(item) for item in take(dataset, Part(0, 1), 3)] == [1, 3, 5]
    assert "blank" not in caplog.text


def test_a_bad_sample_is_named_by_its_key(tmp_path: Path) -> None:
    alone = {key: value for key, value in shard_helpers.sample(1).items() if key != "txt"}
    path = shard_helpers.write_shard(tmp_path / "a.tar", [shard_helpers.sample(0), alone])
    problems = {item.problem for item in take(stream([path], shuffle_buffer=2), Part(0, 1), 6) if item.problem}
    (problem,) = problems
    assert problem.startswith(f"{path}: sample 000001 has no field 'caption'")


def test_a_stream_is_not_evaluated(project: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_helpers.evaluate(project(), "run.test_splits=[train]", "run.metrics=[bleu]") == 2
    error = next(line for line in capsys.readouterr().err.splitlines() if "error:" in line)
    assert all(word in error for word in ("/train", "stream", "another split")), error
