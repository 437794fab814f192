"""Completion as shells ask for it, and what is proposed for words that are none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from conftest import Run

from clipcli.cli import complete

SCRIPT = "from clipcli.cli.main import main; main()"


def ask(line: str, shell: str, folder: Path, action: str = "get-args", code: int = 0) -> str:
    """What the shell gets for `line`, whose last word is completed."""
    words = line.split(" ")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "_CLIPCLI_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
            "_TYPER_COMPLETE_ARGS": line,
            "_TYPER_COMPLETE_FISH_ACTION": action,
        },
    )
    assert (result.returncode, result.stderr) == (code, "")
    return result.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("clipcli cl", ["classify"]),
        ("clipcli cache cl", ["clear"]),
        ("clipcli classify --forma", ["--format"]),
        ("clipcli classify -f js", ["jsonl"]),
        ("clipcli classify -d c", ["cpu", "cuda"]),
        ("clipcli classify -p f", ["fp32", "fp16"]),
        ("clipcli classify -t imagenet", ["imagenet7", "imagenet80"]),
        ("clipcli build-classifier -m ViT-L-14-o", ["ViT-L-14-openai"]),
        ("clipcli classify -m ViT-L/14@", ["ViT-L/14@336px"]),
        ("clipcli classify -l labels.txt -L moon --select ", ["cat", "tabby\\ cat", "moon"]),
        ("clipcli classify -l broken.txt --select ", []),
        ("clipcli classify -m ./mod", []),  # the shell knows paths itself
        ("clipcli cache clear --kind pr", ["prompt"]),
    ],
)
def test_bash(tmp_path: Path, line: str, expected: list[str]) -> None:
    (tmp_path / "labels.txt").write_text("cat\ntabby cat\n")
    (tmp_path / "broken.txt").write_text("cat\ncat\n")
    assert ask(line, "bash", tmp_path).split("\n") == [*expected, ""] if expected else [""] * 2


def test_zsh_and_fish(tmp_path: Path) -> None:
    assert ask("clipcli classify -f js", "zsh", tmp_path) == "_arguments '*: :((\"jsonl\"))'\n"
    assert ask("clipcli classify -m ./x", "zsh", tmp_path) == "_files\n"
    assert ask("clipcli classify -t imagenet", "fish", tmp_path) == "imagenet7\nimagenet80\n"


def test_fish_hears_whether_there_is_anything_to_offer(tmp_path: Path) -> None:
    ask("clipcli classify -t imagenet", "fish", tmp_path, action="is-args", code=0)
    ask("clipcli classify -t nonsense", "fish", tmp_path, action="is-args", code=1)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_a_real_bash_completes(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "clipcli"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{SCRIPT}'\n")
    program.chmod(0o755)
    script = """
        eval "$(_CLIPCLI_COMPLETE=source_bash clipcli)"
        complete -p clipcli
        COMP_WORDS=(clipcli classify -f js); COMP_CWORD=3
        _clipcli_completion clipcli js -f
        echo "${COMPREPLY[@]}"
    """
    result = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"},
    )
    assert result.stdout.splitlines() == ["complete -o default -F _clipcli_completion clipcli", "jsonl"]


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    for line in ("classify -m ViT-B-32-2", "classify -t imagenet", "classify -l labels.txt --select "):
        words = ["clipcli", *line.split(" ")]
        environment = {
            "_CLIPCLI_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(words),
            "COMP_CWORD": str(len(words) - 1),
        }
        code = "import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n" + SCRIPT
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=os.environ | environment
        )
        assert result.stdout.strip()
        loaded = {name.partition(".")[0] for name in result.stderr.split()}
        assert not loaded & {"torch", "numpy", "PIL", "huggingface_hub", "ftfy", "regex", "sqlite3"}


def test_checkpoints_of_this_disk_stand_beside_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "ViT-mine")
    (tmp_path / "ViT-B-32.pt").write_text("x")
    (tmp_path / "ViT-notes.txt").write_text("x")
    found = complete.models("ViT-")
    assert "ViT-B-32-256-datacomp" in found
    assert found[-2:] == ["ViT-B-32.pt", "ViT-mine"]


def test_a_shell_never_gets_what_it_could_execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.txt").write_text("cat\n\\\\$(touch x)\n`touch x`\na;b\na'b\na\"b\nhund & katze\nété\n")
    assert ask("clipcli classify -l labels.txt --select ", "zsh", tmp_path) == ('_arguments \'*: :(("cat"\n"été"))\'\n')
    (tmp_path / "ViT-$(touch x).pt").write_text("x")
    assert not any("touch" in name for name in complete.models("ViT-"))


# ---- did you mean


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["clasify"], "no such command 'clasify'", "did you mean classify?"),
        (["classify", "x", "--formt"], "no such option: --formt", "--format"),
        (["classify", "x", "-f", "jsonll"], "'jsonll' is not one of 'auto', 'table'", "did you mean jsonl?"),
        (["classify", "x", "-p", "fp33"], "'fp33' is not one of", "did you mean fp32"),
        (["classify", "x", "-f", "zzz"], "'zzz' is not one of", "see clipcli classify --help"),
        (["classify", "x", "--min-score", "2"], "'--min-score': 2.0 is not in the range 0<=x<=1", "see clipcli"),
        (["classify", "x", "-b", "x"], "'x' is no whole number", "see clipcli classify --help"),
        (["classify", "x", "-k"], "option '-k' requires an argument", "see clipcli --help"),
        (["cache", "inof"], "no such command 'inof'", "did you mean info?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_did_you_mean(cli: Run, args: list[str], message: str, hint: str) -> None:
    result = cli(*args)
    first, second = result.err.splitlines()
    assert (result.code, result.out) == (2, b"")
    assert first.startswith("clipcli: ") and message in first and not first.endswith(".")
    assert ": Input" not in first and second.startswith("hint: ") and hint in second
