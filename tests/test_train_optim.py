"""The optimiser's parts: first weights, what decays, the learning rate at each step, what is frozen, the mean."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import tiny
import torch
from torch import nn

from clipcli.model.clip import CLIP
from clipcli.model.config import ClipConfig
from clipcli.train.config import TrainConfig
from clipcli.train.optim import Ema, decays, freeze, initialise, learning_rate, optimiser

BOTH = pytest.mark.parametrize("config", [tiny.vit(), tiny.resnet()], ids=["vit", "resnet"])

BLOCK = {"attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
TEXT = {"token_embedding.weight", "text_projection"} | {f"transformer.resblocks.{i}.{n}" for i in (0, 1) for n in BLOCK}
VIT = {"visual.conv1.weight", "visual.proj"} | {f"visual.transformer.resblocks.{i}.{n}" for i in (0, 1) for n in BLOCK}
RESNET = {
    *(f"visual.conv{i}.weight" for i in (1, 2, 3)),
    *(f"visual.layer{stage}.0.conv{i}.weight" for stage in (1, 2, 3, 4) for i in (1, 2, 3)),
    *(f"visual.layer{stage}.0.downsample.0.weight" for stage in (1, 2, 3, 4)),
    *(f"visual.attnpool.{name}_proj.weight" for name in "qkvc"),
}


def model(config: ClipConfig, seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(config)


# Which weights decay


@pytest.mark.parametrize(("config", "image"), [(tiny.vit(), VIT), (tiny.resnet(), RESNET)], ids=["vit", "resnet"])
def test_what_decays(config: ClipConfig, image: set[str]) -> None:
    clip = model(config)
    assert {name for name, p in clip.named_parameters() if decays(name, p)} == TEXT | image
    names = {id(p): name for name, p in clip.named_parameters()}
    adam = optimiser(clip, TrainConfig(weight_decay=0.3, learning_rate=0.01, beta1=0.8, beta2=0.95, epsilon=1e-7))
    heavy, light = adam.param_groups
    assert {names[id(p)] for p in heavy["params"]} == TEXT | image
    assert (heavy["weight_decay"], light["weight_decay"]) == (0.3, 0.0)
    assert sorted(names[id(p)] for group in adam.param_groups for p in group["params"]) == sorted(names.values())
    assert "logit_scale" in {names[id(p)] for p in light["params"]}
    for group in adam.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.8, 0.95), 1e-7)


def test_decay_is_apart_from_the_gradient() -> None:
    """Without a gradient, a step takes `learning rate × decay` off what decays, and nothing off the rest."""
    clip = model(tiny.vit())
    before = {name: p.detach().clone() for name, p in clip.named_parameters()}
    for p in clip.parameters():
        p.grad = torch.zeros_like(p)
    optimiser(clip, TrainConfig(weight_decay=0.5, learning_rate=0.1)).step()
    for name, p in clip.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if decays(name, p) else 1))


# The learning rate


def test_learning_rate_at_its_corners() -> None:
    config = TrainConfig(learning_rate=0.8, warmup=0.2)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:20] == pytest.approx([0.8 * (step + 1) / 20 for step in range(20)])
    assert rates[20] == pytest.approx(0.8)
    assert rates[60] == pytest.approx(0.4)
    assert 0 < rates[99] < 0.001 * 0.8
    assert all(later < earlier for earlier, later in pairwise(rates[20:]))
    assert learning_rate(config, 100, 100) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 10), (0.05, 1), (0.05, 2), (1.0, 10), (0.5, 3)])
def test_learning_rate_of_short_runs(warmup: float, steps: int) -> None:
    config = TrainConfig(learning_rate=0.8, warmup=warmup)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert all(0 < rate <= 0.8 for rate in rates) and max(rates) == pytest.approx(0.8)


# Frozen towers


@BOTH
def test_freeze(config: ClipConfig) -> None:
    for tower, stays in (
        ("none", lambda name: False),
        ("image", lambda name: name.startswith("visual.")),
        ("text", lambda name: not name.startswith("visual.") and name != "logit_scale"),
    ):
        clip = model(config)
        freeze(clip, tower)
        kept = {name for name, p in clip.named_parameters() if not p.requires_grad}
        assert kept == {name for name, _ in clip.named_parameters() if stays(name)}
        groups = optimiser(clip, TrainConfig()).param_groups
        learning = {id(p) for p in clip.parameters() if p.requires_grad}
        assert {id(p) for group in groups for p in group["params"]} == learning


# First weights


@BOTH
def test_first_weights(config: ClipConfig) -> None:
    clip = model(config)
    initialise(clip, 20.0)
    state = clip.state_dict()
    assert state["logit_scale"].exp().item() == pytest.approx(20, rel=1e-5)
    expected = {"token_embedding.weight": 0.02}
    stacks = ["transformer"] if config == tiny.resnet() else ["transformer", "visual.transformer"]
    for stack in stacks:  # width 32, two layers
        expected |= {
            f"{stack}.resblocks.1.attn.in_proj_weight": 32**-0.5,
            f"{stack}.resblocks.1.attn.out_proj.weight": 32**-0.5 * 0.5,
            f"{stack}.resblocks.0.mlp.c_fc.weight": 64**-0.5,
            f"{stack}.resblocks.0.mlp.c_proj.weight": 32**-0.5 * 0.5,
        }
    if len(stacks) == 1:
        expected |= {
            "visual.conv3.weight": (2 / (8 * 9)) ** 0.5,  # He: outputs × 3 × 3
            "visual.layer4.0.conv1.weight": (2 / 64) ** 0.5,
            **{f"visual.attnpool.{name}_proj.weight": 256**-0.5 for name in "qkvc"},
        }
    for name, std in expected.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.12), name
        assert abs(state[name].mean().item()) < 4 * std / state[name].numel() ** 0.5, name


def test_residual_branches_of_a_resnet_begin_as_nothing() -> None:
    clip = model(tiny.resnet())
    initialise(clip, 10.0)
    gains = {name: p for name, p in clip.named_parameters() if name.endswith("bn3.weight")}
    blocks = {name for name in gains if ".layer" in name}
    assert len(blocks) == 4 and all((gains[name] == 0).all() for name in blocks)
    assert (gains["visual.bn3.weight"] == 1).all()  # of the stem: nothing goes around it
    with torch.no_grad():
        clip.eval()
        assert clip.encode_image(torch.randn(2, 3, 32, 32)).norm(dim=1).min() > 0


@BOTH
def test_first_weights_hang_on_the_seed(config: ClipConfig) -> None:
    def first(seed: int) -> dict[str, torch.Tensor]:
        clip = model(config, seed)
        initialise(clip, 10.0)
        return clip.state_dict()

    one, same, other = first(1), first(1), first(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["token_embedding.weight"], other["token_embedding.weight"])


# The running mean


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.register_buffer("statistics", torch.tensor(4.0))
        self.register_buffer("count", torch.tensor(0))


def test_running_mean() -> None:
    """mean += (1 - decay) (weights - mean), where decay is (1 + step) / (10 + step) as long as that is less."""
    module = Small()
    ema = Ema(module, 0.5)  # type: ignore[arg-type]
    mean, statistics = [1.0, -2.0], 4.0
    for step in range(30):
        with torch.no_grad():
            module.weight += torch.tensor([1.0, 0.5])
            module.statistics *= 1.1  # type: ignore[operator]
            module.count += 1  # type: ignore[operator]
        ema.update(module, step)  # type: ignore[arg-type]
        decay = min(0.5, (1 + step) / (10 + step))
        mean = [m + (1 - decay) * (w - m) for m, w in zip(mean, module.weight.tolist(), strict=True)]
        statistics += (1 - decay) * (module.statistics.item() - statistics)  # type: ignore[operator]
        assert ema.state["weight"].tolist() == pytest.approx(mean, rel=1e-5)
        assert ema.state["statistics"].item() == pytest.approx(statistics, rel=1e-5)
        assert ema.state["count"].item() == step + 1
    assert not ema.state["weight"].requires_grad


@BOTH
def test_running_mean_of_a_model_that_stays(config: ClipConfig) -> None:
    clip = model(config)
    ema = Ema(clip, 0.999)
    ema.update(clip, 5)
    assert ema.state.keys() == clip.state_dict().keys()
    for name, tensor in clip.state_dict().items():
        assert torch.equal(ema.state[name], tensor) and ema.state[name].data_ptr() != tensor.data_ptr()


def test_running_mean_forgets_slowly_in_the_end() -> None:
    module = Small()
    ema = Ema(module, 0.9)  # type: ignore[arg-type]
    with torch.no_grad():
        module.weight.zero_()
    for step in range(1000, 1010):
        ema.update(module, step)  # type: ignore[arg-type]
    assert ema.state["weight"].tolist() == pytest.approx([0.9**10, -2 * 0.9**10])
    assert math.isclose(ema.state["statistics"].item(), 4.0)
