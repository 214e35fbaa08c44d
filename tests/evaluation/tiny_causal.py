"""Two tiny causal language models with random weights, and random records for them."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from falcon_unlearn.corpus.batching import Encoded

VOCABULARY, CONTEXT, PAD, EOS = 50, 64, 0, 2


def llama():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
        eos_token_id=EOS,
        bos_token_id=1,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def gpt2():
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        initializer_range=0.5,
        eos_token_id=EOS,
        bos_token_id=1,
    )
    return GPT2LMHeadModel(config)


def random_items(count, longest, seed=0):
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(count):
        length = int(torch.randint(2, longest, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        items.append(Encoded(tuple(ids), int(torch.randint(0, length, (1,), generator=generator))))
    return items
