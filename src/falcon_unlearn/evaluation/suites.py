"""What suites there are: one line each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from falcon_unlearn.config import Section
from falcon_unlearn.evaluation.muse import MuseConfig
from falcon_unlearn.evaluation.own import OwnConfig
from falcon_unlearn.evaluation.privacy import PrivacyConfig
from falcon_unlearn.evaluation.suite import Suite
from falcon_unlearn.evaluation.tofu import TofuConfig
from falcon_unlearn.evaluation.wmdp import WmdpConfig


class SuitesConfig(Section):
    """Which suites are run; a suite that is named with an empty mapping runs with its defaults."""

    tofu: TofuConfig | None = None
    """TOFU: forget quality and model utility on fictitious authors."""
    muse: MuseConfig | None = None
    """MUSE: verbatim and knowledge memorisation and privacy leakage on news or books."""
    wmdp: WmdpConfig | None = None
    """WMDP, MMLU and WikiText through lm-evaluation-harness."""
    own: OwnConfig | None = None
    """Probes from your own documents, judged against documents no model ever saw."""
    privacy: PrivacyConfig | None = None
    """Membership inference and extraction on forget and never-seen records."""

    def chosen(self) -> dict[str, TofuConfig | MuseConfig | WmdpConfig | OwnConfig | PrivacyConfig]:
        """The suites to run, by name."""
        return {name: value for name in SUITES if (value := getattr(self, name)) is not None}


SUITES: Mapping[str, str] = {
    "tofu": "forget quality and model utility on fictitious authors (Maini et al. 2024)",
    "muse": "verbatim memorisation, knowledge and privacy leakage on news or books (Shi et al. 2024)",
    "wmdp": "hazardous knowledge, MMLU, WikiText through lm-evaluation-harness (Li et al. 2024)",
    "own": "probes from your own documents, judged without an oracle",
    "privacy": "membership inference and extraction on forget against never-seen records",
}


def open_suites(config: SuitesConfig, base_dir: Path, seed: int) -> dict[str, Suite]:
    """Read and check everything the chosen suites need.

    Raises:
        UserError: naming the key, the file or dataset page, and what to do.
    """
    return {name: chosen.open(base_dir, seed) for name, chosen in config.chosen().items()}
