"""The tiny model before unlearning, after it and its oracle, in memory, with the records of a battery."""

import copy
import functools
import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import FORGET_ROWS, RETAIN_ROWS
from torch.nn import functional as F

from falcon_unlearn.attacks.base import AttackData, Target, split_facts
from falcon_unlearn.corpus.batching import Encoder, collate
from falcon_unlearn.corpus.records import record_from_row
from falcon_unlearn.model.loading import load_causal_lm, load_tokenizer, resolve_model


@dataclass(frozen=True)
class Attacked:
    """The three models; nobody changes them."""

    original: Any
    unlearned: Any
    oracle: Any
    encoder: Encoder
    data: AttackData

    def target(self, name="unlearned", *, known=4, seed=0, **changes):
        """One of them under attack."""
        mine, rest = split_facts(self.data, known, seed)
        return Target(
            **{
                "model": getattr(self, name),
                "encoder": self.encoder,
                "known": mine,
                "rest": rest,
                "retain": self.data.retain,
                "utility": self.data.utility,
                "original": self.original,
                "max_new_tokens": 12,
                "seed": seed,
                **changes,
            }
        )


def fingerprint(model):
    """Hash of every tensor of a model, by name."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def mean_loss(model, encoded, pad_id):
    batch = collate(encoded, pad_id)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1][batch.answer_mask[:, 1:]], batch.input_ids[batch.answer_mask])


def unlearn(model, forget, retain, pad_id, steps=60):
    """Gradient difference with a bounded forget loss on one layer's MLP: the knowledge is hidden, not gone."""
    trained = [value for name, value in model.named_parameters() if "layers.1.mlp" in name]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    rng = random.Random(0)
    for _ in range(steps):
        loss = F.relu(1.5 - mean_loss(model, forget, pad_id)) + 2 * mean_loss(model, rng.sample(retain, 16), pad_id)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@functools.cache
def attacked(model_folder: Path, oracle_folder: Path) -> Attacked:
    """Built once a session from the fixtures ``tiny.model`` and ``oracle``."""
    source = resolve_model(str(model_folder), Path(), device="cpu")
    original, encoder = load_causal_lm(source), Encoder(load_tokenizer(source))
    oracle = load_causal_lm(resolve_model(str(oracle_folder), Path(), device="cpu"))
    forget, retain = (tuple(record_from_row(row, "") for row in rows) for rows in (FORGET_ROWS, RETAIN_ROWS))
    unlearned = copy.deepcopy(original).requires_grad_(True)
    unlearn(unlearned, [encoder.encode(r) for r in forget], [encoder.encode(r) for r in retain], encoder.pad_id)
    unlearned.requires_grad_(False)
    return Attacked(original, unlearned, oracle, encoder, AttackData(forget, forget, retain, retain[::4]))
