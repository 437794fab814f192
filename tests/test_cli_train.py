"""`clipcli train` as a user meets it: what it says, what it leaves, how it ends."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import squares
import torch
from conftest import Result, Run
from test_house import HEAVY, modules_after

from clipcli.cli.console import Talk
from clipcli.cli.train import _signals
from clipcli.train import checkpoint
from clipcli.train.loop import Trainer
from clipcli.weights.model import load_model

SETS = squares.sets(squares.VIT)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return squares.make(tmp_path_factory.mktemp("squares") / "data", each=10)


@pytest.fixture
def train(cli: Run, data: Path, tmp_path: Path) -> Callable[..., Result]:
    """Train on the squares into `model`, with more words."""

    def run(*words: object, on: Path | None = None) -> Result:
        return cli("train", on or data, "-o", tmp_path / "model", "-j", 1, *SETS, *words)

    return run


def table(path: Path, data: Path, *more: str) -> Path:
    """The squares as a table of captions, with more rows."""
    rows = [f"{file},a {file.parent.name} square" for file in sorted(data.rglob("*.png"))]
    path.write_text("\n".join(["path,caption", *rows, *more, ""]))
    return path


# ---- a whole run


def test_what_it_says_and_leaves(train: Callable[..., Result], data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    result = train("--eval", data, "--eval", f"again={data}")
    assert (result.code, result.out) == (0, b"")
    lines = result.err.splitlines()
    assert re.fullmatch(
        r"clipcli: 24 pairs to learn from, 6 held out, kept in memory; [\d,]+ parameters, vocabulary of \d{3}", lines[0]
    )
    told = r"held out \d+\.\d%, data \d+\.\d%, again \d+\.\d%"
    for epoch, line in enumerate(lines[1:3], 1):
        assert re.fullmatch(
            rf"epoch {epoch}\.0 · step {2 * epoch}/4 · loss \d\.\d{{3}} · scale \d+\.\d · 32 px · [\d,]+ pictures/s · "
            rf"0:00 left · accuracy: {told}( \(kept\))?",
            line,
        )
    assert re.fullmatch(
        rf"clipcli: {re.escape(str(model))}: trained in 0:\d\d, accuracy: {told}; curves in curves.svg", lines[3]
    )
    assert lines[4] == f"clipcli: use it: clipcli classify photos/ -L cat -L dog -m {model}"
    best = [line for line in lines[1:3] if line.endswith(" (kept)")][-1]
    assert best.partition("accuracy: ")[2].removesuffix(" (kept)") in lines[3]  # of what is kept, not of the last
    assert {path.name for path in model.iterdir()} >= {"README.md", "log.csv", "curves.svg", checkpoint.NAME}
    assert squares.lines(model / "log.csv") == 5


def test_it_learns_to_classify(train: Callable[..., Result], cli: Run, tmp_path: Path) -> None:
    """From folders of squares to right answers of `clipcli classify` about squares that nobody has seen."""
    many = squares.make(tmp_path / "data", each=30)
    assert train("--epochs", 12, "--set", "ema=0.9", on=many).code == 0
    unseen = tmp_path / "unseen"
    unseen.mkdir()
    for number, colour in enumerate(squares.COLOURS):
        for i in range(10):
            (unseen / f"{colour}-{i}.png").write_bytes(squares.picture(colour, 50_000 + 100 * number + i))
    words = ("-L", "red", "-L", "green", "-L", "blue", "-f", "jsonl", "-q")
    result = cli("classify", unseen, *words, "-m", tmp_path / "model")
    assert result.code == 0 and len(result.rows) == 30
    right = sum(Path(row["path"]).name.startswith(row["label"]) for row in result.rows)
    assert right > 27


def test_transformers_gives_the_same_logits(train: Callable[..., Result], cli: Run, tmp_path: Path) -> None:
    from transformers import CLIPModel

    assert train("--epochs", 1).code == 0
    copy = tmp_path / "copy"
    assert cli("models", "export", tmp_path / "model", "--layout", "transformers", "-o", copy).code == 0
    ours = load_model(tmp_path / "model", device="cpu")
    theirs = CLIPModel.from_pretrained(copy).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    mean, std = (torch.tensor(x)[:, None, None] for x in (ours.config.preprocess.mean, ours.config.preprocess.std))
    ids = ours.tokenizer(["a red square.", "blue"])
    padded = torch.full((2, max(map(len, ids))), ours.tokenizer.vocab_size - 1)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    with torch.no_grad():
        wanted = theirs(input_ids=padded, pixel_values=(torch.from_numpy(pixels) / 255 - mean) / std).logits_per_image
    image = ours.encode_image(pixels)
    text = np.empty((2, image.shape[1]), np.float32)
    for places, vectors in ours.encode_text(ids):
        text[places] = vectors
    scale = np.exp(ours.checkpoint.arrays["logit_scale"])
    assert np.abs(scale * image @ text.T - wanted.numpy()).max() < 1e-4


def test_options_go_before_settings_before_the_recipe(train: Callable[..., Result], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('seed = 5\nlearning_rate = 1e-3\nepochs = 9\ncrop = "none"\n')
    result = train("--recipe", recipe, "--set", "learning-rate=2e-4", "--set", "epochs=7", "--epochs", 0.5, "-v")
    assert result.code == 0 and "\ncpu, fp32; 1 step\n" in result.err and "checkpoint after step 1" in result.err
    settings = json.loads((tmp_path / "model" / "training.json").read_text())["settings"]
    kept = {name: settings[name] for name in ("seed", "learning_rate", "epochs", "crop", "batch_size")}
    assert kept == {"seed": 5, "learning_rate": 2e-4, "epochs": 0.5, "crop": "none", "batch_size": 12}


def test_quiet(train: Callable[..., Result]) -> None:
    result = train("-q")
    assert (result.code, result.out, result.err) == (0, b"", "")


def test_tensorboard(train: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, float, int]] = []
    closed = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "model")

        def __enter__(self) -> SummaryWriter:
            return self

        def __exit__(self, *error: object) -> None:
            closed.append(True)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert train("--tensorboard").code == 0 and closed == [True]
    assert [step for name, _, step in told if name == "loss"] == [1, 2, 3, 4]
    assert [step for name, _, step in told if name == "held_out"] == [2, 4]


def test_tensorboard_that_is_not_there(
    train: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = train("--tensorboard")
    assert (result.code, result.err) == (
        2,
        'clipcli: --tensorboard needs a package that isn\'t installed\nhint: pip install "clipcli[tensorboard]"\n',
    )
    assert not (tmp_path / "model").exists()


def test_fine_tuning(train: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    """`--init` with a locked image tower; the settings that describe new towers don't matter then."""
    result = train("--init", model, "--freeze", "image", "--epochs", 1, "--offline", "-p", "bf16", "-v")
    assert result.code == 0 and "\ncpu, bf16; 2 steps\n" in result.err
    before, after = load_model(model), load_model(tmp_path / "model")
    assert before.image_fingerprint == after.image_fingerprint
    assert before.text_fingerprint != after.text_fingerprint and before.config == after.config


# ---- help


def test_help_imports_nothing_heavy() -> None:
    code = f"sys.stderr = open({os.devnull!r}, 'w'); from clipcli.cli.main import run; run(['train', '--help'])"
    assert not modules_after(code + "; sys.stderr = sys.__stderr__") & set(HEAVY)


def test_help(cli: Run) -> None:
    page = cli("train", "--help").out.decode()
    panels = dict(re.findall(r"╭─ (\w+) ─+╮\n(.*?)╰─", page, re.DOTALL))
    assert {"Data", "Model", "Recipe", "Output", "Speed", "Talk"} <= panels.keys()
    for panel, options in {
        "Data": ("labels", "templates", "max-per-label", "strict", "eval"),
        "Model": ("init", "freeze", "offline", "vocabulary", "vocabulary-size"),
        "Recipe": ("recipe", "epochs", "batch-size", "learning-rate", "precision", "seed", "set"),
        "Output": ("output", "resume", "force", "tensorboard"),
    }.items():
        assert all(f"--{option} " in panels[panel] for option in options), panel
    assert "--no-" not in page and page.partition("Examples")[2].count("clipcli train") >= 4


# ---- what exists, and what goes on


def test_an_output_that_exists(train: Callable[..., Result], tmp_path: Path) -> None:
    model = tmp_path / "model"
    assert train("--epochs", 1).code == 0
    before = {path: path.read_bytes() for path in model.iterdir()}
    hint = "hint: use --resume to go on with its run, or --force to begin anew in it\n"
    for words in ((), ("--set", "seed=3")):
        result = train("--epochs", 1, *words)
        assert (result.code, result.err) == (2, f"clipcli: {model}: exists already\n{hint}")
    result = train("--epochs", 2, "--seed", 4, "--resume")
    assert result.code == 2 and result.err == (
        f"clipcli: {model}: the run was begun with other settings: epochs (1.0, now 2.0), seed (0, now 4)\n"
        "hint: give those, or a new -o\n"
    )
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    (model / "notes.txt").write_text("mine")
    assert train("--epochs", 2, "--seed", 4, "--force", "-q").code == 0
    assert checkpoint.read(model)[0].step == 4 and (model / "notes.txt").read_text() == "mine"
    result = train("--epochs", 2, "--seed", 4, "--resume")
    assert result.code == 0 and "clipcli: going on after step 4 of 4\n" in result.err


def test_resume_where_there_is_no_run(train: Callable[..., Result], tmp_path: Path) -> None:
    result = train("--resume")
    assert result.code == 2 and f"{tmp_path / 'model'}: no checkpoint.safetensors to go on from" in result.err
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "checkpoint.safetensors").write_bytes(b"torn")
    result = train("--resume")
    assert result.code == 1 and "checkpoint.safetensors: not a checkpoint of a training run\nhint: " in result.err


# ---- bad input

BAD: dict[str, tuple[list[str], int, str]] = {
    "no data": ([], 2, "missing argument"),
    "missing": (["nowhere"], 2, "nowhere: no such file or folder"),
    "empty": (["empty"], 2, "empty: neither class folders nor archives in it"),
    "one class": (["one", "-b", "4"], 2, "all pictures have the same words, 'red'"),
    "large batch": (["data", "-b", "500"], 2, "a batch of 500 is larger than the data: 24 pairs to learn from"),
    "no recipe": (["data", "--recipe", "none.toml"], 2, "none.toml: no such file or directory"),
    "bad toml": (["data", "--recipe", "bad.toml"], 2, "bad.toml: "),
    "unknown key": (["data", "--recipe", "key.toml"], 2, "there is no training setting `epoch`"),
    "unknown setting": (["data", "--set", "sed=1"], 2, "there is no training setting `sed`"),
    "no value": (["data", "--set", "seed"], 2, "setting 'seed' has no value"),
    "bad value": (["data", "--set", "seed=many"], 2, 'setting `seed` is "many"'),
    "bad tower": (["data", "--set", "patch_size=7"], 2, "setting `image_size` must be a multiple of patch_size"),
    "bad choice": (["data", "--freeze", "both"], 2, "'both' is not one of"),
    "no set": (["data", "--eval", "nowhere"], 2, "nowhere: no such file or folder"),
    "no labels": (["data", "--eval", "captions.csv"], 2, "has a caption, no class"),
    "same name": (["data", "--eval", "data", "--eval", "data.csv"], 2, 'two sets to evaluate on are named "data"'),
    "taken name": (["data", "--eval", "loss=data"], 2, 'a set to evaluate on can\'t be named "loss"'),
    "no words": (["data", "-l", "none.txt"], 2, "none.txt: "),
    "no templates": (["data", "-t", "nonsense"], 2, "nonsense"),
    "no model": (["data", "--init", "./nowhere"], 1, "nowhere"),
    "no device": (["data", "-d", "gpu"], 2, 'unknown device "gpu"'),
    "no vocabulary": (["data", "--vocabulary", "none.txt"], 2, "none.txt: "),
    "small vocabulary": (["data", "--vocabulary-size", "99"], 2, "a vocabulary of 99 has no place for"),
    "no parent": (["data", "-o", "no/model"], 1, "no/model: the folder no does not exist"),
    "a file": (["data", "-o", "bad.toml"], 2, "bad.toml: is a file"),
    "long output": (["data", "-o", "x" * 300], 1, "x: can't be written: "),
    "long set": (["data", "--eval", "x=" + "y" * 300], 2, "y: no such file or folder"),
    "output is data": (["data", "-o", "data", "--force"], 2, "data: is read by this very run"),
    "log is data": (["mine/log.csv", "-o", "mine", "--force"], 2, "mine/log.csv: is read by this very run"),
    "someone's readme": (["data", "-o", "readme", "--force"], 2, "readme: holds no model, but a README.md"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(cli: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """One line and perhaps a hint, the right exit code, and no trace on the disk."""
    words, code, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "red").symlink_to(data / "red")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.toml").write_text("epochs = = 3")
    (tmp_path / "key.toml").write_text("epoch = 3")
    table(tmp_path / "captions.csv", data)
    for name in ("mine/log.csv", "readme/README.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes((tmp_path / "captions.csv").read_bytes())
    before = sorted(tmp_path.rglob("*"))
    output = [] if "-o" in words else ["-o", "model"]
    result = cli("train", *SETS, *words, *output)
    assert (result.code, result.out) == (code, b""), result.err
    lines = result.err.splitlines()
    assert len(lines) <= 2 and lines[0].startswith("clipcli: ") and not lines[0].endswith("."), result.err
    assert message in lines[0] and all(line.startswith("hint: ") for line in lines[1:])
    assert sorted(tmp_path.rglob("*")) == before


def test_pictures_that_are_missing(train: Callable[..., Result], data: Path, tmp_path: Path) -> None:
    """Counted, listed, and the run goes on; the exit code tells. With --strict the first one ends it."""
    lost = [f"lost-{i}.png,a picture that is lost" for i in range(7)]
    (tmp_path / "torn.png").write_bytes(squares.picture("red", 1)[:200])
    captions = table(tmp_path / "captions.csv", data, *lost, "torn.png,a torn picture")
    result = train("--strict", on=captions)
    assert result.code == 3 and "lost-0.png: no such file" in result.err and not (tmp_path / "model").exists()
    result = train("--epochs", 1, on=captions)
    assert result.code == 3 and "trained in" in result.err
    lines = result.err.splitlines()
    assert lines[1] == "clipcli: 8 pictures left out:" and lines[7] == "  … (-v lists all)"
    assert lines[2].startswith(f"  {tmp_path}/lost-0.png: ") and lines[2].endswith(f" ({captions}:32)")
    result = train("--epochs", 1, "--force", "-v", on=captions)
    assert all(f"  {tmp_path}/lost-{i}.png: " in result.err for i in range(7)) and "lists all" not in result.err
    assert f"  {tmp_path}/torn.png: the file ends before the picture does\n" in result.err


def test_a_picture_of_a_set_that_is_missing(train: Callable[..., Result], data: Path, tmp_path: Path) -> None:
    rows = [f"{file},{file.parent.name}" for file in sorted(data.rglob("*.png"))]
    (tmp_path / "set.csv").write_text("\n".join(["path,label", *rows, "lost.png,red", ""]))
    result = train("--strict", "--eval", tmp_path / "set.csv")
    assert result.code == 3 and "lost.png: no such file" in result.err and not (tmp_path / "model").exists()


def test_pictures_that_are_found_to_be_broken_later(train: Callable[..., Result], data: Path, tmp_path: Path) -> None:
    """Those that aren't kept in memory are decoded as they are needed."""
    (tmp_path / "torn.png").write_bytes(squares.picture("red", 1)[:200])
    captions = table(tmp_path / "captions.csv", data, "torn.png,a torn picture")
    result = train("--epochs", 3, "--set", "keep_gb=0", "--set", "hold_out=0", on=captions)
    assert result.code == 3 and "torn.png: the file ends" in result.err and "trained in" in result.err


def test_names_that_are_no_utf_8(train: Callable[..., Result], data: Path, tmp_path: Path) -> None:
    templates = tmp_path / os.fsdecode(b"caf\xe9.txt")
    templates.write_text("a <>.\n")
    result = train("--epochs", 1, "-t", templates, "--eval", f"{os.fsdecode(bytes([0xE9]))}={data}")
    assert result.code == 0 and r"\xe9" in result.err
    assert (tmp_path / "model" / "log.csv").read_text().splitlines()[0].endswith(r",\xe9")


def test_a_loss_that_is_not_finite(
    train: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.gradients
    monkeypatch.setattr(Trainer, "gradients", lambda self, b: float("inf") if self.state.step == 2 else real(self, b))
    result = train("--set", "save_minutes=0")
    assert result.code == 1 and "clipcli: the loss of step 3 is inf\nhint: the last checkpoint is good; " in result.err
    monkeypatch.undo()
    assert checkpoint.read(tmp_path / "model")[0].step == 2
    assert train("--set", "save_minutes=0", "--resume").code == 0


# ---- interruptions


@contextmanager
def started(data: Path, output: Path, *words: object, patch: str = "pass") -> Iterator[subprocess.Popen[str]]:
    """`clipcli train` in a process of its own, from when it trains, or when `patch` says that it is `here`."""
    code = f"""
        import sys, time
        from clipcli.cli.main import main
        from clipcli.train.feed import Feed
        from clipcli.train.loop import Trainer

        real, told = Trainer.step, []

        def step(self, samples):
            if not told:
                told.append(print("here", flush=True))
            return real(self, samples)

        Trainer.step = step
        {patch}
        sys.argv[0] = "clipcli"
        main()
    """
    command = ("train", data, "-o", output, "-j", 1, *SETS, "--epochs", 5000, *words)
    with squares.process("-c", textwrap.dedent(code), *command) as process:
        assert process.stdout and process.stdout.readline() == "here\n", process.communicate()[1]
        yield process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_saves(data: Path, tmp_path: Path, number: int) -> None:
    output = tmp_path / "model"
    with started(data, output, "--set", "eval_every=1e9") as process:
        process.send_signal(number)
        errors = process.communicate(timeout=150)[1]
    assert process.returncode == 128 + number and "Traceback" not in errors
    said = errors.splitlines()
    assert "clipcli: saving after this step (once more: stop at once)" in said
    assert said[-1] == f"clipcli: stopped; the same command with --resume goes on in {output}"
    state = checkpoint.read(output)[0]
    assert 1 <= state.step < 10_000 and not (output / "README.md").exists()


def test_what_is_ignored_stays_ignored_and_nobody_has_to_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(number: int, data: bytes) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", gone)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with _signals(Talk()) as came:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)
            assert [number for number, _ in came] == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interruption_in_silence(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    with started(data, output, "-q", "--set", "eval_every=1e9") as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=150) == ("", "") and process.returncode == 130
    assert checkpoint.read(output)[0].step >= 1


def test_a_second_interruption_stops_at_once(data: Path, tmp_path: Path) -> None:
    """Even while it saves, which then leaves what was there."""
    patch = 'Trainer.save = lambda self, folder: (print("saving", flush=True), time.sleep(100))'
    with started(data, tmp_path / "model", patch=patch) as process:
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.stdout and process.stdout.readline() == "saving\n"
        time.sleep(0.6)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=150)[1]
    assert process.returncode == 130 and "Traceback" not in errors and "stopped;" not in errors
    assert not (tmp_path / "model" / checkpoint.NAME).exists()


def test_an_interruption_while_it_reads_leaves_nothing(data: Path, tmp_path: Path) -> None:
    patch = 'Feed.find = lambda self, progress: (print("here", flush=True), time.sleep(100))'
    with started(data, tmp_path / "model", patch=patch) as process:
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=150)[1]
    assert process.returncode == 130 and errors == ""
    assert not (tmp_path / "model").exists()


# ---- a terminal


def test_on_a_terminal_one_line_lives(data: Path, tmp_path: Path) -> None:
    """The line is redrawn in its place; what stays are the notices."""
    primary, secondary = pty.openpty()
    words = ["train", data, "-o", tmp_path / "model", "-j", 1, *SETS, "--epochs", 30, "--set", "eval_every=15"]
    terminal = {"TERM": "xterm", "COLUMNS": "160"}
    seen = b""
    with squares.process("-m", "clipcli", *words, env=terminal, stderr=secondary) as process:
        os.close(secondary)
        with suppress(OSError):  # the other end is closed
            while True:
                seen += os.read(primary, 65536)
        assert process.wait(timeout=150) == 0
    os.close(primary)
    text = seen.decode()
    assert "\x1b[2K" in text and len(re.findall(r"epoch \d+\.\d · step \d+/60 · loss", text)) > 2
    assert len(re.findall(r"accuracy: held out \S+% \(kept\)", text)) >= 1 and "clipcli: use it: " in text


def test_options_of_the_whole_house(train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """A device by environment; and a number of workers that is none is refused."""
    monkeypatch.setenv("CLIPCLI_DEVICE", "cuda:77")
    result = train()
    assert result.code == 2 and 'device "cuda:77" is not there' in result.err
    assert train("-d", "cpu", "-j", 0).code == 2


def test_nothing_of_other_sets(train: Callable[..., Result], tmp_path: Path) -> None:
    """A name for a set may hold what it likes, the path is the rest; a path with `=` in it is one."""
    odd = squares.make(tmp_path / "a=b", each=2)
    assert train("--epochs", 0.5, "--eval", odd, "--eval", f"more, so={odd}", "-q").code == 0
    header = (tmp_path / "model" / "log.csv").read_text().splitlines()[0]
    assert header.endswith(',held_out,a=b,"more, so"')
