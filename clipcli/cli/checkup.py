"""What clipcli finds on this machine, and what of it is known to go wrong.

In: the root command and what was typed. Out: a `Checkup` of plain values. Versions come from the packages' metadata
and models' places from folders, so that nothing heavy is imported and nothing is fetched; only a question for devices
asks torch. The value of a token is never read into it. Prints nothing.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from clipcli import __version__, settings
from clipcli.cli import defaults
from clipcli.cli.defaults import Effective
from clipcli.cli.usage import propose
from clipcli.errors import ClipcliError, UsageError
from clipcli.output.text import counted, tilde
from clipcli.paths import store_file

LITTLE_DISK = 5 * 10**9  # bytes: the largest model of the catalogue, with room to work
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
FOLDERS = ("CLIPCLI_CACHE_DIR", "CLIPCLI_CONFIG_DIR", "HF_HOME", "HF_HUB_CACHE")
CONSEQUENCES = {  # of environment variables, by the beginning of their names
    "HF_HUB_OFFLINE": "models that are not on this disk can't be fetched",
    "HF_ENDPOINT": "models come from there",
    "OMP_NUM_THREADS": "it limits torch's threads",
    "MKL_NUM_THREADS": "it limits torch's threads",
    "CUDA_VISIBLE_DEVICES": "torch sees those devices alone",
    "TORCH_": "it changes how torch works",
    "PYTORCH_": "it changes how torch works",
}
DECODERS = {  # module, package, extra
    "HEIC": ("pillow_heif", "pillow-heif", "heic"),
    "JPEG XL": ("pillow_jxl", "pillow-jxl-plugin", "jxl"),
}
Level = Literal["problem", "warning", "note"]


class Finding(NamedTuple):
    """Something that a person should know. A problem is broken, a warning often goes wrong, a note may explain."""

    level: Level
    text: str


@dataclass(frozen=True)
class Checkup:
    """Everything that was found."""

    clipcli: str
    python: str
    platform: str
    cpus: dict[str, int]
    memory: int | None  # bytes
    packages: dict[str, str | None]  # None: not installed
    devices: dict[str, Any] | None  # None: not looked at
    caches: dict[str, dict[str, Any]]
    environment: dict[str, str]
    settings: list[Effective]
    findings: list[Finding]  # the gravest first

    @property
    def is_broken(self) -> bool:
        """Whether something can't work."""
        return any(finding.level == "problem" for finding in self.findings)


def examine(root: Any, typed: Mapping[str, Any], *, devices: bool) -> Checkup:
    """Look at this machine, as a run sees it in which `typed` were typed; at devices if they are asked for."""
    findings: list[Finding] = []
    given: dict[defaults.Address, dict[str, defaults.Given]] = {}
    try:
        given = defaults.read_defaults(root)
    except ClipcliError as error:
        findings.append(_problem(error))
    options = [_named(option) for option in defaults.effective(root, typed, given)]
    packages, caches = _packages(findings), _caches(findings)
    found = _devices(typed.get("device", "auto"), findings) if devices else None
    findings += [*_of_environment(defaults.variables(root)), *_of_torch(packages), *_of_model(options)]
    if settings.LOCAL.is_file():
        findings.append(
            Finding("note", f"{settings.LOCAL} in this folder sets defaults for every run that starts here")
        )
    return Checkup(
        clipcli=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        cpus=_cpus(),
        memory=_memory(),
        packages=packages,
        devices=found,
        caches=caches,
        environment=_environment(),
        settings=options,
        findings=sorted(findings, key=lambda finding: get_args(Level).index(finding.level)),
    )


def _named(option: Effective) -> Effective:
    """The option with the value that stands for none."""
    from clipcli.weights import catalog
    from clipcli.zeroshot import templates

    meant = {"model": catalog.DEFAULT, "templates": templates.DEFAULT}.get(option.name.rpartition(".")[2])
    return replace(option, value=meant) if option.value is None and meant else option


def _problem(error: ClipcliError) -> Finding:
    return Finding("problem", f"{error.message} ({error.hint})" if error.hint else error.message)


# ---- what is there


def _packages(findings: list[Finding]) -> dict[str, str | None]:
    """Every package that clipcli needs, and those that it may use; what is missing or too old is found."""
    required = "\n".join(metadata.requires("clipcli") or [])
    needed = dict(re.findall(r"(?m)^([\w.-]+)[^;\n]*?>=([\d.]+)[^;\n]*$", required))  # without the extras'
    versions: dict[str, str | None] = {}
    for name in [*needed, *(package for _, package, _ in DECODERS.values())]:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
            if name in needed:
                findings.append(Finding("problem", f"{name} is not installed: pip install {name}"))
    for name, least in needed.items():
        if _numbers(versions[name] or least) < _numbers(least):
            what = f"{name} {versions[name]} is too old, {least} is needed: pip install -U {name}"
            findings.append(Finding("warning", what))
    for kind, (module, package, extra) in DECODERS.items():
        if find_spec(module) is None:
            findings.append(Finding("note", f'{kind} pictures need {package}: pip install "clipcli[{extra}]"'))
    return versions


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3]]


def _cpus() -> dict[str, int]:
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return {"usable": usable, "all": os.cpu_count() or usable}


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not told by this system
        return None


def _caches(findings: list[Finding]) -> dict[str, dict[str, Any]]:
    """Our store and the models' folder: where, how large, how much room is left."""
    from clipcli.store.inspect import survey
    from clipcli.weights.catalog import size_text
    from clipcli.weights.hub_cache import hub_cache

    file, models = store_file(), hub_cache()
    store: dict[str, Any] = {"path": tilde(file), "size": None, "entries": None}
    try:
        found = survey(file)
        store |= {"size": found.size, "entries": found.entries}
        if damaged := [other for other in found.beside if other.kind == "damaged"]:
            what = f"{counted(len(damaged), 'damaged store')} set aside: see clipcli cache info"
            findings.append(Finding("note", what))
    except ClipcliError as error:
        findings.append(_problem(error))
    place = file if os.path.exists(file) else _nearest(file.parent)
    if not os.access(place, os.W_OK) or not (place.is_dir() or place == file):
        findings.append(Finding("problem", f"the store {tilde(file)} can't be written: set CLIPCLI_CACHE_DIR"))
    blobs = [blob.stat().st_size for blob in models.glob("models--*/blobs/*")]
    free = shutil.disk_usage(_nearest(models)).free
    if free < LITTLE_DISK:
        what = f"little room for models in {tilde(models)}: {size_text(free)}; HF_HOME moves them"
        findings.append(Finding("warning", what))
    number = sum(1 for _ in models.glob("models--*"))
    return {"store": store, "models": {"path": tilde(models), "size": sum(blobs), "repositories": number, "free": free}}


def _nearest(folder: Path) -> Path:
    """`folder`, or the nearest above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))


def _devices(asked: str, findings: list[Finding]) -> dict[str, Any]:
    """What torch finds, and what `auto`, or the device that was asked for, means."""
    from clipcli.model.device import place

    there = []
    for name in ["cpu", "mps"]:
        try:
            there.append(str(place(name)))
        except UsageError:
            continue
    for number in count():
        try:
            there.append(str(place(f"cuda:{number}")))
        except UsageError:
            break
    try:
        chosen = str(place(asked))
    except UsageError as error:
        findings.append(_problem(error))
        chosen = "not there"
    return {"found": there, "asked": asked, "chosen": chosen}


def _environment() -> dict[str, str]:
    """Variables that matter and are set; of secrets that they are."""
    names = sorted(name for name in os.environ if name.startswith((*CONSEQUENCES, *FOLDERS)))
    shown = {name: _address(os.environ[name]) if name == "HF_ENDPOINT" else os.environ[name] for name in names}
    return shown | {name: "set" for name in SECRETS if os.environ.get(name)}


def _address(url: str) -> str:
    """A URL without a name and password in it."""
    return re.sub(r"^(\w+://)?[^/]*@", r"\1", url.partition("?")[0])


# ---- what is known to go wrong


def _of_environment(known: set[str]) -> Iterator[Finding]:
    for name, value in _environment().items():
        for beginning, consequence in CONSEQUENCES.items():
            if name.startswith(beginning) and not (name == "HF_HUB_OFFLINE" and value.lower() in ("0", "no", "false")):
                level: Level = "warning" if name.startswith("HF_") else "note"
                yield Finding(level, f"{name}={value} is set: {consequence}")
    for name in sorted(name for name in os.environ if name.startswith("CLIPCLI_")):
        if name not in known and name not in FOLDERS:
            near = propose(name, [*known, *FOLDERS])
            yield Finding("warning", f"{name} is set, and nothing reads it{f': {near}' if near else ''}")


def _of_torch(versions: dict[str, str | None]) -> Iterator[Finding]:
    drivers = ("/dev/nvidiactl", "/dev/dxg")
    if "+cu" in (versions.get("torch") or "") and sys.platform == "linux" and not any(map(os.path.exists, drivers)):
        what = f"torch {versions['torch']} is made for CUDA, and no such device is here: the build for CPUs is smaller"
        yield Finding("warning", what)


def _of_model(options: Iterable[Effective]) -> Iterator[Finding]:
    """Whether the configured models can be read, as far as their folders tell."""
    from clipcli.tokenizer import find_vocabulary

    vocabulary = any(option.name.endswith("vocabulary") and option.value for option in options)
    for option in options:
        if option.name.rpartition(".")[2] == "model" and isinstance(option.value, str) and option.source != "built-in":
            path = Path(option.value)
            folder = path if path.is_dir() else path.parent
            if path.exists() and not vocabulary and find_vocabulary(folder) is None:
                what = f"no vocabulary beside the model {path}: put merges.txt there, or set vocabulary"
                yield Finding("warning", f"{what} ({tilde(option.source)})")
