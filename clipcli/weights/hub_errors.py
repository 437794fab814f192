"""What can go wrong with the Hub, each as one line and what to do next: huggingface_hub's exceptions become ours."""

from __future__ import annotations

import errno
import os
import re
from json import JSONDecodeError
from typing import Any

from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from clipcli.errors import ModelError
from clipcli.weights import catalog
from clipcli.weights.hub_cache import Wanted, hub_cache

NETWORK: Any = HfHubHTTPError.__bases__[0]  # of the HTTP library, which changed with huggingface_hub's versions
_INSTEAD = "or use a model on this disk: -m PATH, or -m tiny"


def explain(error: BaseException, wanted: Wanted) -> ModelError:
    """One line for what went wrong, and a hint for what to do."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # "not here either" says less than why
    name = wanted.name
    if isinstance(error, OfflineModeIsEnabled):
        return ModelError(f"{name} is not in the cache, and HF_HUB_OFFLINE is set", hint="unset it to download")
    if isinstance(error, GatedRepoError):
        return ModelError(
            f"{name} is gated: its owner asks who wants it",
            hint="accept the terms on its page, then `hf auth login`, or set HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelError(
            f'{wanted.repo} has no revision "{wanted.revision}"',
            hint="give a branch, a tag or a commit, or leave out @…",
        )
    if isinstance(error, RepositoryNotFoundError):
        what = "no such model on the Hub" if catalog.find_repo(wanted.repo) else "neither a path here nor on the Hub"
        near = " or ".join(catalog.near(name))
        hint = (f"did you mean {near}? " if near else "") + "if it is private: `hf auth login`, or set HF_TOKEN"
        return ModelError(f"{name}: {what}", hint=hint)
    if isinstance(error, FileMetadataError | JSONDecodeError):
        return ModelError(f"{name}: the server answers, but not as a Hub does", hint="check HF_ENDPOINT, and the proxy")
    response = getattr(error, "response", None)
    if response is not None:
        return _explain_status(response, wanted)
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return no_room(wanted, "it is full")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ModelError(
            f"{name}: no permission to write to {hub_cache()}", hint="choose another folder with HF_HUB_CACHE"
        )
    if isinstance(error, OSError) and number is not None and not isinstance(error, ConnectionError):
        return ModelError(f"{name}: {error.filename}: {os.strerror(number).lower()}", hint=f"look at {hub_cache()}")
    told = re.sub(r"\[Errno -?\d+\] ", "", " ".join(str(error).split())) or type(error).__name__
    return ModelError(
        f"{name}: the Hub can't be reached ({told[:1].lower()}{told[1:160].rstrip('.')})",
        hint=f"check the connection and try again, {_INSTEAD}",
    )


def _explain_status(response: Any, wanted: Wanted) -> ModelError:
    status, wait = response.status_code, response.headers.get("Retry-After", "")
    what = f"the Hub answers {status}"
    hint = "run it again (it may have just changed), and check HF_ENDPOINT if that is set"
    if status == 401:
        what, hint = "the Hub refuses the token (401)", "it is wrong or expired: `hf auth login`, or set HF_TOKEN"
    elif status == 403:
        what, hint = "the Hub gives no access (403)", "see its page; a token of yours may lack the right to read it"
    elif status == 429:
        what = "too many requests for the Hub (429)"
        hint = f"wait {f'{wait} s' if wait.isdigit() else 'some minutes'}; with a token (HF_TOKEN) more are allowed"
    elif status >= 500:
        what, hint = f"the Hub is in trouble ({status})", f"try again in some minutes, {_INSTEAD}"
    return ModelError(f"{wanted.name}: {what}", hint=hint)


def no_room(wanted: Wanted, why: str) -> ModelError:
    """The error of a disk that is full, or too full."""
    return ModelError(
        f"{wanted.name}: no room for it in {hub_cache()}: {why}",
        hint="make room (`hf cache ls` shows what is there), or choose another folder with HF_HUB_CACHE",
    )


def is_cut(error: BaseException) -> bool:
    """Whether the network ended a download, not the disk or a refusal: then there is a beginning to go on from."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return not isinstance(error, OSError) or error.errno is None
