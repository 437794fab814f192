"""Templates: notation, sets, files, and the shipped sets against the published ones."""

from __future__ import annotations

import errno
import json
import os
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcli.errors import LabelError
from clipcli.records import Template
from clipcli.zeroshot import templates

SHIPPED = Path(__file__).resolve().parents[1] / "prompts"

PUBLISHED = {  # set -> the data sets whose templates it has
    "actions": ["UCF101"],
    "aircraft": ["FGVCAircraft"],
    "birds": ["Birdsnap"],
    "caltech101": ["Caltech101"],
    "cars": ["StanfordCars"],
    "cifar": ["CIFAR10", "CIFAR100"],
    "countries": ["Country211"],
    "counts": ["CLEVRCounts"],
    "digits": ["MNIST"],
    "distance": ["KITTI"],
    "emotions": ["FacialEmotionRecognition2013"],
    "flowers": ["Flowers102"],
    "food": ["Food101"],
    "memes": ["HatefulMemes"],
    "objects": ["STL10"],
    "pathology": ["PatchCamelyon"],
    "pets": ["OxfordPets"],
    "remote-sensing": ["RESISC45"],
    "satellite": ["EuroSAT"],
    "scenes": ["SUN397"],
    "sentiment": ["SST2"],
    "simple": ["PascalVOC2007"],
    "street-signs": ["GTSRB"],
    "textures": ["DescribableTextures"],
    "video": ["Kinetics700"],
}


def texts(*specs: str) -> list[str]:
    return [template.text for template in templates.read(specs)]


def write(name: str, content: str) -> str:
    Path(name).write_text(content, encoding="utf-8")
    return name


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Relative names, so that messages are exact."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Notation


@pytest.mark.parametrize(
    ("literal", "expected"),
    [
        ("a photo of a <>.", ["a photo of a <>."]),
        ("a {} b {c} c {label} d <>", ["a <> b <> c <> d <>"]),
        ("{a|the} <>", ["a <>", "the <>"]),
        ("{a|the} {big|small} {}", ["a big <>", "a small <>", "the big <>", "the small <>"]),
        ("{a |}<>", ["a <>", "<>"]),
        ("a {|bad} photo of <>", ["a photo of <>", "a bad photo of <>"]),
        ("{a <>|the <> here}", ["a <>", "the <> here"]),
        ("{<>|<>} <>", ["<> <>"]),
        ("<> # not a comment", ["<> # not a comment"]),
    ],
)
def test_notation(literal: str, expected: list[str]) -> None:
    assert texts(literal) == expected


WORD = st.text("abc ", max_size=3)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(WORD, min_size=2, max_size=3), max_size=3))
def test_groups_multiply(groups: list[list[str]]) -> None:
    literal = "<>" + "".join("-{" + "|".join(group) + "}" for group in groups)
    by_hand = [" ".join("-".join(["<>", *choice]).split()) for choice in product(*groups)]
    assert texts(literal) == list(dict.fromkeys(by_hand))


def test_weights_and_duplicates() -> None:
    file = write("t.txt", "2\ta {b|c} <>.\n  0.5 \t<>\n<>\na b <>.\n")
    assert templates.read([file, "3\t<>", "x <>"]) == [
        Template("a b <>.", 2.0),
        Template("a c <>.", 2.0),
        Template("<>", 0.5),
        Template("x <>", 1.0),
    ]


def test_comments() -> None:
    content = "\ufeff# head\n\n  #indented\na <>. # tail\nb <> #wildlife\nc <> #\n d#e <> #f # g # h\n"
    assert texts(write("t.txt", content)) == ["a <>.", "b <> #wildlife", "c <>", "d#e <> #f"]


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        (
            "a photo of a cat.",
            'template "a photo of a cat." has no place for the label',
            "write <> where the label goes",
        ),
        ("{a <>|b}", 'template "b" has no place for the label', "write <>"),
        (
            "a {class} <>",
            'template "a {class} <>" has a brace that is neither a placeholder nor {a|b}',
            "write <>",
        ),
        ("{a|{b|c}} <>", 'template "{a|{b|c}} <>" has a brace', "can't hold another"),
        ("a } <>", 'template "a } <>" has a brace', "write <>"),
        ("x\t<>", '"x" before the tab is no weight', "from 1/1,000,000 to 1,000,000"),
        ("0\t<>", '"0" before the tab is no weight', "from 1/1,000,000 to 1,000,000"),
        ("-1\t<>", '"-1" before the tab is no weight', "from 1/1,000,000 to 1,000,000"),
        ("inf\t<>", '"inf" before the tab is no weight', "from 1/1,000,000 to 1,000,000"),
        ("nan\t<>", '"nan" before the tab is no weight', "from 1/1,000,000 to 1,000,000"),
        ("1e308\t<>", '"1e308" before the tab is no weight', "from 1/1,000,000 to 1,000,000"),
        ("5e-324\t<>", '"5e-324" before the tab is no weight', "from 1/1,000,000 to 1,000,000"),
        ("9" * 99 + "\t<>", f'"{"9" * 40}" before the tab is no weight', ""),
        ("2\t3\t<>", "control character U+0009 in template", ""),
        ("be\x07ll <>", "control character U+0007 in template", "remove it"),
        ("{a|b}" * 14 + "<>", "expands to more than 10,000", "several lines"),
    ],
)
def test_wrong_lines(line: str, message: str, hint: str) -> None:
    with pytest.raises(LabelError) as error:
        templates.read([write("my.txt", f"# head\n\n{line}\n")])
    assert error.value.message.startswith("my.txt:3: ")
    assert message in error.value.message
    assert hint in (error.value.hint or "")


# Files and sets


def test_a_users_set_wins_by_name(home: Path) -> None:
    own = home / "config" / "prompts"
    own.mkdir(parents=True)
    (own / "pets.txt").write_text("my <>\n")
    (own / "mushrooms.txt").write_text("a mushroom: <>\n")
    (own / "notes.md").write_text("no set\n")
    assert texts("pets", "mushrooms", "food") == ["my <>", "a mushroom: <>", "a photo of <>, a type of food."]
    found = templates.sets()
    assert found["pets"] == own / "pets.txt"
    assert "notes" not in found
    assert list(found) == sorted(found)


def test_a_name_means_the_set_and_a_path_the_file() -> None:
    write("pets", "from the file <>\n")
    assert texts("pets") == ["a photo of a <>, a type of pet."]
    assert texts("./pets") == ["from the file <>"]


def test_json_lists() -> None:
    write("t.json", json.dumps({"a": ["one {c}", "{a|b} {}"], "b": []}))
    assert texts("t.json#a") == ["one <>", "a <>", "b <>"]
    write("l.json", '["x <>", "y"]')
    for spec, message in (
        ("t.json", r"^t.json: an object of lists: which one is meant\?$"),
        ("t.json#c", r'^t.json: no key "c"$'),
        ("t.json#b", r"^t.json: no templates in it$"),
        ("l.json", r'^l.json: entry 2: template "y" has no place for the label$'),
        (write("n.json", "[1]"), r"^n.json: entry 1: template 1 is not text$"),
        (write("s.json", '"<>"'), r"^s.json: no list of templates$"),
    ):
        with pytest.raises(LabelError, match=message):
            templates.read([spec])
    with pytest.raises(LabelError) as error:
        templates.read(["t.json"])
    assert error.value.hint == "there are: t.json#a, t.json#b"


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("pet", 'no template set "pet"', 'did you mean "pets"? there are: actions, '),
        ("zzz", 'no template set "zzz"', "there are: actions, "),
        ("", 'no template set ""', "there are: "),
        ("none.txt", "none.txt: no such template file", "check the path"),
        ("some/where", "some/where: no such template file", "check the path"),
        ("none.json#key", "none.json: no such template file", "check the path"),
        (
            "a photo of a cat/dog",
            '--templates: template "a photo of a cat/dog" has no place for the label',
            "write <> where the label goes",
        ),
        ("long " * 99, "has no place for the label", "write <>"),
        (".", ".: is a directory", ""),
    ],
)
def test_unknown_names(spec: str, message: str, hint: str) -> None:
    with pytest.raises(LabelError) as error:
        templates.read([spec])
    assert message in error.value.message
    assert (error.value.hint or "").startswith(hint)


def test_near_names_of_files() -> None:
    write("mine.txt", "a <>\n")
    with pytest.raises(LabelError, match=r"^mien\.txt: no such template file$") as error:
        templates.read(["mien.txt"])
    assert error.value.hint == "did you mean mine.txt?"


def test_a_file_that_may_not_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith("closed/"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, **options)

    def read_bytes(path: Path) -> bytes:
        stat(path)
        return b""

    monkeypatch.setattr(os, "stat", stat)  # root may look at everything
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(LabelError, match=r"^closed/x\.txt: permission denied$"):
        templates.read(["closed/x.txt"])


def test_files_that_hold_nothing_or_no_text() -> None:
    with pytest.raises(LabelError, match=r"^empty.txt: no templates in it$"):
        templates.read([write("empty.txt", "# nothing\n")])
    Path("latin.txt").write_bytes(b"a <>\nfa\xe7ade <>\n")
    with pytest.raises(LabelError, match=r"^latin.txt:2: not UTF-8$"):
        templates.read(["latin.txt"])


def test_published_json(reference: Path) -> None:
    file = reference / "datasets" / "en_zeroshot_classification_templates.json"
    for key, published in json.loads(file.read_text("utf-8")).items():
        expected = list(dict.fromkeys(text.replace("{c}", "<>") for text in published))
        assert texts(f"{file}#{key}") == expected, key


# Shipped sets


def test_imagenet_sets(reference: Path) -> None:
    folder = reference / "templates"
    assert texts("imagenet7") == texts(templates.DEFAULT) == (folder / "imagenet7.txt").read_text().splitlines()
    expanded = texts("imagenet80")
    assert len(expanded) == 80
    assert set(expanded) == set((folder / "imagenet80.txt").read_text().splitlines())
    assert set(texts("imagenet7")) <= set(expanded)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_sets_are_the_published_ones(name: str, reference: Path) -> None:
    published = json.loads((reference / "templates" / "datasets.json").read_text("utf-8"))
    for dataset in PUBLISHED[name]:
        expected = published[dataset]["templates"]
        assert sorted(texts(name)) == sorted(expected)
        assert re.search(rf"^# source: .*\b{dataset}\b", (SHIPPED / f"{name}.txt").read_text(), re.MULTILINE)


def test_every_data_set_and_every_shipped_set_is_covered(reference: Path) -> None:
    published = json.loads((reference / "templates" / "datasets.json").read_text("utf-8"))
    assert sorted(name for claimed in PUBLISHED.values() for name in claimed) == sorted(published)
    assert {path.stem for path in SHIPPED.glob("*.txt")} == {*PUBLISHED, "imagenet7", "imagenet80", "neutral"}


def test_shipped_files_tell_their_purpose_source_and_are_listed() -> None:
    listed = re.findall(r"^\| `([\w-]+)` \| (\d+) \|", (SHIPPED / "README.md").read_text("utf-8"), re.MULTILINE)
    files = sorted(path for path in SHIPPED.glob("*.txt") if path.name != templates.NEUTRAL)
    assert {name: int(count) for name, count in listed} == {path.stem: len(texts(str(path))) for path in files}
    for path in files:
        purpose, source, *lines = path.read_text("utf-8").splitlines()
        assert purpose.startswith("# ") and source.startswith("# source: "), path
        assert not [line for line in lines if re.search(r"\{(c|label)?\}", line)], path  # we write <>


def test_the_readmes_example() -> None:
    block = re.search(r"```\n(.*?)```", (SHIPPED / "README.md").read_text("utf-8"), re.DOTALL)
    assert block
    assert templates.read([write("mushrooms.txt", block[1])]) == [
        Template("a photo of a <>, a type of mushroom."),
        Template("a photo of the <>, a type of mushroom."),
        Template("a close-up photo of a <>, a type of mushroom."),
        Template("a close-up photo of the <>, a type of mushroom."),
        Template("<> growing on the forest floor.", 2.0),
    ]
