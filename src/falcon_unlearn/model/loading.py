"""Load what is used and nothing more: a folder or hub id, its config, its first N decoder layers, its tokenizer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from falcon_unlearn.errors import UserError
from falcon_unlearn.model.shards import weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from falcon_unlearn.model.patch import Patch

DTypeChoice = Literal["auto", "float32", "bfloat16", "float16"]

_ALL_BUT_WEIGHTS = ["*.json", "*.model", "*.txt", "*.jinja"]
_REMOTE_CODE_FILES = ["*.py"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies (``folder``, resolved) and how it is to be loaded.

    ``revision`` is the commit of a hub id, whose weights may have yet to be fetched; None for a local folder.
    ``patches`` are laid on what is in the folder wherever weights are loaded, the earliest first.
    """

    name: str
    folder: Path
    device: torch.device
    dtype: torch.dtype | None
    trust_remote_code: bool = False
    revision: str | None = None
    patches: tuple[Patch, ...] = ()


def resolve_device(device: str) -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: the named device is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device '{device}' cannot be used ({reason}): set device to auto or cpu") from error


def resolve_model(
    name: str,
    base_dir: Path,
    *,
    device: str = "auto",
    dtype: DTypeChoice = "auto",
    trust_remote_code: bool = False,
    key: str = "model",
    weights: bool = True,
) -> ModelSource:
    """Find ``name`` as a local folder (beside the recipe or from the current directory), else as a hub id.

    Args:
        name: folder or hub id.
        base_dir: folder that relative paths start from.
        device: ``auto`` or a torch device.
        dtype: ``auto`` keeps the checkpoint's on accelerators and computes in fp32 on the CPU.
        trust_remote_code: run Python that comes with the model.
        key: recipe key, for messages.
        weights: fetch all weights of a hub id now, not what is needed when it is (:func:`fetch_weights`).

    Raises:
        UserError: no such folder or id, or no network.
    """
    target = resolve_device(device)
    chosen = None if dtype == "auto" and target.type != "cpu" else torch.float32
    if dtype != "auto":
        chosen = getattr(torch, dtype)
    folder, revision = _local_folder(name, base_dir, key), None
    if folder is None:
        patterns = _ALL_BUT_WEIGHTS + (_REMOTE_CODE_FILES if trust_remote_code else [])
        folder = _from_hub(name, key, patterns)
        revision = folder.name
        if weights:
            _from_hub(name, key, weight_files(folder), revision)
    return ModelSource(name, folder, target, chosen, trust_remote_code, revision)


def checkpoint_folder(name: str, base_dir: Path, key: str, *, trust_remote_code: bool = False) -> Path:
    """The local folder of a whole model: one that exists, or the snapshot of a hub id.

    Raises:
        UserError: neither is to be had; ``key`` (of the recipe or the command line) is named.
    """
    return resolve_model(name, base_dir, device="cpu", trust_remote_code=trust_remote_code, key=key).folder


def fetch_weights(source: ModelSource) -> None:
    """Download what a hub id's folder still lacks of its weights; a local folder is left as it is.

    Raises:
        UserError: the download failed.
    """
    if source.revision is not None:
        fetch_files(source, weight_files(source.folder))


def fetch_files(source: ModelSource, files: Collection[str]) -> None:
    """Download those of ``files`` that a hub id's folder lacks; a local folder is left as it is.

    Raises:
        UserError: the download failed.
    """
    absent = sorted(file for file in files if not (source.folder / file).is_file())
    if absent and source.revision is not None:
        _from_hub(source.name, "model", absent, source.revision)


def _local_folder(name: str, base_dir: Path, key: str) -> Path | None:
    path = Path(name).expanduser()
    for candidate in (base_dir / path, path):
        if candidate.is_dir():
            if not (candidate / "config.json").is_file():
                raise UserError(f"{key}: {candidate} has no config.json, so it is no Hugging Face model folder")
            return candidate.resolve()
        if candidate.is_file():
            raise UserError(f"{key}: {candidate} is a file; give the model's folder")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{key}: folder {name} does not exist")
    return None


def _from_hub(name: str, key: str, patterns: Collection[str], revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{key}: '{name}' is no local folder and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason}); gated models need acceptance at https://huggingface.co/{name}"
        ) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No load reports or weight progress bars: unexpected tensors above the cut are meant to be left out."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def load_config(source: ModelSource) -> PreTrainedConfig:
    """Read ``config.json``.

    Raises:
        UserError: the architecture is unknown to this transformers version, or is not a decoder.
    """
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # whatever it is, it is about this config.json
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"model: {source.name} has an architecture that cannot be loaded ({reason})") from error
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"model: {source.name} is an encoder-decoder ({config.model_type}); only decoders can be unlearned"
        )
    return config


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a (possibly multi-modal) config that describes the decoder."""
    result: PreTrainedConfig = config.get_text_config(decoder=True)
    return result


def number_of_layers(config: PreTrainedConfig) -> int:
    """How many decoder layers the model has.

    Raises:
        UserError: the config does not say.
    """
    count = getattr(text_config(config), "num_hidden_layers", None)
    if not isinstance(count, int):
        raise UserError(f"model: architecture '{config.model_type}' has no num_hidden_layers; it is not supported")
    return count


def context_length(config: PreTrainedConfig) -> int | None:
    """Longest sequence in tokens, or None where the config names no limit."""
    limit = getattr(text_config(config), "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


@contextlib.contextmanager
def loading_errors(source: ModelSource) -> Iterator[None]:
    """What transformers says of a checkpoint that it cannot load, as one line of ours."""
    from safetensors import SafetensorError

    try:
        with quiet_transformers():
            yield
    except (ValueError, KeyError, OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"model: {source.name} could not be loaded ({type(error).__name__}: {reason})") from error


def refuse_missing(source: ModelSource, missing: Collection[str]) -> None:
    """Holes in a checkpoint, which transformers fills with random weights, are refused.

    Raises:
        UserError: ``missing``, names of parameters without a value in the checkpoint, is not empty.
    """
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"model: {source.name} has no weights for {min(missing)}{others}: get the complete checkpoint")


def load_causal_lm(source: ModelSource) -> PreTrainedModel:
    """The whole model with its language-model head, frozen, in eval mode."""
    from transformers import AutoModelForCausalLM

    if source.patches:
        from falcon_unlearn.model.patched import load_patched  # which loads the base by this function

        return load_patched(source, ())
    model: PreTrainedModel
    config = load_config(source)
    fetch_weights(source)
    if not any(source.folder.glob("*.safetensors")):
        raise UserError(f"model: {source.folder} holds no .safetensors weights; load it once and save_pretrained() it")
    with loading_errors(source):
        model, report = AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=config,
            dtype=source.dtype or "auto",
            trust_remote_code=source.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    refuse_missing(source, {name for name, _ in model.named_parameters()} & set(report["missing_keys"]))
    model.requires_grad_(False)
    model.eval()
    model.to(source.device)
    return model


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                source.folder, trust_remote_code=source.trust_remote_code
            )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model: {source.name} has no usable tokenizer ({reason})") from error
    return tokenizer
