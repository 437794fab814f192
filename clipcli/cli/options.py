"""The options that commands share: one name, one letter, one meaning everywhere.

Each is an `Annotated` type, so that a command's signature is its list of options. `--help` shows them in panels.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from clipcli.cli import complete
from clipcli.errors import UsageError

INPUT, CLASSIFIER, OUTPUT, SPEED, TALK = "Input", "Classifier", "Output", "Speed", "Talk"

_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30}

WORDS = ("labels", "label", "prompts", "classifier")


def came_from(context: typer.Context, name: str | None, source: str) -> bool:
    """Whether an option's value was typed (COMMANDLINE), or comes from ENVIRONMENT or from a file (DEFAULT_MAP)."""
    found = context.get_parameter_source(name or "")
    return found is not None and found.name == source


def _unless_typed(context: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
    """Nothing, where a settings file has words of one kind and words of another kind were typed in their place."""
    replaced = any(came_from(context, name, "COMMANDLINE") for name in WORDS if name != param.name)
    return None if replaced and came_from(context, param.name, "DEFAULT_MAP") else value


def whole_variable(context: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
    """One value from the environment, which Typer would take apart at its blanks: a literal has some."""
    from_environment = came_from(context, param.name, "ENVIRONMENT")
    return [os.environ[str(param.envvar)]] if from_environment else value


# ---- Input

Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUT",
        help="Pictures, folders, archives (.tar, .tar.gz, .zip) or archive.tar::member, a file that embed wrote, or - "
        "for one picture's bytes on stdin. Without any, stdin is a list of paths.",
        show_default=False,
    ),
]
FilesFrom = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Read paths from FILE (- for stdin), one a line.", rich_help_panel=INPUT),
]
Null = Annotated[
    bool,
    typer.Option("--null", "-0", metavar="", help="Lists read are NUL-separated.", rich_help_panel=INPUT),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB", help="In folders and archives, only names that match (repeatable).", rich_help_panel=INPUT
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB", help="In folders and archives, no names that match (repeatable).", rich_help_panel=INPUT
    ),
]
Follow = Annotated[bool, typer.Option("--follow", metavar="", help="Follow links to folders.", rich_help_panel=INPUT)]
PixelPolicy = Annotated[
    Literal["auto", "reference"],
    typer.Option(
        "--pixels",
        help="auto: turned upright, transparency on white, 16 bit scaled, colours to sRGB; "
        "reference: bit for bit what the original code does.",
        rich_help_panel=INPUT,
    ),
]
CropPolicy = Annotated[
    Literal["model", "center", "squash", "pad"],
    typer.Option(
        "--crop", help="How a picture becomes square; model: the checkpoint's own way.", rich_help_panel=INPUT
    ),
]
DecodePolicy = Annotated[
    Literal["auto", "exact"],
    typer.Option(
        "--decode",
        help="auto: a faster decoder and resizing, where pixels differ by little; exact: Pillow's, and nothing else.",
        rich_help_panel=INPUT,
    ),
]

# ---- Classifier

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        envvar="CLIPCLI_MODEL",
        autocompletion=complete.models,
        help="A name of models list, org/name[@revision] on the Hub, or a path: a directory (open_clip or transformers "
        "layout) or a .safetensors / .pt file. Default: ViT-B-32-256-datacomp; tiny needs no download.",
        rich_help_panel=CLASSIFIER,
        show_default=False,
    ),
]
Offline = Annotated[
    bool,
    typer.Option(
        "--offline",
        metavar="",
        envvar="CLIPCLI_OFFLINE",
        help="Never download; use what is here.",
        rich_help_panel=CLASSIFIER,
    ),
]
LabelFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--labels",
        "-l",
        metavar="FILE",
        help="Labels: text, CSV, TSV or JSON.",
        rich_help_panel=CLASSIFIER,
        callback=_unless_typed,
    ),
]
InlineLabels = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        "-L",
        metavar="LABEL",
        help="One label (repeatable).",
        rich_help_panel=CLASSIFIER,
        callback=_unless_typed,
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='Whole sentences in place of templates: {"label": ["sentence", ...]}.',
        rich_help_panel=CLASSIFIER,
        callback=_unless_typed,
    ),
]
Templates = Annotated[
    list[str] | None,
    typer.Option(
        "--templates",
        "-t",
        metavar="SET",
        envvar="CLIPCLI_TEMPLATES",
        callback=whole_variable,
        autocompletion=complete.templates,
        help='Template set, file, or literal such as "a photo of a <>." (repeatable). Default: imagenet7.',
        rich_help_panel=CLASSIFIER,
        show_default=False,
    ),
]
ClassifierFile = Annotated[
    Path | None,
    typer.Option(
        "--classifier",
        "-c",
        metavar="FILE",
        help="A classifier file made by build-classifier, in place of labels.",
        rich_help_panel=CLASSIFIER,
        callback=_unless_typed,
    ),
]
Truncate = Annotated[
    bool,
    typer.Option(
        "--truncate",
        metavar="",
        help="Cut prompts that are too long, not refuse them.",
        rich_help_panel=CLASSIFIER,
    ),
]
Vocabulary = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The model's BPE vocabulary, where it doesn't lie beside the weights.",
        rich_help_panel=CLASSIFIER,
    ),
]
ActivationOf = Annotated[
    Literal["quick_gelu", "gelu"] | None,
    typer.Option("--activation", help="For a bare state dict, which doesn't tell.", rich_help_panel=CLASSIFIER),
]
HeadWidth = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="For a bare state dict: channels an attention head, where not 64.",
        rich_help_panel=CLASSIFIER,
    ),
]

# ---- Output

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write rows to FILE, not to stdout.", rich_help_panel=OUTPUT),
]
Format = Annotated[
    Literal["auto", "table", "tsv", "csv", "jsonl", "paths"],
    typer.Option(
        "--format",
        "-f",
        help="auto: by the ending of --output, else a table on a terminal and tsv in a pipe.",
        rich_help_panel=OUTPUT,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        "-k",
        metavar="N",
        min=1,
        help="Labels a row. Default: 1, in jsonl 5.",
        rich_help_panel=OUTPUT,
    ),
]
Print0 = Annotated[
    bool,
    typer.Option(
        "--print0",
        metavar="",
        help="With -f paths: NUL after each path, for xargs -0.",
        rich_help_panel=OUTPUT,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", metavar="", help="Replace an existing output file.", rich_help_panel=OUTPUT)
]
SaveCrop = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Write what the model saw to DIR: a PNG a picture.", rich_help_panel=OUTPUT),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", metavar="", help="Stop at the first failing picture.", rich_help_panel=OUTPUT),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", metavar="", help="Go on with FILE where an earlier run stopped.", rich_help_panel=OUTPUT),
]
RetryFailed = Annotated[
    bool,
    typer.Option(
        "--retry-failed",
        metavar="",
        help="The same, and try the pictures again that failed: their rows are replaced.",
        rich_help_panel=OUTPUT,
    ),
]

# ---- Speed

BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        "-b",
        metavar="N",
        min=1,
        max=65_536,
        envvar="CLIPCLI_BATCH_SIZE",
        help="Pictures a batch. Default: by device.",
        rich_help_panel=SPEED,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        "-j",
        metavar="N",
        min=1,
        max=1024,
        envvar="CLIPCLI_WORKERS",
        help="Threads that decode pictures. Default: one a CPU.",
        rich_help_panel=SPEED,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        "-d",
        metavar="DEVICE",
        envvar="CLIPCLI_DEVICE",
        autocompletion=complete.devices,
        help="auto, cpu, cuda, cuda:N or mps.",
        rich_help_panel=SPEED,
    ),
]
PrecisionOf = Annotated[
    Literal["auto", "fp32", "fp16", "bf16", "int8"],
    typer.Option(
        "--precision",
        "-p",
        envvar="CLIPCLI_PRECISION",
        help="auto: fp16 on CUDA with tensor cores, else fp32. int8: on a CPU, pictures alone, by ONNX Runtime.",
        rich_help_panel=SPEED,
    ),
]
RuntimeOf = Annotated[
    Literal["auto", "torch", "onnx"],
    typer.Option(
        "--runtime",
        envvar="CLIPCLI_RUNTIME",
        help="What runs the image tower. onnx: ONNX Runtime, on a CPU. auto: torch, but onnx for int8 and ResNets.",
        rich_help_panel=SPEED,
    ),
]
NoCache = Annotated[
    bool,
    typer.Option(
        "--no-cache",
        metavar="",
        envvar="CLIPCLI_NO_CACHE",
        help="Neither read nor fill the store.",
        rich_help_panel=SPEED,
    ),
]

CacheSize = Annotated[
    str | None,
    typer.Option(
        "--cache-size",
        metavar="SIZE",
        envvar="CLIPCLI_CACHE_SIZE",
        help="Room for values in the store (500MB, 10GB); those not used for longest go. Default: 2GiB.",
        rich_help_panel=SPEED,
    ),
]

# ---- Talk

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", metavar="", help="Nothing but errors on stderr.", rich_help_panel=TALK),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", metavar="", help="Say what was chosen and what was reused.", rich_help_panel=TALK),
]
Color = Annotated[
    Literal["auto", "always", "never"],
    typer.Option(envvar="CLIPCLI_COLOR", help="Colour on terminals.", rich_help_panel=TALK),
]
Debug = Annotated[bool, typer.Option("--debug", metavar="", help="Show tracebacks.", rich_help_panel=TALK)]


def byte_count(text: str, option: str) -> int:
    """`500MB` in bytes; MB are millions, MiB are 2**20. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?|[kmg]i)b?", text.strip().lower())
    if not found:
        raise UsageError(f'{option} "{text}" is no size', hint="write 500MB, 2GB or 2GiB")
    return int(float(found[1]) * _BYTES[found[2]])


def epilog(*examples: str) -> str:
    """Commands that really work, for the end of a `--help` page."""
    return "\n\n".join(["[bold]Examples[/bold]", *(example.replace("[", r"\[") for example in examples)])
