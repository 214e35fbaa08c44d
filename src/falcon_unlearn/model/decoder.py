"""Find a decoder's layer stack, and run only the part of it that training needs.

A representation method trains layers ``first..target`` and looks at the output of ``target``. Below ``first``
nothing changes, so that prefix runs once without gradients for both the frozen and the updated model; above
``target`` nothing is needed, so it never runs. The trained layers are called functionally with fp32 masters.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from falcon_unlearn.corpus.batching import Batch, Encoded, collate, length_sorted_batches
from falcon_unlearn.errors import UserError
from falcon_unlearn.model.activation_cache import ActivationCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = ("attn", "attention")
_MLP = ("mlp", "feed_forward", "feedforward", "ffn", "moe", "experts", "fc1", "fc2")
_MLP_OUTPUT = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "w2", "fc_out", "output_linear")
_ROUTERS = frozenset({"gate", "router"})


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder's layer stack: its qualified name and the list itself.

    It is the module list with the most parameters whose members are all of one class and as many as the config
    says.

    Raises:
        UserError: nothing in the model looks like a layer stack.
    """
    expected = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == expected
        and len({type(member) for member in module}) == 1
    ]
    if not found:
        raise UserError(f"model: no stack of {expected} decoder layers found in {type(model).__name__}: not supported")
    _, name, layers = max(found, key=lambda item: item[0])
    return name, layers


def scope_parameters(layer: nn.Module, modules: str | Sequence[str]) -> list[str]:
    """Names of the parameters of one layer that ``modules`` selects.

    Args:
        layer: a decoder layer.
        modules: ``mlp`` (its matrices without a router), ``down_proj`` (its output matrices), ``attention``,
            ``all``, or a list of these words and name endings such as ``["mlp", "self_attn.o_proj"]``.

    Raises:
        UserError: nothing matches; the message lists what there is.
    """
    parameters = dict(layer.named_parameters())
    matrices = [
        n for n, p in parameters.items() if p.ndim >= 2 and not n.endswith("bias") and not _ROUTERS & set(n.split("."))
    ]
    attention = [n for n in matrices if any(part in n.lower() for part in _ATTENTION)]
    mlp = [n for n in matrices if n not in attention and any(part in n.lower() for part in _MLP)]
    table = {
        "all": list(parameters),
        "attention": attention,
        "mlp": mlp,
        "down_proj": [n for n in mlp if n.removesuffix(".weight").split(".")[-1] in _MLP_OUTPUT],
    }
    if isinstance(modules, str):
        chosen = table.get(modules, [])
    else:
        named = {n for module in modules for n in table.get(module, ())}
        endings = tuple(module for module in modules if module not in table)
        chosen = [n for n in parameters if n in named or n.removesuffix(".weight").endswith(endings)]
    if not chosen:
        raise UserError(
            f"training.modules: {modules!r} matches nothing in {type(layer).__name__}: {', '.join(parameters)}"
        )
    return chosen


@dataclass(frozen=True)
class LayerCall:
    """The arguments a layer was called with, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Prepared:
    """One batch, run through everything that does not change.

    Attributes:
        hidden: input of the first trained layer, ``(batch, length, hidden)``.
        calls: remaining arguments of each layer from the first trained one to the target.
        frozen: the original model's output at the target layer, ``(batch, length, hidden)``.
    """

    hidden: Tensor
    calls: tuple[LayerCall, ...]
    frozen: Tensor


class LayerReachedError(Exception):
    """Raised by a hook to leave a forward pass early; never seen by a caller."""


@contextlib.contextmanager
def bypassed(layers: Iterable[nn.Module], *, as_tuple: bool) -> Iterator[None]:
    """Inside the block these layers hand their hidden states through; their weights are not touched (or on meta).

    Args:
        layers: of one stack.
        as_tuple: whether layers of this architecture return a tuple, led by the hidden states.
    """

    def through(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor]:
        return (hidden_states,) if as_tuple else hidden_states

    changed = list(layers)
    for layer in changed:
        layer.forward = through
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward  # the instance's; the class's own shows again


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a decoder layer's output: a tensor, or (in some architectures) a tuple led by it."""
    result = output[0] if isinstance(output, tuple) else output
    assert isinstance(result, Tensor)
    return result


class SplitDecoder:
    """A decoder cut into frozen prefix, trained layers and an unused rest.

    Args:
        model: any decoder from transformers, with at least ``target + 1`` layers; it is never modified.
        layers: indices of the trained layers; the largest is the target. Layers between them run frozen.
        modules: which of their parameters are trained, see :func:`scope_parameters`.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], modules: str | Sequence[str]) -> None:
        self.model = model
        self.stack_name, stack = find_layers(model)
        self.layers = tuple(sorted(layers))
        assert self.layers[0] >= 0
        assert self.layers[-1] < len(stack)
        self.first, self.target = self.layers[0], self.layers[-1]
        self._prefix = [stack[i] for i in range(self.first)]
        self._span = [stack[i] for i in range(self.first, self.target + 1)]
        self._cache: ActivationCache | None = None
        self._as_tuple: bool | None = None
        self._scopes = {i: scope_parameters(stack[i], modules) for i in self.layers}

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.get_text_config(decoder=True).hidden_size)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the trained tensors, as the model knows them."""
        return tuple(f"{self.stack_name}.{i}.{name}" for i in self.layers for name in self._scopes[i])

    def masters(self) -> dict[str, Tensor]:
        """Fresh fp32 leaf copies of the trained tensors, by :attr:`parameter_names`."""
        parameters = dict(self.model.named_parameters())
        return {
            name: parameters[name].detach().to(torch.float32, copy=True).requires_grad_()
            for name in self.parameter_names
        }

    @torch.no_grad()
    def keep(self, cache: ActivationCache, records: Sequence[Encoded], pad_id: int, batch_size: int) -> None:
        """Fill ``cache`` with what :meth:`prepare` gives for ``records`` and read from it henceforth.

        Batches are always cut the same way, so that a cache that was filled anew holds the same bits.
        """
        for indices in length_sorted_batches(records, batch_size):
            chosen = [records[i] for i in indices]
            if not cache.holds(chosen):
                prepared = self.prepare(collate(chosen, pad_id).to(self.model.device))
                cache.add("input", chosen, prepared.hidden)
                cache.add("output", chosen, prepared.frozen)
        if self._as_tuple is None:  # all was there: one token shows how layers answer
            self.prepare(collate([Encoded((pad_id,), 0)], pad_id).to(self.model.device))
        self._cache = cache

    def rely_on(self, cache: ActivationCache, *, as_tuple: bool) -> None:
        """Read from a cache that was filled elsewhere and holds all there will be; the prefix may be on meta then.

        Args:
            cache: of this model and these layers.
            as_tuple: see :func:`bypassed`.
        """
        self._cache, self._as_tuple = cache, as_tuple

    def identity(self) -> str:
        """Hash of all that :meth:`prepare` depends on but the tokens: weights, layers, dtype, device, versions."""
        import transformers

        facts = (self.first, self.target, str(self.model.device), torch.__version__, transformers.__version__)
        digest = hashlib.sha256(repr((facts, self.model.config.to_json_string())).encode())
        last = re.compile(rf"{re.escape(self.stack_name)}\.(\d+)\.")
        for name, value in self.model.named_parameters():
            found = last.match(name)
            if found is None or int(found[1]) <= self.target:
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def release(self) -> None:
        """Let go of all weights that steps on cached records do not read: the prefix, the trained tensors' originals.

        The model is of no other use afterwards.
        """
        for layer in self._prefix:
            layer.to("meta")
        for index, layer in enumerate(self._span, start=self.first):
            for name in self._scopes.get(index, ()):
                path, _, leaf = name.rpartition(".")
                original = layer.get_parameter(name)
                setattr(layer.get_submodule(path), leaf, nn.Parameter(original.to("meta"), requires_grad=False))

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Prepared:
        """Run the original model up to the target layer and keep what :meth:`updated` needs.

        Records that are cached are read; the model then only says how its layers are to be called.
        """
        cached = self._cache is not None and self._cache.holds(batch.records)
        calls: list[LayerCall] = []
        hidden: list[Tensor] = []
        outputs: list[Tensor] = []

        def keep_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            states = args[0] if args else rest.pop("hidden_states")
            if not hidden:
                hidden.append(states)
            calls.append(LayerCall(tuple(args[1:]), rest))

        def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs.append(first_tensor(output))
            if not cached:
                self._as_tuple = isinstance(output, tuple)
            raise LayerReachedError

        handles = [layer.register_forward_pre_hook(keep_call, with_kwargs=True) for layer in self._span]
        handles.append(self._span[-1].register_forward_hook(stop))
        try:
            with bypassed((*self._prefix, *self._span) if cached else (), as_tuple=bool(self._as_tuple)):
                self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        except LayerReachedError:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if not cached:
            return Prepared(hidden[0], tuple(calls), outputs[0])
        assert self._cache is not None
        width, device = batch.input_ids.shape[1], batch.input_ids.device
        return Prepared(
            self._cache.read("input", batch.records, width, device),
            tuple(calls),
            self._cache.read("output", batch.records, width, device),
        )

    def updated(self, prepared: Prepared, masters: Mapping[str, Tensor]) -> Tensor:
        """Output of the target layer with ``masters`` in place of the original tensors, with gradients.

        Returns:
            ``(batch, length, hidden)``.
        """
        hidden = prepared.hidden
        for index, (layer, call) in enumerate(zip(self._span, prepared.calls, strict=True), start=self.first):
            prefix = f"{self.stack_name}.{index}."
            names = self._scopes.get(index, [])
            # Not one dtype for all: some models keep norms or routers in fp32.
            weights = {name: masters[prefix + name].to(layer.get_parameter(name).dtype) for name in names}
            hidden = first_tensor(functional_call(layer, weights, (hidden, *call.args), dict(call.kwargs)))
        return hidden


@contextlib.contextmanager
def replaced(model: PreTrainedModel, masters: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block ``model`` computes with ``masters`` (cast to its dtype); after it, with its own tensors."""
    parameters = dict(model.named_parameters())
    kept = {name: parameters[name].data for name in masters}
    try:
        for name, value in masters.items():
            parameters[name].data = value.detach().to(parameters[name])
        yield
    finally:
        for name, value in kept.items():
            parameters[name].data = value
