import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from falcon_unlearn.corpus.batching import Encoded
from falcon_unlearn.selection.activations import layer_means

COMMON = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=4, n_head=2, n_positions=32, initializer_range=0.3),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=3),
}
LAYERS = (0, 2)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


@pytest.fixture(scope="module")
def records():
    generator = torch.Generator().manual_seed(1)
    lengths = (5, 12, 3, 9, 12, 4, 7)
    return [
        Encoded(tuple(torch.randint(3, 50, (n,), generator=generator).tolist()), min(i, n - 1))
        for i, n in enumerate(lengths)
    ]


@torch.no_grad()
def one_by_one(model, records, layer, mask):
    rows = []
    for record in records:
        states = model(input_ids=torch.tensor([record.ids]), output_hidden_states=True).hidden_states[layer + 1][0]
        start = record.answer_start if mask == "answer" else 0
        rows.append(sum(states[start:]) / (len(record) - start))
    return torch.stack(rows)


@pytest.mark.parametrize("mask", ["answer", "all"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_equals_one_record_at_a_time(model, records, mask, batch_size):
    means = layer_means(model, records, LAYERS, mask=mask, pad_id=0, batch_size=batch_size)
    assert len(means) == len(LAYERS)
    for layer, mean in zip(LAYERS, means, strict=True):
        assert mean.shape == (len(records), 16)
        torch.testing.assert_close(mean, one_by_one(model, records, layer, mask), atol=1e-5, rtol=1e-4)


def test_order_and_padding_do_not_matter(model, records):
    """The last record makes every other one padded; the pad token plays no part."""
    alone = layer_means(model, records[:3], LAYERS, mask="all", pad_id=0)
    among = layer_means(model, [*records[::-1], Encoded(tuple(range(3, 33)), 1)], LAYERS, mask="all", pad_id=7)
    for a, b in zip(alone, among, strict=True):
        torch.testing.assert_close(b[:7].flip(0)[:3], a, atol=1e-5, rtol=1e-4)


def test_models_without_a_head_give_the_same(model, records):
    with_head = layer_means(model, records, LAYERS, mask="answer", pad_id=0)
    without = layer_means(model.base_model, records, LAYERS, mask="answer", pad_id=0)
    assert all(torch.equal(a, b) for a, b in zip(with_head, without, strict=True))


def test_the_head_never_runs_and_no_hook_or_gradient_stays(model, records):
    calls = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    before = sum(len(m._forward_hooks) for m in model.modules())
    try:
        means = layer_means(model, records, LAYERS, mask="answer", pad_id=0)
    finally:
        handle.remove()
    assert calls == []
    assert sum(len(m._forward_hooks) for m in model.modules()) == before - 1
    assert not any(mean.requires_grad for mean in means)


def test_hooks_go_when_the_forward_fails(model):
    before = sum(len(m._forward_hooks) for m in model.modules())
    with pytest.raises(IndexError):
        layer_means(model, [Encoded((4000, 4001), 1)], LAYERS, mask="answer", pad_id=0)
    assert sum(len(m._forward_hooks) for m in model.modules()) == before


def test_half_precision_is_averaged_in_fp32(records):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.bfloat16).eval()
    (mean,) = layer_means(model, records, (2,), mask="all", pad_id=0)
    assert mean.dtype == torch.float32
    assert (mean != mean.bfloat16()).any()
