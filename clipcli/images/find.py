"""From the names a user gives to the pictures they mean: files, folders walked, lists of paths.

In: paths as `str` (os.fsdecode: any bytes). Out: a `Source` for each picture, in a fixed order and as it is met,
or a `Failure` for a name behind which nothing can be read. It decodes nothing and reads no more of a file than
its signature; only regular files are opened, since opening a FIFO would wait for ever.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from clipcli.errors import UsageError
from clipcli.records import Failure, FailureKind, Source

HEAD = 64  # bytes that `sniff` wants to see
LONGEST_NAME = 1 << 16  # beyond any path of any system: a longer entry means that the stream is no list

# Short marks (BM, P5, an icon's zeros) are held to the fields behind them: a text that begins with "BM" is none.
_SIGNATURES = [
    (name, re.compile(pattern, re.DOTALL))
    for name, pattern in (
        ("jpeg", rb"\xff\xd8\xff"),
        ("png", rb"\x89PNG\r\n\x1a\n"),
        ("gif", rb"GIF8[79]a"),
        ("webp", rb"RIFF....WEBP"),
        ("bmp", rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"),
        ("tiff", rb"II[*+]\0|MM\0[*+]"),
        ("avif", rb"....ftyp(?:avi[fs]|m(?:if|sf)1(?:....)+?avi[fs])"),
        ("heic", rb"....ftyp(?:hei[cmsx]|hev[cmsx]|m(?:if|sf)1)"),
        ("jxl", rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
        ("jpeg 2000", rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
        ("pnm", rb"P[1-6f][ \t\r\n]+[0-9#]"),
        ("icon", rb"\0\0[\1\2]\0[^\0]\0...\0"),
        ("psd", rb"8BPS\0\1"),
        ("qoi", rb"qoif"),
        ("dds", rb"DDS \x7c\0\0\0"),
        ("icns", rb"icns\0"),
        ("xpm", rb"/\* XPM \*/"),
    )
]
_ENDINGS = frozenset(
    ".apng .avif .avifs .bmp .cur .dds .dib .gif .heic .heif .hif .icns .ico .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg"
    " .jpf .jpg .jpx .jxl .pbm .pcx .pfm .pgm .png .pnm .ppm .psd .qoi .sgi .tga .tif .tiff .webp .xbm .xpm".split()
)


def sniff(head: bytes) -> str | None:
    """The picture format that a file's first `HEAD` bytes announce; None where they announce none."""
    return next((name for name, signature in _SIGNATURES if signature.match(head)), None)


def named_like_a_picture(path: str) -> bool:
    """Whether the ending is one that pictures have."""
    return os.path.splitext(path)[1].lower() in _ENDINGS


def no_source(path: str, error: OSError | ValueError) -> Failure:
    """What the system said when `path` was looked at or opened, as a row."""
    if isinstance(error, ValueError):
        return Failure(path, FailureKind.MISSING, "no file can have this name: it holds a NUL byte")
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        if path.endswith("\r"):
            return Failure(path, FailureKind.MISSING, "no such file; the name ends in a carriage return")
        broken = os.path.islink(path)
        return Failure(path, FailureKind.MISSING, "a link to nothing" if broken else "no such file")
    return Failure(path, FailureKind.UNREADABLE, (error.strerror or "can't be read").lower())


def not_a_file(path: str, mode: int) -> Failure:
    """A row for something with a name and no bytes to read, by its `st_mode`."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return Failure(path, FailureKind.UNREADABLE, f"{kinds.get(stat.S_IFMT(mode), 'a device')}, not a file")


@dataclass
class Walk:
    """The pictures that `inputs` mean; iterate once. `passed_over` counts what folders held besides pictures.

    A name among the inputs always yields: a `Source` for a file, whatever it holds, else a `Failure`. A folder
    yields what lies in it, depth first, each folder's entries sorted by the bytes of their names; there, hidden
    entries are skipped, links to files followed, links to folders only with `follow`, and then each folder is
    entered once. A picture is known by its signature, or by its ending when it is broken.
    `include` and `exclude` are globs that see an entry's name and its path below the input; `exclude` prunes
    folders too. With `folders=False` a folder among the inputs is a Failure: a list made by `find` names folder
    and files alike, and every picture would come twice.
    """

    inputs: Iterable[str]
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    follow: bool = False
    folders: bool = True
    passed_over: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[Source | Failure]:
        for name in self.inputs:
            try:
                mode = os.stat(name).st_mode
            except (OSError, ValueError) as error:
                yield no_source(name, error)
                continue
            if stat.S_ISDIR(mode) and self.folders:
                yield from self._folder(name)
            else:
                yield Source(name) if stat.S_ISREG(mode) else not_a_file(name, mode)

    def _folder(self, top: str) -> Iterator[Source | Failure]:
        entered: set[tuple[int, int]] = set()
        waiting = [(top, "")]  # (path, path below `top`), the next one last: no recursion, however deep
        while waiting:
            path, below = waiting.pop()
            if below and not self._is_folder(path):
                yield from self._file(path, below)
                continue
            try:
                names = sorted(os.listdir(os.fsencode(path)), reverse=True)
                status = os.stat(path)
            except OSError as error:
                yield no_source(path, error)
                continue
            if (status.st_dev, status.st_ino) in entered:  # reached by a link, maybe from within itself
                continue
            entered.add((status.st_dev, status.st_ino))
            for name in map(os.fsdecode, names):
                inner = os.path.join(below, name)
                if not name.startswith(".") and not _matches(name, inner, self.exclude):
                    waiting.append((os.path.join(path, name), inner))

    def _is_folder(self, path: str) -> bool:
        return os.path.isdir(path) and (self.follow or not os.path.islink(path))

    def _file(self, path: str, below: str) -> Iterator[Source | Failure]:
        if self.include and not _matches(os.path.basename(path), below, self.include):
            return
        by_name = named_like_a_picture(path)
        try:
            regular = stat.S_ISREG(os.stat(path).st_mode)
            if regular and (by_name or _holds_a_picture(path)):
                yield Source(path)
                return
        except OSError as error:
            if by_name:
                yield no_source(path, error)
                return
        self.passed_over += 1


def walk(
    inputs: Iterable[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    follow: bool = False,
    folders: bool = True,
) -> Walk:
    """The pictures behind `inputs`, one by one; see `Walk`. Never raises for what lies on the disk."""
    return Walk(inputs, include, exclude, follow, folders)


def read_list(stream: BinaryIO, null: bool) -> Iterator[str]:
    """The names in a list, each as soon as it has arrived; separated by newlines, or by NUL bytes with `null`.

    Names are bytes: nothing is stripped, not even a carriage return. Empty entries are skipped. Nothing may have
    been read from `stream` before. Raises UsageError where the stream is a picture or separated otherwise.
    """
    # The raw stream hands over what is there instead of waiting for a full buffer, and takes no lock that a
    # thread left behind in a read would hold while the interpreter ends.
    read = getattr(stream, "raw", stream).read
    separator = b"\0" if null else b"\n"
    rest, first = b"", True
    while chunk := _read_some(read):
        if first and sniff(chunk[:HEAD]):
            raise UsageError("the list of paths is a picture", hint="give - as INPUT for one picture's bytes")
        first = False
        *names, rest = (rest + chunk).split(separator)
        if not null and b"\0" in chunk:
            raise UsageError("the list of paths holds NUL bytes", hint="give -0 if they separate the names")
        if len(rest) > LONGEST_NAME:
            raise UsageError(
                "the list of paths has an entry that no path can be", hint="one path a line, or -0"
            )
        yield from (os.fsdecode(name) for name in names if name)
    if rest:
        yield os.fsdecode(rest)


def check_inputs(inputs: Iterable[str]) -> None:
    """Raise UsageError for the first INPUT of the command line that isn't there (`-` is)."""
    for name in inputs:
        if name == "-" or os.path.lexists(name):
            continue
        folder, wanted = os.path.split(name.rstrip(os.sep))
        try:
            there = os.listdir(folder or ".")
        except OSError:
            there = []
        near = difflib.get_close_matches(wanted, there, n=1)
        hint = f"did you mean {_shown(os.path.join(folder, near[0]))}?" if near else None
        raise UsageError(f"{_shown(name)}: no such file or folder", hint=hint)


def _matches(name: str, below: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) or fnmatchcase(below, glob) for glob in globs)


def _holds_a_picture(path: str) -> bool:
    with Path(path).open("rb", buffering=0) as file:
        return sniff(file.read(HEAD)) is not None


def _read_some(read: object) -> bytes:
    """At least one byte, unless the stream has ended; also from a stream that was set not to block."""
    assert callable(read)
    while (chunk := read(LONGEST_NAME)) is None:
        time.sleep(0.05)
    assert isinstance(chunk, bytes)
    return chunk


def _shown(name: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in name)
