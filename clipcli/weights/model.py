"""A checkpoint at work: `load_model` opens one, `Model` encodes pictures and prompts with it.

Nothing heavy happens before it is needed: torch is imported and a tower read when the first batch comes, so that a
run whose answers lie in the store reads no weights.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipcli.errors import UsageError, VocabularyError
from clipcli.model.config import Activation, ClipConfig, ResNetConfig, ViTConfig
from clipcli.store.database import Store
from clipcli.tokenizer import Tokenizer, files_of
from clipcli.weights import catalog
from clipcli.weights.fetch import Located, resolve
from clipcli.weights.load import Checkpoint, load_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from clipcli.model.device import Placement, Precision, Runtime
    from clipcli.model.prefix import FastText
    from clipcli.model.text import TextTransformer
    from clipcli.weights.onnx_images import OnnxImages, OnnxPrecision
    from clipcli.weights.torch_images import TorchImages

log = logging.getLogger("clipcli")

Vectors = NDArray[np.float32]


def load_model(  # noqa: PLR0913  # all have defaults
    model: str | Path | Located,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    runtime: Runtime = "auto",
    activation: Activation | None = None,
    head_width: int | None = None,
    vocabulary: str | Path | None = None,
    offline: bool = False,
    store: Store | None = None,
) -> Model:
    """Open a checkpoint: a directory in open_clip's or transformers' layout, a weight file, or a model by name.

    A name is a short one ("ViT-B-32-256-datacomp") or an id of the Hub, `org/name` or `org/name@revision`: the model
    is downloaded if it isn't in the Hub's cache yet, unless `offline`; "tiny" lies in this package. A `Path` is never
    a name. `runtime` is the image tower's; "onnx", which int8 means, needs the extra of that name, and runs on a CPU.
    `activation` and `head_width` are for bare state dicts, which don't tell; `store` defaults to one that is
    forgotten with the process. Raises ModelError, VocabularyError, UsageError.
    """
    words = Path(vocabulary) if vocabulary is not None else None
    located = model if isinstance(model, Located) else resolve(model, offline=offline, vocabulary=words)
    checkpoint = load_checkpoint(
        located.path, activation=activation, head_width=head_width, vocabulary=words or located.vocabulary
    )
    config = checkpoint.config
    if located.entry is not None and located.entry.resize_mode is not None:
        config = replace(config, preprocess=replace(config.preprocess, resize_mode=located.entry.resize_mode))
    checkpoint = replace(checkpoint, name=located.name, config=config)
    if located.entry is catalog.TINY:
        log.warning("tiny is a small model for trying out; default: %s", catalog.DEFAULT)
    return Model(checkpoint, device=device, precision=precision, runtime=runtime, store=store or Store(None))


class Model:
    """Two towers and a tokenizer. `encode_image` and `encode_text` return unit vectors in fp32 numpy.

    With `reference` they run the readable towers, not what was derived from them: for comparisons.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str,
        precision: Precision,
        store: Store,
        runtime: Runtime = "auto",
        reference: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.store = store
        self._reference = reference
        self._device = device
        self._precision: Precision = "fp32" if precision == "auto" and self._no_cuda else precision
        self._onnx = None if reference else self._onnx_precision(runtime)
        if self._onnx:
            self._device, self._precision = "cpu", "fp32"  # the text tower, which stays torch's
        self._begun = 0  # pictures that numpy encoded, and those that were too many for it

    def __repr__(self) -> str:
        return f"<clipcli.Model {self.name}>"

    @property
    def name(self) -> str:
        """What messages and classifier files call it."""
        return self.checkpoint.name

    @property
    def files(self) -> list[Path]:
        """The files that it is read from, and those beside them in its folder."""
        path, words = self.checkpoint.path, self.checkpoint.vocabulary
        beside = path.iterdir() if path.is_dir() else []
        return [*self.checkpoint.files, *beside, *(files_of(words) if words else [])]

    @property
    def config(self) -> ClipConfig:
        """Its architecture and preprocessing."""
        return self.checkpoint.config

    def _onnx_precision(self, runtime: Runtime) -> OnnxPrecision | None:
        """That of the image tower in ONNX Runtime; None: it is torch's. Raises UsageError."""
        if runtime == "torch" and self._precision == "int8":
            raise UsageError("torch has no int8 here", hint="leave out --runtime torch, or use --precision fp32")
        is_auto = runtime == "auto" and self._precision != "int8"
        if runtime == "torch" or (is_auto and not isinstance(self.config.vision, ResNetConfig)):
            return None
        from clipcli.weights import onnx_images

        if is_auto:  # it runs ResNets faster than torch does, ViTs not (benchmarks/runtime.py)
            return "fp32" if self._is_plain_cpu and onnx_images.is_installed() else None
        return onnx_images.check(self.checkpoint, self._device, self._precision)

    @cached_property
    def placement(self) -> Placement:
        """Where torch runs and in which precision: both towers, or the text tower where ONNX Runtime has the other."""
        from clipcli.model.device import place

        return place(self._device, self._precision)

    @property
    def where(self) -> str:
        """Device and precision of the image tower in words, without torch where that is a CPU beyond doubt."""
        if self._onnx:
            return f"cpu, {self._onnx}, ONNX Runtime"
        return "cpu, fp32" if self._is_plain_cpu else str(self.placement)

    @property
    def _is_plain_cpu(self) -> bool:
        """Whether that is beyond doubt, and fp32."""
        on_cpu = self._device == "cpu" or (self._device == "auto" and self._no_cuda and sys.platform != "darwin")
        return on_cpu and self._precision == "fp32"

    @property
    def precision(self) -> str:
        """That of the image tower."""
        return self._onnx or self.placement.precision

    @property
    def arithmetic(self) -> str:
        """Runtime and precision of the image tower: numbers made in the same one may be kept under the same key.

        Known without torch where the device can't change it, so that a run whose answers are kept starts quickly.
        What numpy makes of a few pictures differs by less than 1e-5 from what torch does, and goes by torch's name.
        """
        return f"onnx-{self._onnx}" if self._onnx else self.text_arithmetic

    @property
    def text_arithmetic(self) -> str:
        """The same of the text tower, which is always torch's."""
        return f"torch-{self.placement.precision if self._precision == 'auto' else self._precision}"

    @cached_property
    def image_fingerprint(self) -> str:
        """The identity of the image tower with its preprocessing, whatever file it came in."""
        return self.checkpoint.fingerprint("image", self.store)

    @cached_property
    def text_fingerprint(self) -> str:
        """The identity of the text tower."""
        return self.checkpoint.fingerprint("text", self.store)

    @property
    def vocabulary(self) -> Path:
        """The file of the BPE vocabulary. Raises VocabularyError where there is none."""
        if self.checkpoint.vocabulary is None:
            raise VocabularyError(
                f"{self.checkpoint.path}: no vocabulary beside the weights",
                hint="put merges.txt or tokenizer.json there, or name one with --vocabulary FILE",
            )
        return self.checkpoint.vocabulary

    @cached_property
    def vocabulary_digest(self) -> str:
        """The identity of the vocabulary's files. Raises VocabularyError."""
        return _digest(files_of(self.vocabulary))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The byte-level BPE of the text tower. Raises VocabularyError."""
        digest = self.vocabulary_digest
        tokenizer = Tokenizer.from_file(self.vocabulary, self.config.text.vocab_size)
        if _digest(files_of(self.vocabulary)) != digest:  # what is kept under the digest must be made with its file
            raise VocabularyError(f"{self.vocabulary}: changed while it was read", hint="it must be a regular file")
        return tokenizer

    @property
    def on_cuda(self) -> bool:
        """Whether it runs on a CUDA device; torch is asked only where there may be one."""
        return not self._no_cuda and self.placement.device.type == "cuda"

    @property
    def _no_cuda(self) -> bool:
        """Whether it runs on no CUDA device, as far as that is known without torch."""
        return self._device in ("cpu", "mps") or (self._device == "auto" and _cuda_is_ruled_out())

    def encode_image(self, pixels: NDArray[np.uint8]) -> Vectors:
        """Map pictures [B, 3, size, size] (uint8, RGB) to unit embeddings [B, embed_dim] (fp32).

        A process that needs torch for nothing else leaves its first few pictures to `model.plain`. What isn't finite
        comes back so. Raises ModelError where there is no memory for a single picture.
        """
        return self.submit(pixels)()

    def submit(self, pixels: NDArray[np.uint8]) -> Callable[[], Vectors]:
        """Begin to encode a batch; what comes back waits for its embeddings. Nothing is gained but on CUDA."""
        vision = self.config.vision
        if isinstance(vision, ViTConfig) and not self._reference and self._are_few(len(pixels), vision):
            with suppress(MemoryError):  # torch will do it in halves
                vectors = self._encode_plainly(pixels, vision)
                return lambda: vectors
        return self._images.submit(pixels)

    @property
    def ahead(self) -> int:
        """How many batches may be begun before the first of them is waited for: none but on CUDA."""
        return 2 * len(self.placement.devices) if self.on_cuda else 0

    @property
    def busy(self) -> dict[str, float]:
        """Seconds for which CUDA devices were busy, by what they did; empty elsewhere."""
        return self._images.busy if self.on_cuda else {}

    @cached_property
    def _images(self) -> TorchImages | OnnxImages:
        if self._onnx:
            from clipcli.weights.onnx_images import OnnxImages

            folder = self.store.path and self.store.path.parent / "onnx"
            return OnnxImages(self.checkpoint, self._onnx, self.image_fingerprint, folder)
        from clipcli.weights.torch_images import TorchImages

        return TorchImages(self.checkpoint, self.placement, self._reference)

    def _are_few(self, pictures: int, vision: ViTConfig) -> bool:
        """Whether numpy does so many more pictures before torch would be imported, and the same numbers come out."""
        is_for_torch = self._device == "mps" or not self._no_cuda or self._precision != "fp32"
        if self._onnx or "torch" in sys.modules or is_for_torch:
            return False
        from clipcli.model import plain

        self._begun += pictures
        return self._begun <= plain.few(vision)

    def _encode_plainly(self, pixels: NDArray[np.uint8], vision: ViTConfig) -> Vectors:
        from clipcli.model import plain

        preprocess = self.config.preprocess
        mean, std = (np.array(x, np.float32).reshape(3, 1, 1) for x in (preprocess.mean, preprocess.std))
        normalised = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        vectors = plain.forward(vision, self.checkpoint.arrays, normalised)
        with np.errstate(all="ignore"):  # what isn't finite is told by the caller
            unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit

    def encode_text(self, ids: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Vectors]]:
        """Map prompts (token ids with start and end, ragged) to unit embeddings.

        Yields (indices into `ids`, fp32 [len(indices), embed_dim]) as batches are done: prompts that begin alike and
        are of like length go together.
        """
        if ids and self._reference:
            import torch

            from clipcli.model.text import pad

            with torch.inference_mode():
                together = _unit(self._text_tower(pad(ids).to(self.placement.device)))
            yield list(range(len(ids))), together
        elif ids:
            from clipcli.model import prefix

            for indices, vectors in prefix.encode(self._fast_text_tower, ids):
                yield indices, _unit(vectors)

    @cached_property
    def _fast_text_tower(self) -> FastText:
        from clipcli.model.prefix import FastText

        device, precision = self.placement.device.type, self.placement.precision
        return FastText(self._text_tower, pack=(device, precision) == ("cpu", "fp32"))

    @cached_property
    def _text_tower(self) -> TextTransformer:
        from clipcli.model.clip import build_text_tower

        tower = build_text_tower(self.config, self.checkpoint.tower("text"))
        return tower.to(self.placement.device, self.placement.dtype)


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            digest.update(file.read_bytes())
        except OSError as error:
            reason = (error.strerror or "can't be read").lower()
            raise VocabularyError(f"{file}: {reason}", hint="name the vocabulary with --vocabulary FILE") from error
    return digest.hexdigest()


def _cuda_is_ruled_out() -> bool:
    """Whether this is a Linux or a Mac without the device files that every CUDA, ROCm or WSL driver makes."""
    drivers = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
    return sys.platform in ("linux", "darwin") and not any(Path(file).exists() for file in drivers)


def _unit(x: Tensor) -> Vectors:
    from clipcli.weights.torch_images import unit

    vectors: Vectors = unit(x).cpu().numpy()
    return vectors
