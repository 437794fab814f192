"""A vocabulary in the forms that other tools read: Hugging Face's `tokenizers` and `transformers`, and open_clip.

Comes in: a Tokenizer. Goes out: the content of its files by name. Those tools don't repair broken text or resolve
`&amp;`, take a literal `<|endoftext|>` for the token, and write a Greek sigma at the end of a word as any other; all
else gets the same ids.
"""

from __future__ import annotations

import json
from typing import Any

from clipcli.tokenizer import END_OF_WORD, ENDS, STARTS, Tokenizer
from clipcli.weights.folder import IDS, SPECIAL_TOKENS, TOKENIZER_CONFIG

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def vocabulary_files(tokenizer: Tokenizer, context_length: int) -> dict[str, bytes]:
    """All forms of a vocabulary, by the names that they have in a model's folder."""
    start, end = STARTS[0], ENDS[0]
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "do_lower_case": True,
        "errors": "replace",
        **special,
    }
    merges = tokenizer.merges
    return {
        "merges.txt": "".join(f"{line}\n" for line in ["#version: 0.2", *merges]).encode(),
        IDS: as_json(tokenizer.ids),
        "tokenizer.json": as_json(_tokenizer(tokenizer, merges)),
        TOKENIZER_CONFIG: as_json(settings),
        SPECIAL_TOKENS: as_json(special),
    }


def as_json(value: object) -> bytes:
    """A value as a JSON file; a name that is no UTF-8 with JSON's own escapes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _tokenizer(tokenizer: Tokenizer, merges: list[str]) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    start, end = (STARTS[0], tokenizer.start_token), (ENDS[0], tokenizer.end_token)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **plain} for token, i in (start, end)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Removed", "invert": True},
                byte_level,
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": end,
            "cls": start,
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": ENDS[0],
            "continuing_subword_prefix": "",
            "end_of_word_suffix": END_OF_WORD,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": tokenizer.ids,
            "merges": merges,
        },
    }
