"""A model of which only the parts in use are in memory: real embeddings and norms, decoder layers that come and go."""

from __future__ import annotations

import copy
import math
import mmap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from falcon_unlearn.errors import UserError
from falcon_unlearn.model.decoder import find_layers
from falcon_unlearn.model.disk_names import TORCH_DTYPES
from falcon_unlearn.model.loading import (
    ModelSource,
    fetch_files,
    load_config,
    loading_errors,
    number_of_layers,
    refuse_missing,
    text_config,
)
from falcon_unlearn.model.patch import laid_over
from falcon_unlearn.model.shards import TensorSpan, read_into, tensor_files, tensor_spans, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_DTYPES = {
    **TORCH_DTYPES,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# In-memory name -> the tensors on disk it is made of: more than one where transformers fuses (experts).
_Sources = Mapping[str, tuple[str, ...]]


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory that is given back when the tensor goes.

    Malloc keeps most of what is freed, up to blocks of 32 MiB, and does so for each thread that transformers reads in.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size, access=mmap.ACCESS_COPY), dtype=dtype).view(shape)


@dataclass(frozen=True)
class _OnDisk:
    """Stands for a tensor in the state dict given to transformers, which indexes it when it wants the values."""

    folder: Path
    span: TensorSpan
    widen: bool

    def __getitem__(self, index: Any) -> Tensor:
        values = _empty(self.span.shape, _DTYPES[self.span.dtype])
        read_into(self.folder, self.span, values.reshape(-1).view(torch.uint8).numpy().data)
        if self.widen:
            values = _empty(self.span.shape, torch.float32).copy_(values)
        return values[index]


@dataclass(frozen=True)
class _Layout:
    """Which tensors on disk make up what: the parts outside the stack, and each layer. A head is in neither.

    ``conversions`` are transformers' rules from names on disk to names in memory; they remember which of them this
    checkpoint needs, and :func:`falcon_unlearn.model.disk_names.to_disk` goes back by those.
    """

    outer: _Sources
    layers: tuple[_Sources, ...]
    conversions: list[Any]


def _lay_out(model: PreTrainedModel, stack_name: str, on_disk: Sequence[str]) -> _Layout:
    """Sort the tensors of a checkpoint by where they belong in ``model`` (which may be on meta).

    The rules are internal to transformers; the tests guard them on every architecture.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [rule for rule in conversions if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in conversions if isinstance(rule, WeightConverter)]
    known = model.state_dict()
    outer: dict[str, list[str]] = defaultdict(list)
    layers: list[dict[str, list[str]]] = [defaultdict(list) for _ in model.get_submodule(stack_name).children()]
    for key in sorted(on_disk):
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known:  # as transformers does: perhaps nothing but the prefix is different
            name, _ = rename_source_key(key, [], [], model.base_model_prefix, known)
        if name not in known:
            continue
        index = name.removeprefix(f"{stack_name}.").split(".")[0] if name.startswith(f"{stack_name}.") else ""
        (layers[int(index)] if index else outer)[name].append(key)
    return _Layout(
        {name: tuple(keys) for name, keys in outer.items()},
        tuple({name: tuple(keys) for name, keys in layer.items()} for layer in layers),
        conversions,
    )


def _fill(model: PreTrainedModel, tensors: Mapping[str, _OnDisk], layout: _Layout, device: torch.device) -> None:
    """Put tensors from the disk into the model's parameters that are on meta, converted as transformers does.

    This and :func:`_initialise_buffers` use functions that are internal to transformers; the tests guard them.

    Raises:
        ValueError: a tensor does not fit.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    dtype = model.config.dtype
    options = LoadStateDictConfig(
        weight_mapping=layout.conversions,
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        device_map={"": device},
    )
    report, _ = convert_and_load_state_dict_in_model(model, dict(tensors), options)
    for name, found, expected in report.mismatched_keys:
        raise ValueError(f"{name} is {tuple(found)} in the checkpoint and {tuple(expected)} in the model")
    for name, message in report.conversion_errors.items():
        raise ValueError(f"{name}: {message.strip().splitlines()[-1]}")


def _initialise_buffers(model: PreTrainedModel, layer: nn.Module, device: torch.device) -> None:
    """Buffers that no checkpoint holds (masks, position tables) are computed by the model's own initialisation.

    That is how ``from_pretrained`` gets them too. Parameters are marked as initialised by then and stay as they are.
    """
    from transformers import initialization

    for module in layer.modules():
        absent = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if absent:
            for name in absent:
                module._buffers[name] = torch.empty_like(module.get_buffer(name), device=device)
            with torch.no_grad(), initialization.guard_torch_init_functions():
                model._init_weights(module)


class Skeleton:
    """A decoder without its head whose layers are on meta until they are asked for.

    Attributes:
        source: where it was opened.
        model: the base model, frozen, in eval mode; everything outside the layer stack is real, on the source's
            device and in its dtype. Never ``save_pretrained`` it.
        stack_name: qualified name of the layer stack.
        stack: the layers, as many as the config says.
    """

    def __init__(self, source: ModelSource, model: PreTrainedModel, stack_name: str, layout: _Layout) -> None:
        from transformers import PreTrainedModel

        self.source = source
        self.model = model
        self.stack_name = stack_name
        self.stack: nn.ModuleList = model.get_submodule(stack_name)
        self._layout = layout
        path = stack_name.split(".")
        owners = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
        # The innermost model: in a multi-modal one, the language model.
        self._owner = next(owner for owner in reversed(owners) if isinstance(owner, PreTrainedModel))
        self._layer_bytes: int = max(sum(p.nbytes for p in layer.parameters()) for layer in self.stack)

    def __len__(self) -> int:
        return len(self.stack)

    @property
    def layer_bytes(self) -> int:
        """Size of the largest layer's parameters as they are once loaded."""
        return self._layer_bytes

    def load(self, index: int) -> None:
        """Read one layer from its shards, straight to the device and in the dtype of the source.

        Tensors are read when they are converted, so a tensor in the dtype on disk is gone before the next but few.
        Of a hub id, shards that are not there yet are fetched.

        Raises:
            UserError: a shard is missing, truncated or altered, or lacks tensors of the layer.
        """
        layer, sources = self.stack[index], self._layout.layers[index]
        fused = [keys for keys in sources.values() if len(keys) > 1]
        # Fusing takes a copy: one fused parameter at a time, and before the rest is in memory.
        groups = [*fused, tuple(key for keys in sources.values() if len(keys) == 1 for key in keys)]
        spans = _on_disk(self.source, [key for keys in groups for key in keys], self.model.config.dtype)
        try:
            with loading_errors(self.source):
                for keys in groups:
                    _fill(self.model, {key: spans[key] for key in keys}, self._layout, self.source.device)
            prefix = f"{self.stack_name}.{index}."
            refuse_missing(self.source, {prefix + name for name, p in layer.named_parameters() if p.is_meta})
            _initialise_buffers(self._owner, layer, self.source.device)
        except BaseException:
            self.drop(index)
            raise
        layer.requires_grad_(False)

    def drop(self, index: int) -> None:
        """Put a layer back on meta; its memory is free again."""
        self.stack[index].to("meta")


def _on_disk(source: ModelSource, names: Sequence[str], dtype: torch.dtype | None) -> dict[str, _OnDisk]:
    """Where these tensors are, after their shards were fetched and their headers looked at."""
    files = tensor_files(source.folder)
    fetch_files(source, {files[name] for name in names})
    laid = laid_over(source.patches)
    spans = {name: laid.get(name, span) for name, span in tensor_spans(source.folder, set(names)).items()}
    for name, span in spans.items():
        if span.dtype not in _DTYPES:
            raise UserError(f"{source.folder / span.file}: '{name}' is {span.dtype}: give an unquantised checkpoint")
    # Exact, so no matter what transformers makes of it; done here for the memory that it is done in.
    narrow = {"F16", "BF16"} if source.device.type == "cpu" and dtype == torch.float32 else set()
    return {name: _OnDisk(source.folder, spans[name], spans[name].dtype in narrow) for name in names}


@dataclass(frozen=True)
class _Plan:
    """What the config and the names on disk tell: the whole base model on meta, its stack, and where all lies."""

    config: PreTrainedConfig
    model: PreTrainedModel
    stack_name: str
    layout: _Layout


def _on_meta(source: ModelSource, config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    from transformers import AutoModel

    model: PreTrainedModel
    with loading_errors(source), torch.device("meta"):
        model = AutoModel.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=source.trust_remote_code)
    return model


def _plan(source: ModelSource) -> _Plan:
    config = load_config(source)
    number_of_layers(config)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"model: {source.name} is quantised: give the unquantised checkpoint")
    files = weight_files(source.folder)
    if len(files) == 1:  # with several there is an index; one file has to be here to be read
        fetch_files(source, files)
    model = _on_meta(source, config, None)
    stack_name, _ = find_layers(model)
    return _Plan(config, model, stack_name, _lay_out(model, stack_name, list(tensor_files(source.folder))))


def fetch_first_layers(source: ModelSource, count: int) -> set[str]:
    """Download what a hub id's folder lacks of the parts outside the layer stack and the first ``count`` layers.

    Returns:
        The files these are in, of a local folder too.

    Raises:
        UserError: the download failed, or as :func:`open_skeleton`, or there are fewer layers.
    """
    plan = _plan(source)
    _check_count(source, count, len(plan.layout.layers))
    files = tensor_files(source.folder)
    parts = (plan.layout.outer, *plan.layout.layers[:count])
    used = {files[key] for part in parts for keys in part.values() for key in keys}
    fetch_files(source, used)
    return used


def _check_count(source: ModelSource, count: int, total: int) -> None:
    if not 1 <= count <= total:
        raise UserError(f"model: {source.name} has {total} layers, {count} were asked for")


def open_skeleton(source: ModelSource) -> Skeleton:
    """Load everything outside the layer stack but no head; the layers stay on meta.

    Raises:
        UserError: the architecture or its dtype is not supported, or weights are missing, truncated or altered.
    """
    plan = _plan(source)
    dtype = source.dtype or plan.config.dtype or text_config(plan.config).dtype
    outer = _on_disk(source, [key for keys in plan.layout.outer.values() for key in keys], dtype)
    if dtype is None:  # as transformers does: that of the first tensor
        dtype = next((_DTYPES[tensor.span.dtype] for tensor in outer.values() if "F" in tensor.span.dtype), None)
    full = _on_meta(source, plan.config, dtype)
    # The same class without layers, loaded as always: so all buffers and ties are transformers' own.
    config = copy.deepcopy(plan.config)
    text_config(config).num_hidden_layers = 0
    model: PreTrainedModel
    with loading_errors(source):
        model, report = type(full).from_pretrained(
            None, config=config, state_dict=outer, dtype=dtype, output_loading_info=True
        )
    refuse_missing(source, {name for name, _ in model.named_parameters()} & set(report["missing_keys"]))
    model.to(source.device)
    parent, _, name = plan.stack_name.rpartition(".")
    setattr(model.get_submodule(parent), name, full.get_submodule(plan.stack_name))
    text_config(model.config).num_hidden_layers = len(plan.layout.layers)
    model.requires_grad_(False)
    model.eval()
    return Skeleton(source, model, plan.stack_name, plan.layout)


def load_layers(source: ModelSource, first: int, target: int) -> PreTrainedModel:
    """The base model with layers ``first`` to ``target`` (inclusive, from 0) real and all others on meta.

    Raises:
        UserError: as :func:`open_skeleton`, or there are fewer layers.
    """
    assert 0 <= first <= target
    _check_count(source, target + 1, number_of_layers(load_config(source)))
    skeleton = open_skeleton(source)
    for index in range(first, target + 1):
        skeleton.load(index)
    return skeleton.model


def load_first_layers(source: ModelSource, count: int) -> PreTrainedModel:
    """Embeddings and the first ``count`` decoder layers only: no later layer, no head is read.

    Never ``save_pretrained`` the result: it is not the whole model.

    Raises:
        UserError: as :func:`open_skeleton`, or there are fewer layers.
    """
    _check_count(source, count, number_of_layers(load_config(source)))
    model = load_layers(source, 0, count - 1)
    _, stack = find_layers(model)
    del stack[count:]
    text = text_config(model.config)
    text.num_hidden_layers = count
    if vars(text).get("layer_types") is not None:
        text.layer_types = list(text.layer_types)[:count]
    return model
