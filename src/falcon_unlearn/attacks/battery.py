"""Which attacks are run, and how long all of them may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from falcon_unlearn.attacks.base import AttackConfig
from falcon_unlearn.attacks.gcg import GcgConfig, TransferConfig
from falcon_unlearn.attacks.logit_lens import LogitLensConfig
from falcon_unlearn.attacks.orthogonalization import OrthogonalizeConfig
from falcon_unlearn.attacks.probing import ProbeConfig
from falcon_unlearn.attacks.prompting import PromptConfig
from falcon_unlearn.attacks.quantization import QuantizeConfig
from falcon_unlearn.attacks.relearning import RelearnConfig
from falcon_unlearn.attacks.weights import InterpolateConfig, PruneConfig
from falcon_unlearn.config import Section
from falcon_unlearn.corpus.sources import SourceConfig
from falcon_unlearn.errors import did_you_mean

ATTACKS: Mapping[str, str] = {
    "relearn": "finetuning on a few forget facts, retain text or neighbours",
    "gcg": "a trigger found by greedy coordinate gradient (plain or enhanced)",
    "logit-lens": "answers read off every layer and component",
    "prompt": "conversational, role play, translation, prefix and few-shot prompts",
    "quantize": "int8 and 4-bit weights",
    "orthogonalize": "the unlearning direction taken out of the residual stream",
    "prune": "small weights set to zero",
    "interpolate": "weights between the original and the unlearned model",
    "probe": "a linear probe on hidden states, with a control task",
    "transfer": "a trigger found elsewhere",
}
AUDIT = "audit"
"""All attacks but transfer, which needs a trigger."""


class BatteryConfig(Section):
    """The attacks to run, by name, each with its knobs (an empty mapping for the defaults); a list of names will do."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    relearn: RelearnConfig | None = None
    """Finetuning on a few forget facts, retain text or neighbours."""
    gcg: GcgConfig | None = None
    """A trigger found by greedy coordinate gradient."""
    logit_lens: LogitLensConfig | None = Field(None, alias="logit-lens")
    """Answers read off every layer and component."""
    prompt: PromptConfig | None = None
    """Conversational, role play, translation, prefix and few-shot prompts."""
    quantize: QuantizeConfig | None = None
    """int8 and 4-bit weights."""
    orthogonalize: OrthogonalizeConfig | None = None
    """The unlearning direction taken out of the residual stream."""
    prune: PruneConfig | None = None
    """Small weights set to zero."""
    interpolate: InterpolateConfig | None = None
    """Weights between the original and the unlearned model."""
    probe: ProbeConfig | None = None
    """A linear probe on hidden states, with a control task."""
    transfer: TransferConfig | None = None
    """A trigger found elsewhere."""
    seconds: float | None = Field(None, gt=0)
    """Time budget of all attacks on all models together; each gets an equal share of what is left."""
    neighbours: SourceConfig | None = None
    """Public-like text near the forget set, which relearn with source neighbours finetunes on."""
    max_records: int | None = Field(200, ge=1)
    """Score at most so many forget records under attack, drawn with the seed; empty: all."""

    @model_validator(mode="before")
    @classmethod
    def _from_names(cls, value: Any) -> Any:
        """``[relearn, logit-lens]`` is short for ``{relearn: {}, logit-lens: {}}``; so is one name."""
        if isinstance(value, str):
            return named([value])
        if isinstance(value, Sequence) and all(isinstance(name, str) for name in value):
            return named(value)
        return value

    def chosen(self) -> dict[str, AttackConfig]:
        """The attacks to run, by name."""
        found = {name: getattr(self, name.replace("-", "_")) for name in ATTACKS}
        return {name: config for name, config in found.items() if config is not None}

    @property
    def needs_original(self) -> bool:
        """Whether an attack compares the model with the original one, so that both must be in memory."""
        return any(config.uses_original for config in self.chosen().values())


def named(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Default settings of the attacks of these names; ``audit`` stands for all but transfer.

    Raises:
        ValueError: an unknown name.
    """
    wanted: dict[str, dict[str, Any]] = {}
    for name in names:
        if name != AUDIT and name not in ATTACKS:
            raise ValueError(
                f"unknown attack '{name}'{did_you_mean(name, ATTACKS)}; known: {', '.join(ATTACKS)}, {AUDIT}"
            )
        wanted |= {each: {} for each in ATTACKS if each != "transfer"} if name == AUDIT else {name: {}}
    return wanted
