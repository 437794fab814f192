"""The optimiser's parts: first weights, which weights decay, the learning rate at each step, the running mean.

Adam with decoupled weight decay on all weights that are no gains, biases, positions or the temperature (paper,
section 2.5), a linear warm-up, then a cosine to zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from clipcli.model.blocks import ResidualAttentionBlock, Transformer
from clipcli.model.clip import CLIP
from clipcli.model.resnet import AttentionPool2d, Bottleneck
from clipcli.train.config import TrainConfig


def initialise(clip: CLIP, scale: float) -> None:
    """First weights as the paper's code draws them, where they differ from torch's own."""
    nn.init.normal_(clip.token_embedding.weight, std=0.02)
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(scale))
    stacks = [module.resblocks for module in clip.modules() if isinstance(module, Transformer)]
    depths = {id(block): len(stack) for stack in stacks for block in stack}
    for module in clip.modules():
        if isinstance(module, ResidualAttentionBlock):
            width = module.attn.out_proj.in_features
            inner = width**-0.5 * (2 * depths[id(module)]) ** -0.5
            nn.init.normal_(module.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(module.attn.out_proj.weight, std=inner)
            nn.init.normal_(module.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(module.mlp.c_proj.weight, std=inner)
        elif isinstance(module, AttentionPool2d):
            for linear in (module.q_proj, module.k_proj, module.v_proj, module.c_proj):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        elif isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn3.weight)  # each block begins as the identity
        elif isinstance(module, nn.Conv2d) and module.kernel_size[0] <= 3:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def optimiser(clip: CLIP, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what isn't frozen."""
    named = [(name, p) for name, p in clip.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    fused = clip.logit_scale.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=fused
    )


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to gains, biases, class token, positions, temperature."""
    return parameter.ndim >= 2 and not name.endswith(("positional_embedding", "bias"))


def freeze(clip: CLIP, tower: str) -> None:
    """Keep one tower's weights ("image": locked-image tuning, LiT); "none" keeps neither."""
    for name, parameter in clip.named_parameters():
        image = name.startswith("visual.")
        if name != "logit_scale" and ((tower == "image" and image) or (tower == "text" and not image)):
            parameter.requires_grad_(False)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of step number `step`, from 0."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Ema:
    """A running mean of all weights and statistics; early on it forgets faster."""

    def __init__(self, clip: CLIP, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in clip.state_dict().items()}

    @torch.no_grad()
    def update(self, clip: CLIP, step: int) -> None:
        """Take in the weights after step number `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, theirs = [], []
        for name, tensor in clip.state_dict().items():
            if tensor.is_floating_point():
                mine.append(self.state[name])
                theirs.append(tensor.detach())
            else:
                self.state[name].copy_(tensor)
        torch._foreach_lerp_(mine, theirs, 1 - decay)
