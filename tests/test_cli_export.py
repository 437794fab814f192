"""`clipcli models export` at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from conftest import Run
from test_house import HEAVY, modules_after

from clipcli.weights.load import load_checkpoint


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_the_copy_classifies_alike(cli: Run, model: Path, photos: Path, layout: str, tmp_path: Path) -> None:
    result = cli("models", "export", model, "--layout", layout, "-o", tmp_path / "copy")
    files = len(list((tmp_path / "copy").iterdir()))
    assert (result.code, result.out) == (0, b"")
    assert f"written to {tmp_path / 'copy'} in the layout of {layout}: {files} files, " in result.err
    assert ("hf_tokenizer_name" in result.err) == (layout == "open_clip")
    answers = [
        cli("classify", photos, "-L", "cat", "-L", "rocket", "-f", "jsonl", "-q", "-m", path).out
        for path in (model, tmp_path / "copy")
    ]
    assert answers[0] == answers[1] != b""


def test_a_bare_file_becomes_a_folder(cli: Run, tmp_path: Path) -> None:
    weights = tiny.save(tmp_path, "torchscript", tiny.resnet(activation="quick_gelu"), vocabulary=False)
    words = tiny.save(tmp_path / "other") / "merges.txt"
    bare = ("models", "export", weights, "--layout", "open_clip", "-o", tmp_path / "rn", "--head-width", 16)
    result = cli(*bare)
    assert (result.code, "no vocabulary beside the weights" in result.err) == (2, True)
    assert cli(*bare, "--vocabulary", words, "-q").err == ""
    assert load_checkpoint(tmp_path / "rn").config == tiny.resnet(activation="quick_gelu")
    result = cli("models", "export", tmp_path / "rn", "--layout", "transformers", "-o", tmp_path / "hf")
    assert result.code == 2
    assert result.err == (
        f"clipcli: {tmp_path / 'rn'}: transformers has no CLIP with a ResNet, and its layout no words for one\n"
        "hint: use --layout open_clip\n"
    )
    assert not (tmp_path / "hf").exists()


def test_an_existing_folder_needs_force(cli: Run, model: Path, tmp_path: Path) -> None:
    export = ("models", "export", model, "--layout", "transformers", "-o", tmp_path / "out")
    assert cli(*export).code == 0
    config = (tmp_path / "out" / "config.json").read_bytes()
    (tmp_path / "out" / "config.json").write_bytes(b"{}")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    result = cli(*export)
    assert (result.code, result.err) == (
        2,
        f"clipcli: {tmp_path / 'out'}: exists already\nhint: use --force to replace the model in it\n",
    )
    assert cli(*export, "--force").code == 0
    assert (tmp_path / "out" / "config.json").read_bytes() == config
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_wrong_use_is_told_before_anything_is_looked_for(cli: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = cli("models", "export", "org/name", "--layout", "open_clip", "-o", tmp_path / "file")
    assert (result.code, "is no folder" in result.err) == (2, True)
    result = cli("models", "export", model, "-o", tmp_path / "out")
    assert result.code == 2
    assert result.err.startswith("clipcli: missing option '--layout': choose from open_clip, transformers\n")
    result = cli("models", "export", model, "--layout", "onnx", "-o", tmp_path / "out")
    assert (result.code, "'onnx'" in result.err) == (2, True)
    result = cli("models", "export", tmp_path / "nowhere", "--layout", "open_clip", "-o", tmp_path / "out")
    assert (result.code, "no such file or folder" in result.err) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_names_are_made_safe(cli: Run, model: Path, tmp_path: Path) -> None:
    result = cli("models", "export", model, "--layout", "transformers", "-o", tmp_path / "a\x1b[31mb")
    assert (result.code, "\x1b" in result.err) == (0, False)
    assert json.loads((tmp_path / "a\x1b[31mb" / "config.json").read_text())["model_type"] == "clip"


def test_help(cli: Run) -> None:
    page = cli("models", "export", "--help").out.decode()
    assert page.partition("Examples")[2].count("clipcli models export") >= 3
    code = "sys.stdout = io.StringIO(); from clipcli.cli.main import run; run(['models', 'export', '--help'])"
    assert not modules_after(f"import io; {code}; sys.stdout = sys.__stdout__") & set(HEAVY)
