"""The names a checkpoint uses on disk, which are not always the names of the model in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from falcon_unlearn.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The floating-point dtypes of safetensors that patches are written in."""


def to_disk(model: PreTrainedModel, tensors: Mapping[str, Tensor], on_disk: Collection[str]) -> dict[str, Tensor]:
    """Translate in-memory tensors to the tensors of the checkpoint they were loaded from.

    Experts that transformers fuses in memory become one tensor each again, and the base model's prefix is put back
    where the model was loaded without its head. ``revert_weight_conversion`` is internal to transformers; a test
    guards it.

    Args:
        model: the model whose parameters ``tensors`` are named after, loaded by ``from_pretrained``.
        tensors: in-memory name -> value.
        on_disk: all names of the checkpoint.

    Raises:
        UserError: a tensor that the checkpoint does not have.
    """
    from transformers.core_model_loading import revert_weight_conversion

    converted: dict[str, Tensor] = revert_weight_conversion(model, {k: v.detach() for k, v in tensors.items()})
    result = {}
    for name, value in converted.items():
        candidates = [name, f"{model.base_model_prefix}.{name}", name.removeprefix(f"{model.base_model_prefix}.")]
        found = next((candidate for candidate in candidates if candidate in on_disk), None)
        if found is None:
            raise UserError(f"model: {name} has no counterpart in the checkpoint: its weights cannot be patched")
        result[found] = value
    return result
