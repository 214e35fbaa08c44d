"""Train the shipped seed's model and oracle again and put them into the package data.

python benchmarks/ship_demo_models.py
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from falcon_unlearn.embedded import PARTS, SHIPPED_SEED, TOKENIZER_FILES, write_models

TARGET = Path(__file__).parents[1] / "src" / "falcon_unlearn" / "data" / "demo"


def main() -> None:
    """Train, copy what is needed and say how large it is."""
    with tempfile.TemporaryDirectory() as folder:
        pair = Path(folder)
        write_models(SHIPPED_SEED, pair, retrain=True, say=lambda line: print(line, file=sys.stderr))
        shutil.rmtree(TARGET, ignore_errors=True)
        for part in PARTS:
            (TARGET / part).mkdir(parents=True)
            for name in ("config.json", "model.safetensors", *(TOKENIZER_FILES if part == "model" else ())):
                shutil.copyfile(pair / part / name, TARGET / part / name)
    size = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    print(f"{TARGET}: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
