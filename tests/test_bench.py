"""`clipcli bench`: that it measures what it says, and advises what follows. No test asserts a time."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import Run
from PIL import Image

from clipcli.errors import UsageError
from clipcli.images.made import made_photograph
from clipcli.tasks import bench as task
from clipcli.tasks import peers
from clipcli.tasks.bench import Absent, BenchOptions, Timing, bench, interleaved
from clipcli.tasks.bench_report import advice
from clipcli.weights import catalog
from clipcli.weights.model import load_model

QUICK = BenchOptions(device="cpu", batches=(1, 3), quick=True, peers=False)


def timed(found: Iterator[Timing | Absent]) -> list[Timing]:
    return [one for one in found if isinstance(one, Timing)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """No pictures of 12 megapixels: nobody asserts a time."""
    monkeypatch.setattr(task, "SIZES", {"50 x 40": (50, 40, 2), "120 x 90": (120, 90, 1)})


def test_a_made_photograph_is_always_the_same_and_like_one() -> None:
    data = made_photograph(500, 375, seed=3)
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "JPEG" and picture.size == (500, 375)
    assert data == made_photograph(500, 375, seed=3) != made_photograph(500, 375, seed=4)
    pixels = np.asarray(picture.convert("L"), np.float64)
    assert 25 < pixels.std() < 90  # neither flat nor black and white
    beside = np.corrcoef(pixels[:, :-1].ravel(), pixels[:, 1:].ravel())[0, 1]
    assert beside > 0.9  # no noise
    assert 40_000 < len(data) < 140_000  # as those of ImageNet


def test_the_ways_take_turns() -> None:
    ran: list[str] = []
    found = interleaved({name: lambda name=name: ran.append(name) for name in "abc"}, 0, least=3)  # type: ignore[misc]
    assert "".join(ran) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(spent) for name, spent in found.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_short_way_is_repeated_and_rounds_have_an_end() -> None:
    ran: list[str] = []
    found = interleaved({"a": lambda: ran.append("a")}, 0.02, most=4)
    assert 2 <= len(found["a"]) <= 4 and len(ran) > 100 * len(found["a"])


def test_batches_are_what_the_model_is_given(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    encode = task.Model.encode_image
    monkeypatch.setattr(task.Model, "encode_image", lambda self, x: given.append(len(x)) or encode(self, x))
    rows = timed(bench([str(model)], replace(QUICK, stages=("model",), runtimes=("torch",))))
    assert [(row.case, row.way, row.unit, row.ratio) for row in rows] == [
        ("batch 1", "clipcli", "picture", None),
        ("batch 3", "clipcli", "picture", None),
    ]
    assert given == [1, 1, 3, 3]  # once unmeasured, and a round


def test_another_runtime_is_tried_unasked(model: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    rows = timed(bench([str(model)], replace(QUICK, stages=("model", "text"), batches=(2,))))
    assert [(row.stage, row.way) for row in rows] == [
        ("model", "clipcli"),
        ("model", "clipcli, fp32 by onnx"),
        ("model", "clipcli, int8 by onnx"),
        ("text", "clipcli"),
    ]
    asked = replace(QUICK, stages=("model", "text"), batches=(2,), runtimes=("torch", "onnx"), precisions=("fp32",))
    rows = timed(bench([str(model)], asked))
    assert [row.way for row in rows] == ["clipcli, fp32 by torch", "clipcli, fp32 by onnx", "clipcli, fp32 by torch"]


def test_precisions_are_compared_with_the_first(model: Path) -> None:
    options = replace(QUICK, stages=("model",), precisions=("fp32", "bf16"), batches=(2,))
    first, other = timed(bench([str(model)], options))
    assert (first.way, other.way, first.ratio) == ("clipcli, fp32", "clipcli, bf16", None)
    assert other.ratio == pytest.approx(other.seconds[0] / first.seconds[0])


def test_each_part_of_a_run(model: Path) -> None:
    rows = timed(bench([str(model)], replace(QUICK, stages=("decode", "end-to-end", "text", "relabel"))))
    assert [(row.stage, row.case, row.way) for row in rows] == [
        ("decode", "50 x 40, a core", "clipcli"),
        ("decode", "50 x 40, a core", "clipcli, exact"),
        ("decode", "50 x 40, a core", "Pillow"),
        ("decode", "120 x 90, a core", "clipcli"),
        ("decode", "120 x 90, a core", "clipcli, exact"),
        ("decode", "120 x 90, a core", "Pillow"),
        ("end-to-end", "50 x 40", "clipcli"),
        ("end-to-end", "120 x 90", "clipcli"),
        ("text", "2 labels x 80 templates", "clipcli"),
        ("relabel", "1,000 labels", "clipcli"),
        ("relabel", "1,000 labels", "the bare product"),
    ]
    assert all(second > 0 for row in rows for second in row.seconds)


def test_starting_is_measured_in_processes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    run = subprocess.run
    monkeypatch.setattr(
        task.subprocess, "run", lambda command, **rest: commands.append(command) or run(command, **rest)
    )
    fresh, known = timed(bench([str(model)], replace(QUICK, stages=("start",))))
    assert (fresh.way, known.way, fresh.unit) == ("clipcli", "clipcli, known picture", "process")
    assert [command[3] for command in commands] == ["build-classifier"] + ["classify"] * 5
    assert not Path(os.environ["CLIPCLI_CACHE_DIR"]).exists()  # the user's own store is left alone


def test_transformers_takes_part_with_the_same_weights(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    opened = load_model(model, device="cpu")
    found = {one.name: one for one in peers.find(opened, tmp_path)}
    peer = found["transformers"]
    assert isinstance(peer, peers.Peer)
    with pytest.raises(UsageError, match="its embeddings are others"):
        peers._compare(replace(peer, image=lambda pixels: -peer.image(pixels)), opened)
    stages = ("decode", "model", "end-to-end", "text")
    rows = timed(bench([str(model)], replace(QUICK, stages=stages, peers=True, batches=(2,))))
    assert {row.stage for row in rows if row.way == "transformers" and row.ratio is not None} == set(stages)


def test_a_peer_that_is_not_there_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    absent = [*bench([str(model)], replace(QUICK, stages=("decode",), peers=True))]
    row = absent.pop()
    assert [(one.name, one.model) for one in absent if isinstance(one, Absent)] == [
        ("open_clip", row.model),
        ("transformers", row.model),
    ]
    assert all("open_clip" in one.why or "transformers" in one.why for one in absent if isinstance(one, Absent))


def test_a_resnet_is_none_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    opened = load_model(tiny.save(tmp_path / "model", config=tiny.resnet()), device="cpu")
    absent = [one for one in peers.find(opened, tmp_path) if one.name == "transformers"]
    assert isinstance(absent[0], Absent) and "no CLIP with a ResNet" in absent[0].why


def test_what_is_not_here_has_random_weights(cut_off: Path, cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalog.ARCHITECTURES, "ViT-B-32", tiny.vit())
    found = cli("bench", "-m", "ViT-B/32", "--only", "model", "--only", "text", "--quick", "--no-peers", "--json")
    assert found.code == 0
    assert "ViT-B-32-openai is not on this disk: random weights in its place, which are as fast" in found.err
    rows = json.loads(found.out)["rows"]
    assert {row["model"] for row in rows} == {"ViT-B-32-openai"} and {row["stage"] for row in rows} == {"model", "text"}


def test_without_a_model_it_is_tiny(cut_off: Path, cli: Run) -> None:
    found = cli("bench", "--only", "relabel", "--quick", "--json", "-q")
    assert (found.code, found.err) == (0, "")
    report = json.loads(found.out)
    assert list(report) == ["machine", "rows", "absent", "advice"]
    row = report["rows"][0]
    assert list(row) == ["model", "stage", "case", "way", "unit", "seconds", "ratio", "per_second"]
    assert row["model"] == "tiny" and row["per_second"] == pytest.approx(1 / row["seconds"][0])
    assert {"cpu", "cores", "torch", "numpy", "simplejpeg", "transformers"} <= set(report["machine"])


def test_the_user_names_pictures(model: Path, photos: Path, cli: Run) -> None:
    found = cli("bench", photos, "-m", model, "--only", "decode", "--quick", "--no-peers")
    assert found.code == 0 and "\x1b" not in found.out.decode()
    place = found.lines.index(f"{model.name}: decode, yours (5), a core")
    named = [re.split(" {2,}", line.strip()) for line in found.lines[place + 1 : place + 4]]
    assert [row[-1] for row in named] == ["clipcli", "clipcli, exact", "Pillow"]
    assert [len(row) for row in named] == [2, 3, 3] and all("pictures/s" in row[0] for row in named)
    assert max(map(len, found.lines[:place])) < 80


def test_pictures_that_have_no_file_of_their_own(model: Path, photos: Path, tmp_path: Path) -> None:
    source = task.Source("a.tar::rocket.jpg", (photos / "rocket.jpg").read_bytes())
    subject = task._Subject({"clipcli": load_model(model)}, {}, [], {"yours (1)": [source]}, tmp_path, QUICK)
    assert Path(task._file(subject)).read_bytes() == source.data


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "modl"], '--only "modl": there is no such thing\nhint: did you mean model?'),
        (["-p", "fp64"], '--precision "fp64": there is no such thing\nhint: did you mean '),
        (["nowhere"], "nowhere: "),
        (["labels.txt", "--only", "decode", "-m", "tiny"], "there is no picture that can be decoded\nhint: leave them"),
        (["-b", "0"], "--batch-size"),
        (["-m", "no/such/model"], "no/such/model: no such file or folder"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, photos: Path, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    found = cli("bench", "--quick", "--no-peers", *arguments)
    assert found.code in (1, 2) and found.out == b""
    assert said in found.err and "Traceback" not in found.err


def test_interrupted_it_shows_what_it_has(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_off(*_: object) -> Iterator[Timing]:
        yield Timing("m", "start", "one picture", "clipcli", "process", (0.5,), None)
        yield Timing("m", "relabel", "1,000 labels", "clipcli", "row", (1e-5,), None)
        raise KeyboardInterrupt

    monkeypatch.setattr(task, "bench", broken_off)
    found = cli("bench")
    assert found.code == 130 and "interrupted after 2 figures" in found.err
    ways = [re.split(" {2,}", line.strip()) for line in found.lines if line.endswith("  clipcli")]
    assert ways == [["0.50 s", "clipcli"], ["100,000 rows/s", "clipcli"]]
    assert "m: start, one picture" in found.lines and "m: relabel, 1,000 labels" in found.lines


def test_advice() -> None:
    def row(model: str, case: str, seconds: float, way: str = "clipcli", ratio: float | None = None) -> Timing:
        return Timing(model, "model", case, way, "picture", (seconds, seconds), ratio)

    large, small = "ViT-L-14-datacomp", "ViT-B-32-datacomp"
    found = [
        row(small, "batch 1", 0.1),
        row(small, "batch 8", 0.0505),
        row(small, "batch 8", 0.049, "open_clip", 0.97),
        row(small, "batch 8", 0.04, "transformers", 0.8),
        row(small, "batch 8", 0.025, "clipcli, fp16", 0.5),
        row(small, "batch 8", 0.06, "clipcli, bf16", 1.2),
        row(small, "batch 32", 0.05),
        row(large, "batch 8", 0.2),
    ]
    assert advice(found) == [
        f"{small}: batch 8 is large enough: 19.8 pictures/s, within 5 % of the best (20.0)",
        f"{small}: fp16 is 2.00 x as fast at batch 8; it pays: clipcli models verify says what it changes",
        f"{small}: bf16 is 0.83 x as fast at batch 8; it gains nothing",
        f"{small} (69.2 % on ImageNet) is 4.0 x as fast as {large} (79.2 % on ImageNet)",
        "clipcli is behind open_clip at model, batch 8 (0.97, a tie), transformers at model, batch 8 (0.80)",
    ]
    ahead = replace(found[2], ratio=1.5)
    assert advice([ahead]) == ["clipcli is behind nowhere"]
    busy = replace(found[0], seconds=(0.1, 0.3))
    assert advice([busy]) == ["rounds differ by 3.0 x: other work on this machine disturbs them"]
    assert advice([]) == []


def test_decoding_as_a_part_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipcli.tasks.bench_report.cpus", lambda: 2)
    model = Timing("m", "model", "batch 8", "clipcli", "picture", (0.05,), None)
    decode = Timing("m", "decode", "4000 x 3000, a core", "clipcli", "picture", (0.1,), None)
    cure = "pictures that are known aren't decoded again"
    assert advice([decode, model]) == [f"m: 50% of the work on 4000 x 3000 is decoding; {cure}"]
    quick = replace(decode, seconds=(0.01,), case="500 x 375, a core")
    assert advice([quick, model]) == ["m: 9% of the work on 500 x 375 is decoding"]


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from clipcli.cli.main import run; run(['bench', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "numpy", "PIL", "huggingface_hub", "ftfy", "regex", "sqlite3", "sklearn"}
    assert done.stdout.count("clipcli bench") >= 4
