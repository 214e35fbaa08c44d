"""Models that ``evaluate`` and ``attack`` take as they are: a folder, a hub id, or a base with patches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from falcon_unlearn.artifacts import versions
from falcon_unlearn.config import Section
from falcon_unlearn.corpus.batching import PLAIN_TEMPLATE, Encoder, TemplateChoice
from falcon_unlearn.corpus.sources import SourceConfig
from falcon_unlearn.errors import UserError
from falcon_unlearn.model.loading import DTypeChoice, ModelSource, load_config, load_tokenizer, resolve_model
from falcon_unlearn.model.patch import Patch
from falcon_unlearn.model.patched import load_patched, read_patches
from falcon_unlearn.model.shards import fingerprint
from falcon_unlearn.recipe import load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelRequest(Section):
    """Which model, and how it is loaded and asked."""

    model: str = Field(min_length=1)
    """Folder or hub id of a causal language model."""
    patches: tuple[str, ...] = ()
    """Patch folders laid on the model in memory, the earliest first."""
    oracle: str | None = None
    """A model that never saw the forget data (folder or hub id)."""
    output: str = Field(min_length=1)
    """Folder for the results."""
    template: TemplateChoice = "auto"
    """auto: the tokenizer's chat template where it has one, else the plain template."""
    plain_template: str = PLAIN_TEMPLATE
    """Template of question and answer without a chat template."""
    batch_size: int = Field(32, ge=1)
    """Sequences per forward pass; halved where memory does not suffice."""
    seed: int = 0
    """Draws and bootstrap follow from it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: DTypeChoice = "auto"
    """Of the weights."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; empty: torch's own choice."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


@dataclass(frozen=True)
class KnownModel:
    """A model that was found and checked, not loaded yet."""

    source: ModelSource
    patches: tuple[Patch, ...]
    encoder: Encoder

    @property
    def name(self) -> str:
        """Base and patches, for people."""
        return " + ".join([self.source.name, *(str(patch.folder) for patch in self.patches)])

    @property
    def fingerprint(self) -> str:
        """Tells these weights from others."""
        return "+".join(
            [
                fingerprint(self.source.folder),
                *(change.sha256_after[:16] for patch in self.patches for change in patch.tensors.values()),
            ]
        )

    def load(self) -> PreTrainedModel:
        """Load the base and lay the patches on it."""
        return load_patched(self.source, self.patches)


def known_model(request: ModelRequest, name: str, key: str, patches: Sequence[str] = ()) -> KnownModel:
    """Find a model, its tokenizer and its patches.

    Args:
        request: how models are loaded and asked.
        name: folder or hub id.
        key: of the request, for messages.
        patches: patch folders.

    Raises:
        UserError: anything is missing, or a patch does not belong to the model.
    """
    source = resolve_model(
        name,
        Path.cwd(),
        device=request.device,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
        key=key,
    )
    load_config(source)
    encoder = Encoder(load_tokenizer(source), template=request.template, plain_template=request.plain_template)
    return KnownModel(source, read_patches(source, [Path(folder) for folder in patches]), encoder)


def raw_request(
    model: str, output: str, patches: Sequence[str], oracle: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a command line says about its models, laid on what the folder of a run says about itself.

    Args:
        model: folder or hub id, or the folder of a run.
        output: folder for the results.
        patches: patch folders, the earliest first; of a run they stand on its own patch.
        oracle: folder or hub id.

    Returns:
        The keys of a :class:`ModelRequest`, and the run's ``data`` (empty without a run): see :func:`run_defaults`.

    Raises:
        UserError: as :func:`run_defaults`.
    """
    defaults = run_defaults(model)
    data = defaults.pop("data", {})
    named = {"oracle": oracle} if oracle is not None else {}
    stack = [*defaults.get("patches", ()), *patches]
    return {"model": model, **defaults, **named, "patches": stack, "output": output}, data


def run_defaults(name: str) -> dict[str, Any]:
    """What the folder of a finished run says about its model, empty for any other name.

    Returns:
        ``model``, ``patches``, ``oracle``, template and so on; and below ``data`` what an attack is made with: the
        sources of its records (``forget``, ``scored``, ``retain`` and ``utility``, None where there are several) and
        the limits of lengths.

    Raises:
        UserError: a run folder without a patch, or with a damaged recipe.
    """
    folder = Path(name).expanduser()
    if not (folder / "recipe.yaml").is_file():
        return {}
    if not (folder / "patch").is_dir():
        raise UserError(f"{name}: this run has no patch yet: finish it with --resume")
    recipe = load_recipe(folder / "recipe.yaml")
    plain = recipe.model_dump(mode="json")

    def source(domains: SourceConfig | Mapping[str, SourceConfig]) -> dict[str, Any] | None:
        found = [domains] if isinstance(domains, SourceConfig) else list(domains.values())
        return found[0].model_dump(mode="json") if len(found) == 1 else None

    scored = recipe.evaluation
    return {
        "model": recipe.model,
        "patches": [str(folder / "patch")],
        "oracle": scored.oracle,
        "template": recipe.corpus.template,
        "plain_template": recipe.corpus.plain_template,
        "batch_size": scored.batch_size,
        **{key: plain[key] for key in ("seed", "device", "dtype", "threads", "trust_remote_code")},
        "data": {
            "forget": source(recipe.corpus.forget),
            "scored": None if scored.forget is None else scored.forget.model_dump(mode="json"),
            "retain": source(recipe.corpus.retain),
            "utility": None if scored.retain is None else scored.retain.model_dump(mode="json"),
            "max_new_tokens": scored.max_new_tokens,
            "max_length": recipe.corpus.max_length,
        },
    }


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """Compute with so many threads, and with the caller's number again afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settings_of(request: ModelRequest, known: KnownModel) -> Mapping[str, Any]:
    """What scores were made with, for the records beside them."""
    return {
        "template": known.encoder.describe(),
        "device": str(known.source.device),
        "dtype": str(known.source.dtype or "checkpoint's"),
        "seed": request.seed,
        "versions": versions(),
    }
