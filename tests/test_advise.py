"""Prompt advice: against classifiers built one by one, against loops, on planted answers, and as it is typed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import squares
from conftest import Run
from jsonschema import validate
from test_house import HEAVY, modules_after

from clipcli.errors import LabelError, UsageError
from clipcli.records import Label, Template
from clipcli.tasks import advise as task
from clipcli.tasks import bank as banks
from clipcli.tasks.bank import Bank, encode_bank, unit
from clipcli.weights.model import Model, load_model
from clipcli.zeroshot import labels as label_files
from clipcli.zeroshot import templates as template_files
from clipcli.zeroshot.classifier import build

LABELS = label_files.from_names(["cat | tabby | kitten", "dog :: a dog that barks :: a small dog", "heron"])
TEMPLATES = [Template("a photo of a <>."), Template("a sketch of a <>.", 3.0), Template("<> in the snow", 0.5)]


@pytest.fixture(scope="module")
def opened(model: Path) -> Model:
    return load_model(model)


def planted(quality: Sequence[float], seed: int = 0, each: int = 40) -> tuple[Bank, Any, Any]:
    """A bank of four labels and of templates that are as good as `quality` says, and pictures of the labels."""
    random = np.random.default_rng(seed)
    true = unit(random.normal(size=(4, 32)).astype(np.float32))
    noise = random.normal(size=(4, len(quality), 32)).astype(np.float32) / 6
    share = np.array(quality, np.float32)[:, None]
    by_template = unit(share * true[:, None] + (1 - share) * noise)
    truth = np.repeat(np.arange(4), each)
    vectors = unit(true[truth] + random.normal(size=(4 * each, 32)).astype(np.float32) / 4)
    labels = tuple(Label(name, (name,)) for name in ("a", "b", "c", "d"))
    templates = tuple(Template(f"template {i} of <>") for i in range(len(quality)))
    means = by_template.mean(axis=1, keepdims=True)
    bank = Bank(labels, templates, 50.0, by_template, by_template[:, 0], np.zeros((4, 32), np.float32), tuple(means))
    return bank, vectors, truth


# The bank


def test_a_bank_gives_the_classifiers_that_are_built_one_by_one(opened: Model) -> None:
    bank = encode_bank(opened, LABELS, TEMPLATES)

    def built(templates: list[Template], labels: Sequence[Label] = LABELS) -> Any:
        return build(opened, labels, templates).classifier.weight

    close = {"rtol": 0, "atol": 1e-6}
    np.testing.assert_allclose(bank.classes(bank.weights), built(TEMPLATES), **close)
    np.testing.assert_allclose(bank.some([0, 2]), built([TEMPLATES[0], TEMPLATES[2]]), **close)
    np.testing.assert_allclose(bank.some([1]), built([TEMPLATES[1]]), **close)
    np.testing.assert_allclose(bank.without_template(), built([Template("<>")]), **close)
    other = [replace(template, weight=weight) for template, weight in zip(TEMPLATES, (5.0, 1.0, 2.0), strict=True)]
    np.testing.assert_allclose(bank.classes(np.array([5, 1, 2], np.float32)), built(other), **close)
    fewer = [replace(LABELS[0], aliases=("cat", "kitten")), *LABELS[1:]]
    np.testing.assert_allclose(bank.without_alias(0, 1), built(TEMPLATES, fewer)[0], **close)


def test_a_label_of_descriptions_alone_competes_too(opened: Model) -> None:
    labels = [*LABELS, Label("fish", (), ("a grey fish in the water",))]
    bank = encode_bank(opened, labels, TEMPLATES)
    weight = build(opened, labels, TEMPLATES).classifier.weight
    np.testing.assert_allclose(bank.classes(bank.weights), weight, rtol=0, atol=1e-6)
    np.testing.assert_allclose(bank.some([0])[3], bank.without_template()[3], rtol=0, atol=1e-6)


def test_each_prompt_is_encoded_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipcli.paths import store_file
    from clipcli.store.database import Store

    encoded: list[int] = []
    encode = Model.encode_text

    def watched(self: Model, ids: Any) -> Any:
        encoded.append(len(ids))
        return encode(self, ids)

    monkeypatch.setattr(Model, "encode_text", watched)
    for _ in range(2):
        encode_bank(load_model(model, store=Store(store_file())), LABELS, TEMPLATES)
    assert encoded == [5 * 4 + 2, 0]


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        (LABELS[:1], TEMPLATES, 'one label alone ("cat")'),
        (LABELS, TEMPLATES[:1], 'one template alone ("a photo of a <>.")'),
        ([Label("x", (), ("a fish",)), Label("y", (), ("a bird",))], TEMPLATES, "the labels are whole prompts"),
        ([Label("cat " * 80, ("cat " * 80,)), LABELS[1]], TEMPLATES, 'label "cat cat'),
    ],
)
def test_what_no_bank_is_made_of(opened: Model, labels: Any, templates: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        encode_bank(opened, labels, templates)
    assert error.value.message.startswith(message)


def test_answers_and_losses_are_those_of_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, vectors, truth = planted([0.2])
    classes = bank.some([0])
    monkeypatch.setattr(banks, "_CHUNK", 7)
    right, loss = banks.answers(vectors, classes, truth, bank.scale)
    nearest, cosines = banks.two_nearest(vectors, classes)
    for i, vector in enumerate(vectors):
        row = (classes @ vector).astype(np.float64)
        scores = np.exp(bank.scale * row) / np.exp(bank.scale * row).sum()
        assert right[i] == (row.argmax() == truth[i])
        assert loss[i] == pytest.approx(-np.log(scores[truth[i]]), abs=1e-4)
        assert nearest[:, i].tolist() == np.argsort(-row)[:2].tolist()
        assert cosines[:, i] == pytest.approx(np.sort(row)[::-1][:2], abs=1e-6)


# With labels


@pytest.mark.parametrize("seed", range(3))
def test_halves_have_each_label_alike(seed: int) -> None:
    truth = np.random.default_rng(seed).integers(0, 5, 99)
    a, b = task.halves(truth, seed)
    assert sorted([*a, *b]) == list(range(99)) and abs(len(a) - len(b)) == 1
    for label in range(5):
        assert abs((truth[a] == label).sum() - (truth[b] == label).sum()) <= 1
    assert [half.tolist() for half in task.halves(truth, seed)] == [a.tolist(), b.tolist()]
    assert a.tolist() != task.halves(truth, seed + 1)[0].tolist()


def test_forward_selection() -> None:
    covers = {0: {1, 2, 3}, 1: {3, 4}, 2: {1, 2, 3, 4}, 3: {5}}  # pictures that are right with a template

    def tried(chosen: list[int]) -> Any:
        found = set().union(*(covers[i] for i in chosen)) - ({1, 2, 3} if {0, 1} <= set(chosen) else set())
        return np.array([i in found for i in range(1, 7)]), np.full(6, float(len(chosen)))

    assert task.select(tried, 4, 4) == [2, 3]  # 5 of 6; a third adds nothing, and costs
    assert task.select(tried, 4, 1) == [2]
    even = [np.array([True, False]), np.array([False, True])]  # as many right: the loss decides
    assert task.select(lambda chosen: (even[chosen[0]], np.array([2.0 - chosen[0]])), 2, 1) == [1]


def test_good_templates_are_found_and_bad_ones_told() -> None:
    bank, vectors, truth = planted([0.05, 0.9, 0.1, 0.0])
    calls: list[tuple[int, int]] = []
    found = task.advise(bank, vectors, truth, progress=lambda *at: calls.append(at))
    assert calls == [(i + 1, 18) for i in range(18)]  # each alone, each left out, and 4 + 3 + 2 + 1 of the selection
    assert found.pictures == (80, 80)
    assert found.chosen[0] == found.ranked[0].template == bank.templates[1]
    ways = {way.name: way for way in found.measured}
    assert [way.templates for way in found.measured] == [0, 1, 4, 4, len(found.chosen)]
    assert ways["all templates"].gain == (0, 0, 0)
    best = ways['best on A: "template 1 of <>"']
    half = task.halves(truth, 0)[1]
    right = banks.answers(vectors, bank.some([1]), truth, bank.scale)[0]
    assert best.on_b.value == right[half].mean() and best.on_b.low <= best.on_b.value <= best.on_b.high
    all_right = banks.answers(vectors, bank.classes(bank.weights), truth, bank.scale)[0]
    assert best.gain.value == pytest.approx(right[half].mean() - all_right[half].mean())
    assert best.gain.low > 0  # found on one half, it holds on the other
    for one in found.ranked:
        rest = [i for i, template in enumerate(bank.templates) if template != one.template]
        left = banks.answers(vectors, bank.some(rest), truth, bank.scale)[0]
        assert one.without == left.sum() - all_right.sum()


def test_what_only_looks_good_where_it_was_chosen_is_told() -> None:
    bank, vectors, truth = planted([0.0] * 40, each=10)
    vectors = unit(np.random.default_rng(3).normal(size=vectors.shape).astype(np.float32))  # of nothing at all
    found = task.advise(bank, vectors, truth)
    chosen = found.measured[-1]
    assert chosen.name == "chosen on A" and chosen.on_a > 0.6  # chance is 0.25
    assert chosen.on_b.value < chosen.on_a - 0.2 and chosen.gain.low <= 0 <= chosen.gain.high


def test_aliases_that_hurt() -> None:
    bank, vectors, truth = planted([0.6, 0.6])
    wrong = unit(bank.by_template[1].mean(axis=0) * 3 + bank.by_template[0].mean(axis=0))  # `a`, called by b's name
    words = np.stack([bank.by_alias[0][0], wrong, wrong])
    labels = (Label("a", ("good", "bad", "worse")), *bank.labels[1:])
    means = np.broadcast_to(words.mean(axis=0), (2, 32))
    by_template = np.stack([means, *bank.by_template[1:]])
    bank = replace(bank, labels=labels, by_template=by_template, by_alias=(words, *bank.by_alias[1:]))
    found = task.advise(bank, vectors, truth).aliases
    assert {one.label for one in found} == {"a"} and [one.alias for one in found][-1] == "good"
    half_a, half_b = task.halves(truth, 0)
    before = bank.classes(bank.weights)
    for one in found:
        classes = before.copy()
        classes[0] = bank.without_alias(0, labels[0].aliases.index(one.alias))
        more = banks.answers(vectors, classes, truth, 50)[0].astype(int) - banks.answers(vectors, before, truth, 50)[0]
        assert (one.without_on_a, one.without_on_b) == (more[half_a].sum(), more[half_b].sum())
    assert found[0].without_on_a > 0 > found[-1].without_on_a


def test_pairs_that_pictures_confuse_come_first() -> None:
    bank, vectors, truth = planted([0.15, 0.15])
    classes = bank.classes(bank.weights)
    answer = banks.two_nearest(vectors, classes)[0][0]
    pairs = task.advise(bank, vectors, truth).pairs
    names = [label.name for label in bank.labels]
    times = [pair.a_as_b + pair.b_as_a for pair in pairs]
    assert times == sorted(times, reverse=True) and sum(times) == (answer != truth).sum() > 0
    for pair in pairs:
        i, j = names.index(pair.a), names.index(pair.b)
        assert pair.cosine == pytest.approx(classes[i] @ classes[j], abs=1e-5)
        assert pair.a_as_b == ((truth == i) & (answer == j)).sum()
        assert pair.b_as_a == ((truth == j) & (answer == i)).sum()


def test_pictures_of_one_label_say_nothing() -> None:
    bank, vectors, truth = planted([0.5, 0.5])
    with pytest.raises(UsageError, match='all pictures are of one label: "b"'):
        task.advise(bank, vectors, np.ones_like(truth))


# Without labels


@pytest.mark.parametrize("with_reference", [False, True])
def test_zero_shot_scores_are_those_of_the_paper(with_reference: bool) -> None:
    bank, vectors, _ = planted([0.3, 0.8, 0.0])
    reference = unit(np.random.default_rng(1).normal(size=(9, 32)).astype(np.float32)) if with_reference else None
    scores = task.zero_shot_scores(bank, vectors, reference)
    for t in range(3):
        logits = bank.scale * vectors.astype(np.float64) @ bank.some([t]).T.astype(np.float64)
        usual = logits.mean(axis=0)
        if reference is not None:
            usual = (usual + (bank.scale * reference @ bank.some([t]).T).mean(axis=0)) / 2
        assert scores[t] == pytest.approx((logits - usual).max(axis=1).mean(), abs=1e-3)


def test_no_template_gains_by_being_near_to_every_picture() -> None:
    bank, vectors, _ = planted([0.8, 0.8, 0.8])
    common = unit(np.random.default_rng(4).normal(size=32).astype(np.float32))  # what all pictures have in common
    vectors = unit(vectors + 2 * common)
    near = bank.by_template.copy()
    near[:, 2] = unit(near[:, 2] + common)
    biased = replace(bank, by_template=near)
    plain = [float((vectors @ biased.some([t]).T).max(axis=1).mean()) for t in range(3)]
    assert np.argmax(plain) == 2  # by largest logits alone it would be the best
    assert np.argmin(task.zero_shot_scores(biased, vectors)) == 2


def test_weighing() -> None:
    bank, vectors, _ = planted([0.7, 0.0, 0.5])
    found = task.weigh(bank, vectors)
    assert [one.template.text for one in found.weighed] == [bank.templates[i].text for i in (0, 2, 1)]
    weights = np.array([one.template.weight for one in found.weighed])
    scores = np.array([one.score for one in found.weighed])
    assert weights.mean() == pytest.approx(1, abs=1e-3) and weights.min() > 0
    assert np.log(weights[0] / weights[1]) == pytest.approx(scores[0] - scores[1], abs=2e-3)
    order = [bank.templates.index(Template(one.template.text)) for one in found.weighed]
    new = np.empty(3, np.float32)
    new[order] = weights
    before, after = ((vectors @ bank.classes(w).T).argmax(axis=1) for w in (bank.weights, new))
    assert (found.pictures, found.changed) == (160, (before != after).sum())
    assert found.pairs and not any(pair.a_as_b or pair.b_as_a for pair in found.pairs)


# Template files


def test_written_templates_are_read_again(tmp_path: Path) -> None:
    chosen = [Template("a <>."), Template("a #1 <>", 0.04963), Template("<> | <>", 12.0), Template("<> é", 1e-06)]
    template_files.write(chosen, tmp_path / "t.txt", "mine")
    assert template_files.read([str(tmp_path / "t.txt")]) == chosen
    assert (tmp_path / "t.txt").read_text(encoding="utf-8").startswith("# mine\na <>.\n0.04963\t")


@pytest.mark.parametrize("text", ["# <>", "<> # x"])
def test_a_template_that_would_be_a_comment_is_not_written(tmp_path: Path, text: str) -> None:
    with pytest.raises(LabelError, match="would be read as a comment"):
        template_files.write([Template("a <>"), Template(text)], tmp_path / "t.txt", "")
    assert list(tmp_path.iterdir()) == []


# As it is typed

SHARE = {"type": "number", "minimum": 0, "maximum": 1}
ESTIMATE = {
    "type": "object",
    "properties": {name: {"type": "number"} for name in ("value", "low", "high")},
    "required": ["value", "low", "high"],
    "additionalProperties": False,
}


def listed(**properties: Any) -> dict[str, Any]:
    item = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "array", "minItems": 1, "items": item}


TEXT, WHOLE, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
TEMPLATE = {"type": "object", "properties": {"text": TEXT, "weight": NUMBER}, "required": ["text", "weight"]}
PAIRS = listed(a=TEXT, b=TEXT, cosine=NUMBER, a_as_b=WHOLE, b_as_a=WHOLE)
ADVICE = {
    "pictures": {"type": "array", "items": WHOLE, "minItems": 2, "maxItems": 2},
    "measured": listed(name=TEXT, templates=WHOLE, on_a=SHARE, on_b=ESTIMATE, gain=ESTIMATE),
    "chosen": {"type": "array", "items": TEMPLATE, "minItems": 1},
    "ranked": listed(template=TEMPLATE, accuracy=SHARE, loss=NUMBER, without=WHOLE),
    "aliases": listed(label=TEXT, alias=TEXT, without_on_a=WHOLE, without_on_b=WHOLE),
    "pairs": PAIRS,
}
WEIGHING = {
    "pictures": WHOLE,
    "changed": WHOLE,
    "weighed": listed(template=TEMPLATE, score=NUMBER),
    "pairs": PAIRS,
}
SETS = ["-t", "imagenet7", "-t", "<> {in|on} the table"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with squares by colour, and their labels."""
    monkeypatch.chdir(tmp_path)
    Path("labels.txt").write_text("red | crimson | blood\ngreen\nblue\nwhite\n")
    return squares.make(Path("data"), each=6)


def test_the_command(cli: Run, model: Path, data: Path) -> None:
    result = cli("advise", data, "-l", "labels.txt", "-m", model, *SETS, "--top", 4, "--write-templates", "best.txt")
    lines = result.lines
    assert result.code == 0 and "\x1b" not in result.out.decode()
    assert lines[0] == "percent right on A, 9 pictures to choose templates by, and on B, 9 others"
    assert lines[2].endswith("  0  bare name") and lines[4].endswith("  9  all templates")
    assert "  and 5 more (--top)" in lines and "labels that are hard to tell apart" in lines
    first, last = result.err.splitlines()
    assert first == "clipcli: labels without pictures: white"
    assert " of 9 templates chosen; on the other half against all: " in last
    assert ", written to best.txt, for -t, " in last
    assert Path("best.txt").read_text().startswith("# clipcli advise: ")
    chosen = template_files.read(["best.txt"])
    asked = template_files.read([SETS[1], SETS[3]])
    assert 0 < len(chosen) <= 9 and set(chosen) <= set(asked)
    assert cli("classify", data, "-l", "labels.txt", "-m", model, "-t", "best.txt").code == 0


def test_json(cli: Run, model: Path, data: Path) -> None:
    common = ["-l", "labels.txt", "-m", model, *SETS, "--json", "-q"]
    for options, properties in ([], ADVICE), (["--unlabelled"], WEIGHING):
        result = cli("advise", data, *common, *options)
        assert (result.code, result.err) == (0, "")
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        validate(json.loads(result.out), schema | {"additionalProperties": False})
    again = cli("advise", data, *common, "--unlabelled", "--reference", data / "red")
    assert json.loads(again.out)["weighed"] != json.loads(result.out)["weighed"]
    seeds = [cli("advise", data, *common, "--seed", seed).out for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_weights_are_written(cli: Run, model: Path, data: Path) -> None:
    assert cli("embed", data, "-o", "seen.npz", "-m", model, "-q").code == 0
    common = ["--unlabelled", "-l", "labels.txt", "-m", model, *SETS]
    assert cli("advise", data, *common, "--write-templates", "a.txt").code == 0
    assert cli("advise", "seen.npz", *common, "--write-templates", "b.txt").code == 0
    weighed = template_files.read(["a.txt"])
    assert weighed == template_files.read(["b.txt"]) and len(weighed) == 9
    assert np.mean([one.weight for one in weighed]) == pytest.approx(1, abs=1e-3)
    assert weighed == sorted(weighed, key=lambda one: -one.weight) and weighed[0].weight > weighed[-1].weight


def test_pictures_that_fail_are_told(cli: Run, model: Path, data: Path) -> None:
    (data / "red" / "torn.png").write_bytes(squares.picture("red", 1)[:300])
    for options in [], ["--unlabelled"]:
        result = cli("advise", data, "-l", "labels.txt", "-m", model, *SETS, "-q", *options)
        assert result.code == 3 and result.out
        assert result.err == "clipcli: data/red/torn.png: truncated: the file ends before the picture does\n"


def test_include(cli: Run, model: Path, data: Path) -> None:
    common = ["-l", "labels.txt", "-m", model, *SETS, "--json", "-q", "--include", "0[0-3].png"]
    assert json.loads(cli("advise", data, *common).out)["pictures"] == [6, 6]
    assert json.loads(cli("advise", data, *common, "--unlabelled").out)["pictures"] == 12


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["data", "-L", "red"], 2, 'one label alone ("red")'),
        (["data", "-l", "labels.txt", "-t", "simple"], 2, 'one template alone ("a photo of a <>.")'),
        (["data", "--unlabelled"], 2, "no labels"),
        (["data", "-L", "red", "-L", "green"], 2, "data: classes that are no labels: blue"),
        (["data", "-L", "cat", "-L", "dog", "--ignore-missing"], 2, "data: classes that are no labels: blue, green"),
        (["data", "-L", "red", "-L", "cat", "--ignore-missing"], 2, 'all pictures are of one label: "red"'),
        (["nowhere", "-l", "labels.txt"], 2, "nowhere: no such file or folder"),
        (["data/red", "-l", "labels.txt"], 2, "data/red/00.png: lies in no class folder"),
        (["empty", "--unlabelled", "-l", "labels.txt"], 2, "no picture in empty can be used"),
        (["data", "-l", "labels.txt", "--reference", "data"], 2, "--reference is for pictures without labels"),
        (["data", "-l", "labels.txt", "--write-templates", "labels.txt"], 2, "labels.txt: is read by this very run"),
        (["data", "-l", "labels.txt", "--write-templates", "no/t.txt"], 1, "no/t.txt: the folder no does not exist"),
        (["data", "-l", "labels.txt", "--write-templates", "t.json"], 2, "t.json: -t would not read it as text"),
        (["data", "-l", "labels.txt", "--write-templates", "-"], 2, "-: must be a regular file"),
        (["data", "-l", "labels.txt", "--most", "0"], 2, "invalid value for '--most': "),
    ],
)
def test_bad_input(cli: Run, model: Path, data: Path, args: list[str], code: int, message: str) -> None:
    Path("empty").mkdir()
    sets = [] if "-t" in args else SETS
    result = cli("advise", *args, *sets, "-m", model)
    assert (result.code, result.out) == (code, b"")
    said = [line for line in result.err.splitlines() if not line.startswith(("hint: ", "clipcli: labels without"))]
    assert len(said) == 1 and said[0].startswith(f"clipcli: {message}")


def test_no_settings_file_lets_it_write(cli: Run, model: Path, data: Path) -> None:
    Path("clipcli.toml").write_text('[advise]\nwrite-templates = "labels.txt"\n')
    result = cli("advise", data, "-l", "labels.txt", "-m", model, *SETS)
    assert result.code == 2 and "write-templates can't be set in a file" in result.err


def test_help_imports_nothing_heavy() -> None:
    assert not modules_after("from clipcli.cli.main import run; run(['advise', '--help'])") & {*HEAVY, "sklearn"}
