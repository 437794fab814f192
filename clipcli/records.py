"""The values that cross rooms: words on one side, pictures on the other, rows at the end.

Frozen dataclasses, no behaviour beyond what follows from their fields. Paths are `str` as `os.fsdecode`
makes them (surrogateescape), so that a name of any bytes comes back unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Label:
    """One class: its name in the output, and the words by which the text tower knows it."""

    name: str
    aliases: tuple[str, ...]  # each fills every template; empty where only descriptions count
    descriptions: tuple[str, ...] = ()  # whole prompts of their own
    group: str | None = None
    threshold: float | None = None
    where: str = ""  # "labels.txt:7", for messages


@dataclass(frozen=True)
class Template:
    """A prompt with a hole: `text` contains `<>` where the label goes."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """One sentence for the text tower, and the part it plays in its label's class vector."""

    text: str
    label: int  # index into the list of labels
    weight: float = 1.0
    template: str | None = None  # None: a description


@dataclass(frozen=True)
class Source:
    """A picture to be looked at: a path, or bytes that came from elsewhere."""

    path: str
    data: bytes | None = None  # None: the bytes lie at `path`


@dataclass(frozen=True, eq=False)
class Embedded:
    """A picture and its unit embedding, float32 [dim]."""

    path: str
    vector: NDArray[np.float32]


class FailureKind(StrEnum):
    """Why a picture has no label."""

    MISSING = "missing"
    UNREADABLE = "unreadable"
    NOT_A_PICTURE = "not-a-picture"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_LARGE = "too-large"
    UNSUPPORTED = "unsupported"
    MODEL = "model"


@dataclass(frozen=True)
class Failure:
    """A picture that could not be classified: a row of its own, never an exception.

    What a `Prediction` says besides the path is None or empty here, as in the rows of JSON Lines.
    """

    path: str
    kind: FailureKind
    message: str

    label: ClassVar[None] = None
    score: ClassVar[None] = None
    cosine: ClassVar[None] = None
    margin: ClassVar[None] = None
    abstained: ClassVar[bool] = False
    top: ClassVar[tuple[Candidate, ...]] = ()


Item = Source | Failure | Embedded  # what a run is given, piece by piece


class Candidate(NamedTuple):
    """A label and how well it fits one picture."""

    label: str
    score: float  # softmax over all labels, background included
    cosine: float  # of the unit embeddings


@dataclass(frozen=True)
class Prediction:
    """The answer for one picture. When it abstains, `label` is the unknown label and the rest the best one's."""

    path: str
    label: str
    score: float
    cosine: float
    margin: float  # score of the first less that of the second
    abstained: bool
    top: tuple[Candidate, ...]


Row = Prediction | Failure
