"""A tiny whole model in fp64, records of all lengths, and the plain way to their logits, for the tests of methods."""

import copy
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from falcon_unlearn.corpus.batching import Batch, Encoded, collate
from falcon_unlearn.methods import WholeModel, WholeSetup
from falcon_unlearn.model.activation_cache import record_key

sys.path.append(str(Path(__file__).parents[1] / "model"))
from tiny_models import ARCHITECTURES, FORGET_BATCH, RETAIN_BATCH, build_model, random_records

__all__ = ["ARCHITECTURES", "FORGET_BATCH", "RETAIN_BATCH", "build_model", "random_records"]

VOCABULARY = 41
SEED = 4


def build_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().double().requires_grad_(False)


def encoded(seed, shapes):
    """Random records of (length, answer start)."""
    generator = torch.Generator().manual_seed(seed)
    return [Encoded(tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()), a) for n, a in shapes]


FORGET = {
    "bio": encoded(1, [(9, 4), (6, 5), (12, 3), (7, 4), (10, 2)]),
    "cyber": encoded(2, [(8, 3), (11, 6), (5, 2)]),
}
RETAIN = encoded(3, [(7, 3), (12, 4), (9, 8), (6, 2), (10, 5), (8, 4)])


def alternatives_of(record, count=3):
    """Random answers, shorter and longer, after the prompt of ``record``."""
    answers = encoded(hash(record.ids) % 2**31, [(2 + i, 0) for i in range(count)])
    return tuple(Encoded(record.ids[: record.answer_start] + a.ids, record.answer_start) for a in answers)


def whole_setup(model=None, loss_mask="answer", **changes):
    whole = WholeModel(build_llama() if model is None else model)
    batches = {name: [collate(records[i : i + 2], 0) for i in range(0, len(records), 2)]
               for name, records in FORGET.items()}  # fmt: skip
    alternatives = {record_key(r): alternatives_of(r) for records in FORGET.values() for r in records}
    return WholeSetup(**{"model": whole, "forget_batches": batches, "alternatives": alternatives,
                         "loss_mask": loss_mask, "pad_id": 0, "seed": SEED, **changes})  # fmt: skip


def moved(masters, by=0.05, seed=8):
    """Masters away from the original weights."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (value.detach() + by * torch.randn(value.shape, generator=generator)).requires_grad_()
        for name, value in masters.items()
    }


def wider(batch, by=5):
    """The same records with more padding, filled with a token that exists."""

    def pad(value, fill):
        return F.pad(value, (0, by), value=fill)

    masks = (pad(batch.attention_mask, 0), pad(batch.answer_mask, False), pad(batch.content_mask, False))
    return Batch(pad(batch.input_ids, 11), *masks, batch.records)


class Plain:
    """A second whole model with ``masters`` as its parameters, run by transformers, all logits at once."""

    def __init__(self, model, masters=None):
        self.model = copy.deepcopy(model)
        parameters = dict(self.model.named_parameters())
        for name, value in (masters or {}).items():
            parameters[name].data = value.detach().to(parameters[name].dtype)
        self.parameters = {name: parameters[name].requires_grad_() for name in masters or {}}

    def scores(self, batch, loss_mask="answer"):
        """For each record: logits that predict its counted tokens (n, V), and these tokens (n,)."""
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        result = []
        for row, record in enumerate(batch.records):
            first = record.answer_start if loss_mask == "answer" else record.content_start
            positions = list(range(max(first, 1), len(record)))
            wanted = torch.tensor([record.ids[t] for t in positions], dtype=torch.long)
            result.append((logits[row, [t - 1 for t in positions]], wanted))
        return result

    def log_probabilities(self, batch, loss_mask="answer"):
        """For each record those of its counted tokens, ``(n,)``."""
        return [F.log_softmax(z, -1).gather(1, y[:, None])[:, 0] for z, y in self.scores(batch, loss_mask)]

    def gradients(self, loss):
        return dict(zip(self.parameters, torch.autograd.grad(loss, self.parameters.values()), strict=True))


def gradients(loss, masters):
    return dict(zip(masters, torch.autograd.grad(loss, masters.values()), strict=True))


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), msg=lambda m, n=name: f"{n}: {m}", **tolerance)
