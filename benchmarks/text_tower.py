"""Every label in every template, fp32 on the CPU: token ids and embeddings by clipcli, and by the peers that are there.

    python benchmarks/text_tower.py --vocabulary merges.txt --labels imagenet_classes.txt -o runs/DATE-MACHINE

Random weights of ViT-B/32's text tower, the same for all, and their embeddings are compared. clipcli encodes all
prompts, in as many parts as there are rounds. In each round every peer encodes the prompts of one label, a batch, as
the usual loop over classes does; its time for all prompts is scaled from these. `plain` is clipcli's readable tower,
padded to the context length as open_clip's is. Then all prompts become ids: `plain` cleans each one and looks for its
words, and remembers what a word is merged to. Only ratios are to be trusted, and within 10 % they are ties.

Writes text_tower.json (all times) and text_tower.md; `--try` is a run of seconds with a small tower.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from image_tower import machine, open_clip
from torch import Tensor, nn

from clipcli.model import prefix
from clipcli.model.clip import build_text_tower
from clipcli.model.config import ClipConfig, TextConfig
from clipcli.model.text import pad
from clipcli.tokenizer import Tokenizer, _clean_fully, _join, _pattern, cut, spell
from clipcli.zeroshot import templates as template_sets

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny

Ids = list[list[int]]
Form = Callable[[Ids], Tensor]
Words = Callable[[list[str]], Sequence[Sequence[int]]]


def config_of(vocabulary: int, small: bool) -> ClipConfig:
    """A model with the text tower that is meant, and with hardly any image tower."""
    sizes = (64, 2, 1, 256) if small else (512, 12, 8, 2048)
    text = TextConfig(77, vocabulary, *sizes, "quick_gelu")
    return replace(tiny.vit(activation="quick_gelu"), embed_dim=sizes[0], text=text)


def padded(ids: Ids, length: int) -> Tensor:
    """Ids [B, length], zeros behind the end."""
    return nn.functional.pad(pad(ids), (0, length - max(map(len, ids))))


# ---- who takes part


def open_clip_form(config: ClipConfig, arrays: dict[str, Any], length: int = 77) -> Form:
    """open_clip's tower; its prompts are always as long as the context."""
    tower = open_clip().CLIP(**tiny.open_clip_config(config)["model_cfg"])
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    missing = tower.load_state_dict(state, strict=False).missing_keys
    assert all(name.startswith("visual.") or name in ("attn_mask", "logit_scale") for name in missing), missing
    tower.eval()
    return lambda ids: tower.encode_text(padded(ids, length))


def transformers_form(config: ClipConfig, arrays: dict[str, Any], length: int = 0) -> Form:
    """transformers' tower; `length` 0: as long as the batch's longest."""
    import transformers

    settings = tiny.transformers_config(config)["text_config"] | {"projection_dim": config.embed_dim}
    tower = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**settings))
    state = {name: torch.from_numpy(array) for name, array in tiny.transformers_arrays(arrays).items()}
    missing = tower.load_state_dict(state, strict=False).missing_keys
    assert all("position_ids" in name for name in missing), missing
    tower.eval()
    return lambda ids: tower(input_ids=padded(ids, length or max(map(len, ids)))).text_embeds


def plain_form(config: ClipConfig, arrays: dict[str, Any], length: int = 77) -> Form:
    """clipcli's readable tower, padded."""
    tower = build_text_tower(config, arrays)
    return lambda ids: tower(padded(ids, length))


def fast_form(config: ClipConfig, arrays: dict[str, Any]) -> Form:
    """clipcli's, of these prompts alone; the measured run goes on over all of them."""
    tower = prefix.FastText(build_text_tower(config, arrays), pack=True)

    def run(ids: Ids) -> Tensor:
        out = torch.empty(len(ids), config.embed_dim)
        for indices, vectors in prefix.encode(tower, ids):
            out[indices] = vectors
        return out

    return run


PEERS: dict[str, Callable[[ClipConfig, dict[str, Any]], Form]] = {
    "open_clip, padded to 77": open_clip_form,
    "transformers, padded to 77": lambda config, arrays: transformers_form(config, arrays, 77),
    "transformers, to the longest": transformers_form,
    "plain, padded to 77": plain_form,
}
FORMS = {**PEERS, "clipcli": fast_form}


def open_clip_words(tokenizer: Tokenizer, vocabulary: Path) -> Words:
    """open_clip's own, with its own copy of the vocabulary. Raises ImportError, ValueError for another vocabulary."""
    theirs = open_clip().SimpleTokenizer()
    if theirs.vocab_size != tokenizer.vocab_size:
        raise ValueError("its vocabulary is another")
    return lambda texts: theirs(texts, 77)


def rust_words(tokenizer: Tokenizer, vocabulary: Path) -> Words:
    """The tokenizers package, which transformers uses, on all cores. Raises ImportError."""
    import tokenizers

    from clipcli.weights.vocabulary import vocabulary_files

    theirs = tokenizers.Tokenizer.from_str(vocabulary_files(tokenizer, 77)["tokenizer.json"].decode())
    return lambda texts: [row.ids for row in theirs.encode_batch(texts)]


def plain_words(tokenizer: Tokenizer, vocabulary: Path) -> Words:
    """The rules as they are written, text by text."""
    known: dict[str, list[int]] = {}
    ids = tokenizer.ids

    def encode(text: str) -> Iterator[int]:
        yield tokenizer.start_token
        for word in _pattern().findall(_clean_fully(text)):
            if word not in known:
                known[word] = [ids[token] for token in _join(spell(word), tokenizer._ranks)]
            yield from known[word]
        yield tokenizer.end_token

    return lambda texts: [list(encode(text)) for text in texts]


def fast_words(tokenizer: Tokenizer, vocabulary: Path) -> Words:
    """clipcli's, which remembers nothing yet."""
    return Tokenizer(tokenizer._ranks, tokenizer._ids)


WORDS = {"open_clip": open_clip_words, "tokenizers": rust_words, "plain": plain_words, "clipcli": fast_words}


# ---- measuring


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """What it took, and what came out."""
    began = time.perf_counter()
    found = run()
    return time.perf_counter() - began, found


def measure_tower(config: ClipConfig, prompts: Ids, by_label: list[list[int]], rounds: int) -> dict[str, Any]:
    """Seconds and prompts of each form, round by round, and how far embeddings are apart at most.

    `by_label`: the prompts of each label, a peer's batch.
    """
    arrays = {name: array for name, array in tiny.weights(config).items() if not name.startswith("visual.")}
    arrays.pop("logit_scale")
    tower = prefix.FastText(build_text_tower(config, arrays), pack=True)
    forms = dict(built(PEERS, config, arrays))
    groups = prefix.plan({tuple(row) for row in prompts})
    batches = sum(len(group.batches) for group in groups)
    for form in forms.values():
        form(prompts[:2])
    out = torch.empty(len(prompts), config.embed_dim)
    spent: dict[str, list[tuple[float, int]]] = {name: [] for name in [*forms, "clipcli"]}
    theirs: dict[str, list[tuple[list[int], Tensor]]] = {name: [] for name in forms}
    run = prefix.encode(tower, prompts)
    for number in range(rounds):
        chosen = by_label[number * len(by_label) // rounds]
        batch = [prompts[index] for index in chosen]
        for name in list(forms)[:: -1 if number % 2 else 1]:
            took, vectors = seconds(lambda name=name, batch=batch: forms[name](batch))  # type: ignore[misc]
            spent[name].append((took, len(chosen)))
            theirs[name].append((chosen, vectors))
        most = (number + 1) * batches // rounds - number * batches // rounds
        took, found = seconds(lambda most=most: [next(run) for _ in range(most)])  # type: ignore[misc]
        spent["clipcli"].append((took, sum(len(indices) for indices, _ in found)))
        for indices, vectors in found:
            out[indices] = vectors
        rates = (f"{name} {took[-1][1] / took[-1][0]:.0f}/s" for name, took in spent.items())
        print(f"round {number + 1} of {rounds}: {', '.join(rates)}")
    assert next(run, None) is None
    unit = nn.functional.normalize
    apart = {
        name: max(float((unit(vectors) - unit(out[chosen])).abs().max()) for chosen, vectors in found)
        for name, found in theirs.items()
    }
    assert max(apart.values()) < 1e-4, apart
    positions = {
        "padded": config.text.context_length * len(prompts),
        "without padding": sum(map(len, prompts)),
        "clipcli": sum(group.positions for group in groups),
    }
    return {"spent": spent, "apart": apart, "positions": positions, "groups": len(groups), "prompts": len(prompts)}


def built(forms: dict[str, Any], *arguments: Any) -> Iterator[tuple[str, Any]]:
    """Those that there are."""
    for name, make in forms.items():
        try:
            yield name, make(*arguments)
        except (ImportError, ValueError) as error:
            print(f"no {name}: {error}", file=sys.stderr)


def measure_words(tokenizer: Tokenizer, vocabulary: Path, texts: list[str], rounds: int) -> dict[str, Any]:
    """Seconds for all texts, round by round, and of how many texts the ids are clipcli's."""
    forms = list(dict(built(WORDS, tokenizer, vocabulary)))
    expected = [cut(row, 77) for row in tokenizer(texts)]
    spent: dict[str, list[float]] = {name: [] for name in forms}
    same = {}
    for number in range(rounds):
        for name in forms[:: -1 if number % 2 else 1]:
            form = WORDS[name](tokenizer, vocabulary)  # fresh: nothing is remembered
            took, found = seconds(lambda form=form: form(texts))  # type: ignore[misc]
            spent[name].append(took)
            if number == 0:
                rows = zip(expected, found, strict=True)
                same[name] = sum(row == cut([*map(int, other[: len(row)])], 77) for row, other in rows)
    assert same["clipcli"] == same.get("plain") == len(texts)
    return {"spent": spent, "same": same, "texts": len(texts)}


def peak_memory(name: str, options: Sequence[str]) -> int | None:
    """MiB of a process that does nothing but run this form, at its most; None where the system doesn't tell."""
    command = [sys.executable, __file__, *options, "--memory", name]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return int(printed) if printed else None


def print_memory(name: str, config: ClipConfig, prompts: Ids) -> None:
    """The child's part of `peak_memory`: what the peak is once the form is built, over the prompts of one label."""
    arrays = {key: array for key, array in tiny.weights(config).items() if not key.startswith("visual.")}
    arrays.pop("logit_scale")
    form = FORMS[name](config, arrays)
    with torch.inference_mode():
        form(prompts[:1])
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
        except OSError:
            return
        form(prompts)
    if found := re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text()):
        print(int(found[1]) // 1024)


# ---- what is told


def summary(found: dict[str, Any]) -> str:
    """The Markdown of a whole run."""
    about = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    tower, words = found["tower"], found["words"]
    prompts, positions = tower["prompts"], tower["positions"]
    return "\n".join(
        [
            "# Text: prompts to ids to embeddings\n",
            f"`{found['command']}`; {found['rounds']} rounds. {about[0].upper()}{about[1:]}.\n",
            f"{prompts:,} prompts, fp32, random weights. Token positions: padded {positions['padded']:,}, without "
            f"padding {positions['without padding']:,}, computed by clipcli {positions['clipcli']:,} "
            f"({positions['padded'] / positions['clipcli']:.1f} × fewer than padded), "
            f"{tower['groups']} shared prefixes.\n",
            *tower_table(tower, found["memory"]),
            "",
            f"{words['texts']:,} prompts to ids, medians of whole runs; the first run of each form compared:\n",
            *words_table(words),
            "",
        ]
    )


def tower_table(tower: dict[str, Any], memory: dict[str, int | None]) -> Iterator[str]:
    """One line a form."""
    rates = {name: [n / s for s, n in rounds] for name, rounds in tower["spent"].items()}
    total = {
        name: tower["prompts"] * sum(s for s, _ in rounds) / sum(n for _, n in rounds)
        for name, rounds in tower["spent"].items()
    }
    yield "| form | measured | prompts/s | all prompts, s | clipcli is × as fast | in single rounds | apart | MiB |"
    yield "|---|---:|---:|---:|---:|---|---:|---:|"
    for name, rounds in tower["spent"].items():
        ratios = [ours / other for ours, other in zip(rates["clipcli"], rates[name], strict=True)]
        apart = f"{tower['apart'][name]:.0e}" if name in tower["apart"] else "–"
        yield (
            f"| {name} | {sum(n for _, n in rounds):,} | {tower['prompts'] / total[name]:.1f} | {total[name]:,.0f} | "
            f"{total[name] / total['clipcli']:.2f} | {min(ratios):.2f} to {max(ratios):.2f} | {apart} | "
            f"{memory.get(name) or '–'} |"
        )
    yield "\nMiB: peak of a process that encodes the prompts of one label, weights and torch included."
    slower = [name for name in total if total[name] < total["clipcli"]]
    absent = [name for name in FORMS if name not in total]
    yield f"Where clipcli is behind: {', '.join(slower) or 'nowhere'}. Not there: {', '.join(absent) or 'none'}."


def words_table(words: dict[str, Any]) -> Iterator[str]:
    """One line a form."""
    yield "| form | prompts/s | clipcli is × as fast | ids equal |"
    yield "|---|---:|---:|---:|"
    for name, spent in words["spent"].items():
        ratio = statistics.median(b / a for a, b in zip(words["spent"]["clipcli"], spent, strict=True))
        rate = words["texts"] / statistics.median(spent)
        yield f"| {name} | {rate:,.0f} | {ratio:.2f} | {words['same'][name]:,} of {words['texts']:,} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="a folder for the two files")
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True, help="a class name a line")
    parser.add_argument("--templates", default="imagenet80")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--try", dest="small", action="store_true", help="a small tower, and as little as possible")
    parser.add_argument("--memory", choices=FORMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    names = given.labels.read_text(encoding="utf-8").splitlines()[: 30 if given.small else None]
    templates = [template.text for template in template_sets.read([given.templates])]
    texts = [template.replace("<>", name) for name in names for template in templates]
    tokenizer = Tokenizer.from_file(given.vocabulary)
    prompts = [cut(row, 77) for row in tokenizer(texts)]
    config = config_of(tokenizer.vocab_size, given.small)
    if given.memory:
        return print_memory(given.memory, config, prompts[: len(templates)])
    rounds = 2 if given.small else given.rounds
    by_label = [list(range(i, i + len(templates))) for i in range(0, len(prompts), len(templates))]
    words = measure_words(tokenizer, given.vocabulary, texts, min(rounds, 5))
    with torch.inference_mode():
        tower = measure_tower(config, prompts, by_label, rounds)
    found = {
        "command": " ".join(["python", *(Path(word).name if Path(word).exists() else word for word in sys.argv)]),
        "machine": machine(),
        "rounds": rounds,
        "tower": tower,
        "words": words,
        "memory": {} if given.small else {name: peak_memory(name, sys.argv[1:]) for name in tower["spent"]},
    }
    text = summary(found)
    print(f"\n{text}")
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "text_tower.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (given.output / "text_tower.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
