"""The card of a model in training: the README.md of its folder, filled from the run's own figures."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from clipcli.model.config import ResNetConfig
from clipcli.output.text import printable
from clipcli.train.config import TrainConfig

if TYPE_CHECKING:
    from clipcli.train.loop import Trainer
    from clipcli.train.run import Request

_TEXT = """\
# {name}

A CLIP model (contrastive language-image pre-training, Radford et al. 2021), trained with `clipcli train`.

| | |
|-|-|
| image tower | {tower}, {size} px |
| text tower | {layers} layers, width {width}, context {context}, vocabulary {vocab:,} |
| embedding | {dim} dimensions |
| parameters | {parameters:,} |
| data | {pairs:,} pairs of {data} |
| steps | {step:,} of {steps:,}, {batch} pictures each |
| accuracy on pictures held out from training | {held} |

Use it with `clipcli classify photos/ --labels labels.txt -m {folder}`.

The folder has open_clip's layout. open_clip itself takes its built-in vocabulary of 49,408 entries unless
`hf_tokenizer_name` in `open_clip_config.json` names a folder with a tokenizer: set it to this folder's path.
{transformers}

Nobody has looked at what the data hold, or under which terms they come: say so here before you give the model
away.{terms}

## Settings that differ from the defaults

{settings}
"""


def card(trainer: Trainer, request: Request) -> str:
    """Markdown."""
    config, clip = trainer.config, trainer.clip_config
    resnet = isinstance(clip.vision, ResNetConfig)
    terms = f" It goes on from `{printable(config.init)}`, and that model's terms hold for it too."
    default = TrainConfig()
    changed = [f.name for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)]
    return _TEXT.format(
        name=printable(request.output.absolute().name),
        folder=printable(str(request.output)),
        tower="ModifiedResNet" if resnet else "ViT",
        size=clip.vision.image_size,
        layers=clip.text.layers,
        width=clip.text.width,
        context=clip.text.context_length,
        vocab=clip.text.vocab_size,
        dim=clip.embed_dim,
        parameters=sum(p.numel() for p in trainer.clip.parameters()),
        pairs=len(trainer.feed.chosen),
        data=", ".join(f"`{printable(Path(path).absolute().name)}`" for path in request.data),
        step=trainer.state.step,
        steps=trainer.steps,
        batch=config.batch_size,
        held=f"{trainer.state.best:.1%}" if len(trainer.feed.held) else "none were held out",
        terms=terms if config.init else "",
        transformers="transformers has no CLIP with a ResNet."
        if resnet
        else "`clipcli models export FOLDER --layout transformers -o DIR` makes a copy that transformers reads.",
        settings="\n".join(f"- `{name} = {getattr(config, name)!r}`" for name in changed) or "none",
    )
