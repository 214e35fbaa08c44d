"""Train a small causal language model from scratch: the embedded benchmark's models and the TOFU testbed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from falcon_unlearn.corpus.batching import Encoded, collate, shuffled_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LlamaShape:
    """The size of a Llama-architecture model to build."""

    layers: int = 6
    hidden: int = 128
    heads: int = 4
    mlp: int = 256
    context: int = 128


@dataclass(frozen=True)
class PretrainingConfig:
    """Plain supervised training with the loss on all tokens."""

    epochs: int = 18
    batch_size: int = 16
    lr: float = 3e-3
    weight_decay: float = 0.1
    warmup_share: float = 0.05
    seed: int = 0


def train_tokenizer(texts: Sequence[str], vocabulary: int, context: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE tokenizer with ``<s>``, ``</s>`` and ``<pad>``, beginning-of-sequence added by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=context,
    )


def build_llama(shape: LlamaShape, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A randomly initialised Llama with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: PreTrainedModel = LlamaForCausalLM(config)
    return model


def train_causal_lm(
    model: PreTrainedModel,
    encoded: Sequence[Encoded],
    pad_id: int,
    config: PretrainingConfig,
    on_epoch: Callable[[int, float], bool] | None = None,
) -> None:
    """Train ``model`` in place with AdamW, linear warm-up and linear decay.

    Args:
        on_epoch: called with (epoch, mean loss) after each epoch; returning True stops the training.
    """
    decay = [p for p in model.parameters() if p.ndim >= 2]
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": config.weight_decay}, {"params": no_decay, "weight_decay": 0.0}],
        lr=config.lr,
        fused=True,
    )
    steps = config.epochs * -(-len(encoded) // config.batch_size)
    warmup = max(1, int(config.warmup_share * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, max(0.02, (steps - s) / max(1, steps - warmup)))
    )
    model.train()
    for epoch in range(config.epochs):
        total, count = 0.0, 0
        for indices in shuffled_batches(encoded, config.batch_size, epoch, config.seed):
            batch = collate([encoded[i] for i in indices], pad_id)
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            labels = batch.input_ids[:, 1:].masked_fill(batch.attention_mask[:, 1:] == 0, -100)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
            count += 1
        if on_epoch is not None and on_epoch(epoch, total / count):
            break
    model.eval()
