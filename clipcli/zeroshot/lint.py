"""All that is wrong in a label file, and all that is hardly meant, at once.

Comes in: a label file and templates; a tokenizer and a model if there are. Goes out: `Finding`s with file and line.
Errors are what reading the file or filling its prompts refuses, told by the same code; warnings are words that a
text model takes for something else, and labels that it can't tell apart. Nothing is changed, nothing printed.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from clipcli.errors import LabelError
from clipcli.records import Label, Template
from clipcli.tokenizer import ENDS, STARTS, Tokenizer
from clipcli.zeroshot import labels as label_files
from clipcli.zeroshot import prompts as prompting
from clipcli.zeroshot.files import split_key
from clipcli.zeroshot.labels import place_of

if TYPE_CHECKING:
    from clipcli.weights.model import Model
    from clipcli.zeroshot.classifier import Array, Progress

MOST_PAIRS = 1000  # of similar labels that are told: the most similar

_ARTICLE = r"(?:an?|the|my)\s+"
_SAME = "the model sees no difference; keep one, or choose other words"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (an error), or hardly meant (a warning)."""

    file: str
    line: int | None  # of a text or table
    entry: int | None  # of JSON
    level: Literal["error", "warning"]
    code: str  # the kind, for scripts
    message: str
    hint: str | None = None
    label: str | None = None
    other: str | None = None  # where two labels clash: the earlier
    cosine: float | None = None  # of the two

    def __str__(self) -> str:
        line = f":{self.line}" if self.line is not None else ""
        entry = f": entry {self.entry}" if self.entry is not None else ""
        hint = f"; {self.hint}" if self.hint else ""
        return f"{self.file}{line}{entry}: {self.level}: {self.message}{hint}"


class Lint(label_files.Report):
    """A label file under examination. Opening it reads it; `count` and `compare` look deeper; all add to `found`."""

    def __init__(self, spec: str, templates: Sequence[Template]) -> None:
        """Read the file. Raises LabelError only where it can't be opened: all else is a finding."""
        self.spec = spec
        self.templates = templates
        self.longest = 0  # tokens of a prompt, when they have been counted
        self.pairs_left_out = 0
        self.labels: list[Label] = []  # that have words
        self._found: list[Finding] = []
        self._lines: dict[str, str] = {}  # of a text, as they stand there
        articles = (t.text for t in templates if re.search(rf"\b{_ARTICLE}<>", t.text, re.IGNORECASE))
        self._with_article = next(articles, None)
        try:
            labels = label_files.read(spec, self)
        except LabelError as error:
            if spec == "-" or isinstance(error.__cause__, OSError):
                raise
            self.error(error)
        else:
            self.labels = [label for label in labels if label.aliases or label.descriptions]
        self._look()

    @property
    def found(self) -> list[Finding]:
        """Everything so far, by line or entry; of one line the errors first."""
        return sorted(self._found, key=lambda finding: (finding.line or finding.entry or 0, finding.level))

    def error(self, error: LabelError, code: str = "syntax", label: Label | None = None) -> None:
        """Note what can't be used; the message begins with its place."""
        if code == "empty" and self._found:
            return  # nothing is left, and why has been said
        files = (self.spec, str(split_key(self.spec)[0]))
        where = next((file for file in files if error.message.startswith(f"{file}:")), "")
        place = re.match(r"(?::\d+|: entry \d+)?: ", error.message[len(where) :])
        end = len(where) + (place.end() if place else 0)
        line, entry = _place(error.message[: end - 2])
        name = label.name if label else None
        self._found.append(Finding(self.spec, line, entry, "error", code, error.message[end:], error.hint, name))

    def warning(self, label: Label, message: str, code: str, other: Label | None = None) -> None:
        """Note what reading would only log."""
        self._warn(label, code, message, _SAME if other else None, other)

    def line(self, where: str, line: str) -> None:
        """Keep a line as it was written."""
        self._lines[where] = line

    def count(self, tokenizer: Tokenizer, context_length: int) -> None:
        """Count the tokens of every prompt. Too many are an error, one a label: the first that is too long."""
        for label in self.labels:
            prompts = prompting.fill([label], self.templates)
            longest = max(map(len, tokenizer(prompt.text for prompt in prompts)))
            self.longest = max(self.longest, longest)
            if longest > context_length:
                try:
                    prompting.tokenize(prompts, [label], tokenizer, context_length)
                except LabelError as error:
                    self.error(error, "too-long", label)

    def compare(self, model: Model, above: float, progress: Progress | None = None) -> None:
        """Warn of labels whose class vectors have a cosine above `above`. Runs the text tower; the store helps.

        Prompts that `count` found too long are cut. Raises LabelError for others, ModelError.
        """
        from clipcli.zeroshot.classifier import build

        if len(self.labels) < 2:
            return
        cut = any(finding.code == "too-long" for finding in self._found)
        built = build(model, self.labels, self.templates, truncate=cut, progress=progress)
        pairs, total = closest(built.classifier.weight, above)
        self.pairs_left_out = total - len(pairs)
        for cosine, earlier, later in pairs:
            label, other = self.labels[later], self.labels[earlier]
            message = f'"{label.name}" is hard to tell from "{other.name}"{place_of(other, label)}: cosine {cosine:.3f}'
            hint = "say what tells them apart, or make them aliases of one label"
            self._warn(label, "similar", message, hint, other, cosine)

    def _look(self) -> None:
        """Warn of what can be seen without a model."""
        if len(self.labels) == 1 and not self._found:
            message = f'"{self.labels[0].name}" is the only label: a softmax over one says nothing'
            self._warn(self.labels[0], "alone", message, "say what else may be seen, or in --background FILE")
        names: dict[str, Label] = {}
        words: dict[str, Label] = {}
        for label in self.labels:
            self._spelling(label)
            known = names.setdefault(_as_read(label.name), label)
            if known.name.casefold() != label.name.casefold():  # else it is the same one, or reading has warned
                first = f'"{known.name}"{place_of(known, label)}'
                message = f'label "{label.name}" differs from {first} only in Unicode form or white space'
                self._warn(label, "form", message, _SAME, known)
            for alias in label.aliases:
                known = words.setdefault(_as_read(alias), label)
                if _as_read(known.name) != _as_read(label.name):
                    message = f'label "{label.name}": "{alias}" stands for "{known.name}"{place_of(known, label)} too'
                    self._warn(label, "words", message, "say what tells the two apart", known)

    def _spelling(self, label: Label) -> None:
        """Warn of words that a text model takes for something else than is meant."""
        if re.search(r"\s#\s", self._lines.get(label.where, "")):
            hint = r"give it a line of its own, or write \# if it is none"
            self._warn(label, "comment", f'the comment is part of the label "{label.name}"', hint)
        for text in ("|".join(label.aliases), *label.descriptions):  # the "|" of a token parts aliases
            if found := _TOKEN.search(text):
                message = f'the special token "{found[0]}" is plain text here, and ends the prompt in other tools'
                self._warn(label, "special-token", message, "take it out")
        for text in (*label.aliases, *label.descriptions):
            sentence = text not in label.aliases
            for rule in RULES:
                found = None if sentence and not rule.sentences else rule.pattern.search(text)
                better = rule.better(text) if rule.better else ""
                if found and better != text and (rule.tables or label.where in self._lines):
                    what = found[0] if found[0].isprintable() else f"U+{ord(found[0]):04X}"
                    hint = f'write "{better}"' if better else rule.advice.format(what)
                    if rule.identifier and label.name == text:
                        hint += f', or "{text} = {better}"' if label.where in self._lines else ', in "aliases"'
                        hint += " to keep the name"
                    self._warn(label, rule.code, rule.message.format(what, text), hint)
        for alias in label.aliases:
            article = re.match(_ARTICLE, alias, re.IGNORECASE)
            if article and self._with_article:
                message = f'the article of "{alias}" doubles with that of the template "{self._with_article}"'
                self._warn(label, "article", message, f'write "{alias[article.end() :]}"')

    def _warn(
        self,
        label: Label,
        code: str,
        message: str,
        hint: str | None,
        other: Label | None = None,
        cosine: float | None = None,
    ) -> None:
        names = label.name, other.name if other else None
        self._found.append(Finding(self.spec, *_place(label.where), "warning", code, message, hint, *names, cosine))


def _place(where: str) -> tuple[int | None, int | None]:
    """Line and entry of `labels.txt:3` or `l.json: entry 3`."""
    found = re.search(r":(\d+)$|: entry (\d+)$", where)
    line, entry = found.groups() if found else (None, None)
    return int(line) if line else None, int(entry) if entry else None


def _as_read(text: str) -> str:
    """The words as the model reads them: in one Unicode form, white space and case levelled."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def closest(weight: Array, above: float) -> tuple[list[tuple[float, int, int]], int]:
    """(cosine, earlier row, later row) of the MOST_PAIRS most similar rows above `above`, and how many there are."""
    import numpy as np

    pairs: list[tuple[float, int, int]] = []
    total = 0
    for start in range(0, len(weight), 256):
        cosines = np.triu(weight[start : start + 256] @ weight.T, start + 1)  # each pair once
        rows, columns = np.nonzero(cosines > above)
        values = cosines[rows, columns]
        total += len(values)
        best = np.argsort(-values, kind="stable")[:MOST_PAIRS]
        pairs += [(min(round(float(values[i]), 6), 1.0), start + int(rows[i]), int(columns[i])) for i in best]
        pairs = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:MOST_PAIRS]
    return pairs, total


# What is hardly meant: `{0}` is what was found, `{1}` the whole text


class Rule(NamedTuple):
    """A spelling that a text model takes for something else."""

    code: str
    pattern: re.Pattern[str]
    message: str
    better: Callable[[str], str] | None = None  # the text as it should be
    advice: str = ""  # where that can't be told
    sentences: bool = False  # in descriptions too
    tables: bool = True  # in CSV and JSON too
    identifier: bool = False  # may be wanted as the name


_TOKEN = re.compile(rf"{'|'.join(map(re.escape, (*STARTS, *ENDS)))}|<\|\w+\|>", re.IGNORECASE)
_QUOTES = "\"'“”„‘’«»`"
_HUMP = r"(?<=[a-z])(?=[A-Z][a-z]{2})"
_INVISIBLE = re.compile("[\xa0\xad\u200b\u200e\u200f\u2028-\u202f\u2060-\u206f\ufeff]")
_WORDS = 'give it words: "{0} = words" in text, "aliases" in CSV and JSON'

RULES = (
    Rule(
        "entity",
        re.compile(r"&(?:#\d+|#x[0-9a-f]+|[a-z]+\d*);", re.IGNORECASE),
        'HTML entity "{0}" in "{1}"',
        html.unescape,
        sentences=True,
    ),
    Rule(
        "invisible",
        _INVISIBLE,
        'invisible character {0} in "{1}"',
        lambda text: " ".join(_INVISIBLE.sub(lambda m: " " if m[0].isspace() else "", text).split()),
        sentences=True,
    ),
    Rule(
        "quotes",
        re.compile(rf"^[{_QUOTES}].*[{_QUOTES}][,;]?$|^[\"“„«][^\"“”»]*$|^[^\"“”„«»]*[^\d\"“”„«»][\"”»][,;]?$"),
        "the quotes are part of the label {1}",
        lambda text: text.strip(_QUOTES + ",; "),
    ),
    Rule(
        "trailing",
        re.compile(r"^(?!.*&#?\w+;$).*(?<![\"'”»])[,;]$"),
        '"{1}" ends in a comma or semicolon',
        lambda text: text.rstrip(",; "),
    ),
    Rule(
        "list",
        re.compile(r"[^\s\d],[^\s,;]|;[^\s,;]|(?:,[^,]+){2}|(?:;[^;]+){2}"),
        '"{1}" looks like a list of labels, or a row of a table',
        advice='write one label a line, aliases with "|" between; a table needs the ending .csv and a header',
        tables=False,
    ),
    Rule(
        "id",
        re.compile(r"^n\d{8}\b|^\w+\.[nvasr]\.\d\d$"),
        '"{0}" is an id, which a text model does not understand',
        advice=_WORDS,
    ),
    Rule(
        "snake-case",
        re.compile(r"^[^<>]*\w_\w"),
        '"{1}" is spelled like an identifier',
        lambda text: " ".join(text.replace("_", " ").split()),
        identifier=True,
    ),
    Rule(
        "camel-case",
        re.compile(rf"\b(?!Mac)[A-Z]?[a-z]{{2,}}(?:{_HUMP}[A-Z][a-z]+)+\b"),
        '"{0}" is spelled like an identifier',
        lambda text: re.sub(_HUMP, " ", text),
        identifier=True,
    ),
    Rule(
        "number",
        re.compile(r"^[\d\s.,:/%+-]*\d[\d\s.,:/%+-]*$"),
        '"{1}" is a number alone',
        advice="say what it counts or names, unless the template does",
    ),
)
