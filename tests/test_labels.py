"""Label files in every form, and one clear line for each that is wrong."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcli.errors import LabelError
from clipcli.records import Label
from clipcli.zeroshot import labels


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Relative names, so that messages are exact."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(content: str | bytes | Any, name: str = "labels.txt") -> list[Label]:
    if not isinstance(content, str | bytes):
        content = json.dumps(content, ensure_ascii=False)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return labels.read(name)


def names(found: list[Label]) -> list[str]:
    return [label.name for label in found]


# Text


@pytest.mark.parametrize(
    ("line", "name", "aliases", "descriptions"),
    [
        ("cat", "cat", ("cat",), ()),
        ("  great  white shark\t", "great  white shark", ("great  white shark",), ()),
        ("tabby | tabby cat | tiger cat", "tabby", ("tabby", "tabby cat", "tiger cat"), ()),
        ("n02123045 = tabby cat | tiger cat", "n02123045", ("tabby cat", "tiger cat"), ()),
        ("heron :: a tall grey  bird :: it stands", "heron", ("heron",), ("a tall grey bird", "it stands")),
        ("n1 = heron :: 1 + 1 = 2 | 3", "n1", ("heron",), ("1 + 1 = 2 | 3",)),
        ("formula = E=mc2", "formula", ("E=mc2",), ()),
        (r"a\|b \= c\:: d", "a|b = c:: d", ("a|b = c:: d",), ()),
        (r"\# 1 | C# | \#2", "# 1", ("# 1", "C#", "#2"), ()),
        (r"C:\new\\| x", "C:\\new\\", ("C:\\new\\", "x"), ()),
        ("cat | cat", "cat", ("cat",), ()),
        ("dog: a pet", "dog: a pet", ("dog: a pet",), ()),
        ("猫 | ねこ", "猫", ("猫", "ねこ"), ()),
    ],
)
def test_a_line(line: str, name: str, aliases: tuple[str, ...], descriptions: tuple[str, ...]) -> None:
    assert read(f"{line}\n") == [Label(name, aliases, descriptions, where="labels.txt:1")]


def test_lines_comments_and_line_ends() -> None:
    expected = [("cat", "labels.txt:3"), ("dog", "labels.txt:5")]
    for end in ("\n", "\r\n", "\r"):
        found = read(end.join(["\ufeff# pets", "", "cat", "  # none", "dog"]))
        assert [(label.name, label.where) for label in found] == expected


def test_names_of_the_command_line() -> None:
    found = labels.from_names(["cat | kitten", "#1 fan", "n1 = dog :: a dog"])
    assert found == [
        Label("cat", ("cat", "kitten"), where="--label"),
        Label("#1 fan", ("#1 fan",), where="--label"),
        Label("n1", ("dog",), ("a dog",), where="--label"),
    ]
    assert labels.from_names(["x"], where="labels")[0].where == "labels"


@settings(deadline=None, max_examples=100)
@given(st.text(min_size=1, max_size=30).filter(lambda text: text.strip() == text and text.isprintable()))
def test_escaped_text_is_the_label_itself(text: str) -> None:
    escaped = text.replace("\\", "\\\\")
    for character in "|=#:":
        escaped = escaped.replace(character, f"\\{character}")
    (label,) = labels.from_names([escaped])
    assert (label.name, label.aliases, label.descriptions) == (text, (text,), ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "labels.txt: no labels in it"),
        ("# nothing\n\n", "labels.txt: no labels in it"),
        ("x\n\ncat\n\n\n\n cat\n", 'labels.txt:7: label "cat" stands twice (first on line 3)'),
        ("cat\nn1 = dog\ncat = tiger\n", 'labels.txt:3: label "cat" stands twice (first on line 1)'),
        ("cat\n\nta\tbby\n", "labels.txt:3: control character U+0009 in label 'ta\\tbby'"),
        ("cat\nbe\x07ll\n", "labels.txt:2: control character U+0007 in label 'be\\x07ll'"),
        ("cat\na\u2028b\n", "labels.txt:2: control character U+2028 in label 'a\\u2028b'"),
        (b"cat\r\ndog\r\nfa\xe7ade\r\n", "labels.txt:3: not UTF-8"),
        ("cat\ndog".encode("utf-16"), "labels.txt: the text is UTF-16, not UTF-8"),
        ("tabby | | tiger\n", "labels.txt:1: empty alias"),
        ("tabby |\n", "labels.txt:1: empty alias"),
        ("n1 =\n", "labels.txt:1: empty alias"),
        ("= tabby\n", "labels.txt:1: empty label"),
        ("tabby ::\n", "labels.txt:1: empty description"),
        (":: a bird\n", "labels.txt:1: empty alias"),
        ("a | b = c\n", 'labels.txt:1: "|" before "="'),
    ],
)
def test_wrong_text(content: str | bytes, message: str) -> None:
    with pytest.raises(LabelError) as error:
        read(content)
    assert error.value.message == message
    assert error.value.hint


@pytest.mark.parametrize("name", ["none.txt", "none.json", "none.json#key", "none.csv"])
def test_a_missing_file(name: str) -> None:
    with pytest.raises(LabelError, match=r"^none\.\w+: no such file or directory$"):
        labels.read(name)


def test_a_folder_and_stdin() -> None:
    with pytest.raises(LabelError, match=r"^\.: is a directory$"):
        labels.read(".")
    with pytest.raises(LabelError, match=r"labels can't come from stdin$"):
        labels.read("-")


@pytest.mark.parametrize(
    ("name", "kind"), [("a\udcff", "half of a character U+DCFF"), ("a\nb", "control character U+000A")]
)
def test_wrong_names_of_the_command_line(name: str, kind: str) -> None:
    with pytest.raises(LabelError, match=rf"^--label: {kind.replace('+', '.')} in label"):
        labels.from_names(["cat", name])
    with pytest.raises(LabelError, match=r"^--label: empty label$"):
        labels.from_names([" "])
    with pytest.raises(LabelError, match=r'^--label: label "cat" stands twice$'):
        labels.from_names(["cat", "cat"])


def test_join_names_the_other_file() -> None:
    found = read("dog\ncat\n")
    with pytest.raises(LabelError, match=r'^--label: label "cat" stands twice \(first in labels.txt:2\)$'):
        labels.join(found, labels.from_names(["cat"]))
    assert names(labels.join(found, labels.from_names(["bird"]))) == ["dog", "cat", "bird"]


def test_only_case_differs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "clipcli"):
        assert names(read("cat\ndog\nCat\n")) == ["cat", "dog", "Cat"]
    assert caplog.messages == ['labels.txt:3: label "Cat" differs from "cat" (first on line 1) only in case']


# Tables


def test_csv() -> None:
    content = (
        "\ufeffLabel,aliases,descriptions,group,threshold,note\r\n"
        'heron,grey heron|wader,"a tall, grey bird | it\nstands in water",bird,0.25,x\r\n'
        "\r\n"
        "cat\r\n"
        r"n1,a\|b,,,,"
    )
    assert read(content, "labels.csv") == [
        Label(
            "heron",
            ("grey heron", "wader"),
            ("a tall, grey bird", "it stands in water"),
            "bird",
            0.25,
            "labels.csv:2",
        ),
        Label("cat", ("cat",), where="labels.csv:5"),
        Label("n1", ("a|b",), where="labels.csv:6"),
    ]


def test_semicolons_and_tabs() -> None:
    expected = [("cat", ("a", "b")), ("x,y", ("x,y",))]
    for name, cut in (("l.csv", ";"), ("l.TSV", "\t")):
        found = read("label;aliases\ncat;a|b\nx,y;\n".replace(";", cut), name)
        assert [(label.name, label.aliases) for label in found] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "labels.csv: no labels in it"),
        ("label,group\n", "labels.csv: no labels in it"),
        ("name,group\ncat,pet\n", 'labels.csv:1: no column "label"'),
        ('label\n"a\nb"\n', "labels.csv:2: control character U+000A in label 'a\\nb'"),
        ('label,note\ncat,"1\n2"\ncat,\n', 'labels.csv:4: label "cat" stands twice (first on line 2)'),
        ("label,threshold\ncat,high\n", "labels.csv:2: threshold 'high' is no number from -1 to 1"),
        ("label,threshold\ncat,nan\n", "labels.csv:2: threshold 'nan' is no number from -1 to 1"),
        ("label,aliases\ncat,a||b\n", "labels.csv:2: empty alias"),
        ("label,aliases\ncat,a\x03b\n", "labels.csv:2: control character U+0003 in aliases 'a\\x03b'"),
        ("label,group\n,pet\n", "labels.csv:2: empty label"),
        ("label\ncrane, the bird\n", "labels.csv:2: 2 cells, but 1 columns"),
        ('label\ncat\n"dog\n', "labels.csv:3: bad CSV: unexpected end of data"),
    ],
)
def test_wrong_csv(content: str, message: str) -> None:
    with pytest.raises(LabelError) as error:
        read(content, "labels.csv")
    assert error.value.message == message
    assert error.value.hint


# JSON


def test_json_lists() -> None:
    assert read(["cat", " dog "], "l.json") == [
        Label("cat", ("cat",), where="l.json: entry 1"),
        Label("dog", ("dog",), where="l.json: entry 2"),
    ]
    entries = [
        {"label": "heron", "aliases": ["grey heron", "a|b"], "descriptions": ["tall\nbird"], "group": "bird"},
        {"label": "cat", "aliases": "cat|kitten", "threshold": 1, "aside": None},
        {"label": "dog", "aliases": [], "threshold": None},
    ]
    assert read(entries, "l.json") == [
        Label("heron", ("grey heron", "a|b"), ("tall bird",), "bird", where="l.json: entry 1"),
        Label("cat", ("cat", "kitten"), threshold=1.0, where="l.json: entry 2"),
        Label("dog", ("dog",), where="l.json: entry 3"),
    ]


def test_json_object_of_aliases() -> None:
    found = read({"happy": ["happy", "smiling"], "sad": "sad", "calm": []}, "l.json")
    assert [(label.name, label.aliases) for label in found] == [
        ("happy", ("happy", "smiling")),
        ("sad", ("sad",)),
        ("calm", ("calm",)),
    ]


def test_json_key(folder: Path) -> None:
    (folder / "l.json").write_text(json.dumps({"pets": ["cat", "dog"], "a/b#c": [{"label": "x"}]}))
    assert names(labels.read("l.json#pets")) == ["cat", "dog"]
    assert names(labels.read("l.json#a/b#c")) == ["x"]
    assert labels.read("l.json#pets")[1].where == "l.json#pets: entry 2"
    with pytest.raises(LabelError, match=r'^l.json: no key "pet"$') as error:
        labels.read("l.json#pet")
    assert error.value.hint == 'did you mean "pets"? there are: pets, a/b#c'
    (folder / "odd.json#pets").write_text("bird\n")
    assert names(labels.read("odd.json#pets")) == ["bird"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["cat",\n"dog"', "l.json:2: bad JSON: expecting ',' delimiter"),
        ("[" * 99_999, "l.json: bad JSON: too long a number, or too deep"),
        ("[]", "l.json: no labels in it"),
        ("{}", "l.json: no labels in it"),
        ('"cat"', "l.json: no list or object of labels"),
        ('["cat", "dog", "cat "]', 'l.json: entry 3: label "cat" stands twice (first in entry 1)'),
        ('{"cat": [], "dog": [], "cat": []}', 'l.json: entry 3: "cat" stands twice (first in entry 1)'),
        ("[0, 1]", "l.json: entry 1: label 0 is not text"),
        ('["cat", null]', 'l.json: entry 2: no "label"'),
        ('["cat", ""]', "l.json: entry 2: empty label"),
        ('[{"name": "cat"}]', 'l.json: entry 1: no "label"'),
        ('{"cat": 3}', "l.json: entry 1: aliases 3 are no list"),
        ('{"cat": ["a", ""]}', "l.json: entry 1: empty alias"),
        ('{"cat": ["a", 2]}', "l.json: entry 1: alias 2 is not text"),
        ('[{"label": "cat", "threshold": true}]', "l.json: entry 1: threshold True is no number from -1 to 1"),
        ('[{"label": "cat", "threshold": [1]}]', "l.json: entry 1: threshold [1] is no number from -1 to 1"),
        ('[{"label": "cat", "group": 7}]', "l.json: entry 1: group 7 is not text"),
        (r'["c\ud800t"]', "l.json: entry 1: half of a character U+D800 in label 'c\\ud800t'"),
    ],
)
def test_wrong_json(content: str, message: str) -> None:
    with pytest.raises(LabelError) as error:
        read(content, "l.json")
    assert error.value.message == message


def test_a_key_needs_an_object() -> None:
    Path("l.json").write_text('["cat"]')
    with pytest.raises(LabelError, match=r"^l.json: #key needs an object of lists$"):
        labels.read("l.json#key")


# Published files


WRONG = {
    "imagenet1k": r'entry 745: label "missile" stands twice \(first in entry 658\)$',
    "clevr_closest_object_distance": r"entry 4: empty label$",
}


def test_published_class_names(reference: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = reference / "datasets" / "en_classnames.json"
    for key, expected in json.loads(file.read_text("utf-8")).items():
        if message := WRONG.get(key):
            with pytest.raises(LabelError, match=message):
                labels.read(f"{file}#{key}")
        else:
            assert names(labels.read(f"{file}#{key}")) == [name.strip() for name in expected], key
    assert not [message for message in caplog.messages if "name the list" in message]
    with caplog.at_level(logging.WARNING, "clipcli"), pytest.raises(LabelError, match="empty alias"):
        labels.read(str(file))
    assert f"if these are labels, name the list: {file}#imagenet1k" in caplog.text


def test_imagenets_doubles(reference: Path) -> None:
    lines = (reference / "templates" / "imagenet_classes.txt").read_text("utf-8").splitlines()
    double = {name for name, count in Counter(lines).items() if count > 1}
    assert double == {"missile", "sunglasses"}
    with pytest.raises(LabelError, match=r'^labels.txt:\d+: label "missile" stands twice \(first on line \d+\)$') as e:
        read("\n".join(lines))
    assert e.value.hint and "=" in e.value.hint
    seen: set[str] = set()
    for i, name in enumerate(lines):
        lines[i] = f"{name} 2 = {name}" if name in seen else name
        seen.add(name)
    found = read("\n".join(lines))
    assert len(found) == 1000
    assert found[lines.index("missile 2 = missile")].aliases == ("missile",)


# Descriptions


def test_descriptions() -> None:
    Path("p.json").write_text(json.dumps({"cat": ["A cat sits.\n", "It | purrs."], "dog": "A dog barks."}))
    assert labels.read_descriptions("p.json") == [
        Label("cat", (), ("A cat sits.", "It | purrs."), where="p.json: entry 1"),
        Label("dog", (), ("A dog barks.",), where="p.json: entry 2"),
    ]
    assert labels.read_descriptions(Path("p.json"))[1].name == "dog"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "p.json: no labels with prompts in it"),
        ('["cat"]', "p.json: no labels with prompts in it"),
        ('{"cat": []}', 'p.json: entry 1: label "cat" has no list of prompts'),
        ('{"cat": ["a"], "dog": null}', 'p.json: entry 2: label "dog" has no list of prompts'),
        ('{"cat": [" "]}', "p.json: entry 1: empty prompt"),
        ('{"cat": [["a"]]}', "p.json: entry 1: prompt ['a'] is not text"),
    ],
)
def test_wrong_descriptions(content: str, message: str) -> None:
    Path("p.json").write_text(content)
    with pytest.raises(LabelError) as error:
        labels.read_descriptions("p.json")
    assert error.value.message == message
    assert error.value.hint
