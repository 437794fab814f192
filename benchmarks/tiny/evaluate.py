"""How good a small model is at the things of everyday life: the figures of `tiny`'s model card, as markdown.

    python benchmarks/tiny/evaluate.py MODEL DATA_DIR [-o FILE.md]

MODEL is what `-m` takes. DATA_DIR holds classes.json and the webdataset archives of Tiny-ImageNet (val-dev), CIFAR-10,
Caltech-20 and PACS. Each picture is encoded once, and every classifier scores the embeddings by a matrix product.
The same model and data give the same text; nothing is fitted but the temperature that is called so.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import clipcli
from clipcli.images.archives import members
from clipcli.images.stream import batches, default_workers, make_prepare
from clipcli.records import Failure, Label, Source
from clipcli.zeroshot import labels as label_files
from clipcli.zeroshot import templates as template_sets

HERE = Path(__file__).resolve().parent
TEMPLATES = {
    "bare names": "<>",
    "a photo of a <>.": "simple",
    "imagenet7": "imagenet7",
    "those of the training": str(HERE / "templates.txt"),
}
MAIN = "imagenet7"  # the default of `clipcli classify`
COARSE = (
    "bird", "bridge", "building", "cat", "clothing", "container", "dog", "food", "furniture", "hoofed animal", "insect",
    "landscape", "sea animal", "sports equipment", "vehicle",
)  # fmt: skip
COARSEST = ("animal", "clothing", "food", "structure", "vehicle")
ELSEWHERE = (("CIFAR-10", "cifar10", "cifar10-test-dev.tar.gz"), ("Caltech-20", "caltech20", "caltech20-dev.tar"))
RESAMPLES = 2000

Floats = NDArray[np.float64]
Lines = Iterator[str]


@dataclass(frozen=True)
class Pictures:
    """Embeddings of a set of pictures, and what they show."""

    keys: tuple[str, ...]
    vectors: NDArray[np.float32]  # [pictures, dim], unit rows
    truth: NDArray[np.intp]  # index of the class

    def some(self, rows: Iterable[int]) -> Pictures:
        """Those of some rows."""
        index = list(rows)
        return Pictures(tuple(self.keys[i] for i in index), self.vectors[index], self.truth[index])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name, a directory or a file")
    parser.add_argument("data", type=Path, help="the folder of classes.json and the archives")
    parser.add_argument("-o", "--output", type=Path, help="where the markdown goes; else stdout")
    parser.add_argument("-d", "--device", default="auto")
    options = parser.parse_args()
    if not (options.data / "classes.json").is_file():
        parser.error(f"{options.data}: no classes.json in it")
    try:
        text = "\n".join(report(clipcli.load_model(options.model, device=options.device), options.data)) + "\n"
    except clipcli.ClipcliError as error:
        raise SystemExit(f"{error}") from error
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def report(model: clipcli.Model, data: Path) -> Lines:
    """All figures, as lines of markdown."""
    classes = json.loads((data / "classes.json").read_text(encoding="utf-8"))["datasets"]
    words = label_files.read(str(HERE / "words.csv"))
    if [label.name for label in words] != classes["tiny-imagenet"]["names"]:
        raise SystemExit("words.csv and classes.json name different classes")
    seen = read(model, data / "tiny-imagenet-val-dev.tar.gz")
    yield f"# {model.name}: figures"
    yield ""
    yield f"Image tower {model.image_fingerprint[:8]}, text tower {model.text_fingerprint[:8]}, {model.arithmetic};"
    yield f"pictures at {model.config.vision.image_size} px. Accuracies in per cent, with bootstrap intervals of 95 %"
    yield f"({RESAMPLES} resamples of the pictures, seeded). Made by `benchmarks/tiny/evaluate.py`."
    yield from two_hundred(model, seen, words)
    yield from coarse(model, seen, words, COARSE)
    yield from coarse(model, seen, words, COARSEST)
    yield from elsewhere(model, data, classes, words)
    yield from confusions(model, seen, words)
    yield from calibration(model, seen, words)


# The sections


def two_hundred(model: clipcli.Model, pictures: Pictures, words: list[Label]) -> Lines:
    """Tiny-ImageNet with the 200 labels: templates, aliases, and what they gain."""
    yield from heading(f"Tiny-ImageNet val-dev: {len(words)} labels, {counted(pictures)}")
    names = plain(label.name for label in words)
    rows, hits = [], {}
    for kind, labels in (("names", names), ("aliases", words)):
        for title, templates in {**TEMPLATES, "imagenet80": "imagenet80"}.items():
            if kind == "aliases" and title == "imagenet80":
                continue  # 60,000 prompts
            scores = logits(model, pictures, labels, templates)
            hits[kind, title] = correct(scores, pictures.truth)
            prompts = sum(len(label.aliases) for label in labels) * len(template_sets.read([templates])) / len(labels)
            five = 100 * correct(scores, pictures.truth, 5).mean()
            rows.append((kind, title, f"{prompts:.1f}", with_interval(hits[kind, title]), f"{five:.1f}"))
    rows.append(("chance", "", "", f"{100 / len(words):.1f}", f"{500 / len(words):.1f}"))
    yield from table(("words", "templates", "prompts a label", "top-1", "top-5"), rows)
    yield ""
    base = hits["names", MAIN]
    for other in (("names", "a photo of a <>."), ("names", "bare names"), ("aliases", MAIN)):
        gain = 100 * (base.astype(float) - hits[other])
        low, high = interval(gain)
        minus = f"{MAIN} with names less {other[1]} with {other[0]}"
        yield f"- {minus}: {gain.mean():+.1f} points ({low:+.1f} to {high:+.1f})"


def coarse(model: clipcli.Model, pictures: Pictures, words: list[Label], names: Sequence[str]) -> Lines:
    """Broader words instead of the classes' own: of the pictures to which exactly one of them belongs."""
    place = {name: index for index, name in enumerate(names)}
    broader = [[place[word] for word in groups(label) if word in place] for label in words]
    rows = [row for row, truth in enumerate(pictures.truth) if len(broader[truth]) == 1]
    some = pictures.some(rows)
    truth = np.array([broader[index][0] for index in some.truth])
    yield from heading(f"Tiny-ImageNet val-dev: {len(names)} broader words, {counted(some)}")
    yield f"{', '.join(names)}. Pictures to which exactly one of them applies."
    yield ""
    share = np.bincount(truth, minlength=len(names)) / len(truth)
    best: NDArray[np.bool_] | None = None
    found = []
    for title, templates in TEMPLATES.items():
        hits = correct(logits(model, some, plain(names), templates), truth)
        best = hits if title == MAIN else best
        found.append((title, with_interval(hits)))
    found += [
        ("chance", f"{100 / len(names):.1f}"),
        (f'always "{names[int(share.argmax())]}"', f"{100 * share.max():.1f}"),
    ]
    yield from table(("templates", "top-1"), found)
    yield ""
    assert best is not None
    recalls = (f"{name} {100 * best[truth == index].mean():.0f}" for index, name in enumerate(names))
    yield f"By word ({MAIN}): {', '.join(recalls)}."


def elsewhere(model: clipcli.Model, data: Path, classes: dict[str, dict[str, list[str]]], words: list[Label]) -> Lines:
    """Pictures of other kinds, by their own names; none of them was trained on."""
    known = {word.casefold() for label in words for word in (*label.aliases, *groups(label))}
    sets = [(title, read(model, data / file), classes[key]["names"]) for title, key, file in ELSEWHERE]
    pacs, names = read(model, data / "pacs-dev.tar"), classes["pacs"]["names"]
    for domain in classes["pacs"]["domains"]:
        rows = [row for row, key in enumerate(pacs.keys) if key.startswith(f"{domain}-")]
        sets.append((f"PACS {domain}", pacs.some(rows), names))
    found = [elsewhere_one(model, *one, known) for one in sets]
    yield from heading("Pictures of other kinds")
    yield from table(("set", "pictures", *TEMPLATES, "taught words only", "chance"), (row for row, _ in found))
    yield ""
    yield f'"taught words only": {MAIN}, only the labels that stand in words.csv, and the pictures of these.'
    yield f"Found by label ({MAIN}, all labels; * is a word that was not taught):"
    yield ""
    yield from (note for _, note in found)


def elsewhere_one(
    model: clipcli.Model, title: str, pictures: Pictures, names: list[str], known: set[str]
) -> tuple[list[str], str]:
    """A row of the table, and how many pictures of each label were found."""
    scores = {key: logits(model, pictures, plain(names), value) for key, value in TEMPLATES.items()}
    hits = {key: correct(value, pictures.truth) for key, value in scores.items()}
    cells = [with_interval(hits[key]) if key == MAIN else f"{100 * hits[key].mean():.1f}" for key in TEMPLATES]
    taught = [index for index, name in enumerate(names) if name.casefold() in known]
    narrow = "–"
    if len(taught) > 1:
        inside = np.isin(pictures.truth, taught)
        right = correct(scores[MAIN][inside][:, taught], np.searchsorted(taught, pictures.truth[inside]))
        narrow = f"{100 * right.mean():.1f} of {len(taught)} (chance {100 / len(taught):.1f})"
    recalls = (
        f"{name}{'' if index in taught else '*'} {100 * hits[MAIN][pictures.truth == index].mean():.0f}"
        for index, name in enumerate(names)
    )
    row = [title, str(len(pictures.keys)), *cells, narrow, f"{100 / len(names):.1f}"]
    return row, f"- {title}: {', '.join(recalls)}"


def confusions(model: clipcli.Model, pictures: Pictures, words: list[Label], most: int = 15) -> Lines:
    """What is taken for what."""
    yield from heading(f"The most frequent confusions ({MAIN}, names)")
    names = [label.name for label in words]
    guesses = logits(model, pictures, plain(names), TEMPLATES[MAIN]).argmax(axis=1)
    total = np.bincount(pictures.truth, minlength=len(names))
    wrong = Counter((int(t), int(g)) for t, g in zip(pictures.truth, guesses, strict=True) if t != g)
    worst = sorted(wrong.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
    yield from table(
        ("shown", "answered", "times"), ((names[t], names[g], f"{n} of {total[t]}") for (t, g), n in worst)
    )
    right = np.bincount(pictures.truth[pictures.truth == guesses], minlength=len(names)) / np.maximum(total, 1)
    order = np.argsort(right, kind="stable")
    for title, some in (("Found least", order[:10]), ("Found most", order[::-1][:10])):
        yield ""
        yield f"{title}: {', '.join(f'{names[i]} {100 * right[i]:.0f}' for i in some)}."


def calibration(model: clipcli.Model, pictures: Pictures, words: list[Label]) -> Lines:
    """What a score is worth."""
    yield from heading(f"What a score is worth ({MAIN}, names)")
    scores = logits(model, pictures, plain(label.name for label in words), TEMPLATES[MAIN])
    hits = correct(scores, pictures.truth)
    temperature = fitted(scores, pictures.truth)
    rows = []
    for title, value in (("1 (as it is)", 1.0), (f"{temperature:.2f} (fitted to these pictures)", temperature)):
        best = np.exp(log_softmax(scores / value)).max(axis=1)
        sure = best > 0.5
        there = f"{100 * hits[sure].mean():.1f}" if sure.any() else "–"
        loss = -log_softmax(scores / value)[np.arange(len(hits)), pictures.truth].mean()
        rows.append(
            (title, f"{best.mean():.3f}", f"{loss:.3f}", f"{100 * sure.mean():.1f}", there, f"{error(best, hits):.3f}")
        )
    yield from table(("temperature", "mean score", "loss", "above 0.5", "accuracy there", "calibration error"), rows)
    yield ""
    yield f"Accuracy of all: {100 * hits.mean():.1f}. Scale of the logits: {model.checkpoint.logit_scale:.1f}."
    yield "Calibration error: the mean distance of score and accuracy in ten equal steps of the score, by pictures."


# Pictures and scores


def read(model: clipcli.Model, archive: Path) -> Pictures:
    """Every picture of an archive, encoded, with its `.cls`."""
    sources, truth = [], {}
    for member in members(str(archive)):
        if isinstance(member, Failure):
            raise SystemExit(f"{member.path}: {member.message}")
        key, _, ending = member.name.rpartition(".")
        if ending == "cls":
            truth[key] = int(member.data)
        elif ending in ("jpg", "png"):
            sources.append(Source(key, member.data))
    prepare = make_prepare(model.config.preprocess, model.config.vision.image_size)
    keys: list[str] = []
    vectors = []
    for batch in batches(sources, prepare, batch_size=64, workers=default_workers()):
        for item in batch.items:
            if isinstance(item, Failure):
                raise SystemExit(f"{archive}: {item.path}: {item.message}")
            keys.append(item.path)
        vectors.append(model.encode_image(batch.pixels))
    return Pictures(tuple(keys), np.concatenate(vectors), np.array([truth[key] for key in keys]))


def logits(model: clipcli.Model, pictures: Pictures, labels: list[Label], templates: str) -> Floats:
    """Scaled cosines [pictures, labels], as `classify` has them before the softmax."""
    classifier = clipcli.build_classifier(model, labels, templates=templates)
    return classifier.logit_scale * (pictures.vectors @ classifier.weight.T).astype(np.float64)


def plain(names: Iterable[str]) -> list[Label]:
    """Labels that are their own words."""
    return [Label(name, (name,)) for name in names]


def groups(label: Label) -> list[str]:
    """The broader words of a label."""
    return label.group.split("|") if label.group else []


# Arithmetic


def correct(scores: Floats, truth: NDArray[np.intp], k: int = 1) -> NDArray[np.bool_]:
    """Whether the truth is among the `k` best; of equals the earlier label is better."""
    own = np.take_along_axis(scores, truth[:, None], axis=1)
    earlier = np.arange(scores.shape[1]) < truth[:, None]
    hits: NDArray[np.bool_] = ((scores > own) | ((scores == own) & earlier)).sum(axis=1) < k
    return hits


def interval(values: NDArray[np.floating] | NDArray[np.bool_]) -> tuple[float, float]:
    """Bootstrap interval of 95 % of the mean."""
    draws = np.random.default_rng(0)
    means = [values[draws.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def log_softmax(scores: Floats) -> Floats:
    """Logarithms of the scores that `classify` prints."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def fitted(scores: Floats, truth: NDArray[np.intp]) -> float:
    """The temperature with the least cross-entropy, to three hundredths of itself."""
    rows = np.arange(len(truth))
    candidates = np.geomspace(0.1, 20, 180)
    losses = [-log_softmax(scores / candidate)[rows, truth].mean() for candidate in candidates]
    return float(candidates[int(np.argmin(losses))])


def error(best: Floats, hits: NDArray[np.bool_]) -> float:
    """Expected calibration error in ten bins."""
    bins = np.minimum((best * 10).astype(int), 9)
    return float(sum(abs(best[bins == b].sum() - hits[bins == b].sum()) for b in range(10)) / len(best))


# Markdown


def heading(title: str) -> Lines:
    """A section's first lines."""
    yield from ("", f"## {title}", "")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Lines:
    """A table."""
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(row)} |"


def with_interval(hits: NDArray[np.bool_]) -> str:
    """An accuracy in per cent with its interval."""
    low, high = interval(hits)
    return f"{100 * hits.mean():.1f} ({100 * low:.1f}–{100 * high:.1f})"


def counted(pictures: Pictures) -> str:
    """How many pictures."""
    return f"{len(pictures.keys):,} pictures"


if __name__ == "__main__":
    main()
