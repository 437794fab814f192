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


def flag(*names: str, **how: Any) -> Any:
    """An option without a value."""
    return typer.Option(*names, metavar="", **how)


class Panel(str):
    """A panel of the help page, and what makes options in it."""

    def option(self, *names: str, **how: Any) -> Any:
        """An option with a value; its name is the parameter's unless `names` has a long one."""
        return typer.Option(*names, rich_help_panel=self, **how)

    def flag(self, *names: str, **how: Any) -> Any:
        """A flag."""
        return flag(*names, rich_help_panel=self, **how)


INPUT, CLASSIFIER, OUTPUT, SPEED, TALK = map(Panel, ("Input", "Classifier", "Output", "Speed", "Talk"))

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


def _words(*names: str, **how: Any) -> Any:
    """One of the ways to say the labels: only those of one kind count."""
    return CLASSIFIER.option(*names, callback=_unless_typed, **how)


def _speed(name: str, *more: str, **how: Any) -> Any:
    """Each has its variable: CLIPCLI_BATCH_SIZE for --batch-size."""
    return SPEED.option(name, *more, envvar=f"CLIPCLI_{name[2:].replace('-', '_').upper()}", **how)


# ---- Input

Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUT",
        help="Pictures, folders, archives (.tar, .tar.gz, .zip) or archive.tar::member, a file that embed wrote, or - "
        "for one picture's bytes on stdin. Without any, stdin is a list of paths.",
    ),
]
FilesFrom = Annotated[str | None, INPUT.option(metavar="FILE", help="Read paths from FILE (- for stdin), one a line.")]
Null = Annotated[bool, INPUT.flag("--null", "-0", help="Lists read are NUL-separated.")]
Include = Annotated[
    list[str] | None, INPUT.option(metavar="GLOB", help="In folders and archives, only names that match (repeatable).")
]
Exclude = Annotated[
    list[str] | None, INPUT.option(metavar="GLOB", help="In folders and archives, no names that match (repeatable).")
]
Follow = Annotated[bool, INPUT.flag("--follow", help="Follow links to folders.")]
PixelPolicy = Annotated[
    Literal["auto", "reference"],
    INPUT.option(
        help="auto: turned upright, transparency on white, 16 bit scaled, colours to sRGB; "
        "reference: bit for bit what the original code does."
    ),
]
CropPolicy = Annotated[
    Literal["model", "center", "squash", "pad"],
    INPUT.option(help="How a picture becomes square; model: the checkpoint's own way."),
]
DecodePolicy = Annotated[
    Literal["auto", "exact"],
    INPUT.option(
        help="auto: a faster decoder and resizing, where pixels differ by little; exact: Pillow's, and nothing else."
    ),
]

# ---- Classifier

Model = Annotated[
    str | None,
    CLASSIFIER.option(
        "--model",
        "-m",
        metavar="MODEL",
        envvar="CLIPCLI_MODEL",
        autocompletion=complete.models,
        help="A name of models list, org/name[@revision] on the Hub, or a path: a directory (open_clip or transformers "
        "layout) or a .safetensors / .pt file. Default: ViT-B-32-256-datacomp; tiny needs no download.",
        show_default=False,
    ),
]
Offline = Annotated[
    bool, CLASSIFIER.flag("--offline", envvar="CLIPCLI_OFFLINE", help="Never download; use what is here.")
]
LabelFiles = Annotated[
    list[str] | None, _words("--labels", "-l", metavar="FILE", help="Labels: text, CSV, TSV or JSON.")
]
InlineLabels = Annotated[list[str] | None, _words("--label", "-L", metavar="LABEL", help="One label (repeatable).")]
Prompts = Annotated[
    Path | None, _words(metavar="FILE", help='Whole sentences in place of templates: {"label": ["sentence", ...]}.')
]
Templates = Annotated[
    list[str] | None,
    CLASSIFIER.option(
        "--templates",
        "-t",
        metavar="SET",
        envvar="CLIPCLI_TEMPLATES",
        callback=whole_variable,
        autocompletion=complete.templates,
        help='Template set, file, or literal such as "a photo of a <>." (repeatable). Default: imagenet7.',
        show_default=False,
    ),
]
ClassifierFile = Annotated[
    Path | None,
    _words(
        "--classifier", "-c", metavar="FILE", help="A classifier file made by build-classifier, in place of labels."
    ),
]
Truncate = Annotated[bool, CLASSIFIER.flag("--truncate", help="Cut prompts that are too long, not refuse them.")]
Vocabulary = Annotated[
    Path | None,
    CLASSIFIER.option(metavar="FILE", help="The model's BPE vocabulary, where it doesn't lie beside the weights."),
]
ActivationOf = Annotated[
    Literal["quick_gelu", "gelu"] | None, CLASSIFIER.option(help="For a bare state dict, which doesn't tell.")
]
HeadWidth = Annotated[
    int | None,
    CLASSIFIER.option(metavar="N", min=1, help="For a bare state dict: channels an attention head, where not 64."),
]

# ---- Output

Output = Annotated[
    Path | None, OUTPUT.option("--output", "-o", metavar="FILE", help="Write rows to FILE, not to stdout.")
]
Json = Annotated[bool, OUTPUT.flag("--json", help="Print JSON.")]
Format = Annotated[
    Literal["auto", "table", "tsv", "csv", "jsonl", "paths"],
    OUTPUT.option(
        "--format", "-f", help="auto: by the ending of --output, else a table on a terminal and tsv in a pipe."
    ),
]
TopK = Annotated[
    int | None, OUTPUT.option("--top-k", "-k", metavar="N", min=1, help="Labels a row. Default: 1, in jsonl 5.")
]
Print0 = Annotated[bool, OUTPUT.flag("--print0", help="With -f paths: NUL after each path, for xargs -0.")]
Force = Annotated[bool, OUTPUT.flag("--force", help="Replace an existing output file.")]
SaveCrop = Annotated[
    Path | None, OUTPUT.option(metavar="DIR", help="Write what the model saw to DIR: a PNG a picture.")
]
Strict = Annotated[bool, OUTPUT.flag("--strict", help="Stop at the first failing picture.")]
Resume = Annotated[bool, OUTPUT.flag("--resume", help="Go on with FILE where an earlier run stopped.")]
RetryFailed = Annotated[
    bool,
    OUTPUT.flag("--retry-failed", help="The same, and try the pictures again that failed: their rows are replaced."),
]

# ---- Speed

BatchSize = Annotated[
    int | None,
    _speed("--batch-size", "-b", metavar="N", min=1, max=65_536, help="Pictures a batch. Default: by device."),
]
Workers = Annotated[
    int | None,
    _speed("--workers", "-j", metavar="N", min=1, max=1024, help="Threads that decode pictures. Default: one a CPU."),
]
Device = Annotated[
    str,
    _speed("--device", "-d", metavar="DEVICE", autocompletion=complete.devices, help="auto, cpu, cuda, cuda:N or mps."),
]
PrecisionOf = Annotated[
    Literal["auto", "fp32", "fp16", "bf16", "int8"],
    _speed(
        "--precision",
        "-p",
        help="auto: fp16 on CUDA with tensor cores, else fp32. int8: on a CPU, pictures alone, by ONNX Runtime.",
    ),
]
RuntimeOf = Annotated[
    Literal["auto", "torch", "onnx"],
    _speed(
        "--runtime",
        help="What runs the image tower. onnx: ONNX Runtime, on a CPU. auto: torch, but onnx for int8 and ResNets.",
    ),
]
NoCache = Annotated[bool, _speed("--no-cache", metavar="", help="Neither read nor fill the store.")]
CacheSize = Annotated[
    str | None,
    _speed(
        "--cache-size",
        metavar="SIZE",
        help="Room for values in the store (500MB, 10GB); those not used for longest go. Default: 2GiB.",
    ),
]

# ---- Talk

Quiet = Annotated[bool, TALK.flag("--quiet", "-q", help="Nothing but errors on stderr.")]
Verbose = Annotated[bool, TALK.flag("--verbose", "-v", help="Say what was chosen and what was reused.")]
Color = Annotated[Literal["auto", "always", "never"], TALK.option(envvar="CLIPCLI_COLOR", help="Colour on terminals.")]
Debug = Annotated[bool, TALK.flag("--debug", help="Show tracebacks.")]


def byte_count(text: str, option: str) -> int:
    """`500MB` in bytes; MB are millions, MiB are 2**20. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?|[kmg]i)b?", text.strip().lower())
    if not found:
        raise UsageError(f'{option} "{text}" is no size', hint="write 500MB, 2GB or 2GiB")
    return int(float(found[1]) * _BYTES[found[2]])


def epilog(*examples: str) -> str:
    """Commands that really work, for the end of a `--help` page."""
    return "\n\n".join(["[bold]Examples[/bold]", *(example.replace("[", r"\[") for example in examples)])
