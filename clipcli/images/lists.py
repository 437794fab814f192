"""Lists of paths, as `find` and `ls` write them into a file or a pipe.

In: a stream of bytes, which may still be growing. Out: names, each as soon as it has come. What they mean is for
`find` to say.
"""

from __future__ import annotations

import os
import time
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from typing import BinaryIO

from clipcli.errors import UsageError
from clipcli.images.find import HEAD, sniff

LONGEST_NAME = 1 << 16  # beyond any path of any system: a longer entry means that the stream is no list


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
