"""The one place where a key is computed.

In: whatever a kept value depends on. Out: 16 bytes that stand for it in the store. Every key hashes a format
version, the kind of value and the length of each text before the text, so that no two inputs can be confused.
Reads and keeps nothing.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

from clipcli.records import Label, Template

VERSION = 1  # raise it when a value means something else than before: old entries are then never found again
KEY_BYTES = 16


@lru_cache(maxsize=64)
def _real(folder: str) -> str:
    """A folder's path without links. That of the last folders is remembered: most pictures have neighbours."""
    return os.path.realpath(folder)


@lru_cache(maxsize=64)
def _begin(kind: str, *fields: str) -> blake2b:
    """The state of a key after its version, kind and `fields`; to be copied, not updated."""
    state = blake2b(digest_size=KEY_BYTES)
    for field in (f"clipcli {VERSION}", kind, *fields):
        encoded = field.encode("utf-8", "surrogatepass")
        state.update(struct.pack("<Q", len(encoded)) + encoded)
    return state


def _end(state: blake2b, last: bytes) -> bytes:
    """The key: the last part needs no length before it."""
    state = state.copy()
    state.update(last)
    return state.digest()


def prompt_key(ids: Sequence[int], text_fingerprint: str, arithmetic: str) -> bytes:
    """The key of one prompt's vector: token ids (each 0 <= id < 2**32), text tower, precision and runtime."""
    return _end(_begin("prompt", text_fingerprint, arithmetic), struct.pack(f"<{len(ids)}I", *ids))


def classifier_key(
    labels: Sequence[Label],
    templates: Sequence[Template],
    text_fingerprint: str,
    vocabulary_digest: str,
    arithmetic: str,
    truncate: bool,
) -> bytes:
    """The key of a label list's class weights; where a label stands, its group and threshold don't matter."""
    words = {
        "labels": [[label.name, label.aliases, label.descriptions] for label in labels],
        "templates": [[template.text, float(template.weight)] for template in templates],
        "truncate": truncate,
    }
    state = _begin("classifier", text_fingerprint, vocabulary_digest, arithmetic)
    return _end(state, json.dumps(words, separators=(",", ":")).encode())


def picture_digest(data: bytes) -> bytes:
    """What a picture is known by, whatever its name: a digest of its bytes."""
    return blake2b(data, digest_size=KEY_BYTES).digest()


def embedding_key(picture: bytes, pixels: str, image_fingerprint: str, arithmetic: str) -> bytes:
    """The key of a picture's embedding, by its digest.

    `pixels`: how it is decoded, by what, and cropped; image tower (with its preprocessing), precision and runtime.
    """
    return _end(_begin("embedding", pixels, image_fingerprint, arithmetic), picture)


def file_key(file: str | Path, part: str) -> bytes:
    """The key of what was computed from `part` of a file, as long as the file stays as it is.

    Raises OSError when there is no such file.
    """
    folder, sep, name = os.fspath(file).rpartition(os.sep)
    now = os.lstat(file)
    if stat.S_ISLNK(now.st_mode) or name in ("", ".."):
        now, path = os.stat(file), os.path.realpath(file)  # which raises nothing where links lead in a circle by now
    else:
        path = f"{_real(folder if folder[:1] == os.sep else os.path.join(os.getcwd(), folder + sep))}{os.sep}{name}"
    return _end(_begin("file", part), os.fsencode(f"{now.st_size} {now.st_mtime_ns} {now.st_ino} {path}"))
