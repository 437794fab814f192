"""From the names a user gives to the pictures they mean: files, folders walked, lists of paths.

In: paths as `str` (os.fsdecode: any bytes). Out: a `Source` for each picture, in a fixed order and as it is met,
or a `Failure` for a name behind which nothing can be read. It decodes nothing and reads of a file no more than
its signature; only regular files are opened, since opening a FIFO would wait for ever.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import stat
import time
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import BinaryIO

from clipcli.errors import UsageError
from clipcli.records import Failure, FailureKind, Source

HEAD = 64  # bytes that `sniff` wants to see
LONGEST_NAME = 1 << 16  # beyond any path of any system: a longer entry means that the stream is no list

# Short marks (BM, P5, an icon's zeros) are held to the fields behind them: a text may begin with "BM", too.
_SIGNATURES = {
    "jpeg": rb"\xff\xd8\xff",
    "png": rb"\x89PNG\r\n\x1a\n",
    "gif": rb"GIF8[79]a",
    "webp": rb"RIFF....WEBP",
    "bmp": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "tiff": rb"II[*+]\0|MM\0[*+]",
    "avif": rb"....ftyp(?:avi[fs]|m(?:if|sf)1(?:....)+?avi[fs])",
    "heic": rb"....ftyp(?:hei[cmsx]|hev[cmsx]|m(?:if|sf)1)",
    "jxl": rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
    "jpeg 2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "pnm": rb"P[1-6f][ \t\r\n]+[0-9#]",
    "icon": rb"\0\0[\x01\x02]\0[^\0]\0...\0",
    "psd": rb"8BPS\0\x01",
    "qoi": rb"qoif",
    "dds": rb"DDS \x7c\0\0\0",
    "icns": rb"icns\0",
}
_SIGNATURE = re.compile(b"|".join(b"(%s)" % mark for mark in _SIGNATURES.values()), re.DOTALL)
_ENDING = re.compile(
    r"\.(apng|avifs?|bmp|cur|dds|dib|gif|hei[cf]|hif|icns|ico|j2[ck]|jfif|jp[2cefgx]|jpeg|jxl|pbm|pcx|pfm|pgm"
    r"|png|pnm|ppm|psd|qoi|sgi|tga|tiff?|webp|x[bp]m)\Z",
    re.IGNORECASE,
)


def sniff(head: bytes) -> str | None:
    """The picture format that a file's first `HEAD` bytes announce; None where they announce none."""
    found = _SIGNATURE.match(head)
    return list(_SIGNATURES)[found.lastindex - 1] if found and found.lastindex else None


def named_like_a_picture(path: str) -> bool:
    """Whether the ending is one that pictures have."""
    return _ENDING.search(path) is not None


def no_source(path: str, error: OSError | ValueError) -> Failure:
    """What the system said when `path` was looked at or opened, as a row."""
    if isinstance(error, ValueError):
        return Failure(path, FailureKind.MISSING, "no file can have this name: it holds a NUL byte")
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        if path.endswith("\r"):
            return Failure(path, FailureKind.MISSING, "no such file; the name ends in a carriage return")
        return Failure(path, FailureKind.MISSING, "a link to nothing" if os.path.islink(path) else "no such file")
    return Failure(path, FailureKind.UNREADABLE, (error.strerror or "can't be read").lower())


def not_a_file(path: str, mode: int) -> Failure:
    """A row for something with a name and no bytes to read, by its `st_mode`."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return Failure(path, FailureKind.UNREADABLE, f"{kinds.get(stat.S_IFMT(mode), 'a device')}, not a file")


@dataclass
class Walk:
    """The pictures that `inputs` mean; iterate once. `passed_over` counts what folders held besides pictures.

    A name among the inputs always yields: a `Source` for a file, whatever it holds, else a `Failure`. A folder
    yields what lies in it, depth first, each folder's entries sorted by the bytes of their names: hidden ones
    are skipped, links to files followed, links to folders only with `follow` (each folder is then entered once).
    A picture is known by its signature, or by its ending when it is broken (or a pipe, say); what may be a folder
    and can't be looked at is a Failure. `include` and `exclude` are globs that see an entry's name and its path
    below the input; `exclude` prunes folders too. With `folders=False` a folder among the inputs is a Failure: a
    list made by `find` names a folder and all its files besides.
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
                if name.endswith("\r") and os.path.lexists(name[:-1]) and not os.path.lexists(name):
                    name = name[:-1]  # a list from Windows
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
        waiting = [("", top)]  # (path below `top`, path), the next one last: no recursion, however deep
        while waiting:
            below, path = waiting.pop()
            try:
                status = os.stat(path) if self.follow or not below else os.lstat(path)
                if not stat.S_ISDIR(status.st_mode):
                    yield from self._file(path, below)
                    continue
                names = sorted(os.listdir(os.fsencode(path)), reverse=True)
            except OSError as error:
                if below and _leads_nowhere(error):
                    yield from self._file(path, below)
                else:  # a folder, or perhaps one: nobody can say what pictures are lost
                    yield no_source(path, error)
                continue
            if (status.st_dev, status.st_ino) in entered:  # reached by a link, perhaps from within itself
                continue
            entered.add((status.st_dev, status.st_ino))
            for name in map(os.fsdecode, names):
                inner = os.path.join(below, name)
                if not name.startswith(".") and not _matches(inner, self.exclude):
                    waiting.append((inner, os.path.join(path, name)))

    def _file(self, path: str, below: str) -> Iterator[Source | Failure]:
        if self.include and not _matches(below, self.include):
            return
        by_name = named_like_a_picture(path)
        try:
            mode = os.stat(path).st_mode
            if stat.S_ISREG(mode) and (by_name or _holds_a_picture(path)):
                yield Source(path)
                return
            failure = None if stat.S_ISDIR(mode) else not_a_file(path, mode)
        except OSError as error:
            failure = no_source(path, error)
        if by_name and failure:
            yield failure
        else:
            self.passed_over += 1


def read_list(stream: BinaryIO, null: bool) -> Iterator[str]:
    """The names in a list, each as soon as it has come; separated by newlines, or by NUL bytes with `null`.

    Names are bytes: nothing is stripped, not even a carriage return, but for the mark with which some editors
    begin a text in UTF-8, unless there is a file of that name; empty ones are skipped. Nothing may have been
    read from `stream` before. Raises UsageError where it is a picture, or no list of this kind.
    """
    for number, name in enumerate(_entries(stream, null)):
        if not (number or null or os.path.lexists(name)):
            name = name.removeprefix(BOM_UTF8)
        if name:
            yield os.fsdecode(name)


def _entries(stream: BinaryIO, null: bool) -> Iterator[bytes]:
    # A raw stream hands over what is there instead of waiting for a full buffer, and takes no lock that a
    # thread left behind in a read would still hold when the interpreter ends.
    read: Callable[[int], bytes | None] = getattr(stream, "raw", stream).read
    rest, start = b"", True
    while (chunk := read(LONGEST_NAME)) != b"":
        if chunk is None:  # somebody set the pipe not to block, and nothing is there
            time.sleep(0.05)
            continue
        if start and sniff(chunk[:HEAD]):
            raise UsageError("the list of paths is a picture", hint="give - as INPUT for a picture's bytes")
        if not null and b"\0" in chunk:
            raise UsageError("the list of paths holds NUL bytes", hint="give -0 if they separate the names")
        start = False
        *names, rest = (rest + chunk).split(b"\0" if null else b"\n")
        yield from names
        if len(rest) > LONGEST_NAME:
            raise UsageError("the list of paths has an entry that is no path", hint="give one path a line")
    yield rest


def check_inputs(inputs: Iterable[str]) -> None:
    """Raise UsageError for the first INPUT of the command line that isn't there (`-` always is)."""
    for name in inputs:
        if name != "-" and not os.path.lexists(name):
            raise UsageError(f"{name}: no such file or folder", hint=_what_is_there(name))


def _what_is_there(name: str) -> str:
    folder, wanted = os.path.split(name.rstrip(os.sep))
    try:
        near = difflib.get_close_matches(wanted, os.listdir(folder or "."), n=1)
    except OSError:
        return f"the folder {folder} isn't there either"
    if near:
        return f"did you mean {os.path.join(folder, near[0])}?"
    return f"the folder {folder or os.getcwd()} holds nothing of that name"


def _leads_nowhere(error: OSError) -> bool:
    """Whether a link is dead, or its entry gone since the folder was read."""
    return isinstance(error, (FileNotFoundError, NotADirectoryError)) or error.errno == errno.ELOOP


def _matches(below: str, globs: Sequence[str]) -> bool:
    name = os.path.basename(below)
    return any(fnmatchcase(name, glob) or fnmatchcase(below, glob) for glob in globs)


def _holds_a_picture(path: str) -> bool:
    with open(path, "rb", buffering=0) as file:
        return sniff(file.read(HEAD)) is not None
