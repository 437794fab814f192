"""Walking folders, reading lists: what is met, in which order, and what is said of the rest."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures_made import encoded, photo

from clipcli.errors import UsageError
from clipcli.images.find import Walk, check_inputs, sniff
from clipcli.images.lists import LONGEST_NAME, read_list
from clipcli.records import Failure, FailureKind, Source

PNG = encoded(photo(8, 8), "PNG")


def rows(*inputs: str, **rules: object) -> list[str]:
    """Paths, failures marked by their kind."""
    found = Walk([*inputs], **rules)  # type: ignore[arg-type]
    return [item.path if isinstance(item, Source) else f"{item.path}!{item.kind}" for item in found]


def put(folder: Path, *names: str, data: bytes = PNG) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_is_walked_depth_first_in_the_order_of_bytes(here: Path) -> None:
    put(here, "p/b.png", "p/a/z.png", "p/a/B.png", "p/a.png", "p/é.png", "p/c/d/e/f.png", "p/Z.png")
    assert rows("p") == ["p/Z.png", "p/a/B.png", "p/a/z.png", "p/a.png", "p/b.png", "p/c/d/e/f.png", "p/é.png"]
    assert rows("p/") == rows("p")
    assert rows("p/c", "p/b.png", "p/c") == ["p/c/d/e/f.png", "p/b.png", "p/c/d/e/f.png"]


def test_pictures_are_known_by_content_or_by_name(here: Path) -> None:
    put(here, "p/photo", "p/photo.txt")
    put(here, "p/broken.JPG", "p/empty.webp", data=b"")
    put(here, "p/labels.txt", "p/notes", "p/noending.", data=b"BM is how this text begins, P5 too")
    found = Walk(["p"])
    assert [item.path for item in found] == ["p/broken.JPG", "p/empty.webp", "p/photo", "p/photo.txt"]
    assert found.passed_over == 3


def test_what_is_named_always_gets_a_row(here: Path) -> None:
    put(here, "p/labels.txt", data=b"cat\ndog\n")
    put(here, "p/.hidden.png", "p/.folder/a.png")
    assert rows("p") == []
    assert rows("p/labels.txt", "gone.png", "p/.hidden.png", "p/.folder", "p/labels.txt", "p/labels.txt/x") == [
        "p/labels.txt",
        "gone.png!missing",
        "p/.hidden.png",
        "p/.folder/a.png",
        "p/labels.txt",
        "p/labels.txt/x!missing",
    ]
    assert rows("") == ["!missing"]
    assert rows("a\0b") == ["a\0b!missing"]
    assert rows("x" * 300 + ".png") == ["x" * 300 + ".png!unreadable"]


def test_a_list_may_refuse_folders(here: Path) -> None:
    put(here, "p/a.png")
    failures = list(Walk(["p", "p/a.png"], folders=False))
    assert failures == [Failure("p", FailureKind.UNREADABLE, "a folder, not a file"), Source("p/a.png")]


def test_include_and_exclude_see_the_name_and_the_path_below(here: Path) -> None:
    put(here, "p/a.png", "p/b.jpg", "p/old/a.png", "p/old/deep/c.png", "p/new/a.png")
    assert rows("p", include=["*.jpg"]) == ["p/b.jpg"]
    assert rows("p", include=["old/*"]) == ["p/old/a.png", "p/old/deep/c.png"]
    assert rows("p", exclude=["old"]) == ["p/a.png", "p/b.jpg", "p/new/a.png"]
    assert rows("p", exclude=["*/a.png"]) == ["p/a.png", "p/b.jpg", "p/old/deep/c.png"]
    assert rows("p", include=["a.*", "c.*"], exclude=["deep"]) == ["p/a.png", "p/new/a.png", "p/old/a.png"]
    assert rows("p/b.jpg", include=["*.png"]) == ["p/b.jpg"]


def test_links(here: Path) -> None:
    put(here, "p/a.png", "elsewhere/z.png")
    os.symlink("a.png", "p/linked.png")
    os.symlink("../elsewhere", "p/folder")
    os.symlink("nowhere", "p/dead.png")
    os.symlink("nowhere", "p/dead")
    os.symlink("loop.png", "p/loop.png")
    os.symlink("..", "p/up")
    walked = Walk(["p"])
    assert [(item.path, getattr(item, "message", "")) for item in walked] == [
        ("p/a.png", ""),
        ("p/dead.png", "a link to nothing"),
        ("p/linked.png", ""),
        ("p/loop.png", "too many levels of symbolic links"),
    ]
    assert walked.passed_over == 3  # the nameless dead link, and two folders that are not entered


def test_followed_links_enter_each_folder_once(here: Path) -> None:
    put(here, "p/a.png", "elsewhere/z.png")
    os.symlink("../elsewhere", "p/folder")
    os.symlink("../elsewhere", "p/again")
    os.symlink(".", "p/self")
    assert rows("p", follow=True) == ["p/a.png", "p/again/z.png"]
    assert rows("p/folder") == ["p/folder/z.png"], "named itself"


def test_what_is_no_file_is_never_opened(here: Path) -> None:
    put(here, "p/a.png", "p/folder.png/b.png", "elsewhere/z.png")
    os.mkfifo("p/pipe.png")
    os.mkfifo("p/pipe")
    os.symlink("/dev/zero", "p/zero.jpg")
    os.symlink("/dev/zero", "p/zero")
    os.symlink("../elsewhere", "p/linked.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("p/socket.png")
        walked = Walk(["p"])
        assert [(item.path, getattr(item, "message", "")) for item in walked] == [
            ("p/a.png", ""),
            ("p/folder.png/b.png", ""),
            ("p/pipe.png", "a pipe, not a file"),
            ("p/socket.png", "a socket, not a file"),
            ("p/zero.jpg", "a device, not a file"),
        ]
        assert walked.passed_over == 3  # the nameless pipe and device, and a link to a folder
        failures = list(Walk(["p/pipe.png", "p/socket.png", os.devnull]))
    assert [str(getattr(item, "message", "")) for item in failures] == [
        "a pipe, not a file",
        "a socket, not a file",
        "a device, not a file",
    ]
    assert {getattr(item, "kind", None) for item in failures} == {FailureKind.UNREADABLE}


def test_a_folder_that_cannot_be_read_is_a_row(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(here, "p/a/x.png", "p/b/y.png")
    scandir = os.scandir

    def refusing(path: bytes) -> AbstractContextManager[Iterator[os.DirEntry[bytes]]]:  # chmod alone does not stop root
        if path.endswith(b"/a"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert list(Walk(["p"])) == [Failure("p/a", FailureKind.UNREADABLE, "permission denied"), Source("p/b/y.png")]


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("code", [errno.EACCES, errno.ENAMETOOLONG, errno.ENOTCONN])
def test_what_may_be_a_folder_is_a_row(here: Path, monkeypatch: pytest.MonkeyPatch, code: int, follow: bool) -> None:
    """As of a folder that may be listed and not searched, or where a dead network share is mounted."""
    put(here, "p/a/x.png", "p/b/y.png")
    looks = {name: getattr(os, name) for name in ("stat", "lstat")}

    def refusing(name: str, path: str, **rest: object) -> os.stat_result:
        if str(path).endswith("/a"):
            raise OSError(code, os.strerror(code))
        return looks[name](path, **rest)  # type: ignore[no-any-return]

    with monkeypatch.context() as patch:
        for name in looks:
            patch.setattr(os, name, partial(refusing, name))
        found = list(Walk(["p"], follow=follow))
    assert found == [Failure("p/a", FailureKind.UNREADABLE, os.strerror(code).lower()), Source("p/b/y.png")]


def test_what_lies_too_deep_is_a_row(here: Path) -> None:
    start = os.open(".", os.O_RDONLY)
    try:
        for depth in range(25):  # 25 times 200 is more than any path may have
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
            if depth in (0, 24):
                put(Path(), "a.png")
    finally:
        os.fchdir(start)
        os.close(start)
    top = "d" * 200
    source, failure = Walk([top])
    assert source == Source(f"{top}/a.png")
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.message) == (FailureKind.UNREADABLE, "file name too long")
    assert len(failure.path) > 4000, "the first folder that has no path any more"


@pytest.mark.parametrize("name", [b"new\nline.png", b"caf\xe9\xff.png", b"[red]:smile:'\".png", b"-rf.png", b" .png"])
def test_names_of_any_bytes_come_back(here: Path, name: bytes) -> None:
    Path("p").mkdir()
    try:
        path = b"p/" + name
        with open(path, "wb") as file:
            file.write(PNG)
    except OSError:
        pytest.skip("this file system refuses the name")
    assert [os.fsencode(item.path) for item in Walk(["p"])] == [b"p/" + name]


def test_a_deep_folder_needs_no_recursion(here: Path) -> None:
    depth = sys.getrecursionlimit() // 2 + 100
    start = os.open(".", os.O_RDONLY)
    try:
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        put(Path(), "a.png")
    finally:
        os.fchdir(start)
        os.close(start)
    deep = "d/" * depth + "a.png"
    assert rows("d") == [deep]


def test_the_walk_is_lazy(here: Path) -> None:
    put(here, "p/a.png")
    names = iter(["p", "p", "gone"])
    found = iter(Walk(names))
    assert next(found) == Source("p/a.png")
    assert list(names) == ["p", "gone"]


@given(st.lists(st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name)))
@settings(max_examples=50, deadline=None)
def test_a_nul_list_gives_back_every_name(names: list[bytes]) -> None:
    listed = b"./" + b"\0./".join(names) + b"\0" if names else b""
    assert [os.fsencode(name) for name in read_list(BytesIO(listed), True)] == [b"./" + name for name in names]


def test_a_list_by_lines() -> None:
    assert list(read_list(BytesIO(b"a b\n\n\nc\r\n \n\xff"), False)) == ["a b", "c\r", " ", "\udcff"]
    assert list(read_list(BytesIO(b""), False)) == []
    many = [f"folder/{number:06}.png" for number in range(20000)]
    assert list(read_list(BytesIO("\n".join(many).encode()), False)) == many
    assert list(Walk(["gone\r"])) == [
        Failure("gone\r", FailureKind.MISSING, "no such file; the name ends in a carriage return")
    ]


def test_a_list_from_windows(here: Path) -> None:
    put(here, "there.png")
    put(here, "odd.png\r")
    assert list(Walk(["there.png\r", "odd.png\r"])) == [Source("there.png"), Source("odd.png\r")]


def test_a_list_that_begins_with_a_mark(here: Path) -> None:
    mark = "\ufeff"
    put(here, "there.png")
    listed = f"{mark}there.png\n{mark}other\n".encode()
    assert list(read_list(BytesIO(listed), False)) == ["there.png", f"{mark}other"]
    assert list(read_list(BytesIO(f"{mark}\nthere.png".encode()), False)) == ["there.png"]
    assert list(Walk(read_list(BytesIO(f"{mark}there.png\r\n".encode()), False))) == [Source("there.png")]
    assert list(read_list(BytesIO(f"{mark}there.png\0".encode()), True)) == [f"{mark}there.png"]
    put(here, f"{mark}there.png")
    assert next(read_list(BytesIO(listed), False)) == f"{mark}there.png", "a file of that very name"


@pytest.mark.parametrize(
    ("data", "null", "message"),
    [
        (PNG, False, "the list of paths is a picture"),
        (b"a\0b\0", False, "the list of paths holds NUL bytes"),
        (b"x" * (2 * LONGEST_NAME), True, "the list of paths has an entry that is no path"),
    ],
)
def test_what_is_no_list(data: bytes, null: bool, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        list(read_list(BytesIO(data), null))
    assert raised.value.message == message
    assert raised.value.hint


def test_a_name_is_given_out_when_it_has_come() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as stream, open(writing, "wb", buffering=0) as pen:
        names = read_list(stream, False)
        pen.write(b"first\nsec")
        assert next(names) == "first"
        timer = threading.Timer(0.05, pen.write, [b"ond\nthird"])
        timer.start()
        assert next(names) == "second"
        timer.join()
        pen.close()
        assert list(names) == ["third"]


def test_a_pipe_that_does_not_block_is_waited_for() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with open(reading, "rb") as stream, open(writing, "wb", buffering=0) as pen:
        timer = threading.Timer(0.1, lambda: (pen.write(b"late\n"), pen.close()))
        timer.start()
        assert list(read_list(stream, False)) == ["late"]
        timer.join()


def test_an_input_that_is_not_there_is_wrong_use(here: Path) -> None:
    put(here, "photos/cat.png")
    os.symlink("nowhere", "dead.png")
    check_inputs(["photos", "photos/cat.png", "-", "dead.png"])
    for name, message, hint in [
        ("photos/cta.png", "photos/cta.png: no such file or folder", "did you mean photos/cat.png?"),
        ("photo/", "photo/: no such file or folder", "did you mean photos?"),
        ("no\nthing/at", "no\nthing/at: no such file or folder", "the folder no\nthing isn't there either"),
    ]:
        with pytest.raises(UsageError) as raised:
            check_inputs(["photos", name])
        assert (raised.value.message, raised.value.hint) == (message, hint)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        *[("JPEG", "jpeg"), ("PNG", "png"), ("GIF", "gif"), ("WEBP", "webp"), ("BMP", "bmp"), ("TIFF", "tiff")],
        *[("AVIF", "avif"), ("JPEG2000", "jpeg 2000"), ("PPM", "pnm"), ("ICO", "icon"), ("QOI", "qoi")],
        *[("DDS", "dds"), ("ICNS", "icns"), ("TGA", None), ("PCX", None)],
    ],
)
def test_sniff_knows_what_pillow_writes(form: str, name: str | None) -> None:
    assert sniff(encoded(photo(32, 32), form)[:64]) == name


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "heic"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", "heic"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "avif"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", None),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "jxl"),
        (b"\xff\x0a\xfa", "jxl"),
        (b"8BPS\0\1", "psd"),
        (b"II+\0\x08\0\0\0", "tiff"),
        (b"%PDF-1.7", None),
        (b"<svg xmlns=", None),
        (b"RIFF\0\0\0\0WAVE", None),
        (b"", None),
    ],
)
def test_sniff_by_the_first_bytes(head: bytes, name: str | None) -> None:
    assert sniff(head) == name
