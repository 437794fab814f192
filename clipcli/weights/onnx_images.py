"""The image tower in ONNX Runtime, on the CPU: nothing is downloaded, and no torch is imported.

uint8 pictures go in, unit embeddings come out. The graph is that of `model.graph`, of this checkpoint. In fp32 it is
written anew around the checkpoint's mapped weights, in less time than a file would be read. What int8 makes of the
weights takes longer and is kept in the cache folder, by fingerprint; it is made anew where the file is damaged. Needs
the packages of the extra `onnx`; `check` says so.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from clipcli.errors import ModelError, OutputError, UsageError
from clipcli.model.config import ResNetConfig
from clipcli.store.database import SIZE_LIMIT
from clipcli.weights.folder import whole_file

if TYPE_CHECKING:
    from clipcli.weights.load import Checkpoint

log = logging.getLogger("clipcli")

_FORMAT = 1  # raise it when `model.graph` makes something else of the same weights
_GRAPH = "graph"  # the name of the graph among its arrays
_TOGETHER = 32  # pictures at once: more takes memory, and isn't faster

Vectors = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]
OnnxPrecision = Literal["fp32", "int8"]


def is_installed() -> bool:
    """Whether the packages of the extra are there."""
    return all(find_spec(package) for package in ("onnxruntime", "onnx"))


def check(checkpoint: Checkpoint, device: str, precision: str) -> OnnxPrecision:
    """The precision that is meant. Raises UsageError for what ONNX Runtime can't do here."""
    if device not in ("auto", "cpu"):
        raise UsageError(f"ONNX Runtime is for the CPU, not for {device}", hint="leave out --device, or the runtime")
    if precision not in ("auto", "fp32", "int8"):
        raise UsageError(f"no {precision} in ONNX Runtime on a CPU", hint="use --precision fp32 or int8")
    if precision == "int8" and isinstance(checkpoint.config.vision, ResNetConfig):
        hint = "--runtime onnx runs it in fp32"
        raise UsageError(f"{checkpoint.name}: int8 is for vision transformers, and this is a ResNet", hint=hint)
    if not is_installed():
        what = "--precision int8" if precision == "int8" else "--runtime onnx"
        raise UsageError(f"{what} needs ONNX Runtime", hint='pip install "clipcli[onnx]"')
    return "int8" if precision == "int8" else "fp32"


class OnnxImages:
    """A checkpoint's image tower at work. `folder` is the cache's, or None where nothing is to be kept."""

    busy: ClassVar[dict[str, float]] = {}  # of devices beside the CPU

    def __init__(self, checkpoint: Checkpoint, precision: OnnxPrecision, fingerprint: str, folder: Path | None) -> None:
        self.checkpoint = checkpoint
        self.precision = precision
        self._fingerprint = fingerprint
        self._folder = folder

    def submit(self, pixels: NDArray[np.uint8]) -> Callable[[], Vectors]:
        """Encode pictures [B, 3, size, size] (uint8, RGB) to unit rows [B, embed_dim] (fp32), which come when called.

        What isn't finite comes back so. Raises ModelError where there is not enough memory.
        """
        from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

        try:
            parts = [self._run(pixels[i : i + _TOGETHER]) for i in range(0, len(pixels), _TOGETHER)]
        except (MemoryError, RuntimeException) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"{self.checkpoint.name}: ONNX Runtime failed: {reason}", hint="try --runtime torch"
            ) from error
        vectors = np.concatenate(parts)
        with np.errstate(all="ignore"):  # what isn't finite is told by the caller
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return lambda: vectors

    def _run(self, pixels: NDArray[np.uint8]) -> Vectors:
        session, _ = self._session
        found: list[Vectors] = session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(pixels)})
        return found[0]

    @cached_property
    def _session(self) -> tuple[Any, Arrays]:
        """What runs the graph, and the weights, which it may look at as long as it lives."""
        import onnxruntime as ort

        graph, arrays = self._kept() if self.precision == "int8" else self._build(None)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors are raised
        options.add_session_config_entry("session.force_spinning_stop", "1")  # decoding takes turns with it
        if sys.platform == "linux" and len(os.sched_getaffinity(0)) < (os.cpu_count() or 1):
            options.intra_op_num_threads = len(os.sched_getaffinity(0))  # it would count all cores
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
        options.add_external_initializers(list(arrays), values)
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"]), arrays

    def _build(self, most: int | None) -> tuple[bytes, Arrays]:
        from clipcli.model import graph

        return graph.build(self.checkpoint.config, self.checkpoint.arrays, most)

    def _kept(self) -> tuple[bytes, Arrays]:
        """Graph and weights of the int8 form, from the cache folder if they are there."""
        most = _most()
        if self._folder is None:
            return self._build(most)
        runtime = importlib.metadata.version("onnxruntime")
        path = self._folder / f"{self._fingerprint}-int8-{most}-{_FORMAT}-{runtime}.npz"
        try:
            with path.open("rb") as file, np.load(file) as held:
                if held.zip.testzip() is not None:
                    raise BadZipFile
                arrays = dict(held)
            with suppress(OSError):
                os.utime(path)
            return arrays.pop(_GRAPH).tobytes(), arrays
        except FileNotFoundError:
            pass
        except (OSError, ValueError, LookupError, EOFError, RuntimeError, BadZipFile, zlib.error):
            log.warning("%s: damaged, and made anew", path)
        graph, arrays = self._build(most)
        _keep(path, {_GRAPH: np.frombuffer(graph, np.uint8), **arrays})
        return graph, arrays


def _most() -> int:
    """The largest weight in int8: 63 on x86 without VNNI, where two products of 8 bits are added up in 16."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return 127
    try:
        return 127 if "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8") else 63
    except OSError:  # no Linux
        return 63


def _keep(path: Path, arrays: Arrays) -> None:
    """Write a file of the cache; those go that were not used for longest, if all take too much room."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as opened:
            np.savez(opened, **arrays)  # type: ignore[arg-type]  # names are not those of its options
    except (OSError, OutputError) as error:
        log.warning("not kept for later runs: %s", error)
        return
    used = sorted((file for file in path.parent.glob("*.npz") if file != path), key=lambda file: -file.stat().st_mtime)
    room = SIZE_LIMIT - path.stat().st_size
    for file in used:
        room -= file.stat().st_size
        if room < 0:
            with suppress(OSError):
                file.unlink()
