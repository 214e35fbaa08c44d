"""Tiny random models of every supported architecture, and two padded batches."""

import functools

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from falcon_unlearn.corpus.batching import Encoded, collate

LAYERS = 5
VOCABULARY = 67

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
ARCHITECTURES = {
    "llama": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "mistral": {**GROUPED, "sliding_window": 6},
    "gemma2": {**GROUPED, "head_dim": 8, "sliding_window": 6},
    "gemma3_text": {**GROUPED, "head_dim": 8, "sliding_window": 6},
    "phi3": GROUPED,
    "gpt_neox": COMMON,
    "gpt2": {
        "vocab_size": VOCABULARY,
        "initializer_range": 0.15,
        "n_embd": 32,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
MIXTURES = ("mixtral", "qwen3_moe")


def build_model(architecture, seed=0, **changes):
    """A random model in eval mode in which every parameter matters (no zero biases, no unit norms)."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[architecture](**{**ARCHITECTURES[architecture], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


@functools.cache
def shared_model(architecture):
    """One model for all tests of an architecture: whoever changes it puts it back."""
    return build_model(architecture)


def random_records(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    return [
        Encoded(tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()), length // 3)
        for length in lengths
    ]


FORGET_BATCH = collate(random_records(1, (9, 17, 13)), pad_id=0)
RETAIN_BATCH = collate(random_records(2, (16, 7, 11)), pad_id=0)
