import warnings

import pytest
import torch
from tiny_causal import CONTEXT, PAD, gpt2, llama, random_items

from falcon_unlearn.corpus.batching import Encoded
from falcon_unlearn.evaluation.generation import generate_greedy, sample_continuations


@pytest.fixture(scope="module", params=[llama, gpt2])
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


def naive_greedy(model, ids, count, stops):
    ids, start = list(ids), len(ids)
    while len(ids) < min(start + count, CONTEXT):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[start:]


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_batched_generation_is_the_greedy_one(model, batch_size):
    prompts = random_items(12, 40)
    free = [naive_greedy(model, prompt.ids, 16, []) for prompt in prompts]
    # A token that does occur, so that some continuations end early and some do not.
    stops = [free[0][3]]
    expected = [naive_greedy(model, prompt.ids, 16, stops) for prompt in prompts]
    assert len({len(ids) for ids in expected}) > 1
    found = generate_greedy(model, prompts, PAD, stops, max_new_tokens=16, batch_size=batch_size, device="cpu")
    assert found == expected
    unstopped = generate_greedy(model, prompts, PAD, [], max_new_tokens=16, batch_size=batch_size, device="cpu")
    assert unstopped == free


def test_generation_ends_at_the_context_length_without_shortening_others(model):
    prompts = [Encoded((7,) * n, n) for n in (CONTEXT - 3, CONTEXT - 10, 5, CONTEXT, 0)]
    found = generate_greedy(model, prompts, PAD, [], max_new_tokens=8, batch_size=8, device="cpu")
    assert [len(ids) for ids in found] == [3, 8, 8, 0, 0]
    assert found[:3] == [naive_greedy(model, prompt.ids, 8, []) for prompt in prompts[:3]]


def test_generation_ignores_and_keeps_the_models_own_settings(model, caplog):
    prompts = random_items(3, 20)
    expected = [naive_greedy(model, prompt.ids, 10, []) for prompt in prompts]
    own = model.generation_config
    before = own.to_dict()
    own.update(do_sample=True, temperature=5.0, top_p=0.5, repetition_penalty=9.0)
    configured = own.to_dict()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = generate_greedy(model, prompts, PAD, [], max_new_tokens=10, batch_size=2, device="cpu")
        assert model.generation_config is own
        assert own.to_dict() == configured
    finally:
        own.update(**before)
    assert found == expected
    assert not caplog.records


def test_samples_have_the_models_own_distribution(model):
    """First and second token, against sums over the whole tree; whatever the model's own sampling settings."""
    prompt, draws = random_items(1, 20)[0], 6000

    def next_token(ids):
        with torch.no_grad():
            return model(input_ids=torch.tensor(ids)).logits[:, -1].softmax(-1)

    first = next_token([prompt.ids])[0]
    second = first @ next_token([[*prompt.ids, token] for token in range(len(first))])
    own = model.generation_config
    before, settings = own.to_dict(), {"temperature": 5.0, "top_p": 0.5, "top_k": 2, "repetition_penalty": 9.0}
    own.update(**settings)
    try:
        torch.manual_seed(0)
        found = sample_continuations(model, [prompt] * draws, PAD, [], max_new_tokens=2, batch_size=2000)
    finally:
        own.update(**{name: before.get(name) for name in settings})
    assert {(len(ids), ended) for ids, ended in found} == {(2, False)}
    for place, expected in enumerate((first, second)):
        seen = torch.bincount(torch.tensor([ids[place] for ids, _ in found]), minlength=len(first)) / draws
        # Expected distance of an honest sample: below sqrt(words / draws) / 2.
        assert (seen - expected).abs().sum() / 2 < (len(first) / draws) ** 0.5 / 2


def test_samples_end_before_a_stop_token_and_say_so(model):
    prompts = random_items(60, 40)
    torch.manual_seed(0)
    stops = list(range(5, 20))
    found = sample_continuations(model, prompts, PAD, stops, max_new_tokens=6, batch_size=16)
    assert {ended for _, ended in found} == {True, False}
    for ids, ended in found:
        assert not set(ids) & set(stops)
        assert ended == (len(ids) < 6)


def test_sampling_leaves_room_for_the_prompt(model):
    prompts = [Encoded((7,) * n, n) for n in (CONTEXT - 3, CONTEXT)]
    assert sample_continuations(model, prompts[1:], PAD, [], max_new_tokens=8, batch_size=8) == [([], False)]
    assert len(sample_continuations(model, prompts[:1], PAD, [], max_new_tokens=8, batch_size=8)[0][0]) == 3
