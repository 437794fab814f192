"""`clipcli doctor`: what it tells is so, what is broken is said, and no secret is in it."""

from __future__ import annotations

import json
import os
import platform
import re
import sqlite3
import subprocess
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Run
from test_house import HEAVY, modules_after

from clipcli import __version__
from clipcli.cli import checkup
from clipcli.output.text import tilde
from clipcli.paths import store_file
from clipcli.store.database import Store


@pytest.fixture(autouse=True)
def nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, an empty models' folder, and no variables that matter."""
    for name in list(os.environ):
        if name.startswith((*checkup.CONSEQUENCES, "CLIPCLI_", "HF_", "HUGGING")) and not name.endswith("_DIR"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(cli: Run, *args: object, code: int = 0) -> dict[str, Any]:
    result = cli("doctor", "--json", *args)
    assert result.code == code, result.err + result.out.decode()
    found: dict[str, Any] = json.loads(result.out)
    return found


def findings(found: dict[str, Any], level: str) -> list[str]:
    return [finding["text"] for finding in found["findings"] if finding["level"] == level]


def test_a_healthy_machine(cli: Run, tmp_path: Path) -> None:
    found = report(cli)
    assert (found["clipcli"], found["python"]) == (__version__, platform.python_version())
    for name in ("torch", "typer", "pillow", "safetensors"):
        assert found["packages"][name] == metadata.version(name)
    assert 1 <= found["cpus"]["usable"] <= found["cpus"]["all"] == os.cpu_count()
    assert found["devices"] is None
    assert found["caches"]["store"] == {"path": tilde(store_file()), "size": 0, "entries": 0}
    assert found["caches"]["models"]["path"] == tilde(tmp_path / "hub")
    assert findings(found, "problem") == []
    by_name = {one["name"]: one for one in found["settings"]}
    assert by_name["device"] == {"name": "device", "value": "auto", "source": "built-in"}
    assert {"output", "force", "yes"}.isdisjoint(by_name)


def test_the_page_has_the_same_facts(cli: Run) -> None:
    result = cli("doctor")
    page = result.out.decode()
    assert (result.code, result.err) == (0, "") and "\x1b" not in page
    assert page.startswith(f"clipcli {__version__}, Python {platform.python_version()}, ")
    assert f"torch {metadata.version('torch')}" in re.sub(" +", " ", page).split("\n ")
    assert "\ndevices\n  not looked at; use --devices\n" in page
    assert tilde(store_file()) in page
    assert "option > environment > clipcli.toml > " in page


def test_caches_have_their_sizes(cli: Run, tmp_path: Path) -> None:
    import numpy as np

    with Store(store_file()) as store:
        store.keep_prompt_vectors({b"a": np.ones(4, np.float32), b"b": np.ones(4, np.float32)})
    blob = tmp_path / "hub" / "models--org--name" / "blobs" / "abc"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"x" * 1234)
    caches = report(cli)["caches"]
    assert caches["store"]["entries"] == 2 and caches["store"]["size"] == store_file().stat().st_size > 0
    assert (caches["models"]["size"], caches["models"]["repositories"]) == (1234, 1)
    assert caches["models"]["free"] > 0


# ---- devices


def test_devices_only_when_they_are_asked_for(cli: Run) -> None:
    from clipcli.model.device import place

    assert report(cli, "--devices")["devices"] == {
        "found": [str(place("cpu")), *report(cli, "--devices")["devices"]["found"][1:]],
        "asked": "auto",
        "chosen": str(place()),
    }
    assert report(cli, "--device", "cpu")["devices"]["chosen"] == "cpu, fp32"
    assert f"-> {place()}" in cli("doctor", "--devices").out.decode()


def test_an_absent_device_is_a_problem(cli: Run) -> None:
    found = report(cli, "--device", "cuda:77", code=1)
    assert found["devices"]["chosen"] == "not there"
    assert findings(found, "problem")[0].startswith('device "cuda:77" is not there (')


def test_neither_torch_nor_pillow_nor_the_hub_is_imported() -> None:
    code = "sys.stdout = open('/dev/null', 'w'); from clipcli.cli.main import run; run(['doctor'])"
    loaded = modules_after(f"{code}; sys.stdout = sys.__stdout__")
    assert not loaded & {"torch", "PIL", "huggingface_hub", "transformers"}
    code = "sys.stdout = open('/dev/null', 'w'); from clipcli.cli.main import run; run(['doctor', '--help'])"
    assert not modules_after(f"{code}; sys.stdout = sys.__stdout__") & set(HEAVY)


# ---- what is broken


def test_a_broken_settings_file(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "clipcli.toml").write_text("modle = 1\n")
    found = report(cli, code=1)
    assert findings(found, "problem") == ["clipcli.toml:1: clipcli has no option modle (did you mean model?)"]
    assert all(one["source"] == "built-in" for one in found["settings"])
    assert "problem: clipcli.toml:1: " in cli("doctor").out.decode()


def test_a_broken_store(cli: Run) -> None:
    store_file().parent.mkdir(parents=True)
    store_file().write_bytes(b"junk" * 4096)
    found = report(cli, code=1)
    assert "is damaged" in findings(found, "problem")[0]
    assert found["caches"]["store"]["entries"] is None
    assert "unreadable" in cli("doctor").out.decode()
    assert store_file().read_bytes() == b"junk" * 4096  # doctor looks, and touches nothing


def test_a_store_of_a_newer_clipcli(cli: Run) -> None:
    store_file().parent.mkdir(parents=True)
    connection = sqlite3.connect(store_file())
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    assert "written by a newer clipcli" in findings(report(cli, code=1), "problem")[0]


def test_a_store_that_can_not_be_made(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("CLIPCLI_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert any("can't be written" in text for text in findings(report(cli, code=1), "problem"))


def test_packages_missing_and_too_old(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "safetensors":
            raise metadata.PackageNotFoundError(name)
        return "0.33.9" if name.replace("-", "_") == "huggingface_hub" else real(name)

    monkeypatch.setattr(checkup.metadata, "version", version)
    found = report(cli, code=1)
    assert findings(found, "problem") == ["safetensors is not installed: pip install safetensors"]
    assert [text for text in findings(found, "warning") if "0.33.9 is too old" in text]
    assert found["packages"]["safetensors"] is None


# ---- what goes wrong


@pytest.mark.parametrize(
    ("name", "value", "level", "text"),
    [
        (
            "HF_HUB_OFFLINE",
            "1",
            "warning",
            "HF_HUB_OFFLINE=1 is set: models that are not on this disk can't be fetched",
        ),
        ("HF_ENDPOINT", "https://mirror.example", "warning", "HF_ENDPOINT=https://mirror.example is set"),
        ("OMP_NUM_THREADS", "1", "note", "OMP_NUM_THREADS=1 is set: it limits torch's threads"),
        ("TORCH_LOGS", "dynamo", "note", "TORCH_LOGS=dynamo is set"),
        ("CLIPCLI_MODLE", "x", "warning", "CLIPCLI_MODLE is set, and nothing reads it: did you mean CLIPCLI_MODEL?"),
    ],
)
def test_variables(cli: Run, monkeypatch: pytest.MonkeyPatch, name: str, value: str, level: str, text: str) -> None:
    assert not any(text in found for found in findings(report(cli), level))
    monkeypatch.setenv(name, value)
    assert any(found.startswith(text) for found in findings(report(cli), level))


def test_offline_switched_off_is_no_warning(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert findings(report(cli), "warning") == []


def test_no_secret_is_told(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:pass-word@mirror.example/hub?key=abcdef")
    result = cli("doctor", "--json")
    for text in (result.out.decode(), cli("doctor").out.decode()):
        assert not any(secret in text for secret in ("verysecret", "pass-word", "abcdef", "me:"))
    environment = json.loads(result.out)["environment"]
    assert environment["HF_TOKEN"] == "set"
    assert environment["HF_ENDPOINT"] == "https://mirror.example/hub"


def test_the_name_of_the_user_is_left_out(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLIPCLI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CLIPCLI_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("CLIPCLI_MODEL", str(tmp_path / "model"))
    found = report(cli)
    assert found["caches"]["store"]["path"] == "~/cache/store.sqlite"
    assert next(one["value"] for one in found["settings"] if one["name"] == "model") == "~/model"


def test_little_disk(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**9, 10**9))
    assert findings(report(cli), "warning")[0].startswith("little room for models in ")


@pytest.mark.skipif(sys.platform != "linux", reason="the drivers' files are Linux's")
def test_torch_for_cuda_without_a_gpu(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real, exists = metadata.version, os.path.exists
    monkeypatch.setattr(checkup.metadata, "version", lambda name: "2.13.0+cu130" if name == "torch" else real(name))
    monkeypatch.setattr(checkup.os.path, "exists", lambda path: not str(path).startswith("/dev/") and exists(path))
    assert [text for text in findings(report(cli), "warning") if "torch 2.13.0+cu130 is made for CUDA" in text]
    monkeypatch.setattr(checkup.os.path, "exists", lambda path: path == "/dev/nvidiactl" or exists(path))
    assert findings(report(cli), "warning") == []


def test_a_model_without_a_vocabulary(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.save(tmp_path / "m", vocabulary=False)
    assert f"no vocabulary beside the model {model}" in findings(report(cli, "-m", model), "warning")[0]
    monkeypatch.setenv("CLIPCLI_MODEL", str(model))
    assert "(environment CLIPCLI_MODEL)" in findings(report(cli), "warning")[0]
    (tmp_path / "clipcli.toml").write_text('vocabulary = "merges.txt"\n')
    assert findings(report(cli), "warning") == []


def test_a_settings_file_in_this_folder_is_noted(cli: Run, tmp_path: Path) -> None:
    assert not any("clipcli.toml" in text for text in findings(report(cli), "note"))
    (tmp_path / "clipcli.toml").write_text("")
    assert any(text.startswith("clipcli.toml in this folder") for text in findings(report(cli), "note"))


def test_decoders_that_are_missing(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "find_spec", lambda name: None)
    assert 'HEIC pictures need pillow-heif: pip install "clipcli[heic]"' in findings(report(cli), "note")
    monkeypatch.setattr(checkup, "find_spec", lambda name: object())
    assert not any("pictures need a package" in text for text in findings(report(cli), "note"))


def test_it_runs_as_a_process(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-m", "clipcli", "doctor"], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("clipcli ")
