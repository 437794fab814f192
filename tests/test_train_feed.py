"""Pictures and words for each step: every pair once, in an order of the seed's, and what happens to bad data."""

from __future__ import annotations

import io
import tarfile
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from clipcli.errors import ClipcliError, UsageError
from clipcli.images import transform as transforms
from clipcli.records import Label
from clipcli.train import feed as feeds
from clipcli.train.config import TrainConfig
from clipcli.train.feed import ALONE, Feed, Samples, Share

KINDS = ("cat", "dog", "heron")
COUNT = 50  # pictures of `data`, in three shards
BROKEN = b"\xff\xd8\xff no picture"
BOTH = pytest.mark.parametrize("keep_gb", [1.0, 0.0], ids=["kept", "streamed"])


def picture(number: int, size: tuple[int, int] = (12, 8)) -> bytes:
    """One whose colour is its number."""
    file = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 99)).save(file, "png")
    return file.getvalue()


def shard(path: Path, numbers: Iterable[int], *, broken: Sequence[int] = (), one: str = "") -> str:
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            data = BROKEN if number in broken else picture(number)
            name = one or KINDS[number % 3]
            for ending, content in ((".png", data), (".cls", b"0"), (".txt", name.encode())):
                info = tarfile.TarInfo(f"{number:04}{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    parts = (range(20), range(20, 41), range(41, COUNT))
    return [shard(tmp_path / f"{i}.tar", part) for i, part in enumerate(parts)]


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"batch_size": 8, "canvas": 8, "hold_out": 0.0, "shuffle_buffer": 7, **changes})


def found(data: Sequence[str], share: Share = ALONE, *, strict: bool = False, workers: int = 2, **changes: Any) -> Feed:
    feed = Feed(data, settings(**changes), image_size=8, share=share, strict=strict, workers=workers)
    feed.find()
    return feed


def number(path: str) -> int:
    return int(path[-8:-4])


def flat(steps: Iterable[Iterable[int]]) -> list[int]:
    return list(chain.from_iterable(steps))


def told(samples: Samples) -> list[int]:
    """The numbers of a step's pictures; fails where a picture lies beside another's words."""
    numbers = [number(pair.source.path) for pair in samples.pairs]
    np.testing.assert_array_equal(samples.canvas[:, 0, 4, 4] + 256 * samples.canvas[:, 1, 4, 4].astype(int), numbers)
    assert [pair.label for pair in samples.pairs] == [KINDS[n % 3] for n in numbers]
    assert samples.canvas.shape == (len(numbers), 3, 8, 8) and samples.canvas.dtype == np.uint8
    np.testing.assert_array_equal(samples.aspect, np.full(len(numbers), 1.5, np.float32))
    return numbers


def epoch(feed: Feed, of: int = 0, skip: int = 0) -> list[list[int]]:
    return [told(samples) for samples in feed.epoch(of, skip)]


# Order


@BOTH
def test_every_pair_once_in_an_order_of_the_seeds(data: list[str], keep_gb: float) -> None:
    feed = found(data, keep_gb=keep_gb)
    assert feed.kept == (keep_gb > 0)
    assert len(feed.chosen) == COUNT and feed.steps == 6
    first, second = epoch(feed, 0), epoch(feed, 1)
    for steps in (first, second):
        assert [len(step) for step in steps] == [8] * 6
        numbers = flat(steps)
        assert len(set(numbers)) == 48 and set(numbers) <= set(range(COUNT))
        assert numbers != sorted(numbers)
    assert first != second
    assert epoch(feed, 0) == first
    assert epoch(found(data, keep_gb=keep_gb, workers=1), 1) == second
    assert epoch(found(data, keep_gb=keep_gb, seed=1), 0) != first


@BOTH
def test_a_full_epoch_is_all_of_the_data(data: list[str], keep_gb: float) -> None:
    assert sorted(flat(epoch(found(data, keep_gb=keep_gb, batch_size=25)))) == list(range(COUNT))
    assert sorted(flat(epoch(found(data, keep_gb=keep_gb, batch_size=10, shuffle_buffer=0)))) == list(range(COUNT))


def test_orders_are_as_ever(data: list[str]) -> None:
    """Runs go on with another version's code: what the seed decides may not change."""
    kept, streamed = (found(data, keep_gb=keep_gb, seed=7, hold_out=0.1) for keep_gb in (1.0, 0.0))
    assert epoch(kept, 3)[4] == [20, 17, 41, 45, 40, 13, 38, 21]
    assert epoch(streamed, 3)[4] == [33, 36, 42, 24, 31, 38, 34, 30]
    assert kept.held.tolist() == streamed.held.tolist() == [3, 6, 23, 28, 48]


@BOTH
@pytest.mark.parametrize("skip", [1, 4, 6])
def test_skip_goes_on_exactly(data: list[str], keep_gb: float, skip: int) -> None:
    feed = found(data, keep_gb=keep_gb)
    assert epoch(feed, 2, skip) == epoch(feed, 2)[skip:]


@BOTH
@pytest.mark.parametrize("world", [2, 4])
def test_shares_are_one_order(data: list[str], keep_gb: float, world: int) -> None:
    whole = epoch(found(data, keep_gb=keep_gb, hold_out=0.1))
    parts = [epoch(found(data, Share(rank, world), keep_gb=keep_gb, hold_out=0.1), 0) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert [part[step] for part in parts] == [batch[rank::world] for rank in range(world)]
    skipped = epoch(found(data, Share(1, world), keep_gb=keep_gb, hold_out=0.1), 0, skip=3)
    assert skipped == parts[1][3:]


@BOTH
def test_words_of_a_label_file(data: list[str], keep_gb: float) -> None:
    words = {"cat": Label("cat", ("cat", "tabby"), group="animal|pet")}
    feed = Feed(data, settings(keep_gb=keep_gb), image_size=8, words=words)
    feed.find()
    pairs = [pair for samples in feed.epoch(0) for pair in samples.pairs]
    assert {(pair.phrases, pair.broader) for pair in pairs if pair.label == "cat"} == {
        (("cat", "tabby"), ("animal", "pet"))
    }
    assert all(pair.source.data is None for pair in feed.pairs)  # their bytes would fill the memory


def test_progress(data: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    Feed(data, settings(), image_size=8).find(counts.append)
    assert counts == [COUNT]


# What is chosen


@BOTH
def test_held_out_pictures_are_not_learned_from(data: list[str], keep_gb: float) -> None:
    feed = found(data, keep_gb=keep_gb, hold_out=0.2)
    held = [n for samples in feed.held_out(4) for n in told(samples)]
    assert len(held) == 10 and len(feed.chosen) == 40
    assert sorted(held + flat(epoch(feed, 0))) == list(range(COUNT))
    assert [number(feed.pairs[i].source.path) for i in feed.held] == held
    assert [len(samples.pairs) for samples in feed.held_out(4)] == [4, 4, 2]
    again, other = found(data, keep_gb=keep_gb, hold_out=0.2), found(data, keep_gb=keep_gb, hold_out=0.2, seed=1)
    assert np.array_equal(again.held, feed.held) and not np.array_equal(other.held, feed.held)


def test_kept_and_streamed_choose_the_same(data: list[str]) -> None:
    kept, streamed = (found(data, keep_gb=keep, hold_out=0.2, max_per_label=12, batch_size=29) for keep in (1.0, 0.0))
    assert np.array_equal(kept.held, streamed.held)
    assert len(kept.held) == 7
    assert sorted(flat(epoch(kept))) == sorted(flat(epoch(streamed)))


@BOTH
def test_max_per_label(data: list[str], keep_gb: float) -> None:
    feed = found(data, keep_gb=keep_gb, max_per_label=8)
    assert len(feed.chosen) == 24
    pairs = [pair for samples in feed.epoch(0) for pair in samples.pairs]
    assert Counter(pair.label for pair in pairs) == dict.fromkeys(KINDS, 8)
    assert {pair.source.path for pair in pairs} == {
        pair.source.path for samples in feed.epoch(1) for pair in samples.pairs
    }


# Bad pictures


@BOTH
def test_a_broken_picture_is_left_out(tmp_path: Path, keep_gb: float, caplog: pytest.LogCaptureFixture) -> None:
    """And its neighbours keep their words. Streamed, it is met again and again, and told once."""
    path = shard(tmp_path / "a.tar", range(300), broken=[7, 280])
    feed = found([path], keep_gb=keep_gb, batch_size=50)
    assert len(feed.chosen) == (298 if keep_gb else 300)
    if keep_gb:
        assert [number(failure.path) for failure in feed.failures] == [7, 280]
    for of in range(2):
        for step in epoch(feed, of):
            assert len(step) == 50 and not {7, 280} & set(step)
    assert sorted(number(failure.path) for failure in feed.failures) == [7, 280]
    late = [record.getMessage() for record in caplog.records]
    assert len(late) == (0 if keep_gb else len(set(late)))
    if not keep_gb:
        assert [text.startswith(f"left out: {path}") and "0280.png: " in text for text in late].count(True) == 1


def test_which_pictures_are_known_to_be_broken_does_not_hang_on_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory runs out, some of the next are decoded already and some aren't."""
    path = shard(tmp_path / "a.tar", range(100), broken=[3, 20, 30, 90])
    orders = []
    for workers in (1, 3):
        feed = found([path], keep_gb=10 * 192 / 1e9, workers=workers)
        assert not feed.kept and len(feed.chosen) == 99
        orders.append(epoch(feed))
    assert orders[0] == orders[1]


@BOTH
def test_strict_stops(tmp_path: Path, keep_gb: float) -> None:
    path = shard(tmp_path / "a.tar", range(300), broken=[290])
    feed = Feed([path], settings(keep_gb=keep_gb), image_size=8, strict=True)
    with pytest.raises(ClipcliError, match=r"a\.tar.*0290\.png: ") as caught:
        feed.find()
        list(feed.epoch(0))
    assert caught.value.hint == "without --strict it would be left out"


def test_a_pair_without_words_is_listed_once(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    shard(path, range(40))
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("0099.png")
        info.size = len(data := picture(99))
        archive.addfile(info, io.BytesIO(data))
    feed = found([str(path)], keep_gb=0.0)
    for of in range(2):
        assert 99 not in flat(epoch(feed, of))
    assert [number(failure.path) for failure in feed.failures] == [99]
    with pytest.raises(ClipcliError, match="no words beside it"):
        found([str(path)], strict=True)


def test_a_batch_of_broken_pictures_alone(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", range(300), broken=range(1, 300))
    feed = found([path], keep_gb=0.0, batch_size=4)
    with pytest.raises(ClipcliError, match="none of a batch's pictures can be read"):
        list(feed.epoch(0))


@BOTH
def test_no_picture_can_be_read(tmp_path: Path, keep_gb: float) -> None:
    path = shard(tmp_path / "a.tar", range(20), broken=range(20))
    with pytest.raises(UsageError, match="none of the data's pictures can be read") as caught:
        found([path], keep_gb=1.0)
    assert caught.value.hint and "0000.png: " in caught.value.hint


# Bad data


def test_no_data(tmp_path: Path) -> None:
    for data in ([], [shard(tmp_path / "empty.tar", ())]):
        with pytest.raises(UsageError, match="no pair of a picture and words in the data"):
            found(data)


def test_a_batch_larger_than_the_data(data: list[str]) -> None:
    with pytest.raises(UsageError, match="a batch of 64 is larger than the data: 50 pairs to learn from") as caught:
        found(data, batch_size=64)
    assert caught.value.hint == "give a smaller --batch-size, or more data"
    with pytest.raises(UsageError, match="larger than the data: 40 pairs"):
        found(data, batch_size=48, hold_out=0.2)


def test_a_batch_that_devices_cannot_share(data: list[str]) -> None:
    with pytest.raises(UsageError, match="a batch of 8 can't be shared by 3 devices") as caught:
        found(data, Share(0, 3))
    assert caught.value.hint == "take a multiple of 3"


def test_one_class_alone(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", range(20), one="cat")
    with pytest.raises(UsageError, match="all pictures have the same words, 'cat'"):
        found([path])
    mixed = [path, shard(tmp_path / "b.tar", range(20, 40), one="dog", broken=range(20, 40))]
    with pytest.raises(UsageError, match="all pictures have the same words, 'cat'"):
        found(mixed)


@pytest.mark.parametrize("numbers", [range(19), range(22), [*range(19), 77], [*range(1, 21)]], ids=str)
def test_a_shard_that_changes(data: list[str], numbers: Iterable[int]) -> None:
    feed = found(data, keep_gb=0.0, hold_out=0.1)
    assert len(epoch(feed)) == feed.steps
    shard(Path(data[0]), numbers)
    with pytest.raises(ClipcliError, match=r"0\.tar: changed while the training went on"):
        list(feed.epoch(1))
    with pytest.raises(ClipcliError, match=r"0\.tar: changed while the training went on"):
        list(feed.held_out(4))


def test_words_that_change(data: list[str]) -> None:
    feed = found(data, keep_gb=0.0)
    shard(Path(data[0]), range(20), one="cat")
    with pytest.raises(ClipcliError, match="changed while the training went on"):
        list(feed.epoch(0))


def test_kept_pictures_need_no_files(data: list[str]) -> None:
    feed = found(data)
    Path(data[0]).unlink()
    assert len(epoch(feed)) == 6


# Memory and threads


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("clipcli-train")]


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand pictures, only a few are decoded ahead of the step that takes them."""
    path = shard(tmp_path / "a.tar", range(1000))
    decoded = gone = most = 0

    def dropped() -> None:
        nonlocal gone
        gone += 1

    def transform(*args: Any, **kwargs: Any) -> NDArray[np.uint8]:
        nonlocal decoded, most
        square = transforms.transform(*args, **kwargs)
        weakref.finalize(square, dropped)
        decoded += 1
        most = max(most, decoded - gone)
        return square

    feed = found([path], keep_gb=0.0, batch_size=20, workers=1)
    monkeypatch.setattr(feeds, "transform", transform)
    steps = feed.epoch(0)
    for _ in range(10):
        next(steps)
    assert 200 <= decoded <= 200 + 32 + 1
    assert most <= 32 + 1 + 20 + 1
    steps.close()  # type: ignore[attr-defined]
    assert decoded == gone


@BOTH
def test_threads_end_with_the_iterator(data: list[str], keep_gb: float) -> None:
    feed = found(data, keep_gb=keep_gb, workers=3)
    assert not ours()
    steps: Iterator[Samples] = feed.epoch(0)
    next(steps)
    assert bool(ours()) == (keep_gb == 0)
    steps.close()  # type: ignore[attr-defined]
    assert not ours()
    held = found(data, keep_gb=keep_gb, hold_out=0.5, batch_size=2).held_out(4)
    next(held)
    held.close()  # type: ignore[attr-defined]
    assert not ours()


def test_an_error_ends_the_threads(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", range(300), broken=[100])
    with pytest.raises(ClipcliError):
        found([path], strict=True)
    assert not ours()


def test_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "_BLOCK", 7)
    path = shard(tmp_path / "a.tar", range(40))
    feed = found([path])
    assert sorted(flat(epoch(feed))) == list(range(40))
    assert not found([path], keep_gb=39.5 * 192 / 1e9).kept
    assert found([path], keep_gb=40.5 * 192 / 1e9).kept
