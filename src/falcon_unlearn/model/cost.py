"""What a computation will take, from a config and shapes alone: the real code runs on tensors without storage.

A model on torch's meta device has shapes and dtypes and no values. :class:`Meter` watches the real layers, losses
and optimiser run on it: every storage that would exist counts while it is alive, and every matrix product counts
with ``2 m n k`` FLOPs (a multiplication and an addition), as :class:`torch.utils.flop_counter.FlopCounterMode`
counts. Attention counts the whole square of queries and keys, as that counter does. Element-wise work is not counted.

What no tensor shows is not predicted: the interpreter and its libraries, workspaces inside a kernel, and what an
allocator keeps for itself.
"""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from falcon_unlearn.corpus.batching import Batch, Encoded
from falcon_unlearn.errors import UserError
from falcon_unlearn.model.activation_cache import ActivationCache, Kind
from falcon_unlearn.model.activation_store import ActivationStore
from falcon_unlearn.model.decoder import SplitDecoder, find_layers
from falcon_unlearn.model.loading import number_of_layers, quiet_transformers, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_FUSED_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_SHORT, _LONG = 64, 128
_ROWS_PER_LOG_SOFTMAX = 512  # as evaluation.scoring does


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *products: int) -> int:
    """``products``: how often queries meet keys, and how often probabilities meet values."""
    *outer, queries, width = query
    return 2 * math.prod(outer) * queries * key[-2] * (products[0] * width + products[1] * value[-1])


def _fused_forward(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return _attention_flops(query, key, value, 1, 1)


def _fused_backward(_: Any, query: torch.Size, key: torch.Size, value: torch.Size, *__: Any, **___: Any) -> int:
    return _attention_flops(query, key, value, 3, 2)


def _grouped(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    """Rows of ``left`` meet one matrix of ``right`` each; in the backward pass, for the weights, rows meet rows."""
    return 2 * left[-2] * left[-1] * right[-1]


EXTRA_FLOPS: Mapping[Any, Callable[..., int]] = {
    _FUSED_ATTENTION: _fused_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_backward,
    torch.ops.aten._grouped_mm: _grouped,
}
"""Formulas on shapes that torch's own table lacks; ``FlopCounterMode(custom_mapping=...)`` takes them as they are."""
_FORMULAS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    **{operation: shape_wrapper(formula) for operation, formula in EXTRA_FLOPS.items()},  # type: ignore[no-untyped-call]
}


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live bytes and FLOPs of everything that runs inside the block.

    Args:
        known: tensors that exist already; their storages, and views of them, count from the start.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.flops = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._add(tensor)

    def restart_peak(self) -> None:
        """Let :attr:`peak` start again from what is alive now."""
        self.peak = self.live

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._alive[key]
            self.live -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self._add(value)
        packet = func._overloadpacket
        if packet in _FORMULAS:
            self.flops += _FORMULAS[packet](*args, **kwargs, out_val=out)
        return out


class _Stand(TorchFunctionMode):
    """Answers for values that a meta tensor does not have, and takes the attention kernel that a device would take.

    Without values, attention would fall back to plain matrix products that keep all probabilities. The fused kernels
    of CPU and CUDA keep their output and one number a query; a Boolean mask becomes one of the queries' dtype.

    Boolean tensors on the CPU are loss masks. They keep their values when a batch is moved, so that what they select
    has its size.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and args[0].is_meta:
            return True  # positions are those of one sequence, nothing is masked: transformers asks no other question
        if func is Tensor.__float__ and args[0].is_meta:
            return 0.0  # a set-up measures the data and chooses: what it runs is the same whatever it finds
        if func is Tensor.to and args[0].dtype == torch.bool and args[1:2] == (torch.device("meta"),):
            return args[0]
        if func is Tensor.__getitem__ and args[0].is_meta:
            return func(args[0], _positions(args[1]))
        if any(isinstance(value, Tensor) and value.is_meta for value in args):
            args = tuple(value.to("meta") if isinstance(value, Tensor) else value for value in args)
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _fused_attention(*args, **kwargs)
        if getattr(func, "__name__", "") == "_grouped_mm" and args[0].is_meta:
            # Each row meets one expert's matrix; on meta the operation itself takes bf16 only.
            return args[0] @ args[1][0]
        return func(*args, **kwargs)


def _positions(index: Any) -> Any:
    """An index of a meta tensor with numbers of positions in place of masks."""
    if isinstance(index, tuple):
        return tuple(part for item in index for part in (_positions(item) if _is_mask(item) else (item,)))
    return tuple(part.to("meta") for part in index.nonzero(as_tuple=True)) if _is_mask(index) else index


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool and not value.is_meta


def _fused_attention(  # noqa: PLR0917 (torch's signature)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, query.new_zeros(()), query.new_zeros(()))
    output: Tensor = _FUSED_ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output


@contextlib.contextmanager
def metered(model: nn.Module, *others: Tensor) -> Iterator[Meter]:
    """A :class:`Meter` in force, with the model's tensors and ``others`` counted from the start."""
    with Meter([*model.parameters(), *model.buffers(), *others]) as meter, _Stand():
        yield meter


def blueprint(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    layers: int | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model on the meta device, frozen, in eval mode.

    Args:
        config: it is left as it is.
        dtype: of the weights.
        layers: embeddings and so many decoder layers without a head; None for the whole model with its head.
        trust_remote_code: run Python that comes with the model.

    Raises:
        UserError: transformers cannot build it, or it has fewer layers.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    config = type(config).from_dict(config.to_dict())
    if layers is not None:
        text, total = text_config(config), number_of_layers(config)
        if not 1 <= layers <= total:
            raise UserError(f"model: it has {total} layers, {layers} were asked for")
        kinds = getattr(text, "layer_types", None)
        if kinds is not None:
            text.layer_types = list(kinds)[:layers]
        text.num_hidden_layers = layers
    auto = AutoModelForCausalLM if layers is None else AutoModel
    try:
        with torch.device("meta"), quiet_transformers():
            model: PreTrainedModel = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever it is, it is about this config
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(f"model: architecture '{config.model_type}' cannot be built ({reason})") from error
    return model.eval().requires_grad_(False)


def tensor_bytes(tensors: Sequence[Tensor] | nn.Module) -> int:
    """Bytes of the distinct storages of tensors, or of a module's parameters and buffers; tied ones count once."""
    if isinstance(tensors, nn.Module):
        tensors = [*tensors.parameters(), *tensors.buffers()]
    return sum({s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


@dataclass(frozen=True)
class BatchShape:
    """A padded batch without its content.

    Attributes:
        records: rows.
        length: columns, the longest record.
        tokens: positions that take part in the loss.
        padded: some record is shorter, so attention needs a mask.
    """

    records: int
    length: int
    tokens: int
    padded: bool


def shape_of(batch: Batch, counted: Tensor) -> BatchShape:
    """The shape of a real batch; ``counted`` is its Boolean loss mask."""
    records, length = batch.input_ids.shape
    return BatchShape(records, length, int(counted.sum()), not bool(batch.attention_mask.all()))


def _meta_batch(shape: BatchShape, model: PreTrainedModel) -> Batch:
    size = (shape.records, shape.length)
    ids = torch.empty(size, dtype=torch.long, device="meta")
    mask = torch.empty(size, dtype=torch.bool, device="meta")
    return Batch(ids, cast("Tensor", attention_mask(shape, model)), mask, mask)


def attention_mask(shape: BatchShape, model: PreTrainedModel) -> Tensor | None:
    """As transformers makes it of padding: Boolean for fused attention, else of the model's dtype."""
    if not shape.padded:
        return None
    dtype = torch.bool if model.config._attn_implementation == "sdpa" else model.dtype
    return torch.empty((shape.records, 1, shape.length, shape.length), dtype=dtype, device="meta")


@dataclass(frozen=True)
class PerRecord:
    """FLOPs of one record as a function of its length: ``linear * length + quadratic * length ** 2``."""

    linear: int
    quadratic: int

    def __call__(self, length: int) -> int:
        """FLOPs at ``length``."""
        return self.linear * length + self.quadratic * length**2

    def next_token(self, length: int) -> int:
        """One more token behind ``length - 1`` cached ones."""
        return self.linear + self.quadratic * length


def _per_record(flops: Callable[[int], int]) -> PerRecord:
    """Fit of two lengths, exact: layers are linear in the length, attention is quadratic."""
    short, long = flops(_SHORT), flops(_LONG)
    quadratic = (long - short * _LONG // _SHORT) // (_LONG**2 - _SHORT * _LONG)
    return PerRecord((short - quadratic * _SHORT**2) // _SHORT, quadratic)


def layers_flops(model: PreTrainedModel) -> PerRecord:
    """FLOPs of all decoder layers of a :func:`blueprint` on one record, without the head."""
    base = getattr(model, model.base_model_prefix, model)

    def flops(length: int) -> int:
        with metered(model) as meter, torch.no_grad():
            base(input_ids=torch.empty((1, length), dtype=torch.long, device="meta"), use_cache=False)
        return meter.flops

    return _per_record(flops)


def head_flops(model: PreTrainedModel) -> int:
    """FLOPs of the language-model head for one position."""
    head = model.get_output_embeddings()
    return 0 if head is None else 2 * int(head.weight.numel())


def scoring_peak(model: PreTrainedModel, shape: BatchShape) -> int:
    """Peak bytes of log-probabilities of one batch, weights included.

    Args:
        model: whole :func:`blueprint`.
        shape: the batch; ``tokens`` are the positions that logits are computed for.
    """
    mask = attention_mask(shape, model)
    head = model.get_output_embeddings()
    base = getattr(model, model.base_model_prefix, model)
    with metered(model) as meter, torch.no_grad():
        ids = torch.empty((shape.records, shape.length), dtype=torch.long, device="meta")
        hidden = base(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        rows = hidden.flatten(0, 1)[torch.empty(shape.tokens, dtype=torch.long, device="meta")]
        logits = rows if head is None else head(rows)
        block = logits[:_ROWS_PER_LOG_SOFTMAX].float()
        F.cross_entropy(block, torch.empty(len(block), dtype=torch.long, device="meta"), reduction="none")
    return meter.peak


def generation_peak(model: PreTrainedModel, records: int, length: int) -> int:
    """Peak bytes of generation, weights included, when ``length`` tokens of each record are in the cache."""
    with metered(model) as meter, torch.no_grad():
        ids = torch.empty((records, length), dtype=torch.long, device="meta")
        keep = {"logits_to_keep": 1} if _keeps_logits(model) else {}
        model(input_ids=ids, use_cache=True, **keep)
    return meter.peak


def extraction_peak(model: PreTrainedModel, shape: BatchShape) -> int:
    """Peak bytes of one forward pass without head, weights included."""
    base = getattr(model, model.base_model_prefix, model)
    mask = attention_mask(shape, model)
    with metered(model) as meter, torch.no_grad():
        ids = torch.empty((shape.records, shape.length), dtype=torch.long, device="meta")
        base(input_ids=ids, attention_mask=mask, use_cache=False)
    return meter.peak


def _keeps_logits(model: PreTrainedModel) -> bool:
    import inspect

    return "logits_to_keep" in inspect.signature(model.forward).parameters


Objective = Callable[[Tensor, Tensor], Tensor]
"""Updated and frozen activations of the counted tokens, both ``(N, D)``, to a scalar."""


class _CachedActivations(ActivationCache):
    """Holds every record, without storage."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        super().__init__(ActivationStore(Path(os.devnull)))
        self._shape = shape
        self._dtype = dtype

    def holds(self, records: Sequence[Encoded]) -> bool:
        return True

    def read(self, kind: Kind, records: Sequence[Encoded], width: int, device: torch.device) -> Tensor:
        return torch.empty(self._shape, dtype=self._dtype, device="meta")


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one record in one phase (forget or retain) of a step, as functions of its length.

    ``frozen`` is the forward pass of the original model, ``trained`` forward and backward of the trained layers.
    """

    frozen: PerRecord
    trained: PerRecord


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak of a training step.

    Attributes:
        weights: frozen weights.
        masters: fp32 copies of what is trained.
        optimizer: its state.
        gradients: gradients that are complete and wait when the phase of the peak begins.
        activations: everything else: saved activations, casts, temporaries and new gradients of the backward pass.
        interpolation: what the trainer's ``interpolation`` holds then: original values of what is trained, and the
            present ones while the forget gradient is taken elsewhere.
        phase: where the peak is: ``forget``, ``retain`` or ``update``.
    """

    weights: int
    masters: int
    optimizer: int
    gradients: int
    activations: int
    interpolation: int
    phase: str

    @property
    def peak(self) -> int:
        """Bytes in all."""
        held = self.weights + self.masters + self.optimizer + self.gradients
        return held + self.activations + self.interpolation


Loss = Callable[[Mapping[str, Tensor]], Tensor | None]
"""Masters to the loss of one side on its batch; None where there is none."""


def _loss(
    decoder: SplitDecoder, shape: BatchShape, objective: Objective, masters: Mapping[str, Tensor], *, cached: bool
) -> Tensor:
    if cached:
        size = (shape.records, shape.length, decoder.hidden_size)
        decoder.keep(_CachedActivations(size, decoder.model.dtype), [], 0, 1)
    prepared = decoder.prepare(_meta_batch(shape, decoder.model))
    counted = torch.empty(shape.tokens, dtype=torch.long, device="meta")
    updated, frozen = (
        hidden.flatten(0, 1)[counted] for hidden in (decoder.updated(prepared, masters), prepared.frozen)
    )
    return objective(updated, frozen)


def gradients_of(loss: Loss, masters: Mapping[str, Tensor]) -> list[Tensor]:
    """Gradients of one loss on one batch, as the trainer takes them."""
    parameters, value = list(masters.values()), loss(masters)
    if value is None:
        return [torch.zeros_like(parameter) for parameter in parameters]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.contiguous() for g, p in zip(found, parameters, strict=True)]


def step_flops(
    model: PreTrainedModel, layers: Sequence[int], modules: str | Sequence[str], objective: Objective
) -> StepFlops:
    """FLOPs of training ``layers`` of a :func:`blueprint` with ``objective``, which must be linear in the tokens."""
    decoder = SplitDecoder(model, layers, modules)
    masters = decoder.masters()

    def flops(length: int, *, cached: bool) -> int:
        shape = BatchShape(1, length, length, padded=False)
        with metered(model) as meter:
            gradients_of(partial(_loss, decoder, shape, objective, cached=cached), masters)
        return meter.flops

    both = _per_record(partial(flops, cached=False))
    trained = _per_record(partial(flops, cached=True))
    return StepFlops(PerRecord(both.linear - trained.linear, both.quadratic - trained.quadratic), trained)


def step_memory(
    model: PreTrainedModel,
    layers: Sequence[int],
    modules: str | Sequence[str],
    forget: BatchShape,
    retain: BatchShape,
    *,
    objectives: tuple[Objective, Objective],
    optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer],
    micro_batches: bool = False,
    cached: bool = False,
    interpolation: bool = False,
) -> StepMemory:
    """Memory of one step of the trainer on a :func:`blueprint`, in the state it is in after the first one.

    Args:
        model: with at least ``max(layers) + 1`` layers.
        layers: trained layers.
        modules: see :func:`~falcon_unlearn.model.decoder.scope_parameters`.
        forget: the forget (micro-)batch.
        retain: the retain (micro-)batch.
        objectives: of forget and of retain.
        optimizer: makes the optimiser of the masters.
        micro_batches: gradients of several micro-batches are added up.
        cached: frozen activations come from the cache, and the weights that are not needed then are gone
            (:meth:`~falcon_unlearn.model.decoder.SplitDecoder.release`). The cache itself is not counted.
        interpolation: whether the forget gradient is taken part of the way back to the original weights.
    """
    decoder = SplitDecoder(model, layers, modules)
    return training_memory(
        model,
        decoder.masters,
        partial(_loss, decoder, forget, objectives[0], cached=cached),
        partial(_loss, decoder, retain, objectives[1], cached=cached),
        optimizer=optimizer,
        micro_batches=micro_batches,
        released=_released_bytes(model, decoder) if cached else 0,
        interpolation=interpolation,
    )


def training_memory(
    model: PreTrainedModel,
    make_masters: Callable[[], Mapping[str, Tensor]],
    forget: Loss,
    retain: Loss,
    *,
    optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer],
    micro_batches: bool = False,
    released: int = 0,
    interpolation: bool = False,
) -> StepMemory:
    """Memory of one step of the trainer with any two losses, in the state it is in after the first one.

    Args:
        model: :func:`blueprint` that the losses run.
        make_masters: makes the trained tensors.
        forget: loss on the forget (micro-)batch.
        retain: loss on the retain (micro-)batch.
        optimizer: makes the optimiser of the masters.
        micro_batches: gradients of several micro-batches are added up.
        released: bytes of frozen weights that are gone when training begins.
        interpolation: as in :func:`step_memory`.
    """
    with metered(model) as meter:
        weights = meter.live
        masters = make_masters()
        parameters = list(masters.values())
        held = meter.live
        chosen = optimizer(parameters)
        _update(chosen, parameters, [torch.zeros_like(p) for p in parameters])
        with_state = meter.live
        # Not made here, where they would only be in the way of the meter: so many bytes more in every phase.
        copies = {"forget": 2, "retain": 1, "update": 1}
        copy = tensor_bytes(parameters) if interpolation else 0
        phases: list[tuple[str, int, int]] = []
        gradients: list[list[Tensor]] = []
        for name, loss in (("forget", forget), ("retain", retain)):
            gradients.append([])
            for _ in range(2 if micro_batches else 1):
                before = meter.live
                meter.restart_peak()
                found = gradients_of(loss, masters)
                phases.append((name, before, meter.peak))
                gradients[-1] = gradients[-1] or found
                del found
        before = meter.live
        meter.restart_peak()
        combined = gradients[0]
        del gradients
        _update(chosen, parameters, combined)
        phases.append(("update", before, meter.peak))
    name, before, peak = max(phases, key=lambda phase: phase[2] + copies[phase[0]] * copy)
    return StepMemory(
        weights=weights - released,
        masters=held - weights,
        optimizer=with_state - held,
        gradients=before - with_state,
        activations=peak - before,
        interpolation=copies[name] * copy,
        phase=name,
    )


def _update(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    gradients.clear()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _released_bytes(model: PreTrainedModel, decoder: SplitDecoder) -> int:
    _, stack = find_layers(model)
    parameters = dict(model.named_parameters())
    return sum(tensor_bytes(stack[i]) for i in range(decoder.first)) + tensor_bytes(
        [parameters[name] for name in decoder.parameter_names]
    )
