"""Tars by themselves: blocks read once, from front to back, and the headers among them.

In: a file of bytes that only goes forwards, and how many there may be. Out: one header after the other; between two of
them the caller reads or skips what belongs to the first. It knows neither pictures nor failures' rows, and unpacks
nothing.

The standard library's parser takes a damaged or cut header for the end of the archive and says nothing, believes one
that says that a name has four gigabytes, keeps all members that it has met, and needs three times as long for each.
"""

from __future__ import annotations

import os
import re
from typing import BinaryIO

from clipcli.records import FailureKind

BLOCK = 512
CHUNK = 1 << 20  # bytes read at once of what says that it is larger
MAX_HEADER = 1 << 20  # of a long name, or a block of attributes
FILES = (b"0", b"\0", b"7", b"S")  # kinds of members with bytes; "S" has holes
LINKS = (b"1", b"2")

_ATTRIBUTE = re.compile(rb"(\d{1,9}) ([^=\n]+)=")  # "30 mtime=1350244992.023960108\n", counting itself


class Damaged(Exception):
    """Why an archive can't be read on."""

    def __init__(self, message: str, kind: FailureKind = FailureKind.CORRUPT) -> None:
        super().__init__(message)
        self.kind = kind


class Stream:
    """What is read once and forwards: a file as it lies on the disk, or what a compressed one holds.

    `left` bytes may still be read.
    """

    def __init__(self, file: BinaryIO, most: int, bomb: str = "") -> None:
        """`most` bytes are read of it, no more; `bomb` is what to say of compressed data that have more."""
        self._file, self.left, self._bomb = file, most, bomb

    def block(self) -> bytes:
        """The next block; nothing at the end."""
        data = self._file.read(BLOCK)
        if 0 < len(data) < BLOCK:
            raise EOFError
        self._count(len(data))
        return data

    def read(self, size: int) -> bytes:
        """So many bytes. Raises EOFError where there are fewer."""
        if self._bomb and size > CHUNK:  # piece by piece: a header may say what it likes
            return b"".join(self.read(min(CHUNK, size - start)) for start in range(0, size, CHUNK))
        self._count(size)
        data = self._file.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def skip(self, size: int) -> None:
        """Go on behind so many bytes."""
        if self._bomb:
            for start in range(0, size, CHUNK):
                self.read(min(CHUNK, size - start))
        else:
            self._count(size)
            self._file.seek(size, os.SEEK_CUR)

    def finish(self) -> None:
        """Read on to the end of compressed data: its checksum covers all that was handed out."""
        while self._bomb and (data := self._file.read(CHUNK)):
            self._count(len(data))

    def _count(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise Damaged(self._bomb, FailureKind.TOO_LARGE) if self._bomb else EOFError


def header(stream: Stream) -> tuple[str, int, bytes] | None:
    """The next member's name, how many bytes of it follow (in whole blocks), and its kind; None at the end."""
    long = b""
    attributes: dict[bytes, bytes] = {}
    while (block := stream.block()) and block.count(0) < BLOCK:
        if _number(block[148:156]) != sum(block[:148]) + 256 + sum(block[156:]):  # the sum's own place counts as blanks
            raise Damaged("is damaged, or of another kind")
        kind, size = block[156:157], _number(block[124:136])
        if kind in b"LKxXg":  # a header of headers
            if size > MAX_HEADER:
                raise Damaged(f"has a name or attributes of {size} bytes")
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
    raise Damaged("is damaged, or of another kind")


def _attributes(data: bytes) -> dict[bytes, bytes]:
    """`LENGTH KEY=VALUE\\n`, again and again; a length counts its own digits too."""
    found: dict[bytes, bytes] = {}
    start = 0
    while start < len(data):
        key = _ATTRIBUTE.match(data, start)
        end = start + int(key[1]) if key else 0
        if not key or end <= key.end() or data[end - 1 : end] != b"\n":
            raise Damaged("is damaged")
        found[key[2]] = data[key.end() : end - 1]
        start = end
    return found
