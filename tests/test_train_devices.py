"""Two processes on a CPU are one: the same loss, gradients and weights; the first alone writes."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import squares
import torch
import torch.distributed as dist

from clipcli.errors import UsageError
from clipcli.train import checkpoint
from clipcli.train.config import TrainConfig
from clipcli.train.devices import anywhere, joined
from clipcli.train.feed import ALONE
from clipcli.train.loop import Trainer, batch_norms
from clipcli.train.run import Evaluated, Ready, Request, Step, train

RESNET = {**squares.RESNET, "freeze_batch_norm": True}
EQUAL: dict[str, dict[str, Any]] = {  # whatever the number of processes
    "soft": squares.VIT,
    "hard": {**squares.VIT, "soft_targets": False, "smoothing": 0.1},
    "chunks": {**squares.VIT, "chunk_size": 4},
    "hard-chunks": {**squares.VIT, "soft_targets": False, "chunk_size": 3},
    "frozen": {**squares.VIT, "freeze": "image", "ema": 0.9},
    "streamed": {**squares.VIT, "keep_gb": 0.0, "jitter": 0.3, "erase": 0.5},
    "resnet": {**RESNET, "chunk_size": 4},
}
OTHERS = {  # each device mixes its own pictures, and normalises by its own statistics (on CUDA by all)
    "mixed": {**squares.VIT, "mix": 0.9},
    "running": {**squares.RESNET, "chunk_size": 3},
    "fp16": {**squares.VIT, "precision": "fp16"},
}
STEPS = 3


def learn(trainer: Trainer) -> dict[str, Any]:
    """The first step's loss and gradients, then the weights after some steps."""
    trainer.clip.train()
    if trainer.config.freeze_batch_norm:
        for norm in batch_norms(trainer.clip):
            norm.eval()
    loss = trainer.gradients(trainer.batch(next(trainer.feed.epoch(0)), 0))
    scale = trainer.scaler.get_scale()
    gradients = {name: p.grad / scale for name, p in trainer.clip.named_parameters() if p.grad is not None}
    losses = [step.loss for step in islice(trainer.run(), STEPS)]
    return {"loss": loss, "gradients": gradients, "losses": losses, "weights": dict(trainer.weights())}


def work(data: Path, out: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    with joined("cpu") as (share, device):
        assert device == "cpu" and share.world == 2
        cases = {**EQUAL, **OTHERS}
        found = {name: learn(squares.trainer(data, share=share, **settings)) for name, settings in cases.items()}
        found["anywhere"] = [anywhere(share.rank == 1, share), anywhere(True, share), anywhere(False, share)]
        config = TrainConfig.read(None, squares.VIT | {"eval_every": 0.5})
        request = Request([str(data)], out / f"model-{share.rank}", sets={"set": str(data)}, share=share, device=device)
        found["events"] = [type(event) for event in train(request, config)]
        torch.save(found, out / f"{share.rank}.pt")
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return squares.make(tmp_path_factory.mktemp("squares") / "data", each=10)


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they found."""
    folder = tmp_path_factory.mktemp("two")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_train_devices as here; "
    code += f"from pathlib import Path; here.work(Path({str(data)!r}), Path({str(folder)!r}))"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(squares.process("-W", "error", "-c", code, env={**common, "RANK": r, "LOCAL_RANK": r}))
            for r in "01"
        ]
        for process in processes:
            errors = process.communicate(timeout=150)[1]
            assert process.returncode == 0, errors
    return folder


@pytest.fixture(scope="module")
def two(out: Path) -> list[dict[str, Any]]:
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", EQUAL)
def test_two_processes_are_one(data: Path, two: list[dict[str, Any]], case: str) -> None:
    one = learn(squares.trainer(data, **EQUAL[case]))
    for found in (rank[case] for rank in two):
        assert found["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert found["losses"] == pytest.approx(one["losses"], abs=1e-3)
        squares.assert_equal(found["gradients"], one["gradients"])
        for name, tensor in one["weights"].items():  # Adam makes much of the smallest gradients
            assert (found["weights"][name] - tensor).abs().max() <= 2e-3 * STEPS, name


@pytest.mark.parametrize("case", [*EQUAL, *OTHERS])
def test_both_processes_agree(two: list[dict[str, Any]], case: str) -> None:
    first, second = (rank[case] for rank in two)
    assert first["losses"] == second["losses"] and first["losses"][0] == first["loss"]
    statistics = {name for name in first["weights"] if "running_" in name} if case == "running" else set()
    for kind in ("gradients", "weights"):
        for name in first[kind].keys() - statistics:
            assert torch.equal(first[kind][name], second[kind][name]), name


def test_the_first_alone_evaluates_and_writes(out: Path, two: list[dict[str, Any]]) -> None:
    assert two[0]["events"].count(Evaluated) == 4 and two[0]["events"].count(Step) == two[1]["events"].count(Step) == 4
    assert set(two[1]["events"]) == {Ready, Step}
    assert (out / "model-0" / "open_clip_model.safetensors").is_file() and not (out / "model-1").exists()
    assert [rank["anywhere"] for rank in two] == [[True, True, False]] * 2
    with (out / "model-0" / "log.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


# ---- torchrun


def torchrun(*words: object) -> AbstractContextManager[subprocess.Popen[str]]:
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "clipcli", "train", *words)
    return squares.process(*command, env={"TORCHELASTIC_ERROR_FILE": os.devnull})


@pytest.mark.timeout(600)  # six processes start one after the other: 12 s of a quiet CPU
def test_torchrun_trains_and_stops_and_goes_on(data: Path, tmp_path: Path) -> None:
    """Ctrl-C to torchrun stops both processes after the same step; with --resume both go on."""
    settings = squares.sets({**squares.VIT, "epochs": 100.0, "eval_every": 1000.0})
    words = [data, "-o", tmp_path / "model", "-j", 1, *settings]
    log = tmp_path / "model" / "log.csv"
    with torchrun(*words) as run:
        deadline = time.monotonic() + 250
        while time.monotonic() < deadline and run.poll() is None and squares.lines(log) < 3:
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        errors = run.communicate(timeout=150)[1]
    assert run.returncode != 0 and errors.count("--resume goes on in") == 1, errors
    step = checkpoint.read(tmp_path / "model")[0].step
    assert 2 <= step < 200
    with torchrun(*words, "--resume") as run:
        errors = run.communicate(timeout=250)[1]
    assert run.returncode == 0, errors
    assert errors.count(f"going on after step {step} of 200") == errors.count("use it: clipcli classify") == 1
    assert checkpoint.read(tmp_path / "model")[0].step == squares.lines(log) - 1 == 200


# ---- who we are


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch


def test_alone(environment: pytest.MonkeyPatch) -> None:
    with joined("mps") as found:
        assert found == (ALONE, "mps") and not dist.is_initialized()
    environment.setenv("WORLD_SIZE", "1")  # torchrun with one process
    with joined() as found:
        assert found == (ALONE, "auto")
    assert anywhere(True, ALONE) and not anywhere(False, ALONE)


def test_what_can_not_be_joined(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("WORLD_SIZE", "4")  # as batch systems set it
    environment.setenv("RANK", "0")
    with pytest.raises(UsageError, match=r"^WORLD_SIZE is 4, but LOCAL_RANK is not set$") as caught, joined():
        pass
    assert caught.value.hint == "start it with torchrun, or unset WORLD_SIZE"
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.setenv(name, "7")
    with pytest.raises(UsageError, match=r"^several processes can't train on mps$"), joined("mps"):
        pass
    environment.setattr(torch.cuda, "device_count", lambda: 2)  # one device a process
    with pytest.raises(UsageError, match='device "cuda:7" is not there') as caught, joined("cuda"):
        pass
    assert caught.value.hint == "cuda:0 to cuda:1 are there"
    environment.setenv("RANK", "first")
    with pytest.raises(UsageError, match=r"^the processes don't find each other: .*first"), joined("cpu"):
        pass
    assert not dist.is_initialized()


# ---- CUDA


@pytest.mark.gpu
def test_synchronised_statistics(data: Path, tmp_path: Path) -> None:
    """A process group of one: synchronised layers learn what plain ones do, chunk by chunk."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    settings = {**squares.RESNET, "chunk_size": 6, "precision": "fp32"}
    wanted = learn(squares.trainer(data, "cuda", **settings))
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        trainer = squares.trainer(data, "cuda", **settings)
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(trainer.towers)
        assert {type(norm) for norm in batch_norms(trainer.clip)} == {torch.nn.SyncBatchNorm}
        found = learn(squares.trainer(data, "cuda", **settings))
    finally:
        dist.destroy_process_group()
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-2)
    for name in ("visual.bn1.running_mean", "visual.bn1.num_batches_tracked"):
        torch.testing.assert_close(found["weights"][name], wanted["weights"][name], rtol=1e-2, atol=1e-3)
