"""`clipcli models`: what it prints, what it leaves alone, and a model by name from the first run to the last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import SHARED, Run
from hub_server import Hub, apart, serving

from clipcli import load_model
from clipcli.tasks import verify
from clipcli.weights.catalog import DEFAULT, MODELS, find
from clipcli.weights.hub_cache import hub_cache

DEFAULT_REPO = "laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no way to the network."""
    apart(monkeypatch, tmp_path / "hf")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")  # for processes of their own
    return tmp_path / "hf"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, model: Path) -> Iterator[Hub]:
    """A Hub that has the small model under the name of the default one."""
    with serving(Hub()) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.add(DEFAULT_REPO, {path.name: path.read_bytes() for path in model.iterdir()})
        yield server


# ---- list


def test_list(cli: Run) -> None:
    result = cli("models", "list")
    title, *lines = result.lines
    assert result.code == 0 and title.split() == [
        "name",
        "parameters",
        "download",
        "pixels",
        "top-1",
        "licence",
        "here",
    ]
    assert [line.split()[0] for line in lines] == [entry.name for entry in MODELS]
    assert lines[0].split() == [DEFAULT, "151", "M", "605", "MB", "256", "72.81", "MIT"]
    assert "ViT-H-14-laion2b" in result.out.decode() and "\x1b" not in result.out.decode()
    assert result.err.startswith(f"clipcli: {len(MODELS)} models, 1 here; without --model it is {DEFAULT}. ")
    assert cli("models", "list", "-q").err == ""


def test_list_as_json(cli: Run, hub: Hub) -> None:
    cli("models", "pull", DEFAULT)
    rows = json.loads(cli("models", "list", "--json").out)
    assert len(rows) == len(MODELS) and [row["name"] for row in rows if row["default"]] == [DEFAULT]
    assert [row["name"] for row in rows if row["path"]] == [DEFAULT, "tiny"] and Path(rows[0]["path"]).is_dir()
    by_name = {row["name"]: row for row in rows}
    assert by_name["RN50-openai"]["aliases"] == ["RN50"] and by_name["ViT-B-32-openai"]["imagenet_top1"] == 63.32
    assert by_name["ViT-H-14-laion2b"]["parameters"] is None


def test_list_reads_what_the_catalogue_does_not_know_once_it_is_here(cli: Run, hub: Hub, model: Path) -> None:
    hub.add("laion/CLIP-ViT-g-14-laion2B-s34B-b88K", {path.name: path.read_bytes() for path in model.iterdir()})
    cli("models", "pull", "ViT-g-14-laion2b")
    row = next(row for row in json.loads(cli("models", "list", "--json").out) if row["name"] == "ViT-g-14-laion2b")
    assert (row["parameters"], row["image_size"]) == (87_264, 32)


@pytest.mark.parametrize("command", [["list"], ["info"], ["info", "--json"]], ids=" ".join)
def test_no_torch_and_no_client_to_look_around(command: list[str], hub: Hub, cli: Run) -> None:
    cli("models", "pull", DEFAULT)
    code = f"from clipcli.cli.main import run; run({['models', *command]!r})"
    code += "; import sys; print(*sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    modules = {name.partition(".")[0] for name in result.stderr.splitlines()[-1].split()}
    assert result.stdout and not modules & {"torch", "huggingface_hub", "PIL", "ftfy"}
    assert ("numpy" in modules) == (command[0] == "info")  # for the fingerprints


# ---- pull


def test_pull(cli: Run, hub: Hub) -> None:
    first = cli("models", "pull", DEFAULT)
    assert first.code == 0 and Path(os.fsdecode(first.out.strip())).is_dir()
    assert first.err == (f"clipcli: downloading {DEFAULT} ({DEFAULT_REPO}): 358 kB, to {hub_cache()}; licence: MIT\n")
    asked = len(hub.requests)
    again = cli("models", "pull", DEFAULT_REPO, DEFAULT)
    assert again.out == 2 * first.out and again.err == "" and len(hub.requests) == asked


def test_pull_quietly(cli: Run, hub: Hub) -> None:
    assert cli("models", "pull", DEFAULT, "-q").err == ""


def test_pull_checks_all_names_first(cli: Run, hub: Hub) -> None:
    result = cli("models", "pull", DEFAULT, "ViT-B-32-256-datacmp")
    assert (result.code, result.out) == (1, b"") and hub.requests == []
    assert result.err.splitlines()[1].startswith(f"hint: did you mean {DEFAULT} or ")


# ---- info


def test_info_of_a_folder(cli: Run, model: Path) -> None:
    result = cli("models", "info", model, "--json")
    facts = json.loads(result.out)
    sources = facts["sources"]
    assert facts["name"] == model.name and facts["layout"] == "open_clip" and "licence" not in facts
    assert facts["parameters"] == {"image": 32_768, "text": 54_496, "all": 87_264}
    assert facts["activation"] == "gelu" and sources["activation"] == "open_clip_config.json"
    assert facts["resize_mode"] == "shortest" and sources["mean"] == "open_clip_config.json"
    assert facts["image_tower"]["patch_size"] == 8 and "activation" not in facts["image_tower"]
    assert facts["image_fingerprint"] == load_model(model).image_fingerprint
    assert facts["logit_scale"] == pytest.approx(100) and facts["stored_as"] == ["F32"]
    assert facts["vocabulary"] == str(model / "merges.txt")


def test_info_says_what_was_not_stated(cli: Run, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    config = json.loads((folder / "open_clip_config.json").read_text())
    del config["model_cfg"]["quick_gelu"], config["preprocess_cfg"]["interpolation"]
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    sources = json.loads(cli("models", "info", folder, "--json").out)["sources"]
    assert sources["activation"] == "open_clip_config.json: not stated, so gelu"
    assert sources["interpolation"] == "not stated: the original's" and sources["std"] == "open_clip_config.json"


@pytest.mark.parametrize(
    ("layout", "config", "preprocessing"),
    [
        ("transformers", "config.json", "preprocessor_config.json"),
        ("bare", "the tensors' shapes", "not stated: the original's"),
    ],
)
def test_info_of_other_layouts(cli: Run, tmp_path: Path, layout: str, config: str, preprocessing: str) -> None:
    path = tiny.save(tmp_path / "m", layout, dtype=np.float16)
    bare = ["--activation", "gelu", "--head-width", "16"] if layout == "bare" else []
    facts = json.loads(cli("models", "info", path, "--json", *bare).out)
    assert facts["sources"]["image_tower"] == config and facts["sources"]["mean"] == preprocessing
    assert facts["stored_as"] == ["F16"] and facts["parameters"]["all"] == 87_264


def test_info_of_a_resnet_in_words(cli: Run, tmp_path: Path) -> None:
    lines = cli("models", "info", tiny.save(tmp_path / "m", config=tiny.resnet())).lines
    assert any("ModifiedResNet: (1, 1, 1, 1) bottlenecks, width 8, 16 heads" in line for line in lines)
    assert any(line.startswith("files ") and "open_clip_model.safetensors (" in line for line in lines)


def test_info_of_a_model_that_is_not_here(cli: Run, hub: Hub) -> None:
    facts = json.loads(cli("models", "info", "ViT-L/14", "--json").out)
    assert (facts["name"], facts["path"], facts["imagenet_top1"]) == ("ViT-L-14-openai", None, 75.54)
    assert facts["parameters"]["all"] == 427_616_512 and set(facts["sources"].values()) >= {"the catalogue"}
    assert "activation" not in str(facts) and hub.requests == []
    unknown = cli("models", "info", "me/clip")
    assert unknown.code == 1
    assert unknown.err == "clipcli: me/clip: not downloaded, and not in the list\nhint: clipcli models pull me/clip\n"


def test_info_names_the_override(cli: Run, hub: Hub, model: Path) -> None:
    hub.add("apple/DFN5B-CLIP-ViT-H-14", {path.name: path.read_bytes() for path in model.iterdir()})
    cli("models", "pull", "ViT-H-14-dfn5b")
    facts = json.loads(cli("models", "info", "ViT-H-14-dfn5b", "--json").out)
    assert (facts["resize_mode"], facts["sources"]["resize_mode"]) == ("squash", "the catalogue")


# ---- verify


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("config", [tiny.vit(), tiny.resnet()], ids=["vit", "resnet"])
def test_verify(cli: Run, tmp_path: Path, precision: str, config: Any) -> None:
    options = ("-d", "cpu", "-p", precision, "--runtime", "torch", "--json")
    result = cli("models", "verify", tiny.save(tmp_path / "m", config=config), *options)
    found = json.loads(result.out)
    assert result.code == 0 and found["passed"] and found["on"] == f"cpu, {precision}"
    assert [check["what"] for check in found["checks"]] == ["image embeddings", "text embeddings", "cosines"]
    assert all(0 < check["deviation"] <= check["allowed"] for check in found["checks"])


def test_verify_in_words(cli: Run, model: Path) -> None:
    result = cli("models", "verify", model, "-d", "cpu")
    assert [line.split()[-1] for line in result.lines[1:]] == ["ok"] * 3
    assert result.err == f"clipcli: {model.name} on cpu, fp32: right, against fp32 on the CPU\n"


@pytest.mark.parametrize(("broken", "wrong"), [(1e-4, "1.0e-04"), (np.nan, "nan")])
def test_verify_sees_a_machine_that_computes_wrong(
    cli: Run, model: Path, monkeypatch: pytest.MonkeyPatch, broken: float, wrong: str
) -> None:
    from clipcli.weights.model import Model

    right = Model.encode_image

    def sometimes(self: Model, pixels: Any) -> Any:
        vectors = right(self, pixels)
        if len(pixels) > 1:  # in a batch only
            vectors[3, 5] += broken
        return vectors

    monkeypatch.setattr(Model, "encode_image", sometimes)
    result = cli("models", "verify", model, "-d", "cpu")
    assert result.code == 1 and "NOT right" in result.err
    assert result.lines[1].split() == ["image", "embeddings", wrong, "1e-05", "TOO", "LARGE"]
    assert result.lines[2].split()[-1] == "ok"
    checks = json.loads(cli("models", "verify", model, "-d", "cpu", "--json").out)["checks"]
    assert [check["passed"] for check in checks] == [False, True, False]


def test_made_inputs_cover_what_matters() -> None:
    config = replace(tiny.vit(), vision=replace(tiny.vit().vision, image_size=36))
    pictures, prompts = verify.made_pictures(config), verify.made_prompts(config)
    assert pictures.shape == (8, 3, 36, 36) and len({picture.tobytes() for picture in pictures}) == 8
    assert (pictures.min(), pictures.max()) == (0, 255)
    assert min(map(len, prompts)) == 2 and max(map(len, prompts)) == config.text.context_length
    assert all(max(prompt) == prompt[-1] == config.text.vocab_size - 1 for prompt in prompts)
    assert all(prompt.count(prompt[-1]) == 1 for prompt in prompts)


@pytest.fixture
def known_pictures() -> Path:
    folder = SHARED / "reference" / "openai"
    if not (folder / "CLIP.png").is_file():
        pytest.skip("the golden files (../shared/reference) are not here")
    return folder


def test_published_outputs(cli: Run, tmp_path: Path, known_pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With figures of the small model in place of the real one's: computed by `classify`, on the same pictures."""
    from clipcli import ClassifyOptions, build_classifier, classify

    path = tiny.save(tmp_path / "ViT-B-32")
    model = load_model(path, device="cpu")
    figures = []
    for published in verify.PUBLISHED["ViT-B-32-openai"]:
        classifier = build_classifier(model, list(published.texts), templates="<>")
        (row,) = classify(
            [str(known_pictures / published.picture)], classifier, model, ClassifyOptions(pixels="reference")
        )
        by_label = {candidate.label: candidate for candidate in row.top}  # type: ignore[union-attr]
        found = [by_label[text] for text in published.texts]
        logits = tuple(model.checkpoint.logit_scale * candidate.cosine for candidate in found)
        figures.append(replace(published, probabilities=tuple(c.score for c in found), logits=logits))
    monkeypatch.setitem(verify.PUBLISHED, "ViT-B-32-openai", tuple(figures))
    result = cli("models", "verify", path, "-d", "cpu", "--picture", known_pictures)
    assert result.code == 0, result.out
    assert [line.split()[0] for line in result.lines[4:]] == ["franz-kafka.jpg:"] * 2 + ["CLIP.png:"] * 2
    off = replace(figures[0], logits=(figures[0].logits[0] + 0.2, figures[0].logits[1]))  # type: ignore[index]
    monkeypatch.setitem(verify.PUBLISHED, "ViT-B-32-openai", (off,))
    assert cli("models", "verify", path, "-d", "cpu", "--picture", known_pictures).code == 1


def test_the_figures_are_the_published_ones(known_pictures: Path) -> None:
    known = json.loads((known_pictures / "known_outputs.json").read_text())
    for name, original in (("ViT-B-32-openai", "ViT-B/32"), ("RN50-openai", "RN50")):
        for published in verify.PUBLISHED[name]:
            figures = known[published.picture][original]
            assert list(published.texts) == known[published.picture]["texts"]
            assert list(published.probabilities) == figures["probabilities"]
            assert (list(published.logits) if published.logits else None) == figures.get("logits_per_image")
        assert find(name)


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("m", {}, "m: no published outputs are known for it"),
        ("ViT-B-32", {}, "pictures: there is no franz-kafka.jpg nor CLIP.png"),
        ("RN50", {"franz-kafka.jpg": b"another"}, "franz-kafka.jpg: not the picture that figures were published for"),
    ],
)
def test_pictures_that_do_not_fit(cli: Run, tmp_path: Path, name: str, files: dict[str, bytes], message: str) -> None:
    (tmp_path / "pictures").mkdir()
    for file, data in files.items():
        (tmp_path / "pictures" / file).write_bytes(data)
    result = cli("models", "verify", tiny.save(tmp_path / name), "-d", "cpu", "--picture", tmp_path / "pictures")
    assert (
        result.code == 2 and message in result.err.splitlines()[0] and result.err.splitlines()[1].startswith("hint: ")
    )


# ---- A model by name


def test_the_default_model_from_the_first_run_to_the_last(hub: Hub, photos: Path, home: Path) -> None:
    """The real command in processes of its own: download, then again without a network, then without being there."""

    def clipcli(*args: object, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "clipcli", "classify", photos / "rocket.jpg", "-L", "cat", "-L", "dog", *args]
        return subprocess.run(map(str, command), capture_output=True, text=True, env={**os.environ, **more}, cwd=ROOT)

    first = clipcli("-d", "cpu")
    assert first.returncode == 0 and first.stderr.startswith(f"clipcli: downloading {DEFAULT} ("), first.stderr
    asked = len(hub.requests)
    second = clipcli("-d", "cpu", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert (second.returncode, second.stdout) == (0, first.stdout) and len(hub.requests) == asked
    absent = clipcli("--offline", "-m", "ViT-B/16")
    assert absent.returncode == 1 and absent.stderr == (
        "clipcli: ViT-B-16-openai is not there in the cache, and this run is offline\n"
        "hint: get it once with the network: clipcli models pull ViT-B/16\n"
    )


def test_a_cached_model_opens_no_connection(cli: Run, hub: Hub, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("models", "pull", DEFAULT)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(f"socket.{name}", forbidden)
    result = cli("classify", photos / "rocket.jpg", "-L", "cat", "-L", "dog", "-d", "cpu", "-v")
    assert result.code == 0 and f"model: {DEFAULT} (open_clip), on cpu, fp32" in result.err


@pytest.mark.parametrize("command", ["list", "pull", "info", "verify"])
def test_help(cli: Run, command: str) -> None:
    page = cli("models", command, "--help").out.decode()
    assert page.partition("Examples")[2].count("clipcli models ") >= 3
