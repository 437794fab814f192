"""The JSON of a foreign configuration, read field by field: every complaint names the file and the field.

Comes in: a path. Goes out: checked numbers, words, sections; or ModelError, and NotPlainClip where the value
means another architecture. Which fields there are is the readers' matter.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcli.errors import ModelError, NotPlainClip

PLAIN_CLIP = (
    "clipcli runs plain CLIP: the ViT and RN models of OpenAI, LAION, DataComp or DFN, "
    "e.g. laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K"
)


@dataclass(frozen=True)
class Fields:
    """A JSON object of the file `path`; `where` is the dotted place of it within, empty for the whole."""

    path: Path
    where: str
    values: Mapping[str, Any]

    def section(self, key: str) -> Fields:
        """The object under `key`; an absent one or null is empty."""
        value = self.values.get(key)
        if not isinstance(value, dict | None):
            raise self.wrong(key, "an object")
        return Fields(self.path, self.name(key), value or {})

    def integer(self, key: str, default: int, *, most: int = 1 << 20) -> int:
        """A positive whole number, at most `most`."""
        value = self.values.get(key, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]  # a square's two sides
        if type(value) is not int or not 1 <= value <= most:
            raise self.wrong(key, "a positive whole number")
        return value

    def number(self, key: str, default: float, *, most: float) -> float:
        """A positive number, at most `most`."""
        value = self.values.get(key, default)
        if type(value) not in (int, float) or not 0 < value <= most:
            raise self.wrong(key, f"a positive number up to {most:g}")
        return float(value)

    def colours(
        self, key: str, default: tuple[float, float, float], *, least: float = -10
    ) -> tuple[float, float, float]:
        """Three numbers from `least` to 10, one a colour."""
        value = self.values.get(key, default)
        numbers = value if isinstance(value, list | tuple) else ()
        if len(numbers) != 3 or not all(type(n) in (int, float) and least <= n <= 10 for n in numbers):
            raise self.wrong(key, f"three numbers from {least:g} to 10")
        return (float(numbers[0]), float(numbers[1]), float(numbers[2]))

    def flag(self, key: str, default: bool) -> bool:
        """True or false, and no word for it; null is the default."""
        value = self.values.get(key)
        if not isinstance(value, bool | None):
            raise self.wrong(key, "true or false")
        return default if value is None else value

    def choice(self, key: str, default: str, *others: str) -> str:
        """The default or another of the words; null is the default."""
        value = self.values.get(key)
        if value is not None and value not in (default, *others):
            raise self.wrong(key, " or ".join((default, *others)))
        return value or default

    def divide(self, width: int, parts: int) -> int:
        """`width / parts`, for heads and their width: what one is, if the other is `parts`."""
        if width % parts:
            raise ModelError(f"{self}: attention heads don't fit: {width} is not divisible by {parts}")
        return width // parts

    def only(self, allowed: Mapping[str, Collection[Any] | None], known: Collection[str]) -> None:
        """Refuse what makes another function of the model.

        `known` keys are read elsewhere; an `allowed` one may have the values listed, or any if that is None;
        null always means unset. A key that is neither could mean anything.
        """
        for key, value in self.values.items():
            if key in known or value is None:
                continue
            if key not in allowed:
                raise NotPlainClip(
                    f"{self.path}: `{self.name(key[:40])}` is not known to clipcli and may change the model",
                    hint=PLAIN_CLIP,
                )
            values = allowed[key]
            if values is not None and value not in values:
                raise self.foreign(key)

    def foreign(self, key: str) -> NotPlainClip:
        """The error for a value that means another architecture."""
        return NotPlainClip(
            f"{self.path}: `{self.name(key)}` is {short(self.values.get(key))}: not a plain CLIP",
            hint=PLAIN_CLIP,
        )

    def wrong(self, key: str, expected: str) -> ModelError:
        """The error for a value of the wrong type or size."""
        return ModelError(f"{self.path}: `{self.name(key)}` should be {expected}, not {short(self.values.get(key))}")

    def name(self, key: str) -> str:
        """The dotted name of a field."""
        return f"{self.where}.{key}" if self.where else key

    def __str__(self) -> str:
        return f"{self.path}: `{self.where}`" if self.where else str(self.path)


def read_fields(path: Path) -> Fields:
    """The object in a JSON file. Raises ModelError if there is none."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({error})", hint="download or copy it again") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: not a JSON object")
    return Fields(path, "", values)


def short(value: object) -> str:
    """A value as JSON, cut: it may be of any size and depth."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "too deep"
    return text if len(text) <= 40 else f"{text[:40]}…"
