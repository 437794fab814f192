"""`clipcli embed`, and `classify` with what it made: the same answers as from the pictures, and no work done twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import Result, Run
from numpy.typing import NDArray
from test_house import HEAVY, modules_after

import clipcli
from clipcli.errors import EmbeddingsError
from clipcli.paths import store_file
from clipcli.store.inspect import survey
from clipcli.weights.model import load_model
from clipcli.weights.torch_images import Pending, Tower

LABELS = ("-L", "cat", "-L", "rocket", "-L", "coffee")
FORMATS = ("safetensors", "npz", "parquet")
Embed = Any  # run `embed` and return what it said


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("other"), config=tiny.vit(activation="quick_gelu"))


@pytest.fixture
def embedded(cli: Run, model: Path, photos: Path, tmp_path: Path) -> Path:
    """The photos' embeddings, made without the store: whatever reads them computes nothing by means of it."""
    done = cli("embed", photos, "-m", model, "-o", tmp_path / "photos.npz", "--no-cache")
    assert done.code == 3
    return tmp_path / "photos.npz"


def kinds() -> dict[str, int]:
    """How many entries of each kind the store has."""
    return {group.kind: group.entries for group in survey(store_file()).groups}


def test_what_it_says(cli: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "photos.safetensors"
    done = cli("embed", photos, "-m", model, "-o", file, "-v")
    assert (done.code, done.out) == (3, b"")
    *_, others, end = done.err.splitlines()
    assert "decoding threads" in done.err
    assert f"clipcli: {photos / 'broken.jpg'}: truncated: the file ends before the picture does" in done.err
    assert others == "1 other file passed over"
    assert end.startswith(f"clipcli: 6 pictures, 1 failed, written to {file}, ")
    found = clipcli.load_embeddings(file)
    assert found.vectors.shape == (5, 16) and len(found.failures) == 1
    quiet = cli("embed", photos, "-m", model, "-o", file, "-q", "--force")
    assert quiet.err.splitlines() == [
        f"clipcli: {photos / 'broken.jpg'}: truncated: the file ends before the picture does"
    ]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("kind", FORMATS)
def test_classify_says_the_same_as_of_the_pictures(
    cli: Run, model: Path, photos: Path, tmp_path: Path, seen: list[int], kind: str
) -> None:
    file = tmp_path / f"photos.{kind}"
    assert cli("embed", photos, "-m", model, "-o", file, "--no-cache").code == 3
    encoded = len(seen)
    more = ("-m", model, "-f", "jsonl", "--no-cache", "--background", tmp_path / "rest.txt", "--min-score", "0.4")
    (tmp_path / "rest.txt").write_text("moon\n")
    of_file = cli("classify", file, *LABELS, *more)
    assert len(seen) == encoded  # no image tower
    of_pictures = cli("classify", photos, *LABELS, *more)
    assert of_file.code == of_pictures.code == 3
    assert len(of_file.rows) == 6
    for row, expected in zip(of_file.rows, of_pictures.rows, strict=True):
        numbers = [(row.pop(key), expected.pop(key)) for key in ("score", "cosine", "margin", "top")]
        assert row == expected  # path, label, error, …
        for (found, wanted), key in zip(numbers, ("score", "cosine", "margin"), strict=False):
            assert found == (None if wanted is None else pytest.approx(wanted, abs=1e-6)), key
        for found, wanted in zip(*numbers[3], strict=True):
            assert found["label"] == wanted["label"]
            assert found["score"] == pytest.approx(wanted["score"], abs=1e-6)


def test_files_and_pictures_together_keep_their_order(cli: Run, model: Path, photos: Path, embedded: Path) -> None:
    rows = cli("classify", photos / "coffee.png", embedded, photos / "none", *LABELS, "-m", model)
    assert rows.code == 2  # an INPUT that isn't there
    done = cli("classify", photos / "coffee.png", embedded, photos / "rocket.jpg", embedded, *LABELS, "-m", model)
    names = [line.split("\t")[0].rpartition("/")[2] for line in done.lines]
    all_of_them = ["astronaut.png", "broken.jpg", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png"]
    assert names == ["coffee.png", *all_of_them, "rocket.jpg", *all_of_them]


def test_every_format_and_selection(cli: Run, model: Path, photos: Path, embedded: Path, tmp_path: Path) -> None:
    labels = {row["label"] for row in cli("classify", embedded, *LABELS, "-m", model, "-f", "jsonl").rows} - {None}
    label = sorted(labels)[0]
    for more in (["-f", "tsv"], ["-f", "csv", "-k", "2"], ["-f", "paths", "--select", label, "--print0"]):
        of_file = cli("classify", embedded, *LABELS, "-m", model, *more)
        of_pictures = cli("classify", photos, *LABELS, "-m", model, *more)
        assert of_file.out == of_pictures.out and of_file.code == 3
    first = cli("classify", embedded, *LABELS, "-m", model, "--strict")
    assert (first.code, len(first.lines)) == (3, 2)


def test_a_run_over_a_file_can_be_gone_on_with(cli: Run, model: Path, embedded: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    run = ("classify", embedded, *LABELS, "-m", model, "-o", out)
    assert cli(*run, "--strict").code == 3
    assert out.read_bytes().count(b"\n") == 2
    done = cli(*run, "--resume")
    assert done.code == 3 and "going on after 2 pictures" in done.err
    assert out.read_bytes() == cli(*run[:-2], "-f", "jsonl").out


def test_no_torch_and_no_pillow(cli: Run, model: Path, embedded: Path) -> None:
    assert cli("classify", embedded, *LABELS, "-m", model).code == 3
    args = [str(arg) for arg in ("classify", embedded, *LABELS, "-m", model)]
    loaded = modules_after(f"from clipcli.cli.main import run; assert run({args!r}) == 3")
    assert "numpy" in loaded and not {"torch", "PIL.Image", "ftfy", "pyarrow"} & loaded


def test_help_imports_nothing_heavy() -> None:
    code = f"sys.stdout = open({os.devnull!r}, 'w'); from clipcli.cli.main import run; run(['embed', '--help'])"
    assert not modules_after(code) & {*HEAVY, "pyarrow"}


def test_names_of_any_bytes_come_back(cli: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in (b"caf\xe9.png", b"new\nline.png", b"-dash.png", b"[red].png", b"' \".png"):
        shutil.copy(photos / "coffee.png", os.path.join(os.fsencode(folder), name))
    for kind in FORMATS:
        assert cli("embed", folder, "-m", model, "-o", tmp_path / f"a.{kind}").code == 0
        of_file = cli("classify", tmp_path / f"a.{kind}", *LABELS, "-m", model, "-f", "paths", "--print0")
        assert of_file.out == cli("classify", folder, *LABELS, "-m", model, "-f", "paths", "--print0").out
        assert of_file.out.count(b"\0") == 5


# ---- what it refuses


@pytest.mark.parametrize(
    ("args", "what"),
    [
        ([], "no --output"),
        (["-o", "-"], "can't be written to stdout"),
        (["-o", "{tmp}/a.bin"], "the ending says no format"),
        (["-o", "{tmp}/old.npz"], "exists already"),
        (["-o", "{tmp}/none/a.npz"], "does not exist"),
        (["-o", "{tmp}/a.npz", "--text", "{tmp}/old.npz"], "don't go into one file"),
        (["-o", "{tmp}/a.npz", "--cache-size", "much"], "is no size"),
        (["-o", "{tmp}/a.npz", "{tmp}/none"], "no such file"),
        (["-o", "{tmp}/picture.npz", "--force"], "is a picture"),
    ],
)
def test_wrong_use(cli: Run, model: Path, photos: Path, tmp_path: Path, args: list[str], what: str) -> None:
    (tmp_path / "old.npz").write_text("x")
    shutil.copy(photos / "coffee.png", tmp_path / "picture.npz")
    done = cli("embed", photos / "coffee.png", "-m", model, *(arg.format(tmp=tmp_path) for arg in args))
    assert done.code in (1, 2) and done.out == b""
    assert what in done.err and "hint: " in done.err
    assert sorted(os.listdir(tmp_path)) == ["old.npz", "picture.npz"]


def test_no_input_shows_the_help(cli: Run) -> None:
    done = cli("embed", "-o", "a.npz")
    assert done.code == 2 and done.out == b""
    assert "Usage" in done.err and "no INPUT" in done.err


def test_no_file_of_the_run_is_written_over(cli: Run, model: Path, photos: Path, embedded: Path) -> None:
    weights = model / "open_clip_model.safetensors"
    before = weights.read_bytes()
    done = cli("embed", photos / "coffee.png", "-m", model, "-o", weights, "--force")
    assert done.code == 2 and "is read by this very run" in done.err
    assert weights.read_bytes() == before
    again = cli("embed", embedded, "-m", model, "-o", embedded.with_name("b.npz"))
    assert again.code == 2 and "holds embeddings already" in again.err


def test_embeddings_of_another_model_are_refused_by_both_names(
    cli: Run, model: Path, other: Path, embedded: Path
) -> None:
    done = cli("classify", embedded, *LABELS, "-m", other)
    assert (done.code, done.out) == (1, b"")
    assert f'"{model.name}"' in done.err and f'"{other.name}"' in done.err
    with pytest.raises(EmbeddingsError, match="made with model"):
        opened = load_model(other, device="cpu")
        classifier = clipcli.build_classifier(opened, ["cat", "dog"])
        list(clipcli.classify(clipcli.load_embeddings(embedded), classifier, opened))


def test_other_pixels_and_crops_are_refused_where_they_matter(
    cli: Run, model: Path, photos: Path, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    assert cli("embed", photos, "-m", model, "-o", file, "--crop", "pad", "--pixels", "reference").code == 3
    alone = cli("classify", file, *LABELS, "-m", model, "-v")
    how = "--pixels reference --crop pad --decode exact, torch-fp32"
    assert alone.code == 3 and f"5 embeddings, 1 failed, {how}" in alone.err
    right = ("--crop", "pad", "--pixels", "reference")
    assert cli("classify", file, photos / "coffee.png", *LABELS, "-m", model, *right).code == 3
    for wrong in (["--crop", "model"], ["--crop", "squash"], ["--pixels", "auto"], [photos / "coffee.png"]):
        done = cli("classify", file, *wrong, *LABELS, "-m", model)
        assert (done.code, done.out) == (2, b"")
        assert "its pictures were prepared with --" in done.err and "hint: give --" in done.err


def test_a_broken_file_is_told_before_a_model_is_read(cli: Run, model: Path, embedded: Path) -> None:
    embedded.write_bytes(embedded.read_bytes()[:200])
    done = cli("classify", embedded, *LABELS, "-m", model)
    assert (done.code, done.out) == (1, b"")
    assert "broken embeddings file" in done.err
    assert not store_file().exists()


def test_other_files_of_such_names_are_rows_as_ever(cli: Run, model: Path, photos: Path) -> None:
    weights = model / "open_clip_model.safetensors"
    done = cli("classify", weights, photos / "coffee.png", *LABELS, "-m", model)
    assert done.code == 3 and "!not-a-picture" in done.lines[0] and len(done.lines) == 2


# ---- what is interrupted


def test_strict_stops_and_writes_nothing(cli: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    done = cli("embed", photos, "-m", model, "-o", tmp_path / "a.npz", "--strict")
    assert done.code == 3 and "stopped at the first failure" in done.err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("keeps", [True, False])
def test_ctrl_c_leaves_no_file_and_the_next_run_goes_on(
    cli: Run, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    begin, sizes = Tower.begin, []

    def once(self: Tower, pixels: NDArray[np.uint8]) -> Pending:
        sizes.append(len(pixels))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return begin(self, pixels)

    monkeypatch.setattr(Tower, "begin", once)
    run = ("embed", photos, "-m", model, "-o", tmp_path / "a.npz", "-b", 2, *([] if keeps else ["--no-cache"]))
    done = cli(*run)
    assert (done.code, sizes) == (130, [2, 2])
    assert os.listdir(tmp_path) == []
    assert "interrupted after 3 pictures" in done.err and ("goes on from there" in done.err) is keeps
    assert cli(*run).code == 3
    assert sum(sizes[2:]) == (3 if keeps else 5)
    assert len(clipcli.load_embeddings(tmp_path / "a.npz").names) == 5


def test_a_killed_run_leaves_nothing_behind_and_loses_nothing(
    cli: Run, model: Path, photos: Path, tmp_path: Path, seen: list[int]
) -> None:
    names = [str(photos / name) for name in ("coffee.png", "rocket.jpg", "chelsea.png", "astronaut.png")]
    out = tmp_path / "out" / "a.safetensors"
    out.parent.mkdir()
    args = ["-m", str(model), "-d", "cpu", "-o", str(out)]
    command = [sys.executable, "-m", "clipcli", "embed", "--files-from", "-", *args]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stderr
        process.stdin.write("".join(f"{name}\n" for name in names[:2]).encode())
        process.stdin.flush()
        until = time.monotonic() + 150
        while not store_file().exists() or kinds().get("embedding", 0) < 2:
            assert process.poll() is None and time.monotonic() < until, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert list(out.parent.iterdir()) == []
    done = cli("embed", *names, *args)
    assert (done.code, sum(seen)) == (0, 2)
    assert clipcli.load_embeddings(out).names == tuple(names)


# ---- sentences


def test_sentences(cli: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a photo of a cat.\n\n  a rocket # in the sky  \n")
    done = cli("embed", "--text", tmp_path / "a.txt", "-m", model, "-o", tmp_path / "a.npz")
    assert (done.code, done.out) == (0, b"")
    assert done.err.startswith(f"clipcli: 2 sentences, written to {tmp_path / 'a.npz'}, ")
    found = clipcli.load_embeddings(tmp_path / "a.npz")
    assert found.names == ("a photo of a cat.", "a rocket # in the sky")
    opened = load_model(model, device="cpu")
    classifier = clipcli.build_classifier(opened, ["cat", "dog"], templates="a photo of a <>.")
    np.testing.assert_allclose(found.vectors[0], classifier.weight[0], atol=1e-6)
    assert (found.fingerprint, found.of_texts) == (opened.text_fingerprint, True)
    again = cli(
        "embed", "--text", "-", "-m", model, "-o", tmp_path / "b.npz", stdin=b"\xef\xbb\xbfa rocket # in the sky"
    )
    assert again.code == 0
    np.testing.assert_array_equal(clipcli.load_embeddings(tmp_path / "b.npz").vectors[0], found.vectors[1])
    refused = cli("classify", tmp_path / "a.npz", *LABELS, "-m", model)
    assert refused.code == 1 and "of sentences, not of pictures" in refused.err


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "no sentences"),
        (b" \n\n", "no sentences"),
        (b"a cat\n\xff\n", "a.txt:2: not UTF-8"),
        (b"a cat\n\na\x1bb\n", "a.txt:3: control character"),
        (b"a cat\n" + b"cat " * 80, 'a.txt:2: "cat cat'),
    ],
    ids=["empty", "blank", "bytes", "control", "long"],
)
def test_wrong_sentences(cli: Run, model: Path, tmp_path: Path, text: bytes, what: str) -> None:
    (tmp_path / "a.txt").write_bytes(text)
    done = cli("embed", "--text", tmp_path / "a.txt", "-m", model, "-o", tmp_path / "a.npz")
    assert done.code == 2 and what in done.err
    assert os.listdir(tmp_path) == ["a.txt"]


def test_long_sentences_can_be_cut(cli: Run, model: Path, tmp_path: Path) -> None:
    def of(sentence: str, *more: str) -> Result:
        run = ("embed", "--text", "-", "-m", model, "-o", tmp_path / "a.npz", "--force")
        return cli(*run, *more, stdin=sentence.encode())

    refused = of("cat " * 76)
    assert refused.code == 2 and "makes 78 tokens, 77 fit" in refused.err and "--truncate" in refused.err
    assert of("cat " * 75).code == 0
    expected = clipcli.load_embeddings(tmp_path / "a.npz").vectors
    assert of("cat " * 200, "--truncate").code == 0
    np.testing.assert_array_equal(clipcli.load_embeddings(tmp_path / "a.npz").vectors, expected)


# ---- what is kept


def test_the_store_lists_and_deletes_them(cli: Run, model: Path, photos: Path, tmp_path: Path, seen: list[int]) -> None:
    run = ("embed", photos, "-m", model, "-o", tmp_path / "a.npz", "--force")
    assert cli(*run).code == 3
    told = cli("cache", "info").out.decode()
    assert "embeddings of pictures" in told and "digests of pictures' files" in told
    assert kinds() == {"digest": 1, "embedding": 5, "picture": 5}
    print_of = clipcli.load_embeddings(tmp_path / "a.npz").fingerprint
    assert cli("cache", "clear", "--model", "0000", "--yes").err == "clipcli: nothing to delete\n"
    assert cli("cache", "clear", "--kind", "embedding", "--model", print_of[:6], "--yes").code == 0
    assert kinds() == {"digest": 1, "picture": 5}
    assert cli(*run).code == 3
    assert sum(seen) == 10 and kinds()["embedding"] == 5
    assert cli("cache", "prune", "--max-size", "200B", "--yes").code == 0
    assert sum(kinds().values()) < 11


@pytest.mark.parametrize("way", ["option", "variable", "file"])
def test_the_room_of_the_store_can_be_set(
    cli: Run, model: Path, photos: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    more: tuple[str, ...] = ("--cache-size", "300b")
    if way != "option":
        more = ()
        if way == "variable":
            monkeypatch.setenv("CLIPCLI_CACHE_SIZE", "300")
        else:
            (home / "config").mkdir()
            (home / "config" / "config.toml").write_text('cache-size = "300 B"\n')
    assert cli("embed", photos, "-m", model, "-o", tmp_path / "a.npz", *more).code == 3
    assert 0 < kinds().get("embedding", 0) <= 4  # of 64 bytes each


def test_in_python(model: Path, photos: Path, tmp_path: Path) -> None:
    opened = clipcli.load_model(model, device="cpu")
    classifier = clipcli.build_classifier(opened, ["cat", "rocket"])

    def rows() -> Iterator[clipcli.Embedded | clipcli.Failure]:
        return clipcli.embed([photos], opened)

    clipcli.save_embeddings(rows(), tmp_path / "a.npz", opened)
    found = clipcli.load_embeddings(tmp_path / "a.npz")
    assert isinstance(found, clipcli.Embeddings)
    answers = list(clipcli.classify(found, classifier, opened))
    assert [row.label for row in answers] == [row.label for row in clipcli.classify([photos], classifier, opened)]
    assert [row.path for row in answers] == [row.path for row in rows()]
    (one, two) = clipcli.embed_texts(["a photo of a cat.", "a rocket"], opened)
    assert (one.path, two.vector.shape) == ("a photo of a cat.", (16,))
    assert list(clipcli.embed_texts([], opened)) == []
    clipcli.save_embeddings([one, two], tmp_path / "b.npz", opened, texts=True)
    assert json.dumps(clipcli.load_embeddings(tmp_path / "b.npz").names) == '["a photo of a cat.", "a rocket"]'
