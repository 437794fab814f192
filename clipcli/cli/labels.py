"""`clipcli labels`: what is wrong in a label file, and the prompts that it makes.

Comes in: a label file, templates, perhaps a model or its vocabulary. Goes out: findings or prompts on stdout. No
picture is looked at; torch is imported only to compare labels (`lint` with a model).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipcli.cli import options as opt
from clipcli.cli.console import Talk, wants_color
from clipcli.cli.request import ModelChoice, Words
from clipcli.errors import ExitCode, UsageError, writing
from clipcli.output.text import counted, printable

if TYPE_CHECKING:
    from clipcli.records import Label, Template
    from clipcli.tokenizer import Tokenizer
    from clipcli.weights.model import Model
    from clipcli.zeroshot.lint import Finding

LINT_EXAMPLES = opt.epilog(
    "clipcli labels lint labels.txt",
    "clipcli labels lint labels.txt -m models/ViT-B-32 -t imagenet80",
    "clipcli labels lint labels.txt -m models/ViT-B-32 --similar 0.9",
    'clipcli labels lint labels.txt --strict --json | jq -r ".[].code" | sort | uniq -c',
)
SHOW_EXAMPLES = opt.epilog(
    "clipcli labels show labels.txt -t imagenet80 | head",
    "clipcli labels show labels.txt --label tabby --vocabulary merges.txt --tokens",
    "clipcli labels show labels.txt -m models/ViT-B-32 --json | jq 'max_by(.tokens)'",
)
STANDARD_LENGTH = 77  # tokens of a prompt, where a vocabulary is given without its model

app = typer.Typer(
    help="Check label files, and see their prompts.",
    epilog=LINT_EXAMPLES,
    no_args_is_help=True,
    rich_markup_mode="rich",
)

File = Annotated[str, typer.Argument(metavar="FILE", help="A label file: text, CSV, TSV or JSON.", show_default=False)]
Similar = Annotated[
    float,
    opt.CLASSIFIER.option(
        metavar="C",
        min=0,
        max=1,
        help="With a model: warn of labels whose class vectors have a higher cosine. 1: compare none.",
    ),
]
Strict = Annotated[bool, opt.OUTPUT.flag("--strict", help="Warnings count as errors.")]
Json = Annotated[bool, opt.OUTPUT.flag("--json", help="A list of objects.")]
Only = Annotated[
    list[str] | None,
    opt.OUTPUT.option("--label", "-L", metavar="NAME", help="Only this label (repeatable)."),
]
Tokens = Annotated[bool, opt.OUTPUT.flag("--tokens", help="Show the pieces a prompt is cut into.")]


@app.command(epilog=LINT_EXAMPLES)
def lint(
    file: File,
    model: opt.Model = None,
    offline: opt.Offline = False,
    templates: opt.Templates = None,
    similar: Similar = 0.95,
    vocabulary: opt.Vocabulary = None,
    activation: opt.ActivationOf = None,
    head_width: opt.HeadWidth = None,
    as_json: Json = False,
    strict: Strict = False,
    device: opt.Device = "auto",
    precision: opt.PrecisionOf = "auto",
    no_cache: opt.NoCache = False,
    cache_size: opt.CacheSize = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """Say all that is wrong in a label file, and all that is hardly meant.

    A line each, on stdout: FILE:LINE: level: message. A model's vocabulary
    counts tokens; a model also finds labels that it can hardly tell apart.
    Exit code 2: there are errors, so the file would be refused.
    """
    from clipcli.zeroshot.lint import Lint

    choice = ModelChoice(model, device, precision, activation, head_width, vocabulary, no_cache, offline, cache_size)
    with Talk(quiet=quiet, verbose=verbose, color=color).listening() as talk:
        checked = Lint(file, Words([file], None, None, templates, False).expanded())
        opened = _open(choice, talk) if model else None
        if counting := _vocabulary(choice, opened):
            checked.count(*counting)
        if opened and similar < 1:
            with talk.working("encoding prompts") as tick:
                checked.compare(opened, similar, tick)
        found = checked.found
        if as_json:
            put_json(map(asdict, found))
        else:
            put(_colored(finding, wants_color(sys.stdout, color)) for finding in found)
        errors = sum(finding.level == "error" for finding in found)
        summary = [counted(len(checked.labels), "label"), counted(errors, "error")]
        summary += [counted(len(found) - errors, "warning")]
        if checked.pairs_left_out:
            summary += [f"{counted(checked.pairs_left_out, 'more similar pair')} not told"]
        if counting:
            summary += [f"longest prompt {checked.longest} tokens, {counting[1]} fit"]
        talk.notice(", ".join(summary))
    raise typer.Exit(ExitCode.USAGE if errors or (strict and found) else ExitCode.OK)


@app.command(epilog=SHOW_EXAMPLES)
def show(
    file: File,
    templates: opt.Templates = None,
    only: Only = None,
    model: opt.Model = None,
    offline: opt.Offline = False,
    vocabulary: opt.Vocabulary = None,
    activation: opt.ActivationOf = None,
    head_width: opt.HeadWidth = None,
    tokens: Tokens = False,
    as_json: Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    color: opt.Color = "auto",
    debug: opt.Debug = False,
) -> None:
    """Show the prompts of a label file as they will be encoded.

    In a pipe a line each: LABEL, tab, PROMPT, and with a model (or its
    vocabulary) tab, number of tokens, the start and end token included.
    """
    choice = ModelChoice(model, "cpu", "fp32", activation, head_width, vocabulary, no_cache=True, offline=offline)
    words = Words([file], None, None, templates, False)
    with Talk(quiet=quiet, verbose=verbose, color=color).listening() as talk:
        labels = _only(words.labels(), only or [], file)
        expanded = words.expanded()
        counting = _vocabulary(choice, _open(choice, talk) if model else None)
        if tokens and not counting:
            raise UsageError("--tokens needs a vocabulary", hint="name a model with -m, or --vocabulary FILE")
        prompts = Prompts(labels, expanded, counting, tokens)
        if as_json:
            put_json(prompts)
        elif sys.stdout.isatty():
            put(_grouped(prompts, wants_color(sys.stdout, color)))
        else:
            put(map(_columns, prompts))
        summary = [counted(len(labels), "label"), counted(prompts.number, "prompt")]
        if counting:
            summary += [f"longest {prompts.longest} tokens, {counting[1]} fit"]
        if prompts.too_long:
            summary += [f"{prompts.too_long:,} too long: shorten them, or cut them with --truncate"]
        talk.notice(", ".join(summary))


def _open(choice: ModelChoice, talk: Talk) -> Model:
    with talk.working("loading the model"):
        return choice.open(talk)


def _vocabulary(choice: ModelChoice, model: Model | None) -> tuple[Tokenizer, int] | None:
    """A tokenizer and how many tokens fit: the model's, or one of a vocabulary alone."""
    from clipcli.tokenizer import Tokenizer

    if model:
        return model.tokenizer, model.config.text.context_length
    return (Tokenizer.from_file(choice.vocabulary), STANDARD_LENGTH) if choice.vocabulary else None


def _only(labels: list[Label], names: list[str], file: str) -> list[Label]:
    """The labels of these names, all if there are none."""
    from clipcli.zeroshot.files import propose

    known = [label.name for label in labels]
    for name in names:
        if name not in known:
            raise UsageError(f'{file}: no label "{name}"', hint=propose(name, known))
    return [label for label in labels if not names or label.name in names]


class Prompts:
    """Prompts as rows, made as they are asked for, and what they came to."""

    def __init__(
        self, labels: list[Label], templates: list[Template], counting: tuple[Tokenizer, int] | None, pieces: bool
    ) -> None:
        self.labels, self.templates, self.counting, self.pieces = labels, templates, counting, pieces
        self.number = self.longest = self.too_long = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from clipcli.zeroshot.prompts import fill

        for label in self.labels:
            for prompt in fill([label], self.templates):
                row: dict[str, Any] = {
                    "label": label.name,
                    "prompt": prompt.text,
                    "template": prompt.template,
                    "weight": prompt.weight,
                }
                if self.counting:
                    tokenizer, fit = self.counting
                    (ids,) = tokenizer([prompt.text])
                    self.longest = max(self.longest, len(ids))
                    self.too_long += len(ids) > fit
                    row |= {"tokens": len(ids), "fits": len(ids) <= fit}
                    if self.pieces:
                        row["pieces"] = tokenizer.tokens(prompt.text)
                self.number += 1
                yield row


def _columns(row: dict[str, Any]) -> str:
    columns = [row["label"], row["prompt"]]
    columns += [str(row["tokens"])] if "tokens" in row else []
    columns += [" ".join(row["pieces"])] if "pieces" in row else []
    return "\t".join(column.replace("\\", "\\\\") for column in columns)  # the rows of classify are escaped so too


def _grouped(rows: Iterable[dict[str, Any]], color: bool) -> Iterator[str]:
    """A label, and its prompts below it: number of tokens, weight where it isn't 1, `::` before a description."""
    bold, red, dim, end = ("\x1b[1m", "\x1b[31m", "\x1b[2m", "\x1b[0m") if color else ("",) * 4
    for name, group in groupby(rows, key=lambda row: row["label"]):
        yield f"{bold}{printable(name)}{end}"
        for row in group:
            number = f"{row['tokens']:>4}  " if "tokens" in row else "  "
            if not row.get("fits", True):
                number = f"{red}{number.rstrip()}!{end} "
            weight = f"{row['weight']:g} × " if row["weight"] != 1 else ""
            yield f"{number}{weight}{'' if row['template'] else ':: '}{printable(row['prompt'])}"
            if "pieces" in row:
                yield f"{'':6}{dim}{printable(' '.join(row['pieces']))}{end}"


def _colored(finding: Finding, color: bool) -> str:
    text = printable(str(finding))
    style = "31" if finding.level == "error" else "33"
    return text.replace(f" {finding.level}: ", f" \x1b[{style}m{finding.level}:\x1b[0m ", 1) if color else text


def put(lines: Iterable[str]) -> None:
    """Write lines to stdout as they come; bytes of names as they are. Raises OutputError."""
    with writing("stdout"):
        for line in lines:
            sys.stdout.buffer.write(line.encode(errors="surrogateescape") + b"\n")
        sys.stdout.flush()


def json_text(value: Any) -> str:
    """`value` as JSON on one line; in ASCII where it holds what a terminal should not see."""
    plain = json.dumps(value, ensure_ascii=False)
    return plain if plain.isprintable() else json.dumps(value)


def put_json(items: Iterable[dict[str, Any]]) -> None:
    """Write a JSON list to stdout, an object a line, as they come."""

    def lines() -> Iterator[str]:
        yield "["
        last = ""
        for item in items:
            if last:
                yield f"{last},"
            last = json_text(item)
        yield from filter(None, (last, "]"))

    put(lines())
