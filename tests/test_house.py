"""The house itself: nothing heavy at start, a public face that is what it says, a docstring on every door."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TypeGuard

import pytest
from conftest import Run

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "numpy", "PIL", "huggingface_hub", "ftfy", "regex", "transformers", "safetensors", "sqlite3")
PUBLIC = {
    "Candidate", "Classifier", "ClassifyOptions", "ClipcliError", "Comparison", "EmbedOptions", "Embedded",
    "Embeddings", "Failure", "Label", "Model", "Prediction", "Source", "Store", "__version__", "build_classifier",
    "classify", "compare", "embed", "embed_texts", "load_classifier", "load_embeddings", "load_model",
    "save_classifier", "save_embeddings",
}  # fmt: skip


def modules_after(code: str) -> set[str]:
    script = f"import sys, json\n{code}\nprint(json.dumps(list(sys.modules)), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.partition(".")[0] for name in json.loads(result.stderr.splitlines()[-1])}


@pytest.mark.parametrize(
    "args",
    [["--help"], ["classify", "--help"], ["build-classifier", "--help"], ["--version"], ["classify", "--nonsense"]],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = f"sys.stderr = open({os.devnull!r}, 'w'); from clipcli.cli.main import run; run({args!r})"
    assert not modules_after(code + "; sys.stderr = sys.__stderr__") & set(HEAVY)


def test_import_clipcli_imports_nothing_heavy() -> None:
    assert not modules_after("import clipcli") & {*HEAVY, "typer", "rich"}


def test_a_classifier_from_the_store_needs_no_torch(model: Path) -> None:
    run = f"from clipcli.cli.main import run; run(['build-classifier', '-L', 'cat', '-L', 'dog', '-m', {str(model)!r}])"
    first = modules_after(run)
    second = modules_after(run)
    assert "torch" in first and not {"torch", "PIL", "ftfy"} & second


def test_public_names() -> None:
    import clipcli

    assert set(clipcli.__all__) == PUBLIC
    assert all(getattr(clipcli, name) is not None for name in clipcli.__all__)
    assert {name for name in dir(clipcli) if name in PUBLIC} == PUBLIC
    with pytest.raises(AttributeError):
        clipcli.nonsense  # noqa: B018


def test_public_names_are_documented() -> None:
    import clipcli

    assert all(getattr(clipcli, name).__doc__ for name in PUBLIC - {"__version__"})


@pytest.mark.parametrize("path", sorted((ROOT / "clipcli").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    public = [node for node in tree.body if _is_public(node)]
    methods = [node for outer in public if isinstance(outer, ast.ClassDef) for node in outer.body if _is_public(node)]
    assert [node.name for node in public + methods if not ast.get_docstring(node)] == []


def _is_public(node: ast.stmt) -> TypeGuard[ast.FunctionDef | ast.ClassDef]:
    return isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")


def test_every_command_is_in_the_readme(cli: Run) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^│ ([a-z-]+) ", cli("--help").out.decode(), re.MULTILINE)
    assert {"classify", "build-classifier"} <= set(commands)
    for command in commands:
        if not command.startswith("-"):
            assert f"clipcli {command}" in readme


def test_version(cli: Run) -> None:
    from clipcli import __version__

    assert cli("--version").out.decode() == f"clipcli {__version__}\n"
    assert importlib.metadata.version("clipcli") == __version__


@pytest.mark.parametrize("command", ["classify", "build-classifier"])
def test_help_ends_with_examples(cli: Run, command: str) -> None:
    page = cli(command, "--help").out.decode()
    examples = page.partition("Examples")[2]
    assert examples.count("clipcli ") >= 3
    for panel in ("Classifier", "Output", "Speed", "Talk"):
        assert f"─ {panel} ─" in page
