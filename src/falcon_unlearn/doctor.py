"""What this machine has, and what to do about what it has not."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

TEST_PACKAGES = {"scikit-learn": "sklearn", "pytest": "pytest", "hypothesis": "hypothesis"}
EXTRAS = {"sweep": "optuna", "lora": "peft", "bitsandbytes": "bitsandbytes", "lm-eval": "lm_eval"}
"""Extra -> the package it brings."""


def examine() -> dict[str, Any]:
    """Facts and advice, both plain strings."""
    import torch

    from falcon_unlearn.artifacts import versions
    from falcon_unlearn.embedded import cache_folder

    facts: dict[str, str] = dict(versions())
    advice: list[str] = []
    facts["platform"] = platform.platform()
    facts["cores"] = str(os.cpu_count())
    facts["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    facts["free disk here"] = f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            facts[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        facts["accelerator"] = "MPS" if torch.backends.mps.is_available() else "none"
        if facts["accelerator"] == "none":
            advice.append("no accelerator: models beyond about 1B parameters will be slow on the CPU")
    data = Path(os.environ.get("FALCON_UNLEARN_DATA", "../shared/data"))
    facts["benchmark data"] = str(data) if data.is_dir() else f"none in {data}"
    if not data.is_dir():
        advice.append("no TOFU data: some tests are skipped; set FALCON_UNLEARN_DATA to a folder with tofu/*.jsonl")
    facts["demo cache"] = str(cache_folder())
    for extra, module in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        facts[f"extra {extra}"] = "installed" if there else f"not installed: pip install 'falcon-unlearn[{extra}]'"
    missing = [name for name, module in TEST_PACKAGES.items() if importlib.util.find_spec(module) is None]
    facts["test extra"] = "installed" if not missing else f"missing {', '.join(missing)}"
    if missing:
        advice.append("the tests need more: pip install '.[test]'")
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        advice.append("HF_HUB_OFFLINE=1: hub ids work only where they are cached already")
    return {"facts": facts, "advice": advice}
