"""Archives: every kind of tar and zip as the standard library writes them, and what hostile ones come to."""

from __future__ import annotations

import gc
import gzip
import io
import os
import random
import shutil
import stat
import struct
import subprocess
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from clipcli.images import archives
from clipcli.images.archives import Member, inside, members
from clipcli.images.find import is_archive
from clipcli.records import Failure, FailureKind

Files = dict[str, bytes]
FILES: Files = {
    "a.jpg": b"first",
    "empty.txt": b"",
    "folder/just one block.jpg": bytes(512),
    "folder/ä 猫.png": bytes(range(256)) * 3,
    "./dot/x.jpg": b"dot",
    "deep/" * 30 + "prefixed.jpg": b"too long for the first field",
    "n" * 300 + ".jpg": b"too long for a header",
    "large.jpg": random.Random(0).randbytes(1_200_001),
    "PKLot/last.jpg": b"last",
}
MODES = ["tar", "tar.gz", "tar.bz2", "tar.xz"]


def tar(path: Path, files: Files, kind: str = "tar", layout: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of `files` as the standard library writes it."""
    packing = kind.removeprefix("tar").removeprefix(".")
    with tarfile.open(path, f"w:{packing}", format=layout) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def packed(path: Path, files: Files, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """A zip of `files`."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def read(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> tuple[Files, list[Failure]]:
    """The members by name, and the failures; where there are such, the archive's own is the last."""
    items = list(members(str(path), wanted))
    failures = [item for item in items if isinstance(item, Failure)]
    assert [item.path for item in items if isinstance(item, Failure)].count(str(path)) <= 1
    assert not any(item.path == str(path) for item in failures[:-1])
    return {item.name: item.data for item in items if isinstance(item, Member)}, failures


def kinds(failures: list[Failure]) -> list[FailureKind]:
    return [failure.kind for failure in failures]


# What good archives hold


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar(tmp_path: Path, kind: str, layout: int) -> None:
    files = {name: data for name, data in FILES.items() if layout != tarfile.USTAR_FORMAT or "n" * 300 not in name}
    assert read(tar(tmp_path / f"x.{kind}", files, kind, layout)) == (files, [])


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips(tmp_path: Path, method: int) -> None:
    assert read(packed(tmp_path / "x.zip", FILES, method)) == (FILES, [])


def test_the_content_tells_the_kind(tmp_path: Path) -> None:
    """Names lie, and a tar begins with a member's name, which may look like another kind's mark."""
    assert read(packed(tmp_path / "zip.tar", FILES)) == (FILES, [])
    assert read(tar(tmp_path / "gz.tar", FILES, "tar.gz")) == (FILES, [])
    first = {"PKLot/1.jpg": b"parked", "BZh9.jpg": b"no bzip2"}
    assert read(tar(tmp_path / "a.tar.gz", first)) == (first, [])
    assert read(tar(tmp_path / "b.zip", dict(reversed(first.items())))) == (first, [])


def test_empty_archives(tmp_path: Path) -> None:
    assert read(tar(tmp_path / "x.tar", {})) == ({}, [])
    assert read(packed(tmp_path / "x.zip", {})) == ({}, [])


def test_the_standard_library_agrees_on_real_tars(pictures: Path) -> None:
    for name in ("pacs-dev.tar", "mnist-test-dev.tar.gz", "flickr8k-captions-dev.tar"):
        with tarfile.open(pictures / name) as archive:
            files = [(info.name, archive.extractfile(info).read()) for info in archive]  # type: ignore[union-attr]
        assert [(item.name, item.data) for item in members(str(pictures / name)) if isinstance(item, Member)] == files


@pytest.mark.skipif(not shutil.which("tar"), reason="there is no tar")
@pytest.mark.parametrize("layout", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_what_tar_writes(tmp_path: Path, layout: str) -> None:
    """Links, folders and holes among the files; the file behind each is still found."""
    folder = tmp_path / "in"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "a.jpg").write_bytes(b"a" * 700)
    os.link(folder / "1" / "a.jpg", folder / "2 hard.jpg")
    (folder / "3 soft.jpg").symlink_to("1/a.jpg")
    with (folder / "4 holes.jpg").open("wb") as file:
        for place in range(0, 60 << 20, 3 << 20):  # more holes than the first header has room for
            file.seek(place)
            file.write(b"x")
    (folder / "5.jpg").write_bytes(b"behind")
    sparse = ["-S"] if layout in ("oldgnu", "gnu", "posix") else []
    command = ["tar", *sparse, f"--format={layout}", "--sort=name", "-cf", tmp_path / "x.tar", "-C", folder, "."]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a tar that doesn't know these options")
    found, failures = read(tmp_path / "x.tar")
    holes = found.pop("./4 holes.jpg", None)
    assert found == {"./1/a.jpg": b"a" * 700, "./5.jpg": b"behind"}
    if not sparse:
        assert holes is not None and len(holes) == (57 << 20) + 1 and not failures
    else:
        assert kinds(failures) == [FailureKind.UNSUPPORTED] and "sparse" in failures[0].message


def test_only_files_that_are_not_hidden(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    hidden = {".x.jpg": b"", "a/.x/b.jpg": b"", "__MACOSX/a/._b.jpg": b"", "a/__MACOSX/b.jpg": b"", "old folder/": b""}
    seen = {"../up.jpg": b"1", "/root.jpg": b"2", "a/../b.jpg": b"3", "_x.jpg": b"4", "a/_b.jpg": b"5", "a.b": b"6"}
    assert read(path) == ({}, [])
    assert read(tar(path, {**hidden, **seen})) == (seen, [])
    assert read(packed(tmp_path / "x.zip", {**hidden, **seen})) == (seen, [])


def test_links_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        link = zipfile.ZipInfo("link.jpg")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("file.jpg", b"file")
    assert read(tmp_path / "x.zip") == ({"file.jpg": b"file"}, [])


@pytest.mark.parametrize("name", ["x.tar", "X.TAR.GZ", "x.tgz", "x.tar.bz2", "x.tar.xz", "a/b.zip"])
def test_endings(name: str) -> None:
    assert is_archive(name)
    assert not is_archive(name + ".jpg")


def test_wanted_is_asked_before_anything_is_read(tmp_path: Path) -> None:
    asked: list[str] = []

    def wanted(name: str) -> bool:
        asked.append(name)
        return name == "PKLot/last.jpg"

    for path in (tar(tmp_path / "x.tar", FILES), tar(tmp_path / "x.tgz", FILES, "tar.gz")):
        asked.clear()
        assert read(path, wanted) == ({"PKLot/last.jpg": b"last"}, [])
        assert asked == list(FILES)
    path = packed(tmp_path / "x.zip", FILES)
    damage(
        path, path.read_bytes().index(FILES["large.jpg"][:8]) if FILES["large.jpg"][:8] in path.read_bytes() else 900
    )
    assert read(path, wanted) == ({"PKLot/last.jpg": b"last"}, [])


def test_an_iterator_left_alone_closes_its_file(tmp_path: Path) -> None:
    for path in (
        tar(tmp_path / "x.tar", FILES),
        tar(tmp_path / "x.tgz", FILES, "tar.gz"),
        packed(tmp_path / "z", FILES),
    ):
        assert next(members(str(path))) == Member("a.jpg", b"first")
        gc.collect()  # what is left open would be a warning, and so an error


# Names


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../../up.jpg",
        "a\nb\x1b[31m.jpg",
        "ä nul\0.jpg",
        "caf\udce9.jpg",
        "x" * 100_000 + ".jpg",
        "a::b.jpg",
    ],
    ids=["absolute", "up", "control", "nul", "latin-1", "100 kB", "colons"],
)
def test_names_are_only_labels(tmp_path: Path, name: str) -> None:
    found, failures = read(tar(tmp_path / "x.tar", {name: b"data", "b.jpg": b"next"}))
    assert list(found.values()) == [b"data", b"next"] and not failures
    assert next(iter(found)) == name
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_a_name_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 4 << 30
    header = info.tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "x.tgz"
    with gzip.open(tar(path, {"a.jpg": b"a"}, "tar.gz")) as file:
        good = file.read(1024)
    path.write_bytes(gzip.compress(good + header + bytes(20 << 20)))
    found, failures = read(path)
    assert found == {"a.jpg": b"a"} and kinds(failures) == [FailureKind.CORRUPT]
    assert failures[0].message == f"the archive has a name or attributes of {4 << 30} bytes"


def test_names_of_a_zip_that_says_nothing_of_utf_8(tmp_path: Path) -> None:
    """Info-ZIP writes UTF-8 without saying so; DOS wrote its own code page."""
    for raw, name in (("ä.jpg".encode(), "ä.jpg"), (b"\x84__.jpg", "ä__.jpg")):
        path = packed(tmp_path / "x.zip", {"a" * len(raw): b"data"})
        path.write_bytes(path.read_bytes().replace(b"a" * len(raw), raw))
        assert read(path) == ({name: b"data"}, [])


# Damage


def damage(path: Path, place: int) -> Path:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    return path


SMALL: Files = {f"{n}.jpg": bytes([n]) * 600 for n in range(4)}  # 512 + 1024 bytes each in a tar


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
@pytest.mark.parametrize("place", [1, 511, 512, 513, 1111, 1112, 1535, 1537, 3072 + 700, 4608 + 1024 + 511])
def test_what_came_before_the_end_is_read(tmp_path: Path, place: int, kind: str) -> None:
    whole = tar(tmp_path / "x.tar", SMALL).read_bytes()[:place]
    path = tmp_path / f"y.{kind}"
    path.write_bytes(gzip.compress(whole) if kind == "tar.gz" else whole)
    found, failures = read(path)
    assert found == dict(list(SMALL.items())[: (place + 1536 - 1112) // 1536])
    assert failures == [Failure(str(path), FailureKind.TRUNCATED, "the archive ends early")]


@pytest.mark.parametrize("kind", ["tar.gz", "tar.bz2", "tar.xz"])
def test_cut_compressed_data(tmp_path: Path, kind: str) -> None:
    path = tar(tmp_path / f"x.{kind}", {**FILES, "noise.jpg": random.Random(1).randbytes(1 << 20)}, kind)
    path.write_bytes(path.read_bytes()[:-300_000])
    found, failures = read(path)
    assert found == FILES or kind == "tar.bz2"  # which works in blocks of 900 kB
    assert kinds(failures) == [FailureKind.TRUNCATED]


def test_a_missing_end_mark_is_no_damage(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", SMALL)
    path.write_bytes(path.read_bytes()[: 4 * 1536])
    assert read(path) == (SMALL, [])


@pytest.mark.parametrize("place", [0, 124, 148, 156, 300])
def test_a_damaged_header_ends_it(tmp_path: Path, place: int) -> None:
    path = damage(tar(tmp_path / "x.tar", SMALL), 2 * 1536 + place)
    found, failures = read(path)
    assert list(found) == ["0.jpg", "1.jpg"] and kinds(failures) == [FailureKind.CORRUPT]
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["0.jpg", "1.jpg"]  # the standard library says nothing: why it isn't used


def test_a_wrong_checksum_of_compressed_data_is_told(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tgz", FILES, "tar.gz")
    found, failures = read(damage(path, path.stat().st_size - 6))
    assert found == FILES and kinds(failures) == [FailureKind.CORRUPT]


@pytest.mark.parametrize(
    "data", [b"<html>404 not found</html>" * 40, b"\x1f\x8b\x08 no gzip" * 40, b"x", b"BZh91AY&SYxx" * 9]
)
def test_no_archive_at_all(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    found, failures = read(tmp_path / "x.tar")
    assert not found and len(failures) == 1 and failures[0].kind in (FailureKind.CORRUPT, FailureKind.TRUNCATED)


def test_no_file_at_all(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    assert kinds(read(tmp_path / "none.tar")[1]) == [FailureKind.MISSING]
    assert kinds(read(tmp_path / "pipe.tar")[1]) == [FailureKind.UNREADABLE]
    assert kinds(read(tmp_path / "folder.tar")[1]) == [FailureKind.UNREADABLE]
    assert [item.kind for item in members("nul\0.tar") if isinstance(item, Failure)] == [FailureKind.MISSING]


def test_a_damaged_member_of_a_zip_costs_no_other(tmp_path: Path) -> None:
    noise = {f"{n}.jpg": random.Random(n).randbytes(4000) for n in range(4)}
    path = damage(packed(tmp_path / "x.zip", noise, zipfile.ZIP_STORED), 6000)
    found, failures = read(path)
    assert list(found) == ["0.jpg", "2.jpg", "3.jpg"]
    assert failures == [Failure(inside(str(path), "1.jpg"), FailureKind.CORRUPT, "the member is damaged")]


def test_a_cut_zip_has_no_table(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.zip", FILES)
    path.write_bytes(path.read_bytes()[:-200])
    assert read(path) == ({}, [Failure(str(path), FailureKind.TRUNCATED, "the archive ends early")])


def test_encrypted_and_unknown_members_of_a_zip(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.zip", {"a.jpg": b"a" * 99, "b.jpg": b"b" * 99, "c.jpg": b"c" * 99})
    data = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        first = data.index(signature)
        data[first + flags] |= 1
        struct.pack_into("<H", data, data.index(signature, first + 4) + flags + 2, 97)
    path.write_bytes(data)
    found, failures = read(path)
    assert found == {"c.jpg": b"c" * 99} and kinds(failures) == [FailureKind.UNSUPPORTED] * 2
    assert "encrypted" in failures[0].message and "method 97" in failures[1].message


@pytest.mark.parametrize("kind", ["x.tar", "x.tar.gz", "x.tar.xz", "x.zip"])
def test_random_damage_raises_nothing(tmp_path: Path, kind: str) -> None:
    files = {f"folder/{n}.jpg": random.Random(n).randbytes(700) * 2 for n in range(6)}
    path = tmp_path / kind
    whole = (packed(path, files) if kind == "x.zip" else tar(path, files, kind[2:])).read_bytes()
    unharmed = 0
    for seed in range(300):
        rng = random.Random(seed)
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3, 20))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])
        found, failures = read(path)
        unharmed += not failures
        if kind in ("x.tar.gz", "x.tar.xz") and not failures:
            assert found == files
    assert unharmed < 200


# Bombs


def test_a_member_may_be_too_large(tmp_path: Path) -> None:
    for path in (
        tar(tmp_path / "x.tar", FILES),
        tar(tmp_path / "x.tgz", FILES, "tar.gz"),
        packed(tmp_path / "z", FILES),
    ):
        items = list(members(str(path), limit=lambda name: 1000))
        failures = [item for item in items if isinstance(item, Failure)]
        assert failures == [
            Failure(inside(str(path), "large.jpg"), FailureKind.TOO_LARGE, "1200001 bytes are too many")
        ]
        assert items[-1] == Member("PKLot/last.jpg", b"last")


@pytest.mark.parametrize("kind", ["x.tar.gz", "x.tar.bz2", "x.zip"])
def test_an_archive_that_unpacks_to_too_much(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 1 << 20)
    files = {f"{n}.jpg": bytes(1 << 19) for n in range(80)}
    path = tmp_path / kind
    _ = packed(path, files) if kind == "x.zip" else tar(path, files, kind[2:])
    found, failures = read(path)
    assert 0 < len(found) < 80 and kinds(failures) == [FailureKind.TOO_LARGE]
    assert failures[0].message == "the archive unpacks to more than 200 times its size"
    found, failures = read(path, lambda name: False)
    assert not found and kinds(failures) == [FailureKind.TOO_LARGE] * (kind != "x.zip")  # a zip's aren't unpacked


def test_a_member_of_a_zip_that_understates_its_size(tmp_path: Path) -> None:
    """It says 100 bytes and unpacks to 200 MB: no more is unpacked than it says."""
    path = packed(tmp_path / "x.zip", {"a.jpg": bytes(200 << 20)})
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 200 << 20), struct.pack("<I", 100)))
    tracemalloc.start()
    failures = read(path)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kinds(failures) == [FailureKind.CORRUPT] and peak < 2 << 20


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_memory_stays_flat(tmp_path: Path, kind: str) -> None:
    path = tar(tmp_path / "x", {f"{n:06}.jpg": b"data" for n in range(10_000)}, kind, tarfile.USTAR_FORMAT)
    tracemalloc.start()
    count = sum(isinstance(item, Member) for item in members(str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000 and peak < 2_000_000
