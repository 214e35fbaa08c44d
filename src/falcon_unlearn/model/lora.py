"""Low-rank adapters: train ``W + alpha / rank * B A`` in place of W (Hu et al. 2022, arXiv 2106.09685), through peft.

peft puts its layers into the model, and their two matrices are trained like any tensors: whoever runs part of a model
with masters in place of its own takes :data:`ADAPTER_TENSORS` for its ``modules``. The model's own adapters keep
B = 0, so the model itself stays the original, to the bit, and is the frozen reference.

Nothing is checkpointed, so ``enable_input_require_grads`` is not needed: gradients reach an adapter from above,
whether or not its input has one. (peft calls it by itself for a model that has gradient checkpointing on.)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from falcon_unlearn.artifacts import replacing, write_json
from falcon_unlearn.config import Section
from falcon_unlearn.errors import UserError
from falcon_unlearn.model.decoder import find_layers, scope_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_TENSORS = ("lora_A.default", "lora_B.default")
"""Scope of a model with adapters, for ``modules`` of :func:`falcon_unlearn.model.decoder.scope_parameters`."""


class LoraConfig(Section):
    """Train low-rank adapters in place of the matrices themselves."""

    rank: int = Field(8, ge=1)
    """Rank of the change."""
    alpha: float = Field(16.0, gt=0)
    """The change is scaled by alpha / rank."""
    keep_adapter: bool = False
    """Beside the patch, which is merged, write the folder adapter for peft's PeftModel.from_pretrained."""


def linear_modules(model: PreTrainedModel, layers: Sequence[int], modules: str | Sequence[str]) -> list[str]:
    """Names of the linear modules that get adapters.

    Args:
        model: any decoder from transformers; its weights are not read.
        layers: decoder layers.
        modules: as for :func:`falcon_unlearn.model.decoder.scope_parameters`; norms and biases are passed over.

    Raises:
        UserError: a matrix is not of a plain linear module (fused experts, routers), or there is none.
    """
    from transformers.pytorch_utils import Conv1D

    stack_name, stack = find_layers(model)
    result = []
    for index in sorted(layers):
        for name in scope_parameters(stack[index], modules):
            path, _, leaf = name.rpartition(".")
            module = stack[index].get_submodule(path)
            if stack[index].get_parameter(name).ndim < 2:
                continue
            if leaf != "weight" or not isinstance(module, nn.Linear | Conv1D):
                raise UserError(
                    f"training.lora: {name} belongs to {type(module).__name__}, no plain linear module, and can have "
                    "no adapter: name other training.modules (such as attention), or train without lora"
                )
            result.append(f"{stack_name}.{index}.{path}")
    if not result:
        raise UserError(f"training.lora: there is no matrix in training.modules {modules!r}")
    return result


@dataclass(frozen=True, eq=False)
class Adapters:
    """Adapters inside a model.

    Attributes:
        config: rank and scale.
        modules: names of the modules that have one.
        peft_model: peft's wrapper around the model.
    """

    config: LoraConfig
    modules: tuple[str, ...]
    peft_model: Any

    @property
    def model(self) -> PreTrainedModel:
        """The model they are in."""
        model: PreTrainedModel = self.peft_model.base_model.model
        return model

    def originals(self) -> dict[str, Tensor]:
        """The frozen weights that have adapters, under the names of the model without; not copied."""
        return {f"{name}.weight": self.model.get_submodule(name).get_base_layer().weight for name in self.modules}

    @torch.no_grad()
    def merged(self, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W + alpha / rank * B A in fp32 on the CPU, under the names of the model without adapters.

        Args:
            masters: trained adapter tensors by name.
        """
        result = {}
        for name, (key, weight) in zip(self.modules, self.originals().items(), strict=True):
            a, b = (masters[f"{name}.{part}.weight"] for part in ADAPTER_TENSORS)
            change = b @ a
            if self.model.get_submodule(name).fan_in_fan_out:
                change = change.T
            merged = torch.add(weight, change, alpha=self.config.alpha / self.config.rank)
            result[key] = merged.cpu()  # all of them in fp32 may be twice the model
        return result

    def save(self, folder: Path, masters: Mapping[str, Tensor], base_model: str) -> None:
        """Write a folder that ``PeftModel.from_pretrained`` puts onto the whole model, exact to the bit.

        Args:
            folder: created if it does not exist.
            masters: trained adapter tensors by name.
            base_model: folder or hub id, for whoever loads the adapters by themselves.
        """
        model = self.model
        outer = f"{model.base_model_prefix}." if model.base_model is model else ""  # loaded without its head
        config = _for_peft(self.config, model, self.modules).to_dict()
        config |= {
            "base_model_name_or_path": base_model,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "target_modules": sorted(outer + name for name in self.modules),
        }
        tensors = {
            f"base_model.model.{outer}{name.replace('.default.', '.')}": value.detach().cpu().contiguous()
            for name, value in masters.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "adapter_model.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", config)

    def remove(self) -> None:
        """Give the model back as it was."""
        self.peft_model.unload()


def add_adapters(
    model: PreTrainedModel, config: LoraConfig, layers: Sequence[int], modules: str | Sequence[str], seed: int
) -> Adapters:
    """Put adapters into ``model``, in fp32 whatever its dtype; it computes what it did before.

    Args:
        model: any decoder from transformers, with or without its head.
        config: rank and scale.
        layers: decoder layers.
        modules: as for :func:`linear_modules`.
        seed: of the random A; B is 0.

    Raises:
        UserError: peft is not installed, or see :func:`linear_modules`.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("training.lora needs peft: pip install 'falcon-unlearn[lora]'") from error
    names = tuple(linear_modules(model, layers, modules))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft draws on the CPU
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        wrapper = peft.get_peft_model(model, _for_peft(config, model, names))
    model.requires_grad_(False)
    return Adapters(config, names, wrapper)


def _for_peft(config: LoraConfig, model: PreTrainedModel, names: Sequence[str]) -> Any:
    import peft
    from transformers.pytorch_utils import Conv1D

    first = model.get_submodule(names[0])
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(names),
        fan_in_fan_out=isinstance(getattr(first, "base_layer", first), Conv1D),
    )
