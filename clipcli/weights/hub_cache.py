"""What huggingface_hub keeps on this disk, read by the documented layout of its cache: no import of it, no network.

    models--ORG--NAME/refs/REVISION         a commit
                      snapshots/COMMIT/     the files; each appears there only when it is complete
                      .no_exist/COMMIT/     empty files: what the commit is known not to hold

In: which repository. Out: the folder of a snapshot, and whether a model in it is all there.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from clipcli.errors import ModelError
from clipcli.tokenizer import find_vocabulary
from clipcli.weights import open_clip, transformers
from clipcli.weights.transformers import PREPROCESSING

VOCABULARY = "merges.txt"
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Wanted:
    """A revision of a repository, and what messages call the model in it."""

    name: str
    repo: str
    revision: str = "main"


def hub_cache() -> Path:
    """The folder of models: `HF_HUB_CACHE`, `HF_HOME`/hub, or huggingface_hub's default."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(user, "huggingface")
    chosen = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(chosen)))


def storage(repo: str) -> Path:
    """The folder of a repository in the cache."""
    return hub_cache() / f"models--{repo.replace('/', '--')}"


def snapshot(wanted: Wanted) -> Path | None:
    """The folder of a revision's files, as far as they are here."""
    home, commit = storage(wanted.repo), wanted.revision
    if not _COMMIT.fullmatch(commit):
        ref = home / "refs" / commit
        if not ref.is_file():
            return None
        commit = ref.read_text(encoding="utf-8").strip()
    folder = home / "snapshots" / commit
    return folder if _COMMIT.fullmatch(commit) and folder.is_dir() else None


def is_complete(folder: Path) -> bool:
    """Whether a snapshot holds all that a model needs but its vocabulary."""
    if _has_weights(folder, open_clip.CONFIG, open_clip.WEIGHTS):
        return True
    told = any((folder / name).is_file() for name in PREPROCESSING) or is_absent(folder, PREPROCESSING[0])
    return told and _has_weights(folder, transformers.CONFIG, transformers.WEIGHTS)


def has_vocabulary(folder: Path) -> bool:
    """Whether the vocabulary is in a snapshot, or is known to be nowhere in the repository."""
    return find_vocabulary(folder) is not None or is_absent(folder, VOCABULARY)


def _has_weights(folder: Path, config: str, names: tuple[str, ...]) -> bool:
    """Whether a configuration and one set of weights are there, of a sharded one all parts."""
    return (folder / config).is_file() and any(_is_whole(folder / name) for name in names)


def _is_whole(weights: Path) -> bool:
    if weights.suffix != ".json":
        return weights.is_file()
    try:
        return weights.is_file() and all(shard.is_file() for shard in transformers.shards(weights))
    except ModelError:
        return False


def is_absent(folder: Path, name: str) -> bool:
    """Whether the commit of a snapshot is known not to hold a file."""
    return _absent(folder, name).is_file()


def mark_absent(folder: Path, name: str) -> None:
    """Remember that the commit doesn't hold a file, so that nobody asks for it again."""
    mark = _absent(folder, name)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _absent(folder: Path, name: str) -> Path:
    return folder.parent.parent / ".no_exist" / folder.name / name
