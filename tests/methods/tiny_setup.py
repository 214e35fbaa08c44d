"""A split random Llama, three invented streams and both losses of a method, for the tests of methods."""

from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from falcon_unlearn.corpus.batching import Batch, Encoded
from falcon_unlearn.engine.trainer import TrainingData
from falcon_unlearn.model.decoder import SplitDecoder

HIDDEN = 32


def records(seed, count, *, tokens):
    """Random records over a range of tokens of their own, so that domains differ."""
    generator = torch.Generator().manual_seed(seed)
    return [Encoded(tuple(torch.randint(*tokens, (8 + i % 5,), generator=generator).tolist()), 3) for i in range(count)]


def build_decoder(layers, target):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=90, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return SplitDecoder(LlamaForCausalLM(config).eval().requires_grad_(False), (target,), "mlp")


def build_data():
    forget = {"bio": records(1, 8, tokens=(3, 30)), "cyber": records(2, 8, tokens=(30, 60))}
    return TrainingData(forget, {"retain": records(3, 24, tokens=(60, 90))}, 0, torch.device("cpu"))


class Losses(NamedTuple):
    forget: torch.Tensor
    retain: torch.Tensor


def losses_of(method, step, domain, forget, retain, masters):
    return Losses(method.forget_loss(step, domain, forget, masters), method.retain_loss(step, retain, masters))


def widened(batch, by=6):
    """The same records with more padding, filled with a token that exists."""

    def pad(value, fill):
        return torch.nn.functional.pad(value, (0, by), value=fill)

    return Batch(
        pad(batch.input_ids, 11),
        pad(batch.attention_mask, 0),
        pad(batch.answer_mask, False),
        pad(batch.content_mask, False),
    )
