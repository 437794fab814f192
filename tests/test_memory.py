"""Memory doesn't grow with the number of files (benchmarks/memory.py tries more of them)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="asks the system for a process's peak memory")
def test_peak_memory_at_ten_times_the_files(model: Path, tmp_path: Path) -> None:
    def peak(folder: Path) -> int:
        command = [sys.executable, "-m", "clipcli", "classify", folder, "-L", "a", "-L", "b", "-m", model, "-q"]
        command += ["-o", folder.with_suffix(".tsv"), "-j", "2", "-d", "cpu"]
        process = subprocess.Popen([*map(str, command)])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # else Popen would think that it still runs
        assert process.returncode == 0
        assert folder.with_suffix(".tsv").read_bytes().count(b"\n") == len(list(folder.iterdir()))
        return usage.ru_maxrss

    rng = np.random.default_rng(0)
    for count in (300, 3000):
        (tmp_path / str(count)).mkdir()
        for number in range(count):
            square = rng.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(square).save(tmp_path / str(count) / f"{number:04}.png")
    few, many = peak(tmp_path / "300"), peak(tmp_path / "3000")
    assert many < 1.1 * few
