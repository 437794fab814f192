"""From labelled data, as `train` and `eval` take them, to pictures and what is true of each of them.

In: folders of class directories, tables of paths and captions, webdataset archives; and perhaps the words of the
classes, as a label file has them. Out: a `Pair` for each picture, as it is met, or a `Failure`. Pictures are neither
decoded nor shuffled here (`feed`), and no caption is made: templates are filled where a pair is used.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TextIO

from clipcli.errors import UsageError, reason
from clipcli.images.archives import Member, inside, members
from clipcli.images.find import Walk, check_inputs, is_archive, named_like_a_picture
from clipcli.images.read import MAX_BYTES
from clipcli.records import Failure, FailureKind, Label, Source
from clipcli.zeroshot.files import checked

TABLES, LINES = (".csv", ".tsv"), (".jsonl", ".ndjson")
PICTURES, TEXTS = ("jpg", "jpeg", "png", "webp"), ("txt", "json", "cls")  # endings in an archive
MAX_TEXT = 1 << 16  # bytes of a picture's words
LONGEST = 1 << 24  # characters of a table's line
_LIMITS = dict.fromkeys(PICTURES, MAX_BYTES) | dict.fromkeys(TEXTS, MAX_TEXT)
PATH, CAPTION = ("path", "filepath", "file_name", "image"), ("caption", "title", "text")  # names of columns

_HALVES = re.compile("[\ud800-\udfff]")
_FOREIGN = re.compile("[\x00-\x20\x7f-\xa0\u2028\u2029\ud800-\udfff]+")  # white space, controls, halves of characters
_SYNONYMS = re.compile(r" / |,")

_Truth = tuple[tuple[str, ...], tuple[str, ...], str | None]  # a Pair without its picture


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture, and what is true of it."""

    source: Source  # with its bytes, if it comes from an archive
    phrases: tuple[str, ...]  # whole captions, or the class's own words, its name first; shared by all of the class
    broader: tuple[str, ...] = ()  # words of which the class is a kind
    label: str | None = None  # the class; None: the phrases are captions, and take no template


class _Classes:
    """What is true of a class's pictures, by the class's name: of each class once."""

    def __init__(self, words: Mapping[str, Label]) -> None:
        self._known: dict[str, _Truth] = {}  # by the name as it is compared
        self._met: dict[str, _Truth] = {}  # by the name as it was spelled
        for label in words.values():
            phrases = _texts(label.aliases or (label.name,))
            if label.name in phrases:
                phrases = _texts((label.name, *phrases))
            broader = _texts((label.group or "").split("|"))
            self._met[label.name] = phrases, broader, label.name  # of names that differ in case only, each is its own
            self._known.setdefault(folded(label.name), self._met[label.name])
        names = set(self._known)
        self._shared: dict[str, tuple[str, str]] = {}  # words of two labels
        for label in words.values():
            mine = self._known[folded(label.name)]
            for alias in map(folded, label.aliases):
                other = self._known.setdefault(alias, mine)[2]
                if other not in (None, mine[2]) and alias not in names:
                    self._shared[alias] = str(other), label.name

    def __getitem__(self, name: str) -> _Truth:
        if name not in self._met:
            key = folded(name)
            if key in self._shared:
                what = 'class "{}" is an alias of two labels, "{}" and "{}"'.format(name, *self._shared[key])
                raise UsageError(what, hint="take the alias from one of them, or name the class as its label")
            self._met[name] = self._known.setdefault(key, _by_its_name(_text(name.replace("_", " ")) or name))
        return self._met[name]


def _by_its_name(name: str) -> _Truth:
    return _texts(_SYNONYMS.split(name)) or (name,), (), name


def folded(name: str) -> str:
    """A class's name as it is compared: in one case, `_` and all white space a single space."""
    return " ".join(_text(name.replace("_", " ")).split()).casefold()


def _text(value: str) -> str:
    """One line, without what no tokenizer should see."""
    return _FOREIGN.sub(" ", value).strip()


def _texts(values: Iterable[object]) -> tuple[str, ...]:
    """Those that are text and not empty, each once."""
    return tuple(dict.fromkeys(text for value in values if isinstance(value, str) and (text := _text(value))))


def shards(data: Sequence[str]) -> list[str]:
    """What can be read by itself, and in any order: an archive, a table, a folder of class folders.

    A folder of archives is those archives. Raises UsageError for what is none of this, or isn't there.
    """
    check_inputs(data)
    found = [shard for path in data for shard in (_in_folder(path) if os.path.isdir(path) else [path])]
    for shard in found:
        _reader(shard)
    return found


def read_pairs(data: Sequence[str], words: Mapping[str, Label] | None = None) -> Iterator[Pair | Failure]:
    """All pairs of `data`, shard by shard in the given order, each as it is met.

    `words` are the user's labels: a class is found among them by its name or an alias, whatever its case, with `_`
    for a space; one that isn't there is known by its own name.
    """
    classes = _Classes(words or {})
    for shard in shards(data):
        yield from _reader(shard)(shard, classes)


def at_most(indices: Mapping[str, Sequence[int]], most: int, seed: int) -> list[int]:
    """The indices that remain, sorted, where each label keeps `most` at random.

    What a label keeps depends on the seed and on nothing that other labels have.
    """
    kept: list[int] = []
    for label, own in indices.items():
        kept += own if len(own) <= most else random.Random(f"{seed} {label}").sample(own, most)
    return sorted(kept)


def _reader(path: str) -> Callable[[str, _Classes], Iterator[Pair | Failure]]:
    ending = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        return _folder
    if is_archive(path):
        return _archive
    if ending in (*TABLES, *LINES):
        return _table if ending in TABLES else _lines
    hint = "give a folder of class folders, .csv, .tsv, .jsonl, or archives of samples (.tar, .tar.gz, .zip)"
    raise UsageError(f"{path}: no kind of training data by its name", hint=hint)


# Folders


def _in_folder(path: str) -> list[str]:
    """The shards that a folder stands for."""
    paths = _listed(path)
    folders, archives = list(filter(os.path.isdir, paths)), list(filter(is_archive, paths))
    if picture := next((one for one in paths if named_like_a_picture(one) and one not in folders), None):
        table = next((one for one in paths if one.lower().endswith((*TABLES, *LINES))), None)
        hint = f"give {table} instead" if table else "a folder's name is its pictures' class: make one for each class"
        raise UsageError(f"{picture}: lies in no class folder", hint=hint)
    if bool(folders) == bool(archives):
        what = "both class folders and archives" if folders else "neither class folders nor archives"
        raise UsageError(f"{path}: {what} in it", hint="give a folder of class folders, or one of archives")
    return [path] if folders else archives


def _listed(path: str) -> list[str]:
    """What lies in a folder, sorted, without what is hidden."""
    try:
        names = sorted(os.listdir(path), key=os.fsencode)
    except OSError as error:
        raise UsageError(f"{path}: {reason(error)}") from error
    return [os.path.join(path, name) for name in names if not name.startswith(".")]


def _folder(path: str, classes: _Classes) -> Iterator[Pair | Failure]:
    for folder in filter(os.path.isdir, _listed(path)):
        truth = classes[checked(os.path.basename(folder), "class", path)]
        for item in Walk((folder,)):
            yield item if isinstance(item, Failure) else Pair(item, *truth)


# Tables


def _open(path: str) -> TextIO:
    if not os.path.isfile(path):  # a FIFO would wait for a writer, and is read once
        raise UsageError(f"{path}: is no file", hint="data are read again and again")
    try:
        return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")  # names are bytes
    except OSError as error:
        raise UsageError(f"{path}: {reason(error)}") from error


def _bounded(file: TextIO) -> Iterator[str]:
    """The lines; one without an end comes in pieces, which are no rows."""
    return iter(lambda: file.readline(LONGEST), "")


def _table(path: str, classes: _Classes) -> Iterator[Pair | Failure]:
    with _open(path) as file:
        header = file.readline(MAX_TEXT)
        cut = "\t" if path.lower().endswith(".tsv") else max(",;\t", key=header.count)
        columns = [name.strip().lower() for name in next(csv.reader([header], delimiter=cut), [])]
        if not set(columns) & set(PATH) or not set(columns) & {*CAPTION, "label", "labels"}:
            hint = f"path,caption or path,label; there is {header.strip()[:80]!r}"
            raise UsageError(f"{path}:1: no line that names the columns", hint=hint)
        rows = csv.reader(_bounded(file), delimiter=cut, strict=True)
        number = 1
        try:
            for row in rows:
                where, number = f"{path}:{number + 1}", rows.line_num + 1  # a cell may hold line breaks
                if len(row) > len(columns):
                    message = f"{len(row)} cells, but {len(columns)} columns: a cell with {cut!r} in it needs quotes"
                    yield Failure(where, FailureKind.CORRUPT, message)
                elif any(map(str.strip, row)):
                    yield _entry(dict(zip(columns, row, strict=False)), where, path, classes)
        except csv.Error as error:
            hint = 'a quote in a cell is ""'
            raise UsageError(f"{path}:{rows.line_num + 1}: bad CSV: {error}", hint=hint) from error


def _lines(path: str, classes: _Classes) -> Iterator[Pair | Failure]:
    with _open(path) as file:
        for number, line in enumerate(_bounded(file), 1):
            if not line.strip():
                continue
            where, entry = f"{path}:{number}", _object(line)
            if entry is None:
                yield Failure(where, FailureKind.CORRUPT, "no JSON object with path and caption")
            else:
                yield _entry(entry, where, path, classes)


def _object(text: str | bytes) -> dict[str, Any] | None:
    """A JSON object, if it is one."""
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _entry(entry: Mapping[str, Any], where: str, table: str, classes: _Classes) -> Pair | Failure:
    """A row or object with a picture's path and its words."""
    name = next((value for key in PATH if isinstance(value := entry.get(key), str) and value), None)
    if name is None:
        return Failure(where, FailureKind.MISSING, "no path of a picture")
    path = os.path.join(os.path.dirname(table), name)
    truth = _truth(entry, classes)
    if isinstance(truth, str):
        return Failure(path, FailureKind.MISSING, f"{truth} ({where})")
    if is_archive(path):
        return Failure(path, FailureKind.NOT_A_PICTURE, f"an archive, not a picture ({where})")
    found = next(iter(Walk((path,), folders=False)))
    return replace(found, message=f"{found.message} ({where})") if isinstance(found, Failure) else Pair(found, *truth)


def _truth(entry: Mapping[str, Any], classes: _Classes) -> _Truth | str:
    """What an entry's words say, or why they say nothing."""
    said = [value for key in CAPTION if (value := entry.get(key))]
    captions = said[0] if said and isinstance(said[0], list) else said[:1]
    label = _several(entry["labels"]) if "labels" in entry and "label" not in entry else entry.get("label")
    if any(isinstance(text, str) and _HALVES.search(text) for text in (*captions, label)):
        return "its words are not UTF-8"
    if phrases := _texts(captions):
        return phrases, (), None
    if isinstance(label, str) and _text(label):
        return classes[label]
    return "no words for it"


def _several(labels: object) -> object:
    """`cat|dog` of the labels that don't exclude each other, where JSON lists them; `|` where there are none."""
    several = "|".join(map(str, labels)) if isinstance(labels, list) else labels
    return several if several or several is None else "|"


# Archives


def _split(name: str) -> tuple[str, str]:
    """A member's sample and its part in it: all up to the first dot of its own name, and all behind that."""
    start = name.rfind("/") + 1
    stem, _, ending = name[start:].partition(".")
    return name[:start] + stem, ending.lower()


def _archive(path: str, classes: _Classes) -> Iterator[Pair | Failure]:
    last = ""

    def sample(item: Member | Failure) -> str:
        nonlocal last
        name = item.name if isinstance(item, Member) else item.path.removeprefix(inside(path, ""))
        if name != path:  # a damaged archive belongs to the sample that it ends, and which may lack something
            last = _split(name)[0]
        return last

    found = members(path, lambda name: _split(name)[1] in _LIMITS, lambda name: _LIMITS[_split(name)[1]])
    for key, items in groupby(found, sample):
        parts: dict[str, Member] = {}
        failed = False
        for item in items:
            if isinstance(item, Failure):
                failed = True
                yield item
            else:
                parts.setdefault(_split(item.name)[1], item)
        if not failed:
            yield _sample(path, key, parts, classes)


def _sample(path: str, key: str, parts: Mapping[str, Member], classes: _Classes) -> Pair | Failure:
    picture = next((parts[ending] for ending in PICTURES if ending in parts), None)
    if picture is None:
        return Failure(inside(path, key), FailureKind.MISSING, f"no picture beside its .{next(iter(parts))}")
    truth = _words(parts, classes)
    where = inside(path, picture.name)
    if isinstance(truth, str):
        return Failure(where, FailureKind.MISSING, truth)
    return Pair(Source(where, picture.data), *truth)


def _words(parts: Mapping[str, Member], classes: _Classes) -> _Truth | str:
    """What the members beside a picture say, or why they say nothing."""
    if text := parts.get("txt"):
        try:
            words = text.data.decode("utf-8-sig")
        except UnicodeDecodeError:
            return "its .txt is not UTF-8"
        return _truth({"label": words} if "cls" in parts else {"caption": words.splitlines()}, classes)
    if "json" in parts:
        entry = _object(parts["json"].data)
        return "its .json is no JSON object" if entry is None else _truth(entry, classes)
    if "cls" in parts:
        return "its class has a number (.cls), but no name (.txt)"
    return "no words beside it: the members of a sample follow each other (.jpg, .txt)"
