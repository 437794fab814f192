"""What the benchmarks have in common about the others: open_clip's package, and what figures depend on.

Not to be run. Where torchvision isn't installed, open_clip is given `stand_in/torchvision`; transformers, which would
look closer at it, is left to find that there is none.
"""

from __future__ import annotations

import compileall
import importlib.metadata
import importlib.util
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

STAND_IN = Path(__file__).resolve().parent / "stand_in"


def open_clip() -> Any:
    """The package. Raises ImportError."""
    if importlib.util.find_spec("torchvision") is None:
        with suppress(ImportError):
            from transformers.utils import is_torchvision_available

            is_torchvision_available()  # it remembers the answer
        sys.path.append(str(STAND_IN))
    import open_clip as package

    return package


def lacks_torchvision(python: str = sys.executable) -> bool:
    """Whether an interpreter has none of its own."""
    look = "import importlib.metadata as m; m.version('torchvision')"
    return subprocess.run([python, "-c", look], capture_output=True, check=False).returncode != 0


def compile_clipcli() -> None:
    """Let modules of this checkout be found compiled, as the peers' are: where bytecode isn't written, none ever is."""
    import clipcli

    compileall.compile_dir(Path(clipcli.__file__).parent, quiet=1)


def machine() -> dict[str, str]:
    """What the figures depend on."""
    from clipcli.tasks import bench_report  # not at the top: some processes are measured by their memory

    found = bench_report.machine()
    try:
        found["torchvision"] = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        found["torchvision"] = "not there (open_clip was given a stand-in, which its models don't use)"
    return found
