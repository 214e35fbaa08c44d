import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from falcon_unlearn.engine.optimizers import (
    OptimizerConfig,
    Sophia,
    build_optimizer,
    learning_rate,
    restore_state,
    scheduled,
    state_tensors,
)
from falcon_unlearn.errors import UserError

BETAS = (0.965, 0.99)


def gradients(steps, size=7, seed=0, scale=1e-2):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(size, generator=generator) for _ in range(steps)]


def run(optimizer_class, start, series, **settings):
    parameter = start.clone().requires_grad_()
    optimizer = optimizer_class([parameter], **settings)
    for gradient in series:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def start(size=7):
    return torch.linspace(-1, 1, size)


def naive(series, *, lr, rho_scale, every, momentum_updates, weight_decay, use_hessian=True, betas=BETAS):
    """One scalar, one operation at a time, in fp64."""
    result = []
    for i, theta_0 in enumerate(start(len(series[0])).tolist()):
        theta, m, h = theta_0, 0.0, 0.0
        for step, gradient in enumerate(series):
            g = float(gradient[i])
            if use_hessian and step % every == 0:
                h = betas[1] * h + (1 - betas[1]) * g * g
            for _ in range(momentum_updates):
                m = betas[0] * m + (1 - betas[0]) * g
            theta -= lr * weight_decay * theta
            share = abs(m) / (rho_scale * h + 1e-15)
            theta -= lr * math.copysign(min(share, 1.0), m)
        result.append(theta)
    return torch.tensor(result)


class TestPublishedCode:
    @pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
    @pytest.mark.parametrize("rho", [0.04, 0.9])
    def test_equals_the_formula_step_by_step(self, scale, rho):
        series = gradients(5, scale=scale)
        got = run(Sophia, start(), series, lr=1e-2, betas=BETAS, rho=rho, weight_decay=1e-3, hessian="published_code")
        expected = naive(series, lr=1e-2, rho_scale=rho * 5120, every=1, momentum_updates=2, weight_decay=1e-3)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)

    def test_neither_batch_size_nor_interval_plays_a_part(self):
        series = gradients(8)
        plain, other = (
            run(Sophia, start(), series, lr=1e-2, rho=0.9, hessian="published_code", scale=scale, hessian_every=every)
            for scale, every in ((1.0, 1), (16.0, 10))
        )
        assert torch.equal(plain, other)

    @pytest.mark.parametrize("gradient", [1e-3, 1e-2, 1e-1])
    def test_steps_shrink_as_constant_gradients_grow(self, gradient):
        """Constant gradients 1e-3 / 1e-2 / 1e-1 move a weight by .9 / .09 / .009 of lr: at step 20 with rho = .9.

        At step n the share is (1 - b1^2n) / (rho 5120 (1 - b2^n) g), clipped at 1.
        """
        steps = []
        parameter = torch.zeros(1, requires_grad=True)
        optimizer = Sophia([parameter], lr=1.0, betas=BETAS, rho=0.9, hessian="published_code")
        for n in range(1, 31):
            before = parameter.item()
            parameter.grad = torch.tensor([gradient])
            optimizer.step()
            steps.append(before - parameter.item())
            formula = (1 - 0.965 ** (2 * n)) / (0.9 * 5120 * (1 - 0.99**n) * gradient)
            assert steps[-1] == pytest.approx(min(1.0, formula), rel=1e-3)
        assert steps[19] == pytest.approx(0.9 * 1e-3 / gradient, rel=0.02)


class TestEmaOfSquares:
    @pytest.mark.parametrize("every", [1, 3, 10])
    def test_equals_the_formula_step_by_step(self, every):
        series = gradients(7, scale=3.0)
        got = run(
            Sophia, start(), series, lr=1e-2, betas=BETAS, rho=0.5, weight_decay=0.1, scale=16, hessian_every=every
        )
        formula = {"lr": 1e-2, "rho_scale": 0.5 * 16, "momentum_updates": 1, "weight_decay": 0.1}
        torch.testing.assert_close(got, naive(series, every=every, **formula), atol=1e-6, rtol=1e-5)
        assert (got - naive(series, every=2, **formula)).abs().max() > 1e-4

    def test_a_larger_batch_makes_smaller_steps(self):
        series = gradients(5, scale=1.0)
        moved = [
            (run(Sophia, start(), series, lr=1e-2, rho=0.9, scale=scale) - start()).norm().item()
            for scale in (1, 8, 64)
        ]
        assert moved == sorted(moved, reverse=True)
        assert moved[0] > 2 * moved[2]


def test_without_curvature_it_is_sign_descent_with_momentum():
    series = gradients(6)
    got = run(Sophia, start(), series, lr=1e-2, betas=BETAS, hessian="none")
    theta, m = start(), torch.zeros(7)
    for gradient in series:
        m = 0.965 * m + 0.035 * gradient
        theta = theta - 1e-2 * m.sign()
    torch.testing.assert_close(got, theta)


@given(
    hessian=st.sampled_from(["published_code", "ema_grad2", "none"]),
    scale=st.floats(1e-12, 1e6),
    seed=st.integers(0, 99),
    zeros=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_no_step_is_longer_than_the_learning_rate(hessian, scale, seed, zeros):
    parameter = torch.zeros(5, requires_grad=True)
    optimizer = Sophia([parameter], lr=0.5, hessian=hessian, scale=4)
    for gradient in gradients(6, size=5, seed=seed, scale=scale):
        before = parameter.detach().clone()
        parameter.grad = gradient * torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]) if zeros else gradient
        optimizer.step()
        change = parameter.detach() - before
        assert change.isfinite().all()
        assert change.abs().max() <= 0.5 * (1 + 1e-6)
        assert not zeros or change[1] == 0


@pytest.mark.parametrize("hessian", ["published_code", "ema_grad2", "none"])
def test_zero_gradients_change_nothing_and_give_no_nan(hessian):
    """In fp16 the 1e-15 of the formula is zero and a weight without gradient becomes NaN; masters are fp32."""
    moved = run(Sophia, start(), [torch.zeros(7)] * 3, lr=1e-2, hessian=hessian)
    assert torch.equal(moved, start())
    assert torch.tensor(1e-15, dtype=torch.float16) == 0


def test_parameters_without_a_gradient_are_left_alone():
    parameters = [torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)]
    optimizer = Sophia(parameters, lr=0.1, weight_decay=0.5)
    parameters[0].grad = torch.ones(3)
    optimizer.step()
    assert (parameters[0] < 1).all()
    assert torch.equal(parameters[1], torch.ones(3))
    assert parameters[1] not in optimizer.state


class TestBuild:
    def parameter(self):
        return torch.ones(2, requires_grad=True)

    @given(hidden=st.integers(1, 20_000))
    def test_auto_learning_rate_falls_with_the_width(self, hidden):
        config = OptimizerConfig(lr_at_width_128=3e-3)
        assert learning_rate(config, hidden) * hidden == pytest.approx(3e-3 * 128)
        assert learning_rate(OptimizerConfig(lr=7e-5), hidden) == 7e-5

    def test_auto_is_the_reference_at_its_width(self):
        assert learning_rate(OptimizerConfig(), 128) == 1e-2

    @given(steps=st.integers(1, 500))
    def test_linear_schedule_falls_evenly_and_never_to_zero(self, steps):
        linear, constant = OptimizerConfig(schedule="linear"), OptimizerConfig()
        rates = [scheduled(linear, 0.3, step, steps) for step in range(steps)]
        assert rates[0] == 0.3
        assert rates[-1] == pytest.approx(0.3 / steps)
        assert all(a - b == pytest.approx(0.3 / steps) for a, b in itertools.pairwise(rates))
        assert {scheduled(constant, 0.3, step, steps) for step in range(steps)} == {0.3}

    def test_adamw(self):
        config = OptimizerConfig(lr=1e-3, betas=(0.8, 0.9), weight_decay=0.2)
        optimizer = build_optimizer(config, [self.parameter()], hidden_size=64, batch_size=4)
        assert isinstance(optimizer, torch.optim.AdamW)
        group = optimizer.param_groups[0]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.8, 0.9), 0.2)

    def test_sgd(self):
        config = OptimizerConfig(name="sgd", betas=(0.7, 0.9))
        optimizer = build_optimizer(config, [self.parameter()], hidden_size=64, batch_size=4)
        assert isinstance(optimizer, torch.optim.SGD)
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (2e-2, 0.7)

    def decayed(self, name):
        """A weight of 1 after three steps without a gradient."""
        parameter = self.parameter()
        config = OptimizerConfig(name=name, lr=0.1, weight_decay=0.5, hessian="none")
        optimizer = build_optimizer(config, [parameter], hidden_size=64, batch_size=4)
        for _ in range(3):
            parameter.grad = torch.zeros(2)
            optimizer.step()
        return parameter.detach()

    @pytest.mark.parametrize("name", ["adamw", "sophia"])
    def test_weight_decay_is_decoupled(self, name):
        torch.testing.assert_close(self.decayed(name), torch.ones(2) * 0.95**3)

    def test_weight_decay_of_sgd_goes_through_the_momentum(self):
        weight, momentum = 1.0, 0.0
        for _ in range(3):
            momentum = 0.9 * momentum + 0.5 * weight
            weight -= 0.1 * momentum
        torch.testing.assert_close(self.decayed("sgd"), torch.full((2,), weight))

    def test_sophia_takes_the_batch_size_as_its_scale(self):
        series = gradients(4, size=2, scale=0.5)
        parameter = torch.zeros(2, requires_grad=True)
        config = OptimizerConfig(name="sophia", lr=1e-2, betas=BETAS, rho=0.3, hessian_every=2, weight_decay=0.1)
        optimizer = build_optimizer(config, [parameter], hidden_size=64, batch_size=12)
        for gradient in series:
            parameter.grad = gradient.clone()
            optimizer.step()
        expected = run(
            Sophia, torch.zeros(2), series, lr=1e-2, betas=BETAS, rho=0.3, weight_decay=0.1, scale=12, hessian_every=2
        )
        assert torch.equal(parameter.detach(), expected)

    def test_yaml_spells_floats_as_text(self):
        assert OptimizerConfig.model_validate({"lr": "5e-5"}).lr == 5e-5
        assert OptimizerConfig.model_validate({"lr": "auto"}).lr == "auto"

    @pytest.mark.parametrize(
        "bad",
        [
            {"lr": "fast"},
            {"lr": 0},
            {"lr": -1.0},
            {"lr": math.nan},
            {"lr": math.inf},
            {"betas": (0.9, 1.0)},
            {"betas": (-0.1, 0.9)},
            {"rho": 0},
            {"name": "lion"},
            {"momentum": 0.9},
        ],
        ids=str,
    )
    def test_unusable_settings_are_refused(self, bad):
        with pytest.raises(ValidationError):
            OptimizerConfig.model_validate(bad)


class OnCuda(torch.Tensor):
    device = torch.device("cuda")


class FakePaged(torch.optim.Optimizer):
    """As bitsandbytes' do: momentum in a buffer of its own, a table all share, a plain number of steps."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-2):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.table = torch.arange(4.0)

    def init_state(self, group, p, gindex, pindex):
        assert self.param_groups[gindex]["params"][pindex] is p
        self.state[p] = {"step": 0, "state1": torch.zeros_like(p), "qmap1": self.table}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if not self.state[p]:
                    self.init_state(group, p, 0, index)
                state = self.state[p]
                state["step"] += 1
                state["state1"].mul_(0.9).add_(p.grad)
                p.sub_(state["state1"], alpha=group["lr"] / state["step"])


class TestPaged:
    NAMES = ("paged_adamw_32bit", "paged_adamw_8bit")

    def build(self, name, parameter):
        config = OptimizerConfig(name=name, lr=1e-3, betas=(0.8, 0.9), weight_decay=0.2)
        return build_optimizer(config, iter([parameter]), hidden_size=64, batch_size=4)

    @pytest.mark.parametrize("name", NAMES)
    def test_without_cuda_it_says_so(self, name):
        with pytest.raises(UserError, match=rf"optimizer.name {name} needs CUDA, this runs on cpu: use adamw"):
            self.build(name, torch.ones(2, requires_grad=True))

    @pytest.mark.parametrize("name", NAMES)
    def test_without_the_package_it_names_the_extra(self, name, monkeypatch):
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(UserError, match=r"pip install 'falcon-unlearn\[bitsandbytes\]'"):
            self.build(name, torch.ones(2).as_subclass(OnCuda).requires_grad_())

    @pytest.mark.parametrize(
        ("name", "bits"), [("paged_adamw_32bit", "PagedAdamW32bit"), ("paged_adamw_8bit", "PagedAdamW8bit")]
    )
    def test_it_gets_the_settings(self, name, bits, monkeypatch):
        fake = SimpleNamespace(optim=SimpleNamespace(**{bits: FakePaged}))
        monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
        parameter = torch.ones(2).as_subclass(OnCuda).requires_grad_()
        optimizer = self.build(name, parameter)
        assert isinstance(optimizer, FakePaged)
        group = optimizer.param_groups[0]
        assert group["params"][0] is parameter
        assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.8, 0.9), 0.2)

    def advance(self, parameters, optimizer, steps):
        for step in steps:
            for i, parameter in enumerate(parameters):
                parameter.grad = gradients(1, size=3, seed=10 * step + i)[0]
            optimizer.step()

    def test_its_state_goes_into_its_own_buffers(self):
        parameters = [torch.ones(3, requires_grad=True) for _ in range(2)]
        optimizer = FakePaged(parameters)
        assert state_tensors(optimizer, parameters[0]) == {}
        self.advance(parameters, optimizer, range(3))
        saved = [{k: v.clone() for k, v in state_tensors(optimizer, p).items()} for p in parameters]
        assert all(state.keys() == {"step", "state1"} and int(state["step"]) == 3 for state in saved)
        resumed = [p.detach().clone().requires_grad_() for p in parameters]
        other = FakePaged(resumed)
        for parameter, state in zip(resumed, saved, strict=True):
            restore_state(other, parameter, state)
            assert other.state[parameter]["state1"] is not state["state1"]
            assert other.state[parameter]["step"] == 3
            assert isinstance(other.state[parameter]["step"], int)
            assert other.state[parameter]["qmap1"] is other.table
        self.advance(parameters, optimizer, range(3, 6))
        self.advance(resumed, other, range(3, 6))
        assert all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True))

    @pytest.mark.parametrize("bits", ["PagedAdamW32bit", "PagedAdamW8bit"])
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_the_real_one_goes_on_bit_for_bit(self, bits):
        """On the CPU bitsandbytes computes the same without paging."""
        bitsandbytes = pytest.importorskip("bitsandbytes")

        def fresh(values):
            parameters = [value.detach().clone().requires_grad_() for value in values]
            return parameters, getattr(bitsandbytes.optim, bits)(parameters, lr=1e-2)

        def advance(parameters, optimizer, steps):
            for step in steps:
                for i, parameter in enumerate(parameters):
                    parameter.grad = gradients(1, size=len(parameter), seed=10 * step + i)[0]
                optimizer.step()

        parameters, optimizer = fresh([start(5000), start(5000), start(7)])  # the small one stays in 32 bits
        advance(parameters, optimizer, range(3))
        resumed, other = fresh(parameters)
        for before, after in zip(parameters, resumed, strict=True):
            restore_state(other, after, {k: v.clone() for k, v in state_tensors(optimizer, before).items()})
        advance(parameters, optimizer, range(3, 6))
        advance(resumed, other, range(3, 6))
        assert all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True))
        restarted, forgetful = fresh([start(5000), start(5000), start(7)])
        advance(restarted, forgetful, range(3))
        forgetful.state.clear()
        advance(restarted, forgetful, range(3, 6))
        assert not torch.equal(parameters[0], restarted[0])
