"""Models written to the disk: read back they are the same, in one piece or not there; other programs read exports."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors import safe_open

from clipcli.errors import ModelError, OutputError, UsageError, VocabularyError
from clipcli.model.config import ClipConfig, Preprocess, ViTConfig, expected_shapes
from clipcli.records import Source
from clipcli.store.database import Store
from clipcli.tokenizer import Tokenizer
from clipcli.weights.export import export_model
from clipcli.weights.load import Checkpoint, load_checkpoint
from clipcli.weights.model import load_model
from clipcli.weights.open_clip import CONFIG, WEIGHTS
from clipcli.weights.save import open_clip_config, save_model

MERGES = "\n".join(["#version: 0.2", *tiny.merges(), ""])
FILES = ["README.md", "merges.txt", CONFIG, WEIGHTS[0], "tokenizer.json", "tokenizer_config.json"]
ODD = [
    "A photo of a Cat.", "it's 1990's, DON'T'S!!", "naïve cafe\u0301 ½ Ⅷ ²", "日本 の 猫", "🐈\u200d⬛ cat",
    "  a \t b\n\u00a0c\u3000d", "'re..'ſ x''s", "a_b-c/d", "", "İstanbul STRASSE", "<|x|>", "12345", "x" * 60,
]  # fmt: skip


def widened(config: ClipConfig) -> ClipConfig:
    """A ViT with nothing as usual: heads of 8 and 16, MLPs of odd widths, other preprocessing."""
    assert isinstance(config.vision, ViTConfig)
    preprocess = Preprocess((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "squash", "bilinear")
    vision = replace(config.vision, heads=4, mlp_width=77)
    return replace(
        config, vision=vision, text=replace(config.text, mlp_width=51, context_length=30), preprocess=preprocess
    )


CONFIGS = {
    "vit": tiny.vit(),
    "vit-quick": tiny.vit(activation="quick_gelu"),
    "vit-odd": widened(tiny.vit()),
    "resnet": tiny.resnet(),
    "resnet-quick": tiny.resnet(activation="quick_gelu", image_size=64),
}


def save(folder: Path, config: ClipConfig | None = None, seed: int = 0, **options: Any) -> Path:
    config = config or tiny.vit()
    save_model(folder, config, tiny.weights(config, seed), merges=MERGES, card="# mine\n", **options)
    return folder


def fingerprints(checkpoint: Checkpoint) -> tuple[str, str]:
    return checkpoint.fingerprint("image", Store(None)), checkpoint.fingerprint("text", Store(None))


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """No file of this process gets larger than `after` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


# What is written


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_read_back_it_is_the_same_model(config: ClipConfig, tmp_path: Path) -> None:
    saved, other = load_checkpoint(save(tmp_path / "saved", config)), tiny.save(tmp_path / "bare", "bare", config)
    assert (saved.config, saved.layout) == (config, "open_clip")
    head_width = config.vision.width // config.vision.heads if isinstance(config.vision, ViTConfig) else 16
    bare = load_checkpoint(other, activation=config.text.activation, head_width=head_width)
    assert fingerprints(saved) == fingerprints(replace(bare, config=config))
    assert saved.logit_scale == pytest.approx(100)
    assert saved.vocabulary == tmp_path / "saved" / "merges.txt"


def test_any_width_of_the_mlp_comes_back() -> None:
    for mlp_width in range(1, 1500):
        config = replace(tiny.vit(), text=replace(tiny.vit().text, width=176, mlp_width=mlp_width))
        text = open_clip_config(config)["model_cfg"]["text_cfg"]
        assert int(176 * text.get("mlp_ratio", 4.0)) == mlp_width


def test_the_files(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", training={"epochs": 3, "labels": ["é"]})
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "training.json"])
    assert json.loads((folder / "training.json").read_text("utf-8")) == {"epochs": 3, "labels": ["é"]}
    assert (folder / "README.md").read_text() == "# mine\n"
    assert (folder / "merges.txt").read_text("utf-8") == MERGES
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_the_same_model_makes_the_same_bytes(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one", tiny.resnet()), save(tmp_path / "two", tiny.resnet())
    assert all((one / path.name).read_bytes() == path.read_bytes() for path in two.iterdir())


def test_a_resnet_has_the_counters_that_open_clip_insists_on(tmp_path: Path) -> None:
    config = tiny.resnet()
    arrays = tiny.weights(config) | {"visual.bn1.num_batches_tracked": np.array(12)}
    save_model(tmp_path / "m", config, arrays, merges=MERGES, card="")
    with safe_open(tmp_path / "m" / WEIGHTS[0], "np") as file:
        counters = {name: file.get_tensor(name) for name in file.keys() if "num_batches" in name}  # noqa: SIM118
        assert len(list(file.keys())) == len(counters) + len(expected_shapes(config))
    assert len(counters) == sum("running_mean" in name for name in expected_shapes(config))
    assert {(c.shape, str(c.dtype)) for c in counters.values()} == {((), "int64")}
    assert (counters["visual.bn1.num_batches_tracked"], counters["visual.bn2.num_batches_tracked"]) == (12, 0)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_fp16_halves_matrices_and_nothing_else(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    saved = load_checkpoint(save(tmp_path / "half", config, precision="fp16"))
    kinds = {len(saved.arrays.shape(name)) > 1: saved.arrays.dtype(name) for name in saved.arrays}
    assert kinds == {True: "F16", False: "F32"}
    assert all((saved.arrays.dtype(name) == "F16") == (len(saved.arrays.shape(name)) > 1) for name in saved.arrays)
    assert fingerprints(saved) == fingerprints(load_checkpoint(save(tmp_path / "full", config)))  # they are exact in it
    sizes = [(tmp_path / folder / WEIGHTS[0]).stat().st_size for folder in ("half", "full")]
    assert sizes[0] < 0.65 * sizes[1]


@pytest.mark.parametrize("value", [7e4, np.nan, np.inf])
def test_what_fp16_cannot_hold_is_refused(value: float, tmp_path: Path) -> None:
    arrays = tiny.weights(tiny.vit())
    arrays["visual.proj"][0, 0] = value
    with pytest.raises(ModelError, match=r"`visual\.proj` holds numbers that are not finite in fp16"):
        save_model(tmp_path / "m", tiny.vit(), arrays, merges=MERGES, card="", precision="fp16")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    arrays = tiny.weights(tiny.vit())
    arrays["ln_final.weight"] = np.ones(31, np.float32)
    with pytest.raises(ModelError, match=r"`ln_final\.weight` is \[31\], but the configuration says \[32\]"):
        save_model(tmp_path / "m", tiny.vit(), arrays, merges=MERGES, card="")
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="814"):
        save_model(tmp_path / "m", tiny.vit(), {}, merges="#version: 0.2\na b\n", card="")
    assert list(tmp_path.iterdir()) == []


def test_two_activations_are_refused(tmp_path: Path) -> None:
    config = replace(tiny.vit(), text=tiny.vit(activation="quick_gelu").text)
    with pytest.raises(UsageError, match="gelu in the image tower, quick_gelu in the text tower"):
        save(tmp_path / "m", config)


def test_a_vocabulary_with_its_own_order_keeps_its_ids(tmp_path: Path) -> None:
    own = Tokenizer.from_file(save(tmp_path / "m") / "merges.txt")
    ids = {token: (i + 5) % 812 if i < 812 else i for token, i in own.ids.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (tmp_path / "merges.txt").write_text(MERGES, encoding="utf-8")
    source = tmp_path / "vocab.json"
    save_model(tmp_path / "n", tiny.vit(), tiny.weights(tiny.vit()), merges=source, card="")
    expected = Tokenizer.from_file(source)(ODD)
    assert expected != own(ODD)
    assert load_model(tmp_path / "n").tokenizer(ODD) == expected
    assert Tokenizer.from_file(tmp_path / "n" / "tokenizer.json", 814)(ODD) == expected
    save_model(tmp_path / "n", tiny.vit(), tiny.weights(tiny.vit()), merges=MERGES, card="", force=True)
    assert load_model(tmp_path / "n").tokenizer(ODD) == own(ODD)  # no vocab.json is left behind


# Whole or not at all


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match="exists already"):
        save(folder, seed=1)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_an_empty_folder_is_filled_and_missing_ones_are_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert load_checkpoint(save(tmp_path / "empty")).config == load_checkpoint(save(tmp_path / "a" / "b")).config


def test_force_replaces_the_model_and_nothing_else(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", training={"old": True})
    (folder / "log.csv").write_text("epoch,loss\n")
    (folder / "checkpoints").mkdir()
    inode = folder.stat().st_ino
    old, new = load_checkpoint(folder), save(tmp_path / "new", tiny.resnet(), seed=1)
    told = fingerprints(old)
    save(folder, tiny.resnet(), seed=1, force=True)
    assert fingerprints(load_checkpoint(folder)) == fingerprints(load_checkpoint(new))
    assert fingerprints(old) == told  # whoever had opened the old model still reads it
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "checkpoints", "log.csv"])
    assert folder.stat().st_ino == inode


def test_force_replaces_no_readme_but_a_model_s(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# my thesis\n")
    with pytest.raises(UsageError, match=r"holds no model, but a README\.md"):
        save(tmp_path, force=True)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("README.md", "# my thesis\n")]


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    save(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", seed=1, force=True)
    assert (tmp_path / "link").is_symlink()
    changed = load_checkpoint(tmp_path / "real")
    assert fingerprints(changed) == fingerprints(load_checkpoint(save(tmp_path / "other", seed=1)))


def test_links_within_are_replaced_not_followed(tmp_path: Path) -> None:
    blobs, folder = save(tmp_path / "blobs"), tmp_path / "snapshot"
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(path)
    before = fingerprints(load_checkpoint(blobs))
    save(folder, seed=1, force=True)
    assert fingerprints(load_checkpoint(blobs)) == before != fingerprints(load_checkpoint(folder))


@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_what_was_there(force: bool, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    if force:
        save(folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with full_disk(after=100_000), pytest.raises(OutputError, match="can't be written: file too large") as caught:
        save(folder, seed=1, force=force)
    assert caught.value.hint
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert folder.exists() == force


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    class Interrupted(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path / "m", tiny.vit(), Interrupted(), merges=MERGES, card="")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, what in (("file", "is no folder"), ("file/m", "is no folder"), ("dangling", "link to nothing")):
        with pytest.raises(UsageError, match=what):
            save(tmp_path / name, force=True)
    blocked = save(tmp_path / "blocked")
    (blocked / "merges.txt").unlink()
    (blocked / "merges.txt").mkdir()
    weights = (blocked / WEIGHTS[0]).read_bytes()
    with pytest.raises(UsageError, match=r"merges\.txt: is a folder"):
        save(blocked, seed=1, force=True)
    assert (blocked / WEIGHTS[0]).read_bytes() == weights
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="permission denied"):
        save(tmp_path / "locked" / "m")


# Other programs


def test_tokenizers_reads_the_vocabulary(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Theirs

    theirs = Theirs.from_file(str(save(tmp_path / "m") / "tokenizer.json"))
    ours = load_model(tmp_path / "m").tokenizer
    for text in ODD:
        assert theirs.encode(text).ids == ours([text])[0], text
    assert theirs.get_vocab_size() == ours.vocab_size
    assert Tokenizer.from_file(tmp_path / "m" / "tokenizer.json", 814)(ODD) == ours(ODD)


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
@pytest.mark.parametrize("source", tiny.LAYOUTS)
def test_every_layout_can_be_exported_and_is_the_same_model(source: str, layout: Any, tmp_path: Path) -> None:
    config = tiny.vit(activation="quick_gelu")
    known = {} if source in ("open_clip", "transformers") else {"activation": "quick_gelu", "head_width": 16}
    checkpoint = load_checkpoint(tiny.save(tmp_path / "source", source, config), **known)
    written = export_model(checkpoint, tmp_path / "out", layout, origin="From the attic.")
    exported = load_checkpoint(tmp_path / "out")
    assert sorted(written) == sorted((tmp_path / "out").iterdir())
    assert (exported.config, exported.layout) == (config, layout)
    assert fingerprints(exported) == fingerprints(checkpoint)
    assert exported.logit_scale == checkpoint.logit_scale
    assert checkpoint.vocabulary and exported.vocabulary
    assert Tokenizer.from_file(exported.vocabulary, 814)(ODD) == Tokenizer.from_file(checkpoint.vocabulary, 814)(ODD)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"({source if source in ('open_clip', 'transformers') else 'file'}). From the attic.\n" in card
    assert ("hf_tokenizer_name" in card) == (layout == "open_clip")


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_halves_stay_halves(layout: Any, tmp_path: Path) -> None:
    source = load_checkpoint(save(tmp_path / "m", precision="fp16"))
    export_model(source, tmp_path / "out", layout)
    exported = load_checkpoint(tmp_path / "out")
    assert {name: exported.arrays.dtype(name) for name in exported.arrays} == {
        name: source.arrays.dtype(name) for name in source.arrays
    }


def test_licence_and_record_are_carried_along(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", training={"epochs": 3})
    (folder / "LICENSE").write_text("for trying out")
    (folder / "log.csv").write_text("")
    export_model(load_checkpoint(folder), tmp_path / "out", "open_clip")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(["LICENSE", "training.json", *FILES])
    assert (tmp_path / "out" / "training.json").read_bytes() == (folder / "training.json").read_bytes()


@pytest.mark.parametrize("name", ["LICENSE", "README.md"])
def test_what_is_carried_along_must_be_readable(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/proc/self/mem")  # which gives an error instead of bytes
    with pytest.raises(ModelError, match=f"{name}: input/output error"):
        export_model(load_checkpoint(folder), tmp_path / "out", "open_clip")
    assert not (tmp_path / "out").exists()


def test_names_that_are_no_utf_8_can_be_kept(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", training={"templates": os.fsdecode(b"caf\xe9.txt")})
    assert json.loads((folder / "training.json").read_bytes()) == {"templates": "caf\udce9.txt"}


def test_the_card_is_carried_along_and_grows_no_tail(tmp_path: Path) -> None:
    save_model(
        tmp_path / "m", tiny.vit(), tiny.weights(tiny.vit()), merges=MERGES, card="---\nlicense: mit\n---\n# owls\n"
    )
    export_model(load_checkpoint(tmp_path / "m"), tmp_path / "a", "transformers")
    export_model(load_checkpoint(tmp_path / "a"), tmp_path / "b", "open_clip")
    card = (tmp_path / "b" / "README.md").read_text("utf-8")
    assert card.startswith("---\nlicense: mit\n---\n# owls\n\n## This copy\n")
    assert (card.count("## This copy"), card.count("from_pretrained")) == (1, 0)


def test_what_a_layout_cannot_say_is_refused(tmp_path: Path) -> None:
    resnet = load_checkpoint(save(tmp_path / "resnet", tiny.resnet()))
    padded = load_checkpoint(save(tmp_path / "padded", tiny.vit(preprocess=Preprocess(resize_mode="longest"))))
    for checkpoint, what in ((resnet, "has no CLIP with a ResNet"), (padded, "padded to a square")):
        with pytest.raises(UsageError, match=what):
            export_model(checkpoint, tmp_path / "out", "transformers")
        export_model(checkpoint, tmp_path / f"{checkpoint.name}-copy", "open_clip")
        assert load_checkpoint(tmp_path / f"{checkpoint.name}-copy").config == checkpoint.config
    with pytest.raises(VocabularyError, match="no vocabulary"):
        export_model(replace(resnet, vocabulary=None), tmp_path / "out", "open_clip")
    assert not (tmp_path / "out").exists()


def test_two_models_are_not_mixed(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save(tmp_path / "m"))
    before = fingerprints(checkpoint)
    with pytest.raises(UsageError, match="is the model itself"):
        export_model(checkpoint, tmp_path / "m", "transformers", force=True)
    export_model(checkpoint, tmp_path / "hf", "transformers")
    with pytest.raises(UsageError, match=r"holds another model \(config\.json\)"):
        export_model(checkpoint, tmp_path / "hf", "open_clip", force=True)
    export_model(load_checkpoint(save(tmp_path / "n", seed=1)), tmp_path / "hf", "transformers", force=True)
    assert fingerprints(load_checkpoint(tmp_path / "hf")) != before == fingerprints(load_checkpoint(tmp_path / "m"))


@pytest.mark.parametrize("name", ["vit", "vit-quick", "vit-odd"])
def test_transformers_computes_the_same(name: str, tmp_path: Path, photos: Path) -> None:
    import torch
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    from clipcli.images.stream import make_prepare

    ours = load_model(save(tmp_path / "m", CONFIGS[name], seed=3))
    export_model(ours.checkpoint, tmp_path / "hf", "transformers")
    processor = CLIPProcessor.from_pretrained(tmp_path / "hf")
    model, told = CLIPModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(told.values())  # nothing missing, nothing left over
    assert model.dtype == torch.float32
    pictures = [photos / "astronaut.png", photos / "chelsea.png", photos / "coffee.png"]
    texts = ["a photo of a tabby cat.", "It's 3 ROCKETS!", "naïve 猫"]
    inputs = processor(text=texts, images=[Image.open(path) for path in pictures], padding=True, return_tensors="pt")
    with torch.inference_mode():
        theirs = model(**inputs).logits_per_image.numpy()
    prepare = make_prepare(ours.config.preprocess, ours.config.vision.image_size, "reference")
    pixels = np.stack([prepare(Source(str(path))).square for path in pictures])
    image = ours.encode_image(pixels)
    text = np.zeros_like(image)
    for indices, vectors in ours.encode_text(ours.tokenizer(texts)):
        text[indices] = vectors
    cosines = theirs / ours.checkpoint.logit_scale
    assert np.abs(image @ text.T - cosines).max() < 1e-6 < np.ptp(cosines)


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_transformers_reads_the_vocabulary_of_both_layouts(layout: Any, tmp_path: Path) -> None:
    """That of the open_clip layout is what `hf_tokenizer_name` names."""
    from transformers import AutoTokenizer

    checkpoint = load_checkpoint(save(tmp_path / "m"))
    export_model(checkpoint, tmp_path / "out", layout)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), load_model(tmp_path / "m").tokenizer
    common = [text for text in ODD if "ſ" not in text]
    assert theirs(common)["input_ids"] == ours(common)
    assert theirs(["cat", "a photo"], padding="max_length")["input_ids"][0][-70:] == [ours.end_token] * 70
    assert theirs.decode(ours(["a tabby cat"])[0], skip_special_tokens=True).strip() == "a tabby cat"
