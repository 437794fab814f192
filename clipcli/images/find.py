"""From the names a user gives to the pictures they mean: files, folders walked, archives.

In: paths as `str` (os.fsdecode: any bytes). Out: a `Source` for each picture, in a fixed order and as it is met,
or a `Failure` for a name behind which nothing can be read. It decodes nothing and reads of a file no more than
its signature; only regular files are opened, since opening a FIFO would wait for ever. What lies in an archive is
read by `packed`.
"""

from __future__ import annotations

import difflib
import errno
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from clipcli.errors import UsageError
from clipcli.records import Failure, FailureKind, Source

if TYPE_CHECKING:
    from clipcli.images.packed import Lookup

HEAD = 64  # bytes that `sniff` wants to see

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
_log = logging.getLogger("clipcli")
_SIGNATURE = re.compile(b"|".join(b"(%s)" % mark for mark in _SIGNATURES.values()), re.DOTALL)
_ENDING = re.compile(
    r"\.(apng|avifs?|bmp|cur|dds|dib|gif|hei[cf]|hif|icns|ico|j2[ck]|jfif|jp[2cefgx]|jpeg|jxl|pbm|pcx|pfm|pgm"
    r"|png|pnm|ppm|psd|qoi|sgi|tga|tiff?|webp|x[bp]m)\Z",
    re.IGNORECASE,
)
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")


def sniff(head: bytes) -> str | None:
    """The picture format that a file's first `HEAD` bytes announce; None where they announce none."""
    found = _SIGNATURE.match(head)
    return list(_SIGNATURES)[found.lastindex - 1] if found and found.lastindex else None


def named_like_a_picture(path: str) -> bool:
    """Whether the ending is one that pictures have."""
    return _ENDING.match(path, path.rfind(".")) is not None


def is_archive(path: str) -> bool:
    """Whether the name ends as those of archives do."""
    return path.lower().endswith(_ARCHIVES)


def parted(name: str) -> tuple[str, str] | None:
    """The archive and the member that `name` means; None if there is no such archive."""
    start = name.find("::")
    while start >= 0:
        path = name[:start]
        if is_archive(path) and os.path.isfile(path):
            return path, name[start + 2 :]
        start = name.find("::", start + 1)
    return None


def hidden(member: str) -> bool:
    """Whether a member of an archive, or a folder that it lies in, is hidden."""
    if not member.startswith((".", "_")) and "/." not in member and "/_" not in member:
        return False
    return any(part == "__MACOSX" or (part[:1] == "." and part.strip(".")) for part in member.split("/"))


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
    """The pictures that `inputs` mean; iterate once. `passed_over` counts what was met besides pictures.

    A name among the inputs always yields: a `Source` for a file, whatever it holds, else a `Failure`. A folder
    yields what lies in it, depth first, each folder's entries sorted by the bytes of their names: hidden ones
    are skipped, links to files followed, links to folders only with `follow` (each folder is then entered once).
    A picture is known by its signature, or by its ending when it is broken (or a pipe, say); what may be a folder
    and can't be looked at is a Failure. An archive among the inputs (by its ending) yields the pictures in it, in its
    order, as `archive.tar::member`; such a name among the inputs is that member. An archive in a folder is passed
    over, with a notice. `include` and `exclude` are globs that see an entry's name and its path below the folder or
    archive; `exclude` prunes folders too. With `folders=False` a folder among the inputs is a Failure: a list made by
    `find` names a folder and all its files besides.
    """

    inputs: Iterable[str]
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    follow: bool = False
    folders: bool = True
    passed_over: int = field(default=0, init=False)
    _lookup: Lookup | None = field(default=None, init=False, repr=False)

    def __iter__(self) -> Iterator[Source | Failure]:
        for name in self.inputs:
            try:
                if name.endswith("\r") and os.path.lexists(name[:-1]) and not os.path.lexists(name):
                    name = name[:-1]  # a list from Windows
                mode = os.stat(name).st_mode
            except (OSError, ValueError) as error:
                yield self._member(name) or no_source(name, error)
                continue
            if stat.S_ISDIR(mode) and self.folders:
                yield from self._folder(name)
            elif stat.S_ISREG(mode) and is_archive(name):
                from clipcli.images.packed import pictures

                yield from pictures(name, self._wants, self._pass_over)
            else:
                yield Source(name) if stat.S_ISREG(mode) else not_a_file(name, mode)

    def _member(self, name: str) -> Source | Failure | None:
        """What a name means that is no file's: a member of an archive, perhaps."""
        if not (found := parted(name)):
            return None
        if self._lookup is None or self._lookup.path != found[0]:
            from clipcli.images.packed import Lookup

            self._lookup = Lookup(found[0])
        return self._lookup.find(found[1])

    def _wants(self, member: str) -> bool:
        below = member.removeprefix("./")
        pruned = (*self.exclude, *(f"{glob}/*" for glob in self.exclude))  # a folder above it, by its path
        return not (
            hidden(member)
            or any(_matches(part, self.exclude) for part in below.split("/"))
            or _matches(below, pruned)
            or (self.include and not _matches(below, self.include))
        )

    def _pass_over(self) -> None:
        self.passed_over += 1

    def _folder(self, top: str) -> Iterator[Source | Failure]:
        entered: set[tuple[int, int]] = set()
        archives = 0
        # (path below `top`, path, whether its folder calls it a file), the next one last: no recursion, however deep
        waiting = [("", top, False)]
        while waiting:
            below, path, is_file = waiting.pop()
            found: Source | Failure | None = None
            try:
                if is_file:
                    mode = stat.S_IFREG
                else:
                    status = os.stat(path) if self.follow or not below else os.lstat(path)
                    mode = status.st_mode
                if not stat.S_ISDIR(mode):
                    found = self._file(path, below, mode)
                    archives += found is None and is_archive(path)
                elif (status.st_dev, status.st_ino) not in entered:  # else by a link, perhaps from within itself
                    with os.scandir(os.fsencode(path)) as entries:
                        names = sorted(((entry.name, _is_file(entry)) for entry in entries), reverse=True)
                    entered.add((status.st_dev, status.st_ino))
                    over, base = os.path.join(below, ""), os.path.join(path, "")
                    for encoded, plain in names:
                        inner = over + (name := os.fsdecode(encoded))
                        if not name.startswith(".") and not _matches(inner, self.exclude):
                            waiting.append((inner, base + name, plain))
            except OSError as error:
                # Else it is a folder, or perhaps one: nobody can say what pictures are lost.
                found = self._file(path, below) if below and _leads_nowhere(error) else no_source(path, error)
            if found is not None:
                yield found
        if archives:
            what = f"{archives:,} archive{'' if archives == 1 else 's'}"
            _log.warning("%s: %s in it passed over; to look inside, name them as INPUT", top, what)

    def _file(self, path: str, below: str, known: int = stat.S_IFLNK) -> Source | Failure | None:
        """What becomes of an entry that is no folder; its mode is `known` unless it is a link."""
        if self.include and not _matches(below, self.include):
            return None
        by_name = named_like_a_picture(path)
        try:
            mode = os.stat(path).st_mode if stat.S_ISLNK(known) else known
            if stat.S_ISREG(mode) and (by_name or _holds_a_picture(path)):
                return Source(path)
            failure = None if stat.S_ISDIR(mode) else not_a_file(path, mode)
        except OSError as error:
            failure = no_source(path, error)
        if by_name and failure:
            return failure
        self._pass_over()
        return None


def check_inputs(inputs: Iterable[str]) -> None:
    """Raise UsageError for the first INPUT of the command line that isn't there (`-` always is).

    Of `archive.tar::member`, the archive has to be there.
    """
    for name in inputs:
        if name != "-" and not os.path.lexists(name) and not parted(name):
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


def _is_file(entry: os.DirEntry[bytes]) -> bool:
    """Whether a folder says so by itself; what it says nothing about, and links, are looked at in their turn."""
    try:
        return entry.is_file(follow_symlinks=False)
    except OSError:
        return False


def _matches(below: str, globs: Sequence[str]) -> bool:
    if not globs:
        return False
    name = os.path.basename(below)
    return any(fnmatchcase(name, glob) or fnmatchcase(below, glob) for glob in globs)


def _holds_a_picture(path: str) -> bool:
    with open(path, "rb", buffering=0) as file:
        return sniff(file.read(HEAD)) is not None
