"""The training loop: batches in, events out, checkpoints and the best model on disk.

One step (paper, figure 3): encode the pictures and captions of this device's share, gather all devices' embeddings,
take the loss of the whole batch at the embeddings, and send its gradient back through the towers, chunk by chunk
where the batch is larger than memory (gradient caching: the first pass keeps no graph). Everything random follows
from the seed and the step, so that a run that was interrupted goes on as if it hadn't been.

It prints nothing: `Trainer.run` yields an event for each step and evaluation.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from clipcli.errors import ClipcliError
from clipcli.model.clip import CLIP
from clipcli.model.config import ClipConfig
from clipcli.model.device import DTYPES
from clipcli.model.text import pad
from clipcli.records import Template
from clipcli.tokenizer import Tokenizer, cut
from clipcli.train import checkpoint
from clipcli.train.augment import augment, uniform
from clipcli.train.config import TrainConfig
from clipcli.train.feed import Feed, Samples, Share
from clipcli.train.loss import contrastive_loss, truth
from clipcli.train.optim import Ema, learning_rate, optimiser
from clipcli.train.words import Words


@dataclass(frozen=True)
class Step:
    """One step is done."""

    number: int  # from 1
    steps: int  # of the whole run
    epoch: float
    loss: float
    scale: float  # what cosines are multiplied by
    learning_rate: float
    image_size: int
    pictures_per_second: float  # over all devices, in the last steps
    seconds_left: float


class Towers(nn.Module):
    """Both towers and the temperature as one module: what it gives out is all that devices exchange."""

    def __init__(self, clip: CLIP, *, compiled: bool = False) -> None:
        super().__init__()
        self.clip = clip
        # Captions' number and length change from step to step: compiled, the text tower would be compiled all the time.
        self._encode_image = torch.compile(clip.encode_image, dynamic=False) if compiled else clip.encode_image

    def forward(self, pixels: Tensor, ids: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit embeddings [b, D] of pictures and of captions, and the logarithm of the scale.

        `ids`: the distinct captions [U, N]; `places`: which of them each picture has [b].
        """
        image = F.normalize(self._encode_image(pixels).float(), dim=1)
        text = F.normalize(self.clip.encode_text(ids).float(), dim=1)[places]
        return image, text, self.clip.logit_scale * 1.0


@dataclass(frozen=True, eq=False)
class Batch:
    """A device's share of a step, as tensors on the device."""

    pixels: Tensor  # [b, 3, size, size]
    ids: list[list[int]]  # of each picture's caption
    targets: Tensor | None  # [b, B]: captions of all devices


class Trainer:
    """A run in progress: the model, its optimiser, where it stands."""

    def __init__(
        self,
        clip: CLIP,
        clip_config: ClipConfig,
        tokenizer: Tokenizer,
        feed: Feed,
        state: checkpoint.State,
        templates: Sequence[Template],
        device: torch.device,
    ) -> None:
        self.clip_config = clip_config
        self.tokenizer = tokenizer
        self.feed = feed
        self.state = state
        self.config = state.config
        self.device = device
        self.words = Words(state.config, templates)
        self.clip = clip.to(device)
        if device.type in ("cpu", "cuda"):
            self.clip.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.towers = self._over_devices(Towers(self.clip, compiled=self.config.compile))
        self.optimiser = optimiser(self.clip, self.config)
        self.ema = Ema(self.clip, self.config.ema) if self.config.ema else None
        self.dtype = DTYPES[precision_of(self.config, device)]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.steps = max(1, round(self.config.epochs * feed.steps))

    def run(self) -> Iterator[Step]:
        """Take the steps that are left, each told as it is done. Raises ClipcliError where the loss isn't finite."""
        began = since = time.monotonic()
        before = self.state.seconds
        took: deque[float] = deque(maxlen=20)  # seconds of the last steps, without what was done between them
        while self.state.step < self.steps:
            epoch, skip = divmod(self.state.step, self.feed.steps)
            for samples in self.feed.epoch(epoch, skip):
                loss = self.step(samples)
                now = time.monotonic()
                took.append(now - since)
                self.state.seconds = before + now - began
                yield self._told(loss, self.config.batch_size * len(took) / max(sum(took), 1e-9))
                if self.state.step >= self.steps:
                    break
                since = time.monotonic()

    def step(self, samples: Samples) -> float:
        """Learn from one batch; the loss of the whole batch before the step."""
        number = self.state.step
        rate = learning_rate(self.config, number, self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.clip.train()
        if self.config.freeze_batch_norm or self.config.freeze == "image":
            for norm in batch_norms(self.clip):
                norm.eval()
        self.optimiser.zero_grad(set_to_none=True)
        try:
            loss = self.gradients(self.batch(samples, number))
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise ClipcliError(
                f"torch.compile fails here: {str(error).splitlines()[0]}", hint="go on with --set compile=false"
            ) from error
        _demand_finite(loss, "loss", number)
        self.scaler.unscale_(self.optimiser)
        length = nn.utils.clip_grad_norm_(self.clip.parameters(), self.config.clip_gradient or math.inf)
        if not self.scaler.is_enabled():  # which leaves such steps out, and scales less
            _demand_finite(float(length), "gradient", number)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=math.log(self.config.most_scale))
        if self.ema is not None:
            self.ema.update(self.clip, number)
        self.state.step = number + 1
        return loss

    def batch(self, samples: Samples, number: int) -> Batch:
        """Augmented pixels, captions and targets of the step `number`."""
        config, share = self.config, self.feed.share
        arrays = (samples.canvas, samples.aspect, uniform(config, number)[share.rank :: share.world])
        canvas, aspect, numbers = (torch.from_numpy(array).to(self.device) for array in arrays)
        size = config.image_size_at(number / self.steps, self.clip_config.vision.image_size)
        pixels, mixing = augment(canvas, aspect, numbers, size, config, self.clip_config.preprocess)
        captions = self.words.captions(samples.pairs, number, share)
        most = self.clip_config.text.context_length
        ids = [cut(row, most) for row in self.tokenizer(text for text, _ in captions)]
        targets = self._targets(samples, [phrase for _, phrase in captions], mixed=mixing is not None)
        if targets is not None and mixing is not None:
            targets = mixing.targets(targets)
        return Batch(pixels.contiguous(memory_format=torch.channels_last), ids, targets)

    def gradients(self, batch: Batch) -> float:
        """Put the loss's gradient into the parameters' `.grad`; return the loss of the whole batch."""
        share = self.feed.share
        size = self.config.chunk_size or len(batch.ids)
        chunks = [slice(start, start + size) for start in range(0, len(batch.ids), size)]
        whole = len(chunks) == 1
        with nullcontext() if whole else _without_traces(self.clip):
            outputs = [self._encode(batch, chunk) for chunk in chunks]
        image = torch.cat([x for x, _, _ in outputs]).detach().requires_grad_()
        text = torch.cat([x for _, x, _ in outputs]).detach().requires_grad_()
        log_scale = outputs[0][2].detach().requires_grad_()
        targets = None if batch.targets is None else gather(batch.targets, share)
        loss = contrastive_loss(
            gather(image, share), gather(text, share), log_scale.exp(), targets, self.config.smoothing
        )
        at_image, at_text, at_scale = torch.autograd.grad(loss, [image, text, log_scale])
        for number, chunk in enumerate(chunks):
            last = number == len(chunks) - 1
            # Devices exchange gradients with the last chunk alone.
            with nullcontext() if last or share.world == 1 else self.towers.no_sync():  # type: ignore[operator]
                outs = outputs[0] if whole else self._encode(batch, chunk)
                # Each device has the gradient of the whole loss at its own embeddings: a sum over devices is wanted,
                # and DistributedDataParallel takes the mean. The scale's is the same on all of them.
                grads = (at_image[chunk] * share.world, at_text[chunk] * share.world, at_scale * last)
                learning = [(out, grad) for out, grad in zip(outs, grads, strict=True) if out.requires_grad]
                torch.autograd.backward([out for out, _ in learning], [self.scaler.scale(grad) for _, grad in learning])
        return float(loss.detach())

    def weights(self) -> dict[str, Tensor]:
        """What is kept of the model now: the running mean, if there is one."""
        return self.ema.state if self.ema is not None else self.clip.state_dict()

    @contextmanager
    def averaged(self) -> Iterator[CLIP]:
        """The model with the weights that are kept, for evaluation."""
        own = {name: tensor.clone() for name, tensor in self.clip.state_dict().items()} if self.ema else {}
        try:
            if self.ema is not None:
                self.clip.load_state_dict(self.ema.state)
            yield self.clip.eval()
        finally:
            if own:
                self.clip.load_state_dict(own)
            self.clip.train()

    def autocast(self) -> AbstractContextManager[object]:
        """The arithmetic of the run."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from the tensors of a checkpoint."""
        checkpoint.restore(tensors, self.state, self.clip, self.optimiser, self.ema)
        if self.state.scaler:
            self.scaler.load_state_dict(self.state.scaler)

    def save(self, folder: Path) -> None:
        """Write a checkpoint into `folder`."""
        self.state.scaler = self.scaler.state_dict()
        checkpoint.save(folder, self.state, self.clip, self.optimiser, self.ema)

    def _told(self, loss: float, speed: float) -> Step:
        done = self.state.step
        config = self.config
        return Step(
            done,
            self.steps,
            done / self.feed.steps,
            loss,
            math.exp(self.clip.logit_scale.item()),
            float(self.optimiser.param_groups[0]["lr"]),
            config.image_size_at((done - 1) / self.steps, self.clip_config.vision.image_size),
            speed,
            (self.steps - done) * config.batch_size / speed,
        )

    def _encode(self, batch: Batch, chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
        distinct: dict[tuple[int, ...], int] = {}
        places = [distinct.setdefault(tuple(row), len(distinct)) for row in batch.ids[chunk]]
        ids = pad(list(distinct)).to(self.device)
        with self.autocast():
            return self.towers(batch.pixels[chunk], ids, torch.tensor(places, device=self.device))  # type: ignore[no-any-return]

    def _targets(self, samples: Samples, chosen: Sequence[int], *, mixed: bool) -> Tensor | None:
        """[b, B]: which captions of the whole batch are true of this device's pictures; None: of each its own."""
        share, count = self.feed.share, len(chosen)
        if self.config.soft_targets:
            everywhere = gather(torch.tensor(chosen, device=self.device), share).cpu().numpy()
            rows = truth([self.words.true_of(pair) for pair in samples.pairs], everywhere)
        elif mixed or share.world > 1:
            rows = np.eye(count, count * share.world, share.rank * count, np.float32)
        else:
            return None
        return torch.from_numpy(rows).to(self.device)

    def _over_devices(self, towers: Towers) -> nn.Module:
        if self.feed.share.world == 1:
            return towers
        if self.device.type != "cuda":
            return nn.parallel.DistributedDataParallel(towers)
        towers = nn.SyncBatchNorm.convert_sync_batchnorm(towers)  # type: ignore[no-untyped-call]
        return nn.parallel.DistributedDataParallel(towers, device_ids=[self.device])


def precision_of(config: TrainConfig, device: torch.device) -> str:
    """The arithmetic that `auto` means on the device."""
    if config.precision != "auto":
        return config.precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def batch_norms(clip: CLIP) -> list[nn.Module]:
    """The layers that keep statistics."""
    return [module for module in clip.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def gather(x: Tensor, share: Share) -> Tensor:
    """The rows of all devices, in order; this device's own keep their graph."""
    if share.world == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(share.world)]
    dist.all_gather(parts, x.detach().contiguous())
    parts[share.rank] = x
    return torch.cat(parts)


@contextmanager
def _without_traces(clip: CLIP) -> Iterator[None]:
    """No graph is kept, and no layer's statistics change: the second pass does both."""
    norms = batch_norms(clip)
    try:
        for norm in norms:
            norm.track_running_stats = False  # type: ignore[assignment]
        with torch.no_grad():
            yield
    finally:
        for norm in norms:
            norm.track_running_stats = True  # type: ignore[assignment]


def _demand_finite(value: float, what: str, number: int) -> None:
    if not math.isfinite(value):
        raise ClipcliError(
            f"the {what} of step {number + 1:,} is {value}",
            hint="the last checkpoint is good; try a lower learning_rate, a longer warmup or --set precision=fp32",
        )
