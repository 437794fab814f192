"""The text tower before the first step, and what torch.compile changes: nothing but the speed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import squares
import torch
from torch import Tensor
from torch.nn import functional as F

from clipcli.errors import ClipcliError
from clipcli.model.text import pad
from clipcli.train.loop import Trainer
from clipcli.train.warm import warm_text

CAPTIONS = [f"a {kind} of a {colour}." for colour in squares.COLOURS for kind in ("photo", "picture", "drawing")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return squares.make(tmp_path_factory.mktemp("squares") / "data", each=6)


def warmed(data: Path, **settings: object) -> tuple[Trainer, list[float]]:
    trainer = squares.trainer(data, **{**squares.VIT, "text_warmup": 60, **settings})
    return trainer, warm_text(trainer.clip, trainer.tokenizer, trainer.words, trainer.feed, trainer.config)


def cosines(trainer: Trainer) -> Tensor:
    with torch.inference_mode():
        text = F.normalize(trainer.clip.encode_text(pad(trainer.tokenizer(CAPTIONS))), dim=1)
    return text @ text.T


def test_captions_of_one_class_come_together_and_others_apart(data: Path) -> None:
    before = cosines(squares.trainer(data, **squares.VIT))
    trainer, losses = warmed(data)
    after = cosines(trainer)
    same = torch.block_diag(*[torch.ones(3, 3)] * 3).bool()
    assert before[~same].min() > 0.4, "at first all lie close together"
    assert after[same].min() > after[~same].max() + 0.5
    assert len(losses) == 60 and losses[-1] < losses[0] - 0.5


def test_nothing_else_has_learned(data: Path) -> None:
    first = squares.trainer(data, **squares.VIT).clip.state_dict()
    trainer, _ = warmed(data, text_warmup=2)
    changed = {name for name, tensor in trainer.clip.state_dict().items() if not torch.equal(tensor, first[name])}
    assert changed and not [name for name in changed if name.startswith("visual.") or name == "logit_scale"]


def test_the_seed_alone_decides(data: Path) -> None:
    assert warmed(data, text_warmup=3)[1] == warmed(data, text_warmup=3)[1]
    assert warmed(data, text_warmup=3)[1] != warmed(data, text_warmup=3, seed=1)[1]


def test_a_frozen_text_tower_stays(data: Path) -> None:
    trainer, losses = warmed(data, freeze="text")
    assert losses == []
    wanted = squares.trainer(data, **squares.VIT).clip.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in trainer.clip.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.timeout(300)
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_is_the_same(data: Path) -> None:
    plain, compiled = (squares.trainer(data, **squares.VIT, compile=c) for c in (False, True))
    batch = plain.batch(next(plain.feed.epoch(0)), 0)
    losses = [trainer.gradients(batch) for trainer in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    wanted, found = (
        {name: p.grad for name, p in t.clip.named_parameters() if p.grad is not None} for t in (plain, compiled)
    )
    squares.assert_equal(found, wanted)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_without_a_compiler(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, str(tmp_path / "none")))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    trainer = squares.trainer(data, **squares.VIT, compile=True)
    with pytest.raises(ClipcliError) as caught:
        trainer.step(next(trainer.feed.epoch(0)))
    assert "torch.compile" in caught.value.message and "\n" not in caught.value.message
    assert "compile=false" in (caught.value.hint or "")
