"""Models by name: huggingface_hub's own client against a small Hub on loopback, and what happens without one."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tiny
from hub_server import CLOSED, Hub, apart, serving

from clipcli.errors import ModelError, NotPlainClip
from clipcli.weights import hub as downloads
from clipcli.weights.fetch import here, parse, resolve
from clipcli.weights.hub_cache import hub_cache, snapshot
from clipcli.weights.load import load_checkpoint
from clipcli.weights.model import load_model

WEIGHTS = "open_clip_model.safetensors"
DEFAULT_REPO = "laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K"


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The same small model in both layouts."""
    folders = {layout: tiny.save(tmp_path_factory.mktemp(layout), layout) for layout in ("open_clip", "transformers")}
    return {layout: contents(folder) for layout, folder in folders.items()}


@pytest.fixture(autouse=True)
def hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no token, no settings, and no waiting between attempts."""
    apart(monkeypatch, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub()) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def notices(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, "clipcli")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "clipcli"]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever as much as makes a socket or looks up a name fails the test."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    for name in ("socket", "create_connection", "getaddrinfo", "socketpair"):
        monkeypatch.setattr(socket, name, forbidden)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sharded(files: dict[str, bytes]) -> dict[str, bytes]:
    """A transformers model whose weights lie in two files."""
    from safetensors.numpy import load, save

    arrays = load(files["model.safetensors"])
    names = sorted(arrays)
    parts = {
        f"model-0000{i}-of-00002.safetensors": {name: arrays[name] for name in half}
        for i, half in enumerate((names[:20], names[20:]), 1)
    }
    index = {"weight_map": {name: part for part, half in parts.items() for name in half}}
    rest = {name: data for name, data in files.items() if name != "model.safetensors"}
    return rest | {part: save(half) for part, half in parts.items()} | {
        "model.safetensors.index.json": json.dumps(index).encode()
    }  # fmt: skip


# ---- What is downloaded


def test_open_clip_layout(hub: Hub, layouts: dict[str, dict[str, bytes]], notices: Callable[[], list[str]]) -> None:
    """One set of weights, the best one, and no file that isn't needed."""
    extra = dict.fromkeys(("open_clip_pytorch_model.bin", "README.md", "flax_model.msgpack", "tokenizer.json"), b"?")
    commit = hub.add("me/clip", extra | layouts["open_clip"] | layouts["transformers"])
    found = resolve("me/clip")
    assert found.path == hub_cache() / "models--me--clip" / "snapshots" / commit
    assert {path.name for path in found.path.iterdir()} == {"open_clip_config.json", WEIGHTS, "merges.txt"}
    assert notices() == [f"downloading me/clip: 358 kB, to {hub_cache()}; licence: mit"]
    assert load_model("me/clip", offline=True).name == "me/clip"


@pytest.mark.parametrize("shards", [False, True])
def test_transformers_layout(hub: Hub, layouts: dict[str, dict[str, bytes]], shards: bool, tmp_path: Path) -> None:
    files = sharded(layouts["transformers"]) if shards else layouts["transformers"]
    hub.add("me/clip", files | {"pytorch_model.bin": b"?"})
    found = resolve("me/clip")
    assert contents(found.path) == files
    expected = load_checkpoint(tiny.save(tmp_path / "m")).tower("image")["conv1.weight"]
    assert np.array_equal(load_model("me/clip").checkpoint.tower("image")["conv1.weight"], expected)


def test_a_short_name_and_an_override(hub: Hub, layouts: dict[str, dict[str, bytes]]) -> None:
    hub.add("apple/DFN5B-CLIP-ViT-H-14", layouts["open_clip"])
    by_name, by_id = load_model("vit-h-14-DFN5b"), load_model("apple/DFN5B-CLIP-ViT-H-14", offline=True)
    assert (by_name.name, by_id.name) == ("ViT-H-14-dfn5b", "apple/DFN5B-CLIP-ViT-H-14")
    assert by_name.config.preprocess.resize_mode == by_id.config.preprocess.resize_mode == "squash"
    assert by_name.image_fingerprint != load_model(by_name.checkpoint.path).image_fingerprint


def test_what_can_not_be_run_is_not_downloaded(hub: Hub, layouts: dict[str, dict[str, bytes]]) -> None:
    config = json.loads(layouts["open_clip"]["open_clip_config.json"])
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = "convnext_base"
    hub.add("me/next", layouts["open_clip"] | {"open_clip_config.json": json.dumps(config).encode()})
    with pytest.raises(NotPlainClip, match="timm_model_name"):
        resolve("me/next")
    assert not hub.asked(WEIGHTS, "HEAD") and not hub.asked("merges.txt")


def test_a_pinned_revision(hub: Hub, layouts: dict[str, dict[str, bytes]]) -> None:
    old = hub.add("me/clip", layouts["transformers"])
    new = hub.add("me/clip", layouts["open_clip"])
    hub.repos["me/clip"].revisions["v1"] = old
    assert resolve("me/clip").path.name == new
    for revision in (old, "v1"):
        found = resolve(f"me/clip@{revision}")
        assert found.path.name == old and found.name == f"me/clip@{revision}"
    before = len(hub.requests)
    assert [resolve(spec).path.name for spec in ("me/clip", "me/clip@v1", f"me/clip@{old}")] == [new, old, old]
    assert len(hub.requests) == before


def test_the_token_goes_to_the_hub_alone(
    hub: Hub, layouts: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("me/secret", layouts["open_clip"], private="hf_mine")
    with pytest.raises(ModelError, match="neither a path here nor on the Hub"):
        resolve("me/secret")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert here(parse("me/secret")) is None and resolve("me/secret").path.is_dir()
    sent = {request.headers.get("authorization") for request in hub.requests if request.path.startswith("/large/")}
    assert sent == {None}
    assert hub.asked("/revision/main")[-1].headers["authorization"] == "Bearer hf_mine"
    assert hub.asked(WEIGHTS)[0].headers["user-agent"].startswith("clipcli/")


# ---- The vocabulary


def vocabulary_model(tmp_path: Path, vocab_size: int) -> dict[str, bytes]:
    config = tiny.vit()
    config = replace(config, text=replace(config.text, vocab_size=vocab_size))
    return contents(tiny.save(tmp_path / f"words{vocab_size}", config=config, vocabulary=False))


def test_the_common_vocabulary(hub: Hub, tmp_path: Path) -> None:
    hub.add("me/clip", vocabulary_model(tmp_path, 49_408))
    hub.add("openai/clip-vit-base-patch32", {"merges.txt": b"#version: 0.2\n", "model.safetensors": b"?"})
    found = resolve("me/clip")
    assert found.vocabulary and found.vocabulary.read_bytes() == b"#version: 0.2\n"
    assert "openai" in str(found.vocabulary) and load_model(found).vocabulary == found.vocabulary
    before = len(hub.requests)
    assert resolve("me/clip") == found and len(hub.requests) == before


def test_no_vocabulary_for_another_size(hub: Hub, tmp_path: Path) -> None:
    hub.add("me/clip", vocabulary_model(tmp_path, 1000))
    assert resolve("me/clip").vocabulary is None
    before = len(hub.requests)
    assert resolve("me/clip").vocabulary is None and len(hub.requests) == before


def test_a_vocabulary_of_ones_own_costs_no_request(hub: Hub, tmp_path: Path) -> None:
    hub.add("me/clip", vocabulary_model(tmp_path, 49_408))
    assert resolve("me/clip", vocabulary=tmp_path / "mine.txt").vocabulary == tmp_path / "mine.txt"
    assert not any("openai" in request.path for request in hub.requests)


# ---- What is here already


def test_a_cached_model_touches_no_network(
    hub: Hub, layouts: dict[str, dict[str, bytes]], request: pytest.FixtureRequest
) -> None:
    hub.add(DEFAULT_REPO, layouts["open_clip"])
    hub.add("me/clip", layouts["transformers"])
    first = [resolve("ViT-B-32-256-datacomp"), resolve("me/clip")]
    hub.requests.clear()
    request.getfixturevalue("no_network")
    assert [resolve("ViT-B-32-256-datacomp"), resolve("me/clip")] == first
    assert load_model("me/clip").text_fingerprint == load_model("ViT-B-32-256-datacomp").text_fingerprint
    assert hub.requests == []


def test_no_socket_is_a_real_guard(no_network: None) -> None:
    with pytest.raises(AssertionError, match="touched"):
        resolve("me/clip")


def test_our_look_into_the_cache_is_huggingface_hubs(hub: Hub, layouts: dict[str, dict[str, bytes]]) -> None:
    from huggingface_hub import try_to_load_from_cache

    hub.add("me/clip", layouts["transformers"])
    folder = resolve("me/clip").path
    for name in layouts["transformers"]:
        assert try_to_load_from_cache("me/clip", name, cache_dir=hub_cache()) == str(folder / name)


@pytest.mark.parametrize(
    "settings",
    [
        {"HOME": "/home/a"},
        {"HOME": "/home/a", "XDG_CACHE_HOME": "/x"},
        {"HOME": "/home/a", "XDG_CACHE_HOME": "/x", "HF_HOME": "~/hf"},
        {"HOME": "/home/a", "HF_HOME": "/h", "HF_HUB_CACHE": "$HOME/hub"},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_the_place_of_the_cache_is_huggingface_hubs(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    theirs = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True)
    for name in ("HF_HOME", "XDG_CACHE_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert str(hub_cache()) == theirs.stdout.strip()


def test_what_another_tool_left_is_used_and_completed(
    hub: Hub, layouts: dict[str, dict[str, bytes]], notices: Callable[[], list[str]]
) -> None:
    from huggingface_hub import hf_hub_download

    hub.add("me/clip", layouts["transformers"] | layouts["open_clip"])
    for name in ("config.json", "model.safetensors"):
        hf_hub_download("me/clip", name, cache_dir=hub_cache(), endpoint=hub.url)
    assert here(parse("me/clip")) is None  # how pictures are prepared isn't known
    hf_hub_download("me/clip", "preprocessor_config.json", cache_dir=hub_cache(), endpoint=hub.url)
    assert here(parse("me/clip")) is not None
    resolve("me/clip")
    assert not hub.asked(WEIGHTS) and len(notices()) == 1 and "2 kB" in notices()[0]
    assert load_model("me/clip", offline=True).checkpoint.layout == "transformers"


def test_one_missing_shard_is_not_complete(hub: Hub, layouts: dict[str, dict[str, bytes]]) -> None:
    hub.add("me/clip", sharded(layouts["transformers"]))
    folder = resolve("me/clip").path
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert here(parse("me/clip")) is None
    assert resolve("me/clip").path == folder and len(hub.asked("model-00001-of-00002.safetensors")) == 2


# ---- Downloads that break


def test_a_cut_download_goes_on_in_the_next_run(hub: Hub, layouts: dict[str, dict[str, bytes]]) -> None:
    commit = hub.add("me/clip", layouts["open_clip"])
    hub.cut[WEIGHTS] = [100_000]
    hub.refuse[f"/large/me/clip/{commit}/{WEIGHTS}"] = [0, 503]  # the client's own second attempt fails, too
    with pytest.raises(ModelError) as failure:
        resolve("me/clip")
    assert failure.value.message == "me/clip: the connection was cut after 100 kB of 355 kB"
    assert failure.value.hint == "run it again: it goes on where it stopped"
    folder = snapshot(parse("me/clip"))
    assert folder is not None and not (folder / WEIGHTS).exists() and here(parse("me/clip")) is None
    with pytest.raises(ModelError, match="not complete"):
        resolve("me/clip", offline=True)
    with pytest.raises(ModelError, match="no weights"):
        load_checkpoint(folder)
    hub.requests.clear()
    hub.refuse.clear()
    resolve("me/clip")
    assert [request.headers.get("range") for request in hub.asked(WEIGHTS)] == ["bytes=100000-"] * 2
    assert contents(folder) == layouts["open_clip"]
    assert not list(folder.parent.parent.rglob("*.incomplete"))


@pytest.mark.skipif(huggingface_hub.__version__ < "2", reason="older versions give up, and the next run goes on")
def test_a_cut_within_a_run_heals_itself(
    hub: Hub, layouts: dict[str, dict[str, bytes]], notices: Callable[[], list[str]]
) -> None:
    hub.add("me/clip", layouts["open_clip"])
    hub.cut[WEIGHTS] = [100_000, 50_000]
    assert contents(resolve("me/clip").path) == layouts["open_clip"]
    ranges = [request.headers.get("range") for request in hub.asked(WEIGHTS) if request.path.startswith("/large/")]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert sum("Trying to resume download" in notice for notice in notices()) == 2  # theirs, said by us


@pytest.mark.parametrize("left", [b"x" * 1000, b"x" * 500_000], ids=["wrong", "too long"])
def test_a_wrong_beginning_is_not_used(hub: Hub, layouts: dict[str, dict[str, bytes]], left: bytes) -> None:
    hub.add("me/clip", layouts["open_clip"])
    blobs = hub_cache() / "models--me--clip" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(layouts['open_clip'][WEIGHTS]).hexdigest()}.incomplete").write_bytes(left)
    if len(left) == 1000:
        with pytest.raises(ModelError, match="another SHA-256"):
            resolve("me/clip")
        assert here(parse("me/clip")) is None
    assert contents(resolve("me/clip").path) == layouts["open_clip"]


def test_a_disk_that_fills_up(hub: Hub, layouts: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("me/clip", layouts["open_clip"])

    def full(_: str, file: Any, **__: Any) -> None:
        file.write(b"x" * 10)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(downloads, "http_get", full)
    with pytest.raises(ModelError, match=r"me/clip: no room for it in .*: it is full") as failure:
        resolve("me/clip")
    assert "HF_HUB_CACHE" in str(failure.value.hint)


def test_a_disk_that_is_too_small(
    hub: Hub, layouts: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("me/clip", layouts["open_clip"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    with pytest.raises(ModelError, match="358 kB are needed, 100 kB are free"):
        resolve("me/clip")
    assert not hub.asked(WEIGHTS)


def test_a_place_that_is_no_folder(
    hub: Hub, layouts: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("me/clip", layouts["open_clip"])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(ModelError, match="not a directory"):
        resolve("me/clip")


# ---- The table of failures: what was asked, what is wrong, what is said, what to do next

Setup = Callable[[Hub, pytest.MonkeyPatch], object]
FAILURES: dict[str, tuple[str, Setup, str, str]] = {
    "no network": (
        "ViT-B-32-256-datacomp",
        lambda h, m: m.setenv("HF_ENDPOINT", CLOSED),
        "ViT-B-32-256-datacomp: the Hub can't be reached (",
        "check the connection and try again, or use a model on this disk: -m PATH, or -m tiny",
    ),
    "no such host": (
        "me/clip",
        lambda h, m: m.setenv("HF_ENDPOINT", "http://nowhere.invalid"),
        "me/clip: the Hub can't be reached (",
        "use a model on this disk: -m PATH",
    ),
    "not a hub": (
        "me/clip",
        lambda h, m: setattr(h, "page", b"<html>please log in</html>"),
        "me/clip: the server answers, but not as a Hub does",
        "check HF_ENDPOINT, and the proxy",
    ),
    "an etag that escapes": (
        "me/clip",
        lambda h, m: setattr(h, "etag", "../../../stolen"),
        "me/clip: the server answers, but not as a Hub does",
        "check HF_ENDPOINT",
    ),
    "unknown id": (
        "me/nothing",
        lambda h, m: None,
        "me/nothing: neither a path here nor on the Hub",
        "if it is private",
    ),
    "unknown id like a known one": (
        "laion/CLIP-ViT-B-32-laion2B",
        lambda h, m: None,
        "laion/CLIP-ViT-B-32-laion2B: neither a path here nor on the Hub",
        "did you mean ViT-B-32-laion2b",
    ),
    "known, but gone": (
        "RN50",
        lambda h, m: None,
        "RN50-openai: no such model on the Hub",
        "`hf auth login`, or set HF_TOKEN",
    ),
    "gated": (
        "me/gated",
        lambda h, m: None,
        "me/gated is gated: its owner asks who wants it",
        "accept the terms on its page, then `hf auth login`, or set HF_TOKEN",
    ),
    "gated, terms not accepted": (
        "me/gated",
        lambda h, m: m.setenv("HF_TOKEN", "hf_any"),
        "me/gated is gated: its owner asks who wants it",
        "accept the terms on its page",
    ),
    "token expired": (
        "me/clip",
        lambda h, m: m.setenv("HF_TOKEN", "expired"),
        "me/clip: the Hub refuses the token (401)",
        "it is wrong or expired: `hf auth login`, or set HF_TOKEN",
    ),
    "forbidden": (
        "me/clip",
        lambda h, m: setattr(h, "down", 403),
        "me/clip: the Hub gives no access (403)",
        "see its page",
    ),
    "too many requests": (
        "me/clip",
        lambda h, m: (setattr(h, "down", 429), h.headers.update({"Retry-After": "30"})),
        "me/clip: too many requests for the Hub (429)",
        "wait 30 s; with a token (HF_TOKEN) more are allowed",
    ),
    "too many requests for a file": (
        "me/clip",
        lambda h, m: h.refuse.update({"/open_clip_config.json": [429] * 9}),
        "me/clip: too many requests for the Hub (429)",
        "wait some minutes",
    ),
    "server in trouble": (
        "me/clip",
        lambda h, m: setattr(h, "down", 503),
        "me/clip: the Hub is in trouble (503)",
        "try again in some minutes, or use a model on this disk: -m PATH",
    ),
    "storage in trouble": (
        "me/clip",
        lambda h, m: h.refuse.update({f"/{WEIGHTS}": [0, 0, 500]}),
        "me/clip: the Hub is in trouble (500)",
        "try again in some minutes",
    ),
    "odd answer": ("me/clip", lambda h, m: setattr(h, "down", 418), "me/clip: the Hub answers 418", "run it again"),
    "a file is gone": (
        "me/clip",
        lambda h, m: h.refuse.update({"/merges.txt": [404]}),
        "me/clip: the Hub answers 404",
        "it may have just changed",
    ),
    "no usable weights": (
        "me/onnx",
        lambda h, m: None,
        "me/onnx: no CLIP weights in a layout that clipcli reads; it holds README.md, config.json, onnx/model.onnx",
        "clipcli models list",
    ),
    "unknown revision": (
        "me/clip@v9",
        lambda h, m: None,
        'me/clip has no revision "v9"',
        "give a branch, a tag or a commit",
    ),
    "impossible revision": ("me/clip@../x", lambda h, m: None, '"../x" can\'t be a revision', "follows the @"),
    "offline": (
        "me/clip",
        lambda h, m: m.setenv("CLIPCLI_OFFLINE", "1"),
        "me/clip is not there in the cache, and this run is offline",
        "get it once with the network: clipcli models pull me/clip",
    ),
    "offline by huggingface_hub's variable": (
        "ViT-B/32",
        lambda h, m: m.setenv("HF_HUB_OFFLINE", "yes"),
        "ViT-B-32-openai is not there in the cache, and this run is offline",
        "clipcli models pull ViT-B/32",
    ),
    "a mistyped name": (
        "ViT-B-32-datacmp",
        lambda h, m: None,
        "ViT-B-32-datacmp: neither a path here nor the name of a model",
        "did you mean ViT-B-32-datacomp or ",
    ),
    "nonsense": (
        "qqqq",
        lambda h, m: None,
        "qqqq: neither a path",
        "clipcli models list shows the names; a path must exist",
    ),
    "a path that isn't there": (
        "./models/x",
        lambda h, m: None,
        "./models/x: no such file or folder",
        "-m takes a path",
    ),
    "a file that isn't there": ("RN50.pt", lambda h, m: None, "RN50.pt: no such file or folder", "-m takes a path"),
    "an id that escapes": (
        "../../nowhere",
        lambda h, m: None,
        "../../nowhere: no such file or folder",
        "-m takes a path",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures(hub: Hub, layouts: dict[str, dict[str, bytes]], case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("me/clip", layouts["open_clip"])
    hub.add("me/gated", layouts["open_clip"], gated=True)
    hub.add("me/onnx", {"README.md": b"?", "config.json": b"{}", "onnx/model.onnx": b"?"})
    spec, setup, message, hint = FAILURES[case]
    setup(hub, monkeypatch)
    with pytest.raises(ModelError) as failure:
        resolve(spec)
    error = failure.value
    assert message in error.message and hint in str(error.hint), (error.message, error.hint)
    assert "\n" not in error.message and not error.message.endswith(".")
    with pytest.MonkeyPatch.context() as patch:  # whatever happened, nothing is taken for a model now
        patch.setenv("CLIPCLI_OFFLINE", "1")
        with pytest.raises(ModelError):
            resolve(spec)


def test_their_logger_is_as_it_was(hub: Hub, layouts: dict[str, dict[str, bytes]]) -> None:
    theirs = logging.getLogger("huggingface_hub")
    before = (list(theirs.handlers), theirs.propagate)
    hub.add("me/clip", layouts["open_clip"])
    resolve("me/clip")
    assert (list(theirs.handlers), theirs.propagate) == before


# ---- Licences


@pytest.mark.parametrize(("licence", "told"), [("cc-by-nc-4.0", 1), ("mit", 0), ("apache-2.0", 0), (None, 0)])
def test_a_licence_is_named_once(
    hub: Hub, layouts: dict[str, dict[str, bytes]], notices: Callable[[], list[str]], licence: str | None, told: int
) -> None:
    hub.add("me/clip", layouts["open_clip"], licence=licence)
    for _ in range(2):
        resolve("me/clip")
    first, *rest = notices()
    assert first.endswith(f"licence: {licence or 'not stated'}")
    assert rest == [f"me/clip may not be used for everything: its licence is {licence}; see its page"] * told


def test_a_licence_of_the_catalogue_is_named_at_the_first_use(
    hub: Hub, layouts: dict[str, dict[str, bytes]], notices: Callable[[], list[str]], home: Path
) -> None:
    """Even where another tool has downloaded the model."""
    hub.add("apple/DFN2B-CLIP-ViT-B-16", layouts["open_clip"])
    resolve("ViT-B-16-dfn2b")
    assert "its licence is Apple, research only" in notices()[1]
    resolve("ViT-B-16-dfn2b", offline=True)
    assert len(notices()) == 2
    shutil.rmtree(home / "cache" / "licences")
    resolve("ViT-B-16-dfn2b", offline=True)
    assert len(notices()) == 3


# ---- Paths


def test_a_path_comes_before_a_name(layouts: dict[str, dict[str, bytes]], tmp_path: Path, no_network: None) -> None:
    folder = tiny.save(tmp_path / "RN50")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert resolve("RN50").path == Path("RN50") and load_model("RN50").name == "RN50"
    assert load_model(folder).name == "RN50"
    with pytest.raises(ModelError, match="no such file or folder"):
        load_model(Path("RN101"))  # a Path is never a name
