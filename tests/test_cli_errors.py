"""Bad input: one clear line and a hint on stderr, the right exit code, nothing on stdout, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from conftest import Run

LABELS = ("-L", "cat", "-L", "dog")


class Boom:
    """A pickle that would execute code."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def truncated(folder: Path) -> Path:
    path = tiny.save(folder)
    weights = path / "open_clip_model.safetensors"
    write(weights, weights.read_bytes()[:-1000])
    return path


def garbage(folder: Path) -> Path:
    path = tiny.save(folder)
    write(path / "open_clip_model.safetensors", b"no safetensors at all")
    return path


def without_weights(folder: Path) -> Path:
    path = tiny.save(folder)
    (path / "open_clip_model.safetensors").unlink()
    return path


def wrong_architecture(folder: Path) -> Path:
    path = tiny.save(folder)
    config = json.loads((path / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = "convnext_base"
    write(path / "open_clip_config.json", json.dumps(config))
    return path


def wrong_classifier(folder: Path) -> Path:
    from clipcli import build_classifier, load_model, save_classifier

    other = load_model(tiny.save(folder / "other", arrays=tiny.weights(tiny.vit(), seed=3)))
    save_classifier(build_classifier(other, ["cat", "dog"]), folder / "other.safetensors")
    return folder / "other.safetensors"


def long_label(folder: Path) -> Path:
    return write(folder / "labels.txt", "cat\n" + "x7" * 40 + "\n")


Arguments = Callable[[Path], list[object]]
CASES: dict[str, tuple[Arguments, int, str]] = {
    "no label": (lambda p: [], 2, "no labels"),
    "one label": (lambda p: ["-L", "cat"], 2, 'one label alone ("cat")'),
    "empty label file": (lambda p: ["-l", write(p / "labels.txt", "\n# nothing\n")], 2, "labels.txt"),
    "label twice": (
        lambda p: ["-l", write(p / "labels.txt", "# pets\ncat\ndog\n cat \n")],
        2,
        'labels.txt:4: label "cat" stands twice (first on line 2)',
    ),
    "label too long": (lambda p: ["-l", long_label(p)], 2, "labels.txt:2"),
    "label file missing": (lambda p: ["-l", p / "nowhere.txt"], 2, "nowhere.txt"),
    "label file not UTF-8": (lambda p: ["-l", write(p / "labels.txt", b"cat\nd\xffg\n")], 2, "labels.txt:2"),
    "label file and classifier": (lambda p: [*LABELS, "-c", p / "x.safetensors"], 2, "exclude each other"),
    "label is the unknown label": (lambda p: [*LABELS, "-L", "unknown"], 2, '"unknown"'),
    "template without placeholder": (
        lambda p: [*LABELS, "-t", write(p / "my.txt", "# mine\na photo of a cat\n")],
        2,
        "my.txt:2",
    ),
    "unknown template set": (lambda p: [*LABELS, "-t", "imagenet70"], 2, "imagenet70"),
    "unknown selection": (lambda p: [*LABELS, "--select", "cta"], 2, '--select "cta"'),
    "background repeats a label": (
        lambda p: [*LABELS, "--background", write(p / "rest.txt", "moon\ncat\n")],
        2,
        'label "cat" stands among the labels and in the background',
    ),
    "temperature of zero": (lambda p: [*LABELS, "--temperature", "0"], 2, "temperature"),
    "no model": (lambda p: [*LABELS, "-m", p / "nowhere"], 1, "nowhere: no such file or folder"),
    "model without weights": (lambda p: [*LABELS, "-m", without_weights(p / "m")], 1, "no weights"),
    "model without vocabulary": (
        lambda p: [*LABELS, "-m", tiny.save(p / "m", vocabulary=False)],
        2,
        "no vocabulary beside the weights",
    ),
    "truncated safetensors": (lambda p: [*LABELS, "-m", truncated(p / "m")], 1, "open_clip_model.safetensors"),
    "corrupt safetensors": (lambda p: [*LABELS, "-m", garbage(p / "m")], 1, "open_clip_model.safetensors"),
    "not plain CLIP": (lambda p: [*LABELS, "-m", wrong_architecture(p / "m")], 1, "timm_model_name"),
    "a pickle that executes": (
        lambda p: [*LABELS, "-m", write(p / "evil.pt", pickle.dumps(Boom(p / "canary")))],
        1,
        "evil.pt",
    ),
    "a folder without a model": (lambda p: [*LABELS, "-m", write(p / "d" / "a.txt", "x").parent], 1, "a.txt"),
    "classifier of another model": (lambda p: ["-c", wrong_classifier(p)], 1, '"other"'),
    "classifier missing": (lambda p: ["-c", p / "my.safetensors"], 2, "no such file"),
    "classifier that is a model": (
        lambda p: ["-c", tiny.save(p / "m") / "open_clip_model.safetensors"],
        1,
        "no classifier",
    ),
    "classifier garbage": (lambda p: ["-c", write(p / "my.safetensors", b"\x00" * 64)], 1, "my.safetensors"),
    "input missing": (lambda p: [*LABELS, p / "nowhere.jpg"], 2, "nowhere.jpg"),
    "list missing": (lambda p: [*LABELS, "--files-from", p / "list"], 2, "list: no such file"),
    "picture and list on stdin": (lambda p: [*LABELS, "-", "--files-from", "-"], 2, "stdin"),
    "output exists": (lambda p: [*LABELS, "-o", write(p / "a.csv", "old")], 2, "exists already"),
    "output is a folder": (lambda p: [*LABELS, "-o", p], 2, "is a folder"),
    "output folder missing": (lambda p: [*LABELS, "-o", p / "x" / "a.csv"], 1, "does not exist"),
    "unknown option": (lambda p: [*LABELS, "--formt", "csv"], 2, "--formt"),
    "unknown format": (lambda p: [*LABELS, "-f", "xml"], 2, "xml"),
    "unknown device": (lambda p: [*LABELS, "-d", "gpu"], 2, 'unknown device "gpu"'),
    "absent device": (lambda p: [*LABELS, "-d", "cuda:77"], 2, '"cuda:77" is not there'),
    "print0 without paths": (lambda p: [*LABELS, "--print0"], 2, "--print0"),
    "activation contradicts": (lambda p: [*LABELS, "--activation", "quick_gelu"], 2, "gelu, not quick_gelu"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(
    cli: Run, model: Path, photos: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, code, message = CASES[case]
    monkeypatch.setenv("CLIPCLI_MODEL", str(model))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    typed = arguments(tmp_path)
    made = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = cli("classify", photos / "rocket.jpg", *typed)
    lines = result.err.splitlines()
    assert (result.code, result.out) == (code, b""), result.err
    assert lines[0].startswith("clipcli: ") and message in lines[0]
    assert lines[0][9:10] == lines[0][9:10].lower() or lines[0][9] in "/"
    assert not lines[0].endswith(".")
    assert len(lines) == 2 and lines[1].startswith("hint: "), result.err
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == made | before  # nothing half-written, no canary


def test_an_absent_model_is_the_default_one(
    cli: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    result = cli("classify", photos, *LABELS, "--offline")
    assert result.code == 1
    assert result.err == (
        "clipcli: ViT-B-32-256-datacomp is not there in the cache, and this run is offline\n"
        "hint: get it once with the network: clipcli models pull ViT-B-32-256-datacomp\n"
    )


def test_no_input_on_a_terminal_shows_the_help(cli: Run) -> None:
    result = cli("classify")
    assert result.code == 2 and result.out == b""
    assert "Usage: clipcli classify" in result.err


def test_unwritable_output(cli: Run, photos: Path, model: Path) -> None:
    result = cli("classify", photos / "rocket.jpg", *LABELS, "-m", model, "-o", "/proc/rows.csv")
    assert result.code == 1 and result.err.startswith("clipcli: /proc/rows.csv: ")


def test_a_full_disk(cli: Run, photos: Path, model: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    result = cli("classify", photos / "rocket.jpg", *LABELS, "-m", model, "-o", "/dev/full", "--force")
    assert result.code == 1
    assert result.err.splitlines()[0] == "clipcli: /dev/full: can't be written: no space left on device"


def test_debug_keeps_the_traceback(cli: Run, photos: Path) -> None:
    result = cli("classify", photos / "nowhere.jpg", *LABELS, "--debug")
    assert "Traceback" in result.err and result.err.splitlines()[-2].startswith("clipcli: ")


def test_a_bug_keeps_its_traceback(cli: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("clipcli.cli.streams.check_inputs", broken)
    result = cli("classify", photos, *LABELS, "-m", "x")
    assert result.code == 1
    assert "ZeroDivisionError: a bug" in result.err and "please report" in result.err


def test_control_characters_of_names_do_not_reach_the_terminal(cli: Run, tmp_path: Path) -> None:
    result = cli("classify", tmp_path / "a\x1b[31m\n.jpg", *LABELS)
    assert "\x1b" not in result.err and "\\x1b" in result.err


def test_force_never_overwrites_what_the_run_reads(cli: Run, tmp_path: Path, photos: Path) -> None:
    """Labels, list, model and pictures: refused, by whatever way they came in, and left as they were."""
    model = tiny.save(tmp_path / "m")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    (tmp_path / "list").write_text("a.jpg\n")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes((photos / "rocket.jpg").read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    labels = ("-l", tmp_path / "labels.txt", "-m", model, "--force")
    for path in before:
        given = ("--files-from", tmp_path / "list") if path.name == "list" else (tmp_path / "pictures",)
        result = cli("classify", *given, *labels, "-o", path)
        assert result.code == 2 and "hint: " in result.err, path
        result = cli("build-classifier", *labels[:-1], "--force", "-o", path) if path.name != "list" else result
        assert result.code == 2, path
    assert {path: path.read_bytes() for path in before} == before
