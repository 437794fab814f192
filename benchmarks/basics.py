"""The first figures: what a help page costs, and how fast 1,000 labels x 80 templates become token ids.

    python benchmarks/basics.py --vocabulary merges.txt --labels imagenet_classes.txt

Prints CPU seconds (user + system) of child processes and of one thread: medians of five.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from clipcli.records import Label
from clipcli.tokenizer import Tokenizer
from clipcli.zeroshot import prompts, templates


def child_seconds(*arguments: str) -> float:
    """CPU seconds of one run of `clipcli ARGUMENTS`."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "clipcli", *arguments], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def median(measure: Callable[[], float]) -> float:
    """The median of five measurements, after one that doesn't count."""
    measure()
    return statistics.median(measure() for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True, help="a class name a line")
    options = parser.parse_args()
    print(f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} CPUs")
    print(f"python -c pass      {median(interpreter):6.3f} s CPU")
    for arguments in (("--version",), ("--help",), ("classify", "--help")):
        print(f"{'clipcli ' + ' '.join(arguments):<20}{median(lambda a=arguments: child_seconds(*a)):6.3f} s CPU")  # type: ignore[misc]

    names = options.labels.read_text(encoding="utf-8").splitlines()
    labels = [Label(name, (name,)) for name in names]
    filled = prompts.fill(labels, templates.read(["imagenet80"]))
    texts = [prompt.text for prompt in filled]

    def ours() -> float:
        began = time.process_time()
        tokenizer = Tokenizer.from_file(options.vocabulary)
        prompts.tokenize(filled, labels, tokenizer, 77)
        return time.process_time() - began

    seconds = median(ours)
    print(f"{len(texts):,} prompts -> ids, vocabulary read and nothing memoised before: {seconds:.2f} s CPU")


def interpreter() -> float:
    """CPU seconds of an interpreter that does nothing."""
    before = os.times()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    main()
