import dataclasses

import pytest
import torch
from torch import Tensor, nn

from falcon_unlearn.corpus.batching import Encoded
from falcon_unlearn.engine.gradient_conflict import GradientConfig
from falcon_unlearn.engine.interpolation import drawn_share, on_the_way_back
from falcon_unlearn.engine.optimizers import OptimizerConfig
from falcon_unlearn.engine.trainer import CheckpointPlan, InterruptedTrainingError, TrainingConfig, TrainingData, train

SUM = GradientConfig(combination="sum")
DATA = TrainingData(
    {"forget": [Encoded((3, 4, 5), 1)] * 4}, {"retain": [Encoded((6, 7, 8), 1)] * 4}, 0, torch.device("cpu")
)


def tensors(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


class Bowls:
    """Two quadratic bowls: forget |w - up|^2 / 2, retain |w - down|^2 / 2; keeps the weights it was asked about."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        self.up, self.down = up, down
        self.forgot: list[Tensor] = []
        self.retained: list[Tensor] = []

    def forget_loss(self, step, domain, batch, masters):
        self.forgot.append(masters["w"].detach().clone())
        return (masters["w"] - self.up).square().sum() / 2

    def retain_loss(self, step, batch, masters):
        self.retained.append(masters["w"].detach().clone())
        return (masters["w"] - self.down).square().sum() / 2

    def weight(self, side, batch):
        return len(batch)

    def diagnostics(self):
        return {}


def run(interpolation, *, steps=4, seed=0, size=2, micro=None, **more):
    up, down, start = tensors(7, 5, 5, 5)
    method, masters = Bowls(up, down), {"w": nn.Parameter(start.clone())}
    config = TrainingConfig(
        steps=steps,
        batch_size=size,
        micro_batch_size=micro,
        interpolation=interpolation,
        gradients=SUM,
        optimizer=OptimizerConfig(name="sgd", lr=0.1, betas=(0.0, 0.99)),
        checkpoint_every=1,
    )
    train(method, masters, DATA, config, seed=seed, hidden_size=1, **more)
    return method, masters["w"].detach(), start


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_inside_lies_the_share_of_the_way_and_behind_it_every_bit_is_back(share):
    now, origin = tensors(0, (3, 4), (7,)), tensors(1, (3, 4), (7,))
    kept = [value.clone() for value in now]
    parameters = [nn.Parameter(value) for value in now]
    with on_the_way_back(parameters, origin, share):
        for parameter, value, target in zip(parameters, kept, origin, strict=True):
            torch.testing.assert_close(parameter.detach(), (1 - share) * value + share * target)
    assert all(torch.equal(a, b) for a, b in zip(parameters, kept, strict=True))


def test_an_error_inside_puts_the_weights_back_too():
    (value,), (target,) = tensors(0, 6), tensors(1, 6)
    parameter = nn.Parameter(value.clone())
    with pytest.raises(RuntimeError, match="out of memory"), on_the_way_back([parameter], [target], 0.5):
        raise RuntimeError("out of memory")
    assert torch.equal(parameter, value)


def test_shares_are_uniform_below_the_most_and_a_function_of_seed_and_step():
    found = torch.tensor([drawn_share(0.5, 3, step) for step in range(2000)])
    assert found.min() >= 0
    assert found.max() < 0.5
    assert len(set(found.tolist())) > 1990
    assert float(found.mean()) == pytest.approx(0.25, abs=0.01)
    assert float(found.std()) == pytest.approx(0.5 / 12**0.5, abs=0.01)
    assert drawn_share(0.5, 3, 17) == drawn_share(0.5, 3, 17) == found[17]
    assert drawn_share(0.5, 4, 17) != found[17]
    assert drawn_share(0.25, 3, 17) == pytest.approx(float(found[17]) / 2)


def test_the_forget_gradient_is_that_between_and_the_retain_gradient_that_at_the_weights():
    """w' = w - lr ((w + a (w0 - w) - up) + (w - down)), step by step."""
    method, found, start = run(0.8)
    w = start
    for step in range(4):
        back = w + drawn_share(0.8, 0, step) * (start - w)
        torch.testing.assert_close(method.forgot[step], back)
        torch.testing.assert_close(method.retained[step], w)
        w = w - 0.1 * ((back - method.up) + (w - method.down))
    torch.testing.assert_close(found, w)
    torch.testing.assert_close(method.forgot[0], start)


def test_cut_batches_are_all_taken_at_the_same_place():
    method, found, _ = run(0.8, micro=1)
    assert all(torch.equal(a, b) for a, b in zip(method.forgot[::2], method.forgot[1::2], strict=True))
    _, whole, _ = run(0.8)
    torch.testing.assert_close(found, whole)


def test_where_memory_does_not_suffice_the_smaller_batches_are_taken_at_the_same_place(monkeypatch):
    asked = []

    def hungry(self, step, domain, batch, masters):
        asked.append((step, masters["w"].detach().clone()))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (masters["w"] - self.up).square().sum() / 2

    whole = run(0.8)[1]
    monkeypatch.setattr(Bowls, "forget_loss", hungry)
    halved = []
    torch.testing.assert_close(run(0.8, on_halved=halved.append)[1], whole)
    assert halved == [1]
    assert len({tuple(w.tolist()) for step, w in asked if step == 0}) == 1


def test_without_it_nothing_moves():
    method, found, _ = run(0.0)
    assert all(torch.equal(a, b) for a, b in zip(method.forgot, method.retained, strict=True))
    assert not torch.equal(found, run(0.8)[1])


def test_it_goes_further_than_without():
    """Of the forget bowl alone: where w + a (w0 - w) is at ``up`` in the mean, w is at 1 / (1 - mean a) of the way."""
    up, _, start = tensors(7, 5, 5, 5)

    def end(interpolation):
        method, masters = Bowls(up, up), {"w": nn.Parameter(start.clone())}
        method.retain_loss = lambda *_, **__: None
        optimizer = OptimizerConfig(name="sgd", lr=0.05, betas=(0.0, 0.99))
        config = TrainingConfig(
            steps=600, batch_size=2, interpolation=interpolation, gradients=SUM, optimizer=optimizer
        )
        train(method, masters, DATA, config, seed=0, hidden_size=1)
        return float((masters["w"].detach() - start).norm() / (up - start).norm())

    assert end(0.0) == pytest.approx(1, abs=1e-3)
    assert end(0.5) == pytest.approx(1 / 0.75, rel=0.05)


def test_a_resumed_run_goes_back_to_the_first_weights_not_to_those_it_resumed_from(tmp_path):
    plan = CheckpointPlan(tmp_path / "state.safetensors", "same", resume=True)
    whole = run(0.8, steps=6)[1]

    def stop(record):
        if record.step == 3:
            raise InterruptedTrainingError(4)

    with pytest.raises(InterruptedTrainingError):
        run(0.8, steps=6, checkpoint=dataclasses.replace(plan, resume=False), on_step=stop)
    resumed = []
    assert torch.equal(run(0.8, steps=6, checkpoint=plan, on_resume=resumed.append)[1], whole)
    assert resumed[0] > 0
