"""Shared fixtures: the golden files and real pictures beside the repository, and a home of our own."""

from __future__ import annotations

import io
import json
import socket
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import skimage
import tiny
from hub_server import apart

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden files, weights unpacked."""
    source = SHARED / "reference"
    if not (source / "weights.tar.xz").is_file():
        pytest.skip("the golden files (../shared/reference) are not here")
    folder = tmp_path_factory.mktemp("reference")
    for entry in source.iterdir():
        if entry.is_dir():  # a writable folder of links: weights are unpacked between them
            for path in entry.rglob("*"):
                target = folder / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                if path.is_file():
                    target.symlink_to(path)
        else:
            (folder / entry.name).symlink_to(entry)
    with tarfile.open(source / "weights.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def pictures() -> Path:
    """Real pictures in webdataset tars."""
    if not (SHARED / "data" / "classes.json").is_file():
        pytest.skip("the real pictures (../shared/data) are not here")
    return SHARED / "data"


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test touches the user's own store or settings."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("CLIPCLI_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setenv("CLIPCLI_CONFIG_DIR", str(folder / "config"))
    for name in ("CLIPCLI_MODEL", "CLIPCLI_DEVICE", "CLIPCLI_PRECISION", "CLIPCLI_RUNTIME", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return folder


@dataclass(frozen=True)
class Result:
    """What a run of the command line left behind."""

    code: int
    out: bytes
    err: str

    @property
    def lines(self) -> list[str]:
        """stdout, by lines."""
        return self.out.decode().splitlines()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """stdout as JSON Lines."""
        return [json.loads(line) for line in self.lines]


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


Run = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `clipcli ARGS` in this process. `stdin` are bytes, or None for a terminal."""

    def run_command(*args: object, stdin: bytes | None = None) -> Result:
        from clipcli.cli.main import run

        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        into = _Terminal(io.BytesIO()) if stdin is None else io.TextIOWrapper(io.BytesIO(stdin))
        with monkeypatch.context() as patch:
            for name, stream in (("stdin", into), ("stdout", out), ("stderr", err)):
                patch.setattr(sys, name, stream)
            code = run([str(arg) for arg in args])
        out.flush()
        return Result(code, out.buffer.getvalue(), err.getvalue())  # type: ignore[attr-defined]

    return run_command


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model in the open_clip layout."""
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real photographs and one broken file, between things that are no pictures."""
    source = Path(skimage.__file__).parent / "data"
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "sub" / "camera.png").write_bytes((source / "camera.png").read_bytes())
    (folder / "broken.jpg").write_bytes((source / "rocket.jpg").read_bytes()[:20_000])
    (folder / "labels.txt").write_text("cat\ndog\nrocket\n")
    (folder / ".hidden.png").write_bytes((source / "coffee.png").read_bytes())
    return folder


@pytest.fixture
def cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of our own, an empty Hub cache, and a network that nobody may so much as ask for a name."""
    apart(monkeypatch, tmp_path / "hf")
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def refuse(*args: object, **others: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Towers as small as ours are slower with more."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures went through torch's image tower, batch by batch."""
    from clipcli.weights.torch_images import Pending, Tower

    batches: list[int] = []
    begin = Tower.begin

    def watched(self: Tower, pixels: Any) -> Pending:
        batches.append(len(pixels))
        return begin(self, pixels)

    monkeypatch.setattr(Tower, "begin", watched)
    return batches
