"""Applying a patch against writing the whole model again: seconds and bytes, on a random checkpoint of many files.

Reference: ``from_pretrained``, the changed tensors put in, ``save_pretrained``; then every file flushed to the disk,
as ours always is (``reference, not flushed`` leaves that out). Ours: ``read_patch`` and ``apply_patch`` by plain
copies, by reflinks where the file system has them, with hard links; and ``revert_patch`` in place.

Bytes are ``write_bytes`` of /proc/self/io: pages of this process made dirty. Links and reflinks make none, tmpfs
counts none. Before every run all earlier writes are flushed, outside the clock. The base is in the page cache.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from harness import gib, options, show, timed
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from falcon_unlearn.model import patch as patches
from falcon_unlearn.model.shards import INDEX_FILE, read_bytes, tensor_spans

LAYERS = (5, 6, 7)
SCOPES = {"down_proj": ("down_proj",), "mlp": ("gate_proj", "up_proj", "down_proj")}


@dataclass(frozen=True)
class Way:
    """``prepare`` runs outside the clock and gives what is timed; ``folder`` is what it writes."""

    prepare: Callable[[], Callable[[], object]]
    folder: Path
    scope: str
    context: Callable[[], AbstractContextManager[object]] = nullcontext


def build(folder: Path, files: int, *, quick: bool) -> None:
    """A random Llama in bf16, about 1.3 GB (quick: 130 MB), in ``files`` shards of about one size."""
    hidden, inner, layers, vocabulary = (512, 1376, 18, 8000) if quick else (1536, 4096, 21, 16000)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.save_pretrained(folder)
    tensors = model.state_dict()
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(files)]
    done = 0
    for name, tensor in tensors.items():
        shards[min(done * files // total, files - 1)][name] = tensor
        done += tensor.nbytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")


def changed_tensors(base: Path, modules: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """New values for the three layers' matrices, fp32 as a trainer has them."""
    spans = tensor_spans(base)
    names = [f"model.layers.{layer}.mlp.{module}.weight" for layer in LAYERS for module in modules]
    generator = torch.Generator().manual_seed(1)
    return {name: 0.02 * torch.randn(spans[name].shape, generator=generator) for name in names}


def write_bytes() -> int:
    """What this process has given the file system to write."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["write_bytes"])


def flush(folder: Path) -> None:
    """Flush every file to the disk."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def rewrite_all(base: Path, out: Path, changed: Mapping[str, torch.Tensor], shard_bytes: int, *, synced: bool) -> None:
    """The reference."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model.load_state_dict(dict(changed), strict=False)
    model.save_pretrained(out, max_shard_size=shard_bytes)
    if synced:
        flush(out)


def check(base: Path, out: Path, changed: Mapping[str, torch.Tensor], *, linked: bool) -> int:
    """Only files with changed tensors differ, and in these tensors alone; gives how many such files there are."""
    spans = tensor_spans(base)
    assert tensor_spans(out) == spans
    touched = {spans[name].file for name in changed}
    for file in (path.name for path in base.iterdir()):
        ours, theirs = out / file, base / file
        assert ours.samefile(theirs) == (linked and file not in touched), file
        assert (ours.read_bytes() == theirs.read_bytes()) == (file not in touched), file
    for name, span in spans.items():
        if span.file in touched:
            data = read_bytes(out, span)
            if name in changed:
                raw = changed[name].to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
                assert data == raw, name
            else:
                assert data == read_bytes(base, span), name
    return len(touched)


def can_reflink(folder: Path) -> bool:
    """Whether the file system of ``folder`` shares blocks between files."""
    source, target = folder / "reflink.1", folder / "reflink.2"
    source.write_bytes(b"x" * 4096)
    try:
        return patches._reflink(source, target)
    finally:
        source.unlink()
        target.unlink()


def without_reflinks() -> AbstractContextManager[object]:
    """Plain copies, also where the file system could share blocks."""
    return mock.patch.object(patches, "_reflink", return_value=False)


def ways(work: Path, base: Path, changed: Mapping[str, Mapping[str, torch.Tensor]], shard_bytes: int) -> dict[str, Way]:
    """Everything that is measured, each with a folder of its own."""
    result: dict[str, Way] = {}

    def reference(out: Path, scope: str, *, synced: bool) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            shutil.rmtree(out, ignore_errors=True)
            return lambda: rewrite_all(base, out, changed[scope], shard_bytes, synced=synced)

        return prepare

    def apply(out: Path, scope: str, *, link: bool) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            shutil.rmtree(out, ignore_errors=True)
            return lambda: patches.apply_patch(patches.read_patch(work / scope), base, out, link=link)

        return prepare

    def revert(out: Path, scope: str) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            shutil.rmtree(out, ignore_errors=True)
            patches.apply_patch(patches.read_patch(work / scope), base, out, link=True)
            return lambda: patches.revert_patch(patches.read_patch(work / scope), out, None)

        return prepare

    first = next(iter(changed))
    result["reference"] = Way(reference(work / "full", first, synced=True), work / "full", first)
    result["reference, not flushed"] = Way(reference(work / "full", first, synced=False), work / "full", first)
    for scope in changed:
        out = work / "out"
        result[f"{scope}: copy"] = Way(apply(out, scope, link=False), out, scope, without_reflinks)
        if can_reflink(work):
            result[f"{scope}: reflink"] = Way(apply(out, scope, link=False), out, scope)
        result[f"{scope}: link"] = Way(apply(out, scope, link=True), out, scope, without_reflinks)
        result[f"{scope}: revert in place"] = Way(revert(out, scope), out, scope, without_reflinks)
    return result


def main() -> None:
    """Run and print."""
    parser = options(__doc__)
    parser.add_argument("--files", type=int, default=13, help="shards of the checkpoint (default: 13)")
    parser.add_argument("--folder", type=Path, default=None, help="where to work, for another file system")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        work = Path(name)
        base = work / "base"
        base.mkdir()
        build(base, arguments.files, quick=arguments.quick)
        changed = {scope: changed_tensors(base, modules) for scope, modules in SCOPES.items()}
        for scope, tensors in changed.items():
            patches.write_patch(work / scope, base, tensors, "random", {})
        size = sum(path.stat().st_size for path in base.iterdir())
        everything = ways(work, base, changed, max(path.stat().st_size for path in base.iterdir()))

        seconds: dict[str, list[float]] = {way: [] for way in everything}
        written: dict[str, int] = {}
        touched: dict[str, int] = {}
        for run in range(1 + arguments.runs):
            for label, way in everything.items():
                with way.context():
                    function = way.prepare()
                    os.sync()
                    before = write_bytes()
                    took = timed(function, runs=1, warmup=0).median
                written[label] = write_bytes() - before
                if run:  # the first is the warm-up, and is checked
                    seconds[label].append(took)
                elif label.endswith(("copy", "reflink", "link")):
                    touched[label] = check(base, way.folder, changed[way.scope], linked=label.endswith(": link"))
                elif label.endswith("revert in place"):
                    for path in base.iterdir():
                        assert (way.folder / path.name).read_bytes() == path.read_bytes(), path.name
        median = {label: statistics.median(values) for label, values in seconds.items()}
        reflinks = any(label.endswith("reflink") for label in everything)

    result = {
        "checkpoint_bytes": size,
        "files": arguments.files,
        "files_rewritten": touched,
        "reflink_supported": reflinks,
        "seconds": median,
        "bytes": written,
        "ratio_seconds": {label: median["reference"] / value for label, value in median.items()},
        "ratio_bytes": {label: written["reference"] / value if value else None for label, value in written.items()},
    }
    rows: list[tuple[object, ...]] = [("way", "s", "fastest .. slowest", "x", "written", "x", "files rewritten")]
    for label, value in median.items():
        rows.append(
            (
                label,
                f"{value:.3f}",
                f"{min(seconds[label]):.3f} .. {max(seconds[label]):.3f}",
                f"{median['reference'] / value:.1f}",
                gib(written[label]),
                f"{written['reference'] / written[label]:.1f}" if written[label] else "-",
                touched.get(label, ""),
            )
        )
    title = (
        f"A checkpoint of {gib(size)} in {arguments.files} files; tensors of layers {LAYERS} changed. "
        f"Medians of {arguments.runs} in turns."
    )
    show(arguments, title + ("" if reflinks else "\nReflinks: not supported here."), rows, result)


if __name__ == "__main__":
    main()
