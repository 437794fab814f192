"""Where things lie: the cache, the user's settings, the shipped model and prompt sets.

The only module that reads `CLIPCLI_*` folders from the environment. It names places and creates none.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

APP = "clipcli"


def cache_dir() -> Path:
    """The folder of our store: `CLIPCLI_CACHE_DIR`, else the platform's cache folder."""
    chosen = os.environ.get("CLIPCLI_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path(APP)


def config_dir() -> Path:
    """The folder of the user's own settings and prompt sets: `CLIPCLI_CONFIG_DIR`, else the platform's."""
    chosen = os.environ.get("CLIPCLI_CONFIG_DIR")
    return Path(chosen).expanduser() if chosen else platformdirs.user_config_path(APP)


def store_file() -> Path:
    """The one SQLite file that keeps results between runs."""
    return cache_dir() / "store.sqlite"


def tiny_dir() -> Path:
    """The folder of the model that is part of this package."""
    return Path(__file__).resolve().parent / "tiny"


def prompt_dirs() -> list[Path]:
    """Folders that hold template sets, the user's own first.

    A wheel carries the shipped sets inside the package; an editable install has them beside it.
    """
    here = Path(__file__).resolve().parent
    return [path for path in (config_dir() / "prompts", here / "prompts", here.parent / "prompts") if path.is_dir()]
