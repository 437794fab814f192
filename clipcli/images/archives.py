"""The one reader of archives: `.tar` (plain, gzip, bzip2, xz) and `.zip`, without unpacking.

In: an archive's path, and which names are wanted. Out: its members one after the other, as name and bytes; what
can't be read is a `Failure`, the last one if it is the archive that is damaged. Names are labels: nothing is ever
opened or written by them. Links, devices, folders and hidden members are passed over. It knows no pictures.

Tars are read once, from front to back, by a parser of our own. The standard library's takes a damaged or cut header
for the end of the archive and says nothing, believes one that says that a name has four gigabytes, keeps all
members that it has met, and needs three times as long for each.
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

from clipcli.images.decode import MAX_BYTES
from clipcli.images.find import no_source, not_a_file
from clipcli.records import Failure, FailureKind

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
BLOCK = 512
CHUNK = 1 << 20  # bytes read at once of what says that it is larger
MAX_HEADER = 1 << 20  # of a long name, or a block of attributes
MAX_RATIO = 200  # an archive that unpacks to more than this, and to more than MAX_BYTES, is a bomb

# Long marks: a tar begins with a member's name, which may be "PKLot/1.jpg".
_PACKED: dict[bytes, Callable[[BinaryIO], object]] = {
    rb"\x1f\x8b\x08": gzip.open,
    rb"BZh[1-9]1AY&SY": bz2.open,
    rb"\xfd7zXZ\0": lzma.open,
}
_FILES = (b"0", b"\0", b"7", b"S")  # "S" has holes
_ATTRIBUTE = re.compile(rb"(\d{1,9}) ([^=\n]+)=")  # "30 mtime=1350244992.023960108\n", counting itself
_BOMB = f"unpacks to more than {MAX_RATIO} times its size"

_BROKEN = (OSError, EOFError, MemoryError, zlib.error, lzma.LZMAError)  # what decompressors raise on hostile bytes
_BROKEN_ZIP = (*_BROKEN, ValueError, RuntimeError, struct.error, zipfile.BadZipFile)  # and zipfile

Wanted = Callable[[str], bool]
Limit = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive."""

    name: str
    data: bytes


class _Damaged(Exception):
    """Why an archive can't be read on."""

    def __init__(self, message: str, kind: FailureKind = FailureKind.CORRUPT) -> None:
        super().__init__(message)
        self.kind = kind


def is_archive(path: str) -> bool:
    """Whether the name ends as those of archives do."""
    return path.lower().endswith(ENDINGS)


def inside(path: str, name: str) -> str:
    """What a member is called in rows and messages."""
    return f"{path}::{name}"


def members(
    path: str, wanted: Wanted = lambda name: True, limit: Limit = lambda name: MAX_BYTES
) -> Iterator[Member | Failure]:
    """The members of an archive, in its order; `wanted` and `limit` see a name before any bytes are read.

    A member that can't be read, or has more than `limit(name)` bytes, is a Failure. So is the archive itself, after
    what could be read of it, where it ends early or is damaged. Its first bytes tell which kind it is of.
    """
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
            if re.match(rb"PK[\3\5\7]", head):
                yield from _zip(path, file, wanted, limit)
                return
            opener = next((opener for mark, opener in _PACKED.items() if re.match(mark, head)), None)
            with closing(cast(BinaryIO, opener(file) if opener else file)) as unpacked:
                yield from _tar(path, _Stream(unpacked, status.st_size, opener is not None), wanted, limit)
        except (_Damaged, *_BROKEN) as error:
            yield _failure(path, error, "the archive")


def _failure(path: str, error: Exception, what: str) -> Failure:
    """What was raised while `what` was read, as a row."""
    match error:
        case _Damaged():
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


def _passed_over(name: str) -> bool:
    """Whether a member is a folder, or hidden."""
    if not name.startswith((".", "_")) and "/." not in name and "/_" not in name:
        return name.endswith("/")
    parts = name.split("/")
    return not parts[-1] or any(part == "__MACOSX" or (part[:1] == "." and part.strip(".")) for part in parts)


# Tars


class _Stream:
    """What is read once and forwards: a file as it lies on the disk, or what a compressed one holds."""

    def __init__(self, file: BinaryIO, size: int, packed: bool) -> None:
        self._file, self._packed = file, packed
        self._left = max(MAX_BYTES, MAX_RATIO * size) if packed else size

    def block(self) -> bytes:
        """The next block; nothing at the end."""
        data = self._file.read(BLOCK)
        if 0 < len(data) < BLOCK:
            raise EOFError
        self._count(len(data))
        return data

    def read(self, size: int) -> bytes:
        """So many bytes. Raises EOFError where there are fewer."""
        if self._packed and size > CHUNK:  # piece by piece: a header may say what it likes
            return b"".join(self.read(min(CHUNK, size - start)) for start in range(0, size, CHUNK))
        self._count(size)
        data = self._file.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def skip(self, size: int) -> None:
        """Go on behind so many bytes."""
        if self._packed:
            for start in range(0, size, CHUNK):
                self.read(min(CHUNK, size - start))
        else:
            self._count(size)
            self._file.seek(size, os.SEEK_CUR)

    def finish(self) -> None:
        """Read on to the end of compressed data: its checksum covers all that was handed out."""
        while self._packed and (data := self._file.read(CHUNK)):
            self._count(len(data))

    def _count(self, size: int) -> None:
        self._left -= size
        if self._left < 0 and self._packed:
            raise _Damaged(_BOMB, FailureKind.TOO_LARGE)
        if self._left < 0:
            raise EOFError


def _tar(path: str, stream: _Stream, wanted: Wanted, limit: Limit) -> Iterator[Member | Failure]:
    while header := _header(stream):
        name, size, kind = header
        if kind not in _FILES or _passed_over(name) or not wanted(name):
            stream.skip(size)
        elif size > limit(name):
            stream.skip(size)
            yield _too_large(path, name, size)
        elif kind == b"S":
            stream.skip(size)
            yield _unsupported(path, name, "a sparse file")
        else:
            yield Member(name, stream.read(size))
        stream.skip(-size % BLOCK)
    stream.finish()


def _header(stream: _Stream) -> tuple[str, int, bytes] | None:
    """The next member's name, the bytes that follow, and its kind."""
    long = b""
    attributes: dict[bytes, bytes] = {}
    while (block := stream.block()) and block.count(0) < BLOCK:
        if _number(block[148:156]) != sum(block[:148]) + 256 + sum(block[156:]):  # the sum's own place counts as blanks
            raise _Damaged("is damaged, or of another kind")
        kind, size = block[156:157], _number(block[124:136])
        if kind in b"LKxXg":  # a header of headers
            if size > MAX_HEADER:
                raise _Damaged(f"has a name or attributes of {size} bytes")
            data = stream.read(size + -size % BLOCK)[:size]
            if kind == b"L":
                long = data.partition(b"\0")[0]
            elif kind in b"xX":
                attributes = _attributes(data)
            continue
        name = block[:100].partition(b"\0")[0]
        if block[257:263] == b"ustar\0" and block[345]:
            name = block[345:500].partition(b"\0")[0] + b"/" + name
        name = attributes.get(b"path") or long or name
        more = kind == b"S" and block[482]
        while more:  # blocks that say where the holes are
            more = stream.read(BLOCK)[504]
        if b"size" in attributes:
            size = _number(attributes[b"size"], 10)
        if any(key.startswith(b"GNU.sparse.") for key in attributes):
            kind = b"S"
        if kind in b"123456" or (kind == b"\0" and name.endswith(b"/")):  # links, devices, folders: nothing follows
            size = 0
        return os.fsdecode(name), size, kind
    return None


def _number(field: bytes, base: int = 8) -> int:
    """A header's number: digits, or from 0x80 on the bytes themselves."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:])
    digits = field.strip(b" \0") or b"0"
    try:
        if digits.isdigit() and len(digits) < 20:
            return int(digits, base)
    except ValueError:  # an 8 or a 9 where there is none
        pass
    raise _Damaged("is damaged, or of another kind")


def _attributes(data: bytes) -> dict[bytes, bytes]:
    """`LENGTH KEY=VALUE\\n`, again and again; a length counts its own digits too."""
    found: dict[bytes, bytes] = {}
    start = 0
    while start < len(data):
        key = _ATTRIBUTE.match(data, start)
        end = start + int(key[1]) if key else 0
        if not key or end <= key.end() or data[end - 1 : end] != b"\n":
            raise _Damaged("is damaged")
        found[key[2]] = data[key.end() : end - 1]
        start = end
    return found


# Zips


def _zip(path: str, file: BinaryIO, wanted: Wanted, limit: Limit) -> Iterator[Member | Failure]:
    if not zipfile.is_zipfile(file):  # its table stands at the end
        raise EOFError
    try:
        archive = zipfile.ZipFile(file)
    except _BROKEN_ZIP as error:
        yield _failure(path, error, "the archive")
        return
    left = max(MAX_BYTES, MAX_RATIO * os.fstat(file.fileno()).st_size)
    for info in archive.infolist():
        name = _zip_name(info)
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG) or _passed_over(name) or not wanted(name):
            continue
        if info.file_size > limit(name):
            yield _too_large(path, name, info.file_size)
            continue
        left -= info.file_size
        if left < 0:
            raise _Damaged(_BOMB, FailureKind.TOO_LARGE)
        yield _zip_member(path, name, archive, info)


def _zip_member(path: str, name: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member | Failure:
    if info.flag_bits & 1:
        return _unsupported(path, name, "an encrypted file")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile unpacks others without bounds
        return _unsupported(path, name, f"compression by method {info.compress_type}")
    try:
        with archive.open(info) as member:
            return Member(name, member.read(info.file_size))  # with a number, it unpacks no more than that
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
