"""One file a method: which forward passes feed which objective.

``METHODS`` is the table: a new method is one file, one line here and one test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from falcon_unlearn.methods.adaptive_rmu import AdaptiveRmu, AdaptiveRmuConfig
from falcon_unlearn.methods.base import Editor, Method, Setup, WholeSetup
from falcon_unlearn.methods.ce_u import CeU, CeUConfig
from falcon_unlearn.methods.circuit_breakers import CircuitBreakers, CircuitBreakersConfig
from falcon_unlearn.methods.dpo import Dpo, DpoConfig
from falcon_unlearn.methods.falcon import Falcon, FalconConfig
from falcon_unlearn.methods.falcon_whole import WholeFalcon
from falcon_unlearn.methods.grad_ascent import GradAscent, GradAscentConfig
from falcon_unlearn.methods.grad_diff import GradDiff, GradDiffConfig
from falcon_unlearn.methods.kl_min import KlMin, KlMinConfig
from falcon_unlearn.methods.llmu import Llmu, LlmuConfig
from falcon_unlearn.methods.npo import Npo, NpoConfig
from falcon_unlearn.methods.rmu import Rmu, RmuConfig
from falcon_unlearn.methods.satimp import SatImp, SatImpConfig
from falcon_unlearn.methods.scrub import Scrub, ScrubConfig
from falcon_unlearn.methods.simnpo import SimNpo, SimNpoConfig
from falcon_unlearn.methods.ssd import Ssd, SsdConfig
from falcon_unlearn.methods.task_vector import TaskVector, TaskVectorConfig
from falcon_unlearn.methods.undial import Undial, UndialConfig
from falcon_unlearn.methods.wga import Wga, WgaConfig
from falcon_unlearn.methods.whole_model import WholeModel

__all__ = [
    "METHODS",
    "AdaptiveRmu",
    "AdaptiveRmuConfig",
    "CeU",
    "CeUConfig",
    "CircuitBreakers",
    "CircuitBreakersConfig",
    "Dpo",
    "DpoConfig",
    "Editor",
    "Falcon",
    "FalconConfig",
    "GradAscent",
    "GradAscentConfig",
    "GradDiff",
    "GradDiffConfig",
    "KlMin",
    "KlMinConfig",
    "Llmu",
    "LlmuConfig",
    "Method",
    "MethodConfig",
    "MethodEntry",
    "Npo",
    "NpoConfig",
    "Rmu",
    "RmuConfig",
    "SatImp",
    "SatImpConfig",
    "Scrub",
    "ScrubConfig",
    "Setup",
    "SimNpo",
    "SimNpoConfig",
    "Ssd",
    "SsdConfig",
    "TaskVector",
    "TaskVectorConfig",
    "Undial",
    "UndialConfig",
    "Wga",
    "WgaConfig",
    "WholeFalcon",
    "WholeModel",
    "WholeSetup",
    "entry_of",
]

MethodConfig = Annotated[
    FalconConfig
    | RmuConfig
    | AdaptiveRmuConfig
    | CircuitBreakersConfig
    | GradAscentConfig
    | GradDiffConfig
    | KlMinConfig
    | LlmuConfig
    | WgaConfig
    | SatImpConfig
    | CeUConfig
    | UndialConfig
    | DpoConfig
    | NpoConfig
    | SimNpoConfig
    | ScrubConfig
    | SsdConfig
    | TaskVectorConfig,
    Field(discriminator="name"),
]

Kind = Literal["representation", "whole", "edit"]
"""representation: trains layers of the split decoder; whole: trains the whole model; edit: changes weights by rule."""


@dataclass(frozen=True)
class MethodEntry:
    """One line of the table.

    ``build`` gets the config and a :class:`Setup` (representation) or a :class:`WholeSetup` (whole, edit), and gives a
    :class:`Method` or an :class:`Editor` (edit). ``alternatives``: which other answers to the forget questions the
    method needs.
    """

    config: Any
    build: Callable[[Any, Any], Any]
    kind: Kind
    summary: str
    alternatives: Literal["dont_know", "random", "stand_in"] | None = None


_FALCON = "contrastive unalignment: from one layer's activations to an offset vector, or of all layers to stand-ins"

METHODS: Mapping[str, MethodEntry] = {
    "falcon": MethodEntry(FalconConfig, Falcon, "representation", _FALCON),
    "rmu": MethodEntry(RmuConfig, Rmu, "representation", "steers forget activations to a random direction"),
    "adaptive_rmu": MethodEntry(
        AdaptiveRmuConfig, AdaptiveRmu, "representation", "RMU with a coefficient that follows each token's norm"
    ),
    "circuit_breakers": MethodEntry(
        CircuitBreakersConfig, CircuitBreakers, "representation", "turns forget activations away from where they were"
    ),
    "grad_ascent": MethodEntry(GradAscentConfig, GradAscent, "whole", "raises the loss on the forget data"),
    "grad_diff": MethodEntry(GradDiffConfig, GradDiff, "whole", "gradient ascent with a retain loss"),
    "kl_min": MethodEntry(KlMinConfig, KlMin, "whole", "gradient ascent, near the original model on the retain data"),
    "llmu": MethodEntry(
        LlmuConfig, Llmu, "whole", "ascent, random answers, KL on the retain data", alternatives="random"
    ),
    "wga": MethodEntry(WgaConfig, Wga, "whole", "gradient ascent weighted by probability"),
    "satimp": MethodEntry(SatImpConfig, SatImp, "whole", "gradient ascent weighted by saturation and importance"),
    "ce_u": MethodEntry(CeUConfig, CeU, "whole", "cross-entropy to the own distribution without the right token"),
    "undial": MethodEntry(UndialConfig, Undial, "whole", "self-distillation with the right token's logit lowered"),
    "dpo": MethodEntry(
        DpoConfig, Dpo, "whole", 'prefers "I don\'t know" (IdkDPO with retain: none)', alternatives="dont_know"
    ),
    "npo": MethodEntry(NpoConfig, Npo, "whole", "negative preference optimisation (retain: none, nll or kl)"),
    "simnpo": MethodEntry(SimNpoConfig, SimNpo, "whole", "NPO on mean log-probabilities, without a reference"),
    "scrub": MethodEntry(
        ScrubConfig, Scrub, "whole", "away from the teacher on forget data, along with it on retain data, in turns"
    ),
    "ssd": MethodEntry(SsdConfig, Ssd, "edit", "dampens weights that matter more for the forget data"),
    "task_vector": MethodEntry(
        TaskVectorConfig, TaskVector, "edit", "finetunes on the forget data and goes the other way"
    ),
}

_WHOLE_FALCON = MethodEntry(FalconConfig, WholeFalcon, "whole", _FALCON, alternatives="stand_in")


def entry_of(config: Any) -> MethodEntry:
    """The line of the table that a validated config asks for; FALCON with stand-ins has one of its own."""
    if isinstance(config, FalconConfig) and config.positives == "stand_in":
        return _WHOLE_FALCON
    return METHODS[config.name]
