"""The one reader of archives: `.tar` (plain, gzip, bzip2, xz) and `.zip`, without unpacking.

In: an archive's path, and which names are wanted. Out: its members one after the other, as name and bytes; what
can't be read is a `Failure`, the last one if it is the archive that is damaged. Names are labels: nothing is ever
opened or written by them. Links, devices, folders and hidden members are passed over. It knows no pictures.
Tars are read once, from front to back (`tar`); of a zip, its table first.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO, cast

from clipcli.images.find import HEAD, hidden, no_source, not_a_file
from clipcli.images.read import MAX_BYTES
from clipcli.images.tar import BLOCK, FILES, LINKS, Damaged, Stream, header
from clipcli.records import Failure, FailureKind

MAX_RATIO = 200  # an archive that unpacks to more than this, and to more than MAX_BYTES, is a bomb

# Long marks: a tar begins with a member's name, which may be "PKLot/1.jpg".
_PACKED: dict[bytes, Callable[[BinaryIO], object]] = {
    rb"\x1f\x8b\x08": gzip.open,
    rb"BZh[1-9]1AY&SY": bz2.open,
    rb"\xfd7zXZ\0": lzma.open,
}
_BOMB = f"unpacks to more than {MAX_RATIO} times its size"

_BROKEN = (OSError, EOFError, MemoryError, zlib.error, lzma.LZMAError)  # what decompressors raise on hostile bytes
_BROKEN_ZIP = (*_BROKEN, ValueError, RuntimeError, struct.error, zipfile.BadZipFile)  # and zipfile

Wanted = Callable[[str], bool]
Limit = Callable[[str], int]
Known = Callable[[str, bytes], bool]


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class _Rules:
    wanted: Wanted
    limit: Limit
    known: Known | None
    every: bool

    def takes(self, name: str) -> bool:
        return not name.endswith("/") and (self.every or not hidden(name)) and self.wanted(name)

    def read(self, name: str, size: int, read: Callable[[int], bytes]) -> Member | None:
        """The member, where its first bytes are as they should be."""
        head = read(min(size, HEAD)) if self.known else b""
        if self.known and not self.known(name, head):
            return None
        return Member(name, head + read(size - len(head)))


def inside(path: str, name: str) -> str:
    """What a member is called in rows and messages."""
    return f"{path}::{name}"


def members(
    path: str,
    wanted: Wanted = lambda name: True,
    limit: Limit = lambda name: MAX_BYTES,
    *,
    known: Known | None = None,
    every: bool = False,
) -> Iterator[Member | Failure]:
    """The members of an archive, in its order; `wanted` and `limit` see a name before any bytes are read.

    A member that can't be read, or has more than `limit(name)` bytes, is a Failure. So is the archive itself, after
    what could be read of it, where it ends early or is damaged. Its first bytes tell which kind it is of. `known`
    sees a member's first `HEAD` bytes and says whether the rest is worth reading. With `every`, hidden members are
    members too, and a link, which nobody follows, is a Failure.
    """
    rules = _Rules(wanted, limit, known, every)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # asked before opening: a FIFO would wait for a writer
            yield not_a_file(path, status.st_mode)
            return
        file = open(path, "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        yield no_source(path, error)
        return
    with file:
        try:
            head = file.read(10)
            file.seek(0)
            if not head:  # a download that never began, rather than a tar of nothing
                yield Failure(path, FailureKind.TRUNCATED, "the archive is an empty file")
                return
            if re.match(rb"PK[\3\5\7]", head):
                yield from _zip(path, file, rules)
                return
            opener = next((opener for mark, opener in _PACKED.items() if re.match(mark, head)), None)
            with closing(cast(BinaryIO, opener(file) if opener else file)) as unpacked:
                stream = Stream(unpacked, _most(status.st_size), _BOMB) if opener else Stream(file, status.st_size)
                yield from _tar(path, stream, rules)
        except (Damaged, *_BROKEN) as error:
            yield _failure(path, error, "the archive")


def _failure(path: str, error: Exception, what: str) -> Failure:
    """What was raised while `what` was read, as a row."""
    match error:
        case Damaged():
            return Failure(path, error.kind, f"{what} {error}")
        case MemoryError():
            return Failure(path, FailureKind.TOO_LARGE, f"not enough memory to unpack {what}")
        case EOFError():
            return Failure(path, FailureKind.TRUNCATED, f"{what} ends early")
        case OSError(errno=int(code)) if code != errno.EINVAL:  # that is a seek to where a damaged header points
            return no_source(path, error)
    return Failure(path, FailureKind.CORRUPT, f"{what} is damaged")


def _too_large(path: str, name: str, size: int) -> Failure:
    return Failure(inside(path, name), FailureKind.TOO_LARGE, f"{size} bytes are too many")


def _unsupported(path: str, name: str, what: str) -> Failure:
    return Failure(inside(path, name), FailureKind.UNSUPPORTED, f"{what} in an archive can't be read")


def _most(size: int) -> int:
    """How much an archive of so many bytes may unpack to."""
    return max(MAX_BYTES, MAX_RATIO * size)


def _tar(path: str, stream: Stream, rules: _Rules) -> Iterator[Member | Failure]:
    while found := header(stream):
        name, size, kind = found
        end = stream.left - size - -size % BLOCK
        if kind in LINKS and rules.every and rules.takes(name):
            yield _unsupported(path, name, "a link")
        elif kind in FILES and rules.takes(name):
            if size > rules.limit(name):
                yield _too_large(path, name, size)
            elif kind == b"S":
                yield _unsupported(path, name, "a sparse file")
            elif member := rules.read(name, size, stream.read):
                yield member
        stream.skip(stream.left - end)
    stream.finish()


def _zip(path: str, file: BinaryIO, rules: _Rules) -> Iterator[Member | Failure]:
    if not zipfile.is_zipfile(file):  # its table stands at the end
        raise EOFError
    try:
        archive = zipfile.ZipFile(file)
    except _BROKEN_ZIP as error:
        yield _failure(path, error, "the archive")
        return
    left = _most(os.fstat(file.fileno()).st_size)
    for info in archive.infolist():
        name, kind = _zip_name(info), stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFLNK) or not rules.takes(name):
            continue
        if kind == stat.S_IFLNK:
            if rules.every:
                yield _unsupported(path, name, "a link")
        elif info.file_size > rules.limit(name):
            yield _too_large(path, name, info.file_size)
        elif item := _zip_member(path, name, archive, info, rules):
            left -= info.file_size
            if left < 0:
                raise Damaged(_BOMB, FailureKind.TOO_LARGE)
            yield item


def _zip_member(
    path: str, name: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo, rules: _Rules
) -> Member | Failure | None:
    if info.flag_bits & 1:
        return _unsupported(path, name, "an encrypted file")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile unpacks others without bounds
        return _unsupported(path, name, f"compression by method {info.compress_type}")
    try:
        with archive.open(info) as member:
            return rules.read(name, info.file_size, member.read)  # with a number, it unpacks no more than that
    except _BROKEN_ZIP as error:
        return _failure(inside(path, name), error, "the member")


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The name; in UTF-8 where it is, though the archive doesn't say so."""
    if info.flag_bits & 0x800 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename
