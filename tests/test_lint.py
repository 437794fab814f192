"""Lint finds everything at once, with the reader's own parser, and leaves good label files alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcli import Model, load_model
from clipcli.errors import LabelError
from clipcli.tokenizer import Tokenizer
from clipcli.zeroshot import labels, lint, templates
from clipcli.zeroshot.lint import Finding, Lint

OTHER = "elephant\n"  # a second label, so that the one under test isn't the only one


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Relative names, so that messages are exact."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def loaded(model: Path) -> Model:
    return load_model(model, device="cpu")


def examine(content: str | bytes | Any, name: str = "labels.txt", *sets: str) -> Lint:
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return Lint(name, templates.read(sets or ["simple"]))


def brief(checked: Lint) -> list[tuple[int | None, str, str]]:
    return [(found.line or found.entry, found.level, found.code) for found in checked.found]


# Errors: what the reader refuses


def test_all_errors_at_once() -> None:
    checked = examine(b"cat\ncat\nfa\xe7ade\nta\tbby\ndog | |\nn1 =\na | b = c\n:: x ::\nbird ::\nf\xf6hn\n")
    assert [str(found) for found in checked.found] == [
        'labels.txt:2: error: label "cat" stands twice (first on line 1); give one of them another name: '
        '"other name = words" in text, "aliases" in CSV and JSON',
        "labels.txt:3: error: not UTF-8; save the file as UTF-8",
        "labels.txt:4: error: control character U+0009 in label 'ta\\tbby'; "
        "a table of columns needs the ending .tsv and a header",
        "labels.txt:5: error: empty alias; write something there, or leave out the separator",
        "labels.txt:5: error: empty alias; write something there, or leave out the separator",
        "labels.txt:6: error: empty alias; write something there, or leave out the separator",
        r'labels.txt:7: error: "|" before "="; write \| or \= if the label has that character',
        "labels.txt:8: error: empty alias; write something there, or leave out the separator",
        "labels.txt:8: error: empty description; write something there, or leave out the separator",
        "labels.txt:9: error: empty description; write something there, or leave out the separator",
        "labels.txt:10: error: not UTF-8; save the file as UTF-8",
    ]
    assert [label.name for label in checked.labels] == ["cat", "dog", "bird"]


def test_all_errors_of_a_table() -> None:
    checked = examine(
        'label,aliases,threshold,group\ncat,a||b,high,\n,x,,\ndog,x,y,z,0\ncat,,,\na_b,,,\n"bad\n', "l.csv"
    )
    assert [(found.line, found.message) for found in checked.found] == [
        (2, "empty alias"),
        (2, "threshold 'high' is no number from -1 to 1"),
        (3, "empty label"),
        (4, "5 cells, but 4 columns"),
        (5, 'label "cat" stands twice (first on line 2)'),
        (6, '"a_b" is spelled like an identifier'),
        (7, "bad CSV: unexpected end of data"),
    ]
    assert checked.found[5].hint == 'write "a b", in "aliases" to keep the name'


def test_all_errors_of_json_keep_their_entries() -> None:
    checked = examine('{"a": [], "b": [1, ""], "a": [], "c": 3, "c": [], "d": "x||y", "e_f": []}', "l.json")
    assert [str(found).partition(";")[0] for found in checked.found] == [
        "l.json: entry 2: error: alias 1 is not text",
        "l.json: entry 2: error: empty alias",
        'l.json: entry 3: error: "a" stands twice (first in entry 1)',
        "l.json: entry 4: error: aliases 3 are no list",
        'l.json: entry 5: error: "c" stands twice (first in entry 4)',
        "l.json: entry 6: error: empty alias",
        'l.json: entry 7: warning: "e_f" is spelled like an identifier',
    ]
    keyed = examine({"pets": ["cat", "cat"]}, "p.json")
    assert keyed.found[0].code == "alone"
    keyed = Lint("p.json#pets", [])
    assert str(keyed.found[0]).startswith('p.json#pets: entry 2: error: label "cat" stands twice (first in entry 1)')


@pytest.mark.parametrize(
    ("content", "name", "line", "message"),
    [
        ("# nothing\n", "labels.txt", None, "no labels in it"),
        ("cat\ndog".encode("utf-16"), "labels.txt", None, "the text is UTF-16, not UTF-8"),
        ("name\ncat\n", "l.csv", 1, 'no column "label"'),
        ('["cat",\n"dog"', "l.json", 2, "bad JSON: expecting ',' delimiter"),
        ("3", "l.json", None, "no list or object of labels"),
    ],
)
def test_a_file_past_reading_is_a_finding(content: str | bytes, name: str, line: int | None, message: str) -> None:
    (found,) = examine(content, name).found
    assert (found.file, found.line, found.level, found.message) == (name, line, "error", message)
    assert found.hint


@pytest.mark.parametrize("spec", ["nowhere.txt", "nowhere.json#x", ".", "-"])
def test_a_file_that_cannot_be_opened_is_no_finding(spec: str) -> None:
    with pytest.raises(LabelError) as error:
        Lint(spec, [])
    assert error.value.hint


LINES = st.sampled_from(
    ["cat", "Cat", "cat |", "| |", "n1 = cat", "n1 =", "a | b = c", "x :: ", "x :: y", "# c", "", "a\tb", "dog"]
)


@settings(deadline=None, max_examples=150)
@given(st.lists(LINES, max_size=8))
def test_lint_refuses_what_the_reader_refuses(lines: list[str]) -> None:
    checked = examine("\n".join(lines))
    errors = [found for found in checked.found if found.level == "error"]
    try:
        found = labels.read("labels.txt")
    except LabelError as error:
        line = f":{errors[0].line}" if errors[0].line else ""
        assert f"labels.txt{line}: {errors[0].message}" == error.message
        assert errors[0].hint == error.hint
    else:
        assert not errors and checked.labels == found


# Warnings: what is hardly meant


@pytest.mark.parametrize(
    ("line", "code", "advice"),
    [
        ("tabby_cat", "snake-case", 'write "tabby cat", or "tabby_cat = tabby cat" to keep the name'),
        ("n1 = tabby_cat", "snake-case", 'write "tabby cat"'),
        ("AnnualCrop", "camel-case", 'write "Annual Crop", or "AnnualCrop = Annual Crop" to keep the name'),
        ("tabbyCat", "camel-case", 'write "tabby Cat", or "tabbyCat = tabby Cat" to keep the name'),
        ("n02123045", "id", 'give it words: "n02123045 = words" in text, "aliases" in CSV and JSON'),
        ("n02123045 tabby", "id", 'give it words: "n02123045 = words" in text, "aliases" in CSV and JSON'),
        ("dog.n.01", "id", 'give it words: "dog.n.01 = words" in text, "aliases" in CSV and JSON'),
        ('"tabby"', "quotes", 'write "tabby"'),
        ("'tabby',", "quotes", 'write "tabby"'),
        ("“tabby”", "quotes", 'write "tabby"'),
        ('"tabby', "quotes", 'write "tabby"'),
        ("tabby,", "trailing", 'write "tabby"'),
        ("tabby ;,", "trailing", 'write "tabby"'),
        ("cat,dog", "list", None),
        ("cat, dog, cow", "list", None),
        ("cat;dog", "list", None),
        ("black &amp; white", "entity", 'write "black & white"'),
        ("caf&#233;", "entity", 'write "café"'),
        ("<|endoftext|> cat", "special-token", "take it out"),
        ("cat :: seen <end_of_text>", "special-token", "take it out"),
        ("cat <start_of_text>", "special-token", "take it out"),
        ("cat # my own", "comment", r"give it a line of its own, or write \# if it is none"),
        ("a cat", "article", 'write "cat"'),
        ("The Moon", "article", 'write "Moon"'),
        ("7", "number", None),
        ("1,000.5", "number", None),
        ("zero\u200bwidth", "invisible", 'write "zerowidth"'),
        ("no\xa0break", "invisible", 'write "no break"'),
        ("x :: soft\xadhyphen", "invisible", 'write "softhyphen"'),
    ],
)
def test_a_spelling_that_is_hardly_meant(line: str, code: str, advice: str | None) -> None:
    (found,) = examine(OTHER + line + "\n").found
    assert (found.line, found.level, found.code) == (2, "warning", code)
    assert found.hint and (advice is None or found.hint == advice)
    assert found.label and found.message


@pytest.mark.parametrize(
    "line",
    [
        "great white shark", "iPhone", "MacBook", "McDonald's", "Boeing 747-100", "24\" screen", "rock 'n' roll",
        "dogs'", "St. Bernard", "Paris, France", "1,000 islands", "crane (bird)", "R&B", "AT&T;x = phone", "C#",
        r"team \# 1", r"a\|b", "7 = seven cats", "n02123045 = tabby", "tabby_cat = tabby cat", "A-frame", "café", "猫",
        "👩\u200d🚀 astronaut", "cat :: a cat, sitting, or lying, on a mat", "anteater", 'the "stop" sign'.title(),
    ],
)  # fmt: skip
def test_good_labels_are_left_alone(line: str) -> None:
    found = examine(OTHER + line + "\n", "labels.txt", "<>").found
    assert found == []


def test_articles_double_only_with_the_templates() -> None:
    assert brief(examine("a cat\ndog\n", "labels.txt", "<> in the snow")) == []
    assert brief(examine("a cat\ndog\n", "labels.txt", "a photo of <>")) == []
    (found,) = examine("a cat\ndog\n", "labels.txt", "<> in the snow", "a {big|small} drawing of the <>").found
    assert found.message == 'the article of "a cat" doubles with that of the template "a big drawing of the <>"'


def test_labels_that_the_model_cannot_tell_apart() -> None:
    checked = examine("cat\nCat\ncafe\u0301\ncaf\xe9\nice  cream\nice cream\nn1 = crane | bird\nn2 = Crane\ncrane\n")
    assert [(found.line, found.code, found.label, found.other) for found in checked.found] == [
        (2, "case", "Cat", "cat"),
        (4, "form", "caf\xe9", "cafe\u0301"),
        (6, "form", "ice cream", "ice  cream"),
        (8, "words", "n2", "n1"),
        (9, "words", "crane", "n1"),
    ]
    assert checked.found[0].message == 'label "Cat" differs from "cat" (first on line 1) only in case'
    assert checked.found[1].message.endswith("(first on line 3) only in Unicode form or white space")
    assert checked.found[3].message == 'label "n2": "Crane" stands for "n1" (first on line 7) too'


def test_one_label_alone() -> None:
    assert brief(examine("cat\n")) == [(1, "warning", "alone")]
    assert brief(examine("cat\n|\n"))[-1][1] == "error"


def test_many_aliases_under_one_key() -> None:
    content = {"pets": [f"pet of kind {'x' * i}" for i in range(60)], "others": ["lion"]}
    (found,) = examine(content, "l.json").found
    assert (found.entry, found.code, found.label) == (1, "many-aliases", "pets")
    assert found.message == 'label "pets" has 60 aliases; if these are labels, name the list: l.json#pets'


def test_published_names_are_clean(reference: Path) -> None:
    published = json.loads((reference / "datasets" / "en_classnames.json").read_text("utf-8"))
    codes: dict[str, set[str]] = {}
    for key, names in published.items():
        for found in examine("\n".join(names), "labels.txt", "imagenet7").found:
            codes.setdefault(found.code, set()).add(key)
    assert codes == {
        "duplicate": {"imagenet1k"},
        "number": {"mnist"},
        "article": {"kitti_closest_vehicle_distance"},  # whole sentences: with the template <> nothing doubles
    }


# With a vocabulary and a model


def test_tokens_are_counted(loaded: Model) -> None:
    long = "x7" * 40
    checked = examine(f"cat\n{long}\nshort :: {'z9 ' * 50}\n")
    assert checked.found == [] and checked.longest == 0
    checked.count(loaded.tokenizer, 77)
    assert [(found.line, found.level, found.code, found.label) for found in checked.found] == [
        (2, "error", "too-long", long),
        (3, "error", "too-long", "short"),
    ]
    ids = loaded.tokenizer([f"a photo of a {long}.", "z9 " * 50])
    assert checked.longest == max(map(len, ids))
    assert f"makes {len(ids[0])} tokens, 77 fit" in checked.found[0].message
    assert checked.found[1].message.startswith('label "short" with description "z9 z9')
    with pytest.raises(LabelError) as error:
        from clipcli import build_classifier

        build_classifier(loaded, "labels.txt", templates="simple")
    assert error.value.message == f"labels.txt:2: {checked.found[0].message}"


def test_a_vocabulary_is_enough(model: Path) -> None:
    checked = examine("cat\ndog\n")
    checked.count(Tokenizer.from_file(model / "merges.txt"), 8)
    assert [found.code for found in checked.found] == ["too-long", "too-long"]


def test_similar_pairs(loaded: Model) -> None:
    from clipcli import build_classifier

    content = "cat\ndog\nn1 = cat | cat\nheron :: a tall grey bird\n"
    checked = examine(content)
    checked.compare(loaded, 0.9)
    weight = build_classifier(loaded, "labels.txt", templates="simple").weight
    cosines = weight @ weight.T
    pairs = {(i, j): float(cosines[i, j]) for j in range(4) for i in range(j) if cosines[i, j] > 0.9}
    names = [label.name for label in checked.labels]
    similar = [found for found in checked.found if found.code == "similar"]
    assert {(found.other, found.label) for found in similar} == {(names[i], names[j]) for i, j in pairs}
    assert pairs and len(pairs) < 6
    twin = next(found for found in similar if found.label == "n1" and found.other == "cat")
    assert (twin.line, twin.cosine) == (3, pytest.approx(1, abs=1e-5))
    assert twin.message == '"n1" is hard to tell from "cat" (first on line 1): cosine 1.000'
    assert checked.pairs_left_out == 0


def test_only_the_most_similar_pairs_are_told(loaded: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = examine("cat\ndog\nbird\nhouse\ntree\n")
    everything.compare(loaded, 0)
    monkeypatch.setattr(lint, "MOST_PAIRS", 3)
    checked = examine("cat\ndog\nbird\nhouse\ntree\n")
    checked.compare(loaded, 0)
    ranked = sorted((found.cosine or 0 for found in everything.found), reverse=True)
    assert sorted((found.cosine or 0 for found in checked.found), reverse=True) == ranked[:3]
    assert checked.pairs_left_out == len(ranked) - 3


def test_pairs_are_found_across_blocks() -> None:
    import numpy as np

    weight = np.eye(600, dtype=np.float32)
    weight[[7, 300, 599]] = weight[7]
    pairs, total = lint.closest(weight, 0.95)
    assert [pair[1:] for pair in pairs] == [(7, 300), (7, 599), (300, 599)] and total == 3


def test_labels_with_errors_are_compared_as_well(loaded: Model) -> None:
    checked = examine(f"cat\nn1 =\ncat |\nn2 = cat\n{'x7' * 40}\n")
    checked.count(loaded.tokenizer, 77)
    checked.compare(loaded, 0.999)
    assert (4, "warning", "similar") in brief(checked)


def test_a_finding_as_data() -> None:
    found = Finding("l.json", None, 3, "warning", "case", "message", label="a", other="b")
    assert str(found) == "l.json: entry 3: warning: message"
    assert list(asdict(found)) == [
        "file", "line", "entry", "level", "code", "message", "hint", "label", "other", "cosine",
    ]  # fmt: skip


def test_comparing_fills_the_store_for_classify(model: Path, folder: Path) -> None:
    from clipcli import Store
    from clipcli.zeroshot.classifier import build

    opened = load_model(model, device="cpu", store=Store(folder / "store.sqlite"))
    examine("cat\ndog\n").compare(opened, 0.9)
    built = build(opened, labels.read("labels.txt"), templates.read(["simple"]))
    assert (built.prompts, built.encoded) == (0, 0)
