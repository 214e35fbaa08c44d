import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
)

from falcon_unlearn.corpus.batching import Encoded, length_sorted_batches
from falcon_unlearn.model.activation_store import ActivationStore
from falcon_unlearn.model.loading import ModelSource
from falcon_unlearn.model.skeleton import open_skeleton
from falcon_unlearn.selection.activations import (
    MeanCollector,
    layer_means,
    streamed_layer_means,
    token_budget_batches,
)

COMMON = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=4, n_head=2, n_positions=32, initializer_range=0.3),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=3),
    "mistral": MistralConfig(**COMMON, sliding_window=4),
    "gemma2": Gemma2Config(**COMMON, head_dim=8, sliding_window=4),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
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


@pytest.mark.parametrize("batch_tokens", [1, 24, 10_000])
def test_a_token_budget_changes_batches_and_not_means(model, records, batch_tokens):
    means = layer_means(model, records, LAYERS, mask="answer", pad_id=0, batch_tokens=batch_tokens)
    for layer, mean in zip(LAYERS, means, strict=True):
        torch.testing.assert_close(mean, one_by_one(model, records, layer, "answer"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 12, 24, 30, 1000])
def test_token_budget_batches_hold_every_record_once_and_keep_to_the_budget(records, batch_tokens):
    batches = token_budget_batches(records, batch_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(records)))
    for batch, following in zip(batches, [*batches[1:], []], strict=True):
        longest = max(len(records[i]) for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= batch_tokens
        assert not following or (len(batch) + 1) * len(records[following[0]]) > batch_tokens


def test_layers_above_the_highest_never_run(records):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    before = layer_means(model, records, (0, 2), mask="all", pad_id=0)
    with torch.no_grad():
        for parameter in model.model.layers[3].parameters():
            parameter.fill_(torch.nan)
    calls = []
    model.model.layers[3].mlp.register_forward_hook(lambda *_: calls.append(1))
    after = layer_means(model, records, (0, 2), mask="all", pad_id=0)
    assert calls == []
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert "forward" not in vars(model.model.layers[3])


def test_a_double_model_is_averaged_in_double(records):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).double().eval()
    (mean,) = layer_means(model, records, (2,), mask="answer", pad_id=0)
    assert mean.dtype == torch.float64
    torch.testing.assert_close(mean, one_by_one(model, records, 2, "answer"), atol=1e-12, rtol=1e-10)


def test_layers_may_be_collected_one_after_the_other_or_side_by_side(records):
    batches = length_sorted_batches(records, 3)
    generator = torch.Generator().manual_seed(0)
    states = {layer: [torch.randn(len(b), 6, 5, generator=generator) for b in batches] for layer in LAYERS}
    counted = [torch.rand(len(b), 6, generator=generator) < 0.5 for b in batches]
    for mask in counted:
        mask[:, 2] = True
    results = []
    for steps in (
        [(layer, n) for layer in LAYERS for n in range(len(batches))],
        [(layer, n) for n in reversed(range(len(batches))) for layer in LAYERS],
    ):
        collector = MeanCollector(LAYERS, batches)
        for layer, n in steps:
            collector.add(layer, n, states[layer][n], counted[n])
        results.append([collector.result(layer) for layer in LAYERS])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for layer, means in zip(LAYERS, results[0], strict=True):
        for batch, output, mask in zip(batches, states[layer], counted, strict=True):
            for i, index in enumerate(batch):
                torch.testing.assert_close(means[index], output[i][mask[i]].mean(0))


def test_streamed_means_are_the_resident_ones_to_the_bit(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["gemma2"]).eval()
    model.save_pretrained(tmp_path / "model")
    source = ModelSource("tiny", tmp_path / "model", torch.device("cpu"), torch.float32)
    encoded = [Encoded(tuple(range(3, 3 + length)), 2) for length in (5, 17, 9, 30, 12, 8, 21)]
    settings = {"mask": "answer", "pad_id": 0, "batch_size": 3}
    store = ActivationStore(tmp_path / "spill", 2000)
    streamed = streamed_layer_means(open_skeleton(source), encoded, (3, 1), store=store, **settings)
    assert store.path.exists()
    assert all(map(torch.equal, streamed, layer_means(model, encoded, (3, 1), **settings)))
