"""The values that cross rooms: words on one side, pictures on the other, rows at the end.

Frozen dataclasses, no behaviour beyond what follows from their fields. Paths are `str` as `os.fsdecode`
makes them (surrogateescape), so that a name of any bytes comes back unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
    alias: str | None = None  # the word that fills the template


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
    labels: ClassVar[tuple[str, ...]] = ()


Item = Source | Failure | Embedded  # what a run is given, piece by piece


class Candidate(NamedTuple):
    """A label, or a group of labels, and how well it fits one picture."""

    label: str
    score: float  # softmax over all labels, background included; of a group the sum; multi-label: of the label alone
    cosine: float  # of the unit embeddings; of a group its best label's


class PromptCosine(NamedTuple):
    """A prompt, the label and the words it is made of, and its cosine with one picture."""

    label: str
    text: str
    template: str | None  # None: a description
    alias: str | None
    weight: float
    cosine: float


@dataclass(frozen=True, eq=False)
class Evidence:
    """What an answer rests on: `--explain`."""

    prompts: tuple[PromptCosine, ...]  # of the labels in `top`, in their order
    crop: NDArray[np.uint8] | None  # what the model saw, [3, H, W]; None of a picture known by its embedding alone
    crop_file: str | None  # where `--save-crop` has put it


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
    several: bool = False  # multi-label: all of `top` hold, not its first alone
    member: Candidate | None = None  # by group: the best label of the best group
    evidence: Evidence | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """What the picture is said to show."""
        return tuple(one.label for one in self.top) if self.several and not self.abstained else (self.label,)


Row = Prediction | Failure


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions for some pictures as columns; iterating makes them one by one."""

    paths: Sequence[str]
    names: tuple[str, ...]  # of all candidates
    best: NDArray[np.intp]  # [n, k] indices into `names`, best first
    scores: NDArray[np.float64]  # [n, k]
    cosines: NDArray[np.float64]  # [n, k]
    margins: NDArray[np.float64]  # [n]
    abstained: NDArray[np.bool_]  # [n]
    unknown: str  # the label of those that abstain

    @property
    def labels(self) -> list[str]:
        """Each row's label."""
        best, gone = self.best[:, 0].tolist(), self.abstained.tolist()
        return [self.unknown if abstains else self.names[one] for one, abstains in zip(best, gone, strict=True)]

    def __iter__(self) -> Iterator[Prediction]:
        columns = (self.best, self.scores, self.cosines, self.margins, self.abstained)
        for path, best, scores, cosines, margin, abstained in zip(
            self.paths, *(column.tolist() for column in columns), strict=True
        ):
            top = tuple(map(Candidate, map(self.names.__getitem__, best), scores, cosines))
            label = self.unknown if abstained else top[0].label
            yield Prediction(path, label, scores[0], cosines[0], margin, abstained, top)
