"""The last lines of --verbose: where the time of a run went, and what would make it shorter."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from clipcli.output.text import counted

if TYPE_CHECKING:
    from clipcli.images.stages import Stages
    from clipcli.tasks.embed import EmbedOptions
    from clipcli.weights.model import Model

_NAMES = {"input": "input", "decoding": "waiting for decoding", "model": "model"}
_NAMES |= {"known": "fetching known embeddings", "rows": "scoring and writing"}


def report(options: EmbedOptions, model: Model) -> Iterator[str]:
    """The stages, largest first, and an advice about the first. Nothing where nothing happened."""
    stages = options.stages
    shares = stages.shares()
    if not shares:
        return
    yield "stages: " + ", ".join(f"{_NAMES[stage]} {share:.0%}" for stage, share in shares.items())
    if stages.workers:
        rate = f"; {stages.pictures / stages.seconds['model']:.1f} pictures/s in the model" if stages.pictures else ""
        yield f"{counted(stages.workers, 'decoding thread')} {stages.busy():.0%} busy{rate}"
    if model.busy:  # the device works while this process does other things
        yield "device: " + ", ".join(f"{name} {seconds / stages.wall:.0%} busy" for name, seconds in model.busy.items())
    yield _advice(next(iter(shares)), stages, options, model)


def _advice(first: str, stages: Stages, options: EmbedOptions, model: Model) -> str:
    if first == "model" and not stages.pictures:
        return "nothing had to be encoded"
    if first == "model" and model.on_cuda:
        return "the model sets the pace: try --precision fp16, a larger --batch-size, or a smaller model"
    if first == "model":
        faster = "" if model.arithmetic.startswith("onnx") else " or --precision int8 (clipcli bench compares)"
        return f"the model sets the pace: a GPU, a smaller model{faster} would help"
    if first == "decoding" and options.decode == "exact":
        return "decoding sets the pace: leave --decode exact out"
    if first == "decoding" and find_spec("simplejpeg") is None:
        return 'decoding sets the pace: pip install "clipcli[jpeg]" decodes JPEGs faster'
    if first == "decoding":
        return "decoding sets the pace: more --workers if CPUs are idle, or smaller pictures"
    if first == "input":
        return "whatever lists the pictures sets the pace"
    if first == "known":
        return "what is known sets the pace: from a file of clipcli embed it comes twice as fast as from the store"
    return "scoring and writing set the pace"
