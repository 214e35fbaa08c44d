import threading

import pytest
import torch
from tiny_models import build_model, random_records

from falcon_unlearn.model.replicas import run_batches
from falcon_unlearn.selection.activations import layer_means


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return build_model("llama")


def test_every_batch_runs_once_and_threads_share_parameters_only(model, threads):
    threads(3)
    seen, copies, at_once = [], [], []

    def prepare(copy):
        copies.append(copy)

        def run(number):
            at_once.append(torch.get_num_threads())
            seen.append(number)

        return run

    run_batches(model, 20, prepare)
    assert sorted(seen) == list(range(20))
    assert set(at_once) == {1}
    assert torch.get_num_threads() == 3
    assert len(copies) == 3
    for copy in copies:
        assert copy is not model
        own, shared = dict(copy.named_parameters()), dict(model.named_parameters())
        assert own.keys() == shared.keys()
        assert all(own[name] is shared[name] for name in shared)
        assert not {id(m) for m in copy.modules()} & {id(m) for m in model.modules()}


def test_one_thread_uses_the_model_itself(model, threads):
    threads(1)
    used, runs = [], []
    run_batches(model, 3, lambda given: used.append(given) or runs.append)
    assert used == [model]
    assert runs == [0, 1, 2]


def test_an_error_in_a_batch_ends_the_run(model, threads):
    threads(2)
    done = []

    def run(number):
        if number == 3:
            raise MemoryError("batch 3")
        done.append(number)

    alive = threading.active_count()
    with pytest.raises(MemoryError, match="batch 3"):
        run_batches(model, 1000, lambda _: run)
    assert len(done) < 1000
    assert torch.get_num_threads() == 2
    assert threading.active_count() == alive


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_means_side_by_side_are_those_in_turn(name, threads):
    model, encoded = build_model(name), random_records(0, (5, 17, 9, 30, 12, 8, 21))
    results = []
    for number in (1, 3):
        threads(number)
        results.append(layer_means(model, encoded, (0, 3), mask="all", pad_id=0, batch_size=2))
    for alone, together in zip(*results, strict=True):
        torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)
    assert not any(layer._forward_hooks for layer in model.modules())
