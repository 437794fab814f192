"""Defaults that are written down once: `./clipcli.toml`, and `config.toml` in the user's own folder.

Comes in: a TOML file whose top-level keys are options for every command that has them, and whose tables are commands.
Goes out: its table, and the place of each key for messages. It doesn't know which options exist (`cli/defaults.py`
does), and costs nothing where no file is. A file is somebody else's text: what writes or deletes is refused in it.

    model = "ViT-B-32"          # option > CLIPCLI_* > ./clipcli.toml > config.toml > built-in
    [classify]
    templates = ["imagenet7", "my-templates.txt"]
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcli.errors import UsageError, reason
from clipcli.paths import config_dir

LOCAL = Path("clipcli.toml")
MOST_BYTES = 1 << 20

# The folder of a download may carry a clipcli.toml: whoever works there must not lose a file by it.
TYPED_ONLY = frozenset(
    {
        "output",
        "save_crop",
        "force",
        "resume",
        "retry_failed",
        "tensorboard",
        "write_templates",
        "write_labels",
        "csv",
        "html",
        "yes",
    }
)
# Options that may name a path: `~/` is the home folder, and what lies beside config.toml is taken from there.
PATHS = frozenset(
    {"model", "labels", "prompts", "templates", "classifier", "background", "vocabulary", "files_from", "extend"}
)

_HEADER = re.compile(r"\s*\[([^\[\]]+)\]\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*([\w-]+|"[^"]*"|'[^']*')\s*[=.]""")


@dataclass(frozen=True)
class SettingsFile:
    """A settings file, read."""

    path: Path
    text: str
    table: dict[str, Any]

    def where(self, *keys: str) -> str:
        """`clipcli.toml:3`: the line of the last key, in the table of those before it; the file if it isn't found."""
        *table, key = keys
        current: list[str] = []
        for number, line in enumerate(self.text.split("\n"), 1):
            if header := _HEADER.match(line):
                current = [part.strip().strip("\"'") for part in header[1].split(".")]
                if current[: len(keys)] == list(keys):
                    return f"{self.path}:{number}"
            elif current == table and (found := _KEY.match(line)) and found[1].strip("\"'") == key:
                return f"{self.path}:{number}"
        return str(self.path)

    def at_home(self, name: str, value: Any) -> Any:
        """`value` of the option `name`, as it is meant from the folder of this file."""
        if name not in PATHS:
            return value
        if isinstance(value, list):
            return [self.at_home(name, item) for item in value]
        if not isinstance(value, str):
            return value
        if value.startswith("~/"):
            return str(Path(value).expanduser())
        file = re.sub(r"(\.json)#.*$", r"\1", value)  # FILE.json#KEY
        is_beside = file and self.path != LOCAL and os.path.exists(self.path.parent / file)
        return str(self.path.parent / value) if is_beside else value


def places() -> list[Path]:
    """Where settings files may lie, the one that counts less first."""
    return [config_dir() / "config.toml", LOCAL]


def read(path: Path) -> SettingsFile | None:
    """The settings in `path`; None where there is no such file. Raises UsageError with file:line."""
    if not path.is_file():
        return None
    import tomllib

    try:
        with path.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise UsageError(f"{path}: too large for a settings file", hint="remove it, or start elsewhere")
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
        return SettingsFile(path, text, tomllib.loads(text))
    except OSError as error:
        raise UsageError(f"{path}: {reason(error)}", hint="check its permissions") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}:{line}: not UTF-8", hint="save the file as UTF-8") from error
    except RecursionError as error:
        raise UsageError(f"{path}: bad TOML: nested too deep", hint="remove the nested brackets") from error
    except tomllib.TOMLDecodeError as error:
        raise _bad_toml(path, text, str(error)) from error


def _bad_toml(path: Path, text: str, message: str) -> UsageError:
    """The parser's sentence in our form; it tells the place as "(at line 3, column 7)" or "(at end of document)"."""
    what, _, place = message.rstrip(")").partition(" (at ")
    found = re.match(r"line (\d+), column (\d+)", place)
    line, hint = (int(found[1]), f"see column {found[2]}") if found else (text.rstrip("\n").count("\n") + 1, None)
    return UsageError(f"{path}:{line}: bad TOML: {what[:1].lower()}{what[1:]}", hint=hint or "the file ends too early")
