"""Whole runs: going on where one was stopped, the model that is kept, fine-tuning, and what goes wrong on the disk."""

from __future__ import annotations

import csv
import json
import resource
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import squares
import tiny
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from clipcli.errors import ClipcliError, ModelError, OutputError, UsageError
from clipcli.model.clip import CLIP
from clipcli.model.config import ClipConfig, TextConfig, ViTConfig
from clipcli.train import checkpoint
from clipcli.train.config import TrainConfig
from clipcli.train.evaluate import Evaluator
from clipcli.train.loop import Trainer
from clipcli.train.plot import plot
from clipcli.train.run import HELD_OUT, LOG, Evaluated, Event, Ready, Request, Saved, Step, _prepare, train
from clipcli.weights.model import load_model

WEIGHTS = "open_clip_model.safetensors"
ALL = {"text_warmup": 3, "ema": 0.9, "mix": 0.5, "erase": 0.3, "jitter": 0.2, "crop": "resized", "broader": 0.1}
STREAMED = {"keep_gb": 0.0, "shuffle_buffer": 10}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return squares.make(tmp_path_factory.mktemp("squares") / "data", each=10)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return squares.shards(tmp_path_factory.mktemp("squares") / "tars", each=10)


def run(data: Path, output: Path, settings: dict[str, Any], until: int | None = None, **request: Any) -> list[Event]:
    """The events up to step `until`, where the run is stopped as Ctrl-C does."""
    events: list[Event] = []
    going = train(Request([str(data)], output, device="cpu", **request), TrainConfig.read(None, settings))
    for event in going:
        events.append(event)
        if isinstance(event, Step) and event.number == until:
            going.close()
    return events


def evaluated(events: list[Event]) -> list[int]:
    return [event.step for event in events if isinstance(event, Evaluated)]


def log(output: Path) -> list[dict[str, str]]:
    """The log without what a clock says."""
    with (output / LOG).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: row[name] for name in row if name not in ("seconds", "pictures_per_second")} for row in rows]


def assert_same_run(found: Path, wanted: Path) -> None:
    """Bit for bit, the clock aside."""
    (state, tensors), (other, others) = checkpoint.read(found), checkpoint.read(wanted)
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    state.seconds = other.seconds = 0
    assert state == other
    assert (found / WEIGHTS).read_bytes() == (wanted / WEIGHTS).read_bytes()
    assert (found / "merges.txt").read_bytes() == (wanted / "merges.txt").read_bytes()
    assert log(found) == log(wanted)


# ---- resume


@pytest.mark.parametrize(
    ("tower", "settings", "stream"),
    [
        (squares.VIT, ALL, False),
        (squares.VIT, {**STREAMED, "soft_targets": False, "chunk_size": 5}, True),
        (squares.RESNET | {"image_size": 64}, {**ALL, "sizes": [32], "size_until": [0.6]}, False),
        (squares.RESNET, {**ALL, **STREAMED}, True),
    ],
    ids=["vit", "vit-streamed", "resnet", "resnet-streamed"],
)
def test_a_run_goes_on_bit_for_bit(
    data: Path, tars: Path, tower: dict[str, Any], settings: dict[str, Any], stream: bool, tmp_path: Path
) -> None:
    """Stopped in the middle of an epoch and again right after an evaluation: nothing of it is left to see."""
    source = tars if stream else data
    config = {**tower, "batch_size": 6, **settings, "epochs": 2.5}
    wanted, found = tmp_path / "wanted", tmp_path / "found"
    whole = run(source, wanted, config)
    parts = [
        run(source, found, config, until=3),
        run(source, found, config, until=8, resume=True),
        run(source, found, config, resume=True),
    ]
    ready = [part[0] for part in parts]
    assert all(isinstance(event, Ready) and event.kept == (not stream) for event in ready)
    assert [event.done for event in ready if isinstance(event, Ready)] == [0, 3, 8]
    steps = [event for part in parts for event in part if isinstance(event, Step)]
    assert [(step.number, step.loss, step.scale) for step in steps] == [
        (step.number, step.loss, step.scale) for step in whole if isinstance(step, Step)
    ]
    assert len(steps) == 10 and evaluated(whole) == [4, 8, 10]
    assert_same_run(found, wanted)


def test_what_a_step_leads_to_is_never_skipped(data: Path, tmp_path: Path) -> None:
    """Stopped at the very step after which it evaluates, and at the last."""
    for step in (2, 4):
        output = tmp_path / str(step)
        run(data, output, squares.VIT, until=step)
        assert [row["step"] for row in log(output) if row[HELD_OUT]] == ["2", "4"][: step // 2]
        assert (output / WEIGHTS).is_file()
        rest = run(data, output, squares.VIT, resume=True)
        assert [row["step"] for row in log(output)] == ["1", "2", "3", "4"]
        assert evaluated(rest) == [4][step // 4 :]


def test_after_a_crash_the_log_has_no_line_twice(data: Path, tmp_path: Path) -> None:
    """The log went on after the checkpoint: what came then is learned, and written, again."""
    config = {**squares.RESNET, "ema": 0.9}
    wanted, found = tmp_path / "wanted", tmp_path / "found"
    run(data, wanted, config)
    run(data, found, config, until=1)
    saved = (found / checkpoint.NAME).read_bytes()
    run(data, found, config, until=3, resume=True)
    (found / checkpoint.NAME).write_bytes(saved)
    with (found / LOG).open("a") as file:
        file.write("3,1.5,0.")  # torn in the writing
    run(data, found, config, resume=True)
    assert_same_run(found, wanted)


def test_what_is_done_is_done(data: Path, tmp_path: Path) -> None:
    first = run(data, tmp_path, squares.VIT)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    again = run(data, tmp_path, squares.VIT, resume=True)
    assert [type(event) for event in again] == [Ready] and isinstance(again[0], Ready)
    assert again[0].done == again[0].steps == len([event for event in first if isinstance(event, Step)])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_settings_that_change_nothing_learned_may_change(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, squares.VIT, until=1)
    rest = run(data, tmp_path, {**squares.VIT, "eval_every": 0.5, "save_minutes": 0.0}, resume=True)
    assert evaluated(rest) == [2, 3, 4]
    assert [event.step for event in rest if isinstance(event, Saved)] == [2, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "the run was begun with other settings: seed (0, now 7)"),
        (
            {"mix": 0.5, "sizes": [16], "size_until": [0.5]},
            "the run was begun with other settings: mix (0.0, now 0.5), sizes ((), now (16,)), "
            "size_until ((), now (0.5,))",
        ),
    ],
)
def test_other_settings_are_refused_before_the_data_are_read(
    data: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run(data, tmp_path, squares.VIT, until=1)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError) as caught:
        run(Path("not-there"), tmp_path, squares.VIT | change, resume=True)
    assert caught.value.message == f"{tmp_path}: {message}"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_other_data_are_refused(data: Path, tmp_path: Path) -> None:
    output, fewer = tmp_path / "model", tmp_path / "data"
    shutil.copytree(data, fewer)
    run(fewer, output, squares.VIT, until=1)
    (fewer / "red" / "00.png").unlink()
    with pytest.raises(UsageError, match=r"model: the run was begun with other data$"):
        run(fewer, output, squares.VIT, resume=True)
    (fewer / "red" / "00.png").write_bytes(squares.picture("red", 0))
    words = tmp_path / "merges.txt"
    words.write_text("#version: 0.2\nr e\n")
    with pytest.raises(UsageError, match=r"model: the run was begun with another vocabulary$"):
        run(fewer, output, squares.VIT, resume=True, vocabulary=words)
    assert evaluated(run(fewer, output, squares.VIT, resume=True)) == [2, 4]


def test_a_given_vocabulary(data: Path, tmp_path: Path) -> None:
    words = tiny.save(tmp_path / "other") / "merges.txt"
    output = tmp_path / "model"
    ready = run(data, output, squares.VIT, until=1, vocabulary=words)[0]
    assert isinstance(ready, Ready) and ready.vocab_size == 512 + tiny.MERGES + 2
    run(data, output, squares.VIT, resume=True, vocabulary=words)
    assert (output / "merges.txt").read_bytes() == words.read_bytes()


@pytest.mark.parametrize("damage", ["absent", "empty", "short", "half", "almost", "noise", "weights", "version"])
def test_a_checkpoint_that_is_none(data: Path, tmp_path: Path, damage: str) -> None:
    output = tmp_path / "model"
    run(data, output, squares.VIT, until=1)
    path = output / checkpoint.NAME
    whole = path.read_bytes()
    new = {
        "empty": b"",
        "short": whole[:100],
        "half": whole[: len(whole) // 2],
        "almost": whole[:-1],
        "noise": np.random.default_rng(0).bytes(len(whole)),
        "version": whole.replace(b'version\\": 1', b'version\\": 9'),
    }
    path.write_bytes(new.get(damage, whole))
    error: type[ClipcliError] = ModelError
    if damage == "absent":
        path.unlink()
        error = UsageError
    elif damage == "weights":  # a safetensors file, and no checkpoint
        shutil.copy(tiny.save(tmp_path / "other") / WEIGHTS, path)
    with pytest.raises(error) as caught:
        run(data, output, squares.VIT, resume=True)
    wanted = {
        "absent": f"{output}: no {checkpoint.NAME} to go on from",
        "version": f"{path}: of another version of clipcli",
    }
    assert caught.value.message == wanted.get(damage, f"{path}: not a checkpoint of a training run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "1"}, "not a checkpoint of a training run"),
        ({"step": -1}, "not a checkpoint of a training run"),
        ({"step": 1.5}, "not a checkpoint of a training run"),
        ({"best": "high"}, "not a checkpoint of a training run"),
        ({"merges": 5}, "not a checkpoint of a training run"),
        ({"losses": [[]]}, "not a checkpoint of a training run"),
        ({"scaler": []}, "not a checkpoint of a training run"),
        ({"config": {"gone": 1}}, "there is no training setting `gone`"),
        (None, "not a checkpoint of a training run"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_hand(tmp_path: Path, change: dict[str, Any] | None, message: str) -> None:
    state = checkpoint.State(TrainConfig(), "", "")
    told = json.dumps({**asdict(state), "version": 1, **(change or {})}) if change is not None else "[" * 100_000
    save_file({"x": np.zeros(1, "f4")}, tmp_path / checkpoint.NAME, {"clipcli": told})
    with pytest.raises(ModelError, match=f"^{tmp_path / checkpoint.NAME}: {message}"):
        checkpoint.read(tmp_path)


def test_a_log_that_another_hand_has_changed(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, squares.VIT, until=2)
    (tmp_path / LOG).write_bytes(b"step,epoch,loss\n1,0.5,3.5\n\xb2,1,1\n\xc2\xb2,1,1\n\0\0\n2,x,much\n")
    assert evaluated(run(data, tmp_path, squares.VIT, resume=True))
    assert [row["step"] for row in log(tmp_path)][:2] == ["1", "2"]
    assert plot(tmp_path) == tmp_path / "curves.svg"
    (tmp_path / LOG).write_bytes(b'step\n1,"' + b"x" * 200_000)
    with pytest.raises(UsageError, match=r"log\.csv: not the log of a run"):
        run(data, tmp_path, squares.VIT, resume=True)


def test_a_checkpoint_of_another_model(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, squares.VIT, until=1)
    state, tensors = checkpoint.read(tmp_path)
    tensors["model.visual.proj"] = tensors["model.visual.proj"][:, :3]
    trainer = squares.trainer(data, **squares.VIT)
    trainer.state = state
    with pytest.raises(ModelError, match="the checkpoint doesn't fit the model of its settings"):
        trainer.restore(tensors)


def test_beginning_anew_leaves_nothing_to_go_on_from(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, squares.VIT)
    going = train(Request([str(data)], tmp_path, device="cpu"), TrainConfig.read(None, squares.VIT))
    next(going)
    assert (tmp_path / checkpoint.NAME).is_file()  # until now it would have been for nothing
    next(going)
    assert not (tmp_path / checkpoint.NAME).exists() and [row["step"] for row in log(tmp_path)] == ["1"]
    going.close()
    assert checkpoint.read(tmp_path)[0].step == 1


# ---- what is kept


def test_the_best_is_kept(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the held-out pictures; the last of equally good ones. The card tells their accuracy."""
    results = (0.25, 0.75, 0.5, 0.75, 0.125)
    coming = iter(results)
    monkeypatch.setattr(Evaluator, "on_held_out", lambda *_: next(coming))
    config = {**squares.VIT, "epochs": 5.0, "ema": 0.5, "save_minutes": 0.0}
    going = train(Request([str(data)], tmp_path, device="cpu", sets={"set": str(data)}), TrainConfig.read(None, config))
    means: list[dict[str, torch.Tensor]] = []
    best = []
    for event in going:
        if isinstance(event, Saved):
            tensors = checkpoint.read(tmp_path)[1]
            means.append({name[4:]: tensor for name, tensor in tensors.items() if name.startswith("ema.")})
        elif isinstance(event, Evaluated):
            best.append(event.best)
            assert event.accuracy.keys() == {HELD_OUT, "set"}
    assert best == [True, True, False, True, False] and len(means) == 10
    kept = load_file(tmp_path / WEIGHTS)
    assert all(np.array_equal(kept[name], tensor) for name, tensor in means[7].items())
    assert not np.array_equal(kept["visual.proj"], means[9]["visual.proj"])
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 8
    assert "| accuracy on pictures held out from training | 75.0% |" in (tmp_path / "README.md").read_text()
    assert [row[HELD_OUT] for row in log(tmp_path) if row[HELD_OUT]] == [f"{x:.5f}" for x in results]


@pytest.mark.parametrize("tower", [squares.VIT, squares.RESNET], ids=["vit", "resnet"])
def test_the_model_directory(data: Path, tmp_path: Path, tower: dict[str, Any]) -> None:
    """Without held-out pictures the last weights are kept; read back, they give the trainer's own embeddings."""
    output = tmp_path / "model"
    events = run(data, output, {**tower, "hold_out": 0.0, "ema": 0.5, "activation": "gelu", "eval_every": 1.5})
    assert evaluated(events) == [3, 4] and all(event.best for event in events if isinstance(event, Evaluated))
    names = {
        "open_clip_config.json",
        WEIGHTS,
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "training.json",
    }
    assert {path.name for path in output.iterdir()} == {*names, LOG, checkpoint.NAME}
    settings = json.loads((output / "training.json").read_text())["settings"]
    assert TrainConfig.read(None, settings) == TrainConfig.read(
        None, {**tower, "hold_out": 0.0, "ema": 0.5, "activation": "gelu", "eval_every": 1.5}
    )
    assert (output / "merges.txt").read_text() == checkpoint.read(output)[0].merges
    model = load_model(output, device="cpu")
    clip = CLIP(model.config).eval()
    mean = {name[4:]: tensor for name, tensor in checkpoint.read(output)[1].items() if name.startswith("ema.")}
    clip.load_state_dict(mean)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    prepared = (torch.from_numpy(pixels) / 255 - torch.tensor(model.config.preprocess.mean)[:, None, None]) / (
        torch.tensor(model.config.preprocess.std)[:, None, None]
    )
    with torch.no_grad():
        image = torch.nn.functional.normalize(clip.encode_image(prepared), dim=1)
    assert np.abs(model.encode_image(pixels) - image.numpy()).max() < 1e-5
    assert model.config.text.activation == "gelu"


def test_once_an_epoch_and_once_at_the_end(data: Path, tmp_path: Path) -> None:
    assert evaluated(run(data, tmp_path / "a", squares.VIT | {"epochs": 2.0})) == [2, 4]
    assert evaluated(run(data, tmp_path / "b", squares.VIT | {"epochs": 1.5})) == [2, 3]
    assert evaluated(run(data, tmp_path / "c", squares.VIT | {"eval_every": 100.0})) == [4]


# ---- fine-tuning


def made(layout: str, folder: Path) -> Path:
    """A model whose heads are 64 channels wide, as a file without a configuration implies."""
    if layout == "resnet":
        return tiny.save(folder, "open_clip", tiny.resnet())
    vision = ViTConfig(32, 8, 64, 1, 1, 256, "quick_gelu")
    text = TextConfig(77, 512 + tiny.MERGES + 2, 64, 1, 1, 256, "quick_gelu")
    config = ClipConfig(16, vision, text, tiny.vit().preprocess)
    dtype = np.float16 if layout == "torchscript" else np.float32
    return tiny.save(folder, layout, config, arrays=tiny.weights(config, seed=3), dtype=dtype)


@pytest.mark.parametrize("layout", ["open_clip", "transformers", "torchscript", "resnet"])
def test_fine_tuning_starts_from_the_very_weights(data: Path, tmp_path: Path, layout: str) -> None:
    path = made(layout, tmp_path / "base")
    config = TrainConfig.read(None, {"init": str(path), "batch_size": 12, "hold_out": 0.2})
    trainer = _prepare(Request([str(data)], tmp_path / "out", device="cpu"), config, None, None)[0]
    base = load_model(path, device="cpu")
    assert trainer.clip_config == base.config
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    samples = torch.from_numpy(pixels) / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (base.config.preprocess.mean, base.config.preprocess.std))
    ids = trainer.tokenizer(["a photo of a cat.", "red"])
    texts = torch.zeros(2, 77, dtype=torch.int64)
    for row, tokens in zip(texts, ids, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    with torch.no_grad(), trainer.averaged() as clip:
        image = torch.nn.functional.normalize(clip.encode_image((samples - mean) / std), dim=1)
        text = torch.nn.functional.normalize(clip.encode_text(texts), dim=1)
    assert np.abs(base.encode_image(pixels) - image.numpy()).max() < 1e-5
    for places, vectors in base.encode_text(ids):
        assert np.abs(vectors - text.numpy()[places]).max() < 1e-5
    for name, array in base.checkpoint.arrays.items():
        assert np.array_equal(trainer.clip.state_dict()[name].numpy(), np.asarray(array, np.float32)), name


@pytest.mark.parametrize("layout", ["transformers", "resnet"])
@pytest.mark.parametrize("frozen", ["image", "text"])
def test_a_frozen_tower_comes_out_as_it_went_in(data: Path, tmp_path: Path, layout: str, frozen: str) -> None:
    """Its identity, statistics and all, is that of the model that the run began with; it goes on as well."""
    path, output = made(layout, tmp_path / "base"), tmp_path / "model"
    config = {"init": str(path), "freeze": frozen, "batch_size": 12, "epochs": 1.0, "ema": 0.9, "learning_rate": 1e-3}
    run(data, output, config, until=1)
    run(data, output, config, resume=True)
    before, after = load_model(path), load_model(output)
    assert (before.image_fingerprint == after.image_fingerprint) == (frozen == "image")
    assert (before.text_fingerprint == after.text_fingerprint) == (frozen == "text")
    assert (output / "merges.txt").read_text().split() == (tmp_path / "base" / "merges.txt").read_text().split()


def test_a_base_without_a_vocabulary(data: Path, tmp_path: Path) -> None:
    path = made("torchscript", tmp_path / "base")
    words = (tmp_path / "base" / "merges.txt").rename(tmp_path / "words.txt")
    config = {"init": str(path), "batch_size": 12, "epochs": 0.5}
    with pytest.raises(UsageError, match="no vocabulary beside the weights"):
        run(data, tmp_path / "model", config)
    assert not (tmp_path / "model").exists()
    run(data, tmp_path / "model", config, vocabulary=words)
    assert load_model(tmp_path / "model").tokenizer.merges == load_model(tmp_path / "model").tokenizer.merges


# ---- what goes wrong


def test_nothing_is_written_before_the_data_are_read(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    config = TrainConfig.read(None, squares.VIT)

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(train(Request([str(data)], output, device="cpu"), config, interrupt))
    going = train(Request([str(data)], output, device="cpu"), config)
    next(going)
    going.close()
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(UsageError, match="no labelled pictures"):
        next(train(Request([str(data)], output, sets={"set": str(tmp_path / "empty")}), config))
    assert not output.exists()


@pytest.mark.parametrize("what", ["model", "link"])
def test_a_folder_that_can_not_become_a_model_is_refused_at_once(data: Path, tmp_path: Path, what: str) -> None:
    output = tmp_path / "model"
    if what == "model":
        tiny.save(output, "transformers")
    else:
        output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds another model" if what == "model" else "is a link to nothing"):
        next(train(Request(["not-there"], output), TrainConfig.read(None, squares.VIT)))


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, found = tmp_path / "wanted", tmp_path / "found"
    config = {**squares.VIT, "save_minutes": 0.0}
    run(data, wanted, config)
    real = Trainer.gradients

    def broken(self: Trainer, batch: Any) -> float:
        return float("nan") if self.state.step == 2 else real(self, batch)

    monkeypatch.setattr(Trainer, "gradients", broken)
    with pytest.raises(ClipcliError, match=r"^the loss of step 3 is nan$"):
        run(data, found, config)
    monkeypatch.undo()
    assert checkpoint.read(found)[0].step == 2
    run(data, found, config, resume=True)
    assert_same_run(found, wanted)


def test_too_little_memory(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [RuntimeError("another"), MemoryError(), RuntimeError("can't allocate memory")]
    errors.append(torch.OutOfMemoryError("CUDA out of memory."))

    def broken(self: Trainer, batch: Any) -> float:
        raise errors.pop()

    monkeypatch.setattr(Trainer, "gradients", broken)
    for _ in range(3):
        with pytest.raises(ClipcliError, match=r"^not enough memory for this training$"):
            run(data, tmp_path, squares.VIT)
    with pytest.raises(RuntimeError, match="another"):
        run(data, tmp_path, squares.VIT)


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file gets larger than `size`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk(data: Path, tmp_path: Path) -> None:
    """Whatever can't be written, the files of before are whole, and nothing lies about."""
    config = {**squares.VIT, "eval_every": 100.0}
    events = run(data, tmp_path / "wanted", config)
    assert isinstance(events[0], Ready)
    output = tmp_path / "model"
    run(data, output, config, until=2)
    shutil.copytree(
        tmp_path / "wanted", output, ignore=shutil.ignore_patterns(checkpoint.NAME, LOG), dirs_exist_ok=True
    )
    size = (output / WEIGHTS).stat().st_size
    assert (output / checkpoint.NAME).stat().st_size > 2 * size
    files = {path: path.read_bytes() for path in output.iterdir() if path.name != LOG}
    for limit, name in ((size // 2, ""), (2 * size, f"/{checkpoint.NAME}")):
        with disk_of(limit), pytest.raises(OutputError, match="file too large") as caught:
            run(data, output, config, resume=True)
        assert caught.value.message.startswith(f"{output}{name}: ") and caught.value.hint
        kept = {path: path.read_bytes() for path in output.iterdir() if path.name != LOG}
        assert kept.keys() == files.keys() and kept[output / checkpoint.NAME] == files[output / checkpoint.NAME]
        load_model(output).checkpoint.arrays["visual.proj"]
    with disk_of(2 * size), pytest.raises(OutputError, match="file too large"):
        run(data, output, config, until=3, resume=True)  # stopped, and no room for the checkpoint
    run(data, output, config, resume=True)
    assert_same_run(output, tmp_path / "wanted")


def test_a_log_that_can_not_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / LOG).symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"log\.csv: can't be written: no space left on device$"):
        run(data, tmp_path, squares.VIT)


KILLED = """
    import os, random, signal, sys, time, torch
    from pathlib import Path
    from clipcli.train import checkpoint
    from clipcli.train.config import TrainConfig

    folder, random = Path(sys.argv[1]), random.Random(0)
    model = torch.nn.Linear(1000, 1000)
    optimiser = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimiser.step()
    seen, torn = set(), 0
    for _ in range(8):
        child = os.fork()
        if not child:
            for step in range(10**6):
                model.weight.data.fill_(step)
                checkpoint.save(folder, checkpoint.State(TrainConfig(), "", "", step), model, optimiser, None)
        while not (folder / checkpoint.NAME).is_file():
            time.sleep(0.01)
        time.sleep(random.uniform(0.01, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state, tensors = checkpoint.read(folder)
        assert (tensors["model.weight"] == state.step).all()
        seen.add(state.step)
        names = {path.name for path in folder.iterdir()}
        assert names <= {checkpoint.NAME, f".{checkpoint.NAME}.part"}, names
        torn += len(names) - 1
    print(len(seen), torn)
"""


def test_killed_in_the_writing(tmp_path: Path) -> None:
    """kill -9 at random moments: there is a whole checkpoint, the older or the newer, and one torn file at most."""
    with squares.process("-c", textwrap.dedent(KILLED), tmp_path) as process:
        out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    seen, torn = map(int, out.split())
    assert seen >= 1 and torn >= 1


def test_the_checkpoint_is_no_pickle(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, {**squares.VIT, "ema": 0.5}, until=1)
    with safe_open(tmp_path / checkpoint.NAME, framework="numpy") as file:
        kinds = {name.partition(".")[0] for name in file.keys()}  # noqa: SIM118
        told = json.loads(file.metadata()["clipcli"])
    assert kinds == {"model", "exp_avg", "exp_avg_sq", "ema"}
    assert (told["version"], told["step"], told["config"]["ema"]) == (1, 1, 0.5)


def test_a_checkpoint_of_the_first_form_can_still_be_read(data: Path, tmp_path: Path) -> None:
    """Before the losses since the log's last line were part of it."""
    run(data, tmp_path, squares.VIT, until=1)
    path = tmp_path / checkpoint.NAME
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["clipcli"])
    tensors = checkpoint.read(tmp_path)[1]
    del told["losses"]
    from safetensors.torch import save_file

    save_file(tensors, path, {"clipcli": json.dumps(told)})
    assert checkpoint.read(tmp_path)[0].losses == []
    assert evaluated(run(data, tmp_path, squares.VIT, resume=True)) == [2, 4]
