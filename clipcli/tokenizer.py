"""CLIP's tokenizer: text in, ids of a byte-level BPE out, equal to the original's.

A word is spelled in bytes, each as a printable letter, the last with `</w>`; then neighbours are joined, the
earliest merge first. Ids count 256 letters, 256 letters that end a word, the merges in order, start, end.
Comes in: a vocabulary file that lies beside the weights (none is shipped), and text. Goes out: ragged ids.
It doesn't pad, cut or know labels. A literal `<|endoftext|>` is plain text (it ends the original's prompt).
"""

from __future__ import annotations

import gzip
import html
import io
import json
import zlib
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clipcli.errors import VocabularyError

if TYPE_CHECKING:
    import regex

END_OF_WORD = "</w>"
STANDARD_SIZE = 49_408
STARTS = ("<|startoftext|>", "<start_of_text>")  # as OpenAI and as open_clip spell it
ENDS = ("<|endoftext|>", "<end_of_text>")
MOST_WORDS = 100_000  # remembered, words and what stands between spaces; then the memory is emptied
MOST_BYTES = 64 << 20  # of an unpacked vocabulary: the original's has 3 MB
HINT = "take merges.txt of the model's repository, or of openai/clip-vit-base-patch32"


class Tokenizer:
    """A byte-level BPE with its start and end token. Safe to share between threads."""

    def __init__(self, ranks: dict[tuple[str, str], int], ids: dict[str, int]) -> None:
        self.start_token = next(ids[name] for name in STARTS if name in ids)
        self.end_token = next(ids[name] for name in ENDS if name in ids)
        self.vocab_size = max(ids.values()) + 1
        self._ranks = ranks
        self._ids = ids
        self._words: dict[str, list[int]] = {}

    @classmethod
    def from_file(cls, path: Path, vocab_size: int | None = None) -> Tokenizer:
        """Read `merges.txt`, `tokenizer.json`, `vocab.json` (`merges.txt` beside it) or OpenAI's `.gz`.

        `vocab_size` is the text tower's. Of the `.gz` only the merges that fit it count (None: 48,894).
        Raises VocabularyError: unreadable, malformed, or of another size than the text tower's.
        """
        vocabulary = _read(path, vocab_size)
        ranks, tokens = _ranked(vocabulary)
        if vocabulary.ids is not None:
            _check_ids(vocabulary.ids, tokens, path)
        standard = [*tokens, STARTS[0], ENDS[0]]
        tokenizer = cls(ranks, vocabulary.ids or {token: i for i, token in enumerate(standard)})
        size = tokenizer.vocab_size
        if vocab_size not in (None, size):  # the end token would have another id than the model learned
            message = f"{path}: the vocabulary has {size:,} entries, the model's text tower {vocab_size:,}"
            raise VocabularyError(message, hint="take the model's own, whole (--vocabulary FILE)")
        return tokenizer

    def __call__(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text between start and end token: ragged, never padded, never cut."""
        return [[self.start_token, *self.encode(text), self.end_token] for text in texts]

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without start and end token."""
        known = self._words
        ids: list[int] = []
        for part in _parts(text):
            ids += known.get(part) or self._learn(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: lower case, words apart, no start or end. Raises KeyError on a foreign id."""
        ends = (self.start_token, self.end_token)
        tokens = [self._tokens[i] for i in ids if i not in ends]
        words = [f"{token[:-4]} " if token.endswith(END_OF_WORD) else token for token in tokens]
        return self._unspell("".join(words), "replace").strip()

    def tokens(self, text: str) -> list[str]:
        """The pieces of `text` to be read: `</w>` ends a word, part of a character shows as `\\xe2`."""
        return [self._unspell(self._tokens[i], "backslashreplace") for i in self.encode(text)]

    @property
    def merges(self) -> list[str]:
        """`left right` of each merge, in order: the lines of a `merges.txt`."""
        return list(map(" ".join, self._ranks))

    @property
    def ids(self) -> dict[str, int]:
        """The id of each token as it is spelled in vocabulary files; start and end under OpenAI's names."""
        others = {token: i for token, i in self._ids.items() if token not in (*STARTS, *ENDS)}
        return others | {STARTS[0]: self.start_token, ENDS[0]: self.end_token}

    @cached_property
    def _tokens(self) -> dict[int, str]:
        return {i: token for token, i in self._ids.items()}

    def _unspell(self, spelled: str, errors: str) -> str:
        return bytes(_bytes()[letter] for letter in spelled).decode(errors=errors)

    def _learn(self, part: str) -> list[int]:
        """Ids of what stands between two spaces; its words are remembered, too: `tench` of `tench.` and `tench,`."""
        words = _pattern().findall(part)
        if words == [part]:
            ids = [self._ids[token] for token in _join(spell(part), self._ranks)]
        else:
            ids = [i for word in words for i in self._words.get(word) or self._learn(word)]
        if len(self._words) >= MOST_WORDS:
            self._words.clear()
        self._words[part] = ids
        return ids


def cut(ids: list[int], most: int) -> list[int]:
    """A prompt's ids, `most` of them at most; the end token stays."""
    return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]


def find_vocabulary(folder: Path) -> Path | None:
    """The vocabulary beside the weights in `folder`: one that states its ids comes before bare merges."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return folder / "vocab.json"
    names = ("merges.txt", "tokenizer.json", "bpe_simple_vocab_16e6.txt.gz")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def files_of(vocabulary: Path) -> list[Path]:
    """All files that the vocabulary at this path is made of."""
    beside = vocabulary.with_name("merges.txt")
    return [vocabulary, beside] if vocabulary.name == "vocab.json" and beside.is_file() else [vocabulary]


def words_of(text: str) -> list[str]:
    """The words of a text, which no token reaches beyond."""
    return _pattern().findall(clean(text))


def spell(word: str) -> list[str]:
    """The letters of a word, one a byte; the last ends it."""
    letters = list(word.encode().decode("latin-1").translate(_letters()))
    letters[-1] += END_OF_WORD
    return letters


def clean(text: str) -> str:
    """The text as the pattern sees it: repaired, entities resolved, white space collapsed, lower case."""
    return " ".join(_parts(text))


def _parts(text: str) -> list[str]:
    """The clean text, parted at its spaces: no word reaches beyond them."""
    if text.isascii() and text.isprintable() and "&" not in text:  # nothing to repair, nothing to resolve
        return text.lower().split()
    return _clean_fully(text).split(" ")


def _clean_fully(text: str) -> str:
    import ftfy
    import regex

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip().lower()


@cache
def _pattern() -> regex.Pattern[str]:
    """Contractions, runs of letters, single digits, runs of the rest; IGNORECASE decides odd letters."""
    import regex

    return regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


@cache
def _letters() -> dict[int, str]:
    """The letter of each byte: its own where Latin-1 prints it, else the next free one from U+0100."""
    others = iter(range(256, 512))
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


@cache
def _bytes() -> dict[str, int]:
    return {letter: byte for byte, letter in _letters().items()} | {" ": 32}


def _join(parts: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """The parts of a word after all merges, in O(n log n): each merge wherever it applies, from left to right.

    What is joined leaves an empty part behind, which is in no merge; so is the one at the end, where both ends
    of the chain of parts meet.
    """
    parts = [*parts, ""]
    after, before = [*range(1, len(parts)), 0], [*range(-1, len(parts) - 1)]
    never = len(ranks)
    waiting = [(rank, i) for i, pair in enumerate(pairwise(parts)) if (rank := ranks.get(pair, never)) < never]
    heapify(waiting)
    while waiting:
        now = waiting[0][0]
        changed: list[int] = []
        while waiting and waiting[0][0] == now:
            i = heappop(waiting)[1]
            j = after[i]
            if ranks.get((parts[i], parts[j])) == now:  # neither was joined to another meanwhile
                parts[i], parts[j] = parts[i] + parts[j], ""
                after[i], before[after[j]] = after[j], i
                changed += (before[i], i)
        for i in changed:
            if (rank := ranks.get((parts[i], parts[after[i]]), never)) < never:
                heappush(waiting, (rank, i))
    return [part for part in parts if part]


# Vocabulary files


class _Vocabulary(NamedTuple):
    merges: list[str]  # "left right", in order
    where: Callable[[int], str]  # index of a merge -> its place in the file
    ids: dict[str, int] | None = None  # None: in standard order


def _read(path: Path, vocab_size: int | None) -> _Vocabulary:
    try:
        data = path.read_bytes()
        packed = data.startswith(b"\x1f\x8b")
        if packed:  # the end, should there be more than the limit, would not count anyway
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MOST_BYTES)
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise VocabularyError(f"{path}:{line}: not UTF-8", hint=HINT) from error
    except (OSError, EOFError, zlib.error) as error:
        reason = (getattr(error, "strerror", None) or "damaged gzip file").lower()
        raise VocabularyError(f"{path}: {reason}", hint=HINT) from error
    if text.lstrip().startswith("{"):
        return _read_json(text, path)
    lines = text.rstrip().splitlines()
    header = 1 if lines and "#version" in lines[0] else 0
    last = len(lines)
    if packed:  # the original's file goes on long after what the models know
        last = header + max((vocab_size or STANDARD_SIZE) - 514, 0)
    return _Vocabulary(lines[header:last], lambda i: f"{path}:{i + header + 1}")


def _read_json(text: str, path: Path) -> _Vocabulary:
    """transformers' forms: all in `tokenizer.json`, or ids in `vocab.json` and merges beside it."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise VocabularyError(f"{path}:{getattr(error, 'lineno', 1)}: bad JSON", hint=HINT) from error
    model = data.get("model")
    if not isinstance(model, dict):
        beside = path.with_name("merges.txt")
        if beside == path or not beside.is_file():
            raise VocabularyError(f"{path}: there is no merges.txt beside it", hint=HINT)
        return _read(beside, None)._replace(ids=data)
    if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != END_OF_WORD:
        raise VocabularyError(f"{path}: no BPE whose words end in {END_OF_WORD}, as CLIP's is", hint=HINT)
    ids, merges, added = model.get("vocab"), model.get("merges"), data.get("added_tokens") or []
    if not (isinstance(ids, dict) and isinstance(merges, list) and isinstance(added, list)):
        raise VocabularyError(f"{path}: no lists of tokens and merges in it", hint=HINT)
    for i, token in enumerate(added, 1):
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise VocabularyError(f"{path}: added token {i} has no text", hint=HINT)
    ids = ids | {token["content"]: token.get("id") for token in added}
    return _Vocabulary([_pair(merge) for merge in merges], lambda i: f"{path}: merge {i + 1}", ids)


def _pair(merge: object) -> str:
    """`"left right"` of a merge, which newer files write as a list of two."""
    parts = merge if isinstance(merge, list) else [merge]
    return " ".join(part for part in parts if isinstance(part, str))


def _ranked(vocabulary: _Vocabulary) -> tuple[dict[tuple[str, str], int], list[str]]:
    """Each merge's rank, and all tokens in standard order. A merge may only join tokens known by then."""
    letters = sorted(_letters().values())
    tokens = dict.fromkeys([*letters, *(letter + END_OF_WORD for letter in letters)])
    ranks: dict[tuple[str, str], int] = {}
    for i, merge in enumerate(vocabulary.merges):
        left, _, right = merge.partition(" ")
        if left not in tokens or right not in tokens:
            what = f"{merge[:40]!r} is no merge of two tokens known so far"
            raise VocabularyError(f"{vocabulary.where(i)}: {what}", hint=HINT)
        token = left + right
        if (left, right) in ranks or (vocabulary.ids is None and token in tokens):
            raise VocabularyError(f"{vocabulary.where(i)}: the token {token[:40]!r} is made twice", hint=HINT)
        ranks[left, right] = i
        tokens[token] = None
    return ranks, list(tokens)


def _check_ids(ids: dict[str, Any], tokens: list[str], path: Path) -> None:
    missing = [token for token in tokens if token not in ids]
    missing += [names[0] for names in (STARTS, ENDS) if ids.keys().isdisjoint(names)]
    if any(type(i) is not int or not 0 <= i < 1 << 31 for i in ids.values()):
        wrong = "an id is no number"
    elif len(set(ids.values())) < len(ids):
        wrong = "two tokens have the same id"
    elif missing:
        wrong = f"no id for the token {missing[0][:40]!r}"
    elif max(ids, key=ids.__getitem__) not in ENDS:  # the text tower is read at the largest id
        wrong = "the end token isn't the one with the largest id"
    else:
        return
    raise VocabularyError(f"{path}: {wrong}", hint=HINT)
