"""A whole model that lies on several ranks: each holds a part of every tensor (FSDP2 ``fully_shard``).

The trained model is a copy of its own in fp32, which computes in the checkpoint's dtype; its local parts are the
masters. The original stays beside it, sharded as well, for as long as a method wants a reference. Every decoder layer
is gathered when it runs and let go behind it; embedding and head, with all else outside of the layers, stay gathered
from the forward pass to the end of the backward pass, since the head is used after the model has run.

Every pass is collective: all ranks run the same number of them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.methods.whole_model import WholeModel
from falcon_unlearn.model.decoder import find_layers
from falcon_unlearn.objectives.vocabulary import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Body(nn.Module):
    """The model without its head, but with the head's weights: one root that gathers both."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **arguments: Any) -> Tensor:
        hidden: Tensor = self.model.base_model(**arguments).last_hidden_state
        return hidden


def _sharded(model: PreTrainedModel, device: torch.device, compute: torch.dtype | None) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    body = _Body(model)
    for layer in find_layers(model)[1]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(body, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in body.modules():
        if isinstance(module, FSDPModule):  # sums, not means: losses are divided by what the whole batch counts
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return body


class ShardedWholeModel(WholeModel):
    """A :class:`~falcon_unlearn.methods.whole_model.WholeModel` that lies on all ranks.

    Args:
        model: from transformers, with its head, all parameters of one dtype; it is taken over.
        device: of this rank.
        layers: as there.
        modules: as there.

    Raises:
        UserError: as there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        layers: Sequence[int] | None = None,
        modules: str | Sequence[str] = "all",
    ) -> None:
        super().__init__(model, layers, modules)
        dtype = next(model.parameters()).dtype
        trained = copy.deepcopy(model).float()
        for name, parameter in trained.named_parameters():
            parameter.requires_grad_(name in self.parameter_names)
        self._trained = trained
        self._trained_stack = find_layers(trained)[1]
        self._bodies = {
            True: _sharded(trained, device, None if dtype == torch.float32 else dtype),
            False: _sharded(model, device, None),
        }
        parameters = dict(trained.named_parameters())
        self.sharded: dict[str, Any] = {name: parameters[name] for name in self.parameter_names}
        """The trained parameters (DTensors) by name."""

    def masters(self) -> dict[str, Tensor]:
        """This rank's parts of the trained tensors, which share their memory; a part may be empty."""
        return {name: parameter.to_local().detach().requires_grad_() for name, parameter in self.sharded.items()}

    def placeholders(self) -> dict[str, Tensor]:
        """The trained tensors' names and shapes, on meta."""
        return {name: torch.empty(parameter.shape, device="meta") for name, parameter in self.sharded.items()}

    def whole(self, *, keep: bool) -> dict[str, Tensor]:
        """The trained tensors as they are now, whole, on the CPU; all ranks take part, those that ``keep`` get them."""
        result = {}
        for name, parameter in self.sharded.items():
            value = parameter.full_tensor().detach()
            if keep:
                result[name] = value.cpu()
        return result

    def release(self) -> None:
        """Let go of the original; the model that was given is of no other use afterwards."""
        from torch.distributed.fsdp import FSDPModule

        for module in self._bodies.pop(False).modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for parameter in self.model.parameters():
            assert isinstance(parameter, DTensor)
            parameter.to_local().untyped_storage().resize_(0)
        self.model = self._trained
        self._stack = self._trained_stack

    def _layers(self, masters: Mapping[str, Tensor] | None) -> nn.ModuleList:
        return self._stack if masters is None else self._trained_stack

    def _forward(self, batch: Batch, masters: Mapping[str, Tensor] | None) -> tuple[Tensor, Head]:
        model = self.model if masters is None else self._trained
        with torch.set_grad_enabled(masters is not None and torch.is_grad_enabled()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            hidden = self._bodies[masters is not None](
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
            head = self._head(dict(model.named_parameters(remove_duplicate=False)))
            return hidden, head.detach() if masters is None else head
