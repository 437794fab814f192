"""What answers rest on: a picture's cosine with every prompt of the labels that came first, and what the model saw.

In and out: what `classify` takes, and its rows with their `Evidence`. Prompts come from the store where it knows them.
A label's own cosine is higher than the mean of its prompts', since their averaged vector is made a unit vector again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from clipcli.images.crops import crop_name
from clipcli.images.stream import make_prepare
from clipcli.records import Embedded, Evidence, Failure, Item, Prediction, PromptCosine, Row, Source
from clipcli.tasks.classify import Burst, ClassifyOptions, check_words, make_rows
from clipcli.tasks.embed import Input, embed_in_bursts, sources
from clipcli.weights.model import Model
from clipcli.zeroshot import prompts as prompting
from clipcli.zeroshot.classifier import Classifier, encode_prompts


def explain_in_bursts(
    inputs: Input | Iterable[Input],
    classifier: Classifier,
    model: Model,
    options: ClassifyOptions | None = None,
    *,
    background: Classifier | None = None,
) -> Iterator[Iterator[Row]]:
    """As `classify_in_bursts`, each row with its evidence. For few pictures: each is decoded once more.

    Raises ClassifierError where the classifier isn't made of prompts, and what `classify` raises.
    """
    options = options or ClassifyOptions()
    rows = make_rows(classifier, background, model, options)
    spoken = [_Prompts(part, model) for part in (classifier, background) if part is not None]
    crops = _Crops(inputs, model, options)

    def explained(burst: Burst) -> Iterator[Row]:
        for item, row in zip(burst, rows(burst), strict=True):
            crop = crops.next()
            if isinstance(row, Failure) or isinstance(item, Failure):
                yield row
            else:
                prompts = [one for part in spoken for one in part.cosines(item)]
                yield replace(row, evidence=_evidence(row, prompts, crop, options))

    return map(explained, embed_in_bursts(crops.items(), model, options))


def _evidence(
    row: Prediction, prompts: list[PromptCosine], crop: NDArray[np.uint8] | None, options: ClassifyOptions
) -> Evidence:
    wanted = tuple(one for candidate in row.top for one in prompts if one.label == candidate.label)
    saved = None if options.save_crop is None or crop is None else str(options.save_crop / crop_name(row.path))
    return Evidence(wanted, crop, saved)


class _Prompts:
    """The prompts that a classifier is made of."""

    def __init__(self, classifier: Classifier, model: Model) -> None:
        check_words(classifier, model, "--explain")
        self.names = classifier.names
        self.prompts = prompting.fill(classifier.labels, classifier.templates)
        length = model.config.text.context_length
        ids = prompting.tokenize(self.prompts, classifier.labels, model.tokenizer, length, truncate=True)
        self.vectors = encode_prompts(model, ids)[0]  # [prompts, dim]

    def cosines(self, picture: Embedded) -> Iterator[PromptCosine]:
        for prompt, cosine in zip(self.prompts, (self.vectors @ picture.vector).tolist(), strict=True):
            label = self.names[prompt.label]
            yield PromptCosine(label, prompt.text, prompt.template, prompt.alias, prompt.weight, cosine)


class _Crops:
    """What the model sees of pictures, made anew as their rows come."""

    def __init__(self, inputs: Input | Iterable[Input], model: Model, options: ClassifyOptions) -> None:
        self._inputs = inputs
        self._waiting: deque[Item] = deque()
        config = model.config
        self._prepare = make_prepare(
            config.preprocess, config.vision.image_size, options.pixels, options.crop, None, options.decode
        )

    def items(self) -> Iterator[Item]:
        """The inputs, on their way to the model."""
        for item in sources(self._inputs):
            self._waiting.append(item)
            yield item

    def next(self) -> NDArray[np.uint8] | None:
        """The next one's crop, uint8 [3, H, W]."""
        item = self._waiting.popleft()
        prepared = self._prepare(item) if isinstance(item, Source) else None
        return None if prepared is None or isinstance(prepared, Failure) else prepared.square
