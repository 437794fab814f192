"""The bytes of a picture's file, within limits.

In: a `Source`. Out: all of its bytes, or a `Failure`. Nothing here knows what they mean, and nothing of Pillow is
imported: a picture that is known by its bytes needs no more than this.
"""

from __future__ import annotations

import stat
from pathlib import Path

from clipcli.images.budget import BIG, MAX_MEMORY, Take, unlimited
from clipcli.images.find import no_source, not_a_file
from clipcli.records import Failure, FailureKind, Source

MAX_BYTES = 1 << 30


def read_bytes(source: Source, take: Take = unlimited) -> bytes | Failure:
    """All bytes of the picture's file. Read at once: a file that changes or vanishes later does no harm."""
    if source.data is not None:
        return source.data
    try:
        status = Path(source.path).stat()
        if not stat.S_ISREG(status.st_mode):  # asked before opening: a FIFO would wait for a writer
            return not_a_file(source.path, status.st_mode)
        if status.st_size > MAX_BYTES:
            return Failure(source.path, FailureKind.TOO_LARGE, f"the file has more than {MAX_BYTES >> 30} GiB")
        if status.st_size >= BIG:
            take(MAX_MEMORY)  # its pixels are not known yet
        with Path(source.path).open("rb") as file:
            return file.read(max(status.st_size, 1 << 16))  # a bound, in case it grows without end
    except (OSError, ValueError) as error:
        return no_source(source.path, error)
