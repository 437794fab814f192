"""Archives among the inputs: which members are pictures, members by their names, and what damage costs."""

from __future__ import annotations

import logging
import random
import tarfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from pictures_made import encoded, photo
from test_archives import damage, packed, tar

from clipcli.errors import UsageError
from clipcli.images import stream as stream_module
from clipcli.images.archives import Member, members
from clipcli.images.find import Walk, check_inputs, parted
from clipcli.images.packed import Lookup
from clipcli.images.stream import Prepared, batches
from clipcli.records import Failure, FailureKind, Source

PNG, JPEG = encoded(photo(8, 8), "PNG"), encoded(photo(8, 8), "JPEG")
FILES = {
    "b.png": PNG,
    "b.cls": b"7",
    "a.png": PNG,
    "words.txt": b"BM is how this text begins",
    "no ending": JPEG,
    "sub/c.jpg": b"<html>not found</html>",
    "sub/old/d.JPG": b"",
    ".hidden.png": PNG,
    "__MACOSX/._b.png": PNG,
    "caf\udce9\n[red].png": PNG,
    "inner.zip": b"PK\5\6" + bytes(18),
}
SEEN = ["b.png", "a.png", "no ending", "sub/c.jpg", "sub/old/d.JPG", "caf\udce9\n[red].png"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=["x.tar", "x.tar.gz", "X.TGZ", "x.tar.bz2", "x.tar.xz", "x.zip"])
def archive(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    files = {name.replace("\udce9", "é"): data for name, data in FILES.items()} if name == "x.zip" else FILES
    kind = "tar.gz" if name == "X.TGZ" else name[2:]
    _ = packed(Path(name), files) if name == "x.zip" else tar(Path(name), files, kind)
    return name


def rows(*inputs: str, **rules: object) -> list[str]:
    """Paths, failures marked by their kind."""
    found = Walk([*inputs], **rules)  # type: ignore[arg-type]
    return [item.path if isinstance(item, Source) else f"{item.path}!{item.kind}" for item in found]


def seen(archive: str) -> list[str]:
    return [f"{archive}::{name}".replace("\udce9", "é" if archive == "x.zip" else "\udce9") for name in SEEN]


def test_pictures_are_known_as_in_a_folder(archive: str) -> None:
    walk = Walk([archive])
    items = list(walk)
    assert [item.path for item in items] == seen(archive)
    assert walk.passed_over == 3, "two texts and an archive"
    found = {item.path.partition("::")[2].replace("é", "\udce9"): item for item in items}
    assert all(isinstance(item, Source) and item.data == FILES[name] for name, item in found.items())


def test_globs_see_members(archive: str) -> None:
    def names(**rules: object) -> list[str]:
        return [row.partition("::")[2] for row in rows(archive, **rules)]

    assert names(include=["*.png"]) == [row.partition("::")[2] for row in (seen(archive)[n] for n in (0, 1, 5))]
    assert names(include=["sub/*"]) == ["sub/c.jpg", "sub/old/d.JPG"]
    assert names(include=["sub/*"], exclude=["old"]) == ["sub/c.jpg"]
    assert names(include=["sub/*"], exclude=["sub/old"]) == ["sub/c.jpg"]
    assert names(include=["*.JPG", "b.*"], exclude=["s*"]) == ["b.png"]


def test_globs_see_through_a_leading_dot(here: Path) -> None:
    tar(here / "x.tar", {"./sub/a.png": PNG, "./sub/b.png": PNG, "././c.png": PNG})
    assert rows("x.tar", include=["sub/*"], exclude=["b.png"]) == ["x.tar::./sub/a.png"]


def test_a_list_may_name_archives_and_members(archive: str) -> None:
    rows_ = rows(archive, "gone.tar", f"{archive}::a.png", f"{archive}::nothing", "gone.tar::a.png", folders=False)
    assert rows_ == [
        *seen(archive),
        "gone.tar!missing",
        f"{archive}::a.png",
        f"{archive}::nothing!missing",
        "gone.tar::a.png!missing",
    ]


def test_every_row_can_be_named_again(archive: str) -> None:
    """In order, the archive is opened once; in any other order, the bytes are the right ones all the same."""
    first = list(Walk([archive]))
    assert list(Walk([item.path for item in first], folders=False)) == first
    for names in (first[::-1], [first[1], first[1], first[4], first[0]]):
        assert list(Walk([item.path for item in names])) == names
    assert list(Walk([item.path for item in first], include=["nothing"])) == first, "what is named is wanted"


def test_what_is_named_is_a_row_whatever_it_is(archive: str) -> None:
    walk = Walk([f"{archive}::words.txt", f"{archive}::.hidden.png", f"{archive}::sub"])
    assert list(walk) == [
        Source(f"{archive}::words.txt", FILES["words.txt"]),
        Source(f"{archive}::.hidden.png", PNG),
        Failure(f"{archive}::sub", FailureKind.MISSING, "the archive has no such member"),
    ]


def test_names_in_order_cost_one_pass(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar(here / "x.tar", {f"{n}.png": PNG for n in range(20)})
    opened = []
    monkeypatch.setattr("clipcli.images.packed.members", lambda *a, **k: (opened.append(a), members(*a, **k))[1])
    lookup = Lookup("x.tar")
    assert [lookup.find(f"{n}.png").path for n in range(1, 20, 2)] == [f"x.tar::{n}.png" for n in range(1, 20, 2)]
    assert len(opened) == 1
    assert isinstance(lookup.find("0.png"), Source) and len(opened) == 2


def test_a_file_of_that_very_name_comes_first(here: Path) -> None:
    tar(here / "x.tar", {"a.png": PNG})
    (here / "x.tar::a.png").write_bytes(JPEG)
    assert list(Walk(["x.tar::a.png"])) == [Source("x.tar::a.png")]


def test_names_with_colons(here: Path) -> None:
    (here / "a::b.tar").mkdir()
    tar(here / "a::b.tar" / "c.tar", {"d::e.tar::f.png": PNG, "": JPEG})
    assert parted("a::b.tar/c.tar::d::e.tar::f.png") == ("a::b.tar/c.tar", "d::e.tar::f.png")
    inputs = ["a::b.tar/c.tar::d::e.tar::f.png", "a::b.tar/c.tar::"]
    assert list(Walk(inputs)) == [Source(inputs[0], PNG), Source(inputs[1], JPEG)]
    assert list(Walk(["a::b.tar/c.tar"])) == list(Walk(inputs))
    assert parted("c.tar::x") is None and parted("a.png::x") is None and parted("nul\0.tar::x") is None


def test_an_input_that_is_a_member_is_there(here: Path) -> None:
    tar(here / "x.tar", {"a.png": PNG})
    check_inputs(["x.tar", "x.tar::a.png", "x.tar::gone.png"])
    for name in ("y.tar::a.png", "x.png::a.png"):
        with pytest.raises(UsageError, match="no such file or folder"):
            check_inputs([name])


def test_an_archive_in_a_folder_is_passed_over_and_told(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    (here / "p").mkdir()
    (here / "p" / "a.png").write_bytes(PNG)
    tar(here / "p" / "x.tar", {"b.png": PNG})
    packed(here / "p" / ".hidden.zip", {"b.png": PNG})
    walk = Walk(["p"])
    with caplog.at_level(logging.WARNING, "clipcli"):
        assert list(walk) == [Source("p/a.png")]
    assert walk.passed_over == 1
    assert [record.getMessage() for record in caplog.records] == [
        "p: 1 archive in it passed over; to look inside, name them as INPUT"
    ]
    caplog.clear()
    assert rows("p", exclude=["*.tar"]) == ["p/a.png"]
    assert not caplog.records


def test_links_that_look_like_pictures_are_rows(here: Path) -> None:
    with tarfile.open("x.tar", "w") as file:
        for kind, name in [(tarfile.SYMTYPE, "soft.jpg"), (tarfile.LNKTYPE, "hard.jpg"), (tarfile.SYMTYPE, "soft")]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    with zipfile.ZipFile("x.zip", "w") as archive:
        for name in ("soft.jpg", "soft"):
            link = zipfile.ZipInfo(name)
            link.create_system, link.external_attr = 3, 0o120777 << 16
            archive.writestr(link, "/etc/passwd")
    walk = Walk(["x.tar", "x.zip", "x.tar::soft"])
    assert [(item.path, getattr(item, "message", "")) for item in walk] == [
        (name, "a link in an archive can't be read")
        for name in ("x.tar::soft.jpg", "x.tar::hard.jpg", "x.zip::soft.jpg", "x.tar::soft")
    ]
    assert walk.passed_over == 2


def test_a_name_with_a_nul_is_a_failure(here: Path) -> None:
    tar(here / "x.tar", {"ä\0.png": PNG, "b.png": PNG})
    assert rows("x.tar") == ["x.tar::ä\0.png!unsupported", "x.tar::b.png"]


def test_a_damaged_archive_gives_what_came_before_and_one_failure(here: Path) -> None:
    names = [f"{n}.png" for n in range(6)]
    damage(tar(here / "x.tar", dict.fromkeys(names, PNG)), 3 * (512 + len(PNG) + -len(PNG) % 512) + 100)
    assert rows("x.tar") == ["x.tar::0.png", "x.tar::1.png", "x.tar::2.png", "x.tar!corrupt"]
    assert rows("x.tar::1.png", "x.tar::4.png", "x.tar::0.png") == [
        "x.tar::1.png",
        "x.tar::4.png!corrupt",
        "x.tar::0.png",
    ]
    (here / "none.zip").write_bytes(b"<html>")
    (here / "empty.tar").touch()
    assert rows("none.zip", "none.zip::a.png") == ["none.zip!truncated", "none.zip::a.png!truncated"]
    assert rows("empty.tar") == ["empty.tar!truncated"]


def test_what_is_no_picture_is_not_read_whole(here: Path) -> None:
    big = random.Random(0).randbytes(8 << 20)
    tar(here / "x.tgz", {"film.mp4": big, "a.png": PNG}, "tar.gz")
    packed(here / "x.zip", {"film.mp4": big, "a.png": PNG})
    for name in ("x.tgz", "x.zip"):
        tracemalloc.start()
        assert [item.path for item in Walk([name])] == [f"{name}::a.png"]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20


def test_known_sees_the_head_and_spares_the_rest(archive: str) -> None:
    heads: dict[str, bytes] = {}

    def known(name: str, head: bytes) -> bool:
        heads[name.replace("é", "\udce9")] = head
        return name == "a.png"

    assert list(members(archive, known=known)) == [Member("a.png", PNG)]
    assert heads == {name: data[:64] for name, data in FILES.items() if name[0] not in "._"}


def test_bytes_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources of 1,000 bytes, 2,500 allowed: the third waits for nobody, the fourth until one is decoded."""
    monkeypatch.setattr(stream_module, "MAX_WAITING", 2500)
    decoded, pulled = threading.Semaphore(0), []

    def sources() -> Iterator[Source]:
        for n in range(12):
            pulled.append(n)
            yield Source(str(n), bytes(1000))

    def prepare(source: Source) -> Prepared:
        decoded.acquire()
        return Prepared(np.full((3, 2, 2), int(source.path), np.uint8))

    stream = batches(sources(), prepare, batch_size=12, workers=2)
    result: list[object] = []
    consumer = threading.Thread(target=lambda: result.extend(stream), daemon=True)
    consumer.start()
    for done in range(4):
        end = time.monotonic() + 5
        while len(pulled) < done + 3 and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(0.02)
        assert len(pulled) == done + 3
        decoded.release()
    decoded.release(20)
    consumer.join(5)
    (batch,) = result
    assert [item.path for item in batch.items] == [str(n) for n in range(12)]  # type: ignore[attr-defined]
    assert batch.pixels[:, 0, 0, 0].tolist() == list(range(12))  # type: ignore[attr-defined]


LABELS = ("-L", "cat", "-L", "dog")


def test_rows_of_real_shards_are_those_of_the_unpacked_files(
    cli: Run, model: Path, pictures: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPCLI_MODEL", str(model))
    (here / "shard.tar").symlink_to(pictures / "imagenet-fullsize-20.tar")
    with tarfile.open("shard.tar") as archive:
        names = [name for name in archive.getnames() if name.endswith(".jpg")]
        archive.extractall("out", filter="data")
    members_ = cli("classify", "shard.tar", *LABELS, "-f", "jsonl")
    files = cli("classify", *[f"out/{name}" for name in names], *LABELS, "-f", "jsonl", "--no-cache")
    assert members_.code == 0 and len(members_.rows) == 20
    assert members_.rows == [{**row, "path": f"shard.tar::{row['path'][4:]}"} for row in files.rows]
    listed = cli("classify", "shard.tar", *LABELS, "-f", "paths", "-q", "--print0").out
    again = cli("classify", "-0", *LABELS, "-f", "jsonl", "--no-cache", stdin=listed)
    assert again.out == members_.out
    assert "40 other files passed over" in cli("classify", "shard.tar", *LABELS, "-v").err


def test_an_archive_is_no_output(cli: Run, model: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPCLI_MODEL", str(model))
    before = tar(here / "x.tar", {"a.png": PNG}).read_bytes()
    for name in ("x.tar", "x.tar::a.png"):
        result = cli("classify", name, *LABELS, "-o", "x.tar", "--force")
        assert result.code == 2 and (here / "x.tar").read_bytes() == before
    assert "is an archive" in result.err
