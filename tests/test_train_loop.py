"""One step and many: gradient caching, freezing, precision, limits, and a model that really learns."""

from __future__ import annotations

import copy
import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import squares
import torch
from torch import Tensor

from clipcli.errors import ClipcliError
from clipcli.train import checkpoint
from clipcli.train.config import TrainConfig
from clipcli.train.evaluate import Evaluator
from clipcli.train.feed import Samples
from clipcli.train.loop import Trainer, batch_norms, precision_of
from clipcli.train.loss import contrastive_loss
from clipcli.zeroshot import templates

TOWERS = {"vit": squares.VIT, "resnet": squares.RESNET}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return squares.make(tmp_path_factory.mktemp("squares") / "data")


def first(trainer: Trainer) -> Samples:
    return next(trainer.feed.epoch(0))


def gradients(trainer: Trainer) -> tuple[float, dict[str, Tensor]]:
    """The loss of the first step, and the gradient of each weight that has one."""
    trainer.clip.train()
    if trainer.config.freeze_batch_norm:
        for norm in batch_norms(trainer.clip):
            norm.eval()
    loss = trainer.gradients(trainer.batch(first(trainer), 0))
    return loss, {name: p.grad for name, p in trainer.clip.named_parameters() if p.grad is not None}


def take(trainer: Trainer, most: int | None = None) -> list[float]:
    """The losses of the next steps."""
    return [step.loss for step in islice(trainer.run(), most)]


def kept(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.clip.state_dict().items()}


# ---- one step


@pytest.mark.parametrize("chunk", [1, 5, 12, 99])
@pytest.mark.parametrize(
    "settings",
    [
        squares.VIT,
        {**squares.VIT, "soft_targets": False, "smoothing": 0.1},
        {**squares.VIT, "mix": 0.9, "erase": 0.5, "freeze": "text"},
        {**squares.RESNET, "freeze_batch_norm": True, "mix": 0.5},
    ],
    ids=["vit", "one-hot", "frozen", "resnet"],
)
def test_gradient_caching_changes_nothing(data: Path, settings: dict[str, Any], chunk: int) -> None:
    whole, wanted = gradients(squares.trainer(data, **settings))
    cached, found = gradients(squares.trainer(data, **settings, chunk_size=chunk))
    assert cached == pytest.approx(whole, abs=1e-6)
    assert "logit_scale" in wanted
    squares.assert_equal(found, wanted)


def test_the_gradient_is_that_of_the_loss(data: Path) -> None:
    """What the two passes put together is what autograd finds for the formula in one piece."""
    trainer = squares.trainer(data, **squares.VIT)
    loss, found = gradients(squares.trainer(data, **squares.VIT))
    batch = trainer.batch(first(trainer), 0)
    texts = torch.zeros(len(batch.ids), 24, dtype=torch.int64)
    for row, ids in zip(texts, batch.ids, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    image, text = trainer.clip.encode_image(batch.pixels), trainer.clip.encode_text(texts)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (image, text)]
    formula = contrastive_loss(*unit, trainer.clip.logit_scale.exp(), batch.targets)
    formula.backward()
    assert loss == pytest.approx(formula.item(), abs=1e-6)
    squares.assert_equal(found, {name: p.grad for name, p in trainer.clip.named_parameters() if p.grad is not None})


def test_running_statistics_are_per_chunk_and_taken_once(data: Path) -> None:
    """With running BatchNorm a chunk is normalised by its own statistics, and these are counted once a chunk."""
    trainer = squares.trainer(data, **squares.RESNET, chunk_size=6)
    other = copy.deepcopy(trainer.clip).train()
    batch = trainer.batch(first(trainer), 0)
    with torch.no_grad():
        for chunk in batch.pixels.split(6):
            other.encode_image(chunk)
    whole = gradients(squares.trainer(data, **squares.RESNET))[1]
    found = gradients(trainer)[1]
    state = trainer.clip.state_dict()
    for name, tensor in other.state_dict().items():
        if "running_" in name or name.endswith("tracked"):
            assert torch.equal(state[name], tensor)
    assert state["visual.bn1.num_batches_tracked"] == 2 and not torch.equal(
        state["visual.bn1.running_mean"], torch.zeros(4)
    )
    assert all(norm.track_running_stats for norm in batch_norms(trainer.clip))
    assert (found["visual.conv1.weight"] - whole["visual.conv1.weight"]).norm() > 1e-3 * found[
        "visual.conv1.weight"
    ].norm()


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("frozen", ["image", "text"])
def test_a_frozen_tower_keeps_its_bits(data: Path, tower: str, frozen: str) -> None:
    trainer = squares.trainer(data, **TOWERS[tower], freeze=frozen, ema=0.9, clip_gradient=0.5)
    before = kept(trainer)
    take(trainer, 3)
    for state in (trainer.clip.state_dict(), trainer.weights()):  # the running mean too
        changed = {name for name, tensor in before.items() if not torch.equal(state[name], tensor)}
        assert "logit_scale" in changed
        for name in before.keys() - {"logit_scale"}:
            assert (name in changed) == (name.startswith("visual.") == (frozen == "text")), name


def test_frozen_statistics(data: Path) -> None:
    trainer = squares.trainer(data, **squares.RESNET, freeze_batch_norm=True)
    before = kept(trainer)
    take(trainer, 2)
    after = trainer.clip.state_dict()
    for name, tensor in before.items():
        statistic = "running_" in name or name.endswith("tracked")
        assert torch.equal(after[name], tensor) == statistic, name


def test_the_temperature_is_clipped(data: Path) -> None:
    trainer = squares.trainer(data, **squares.VIT, first_scale=99.0, most_scale=99.2, clip_gradient=0)
    trainer.clip.logit_scale.register_hook(lambda grad: -torch.ones_like(grad))  # always upwards
    scales = [step.scale for step in trainer.run()]
    assert max(scales) <= 99.2 * (1 + 1e-6) and scales[-1] > 99.1
    assert trainer.clip.logit_scale.item() <= math.log(99.2) + 1e-6
    assert TrainConfig().most_scale == 100


def test_progressive_sizes_and_events(data: Path) -> None:
    trainer = squares.trainer(data, **squares.RESNET | {"image_size": 64}, sizes=[32], size_until=[0.5])
    steps = list(trainer.run())
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6] and {step.steps for step in steps} == {6}
    assert [step.image_size for step in steps] == [32, 32, 32, 64, 64, 64]
    assert steps[2].epoch == 1.0 and steps[-1].seconds_left == 0 and steps[0].pictures_per_second > 0
    assert trainer.batch(first(trainer), 0).pixels.shape[-1] == 32
    assert trainer.state.step == 6 and take(trainer) == []


def test_what_is_done_between_steps_is_not_their_speed(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("clipcli.train.loop.time.monotonic", lambda: clock[0])
    trainer = squares.trainer(data, **squares.VIT)
    real = trainer.step

    def step(samples: Samples) -> float:
        clock[0] += 2
        return real(samples)

    monkeypatch.setattr(trainer, "step", step)
    speeds = []
    for told in trainer.run():
        clock[0] += 100  # an evaluation
        speeds.append(told.pictures_per_second)
        left = told.seconds_left
        assert left == pytest.approx(2 * (told.steps - told.number))
    assert speeds == pytest.approx([6.0] * len(speeds))
    assert trainer.state.seconds == pytest.approx(2 * trainer.steps + 100 * (trainer.steps - 1))


# ---- numbers that are none


def test_a_loss_that_is_not_finite_stops(data: Path) -> None:
    trainer = squares.trainer(data, **squares.VIT | {"learning_rate": 1e30, "warmup": 0.0})
    with pytest.raises(ClipcliError, match=r"^the (loss|gradient) of step \d is (nan|inf)$") as caught:
        take(trainer)
    assert caught.value.hint and "learning_rate" in caught.value.hint and caught.value.exit_code == 1


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_changes_no_weight(data: Path, clip: float) -> None:
    """The weights before it are still good: a checkpoint must not get others."""
    trainer = squares.trainer(data, **squares.VIT, clip_gradient=clip)
    take(trainer, 1)
    before = kept(trainer)
    trainer.clip.text_projection.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(ClipcliError, match=r"the gradient of step 2 is (nan|inf)"):
        take(trainer)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.clip.state_dict().items())
    assert trainer.state.step == 1


def test_no_clipping_is_no_change(data: Path) -> None:
    """A limit that is never reached, and none, are the same arithmetic; a small one is another."""
    states = []
    for clip in (0.0, 1e9, 1e-3):
        trainer = squares.trainer(data, **squares.VIT, clip_gradient=clip)
        take(trainer, 2)
        states.append(kept(trainer))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["text_projection"], states[2]["text_projection"])


# ---- precision


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_on_a_cpu(data: Path, tower: str, precision: str) -> None:
    """The towers compute in half precision; weights, loss and running mean stay fp32, and it learns as well."""
    settings = {**TOWERS[tower], "epochs": 5.0, "chunk_size": 6 if tower == "vit" else 0}
    exact = squares.trainer(data, **settings)
    half = squares.trainer(data, **settings, precision=precision)
    dtypes = set()
    half.clip.visual.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    wanted, found = take(exact), take(half)
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert found[0] == pytest.approx(wanted[0], rel=0.02) and found[0] != wanted[0]
    assert np.mean(found[-3:]) < found[0] - 0.3 > np.mean(wanted[-3:])
    assert {tensor.dtype for tensor in half.weights().values()} <= {torch.float32, torch.int64}
    assert half.scaler.is_enabled() == (precision == "fp16")


def test_fp16_leaves_out_a_step_that_overflows(data: Path, tmp_path: Path) -> None:
    trainer = squares.trainer(data, **squares.VIT, precision="fp16")
    overflow = [True]
    trainer.clip.text_projection.register_hook(lambda grad: grad * math.inf if overflow[0] else grad)
    before, scale = kept(trainer), trainer.scaler.get_scale()
    take(trainer, 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.clip.state_dict().items())
    assert trainer.scaler.get_scale() == scale / 2 and trainer.state.step == 1
    overflow[0] = False
    take(trainer, 2)
    trainer.save(tmp_path)
    state, tensors = checkpoint.read(tmp_path)
    assert (state.step, state.updates, state.scaler["scale"]) == (3, 2, scale / 2)
    again = squares.trainer(data, **squares.VIT, precision="fp16")
    again.state = state
    again.restore(tensors)
    assert take(again) == take(trainer)
    assert all(torch.equal(tensor, trainer.clip.state_dict()[name]) for name, tensor in kept(again).items())


def test_the_precision_that_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert precision_of(TrainConfig(), cpu) == "fp32"
    assert precision_of(TrainConfig(precision="bf16"), cpu) == "bf16"
    asked = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return including_emulation  # as on cards before Ampere, which emulate it, and slowly

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert precision_of(TrainConfig(), cuda) == "fp16" and asked == [False]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert precision_of(TrainConfig(), cuda) == "bf16"


# ---- many steps


@pytest.mark.parametrize("tower", TOWERS)
def test_it_learns(data: Path, tower: str) -> None:
    """Three colours of squares, from random weights to zero-shot answers about pictures that it never saw."""
    trainer = squares.trainer(data, **TOWERS[tower] | {"epochs": 15.0, "hold_out": 0.4, "batch_size": 9}, ema=0.9)
    words = templates.read(["a close-up of a <>."])  # a sentence that it never saw either
    evaluator = Evaluator(trainer.clip_config, trainer.tokenizer, words, trainer.device)
    losses = take(trainer)
    with trainer.averaged() as clip:
        assert not clip.training
        assert evaluator.on_held_out(clip, trainer.feed, trainer.autocast()) > 0.9
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3


def test_averaged_weights_are_lent(data: Path) -> None:
    trainer = squares.trainer(data, **squares.RESNET, ema=0.9)
    take(trainer, 3)
    own = kept(trainer)
    with pytest.raises(KeyError), trainer.averaged() as clip:
        assert not torch.equal(clip.state_dict()["text_projection"], own["text_projection"])
        assert torch.equal(clip.state_dict()["visual.bn1.running_var"], trainer.weights()["visual.bn1.running_var"])
        raise KeyError
    assert all(torch.equal(own[name], tensor) for name, tensor in trainer.clip.state_dict().items())
    assert trainer.clip.training


def test_the_seed_decides(data: Path) -> None:
    runs = [squares.trainer(data, **squares.VIT, seed=seed, mix=0.5, crop="resized") for seed in (1, 1, 2)]
    losses = [take(run, 3) for run in runs]
    assert losses[0] == losses[1] != losses[2]


# ---- CUDA


@pytest.fixture
def cuda() -> str:
    """A device of that kind."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
def test_cuda_learns_as_a_cpu_does(data: Path, cuda: str, tower: str, precision: str) -> None:
    settings = {**TOWERS[tower], "epochs": 5.0, "mix": 0.3, "jitter": 0.2, "ema": 0.9}
    wanted = take(squares.trainer(data, **settings, precision="fp32"))
    trainer = squares.trainer(data, cuda, **settings, precision=precision, chunk_size=6 if tower == "vit" else 0)
    found = take(trainer)
    assert found[0] == pytest.approx(wanted[0], rel=2e-3 if precision == "fp32" else 3e-2)
    assert np.mean(found[-3:]) < found[0] - 0.2 > np.mean(wanted[-3:])
    assert {tensor.device.type for tensor in trainer.weights().values()} == {"cuda"}
    assert trainer.scaler.is_enabled() == (precision == "fp16")
    if tower == "resnet":
        weight = trainer.clip.get_parameter("visual.layer1.0.conv2.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert trainer.optimiser.state[weight]["exp_avg"].stride() == weight.stride()


@pytest.mark.gpu
@pytest.mark.parametrize("tower", TOWERS)
def test_cuda_goes_on_from_a_checkpoint(data: Path, cuda: str, tower: str, tmp_path: Path) -> None:
    settings = {**TOWERS[tower], "precision": "fp16", "ema": 0.9}
    trainer = squares.trainer(data, cuda, **settings)
    take(trainer, 3)
    trainer.save(tmp_path)
    again = squares.trainer(data, cuda, **settings)
    again.state, tensors = checkpoint.read(tmp_path)
    again.restore(tensors)
    assert again.scaler.get_scale() == trainer.scaler.get_scale()
    assert take(again) == pytest.approx(take(trainer), rel=1e-2)


@pytest.mark.gpu
def test_a_cpu_goes_on_from_a_checkpoint_of_cuda(data: Path, cuda: str, tmp_path: Path) -> None:
    trainer = squares.trainer(data, cuda, **squares.VIT, precision="fp32")
    take(trainer, 3)
    trainer.save(tmp_path)
    again = squares.trainer(data, **squares.VIT, precision="fp32")
    again.state, tensors = checkpoint.read(tmp_path)
    again.restore(tensors)
    assert take(again) == pytest.approx(take(trainer), rel=1e-2)
