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
from clipcli.records import Embedded, Evidence, Failure, Item, PromptCosine, Row, Source
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
    size, transform = model.config.vision.image_size, model.config.preprocess
    prepare = make_prepare(transform, size, options.pixels, options.crop, None, options.decode)
    waiting: deque[Item] = deque()  # those whose rows are to come

    def items() -> Iterator[Item]:
        for item in sources(inputs):
            waiting.append(item)
            yield item

    def next_crop() -> NDArray[np.uint8] | None:
        item = waiting.popleft()
        prepared = prepare(item) if isinstance(item, Source) else None
        return None if prepared is None or isinstance(prepared, Failure) else prepared.square

    def explained(burst: Burst) -> Iterator[Row]:
        for item, row in zip(burst, rows(burst), strict=True):
            crop = next_crop()
            if isinstance(row, Failure) or isinstance(item, Failure):
                yield row
                continue
            prompts = [one for part in spoken for one in part.cosines(item)]
            wanted = tuple(one for candidate in row.top for one in prompts if one.label == candidate.label)
            saved = None if options.save_crop is None or crop is None else str(options.save_crop / crop_name(row.path))
            yield replace(row, evidence=Evidence(wanted, crop, saved))

    return map(explained, embed_in_bursts(items(), model, options))


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
