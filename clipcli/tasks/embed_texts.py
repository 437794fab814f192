"""Sentences in, embeddings out: what `embed --text` does.

Each sentence is a prompt as it stands, without any template. Known ones come from the store. `embed_texts` neither
prints nor exits; where sentences come from is not its matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from clipcli.errors import LabelError
from clipcli.records import Embedded
from clipcli.tokenizer import cut
from clipcli.weights.model import Model
from clipcli.zeroshot.classifier import Progress, encode_prompts
from clipcli.zeroshot.prompts import short


def embed_texts(
    texts: Sequence[str],
    model: Model,
    *,
    truncate: bool = False,
    where: Sequence[str] = (),
    progress: Progress | None = None,
) -> Iterator[Embedded]:
    """The unit embedding of each sentence, which stands as `path` in its row.

    `where` are their places, for messages. Raises LabelError for one that is too long, unless `truncate` cuts it,
    VocabularyError, ModelError.
    """
    longest = model.config.text.context_length
    prompts = model.tokenizer(texts)
    for number, ids in enumerate(prompts):
        if len(ids) > longest and not truncate:
            place = where[number] if where else f"sentence {number + 1}"
            what = f'"{short(texts[number])}" makes {len(ids)} tokens, {longest} fit'
            raise LabelError(f"{place}: {what}", hint="shorten it, or cut it with --truncate")
        prompts[number] = cut(ids, longest)
    return map(Embedded, texts, encode_prompts(model, prompts, progress)[0]) if prompts else iter(())
