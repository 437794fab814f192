"""Downloads from the Hub: the one file that knows huggingface_hub, which does network, tokens, mirrors and cache.

In: which repository and revision. Out: the folder of its snapshot, with a configuration, ONE set of weights and a
vocabulary in it; or a ModelError of one line that says what to do next. Weights come last, and go on where a cut
download stopped: huggingface_hub does so within a run only, so the file that is being made is kept here, and
handed over to its cache once it is whole. What is there already is `fetch.py`'s matter.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import FileMetadataError
from huggingface_hub.file_download import are_symlinks_supported, http_get
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    WeakFileLock,
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
)

from clipcli.errors import ModelError
from clipcli.weights import open_clip, transformers
from clipcli.weights.catalog import Entry, size_text
from clipcli.weights.hub_cache import VOCABULARY, Wanted, hub_cache, mark_absent, storage
from clipcli.weights.hub_errors import NETWORK, explain, is_cut, no_room
from clipcli.weights.transformers import PREPROCESSING

log = logging.getLogger("clipcli")

_VOCABULARIES = (("vocab.json", VOCABULARY), (VOCABULARY,), ("tokenizer.json",), ("bpe_simple_vocab_16e6.txt.gz",))


def download(
    wanted: Wanted, folder: Path | None, entry: Entry | None, *, vocabulary: bool, progress: bool
) -> tuple[Path, str | None]:
    """Get what is missing of a model, and say before what it is: its folder, and the licence that was named.

    `folder`: where it lies, if all but perhaps the vocabulary is there: another tool may have got that. Raises
    ModelError.
    """
    with _conversation(wanted, progress):
        return _Download(wanted).run(folder, entry, vocabulary)


def download_file(wanted: Wanted, name: str) -> Path:
    """Get one small file of a repository. Raises ModelError."""
    with _conversation(wanted, progress=False):
        return _Download(wanted).get(name, wanted.revision)


class _Download:
    """One model on its way into the cache."""

    def __init__(self, wanted: Wanted) -> None:
        from clipcli import __version__

        self.wanted = wanted
        self.cache = hub_cache()
        self.us: dict[str, Any] = {"library_name": "clipcli", "library_version": __version__}
        endpoint = (os.environ.get("HF_ENDPOINT") or hub_constants.ENDPOINT).rstrip("/")
        self.api = HfApi(endpoint=endpoint, **self.us)

    def run(self, folder: Path | None, entry: Entry | None, vocabulary: bool) -> tuple[Path, str | None]:
        info = self.api.model_info(
            self.wanted.repo,
            revision=folder.name if folder else self.wanted.revision,
            files_metadata=True,
            timeout=hub_constants.HF_HUB_ETAG_TIMEOUT,
        )
        sizes = {file.rfilename: file.size for file in info.siblings or []}
        weights: list[str] = []
        if folder is None:
            folder, weights = self._model(sizes)
        words: tuple[str, ...] = ()
        if vocabulary:
            words = next((names for names in _VOCABULARIES if sizes.keys() >= {*names}), ())
            if not words:
                mark_absent(folder, VOCABULARY)
        missing = [name for name in (*words, *weights) if not (folder / name).is_file()]
        licence = entry.licence if entry else _licence(info.card_data)
        if missing:
            size = sum(sizes.get(name) or 0 for name in missing) or (entry and entry.download) or 0
            _announce(self.wanted, size, self.cache, licence)
            self._check_room(size)
        for name in missing:
            get = self.get if name in words else self._get_large
            get(name, folder.name)
        return folder, licence

    def _model(self, names: Collection[str]) -> tuple[Path, list[str]]:
        """The folder, with the configuration in it, and the names of the weights that belong there."""
        reader, weights = _choose(self.wanted, names)
        folder = self.get(reader.CONFIG, self.wanted.revision).parent
        if reader is transformers:
            told = next((name for name in PREPROCESSING if name in names), None)
            if told:
                self.get(told, folder.name)
            else:
                mark_absent(folder, PREPROCESSING[0])
        reader.read_config(folder)  # what can't be run isn't downloaded
        if not weights.endswith(".json"):
            return folder, [weights]
        return folder, [shard.name for shard in transformers.shards(self.get(weights, folder.name))]

    def get(self, name: str, revision: str) -> Path:
        """One file, as huggingface_hub gets it."""
        repo, wait = self.wanted.repo, hub_constants.HF_HUB_ETAG_TIMEOUT
        return Path(self.api.hf_hub_download(repo, name, revision=revision, cache_dir=self.cache, etag_timeout=wait))

    def _get_large(self, name: str, commit: str) -> Path:
        """One file that may take several runs, checked against its hash before it is shown to anybody."""
        if not are_symlinks_supported(self.cache):  # there a file handed over would lie on the disk twice
            return self.get(name, commit)
        url = hf_hub_url(self.wanted.repo, name, revision=commit, endpoint=self.api.endpoint)
        headers = build_hf_headers(**self.us)
        known = get_hf_file_metadata(url, timeout=hub_constants.HF_HUB_ETAG_TIMEOUT, headers=headers)
        etag = known.etag or ""
        if not re.fullmatch(r"[\w-]+", etag):  # it becomes the name of a file
            raise FileMetadataError(f"{name} has no usable ETag")
        blobs = storage(self.wanted.repo) / "blobs"
        lock = self.cache / ".locks" / blobs.parent.name / f"{etag}.lock"
        for folder in (blobs, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        part = blobs / f"{etag}.incomplete"
        with WeakFileLock(lock):
            if not (blobs / etag).exists():
                try:
                    self._go_on(url, part, headers, known.size, name)
                except (NETWORK, OSError) as error:
                    if is_cut(error) and part.exists() and part.stat().st_size:
                        raise self._cut(part, known.size) from error
                    raise
                self._check(part, etag)
                part.replace(blobs / etag)
        return self.get(name, commit)  # finds the blob, and links it into the snapshot

    def _go_on(self, url: str, part: Path, headers: dict[str, str], size: int | None, name: str) -> None:
        """The rest of a file; all of it if what is there can't be its beginning."""
        if part.exists() and size is not None and part.stat().st_size > size:
            part.unlink()
        with part.open("ab") as file:
            done = file.seek(0, os.SEEK_END)
            http_get(url, file, resume_size=done, headers=headers, expected_size=size, displayed_filename=name)

    def _cut(self, part: Path, size: int | None) -> ModelError:
        got = size_text(part.stat().st_size) + (f" of {size_text(size)}" if size else "")
        return ModelError(
            f"{self.wanted.name}: the connection was cut after {got}", hint="run it again: it goes on where it stopped"
        )

    def _check(self, part: Path, etag: str) -> None:
        if not re.fullmatch("[0-9a-f]{64}", etag):  # no SHA-256: a small file in git, or a mirror's own idea
            return
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != etag:
            part.unlink()
            raise ModelError(
                f"{self.wanted.name}: what came is not what the Hub has (another SHA-256)",
                hint="run it again: it begins anew",
            )

    def _check_room(self, size: int) -> None:
        place = next(path for path in (self.cache, *self.cache.parents) if path.exists())
        begun = sum(part.stat().st_size for part in (storage(self.wanted.repo) / "blobs").glob("*.incomplete"))
        free = shutil.disk_usage(place).free
        if free < size - begun:
            raise no_room(self.wanted, f"{size_text(size)} are needed, {size_text(free)} are free")


def _choose(wanted: Wanted, names: Collection[str]) -> tuple[ModuleType, str]:
    """The layout and the weights to take: open_clip's first, then safetensors before pickles."""
    for reader in (open_clip, transformers):
        if reader.CONFIG in names:
            for weights in reader.WEIGHTS:
                if weights in names:
                    return reader, weights
    held = ", ".join(sorted(names)[:8]) + (", …" if len(names) > 8 else "")
    raise ModelError(
        f"{wanted.repo}: no CLIP weights in a layout that clipcli reads; it holds {held or 'nothing'}",
        hint="a CLIP has open_clip_config.json or config.json, and weights beside it; see clipcli models list",
    )


def _licence(card: Any) -> str | None:
    """What a repository's card says, if anything."""
    values: Mapping[str, Any] = card.to_dict() if card is not None else {}
    licence = values.get("license")
    if licence == "other":
        licence = values.get("license_name") or licence
    return ", ".join(licence) if isinstance(licence, list) else licence and str(licence)


def _announce(wanted: Wanted, size: int, cache: Path, licence: str | None) -> None:
    source = "" if wanted.name.startswith(wanted.repo) else f" ({wanted.repo})"
    amount = size_text(size) if size else "of unknown size"
    log.warning("downloading %s%s: %s, to %s; licence: %s", wanted.name, source, amount, cache, licence or "not stated")


@contextmanager
def _conversation(wanted: Wanted, progress: bool) -> Iterator[None]:
    """While it lasts, huggingface_hub's warnings are notices of ours, and what it raises becomes a ModelError."""
    theirs = logging.getLogger("huggingface_hub")
    handlers, propagate = theirs.handlers, theirs.propagate
    shown = hub_constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    theirs.handlers, theirs.propagate = [_Relay(logging.WARNING)], False
    if shown and not progress:
        disable_progress_bars()
    try:
        yield
    except (NETWORK, OSError, JSONDecodeError) as error:
        raise explain(error, wanted) from error
    finally:
        theirs.handlers, theirs.propagate = handlers, propagate
        if shown:
            enable_progress_bars()


class _Relay(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        message = re.sub(r"https?://\S+", "…", record.getMessage())  # of a storage, and long
        log.warning("%s", " ".join(message.split())[:200])
