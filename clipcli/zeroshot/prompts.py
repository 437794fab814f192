"""Labels and templates in, prompts and their token ids out.

It fills and counts; it doesn't read files (labels, templates), encode or average (classifier).
"""

from __future__ import annotations

from collections.abc import Sequence

from clipcli.errors import LabelError
from clipcli.records import Label, Prompt, Template
from clipcli.tokenizer import Tokenizer, cut


def fill(labels: Sequence[Label], templates: Sequence[Template]) -> list[Prompt]:
    """All prompts, label by label: its aliases in each template, then its descriptions.

    Raises LabelError for a label that no prompt would speak of.
    """
    prompts: list[Prompt] = []
    for index, label in enumerate(labels):
        before = len(prompts)
        prompts += [
            Prompt(template.text.replace("<>", alias), index, template.weight, template.text, alias)
            for alias in label.aliases
            for template in templates
        ]
        prompts += [Prompt(description, index) for description in label.descriptions]
        if len(prompts) == before:
            hint = "give it a template, or descriptions"
            raise LabelError(f'{_place(label)}label "{label.name}" has no prompt', hint=hint)
    return prompts


def tokenize(
    prompts: Sequence[Prompt],
    labels: Sequence[Label],
    tokenizer: Tokenizer,
    context_length: int,
    truncate: bool = False,
) -> list[list[int]]:
    """Token ids of each prompt with start and end: ragged, at most `context_length` each, not to be changed.

    Equal texts share one list. Raises LabelError for a prompt that is too long, unless `truncate` cuts it
    (the end token stays).
    """
    texts = dict.fromkeys(prompt.text for prompt in prompts)
    known = dict(zip(texts, tokenizer(texts), strict=True))
    for prompt in prompts:
        ids = known[prompt.text]
        if len(ids) > context_length:
            if not truncate:
                raise _too_long(prompt, labels[prompt.label], len(ids), context_length)
            known[prompt.text] = cut(ids, context_length)
    return [known[prompt.text] for prompt in prompts]


def _too_long(prompt: Prompt, label: Label, count: int, context_length: int) -> LabelError:
    kind, text = ("template", prompt.template) if prompt.template is not None else ("description", prompt.text)
    return LabelError(
        f'{_place(label)}label "{short(label.name)}" with {kind} "{short(text)}" '
        f"makes {count} tokens, {context_length} fit",
        hint="shorten it, or cut it with --truncate",
    )


def _place(label: Label) -> str:
    return f"{label.where}: " if label.where else ""


def short(text: str) -> str:
    """The beginning of a text, for messages."""
    return text if len(text) <= 60 else f"{text[:59]}…"
