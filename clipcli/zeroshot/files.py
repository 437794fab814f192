"""Files that people write by hand, as text or JSON, and the places in them that messages name.

Comes in: a path, perhaps `FILE.json#KEY`. Goes out: text, or parsed JSON. It doesn't know what labels are.
(`field` and `as_json` are for JSON that programs write.)
Raises LabelError for everything that keeps a file from being read; what leaves the rest of it readable goes to
`on_error`, which raises it too unless the caller has another use for it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from clipcli.errors import LabelError, reason

_FOREIGN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # controls, lone halves of characters
_NO_UTF8 = re.compile("[\ud800-\udfff]")  # what "surrogateescape" makes of bytes; and they of names, in JSON
_UTF16 = (b"\xff\xfe", b"\xfe\xff")

OnError = Callable[[LabelError], None]


def refuse(error: LabelError) -> None:
    """What those do with an error who want all or nothing."""
    raise error


def read_text(path: Path, on_error: OnError = refuse) -> str:
    """The text of `path` (UTF-8, a byte order mark is dropped), its lines ended by `\\n`.

    A line that is no UTF-8 is an error, and otherwise empty.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        hint = near_file(path) if isinstance(error, FileNotFoundError | IsADirectoryError) else None
        raise LabelError(f"{path}: {reason(error)}", hint=hint) from error
    return decode(data, path, on_error)


def decode(data: bytes, path: Path, on_error: OnError = refuse) -> str:
    """The text that `data` are, of the file `path`, by the rules of `read_text`."""
    if data.startswith(_UTF16):
        hint = 'save it as UTF-8 (Excel: "CSV UTF-8"; Notepad: encoding "UTF-8")'
        raise LabelError(f"{path}: the text is UTF-16, not UTF-8", hint=hint)
    lines = re.sub("\r\n?", "\n", data.decode("utf-8-sig", "surrogateescape")).split("\n")
    for i, line in enumerate(lines):
        if _NO_UTF8.search(line):
            on_error(LabelError(f"{path}:{i + 1}: not UTF-8", hint="save the file as UTF-8"))
            lines[i] = ""
    return "\n".join(lines)


def exists(path: Path) -> bool:
    """Whether something lies there, or may: reading tells why not. A name that no file can have is no error."""
    try:
        path.stat()
    except PermissionError:
        return True
    except (OSError, ValueError):  # nothing there, too long, a NUL in it
        return False
    return True


def near_file(path: Path) -> str:
    """A hint for a path without a file: the nearest name in its folder."""
    try:
        found = difflib.get_close_matches(path.name, os.listdir(path.parent), 1)
    except OSError:
        found = []
    return f"did you mean {path.with_name(found[0])}?" if found and found[0] != path.name else "check the path"


def split_key(spec: str) -> tuple[Path, str | None]:
    """`FILE.json#KEY` in two parts; no key (None) if a file has the whole name."""
    file, hash_, key = spec.rpartition(".json#")
    if not hash_ or exists(Path(spec)):
        return Path(spec), None
    return Path(f"{file}.json"), key


def read_json(spec: str, on_error: OnError = refuse) -> Any:
    """The JSON of `FILE.json`, or what its object has under `#KEY`.

    A key that stands twice is an error; the second is then no text but a pair, so that entries keep their numbers.
    """
    path, key = split_key(spec)

    def unique(pairs: list[tuple[str, Any]]) -> dict[Any, Any]:
        first: dict[str, int] = {}
        found: dict[Any, Any] = {}
        for number, (name, value) in enumerate(pairs, 1):
            if first.setdefault(name, number) != number:
                what = f'"{name}" stands twice (first in entry {first[name]})'
                on_error(LabelError(f"{path}: entry {number}: {what}", hint="give one of them another name"))
            found[name if first[name] == number else (name, number)] = value
        return found

    try:
        data = json.loads(read_text(path), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        what = f"bad JSON: {error.msg[:1].lower()}{error.msg[1:]}"
        raise LabelError(f"{path}:{error.lineno}: {what}", hint=f"see column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise LabelError(f"{path}: bad JSON: too long a number, or too deep") from error
    if key is None:
        return data
    if not isinstance(data, dict):
        raise LabelError(f"{path}: #{key} needs an object of lists", hint=f"leave #{key} out")
    if key not in data:
        raise LabelError(f'{path}: no key "{key}"', hint=propose(key, data))
    return data[key]


def field(entry: object, key: str, kind: type[Any] = object) -> Any:
    """What `entry` has under `key`, None if it is no object. Raises ValueError unless that is a `kind`."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"{key} is {reprlib.repr(value)}")
    return value


def as_json(value: object) -> str:
    """JSON that UTF-8 can hold: a byte of a name that is no UTF-8 becomes U+FFFD."""
    return _NO_UTF8.sub("\ufffd", json.dumps(value, ensure_ascii=False))


def checked(value: object, what: str, where: str) -> str:
    """`value` without white space around it. Raises LabelError: no text, empty, control characters in it."""
    if not isinstance(value, str):
        raise LabelError(f"{where}: {what} {reprlib.repr(value)} is not text", hint='put it in quotes: "…"')
    text = value.strip()
    if not text:
        raise LabelError(f"{where}: empty {what}", hint="write something there, or leave out the separator")
    if found := _FOREIGN.search(text):
        code = ord(found[0])
        kind = "half of a character" if 0xD800 <= code < 0xE000 else "control character"
        hint = "a table of columns needs the ending .tsv and a header" if code == 9 else "remove it"
        raise LabelError(f"{where}: {kind} U+{code:04X} in {what} {text[:40]!r}", hint=hint)
    return text


def propose(name: str, known: Iterable[str]) -> str:
    """A hint: the near name if there is one, and the first of those that exist."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1)
    more = ", …" if len(names) > 30 else ""
    there = f"there are: {', '.join(names[:30])}{more}" if names else "there are none"
    return f'did you mean "{near[0]}"? {there}' if near else there
