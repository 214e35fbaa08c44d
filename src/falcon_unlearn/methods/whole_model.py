"""A whole causal language model whose trained tensors live beside it as fp32 masters.

Likelihood methods need the next-token distribution, so the whole model runs. Its own tensors stay what they were:
they are the frozen reference, shared with every tensor that is not trained. Logits are never made for all positions
and words at once; :mod:`falcon_unlearn.objectives.vocabulary` takes them block by block from what is given here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from falcon_unlearn.corpus.batching import Batch, LossMask
from falcon_unlearn.errors import UserError
from falcon_unlearn.model.decoder import find_layers, first_tensor, scope_parameters
from falcon_unlearn.objectives.likelihood import at_counted_tokens
from falcon_unlearn.objectives.vocabulary import Head, target_log_probabilities

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Predictions:
    """What is needed to score the counted tokens of a batch, N of them.

    Attributes:
        hidden: final hidden states at the positions that predict them, ``(N, hidden size)``.
        head: makes logits of them.
        targets: the counted tokens, ``(N,)``.
        mask: where they stand, boolean ``(batch, length)``; never in the first column, which nothing predicts.
    """

    hidden: Tensor
    head: Head
    targets: Tensor
    mask: Tensor

    def log_probabilities(self) -> Tensor:
        """Of the counted tokens, where they stand: ``(batch, length)``, zero elsewhere."""
        return at_counted_tokens(target_log_probabilities(self.hidden, self.head, self.targets), self.mask)


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass: outputs of some layers, and what is needed for the predictions at every position.

    Attributes:
        layers: outputs of the layers asked for, ``(layers, batch, length, hidden size)``.
        final: final hidden states, ``(batch, length, hidden size)``.
        head: makes logits of them.
    """

    layers: Tensor
    final: Tensor
    head: Head

    def predictions(self, batch: Batch, loss_mask: LossMask) -> Predictions:
        """What is needed to score the counted tokens of the batch."""
        mask = batch.loss_mask(loss_mask).clone()
        mask[:, 0] = False
        return Predictions(self.final[:, :-1][mask[:, 1:]], self.head, batch.input_ids[mask], mask)


class WholeModel:
    """A causal language model with its trained tensors set apart.

    Args:
        model: from transformers, with its head; it is never modified (but see :meth:`release`).
        layers: decoder layers whose parameters are trained, or None for all parameters of the model.
        modules: which of their parameters, see :func:`falcon_unlearn.model.decoder.scope_parameters`.

    Raises:
        UserError: the head is not of a known kind, or nothing matches ``modules``.
    """

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[int] | None = None, modules: str | Sequence[str] = "all"
    ) -> None:
        self.model = model
        self.stack_name, self._stack = find_layers(model)
        stack = self._stack
        parameters = dict(model.named_parameters())
        if layers is None:
            self.parameter_names = tuple(parameters)
        else:
            self.parameter_names = tuple(
                f"{self.stack_name}.{i}.{name}" for i in sorted(layers) for name in scope_parameters(stack[i], modules)
            )
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UserError(f"model: the head of {type(model).__name__} is not a plain matrix: not supported")
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._head_weight = names[id(head.weight)]  # the embedding's, where the two are tied
        self._head_bias = None if head.bias is None else names[id(head.bias)]
        self._prefix = f"{model.base_model_prefix}."
        config = model.config.get_text_config(decoder=True)
        self._scale = float(getattr(config, "logit_scale", None) or 1) / float(
            getattr(config, "logits_scaling", None) or 1
        )
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._check_head()

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.get_text_config(decoder=True).hidden_size)

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def masters(self) -> dict[str, Tensor]:
        """Fresh fp32 leaf copies of the trained tensors, by :attr:`parameter_names`."""
        parameters = dict(self.model.named_parameters())
        return {
            name: parameters[name].detach().to(torch.float32, copy=True).requires_grad_()
            for name in self.parameter_names
        }

    def predictions(self, batch: Batch, loss_mask: LossMask, masters: Mapping[str, Tensor] | None) -> Predictions:
        """Run the model over a batch.

        Args:
            batch: right-padded.
            loss_mask: which tokens count.
            masters: trained tensors, with gradients; None for the original model, without.
        """
        return self.run(batch, (), masters).predictions(batch, loss_mask)

    def run(self, batch: Batch, layers: Sequence[int], masters: Mapping[str, Tensor] | None) -> Pass:
        """Run the model over a batch and keep what some of its layers put out.

        Args:
            batch: right-padded.
            layers: indices of decoder layers.
            masters: trained tensors, with gradients; None for the original model, without.
        """
        kept: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
            def hook(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
                kept[layer] = first_tensor(output)

            return hook

        stack = self._layers(masters)
        handles = [stack[layer].register_forward_hook(keep(layer)) for layer in layers]
        try:
            final, head = self._forward(batch, masters)
        finally:
            for handle in handles:
                handle.remove()
        return Pass(torch.stack([kept[layer] for layer in layers]) if layers else final[None][:0], final, head)

    def _layers(self, masters: Mapping[str, Tensor] | None) -> nn.ModuleList:
        """The decoder layers that :meth:`_forward` runs."""
        return self._stack

    def _forward(self, batch: Batch, masters: Mapping[str, Tensor] | None) -> tuple[Tensor, Head]:
        with torch.set_grad_enabled(masters is not None and torch.is_grad_enabled()):
            parameters = dict(self.model.named_parameters())
            # Not one dtype for all: some models keep norms or routers in fp32.
            values = {name: value.to(parameters[name].dtype) for name, value in (masters or {}).items()}
            inside = {n.removeprefix(self._prefix): v for n, v in values.items() if n.startswith(self._prefix)}
            arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
            hidden = functional_call(self.model.base_model, inside, (), arguments).last_hidden_state
            head = self._head({**parameters, **values})
            if masters is None:
                head = head.detach()
            return hidden, head

    def release(self) -> None:
        """Let go of the originals of all trained tensors: there is no reference any more, and no memory for one."""
        parameters = dict(self.model.named_parameters())
        empty = {
            id(parameters[name]): nn.Parameter(parameters[name].to("meta"), requires_grad=False)
            for name in self.parameter_names
        }
        for module in self.model.modules():
            for leaf, parameter in module._parameters.items():
                if id(parameter) in empty:
                    module._parameters[leaf] = empty[id(parameter)]

    def _head(self, values: Mapping[str, Tensor]) -> Head:
        bias = None if self._head_bias is None else values[self._head_bias]
        return Head(values[self._head_weight], bias, self._scale, self._softcap)

    def _check_head(self) -> None:
        """The logits as read here must be the model's own."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(8, device=self.model.device)[None] % vocabulary
        with torch.no_grad():
            expected = self.model(input_ids=ids, use_cache=False).logits.float()
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            found = self._head(dict(self.model.named_parameters())).logits(hidden).float()
        close = found.shape == expected.shape and torch.allclose(
            found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())
        )
        if not close:
            raise UserError(f"model: the head of {type(self.model).__name__} does more than is known of: not supported")
