"""The store: what was kept comes back, from any process, and nothing that happens to the file ends a run."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcli.errors import StoreError
from clipcli.records import Label, Template
from clipcli.store import connection, database
from clipcli.store.database import DAY, Array, Store
from clipcli.store.keys import classifier_key, prompt_key


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "store.sqlite"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The store's time; `now` may be set."""
    clock = SimpleNamespace(now=1_800_000_000)
    monkeypatch.setattr(database, "time", SimpleNamespace(time=lambda: clock.now))
    return clock


def vectors(count: int, prefix: str = "v", width: int = 4) -> dict[bytes, Array]:
    return {f"{prefix}{i}".encode(): np.full(width, i, np.float32) for i in range(count)}


def assert_same(found: dict[bytes, Array], expected: dict[bytes, Array]) -> None:
    assert found.keys() == expected.keys()
    for key, vector in expected.items():
        np.testing.assert_array_equal(found[key], vector, strict=True)


def sql(file: Path, statement: str) -> list[tuple[object, ...]]:
    other = sqlite3.connect(file)
    try:
        rows = other.execute(statement).fetchall()
        other.commit()
        return rows
    finally:
        other.close()


def damaged_copies(file: Path) -> list[Path]:
    return list(file.parent.glob("*.damaged-*Z"))


# ---- what comes back


def test_values_come_back_in_the_next_run(file: Path) -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    with Store(file) as store:
        assert store.prompt_vectors([b"v0"]) == {}
        assert store.classifier(b"c") is None
        store.keep_prompt_vectors(vectors(3), model="abc")
        store.keep_classifier(b"c", weight, model="abc")
    with Store(file) as store:
        assert_same(
            store.prompt_vectors([b"v2", b"missing", b"v0", b"v2"]),
            {b"v2": vectors(3)[b"v2"], b"v0": vectors(1)[b"v0"]},
        )
        found = store.classifier(b"c")
        assert found is not None
        np.testing.assert_array_equal(found, weight, strict=True)
    assert sql(file, "SELECT DISTINCT model FROM entry") == [("abc",)]


def test_kinds_do_not_meet(file: Path) -> None:
    with Store(file) as store:
        store.keep_prompt_vectors({b"k": np.ones(2, np.float32)})
        assert store.classifier(b"k") is None


def test_a_value_is_replaced_by_a_newer_one(file: Path) -> None:
    with Store(file) as store:
        store.keep_prompt_vectors({b"k": np.ones(2, np.float32)})
        store.keep_prompt_vectors({b"k": np.zeros(3, np.float32)})
        assert_same(store.prompt_vectors([b"k"]), {b"k": np.zeros(3, np.float32)})


def test_more_keys_than_one_query_takes(file: Path) -> None:
    many = vectors(2 * database.CHUNK + 1)
    with Store(file) as store:
        store.keep_prompt_vectors(many)
        assert_same(store.prompt_vectors(list(many)), many)


def test_in_memory_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Store(None) as store:
        store.keep_prompt_vectors(vectors(2))
        assert_same(store.prompt_vectors([b"v0", b"v1"]), vectors(2))
    with Store(None) as store:
        assert store.prompt_vectors([b"v0"]) == {}
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_made_at_the_first_use(file: Path) -> None:
    with Store(file) as store:
        assert store.prompt_vectors([]) == {}
        store.keep_prompt_vectors({})
        assert not file.parent.exists()
        store.keep_prompt_vectors(vectors(1))
        assert file.is_file()


def test_a_digest_is_built_once_until_the_file_changes(file: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"one")
    built: list[bytes] = []

    def digest(store: Store, path: Path, part: str) -> bytes:
        def build() -> bytes:
            built.append(path.read_bytes())
            return part.encode() + b"\0" + built[-1]

        return store.tensor_digest(path, part, build)

    (tmp_path / "link").symlink_to(weights)
    with Store(file) as store:
        assert digest(store, weights, "image") == b"image\0one"
        assert digest(store, weights, "text") == b"text\0one"
    with Store(file) as store:
        assert digest(store, weights, "image") == b"image\0one"
        assert digest(store, tmp_path / "link", "image") == b"image\0one"  # the same file by another name
        assert built == [b"one", b"one"]
        weights.write_bytes(b"two!")
        assert digest(store, weights, "image") == b"image\0two!"
        os.utime(weights, ns=(1, 1))
        assert digest(store, weights, "image") == b"image\0two!"
        shutil.copy2(weights, tmp_path / "new")  # same size and time, another file
        (tmp_path / "new").replace(weights)
        assert digest(store, weights, "image") == b"image\0two!"
        assert len(built) == 5
        with pytest.raises(FileNotFoundError):
            digest(store, tmp_path / "nowhere", "image")


def test_a_digest_is_not_kept_of_a_file_that_changes_meanwhile(file: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"one")

    def build() -> bytes:
        weights.write_bytes(b"longer")
        return b"old"

    with Store(file) as store:
        assert store.tensor_digest(weights, "image", build) == b"old"
        weights.write_bytes(b"one")
        assert store.tensor_digest(weights, "image", lambda: b"new") == b"new"


# ---- room


def test_the_longest_unused_go_first(file: Path, clock: SimpleNamespace) -> None:
    a, b, c = (vectors(count, name, width=8192) for name, count in (("a", 20), ("b", 10), ("c", 10)))  # 32 KiB each
    with Store(file, size_limit=1 << 20) as store:
        store.keep_prompt_vectors(a)
        clock.now += DAY
        store.keep_prompt_vectors(b)
        clock.now += 2 * DAY
        assert len(store.prompt_vectors(list(a))) == 20  # used today
        store.keep_prompt_vectors(c)  # 40 x 32 KiB are too much: 28 of them are nine tenths of the limit
        assert store.prompt_vectors(list(b)) == {}
        assert len(store.prompt_vectors(list(a))) == 18
        assert_same(store.prompt_vectors(list(c)), c)


def test_the_time_of_use_is_written_once_a_day(file: Path, clock: SimpleNamespace) -> None:
    with Store(file) as store:
        store.keep_prompt_vectors(vectors(1))
        for later, expected in ((DAY - 1, 0), (DAY, 0), (DAY + 1, DAY + 1), (DAY + 2, DAY + 1)):
            clock.now = 1_800_000_000 + later
            store.prompt_vectors([b"v0"])
            assert sql(file, "SELECT used FROM entry") == [(1_800_000_000 + expected,)]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "MEMORY_LIMIT", 1 << 20)
    many = vectors(60, width=8192)
    with Store(None) as store:
        store.keep_prompt_vectors(many)
        assert list(store.prompt_vectors(list(many))) == list(many)[-28:]


def test_a_value_larger_than_all_room_is_not_kept(file: Path) -> None:
    with Store(file, size_limit=1000) as store:
        store.keep_classifier(b"small", np.ones((2, 3), np.float32))
        store.keep_classifier(b"large", np.ones((251, 1), np.float32))
        assert store.classifier(b"large") is None
        assert store.classifier(b"small") is not None


# ---- damage


@pytest.mark.parametrize(
    "change",
    [
        "value = substr(value, 2)",
        "value = x'00000000000000000000000000000000'",
        "value = 7",
        "shape = x'32'",
        "shape = 4",
        "checksum = 'no'",
        "key = x'7631'",  # the value of another key
    ],
)
def test_a_damaged_entry_is_dropped(file: Path, change: str, caplog: pytest.LogCaptureFixture) -> None:
    with Store(file) as store:
        store.keep_prompt_vectors({b"v1": vectors(2)[b"v1"], b"v9": np.ones(4, np.float32)})
    if change.startswith("key"):
        sql(file, "DELETE FROM entry WHERE key = x'7631'")
        sql(file, f"UPDATE entry SET {change} WHERE key = x'7639'")
    else:
        sql(file, f"UPDATE entry SET {change} WHERE key = x'7631'")
    with Store(file) as store:
        assert b"v1" not in store.prompt_vectors([b"v1", b"v9"])
        assert caplog.messages == ["damaged entries in the store: 1 dropped, to be computed again"]
        store.keep_prompt_vectors(vectors(2))
        assert_same(store.prompt_vectors([b"v0", b"v1"]), vectors(2))
    assert len(caplog.messages) == 1
    assert not damaged_copies(file)


def overwrite(file: Path, start: int = 0) -> None:
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek(start)
        stream.write(b"\xa5" * (size - start))


@pytest.mark.parametrize("content", [b"not a database at all" * 300, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_set_aside(file: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    file.parent.mkdir()
    file.write_bytes(content)
    with Store(file) as store:
        store.keep_prompt_vectors(vectors(2))
    with Store(file) as store:
        assert_same(store.prompt_vectors([b"v0", b"v1"]), vectors(2))
    (aside,) = damaged_copies(file)
    assert aside.read_bytes() == content
    assert caplog.messages == [f"the store {file} was damaged: set aside as {aside.name}, begun anew"]


@pytest.mark.parametrize("first", ["read", "write"])
def test_damage_in_the_middle_of_a_run(file: Path, first: str, caplog: pytest.LogCaptureFixture) -> None:
    with Store(file) as store:
        store.keep_prompt_vectors(vectors(5000, width=64))
    with Store(file) as store:
        assert len(store.prompt_vectors([b"v7"])) == 1
        overwrite(file, connection.PAGE_BYTES)
        if first == "read":
            assert store.prompt_vectors([f"v{i}".encode() for i in range(5000)]) == {}
        store.keep_prompt_vectors(vectors(5000, "w"))
        assert_same(store.prompt_vectors(list(vectors(5000, "w"))), vectors(5000, "w"))
    assert len(damaged_copies(file)) == 1
    assert len(caplog.messages) == 1
    with Store(file) as store:
        assert len(store.prompt_vectors([b"w1", b"v1"])) == 1


def test_damage_twice_goes_on_in_memory(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(file)
    for _ in range(2):
        store.keep_prompt_vectors(vectors(5000, width=64))
        store.close()
        overwrite(file)
    store.keep_prompt_vectors(vectors(2))
    assert_same(store.prompt_vectors([b"v0", b"v1"]), vectors(2))
    assert store.path is None
    assert len(damaged_copies(file)) == 1
    assert [message.split(" (")[0] for message in caplog.messages][1:] == [f"the store {file} can't be used"]
    store.close()


def test_tables_that_are_not_ours_are_set_aside(file: Path) -> None:
    file.parent.mkdir()
    sql(file, "CREATE TABLE entry (something TEXT)")
    with Store(file) as store:
        store.keep_prompt_vectors(vectors(1))
    assert sql(file, "SELECT count(*) FROM entry") == [(1,)]
    assert len(damaged_copies(file)) == 1


def test_a_newer_schema_is_refused(file: Path) -> None:
    Store(file).keep_prompt_vectors(vectors(1))
    sql(file, "PRAGMA user_version = 99")
    with Store(file) as store, pytest.raises(StoreError) as error:
        store.prompt_vectors([b"v0"])
    assert error.value.message == f"the store {file} was written by a newer clipcli (schema 99, not 1)"
    assert error.value.hint is not None and "--no-cache" in error.value.hint
    assert sql(file, "SELECT count(*) FROM entry") == [(1,)]


def a_file_in_place_of_the_folder(file: Path) -> None:
    file.parent.write_text("")


def a_folder_in_place_of_the_file(file: Path) -> None:
    file.mkdir(parents=True)


def a_lock_file_that_is_none(file: Path) -> None:
    file.parent.mkdir()
    (file.parent / "store.sqlite.lock").write_bytes(b"nonsense" * 1000)


@pytest.mark.parametrize(
    "break_it", [a_file_in_place_of_the_folder, a_folder_in_place_of_the_file, a_lock_file_that_is_none]
)
def test_where_nothing_can_be_written_it_goes_on_in_memory(
    file: Path, break_it: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    break_it(file)
    with Store(file) as store:
        store.keep_prompt_vectors(vectors(2))
        assert_same(store.prompt_vectors([b"v0", b"v1"]), vectors(2))
    (message,) = caplog.messages
    assert message.startswith(f"the store {file} can't be used (") and message.endswith("): going on without")


def test_a_full_disk_goes_on_in_memory(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Store(file) as store:
        store.keep_prompt_vectors(vectors(1))
        store._database.run(lambda open_file: open_file.execute("PRAGMA max_page_count = 10"))
        many = vectors(100, "w", width=8192)
        store.keep_prompt_vectors(many)
        assert_same(store.prompt_vectors(list(many)), many)
    assert caplog.messages == [f"the store {file} can't be used (database or disk is full): going on without"]
    assert sql(file, "SELECT count(*) FROM entry") == [(1,)]  # all or nothing


def test_locked_for_too_long_goes_on_in_memory(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "BUSY_SECONDS", 0.05)
    Store(file).keep_prompt_vectors(vectors(1))
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with Store(file) as store:
        assert len(store.prompt_vectors([b"v0"])) == 1  # reading needs no lock
        store.keep_prompt_vectors(vectors(2))
        assert_same(store.prompt_vectors([b"v0", b"v1"]), vectors(2))
    other.close()
    assert caplog.messages == [f"the store {file} can't be used (database is locked): going on without"]


def test_a_mistake_of_the_caller_is_not_hidden(file: Path) -> None:
    with Store(file) as store, pytest.raises(sqlite3.IntegrityError):
        store.keep_prompt_vectors(vectors(1), model=None)  # type: ignore[arg-type]


# ---- several at once


def run_processes(target: Callable[..., None], *, count: int, arguments: tuple[object, ...]) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(number, *arguments)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * count


class Complaint(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage())


def write_and_read(number: int, file: Path) -> None:
    logging.getLogger("clipcli").addHandler(Complaint())
    for round in range(20):
        with Store(file) as store:
            mine = vectors(20, f"{number}-{round}-")
            store.keep_prompt_vectors(mine)
            assert_same(store.prompt_vectors(list(mine)), mine)
            store.prompt_vectors([f"{other}-{round}-{i}".encode() for other in range(3) for i in range(20)])


def test_processes_lose_nothing(file: Path) -> None:
    run_processes(write_and_read, count=3, arguments=(file,))
    expected = [f"{number}-{round}-{i}".encode() for number in range(3) for round in range(20) for i in range(20)]
    with Store(file) as store:
        assert store.prompt_vectors(expected).keys() == set(expected)


def find_damage(number: int, file: Path) -> None:
    with Store(file) as store:
        store.keep_prompt_vectors(vectors(5, f"{number}-"))
        assert store.path == file


def test_processes_that_find_the_same_damage_set_it_aside_once(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"garbage" * 1000)
    run_processes(find_damage, count=3, arguments=(file,))
    assert len(damaged_copies(file)) == 1
    assert sql(file, "SELECT count(*) FROM entry") == [(15,)]


def test_damage_that_another_process_has_dealt_with(file: Path) -> None:
    """Whoever comes second must not set the fresh file aside."""
    many = vectors(5000, width=64)
    with Store(file) as store:
        store.keep_prompt_vectors(many)
    with Store(file) as second:
        assert len(second.prompt_vectors([b"v7"])) == 1
        overwrite(file, connection.PAGE_BYTES)
        with Store(file) as first:
            first.keep_prompt_vectors(vectors(5, "first"))
        assert second.prompt_vectors(list(many)) == {}
        second.keep_prompt_vectors(vectors(5, "second"))
    assert len(damaged_copies(file)) == 1
    assert sql(file, "SELECT count(*) FROM entry") == [(10,)]


def test_threads_share_a_store(file: Path) -> None:
    with Store(file) as store, ThreadPoolExecutor(4) as pool:

        def work(number: int) -> int:
            mine = vectors(20, f"{number}-")
            store.keep_prompt_vectors(mine)
            return len(store.prompt_vectors(list(mine)))

        assert list(pool.map(work, range(40))) == [20] * 40


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_opens_the_file_anew(file: Path) -> None:
    with Store(file) as store:
        store.keep_prompt_vectors(vectors(1))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                known = store.prompt_vectors([b"v0"])
                store.keep_prompt_vectors(vectors(3, "child"))
                status = 0 if len(known) == 1 and store.path == file else 2
                store.close()
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        store.keep_prompt_vectors(vectors(3, "parent"))
        assert len(store.prompt_vectors([b"v0", b"child2", b"parent2"])) == 3


# ---- keys


LABELS = [Label("cat", ("cat", "tabby"), ("a small animal",)), Label("dog", ("dog",))]
TEMPLATES = [Template("a photo of a <>."), Template("<>", 0.5)]


def test_keys_stay_the_same() -> None:
    """A change here throws away every store: raise keys.VERSION with it."""
    assert prompt_key([49406, 320, 49407], "f00", "fp32 torch").hex() == "cf9680bc681e144e5dd7a4c7b88089d7"
    assert (
        classifier_key(LABELS, TEMPLATES, "f00", "b00", "fp32 torch", False).hex() == "179a18d0ffc89329c969ac136e7db5e3"
    )


def test_a_classifier_key_follows_all_that_changes_the_weights() -> None:
    def key(
        labels: list[Label] = LABELS,
        templates: list[Template] = TEMPLATES,
        settings: tuple[str, str, str] = ("text", "vocabulary", "fp32"),
        truncate: bool = False,
    ) -> bytes:
        return classifier_key(labels, templates, *settings, truncate)

    cat, dog = LABELS
    different = [
        key(),
        key([dog, cat]),
        key([replace(cat, name="Cat"), dog]),
        key([replace(cat, aliases=("cat",)), dog]),
        key([replace(cat, aliases=(), descriptions=("cat", "tabby", "a small animal")), dog]),
        key([replace(cat, descriptions=()), dog]),
        key(templates=TEMPLATES[:1]),
        key(templates=TEMPLATES[::-1]),
        key(templates=[TEMPLATES[0], Template("<>", 2.0)]),
        key(settings=("text2", "vocabulary", "fp32")),
        key(settings=("text", "vocabulary2", "fp32")),
        key(settings=("text", "vocabulary", "fp16")),
        key(settings=("textvocabulary", "", "fp32")),
        key(truncate=True),
    ]
    assert len(set(different)) == len(different)
    elsewhere = replace(cat, where="labels.txt:3", group="pets", threshold=0.5)
    assert key([elsewhere, dog]) == key()
    assert key(templates=[TEMPLATES[0], Template("<>", 1 / 2)]) == key()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 2**32 - 1), max_size=3), st.text(max_size=3), st.text(max_size=3))))
def test_different_prompts_have_different_keys(inputs: list[tuple[list[int], str, str]]) -> None:
    by_key = {prompt_key(*given): (tuple(given[0]), *given[1:]) for given in inputs}
    assert set(by_key.values()) == {(tuple(ids), *rest) for ids, *rest in inputs}


def test_a_key_is_no_shifted_boundary() -> None:
    assert prompt_key([1], "ab", "c") != prompt_key([1], "a", "bc")
    assert len(prompt_key([], "", "")) == 16


def test_tables_that_refuse_our_values_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import sqlite3

    path = tmp_path / "store.sqlite"
    with Store(path) as store:
        store.keep_prompt_vectors({b"a" * 16: np.ones(3, np.float32)})
    connection = sqlite3.connect(path)
    connection.execute("CREATE TRIGGER no BEFORE INSERT ON entry BEGIN SELECT RAISE(ABORT, 'no'); END")
    connection.commit()
    connection.close()
    with Store(path) as store:
        store.keep_prompt_vectors({b"b" * 16: np.ones(3, np.float32)})
        assert list(store.prompt_vectors([b"b" * 16])) == [b"b" * 16]
    assert "set aside" in caplog.text
