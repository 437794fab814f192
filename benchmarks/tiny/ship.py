"""Put a trained model into the package as `tiny`: fp16 weights, its vocabulary, the card and the licence.

    python benchmarks/tiny/ship.py runs/tiny

The card is card.md: write the run's figures into it first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from clipcli.weights.load import load_checkpoint
from clipcli.weights.save import save_model

HERE = Path(__file__).parent
TINY = HERE.parents[1] / "clipcli" / "tiny"
LIMIT = 12_000_000  # bytes of all files


def ship(run: Path) -> int:
    """Write clipcli/tiny; returns its size. Raises SystemExit where it is larger than the package may carry."""
    checkpoint = load_checkpoint(run)
    training = json.loads((run / "training.json").read_text())
    save_model(
        TINY,
        checkpoint.config,
        checkpoint.arrays,
        merges=run / "merges.txt",
        card=(HERE / "card.md").read_text(encoding="utf-8"),
        training=training,
        precision="fp16",
        force=True,
    )
    (TINY / "open_clip_model.safetensors").chmod(0o644)
    size = sum(file.stat().st_size for file in TINY.iterdir())
    if size > LIMIT:
        raise SystemExit(f"{TINY} has {size:,} bytes, more than {LIMIT:,}")
    return size


if __name__ == "__main__":
    print(f"{TINY}: {ship(Path(sys.argv[1])):,} bytes")
