"""What others make of the same weights: open_clip and transformers, where they can be imported.

In: a model, and a folder to write its checkpoint to in the layouts that they read. Out: `Peer`s, which gave the same
embeddings as clipcli, and for each other program an `Absent` that says why there is none. Only `bench`, and the scripts
in `benchmarks/`, look at them; nothing is timed here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipcli.errors import ClipcliError, UsageError
from clipcli.images.decode import open_picture
from clipcli.images.transform import normalise
from clipcli.records import Source
from clipcli.tasks.verify import made_pictures
from clipcli.weights.export import export_model, has_own_vocabulary
from clipcli.weights.model import Model

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 32  # pictures, in their loops
_LEAST = 0.99  # cosine between their embeddings and ours, in any precision
# What their documentation shows, for a folder, a picture and labels. Each prints the scores by label.
OPEN_CLIP = """
import json, sys
import open_clip, torch
from PIL import Image
folder, picture, *labels = sys.argv[1:]
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("ViT-B-32")
model.eval()
image = preprocess(Image.open(picture)).unsqueeze(0)
text = tokenizer([f"a photo of a {label}." for label in labels])
with torch.no_grad():
    image_features = model.encode_image(image, normalize=True)
    text_features = model.encode_text(text, normalize=True)
    scores = (model.logit_scale.exp() * image_features @ text_features.T).softmax(dim=-1)[0]
print(json.dumps(dict(zip(labels, scores.tolist()))))
"""
TRANSFORMERS = """
import json, sys
from transformers import pipeline
folder, picture, *labels = sys.argv[1:]
classify = pipeline("zero-shot-image-classification", model=folder, device="cpu")
rows = classify(picture, candidate_labels=labels, hypothesis_template="a photo of a {}.")
print(json.dumps({row["label"]: row["score"] for row in rows}))
"""


@dataclass(frozen=True)
class Peer:
    """Another program with a model's weights, on the model's device and in its precision."""

    name: str
    folder: Path  # the checkpoint in its layout
    image: Callable[[Tensor], Tensor]  # normalised pictures [B, 3, size, size] -> [B, embed_dim], not normalised
    text: Callable[[Tensor], Tensor]  # token ids [B, N] -> [B, embed_dim], not normalised
    prepare: Callable[[Any], Tensor]  # one of Pillow's pictures -> [3, size, size], normalised
    padded: int | None  # to how many ids a prompt is padded; None: to the longest of its batch
    script: str = ""  # "": none that works with this model

    def square(self, source: Source) -> Tensor:
        """A picture as its loop reads it."""
        return self.prepare(open_picture(source, "reference"))

    def answers(self, sources: Sequence[Source], weight: Tensor, *, workers: int) -> list[int]:
        """The best label of each picture, by a data loader and the usual loop. `weight` [labels, embed_dim]."""
        import torch
        from torch.utils.data import DataLoader, default_collate

        def squares(some: Sequence[Source]) -> Tensor:
            batch: Tensor = default_collate([self.square(source) for source in some])
            return batch

        found: list[int] = []
        pictures = DataLoader(sources, BATCH, num_workers=workers, collate_fn=squares)  # type: ignore[var-annotated, arg-type]
        with torch.inference_mode():
            for batch in pictures:
                unit = torch.nn.functional.normalize(self.image(batch).float(), dim=1)
                found += (unit @ weight.to(unit.device).T).argmax(dim=1).tolist()
        return found


@dataclass(frozen=True)
class Absent:
    """A program that can't be compared with, for this model."""

    model: str
    name: str
    why: str


def find(model: Model, folder: Path) -> Iterator[Peer | Absent]:
    """Everybody who is there, built from copies of the checkpoint in `folder`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read as they are imported: nothing is to be fetched
    for name, build in {"open_clip": _open_clip, "transformers": _transformers}.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs are not the user's
            try:
                peer = build(model, folder / name)
                _compare(peer, model)
            except (ImportError, OSError, ValueError, TypeError, RuntimeError, ClipcliError) as error:
                why = str(error).strip().splitlines() or [type(error).__name__]
                yield Absent(model.name, name, why[0])
            else:
                yield peer


def _open_clip(model: Model, folder: Path) -> Peer:
    package = import_module("open_clip")
    export_model(model.checkpoint, folder, "open_clip")
    tower, _, prepare = package.create_model_and_transforms(f"local-dir:{folder}")
    place = model.placement.device, model.placement.dtype
    tower.eval().to(*place)
    return Peer(
        name="open_clip",
        folder=folder,
        image=lambda pixels: tower.encode_image(pixels.to(*place)),
        text=lambda ids: tower.encode_text(ids.to(place[0])),
        prepare=prepare,
        padded=model.config.text.context_length,
        script="" if has_own_vocabulary(model.config) else OPEN_CLIP,  # it has one vocabulary built in
    )


def _transformers(model: Model, folder: Path) -> Peer:
    package = import_module("transformers")
    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()
    export_model(model.checkpoint, folder, "transformers")
    place = model.placement.device, model.placement.dtype
    image, text = (
        getattr(package, f"CLIP{kind}ModelWithProjection").from_pretrained(folder).eval().to(*place)
        for kind in ("Vision", "Text")
    )
    processor = package.AutoImageProcessor.from_pretrained(folder)
    return Peer(
        name="transformers",
        folder=folder,
        image=lambda pixels: image(pixel_values=pixels.to(*place)).image_embeds,
        text=lambda ids: text(input_ids=ids.to(place[0])).text_embeds,
        prepare=lambda picture: processor(picture, return_tensors="pt")["pixel_values"][0],
        padded=None,
        script=TRANSFORMERS,
    )


def _compare(peer: Peer, model: Model) -> None:
    """Raise UsageError unless its embeddings are ours."""
    import torch

    pictures = made_pictures(model.config)
    with torch.inference_mode():
        theirs = peer.image(torch.from_numpy(normalise(pictures, model.config.preprocess))).float().cpu().numpy()
    cosines = (theirs * model.encode_image(pictures)).sum(axis=1) / np.linalg.norm(theirs, axis=1)
    if not (cosines >= _LEAST).all():  # not a number is no match either
        raise UsageError(f"its embeddings are others (cosine {cosines.min():.3f})")
