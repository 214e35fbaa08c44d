"""What a recipe gets where it says nothing: one table of settings per method and preset.

A preset is laid under the user's recipe, key by key, before validation; whatever the recipe says wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PUBLISHED_FALCON: Mapping[str, Any] = {
    "corpus": {"loss_mask": "all"},
    "selection": {"span": 3},
    "training": {"steps": 80, "batch_size": 4, "modules": "down_proj", "gradients": {"combination": "falcon"}},
}


def _whole(lr: float, **method: Any) -> dict[str, Any]:
    """All parameters, gradients summed as the papers do; ``lr`` at width 128."""
    return {
        "corpus": {"loss_mask": "answer"},
        "method": method,
        "selection": {"layers": "all"},
        "training": {
            "steps": 60,
            "batch_size": 16,
            "modules": "all",
            "cache": "never",
            "optimizer": {"name": "adamw", "lr": "auto", "lr_at_width_128": lr},
            "gradients": {"combination": "sum"},
        },
    }


def _layer(lr: float, **method: Any) -> dict[str, Any]:
    """All MLP matrices of one layer; ``lr`` at width 128."""
    return {
        "corpus": {"loss_mask": "answer"},
        "method": method,
        "selection": {"selector": "sweep", "span": 1},
        "training": {
            "steps": 100,
            "batch_size": 16,
            "modules": "mlp",
            "optimizer": {"name": "adamw", "lr": "auto", "lr_at_width_128": lr},
            "gradients": {"combination": "sum"},
        },
    }


_STAND_IN: Mapping[str, Any] = {
    "representation_weight": 0.0,
    "distillation_weight": 0.3,
    "hinge_weight": 0.2,
    "floor_weight": 0.2,
    "least_level": 1e-6,
    "retain_weight": 3.0,
    "retain_representation_weight": 9.0,
}

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "falcon": {
        # Both chosen on the embedded benchmark with seeds that the README's figures do not use: see docs/science.md.
        "default": {
            **_whole(5e-4, positives="stand_in", stand_in=_STAND_IN),
            "corpus": {"loss_mask": "answer", "self_samples": {"count": 256}},
            "selection": {"layers": "auto"},
            "training": {
                **_whole(5e-4)["training"],
                "interpolation": 0.5,
                "gradients": {"combination": "falcon", "conflict_weights": [1.0, 1.0], "aligned_weights": [1.0, 1.0]},
            },
        },
        "layer": {
            "corpus": {"loss_mask": "all"},
            "method": {"offset": "paper", "offset_variance": 0.9, "retain_weight": 1.0},
            "selection": {"selector": "sweep", "span": 1},
            "training": {
                "steps": 100,
                "batch_size": 32,
                "modules": "mlp",
                "optimizer": {"name": "adamw", "lr": "auto"},
                "gradients": {"combination": "falcon"},
            },
        },
        # Zephyr-7B, WMDP: Hu et al. 2025, section 5.1 and appendix.
        "paper": {
            **_PUBLISHED_FALCON,
            "method": {"offset": "paper", "offset_variance": 0.9, "retain_weight": 100.0},
            "selection": {"selector": "mutual_information", "span": 3},
            "training": {
                **_PUBLISHED_FALCON["training"],
                "optimizer": {"name": "sophia", "lr": 5e-5, "betas": [0.965, 0.99], "hessian": "ema_grad2"},
            },
        },
        "published_code": {
            **_PUBLISHED_FALCON,
            "method": {"offset": "published_code", "offset_refresh": "step", "retain_weight": 100.0},
            "selection": {"selector": "mutual_information", "span": 3},
            "training": {
                **_PUBLISHED_FALCON["training"],
                "optimizer": {
                    "name": "sophia",
                    "lr": 5e-5,
                    "betas": [0.965, 0.99],
                    "rho": 0.9,
                    "weight_decay": 1e-3,
                    "hessian": "published_code",
                },
            },
        },
    },
    "rmu": {
        "default": _layer(3e-3),
        # Zephyr-7B: Li et al. 2024 (layers 5-7, down_proj, c = 6.5, alpha = 1200, 150 batches of 4).
        "paper": {
            "corpus": {"loss_mask": "all"},
            "method": {"steering_coefficient": 6.5, "retain_weight": 1200.0},
            "selection": {"layers": [5, 6, 7], "span": 3},
            "training": {
                "steps": 150,
                "batch_size": 4,
                "modules": "down_proj",
                "optimizer": {"name": "adamw", "lr": 5e-5},
                "gradients": {"combination": "sum"},
            },
        },
    },
    "adaptive_rmu": {"default": _layer(3e-3)},
    "circuit_breakers": {"default": _layer(3e-3, schedule_steps=100)},
    "grad_ascent": {"default": _whole(1e-4)},
    "grad_diff": {"default": _whole(3e-4)},
    "kl_min": {"default": _whole(3e-4)},
    "llmu": {"default": _whole(3e-4)},
    "wga": {"default": _whole(3e-4)},
    "satimp": {"default": _whole(3e-4)},
    "ce_u": {"default": _whole(1e-4)},
    "undial": {"default": _whole(3e-4)},
    "dpo": {"default": _whole(3e-4)},
    "npo": {"default": _whole(3e-4)},
    "simnpo": {"default": _whole(3e-4)},
    "scrub": {"default": _whole(3e-4)},
    # Forget data that is a tenth of all cannot matter more than ten times as much: the published 10 selects nothing.
    "ssd": {"default": _whole(3e-4, alpha=2.5)},
    "task_vector": {"default": _whole(3e-4)},
}


def deep_merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``under``; mappings are merged key by key, everything else is replaced."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = deep_merge(below, value) if both and below is not None else value
    return merged
