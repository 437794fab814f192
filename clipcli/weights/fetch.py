"""From what `-m` was given to a place on this disk: a path, a short name, or the id of a model on the Hub.

In: a name. Out: a `Located`. A path that exists comes before a name; where a folder hides `tiny`, which lies in this
package, `clipcli/tiny` names it too. What lies in the Hub's cache is used as it is, without any look at the network;
what doesn't, `hub.py` downloads. The weights are not opened here.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clipcli.errors import ModelError
from clipcli.model.config import ClipConfig
from clipcli.paths import cache_dir, tiny_dir
from clipcli.tokenizer import STANDARD_SIZE, find_vocabulary
from clipcli.weights import catalog, open_clip, transformers
from clipcli.weights.catalog import VOCABULARY_REPO, Entry
from clipcli.weights.hub_cache import VOCABULARY, Wanted, has_vocabulary, is_complete, snapshot

log = logging.getLogger("clipcli")

_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_][\w.-]*/\w(?:[\w.-]*\w)?", re.ASCII)
_REVISION = re.compile(r"(?!.*(?:\.\.|//))\w(?:[\w./+-]*\w)?", re.ASCII)
_RESTRICTED = re.compile(r"(^|[^a-z])nc([^a-z]|$)|non-?commercial|research|apple", re.IGNORECASE)
_PATH_LIKE = re.compile(r"[./~\\].*|.*[\\].*|.*/.*/.*|.*/|.*\.(?:pt|pth|bin|safetensors)", re.DOTALL)


@dataclass(frozen=True)
class Located:
    """A checkpoint on this disk, and what is known about it besides."""

    name: str
    path: Path
    entry: Entry | None = None  # of the catalogue
    vocabulary: Path | None = None  # where it doesn't lie beside the weights


def resolve(
    spec: str | Path, *, offline: bool = False, vocabulary: Path | None = None, progress: bool = False
) -> Located:
    """Find a model, or download it.

    `spec`: a folder or file that exists, a short name, `org/name` or `org/name@revision`. `vocabulary`: one that is
    used in place of the model's own. A `Path` is never a name. `progress` shows bars on a terminal. Raises ModelError.
    """
    path = Path(spec).expanduser()
    if isinstance(spec, Path) or exists(spec):
        real = path.resolve()
        own = catalog.TINY if real == tiny_dir() else None
        if isinstance(spec, str) and own is None and (hidden := catalog.find(spec)):
            log.warning("%s is taken as the path that it is here; the model of that name is %s", spec, hidden.repo)
        return Located(real.stem if real.is_file() else real.name, path, own, vocabulary)
    wanted = parse(spec)
    entry, folder = catalog.find_repo(wanted.repo), here(wanted)
    if entry is not None and entry.shipped:
        if folder is None:
            raise ModelError(
                f"{wanted.name} is not in this installation, though it is a part of clipcli",
                hint="install clipcli again: pip install --force-reinstall --no-deps clipcli",
            )
        return Located(entry.name, folder, entry, vocabulary)
    offline = offline or is_offline()
    licence = entry.licence if entry else None
    if folder is None or not (vocabulary or offline or has_vocabulary(folder)):
        if offline:
            there = "not complete" if snapshot(wanted) else "not there"
            raise ModelError(
                f"{wanted.name} is {there} in the cache, and this run is offline",
                hint=f"get it once with the network: clipcli models pull {spec}",
            )
        from clipcli.weights import hub

        folder, licence = hub.download(wanted, folder, entry, vocabulary=vocabulary is None, progress=progress)
    if vocabulary is None and find_vocabulary(folder) is None:
        vocabulary = _common_vocabulary(folder, offline)
    if licence and _RESTRICTED.search(licence):
        _tell_licence(wanted, licence)
    return Located(wanted.name, folder, entry, vocabulary)


def exists(spec: str) -> bool:
    """Whether `spec` is the path of something on this disk."""
    return os.path.lexists(Path(spec).expanduser())


def parse(spec: str) -> Wanted:
    """What is meant by the name of a model that is no path here. Raises ModelError where nothing can be."""
    base, _, revision = spec.rpartition("@")
    if catalog.find(spec) or not base:  # an alias may have an @ in it
        base, revision = spec, "main"
    entry = catalog.find(base)
    if not _REVISION.fullmatch(revision):
        raise ModelError(f'{spec}: "{revision}" can\'t be a revision', hint="a branch, a tag or a commit follows the @")
    pinned = "" if revision == "main" else f"@{revision}"
    if entry is not None and entry.shipped and pinned:
        raise ModelError(f"{spec}: {entry.name} comes with clipcli and has no revisions", hint=f"-m {entry.name}")
    if entry is not None:
        return Wanted(entry.name + pinned, entry.repo, revision)
    if _PATH_LIKE.fullmatch(spec):
        raise ModelError(
            f"{spec}: no such file or folder", hint="-m takes a path, a name of clipcli models list, or org/name"
        )
    if not _HUB_ID.fullmatch(base):
        near = " or ".join(catalog.near(base))
        hint = f"did you mean {near}?" if near else "clipcli models list shows the names; a path must exist"
        raise ModelError(f"{spec}: neither a path here nor the name of a model", hint=hint)
    return Wanted(base + pinned, base, revision)


def is_offline() -> bool:
    """Whether the environment forbids the network."""
    names = ("CLIPCLI_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def here(wanted: Wanted) -> Path | None:
    """The folder of a model by name, if all of it but perhaps the vocabulary is on this disk."""
    folder = tiny_dir() if wanted.repo == catalog.TINY.repo else snapshot(wanted)
    return folder if folder is not None and is_complete(folder) else None


def read_config(folder: Path) -> ClipConfig:
    """The configuration of a model in a folder. Raises ModelError, NotPlainClip."""
    is_open_clip = (folder / open_clip.CONFIG).is_file()
    return open_clip.read_config(folder) if is_open_clip else transformers.read_config(folder)


def _tell_licence(wanted: Wanted, licence: str) -> None:
    """Say once, the first time that a model is used, that its licence forbids some uses."""
    mark = cache_dir() / "licences" / wanted.repo.replace("/", "--")
    if mark.exists():
        return
    log.warning("%s may not be used for everything: its licence is %s; see its page", wanted.name, licence)
    with suppress(OSError):  # where nothing can be kept, it is told again
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _common_vocabulary(folder: Path, offline: bool) -> Path | None:
    """The vocabulary of OpenAI's models, for a repository without one whose text tower has its size."""
    if read_config(folder).text.vocab_size != STANDARD_SIZE:
        return None
    wanted = Wanted(VOCABULARY_REPO, VOCABULARY_REPO)
    there = snapshot(wanted)
    if there is not None and (there / VOCABULARY).is_file():
        return there / VOCABULARY
    if offline:
        return None  # only prompts need it, and say so
    from clipcli.weights import hub

    return hub.download_file(wanted, VOCABULARY)
