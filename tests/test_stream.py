"""Batches: every item once, in order, a bounded way ahead; silence, failures, bugs and early ends."""

from __future__ import annotations

import gc
import os
import queue
import random
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures_made import encoded, photo

from clipcli.images import budget as budget_module
from clipcli.images import stream as stream_module
from clipcli.images import transform as transform_module
from clipcli.images.budget import BIG, Budget
from clipcli.images.decode import open_picture
from clipcli.images.find import Walk
from clipcli.images.stream import Batch, Prepared, batches, default_workers, make_prepare
from clipcli.images.transform import transform
from clipcli.model.config import Preprocess
from clipcli.records import Failure, FailureKind, Source

Item = Source | Failure


def square(path: str) -> npt.NDArray[np.uint8]:
    """One that tells from which source it came."""
    return np.full((3, 2, 2), int(path) % 251, np.uint8)


def number(path: str) -> Prepared:
    """A picture made ready, as such a square."""
    return Prepared(square(path))


def prepare(source: Source) -> Prepared | Failure:
    """Names that end in 3 fail."""
    if source.path.endswith("3"):
        return Failure(source.path, FailureKind.CORRUPT, "made to fail")
    return number(source.path)


def sources(count: int) -> list[Item]:
    """Numbered; every seventh has failed before."""
    missing = (Failure(str(i), FailureKind.MISSING, "no such file") if i % 7 == 5 else None for i in range(count))
    return [failure or Source(str(i)) for i, failure in enumerate(missing)]


def check(made: list[Batch], count: int) -> None:
    """Each item once and in order, each row where it belongs."""
    assert [item.path for batch in made for item in batch.items] == [str(i) for i in range(count)]
    for batch in made:
        good = [item for item in batch.items if isinstance(item, Source)]
        assert batch.pixels.shape[0] == len(good)
        for row, item in zip(batch.pixels, good, strict=True):
            np.testing.assert_array_equal(row, square(item.path))


def wait_until(condition: Callable[[], object], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return bool(condition())


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("clipcli-")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert wait_until(lambda: not threads())


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_every_item_once_and_in_order(count: int, batch_size: int, workers: int) -> None:
    made = list(batches(iter(sources(count)), prepare, batch_size=batch_size, workers=workers))
    check(made, count)
    assert all(len(batch.pixels) == batch_size or len(batch.items) == 4 * batch_size for batch in made[:-1])
    assert all(batch.items for batch in made)


def test_order_and_composition_do_not_depend_on_speed() -> None:
    dice = random.Random(1)
    delays = [dice.choice((0, 0, 0.001, 0.01)) for _ in range(150)]

    def slowly(source: Source) -> Prepared | Failure:
        time.sleep(delays[int(source.path)])
        return prepare(source)

    made = list(batches(sources(150), slowly, batch_size=8, workers=6))
    check(made, 150)
    quick = list(batches(sources(150), prepare, batch_size=8, workers=1))
    assert [batch.items for batch in made] == [batch.items for batch in quick]


def test_failures_alone_make_batches_without_pixels() -> None:
    failures = [Failure(str(i), FailureKind.MISSING, "no such file") for i in range(10)]
    made = list(batches(failures, prepare, batch_size=2, workers=2))
    assert [len(batch.items) for batch in made] == [8, 2]
    assert [batch.pixels.shape for batch in made] == [(0, 3, 0, 0)] * 2
    assert {batch.pixels.dtype for batch in made} == {np.dtype(np.uint8)}
    late = list(batches([Source("1"), *failures], prepare, batch_size=1, workers=2))
    assert [batch.pixels.shape for batch in late] == [(1, 3, 2, 2)] + [(0, 3, 2, 2)] * 3


def test_the_source_is_pulled_only_a_bounded_way_ahead() -> None:
    pulled, prepared = [], []

    def endless() -> Iterator[Item]:
        while True:
            pulled.append(None)
            yield Source(str(len(pulled)))

    def counting(source: Source) -> Prepared:
        prepared.append(None)
        return number(source.path)

    made = batches(endless(), counting, batch_size=10, workers=3)
    for done in range(1, 6):
        next(made)
        assert wait_until(lambda due=10 * done + 13: len(prepared) >= due), "it decodes while the consumer is busy"  # type: ignore[misc]
        time.sleep(0.02)
        assert len(pulled) == len(prepared) == 10 * done + 13
    made.close()  # type: ignore[attr-defined]


def test_in_turns_nothing_is_begun_while_the_consumer_works() -> None:
    """Sources may be pulled meanwhile; who has a picture in hand finishes it, and then waits."""
    prepared: list[str] = []

    def counting(source: Source) -> Prepared | Failure:
        prepared.append(source.path)
        return prepare(source)

    made = batches(sources(400), counting, batch_size=10, workers=3, turns=True)
    got = []
    for batch in made:
        got.append(batch)
        if len(got) < 4:
            time.sleep(0.1)
            count = len(prepared)
            time.sleep(0.05)
            assert len(prepared) == count
    check(got, 400)
    plain = list(batches(sources(400), prepare, batch_size=10, workers=3))
    assert [batch.items for batch in got] == [batch.items for batch in plain]


def test_in_turns_one_picture_a_worker_is_begun_too_many() -> None:
    began = threading.Semaphore(0)

    def slowly(source: Source) -> Prepared:
        began.release()
        time.sleep(0.02)
        return number(source.path)

    made = batches(map(Source, map(str, range(90))), slowly, batch_size=6, workers=3, turns=True)
    next(made)
    time.sleep(0.1)
    assert 6 <= sum(began.acquire(blocking=False) for _ in range(90)) <= 6 + 3
    made.close()  # type: ignore[attr-defined]  # those that wait for their turn are let go


def test_in_turns_without_pixels_nobody_waits() -> None:
    """What the store knows, or can't be read, leaves the cores to decoding."""
    known = np.zeros(4, np.float32)
    prepared: list[str] = []

    def recalled(source: Source) -> Prepared:
        prepared.append(source.path)
        return Prepared(embedding=known)

    made = batches(map(Source, map(str, range(100))), recalled, batch_size=2, workers=2, turns=True)
    first = next(made)
    assert len(first.items) == 8 and not len(first.pixels)
    assert wait_until(lambda: len(prepared) >= 12)
    made.close()  # type: ignore[attr-defined]


def test_in_turns_silence_flushes_a_partial_batch() -> None:
    pipe = Pipe()
    made = batches(pipe, prepare, batch_size=100, workers=2, flush_after=0.05, turns=True)
    for start in (0, 2):
        for i in range(start, start + 2):
            pipe.items.put(Source(str(10 * i)))
        assert [item.path for item in next(made).items] == [str(10 * i) for i in range(start, start + 2)]
    pipe.items.put(None)
    assert list(made) == []


def test_decoding_takes_turns_with_a_cpu_that_it_fills(
    monkeypatch: pytest.MonkeyPatch, model: Path, photos: Path
) -> None:
    from clipcli.tasks import embed as task
    from clipcli.weights.model import Model, load_model

    turns = []
    real = task.batches
    monkeypatch.setattr(task, "batches", lambda *rest, **how: [turns.append(how["turns"]), real(*rest, **how)][1])
    monkeypatch.setattr(task, "cpus", lambda: 3)
    monkeypatch.setattr(sys, "platform", "linux")
    opened = load_model(model, device="cpu")
    for workers in (2, 3, 4):
        assert list(task.embed([photos / "coffee.png"], opened, task.EmbedOptions(workers=workers)))
    assert turns == [False, True, True]
    monkeypatch.setattr(Model, "on_cuda", True)
    list(task.embed([photos / "coffee.png"], opened, task.EmbedOptions(workers=4)))
    assert turns[3:] == [False]


def test_openmp_does_not_spin_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from clipcli.cli import main

    monkeypatch.setattr(sys, "argv", ["clipcli", "--version"])
    for given_, found in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        with monkeypatch.context() as patch:
            patch.setenv("OMP_WAIT_POLICY", given_ or "")
            if given_ is None:
                patch.delenv("OMP_WAIT_POLICY")
            with pytest.raises(SystemExit):
                main.main()
            assert os.environ["OMP_WAIT_POLICY"] == found
    gc.enable()


def test_nothing_starts_before_the_first_batch_is_asked_for() -> None:
    pulled = iter(sources(5))
    made = batches(pulled, prepare, batch_size=2, workers=2)
    assert threads() == []
    assert len(list(pulled)) == 5
    assert list(made) == []


class Pipe:
    """An input that can pause: an iterator over what was put in."""

    def __init__(self) -> None:
        self.items: queue.Queue[Item | None] = queue.Queue()

    def __iter__(self) -> Iterator[Item]:
        yield from iter(self.items.get, None)


def test_silence_flushes_a_partial_batch() -> None:
    pipe = Pipe()
    made = batches(pipe, prepare, batch_size=100, workers=2, flush_after=0.2)
    for start in (0, 4):
        for i in range(start, start + 4):
            pipe.items.put(Source(str(10 * i)))
        begun = time.monotonic()
        batch = next(made)
        assert [item.path for item in batch.items] == [str(10 * i) for i in range(start, start + 4)]
        assert 0.15 < time.monotonic() - begun < 2
    pipe.items.put(None)
    assert list(made) == []


def test_silence_without_anything_pending_yields_nothing() -> None:
    pipe = Pipe()
    timer = threading.Timer(0.15, lambda: [pipe.items.put(Source("1")), pipe.items.put(None)])
    timer.start()
    made = list(batches(pipe, prepare, batch_size=4, workers=1, flush_after=0.02))
    timer.join()
    assert [item.path for batch in made for item in batch.items] == ["1"]
    assert len(made) == 1


def test_a_slow_picture_is_no_silence() -> None:
    def slowly(source: Source) -> Prepared:
        time.sleep(0.1)
        return number(source.path)

    pipe = Pipe()
    for i in (1, 2):
        pipe.items.put(Source(str(i)))
    pipe.items.put(None)
    made = list(batches(pipe, slowly, batch_size=4, workers=1, flush_after=0.02))
    assert [len(batch.items) for batch in made] == [2]


def test_what_the_source_raises_comes_after_what_came_before() -> None:
    def broken() -> Iterator[Item]:
        yield from sources(5)
        raise LookupError("the list ended badly")

    made = batches(broken(), prepare, batch_size=3, workers=2)
    got = []
    with pytest.raises(LookupError, match="ended badly") as raised:
        for batch in made:
            got.append(batch)
    check(got, 5)
    assert raised.traceback[-1].name == "broken"
    assert list(made) == []


def test_a_bug_in_prepare_is_raised_in_its_place() -> None:
    def broken(source: Source) -> Prepared:
        if source.path == "4":
            raise ZeroDivisionError("a bug")
        return number(source.path)

    got = []
    with pytest.raises(ZeroDivisionError) as raised:
        for batch in batches(map(Source, map(str, range(100))), broken, batch_size=3, workers=4):
            got.append(batch)
    check(got, 4)
    assert raised.traceback[-1].name == "broken"
    assert wait_until(lambda: not threads())


def test_an_early_end_stops_the_threads() -> None:
    pulled = []

    def endless() -> Iterator[Item]:
        while True:
            pulled.append(None)
            yield Source(str(len(pulled)))

    made = batches(endless(), prepare, batch_size=4, workers=3)
    next(made)
    assert threads()
    del made  # as `break` does in the consumer's loop
    gc.collect()
    assert wait_until(lambda: not threads())
    count = len(pulled)
    time.sleep(0.02)
    assert len(pulled) == count <= 4 + 4 + 3 + 1


def test_an_early_end_does_not_wait_for_a_blocked_input() -> None:
    pipe = Pipe()
    pipe.items.put(Source("1"))
    made = batches(pipe, prepare, batch_size=1, workers=2)
    next(made)
    begun = time.monotonic()
    made.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begun < 1
    assert wait_until(lambda: threads() == ["clipcli-feed"]), "it waits for the pipe, as a daemon"
    pipe.items.put(Source("2"))
    assert wait_until(lambda: not threads())


@pytest.mark.parametrize("way", ["break", "interrupt"])
def test_a_process_ends_while_its_stdin_is_silent(way: str) -> None:
    program = """
        import sys
        from clipcli.images.lists import read_list
        from clipcli.images.stream import Prepared, batches
        from clipcli.records import Source
        import numpy as np
        listed = map(Source, read_list(sys.stdin.buffer, False))
        try:
            square = Prepared(np.zeros((3, 2, 2), np.uint8))
            for batch in batches(listed, lambda source: square, batch_size=1, workers=2):
                print(batch.items[0].path, flush=True)
                if sys.argv[1] == "break":
                    break
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    root = Path(stream_module.__file__).parents[2]
    command = [sys.executable, "-c", textwrap.dedent(program), way]
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"first\n")
        process.stdin.flush()
        try:
            assert process.stdout.readline() == b"first\n"
            if way == "interrupt":
                time.sleep(0.1)  # until it waits for the next batch
                process.send_signal(signal.SIGINT)
            code = process.wait(timeout=20)
        finally:
            process.kill()
        assert process.stderr.read() == b""
        assert (process.stdout.read(), code) == (b"" if way == "break" else b"interrupted\n", 0)


def test_a_source_lets_its_bytes_go() -> None:
    given_ = [Source("1", b"many bytes"), Source("2")]
    (batch,) = batches(given_, prepare, batch_size=4, workers=1)
    assert batch.items == (Source("1", b""), Source("2"))


def test_default_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3)))
    assert default_workers() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    assert default_workers() == 16
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert default_workers() == 1


def test_no_memory_to_resize_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(transform_module, "transform", exhausted)
    outcome = make_prepare(Preprocess(), 8)(Source("a", encoded(photo(), "PNG")))
    assert outcome == Failure("a", FailureKind.TOO_LARGE, "not enough memory to resize it")


def test_big_pictures_take_turns_and_small_ones_pass() -> None:
    budget = Budget(5 * BIG)
    order: list[str] = []

    def work(name: str, *sizes: int) -> threading.Thread:
        def run() -> None:
            with budget.share() as take:
                for size in sizes:
                    take(size)
                order.append(name)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    with budget.share() as first:
        first(3 * BIG)
        first(4 * BIG)  # a second claim is not counted: it could wait for itself
        work("fits beside it", BIG, BIG).join(5)
        work("small", BIG - 1, BIG - 1).join(5)
        waiting = [work("too much", 3 * BIG), work("more than there is", 50 * BIG)]
        time.sleep(0.05)
        assert order == ["fits beside it", "small"]
    for thread in waiting:
        thread.join(5)
    assert sorted(order[2:]) == ["more than there is", "too much"]
    with pytest.raises(ZeroDivisionError), budget.share() as take:
        take(5 * BIG)
        raise ZeroDivisionError
    work("after a failure", 5 * BIG).join(5)
    assert order[4:] == ["after a failure"]


def test_memory_goes_back_to_the_system_when_much_was_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(4 * BIG)
    trimmed: list[int] = []
    monkeypatch.setattr(budget_module, "_trim", lambda: trimmed.append)
    for size in (2 * BIG, BIG - 1, BIG, BIG, 9 * BIG, BIG):
        with budget.share() as take:
            take(size)
        trimmed.append(size)
    assert trimmed == [2 * BIG, BIG - 1, BIG, 0, BIG, 0, 9 * BIG, BIG]
    monkeypatch.undo()
    budget_module._trim.cache_clear()
    budget_module._trim()(0)  # the real one is there, or harmless
    monkeypatch.setattr(budget_module.ctypes, "CDLL", lambda _: object())
    budget_module._trim.cache_clear()
    assert budget_module._trim()(0) is None
    budget_module._trim.cache_clear()


def test_memory_is_claimed_before_it_is_taken_and_until_the_picture_is_small(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Four workers, a crowd of pictures that count as big: never two at once between claim and square."""
    together, most = 0, 0
    real = transform_module.transform

    def watched(*args: object, **rules: object) -> npt.NDArray[np.uint8]:
        nonlocal together, most
        together += 1
        most = max(most, together)
        time.sleep(0.005)
        together -= 1
        return real(*args, **rules)  # type: ignore[arg-type]

    monkeypatch.setattr(transform_module, "transform", watched)
    for name in range(12):
        (tmp_path / f"{name:02}.png").write_bytes(encoded(photo(seed=name), "PNG"))
    items = [*Walk([str(tmp_path)])]
    plain = list(batches(items, make_prepare(Preprocess(), 16), batch_size=5, workers=4))
    assert most > 1
    monkeypatch.setattr("clipcli.images.budget.BIG", 1000)
    monkeypatch.setattr(stream_module, "MAX_MEMORY", 8 * 96 * 64)
    most = 0
    big = list(batches(items, make_prepare(Preprocess(), 16), batch_size=5, workers=4))
    assert most == 1
    assert [batch.items for batch in big] == [batch.items for batch in plain]
    for one, other in zip(plain, big, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)


def test_real_pictures_end_to_end(pictures: Path, tmp_path: Path) -> None:
    """Files of a real data set and two broken ones, through the walk, decoding and batching."""
    with tarfile.open(pictures / "caltech20-dev.tar") as archive:
        members = [member for member in archive if member.name.endswith(".jpg")][:30]
        for member in members:
            (tmp_path / Path(member.name).name).write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
    assert len(members) == 30
    whole = sorted(tmp_path.iterdir())
    (tmp_path / "zero.jpg").touch()
    (tmp_path / "cut.jpg").write_bytes(whole[0].read_bytes()[:2000])
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    made = list(batches(Walk([str(tmp_path)]), make_prepare(Preprocess(), 64), batch_size=8, workers=3))
    items = [item for batch in made for item in batch.items]
    assert [item.path for item in items] == sorted(str(path) for path in tmp_path.iterdir() if path.suffix == ".jpg")
    failed = {Path(item.path).name: item.kind for item in items if isinstance(item, Failure)}
    assert failed == {"zero.jpg": FailureKind.NOT_A_PICTURE, "cut.jpg": FailureKind.TRUNCATED}
    rows = iter(np.concatenate([batch.pixels for batch in made]))
    for item in items:
        if isinstance(item, Source):
            picture = open_picture(item)
            assert not isinstance(picture, Failure)
            np.testing.assert_array_equal(next(rows), transform(picture, Preprocess(), 64))
    assert next(rows, None) is None
