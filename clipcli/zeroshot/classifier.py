"""A linear classifier of image embeddings, and how one is made of words alone: one unit vector a label.

`build` turns labels and templates into vectors (paper, section 3.1.4: the embeddings of all prompts of a class are
averaged), with the store in between; `extend` adds labels to an older one. Knows nothing of pictures, from which
`tasks.probe` makes its classifiers; the file format is `classifier_file`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clipcli.errors import ClassifierError, LabelError, ModelError, UsageError
from clipcli.records import Label, Prompt, Template
from clipcli.store import keys
from clipcli.weights.model import Model
from clipcli.weights.pooled import pooled
from clipcli.zeroshot import prompts as prompting

KEEP_EVERY = 4096  # prompts between two writes to the store: what an interrupted run loses at most

Array = NDArray[np.float32]
Features = Literal["projected", "pooled"]
Progress = Callable[[int, int], None]  # prompts done, prompts to do


@dataclass(frozen=True)
class Classifier:
    """A linear classifier over image embeddings: score = softmax(scale · x · Wᵀ + b)."""

    weight: Array = field(repr=False)  # [labels, dim], unit rows when zero-shot
    labels: tuple[Label, ...]
    logit_scale: float  # already exponentiated
    model: str
    image_fingerprint: str
    text_fingerprint: str
    templates: tuple[Template, ...] = ()
    template_set: str = ""
    made_by: str = "zero-shot"
    bias: Array | None = field(default=None, repr=False)  # [labels]
    features: Features = "projected"  # pooled: the image tower's before its projection
    temperature: float = 1.0  # divides the logits where that is asked for
    how: Mapping[str, str | float] = field(default_factory=dict)  # what a reader may want to know of its making

    @property
    def names(self) -> tuple[str, ...]:
        """The labels' names, in order."""
        return tuple(label.name for label in self.labels)

    @property
    def is_calibrated(self) -> bool:
        """Whether `tasks.calibrate` has made it: its thresholds are then least scores among competing labels."""
        return "calibration_pictures" in self.how

    def logits(self, vectors: Array) -> Array:
        """Logits [n, labels] of unit embeddings [n, dim]."""
        found: Array = vectors @ self.weight.T * np.float32(self.logit_scale)
        return found if self.bias is None else found + self.bias

    def suited(self, model: Model) -> Model:
        """`model` as it makes the features that this classifier is for. Raises ClassifierError for another one."""
        model = pooled(model) if self.features == "pooled" else model
        self.check_model(model)
        return model

    def check_model(self, model: Model) -> None:
        """Raise ClassifierError unless `model`'s image tower is the one this classifier was built for."""
        if self.weight.shape[1] != model.config.embed_dim or self.image_fingerprint != model.image_fingerprint:
            raise ClassifierError(
                f'the classifier was built with model "{self.model}" ({self.image_fingerprint[:8]}), '
                f'not with "{model.name}" ({model.image_fingerprint[:8]})',
                hint="build it again with this model, or give the model it was built with as --model",
            )


@dataclass(frozen=True)
class Built:
    """A classifier, and what it cost."""

    classifier: Classifier
    prompts: int  # distinct prompts behind it; 0 when the store had the whole matrix
    encoded: int  # of these, how many went through the text tower


def build(
    model: Model,
    labels: Sequence[Label],
    templates: Sequence[Template],
    *,
    template_set: str = "",
    truncate: bool = False,
    progress: Progress | None = None,
) -> Built:
    """Make a classifier of `labels`, or find it in the model's store.

    Raises LabelError (a prompt too long, a label without any prompt), VocabularyError, ModelError.
    """
    logit_scale = model.checkpoint.logit_scale  # a broken one is told before anything is computed
    fingerprint, arithmetic = model.text_fingerprint, model.text_arithmetic
    key = keys.classifier_key(labels, templates, fingerprint, model.vocabulary_digest, arithmetic, truncate)
    weight = model.store.classifier(key)
    prompts = encoded = 0
    if weight is None:
        filled = prompting.fill(labels, templates)
        ids = prompting.tokenize(filled, labels, model.tokenizer, model.config.text.context_length, truncate)
        vectors, prompts, encoded = encode_prompts(model, ids, progress)
        weight = average(filled, vectors, labels)
        model.store.keep_classifier(key, weight, model=fingerprint)
    classifier = Classifier(
        weight=weight,
        labels=tuple(labels),
        logit_scale=logit_scale,
        model=model.name,
        image_fingerprint=model.image_fingerprint,
        text_fingerprint=fingerprint,
        templates=tuple(templates),
        template_set=template_set,
    )
    return Built(classifier, prompts, encoded)


def encode_prompts(
    model: Model, ids: Sequence[Sequence[int]], progress: Progress | None = None
) -> tuple[Array, int, int]:
    """Unit embeddings [len(ids), dim], each distinct prompt encoded once and only if the store lacks it.

    Also returns how many prompts were distinct and how many were encoded.
    """
    fingerprint, arithmetic = model.text_fingerprint, model.text_arithmetic
    wanted = [keys.prompt_key(row, fingerprint, arithmetic) for row in ids]
    distinct = dict(zip(wanted, ids, strict=True))
    known = model.store.prompt_vectors(list(distinct))
    missing = [key for key in distinct if key not in known]
    fresh: dict[bytes, Array] = {}
    for indices, vectors in model.encode_text([distinct[key] for key in missing]):
        if not np.isfinite(vectors).all():
            raise ModelError(
                f"{model.name}: the text tower gives numbers that are not finite", hint="try --precision fp32"
            )
        fresh.update((missing[index], vector) for index, vector in zip(indices, vectors, strict=True))
        if len(fresh) >= KEEP_EVERY:
            model.store.keep_prompt_vectors(fresh, model=fingerprint)
            known.update(fresh)
            fresh = {}
        if progress:
            progress(len(known) + len(fresh) - (len(distinct) - len(missing)), len(missing))
    model.store.keep_prompt_vectors(fresh, model=fingerprint)
    known.update(fresh)
    return np.stack([known[key] for key in wanted]), len(distinct), len(missing)


def average(prompts: Sequence[Prompt], vectors: Array, labels: Sequence[Label]) -> Array:
    """The class vectors [labels, dim] of prompts' unit embeddings [prompts, dim], unit rows, in fp32.

    A label's template group is the weighted mean over aliases x templates, its description group the plain mean;
    the class vector is the normalised mean of the groups that exist.
    """
    groups: list[dict[bool, list[int]]] = [{} for _ in labels]
    for row, prompt in enumerate(prompts):
        groups[prompt.label].setdefault(prompt.template is None, []).append(row)
    weight = np.empty((len(labels), vectors.shape[1]), dtype=np.float32)
    for index, rows_by_kind in enumerate(groups):
        means = [
            np.average(vectors[rows], axis=0, weights=[prompts[row].weight for row in rows])
            for rows in rows_by_kind.values()
        ]
        weight[index] = np.mean(means, axis=0)
    weight /= np.linalg.norm(weight, axis=1, keepdims=True)
    if not np.isfinite(weight).all():
        raise LabelError("the template weights give class vectors that are not finite", hint="take weights near 1")
    return weight


def extend(old: Classifier, new: Classifier) -> Classifier:
    """`old` with the labels of `new` behind its own. Both must come from the same model and templates."""
    if old.made_by != "zero-shot":
        raise ClassifierError(f"a classifier made by {old.made_by} can't be extended", hint="only zero-shot ones can")
    if old.is_calibrated:
        what = "a calibrated classifier can't be extended: its temperature and thresholds are for its own labels"
        raise ClassifierError(what, hint="extend the one it was made from, and calibrate that")
    if (old.image_fingerprint, old.text_fingerprint) != (new.image_fingerprint, new.text_fingerprint):
        raise ClassifierError(
            f'the old classifier was built with model "{old.model}", the new labels with "{new.model}"',
            hint="give the model it was built with as --model",
        )
    if old.templates != new.templates:
        raise UsageError("the templates differ from the old classifier's", hint="leave --templates out to use its own")
    known = set(old.names)
    for label in new.labels:
        if label.name in known:
            raise LabelError(
                f'{label.where}: label "{label.name}" is in the old classifier already',
                hint="give it another name with =",
            )
    return replace(old, weight=np.concatenate([old.weight, new.weight]), labels=old.labels + new.labels)
