"""`clipcli models export`: a model written anew, in the layout that another program reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from clipcli.cli import complete
from clipcli.cli import options as opt
from clipcli.cli.console import Talk
from clipcli.cli.request import ModelChoice

EXAMPLES = opt.epilog(
    "clipcli models export models/my-clip --layout transformers -o my-clip-hf",
    "clipcli models export tiny --layout open_clip -o tiny-copy",
    "clipcli models export RN50.pt --layout open_clip --vocabulary merges.txt -o rn50",
    "clipcli models export ViT-B-16-openai --layout transformers -o clip-b16 --force",
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        envvar="CLIPCLI_MODEL",
        help="As --model elsewhere: a name, org/name on the Hub, or a path.",
        autocompletion=complete.models,
    ),
]
Layout = Annotated[
    Literal["open_clip", "transformers"],
    opt.OUTPUT.option(
        "--layout", help="Who shall read it. transformers has no CLIP with a ResNet.", show_default=False
    ),
]
Folder = Annotated[
    Path, opt.OUTPUT.option("--output", "-o", metavar="DIR", help="The folder to write, whole or not at all.")
]
Force = Annotated[
    bool, opt.OUTPUT.flag("--force", help="Replace the model in an existing folder; its other files stay.")
]


def export(
    name: Model,
    layout: Layout,
    output: Folder,
    force: Force = False,
    vocabulary: opt.Vocabulary = None,
    activation: opt.ActivationOf = None,
    head_width: opt.HeadWidth = None,
    offline: opt.Offline = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """Write a model in the layout of open_clip or transformers, with its vocabulary and a card.

    The same weights, in the precision that they have; the card says where they come from.
    """
    choice = ModelChoice(name, "cpu", "fp32", activation, head_width, vocabulary, no_cache=True, offline=offline)
    choice.check()
    from clipcli.weights.catalog import size_text
    from clipcli.weights.export import check_place, export_model, has_own_vocabulary

    check_place(output, layout, force=force)
    with Talk(quiet=quiet, verbose=verbose, color=color).listening() as talk:
        with talk.working("looking for the model"):
            located = choice.locate(talk)
            checkpoint = choice.open(talk, located).checkpoint
        origin = ""  # what is shipped brings its own card
        if located.entry and not located.entry.shipped:
            origin = f"The weights are those of {located.entry.repo}, licence: {located.entry.licence}."
        with talk.working(f"writing {output}"):
            written = export_model(checkpoint, output, layout, force=force, origin=origin)
        size = size_text(sum(file.stat().st_size for file in written))
        talk.notice(f"{checkpoint.name} written to {output} in the layout of {layout}: {len(written)} files, {size}")
        if layout == "open_clip" and has_own_vocabulary(checkpoint.config):
            talk.notice(f"its vocabulary is its own: open_clip must be told by hf_tokenizer_name ({output}/README.md)")
