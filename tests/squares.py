"""Something to learn within seconds: coloured squares on grey, and small towers that can tell them apart.

folder = squares.make(tmp_path / "data")     # red/, green/, blue/ with a few pictures each
run = squares.trainer(folder, **squares.VIT)  # a Trainer at its first step
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipcli.model.clip import CLIP
from clipcli.train import checkpoint
from clipcli.train.config import TrainConfig
from clipcli.train.feed import ALONE, Feed, Share
from clipcli.train.loop import Trainer
from clipcli.train.optim import freeze, initialise
from clipcli.train.vocabulary import train_vocabulary
from clipcli.train.words import examples
from clipcli.weights.save import read_merges
from clipcli.zeroshot import templates

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 220)}
_BOTH = {
    "image_size": 32,
    "embed_dim": 16,
    "text_width": 32,
    "text_layers": 1,
    "context_length": 24,
    "vocabulary_size": 600,
    "batch_size": 12,
    "hold_out": 0.2,
    "epochs": 2.0,
    "learning_rate": 2e-3,
    "warmup": 0.1,
}
VIT: dict[str, Any] = {**_BOTH, "patch_size": 8, "width": 32, "heads": 2, "layers": (2,)}
RESNET: dict[str, Any] = {**_BOTH, "tower": "resnet", "width": 8, "heads": 4, "layers": (1, 1, 1, 1)}


def picture(colour: str, seed: int) -> bytes:
    """A PNG of 40 x 36: grey noise with a square of that colour somewhere."""
    random = np.random.default_rng(seed)
    pixels = random.integers(90, 150, (36, 40, 1)).repeat(3, axis=2)
    size, top, left = random.integers((12, 0, 0), (22, 14, 18))
    pixels[top : top + size, left : left + size] = np.array(COLOURS[colour]) + random.integers(-25, 25, 3)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def make(folder: Path, each: int = 15) -> Path:
    """A folder of class folders."""
    for number, colour in enumerate(COLOURS):
        (folder / colour).mkdir(parents=True)
        for i in range(each):
            (folder / colour / f"{i:02}.png").write_bytes(picture(colour, 1000 * number + i))
    return folder


def shards(folder: Path, each: int = 15, count: int = 3) -> Path:
    """The same pictures in webdataset tars, mixed."""
    folder.mkdir()
    numbered = [(f"{i:02}-{c}", c, 1000 * n + i) for n, c in enumerate(COLOURS) for i in range(each)]
    for number in range(count):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for key, colour, seed in sorted(numbered)[number::count]:
                parts = {"cls": b"0", "png": picture(colour, seed), "txt": colour.encode()}
                for ending, data in parts.items():
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return folder


def trainer(data: Path, device: str = "cpu", share: Share = ALONE, **settings: Any) -> Trainer:
    """A run at its first step, its vocabulary learned and its weights drawn as `run.train` does."""
    config = TrainConfig.read(None, settings)
    words = templates.read([config.templates])
    feed = Feed([str(data)], config, image_size=config.image_size, workers=1, share=share)
    feed.find()
    merges = train_vocabulary(examples(feed.pairs, words), config.vocabulary_size)[0]
    tokenizer = read_merges(merges)
    clip_config = config.clip_config(tokenizer.vocab_size)
    torch.manual_seed(config.seed)
    clip = CLIP(clip_config)
    initialise(clip, config.first_scale)
    freeze(clip, config.freeze)
    state = checkpoint.State(config, checkpoint.digest(feed.pairs), merges)
    return Trainer(clip, clip_config, tokenizer, feed, state, words, torch.device(device))


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The same gradients, each to a hundred-thousandth of its length."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-5 * max(gradient.norm().item(), 0.1), name


def sets(settings: dict[str, Any]) -> list[str]:
    """The settings as `--set` options."""
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    return [word for name, value in options.items() for word in ("--set", f"{name}={json.dumps(value)}")]


@contextmanager
def process(*words: object, env: Mapping[str, str] | None = None, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """`python WORDS` in a process of its own, talking into pipes; one thread, so that many may run."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, *map(str, words)]
    with subprocess.Popen(command, text=True, env=environment, **{**pipes, **options}) as started:
        try:
            yield started
        finally:
            started.kill()  # it is over, unless the test failed


def lines(file: Path) -> int:
    """How many whole lines a file has that perhaps isn't there yet."""
    return file.read_bytes().count(b"\n") if file.is_file() else 0
