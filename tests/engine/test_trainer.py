import json
import math
import os
import signal
import threading
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from falcon_unlearn.corpus.batching import Encoded
from falcon_unlearn.engine.checkpoint import checkpoint_files
from falcon_unlearn.engine.gradient_conflict import GradientConfig
from falcon_unlearn.engine.optimizers import OptimizerConfig
from falcon_unlearn.engine.trainer import (
    CheckpointPlan,
    DivergedError,
    InterruptedTrainingError,
    TrainingConfig,
    TrainingData,
    train,
)
from falcon_unlearn.errors import UserError
from falcon_unlearn.methods import Falcon, FalconConfig, Setup
from falcon_unlearn.model.decoder import SplitDecoder

CPU = torch.device("cpu")
STEPS = 8
OPTIMIZERS = {
    "adamw": OptimizerConfig(lr=1e-2),
    "adamw_linear": OptimizerConfig(lr=1e-2, schedule="linear"),
    "sophia": OptimizerConfig(name="sophia", lr=1e-2, rho=0.9, hessian_every=3),
    "sgd": OptimizerConfig(name="sgd", lr=1e-1),
}


def records(seed, count, *, length=9):
    generator = torch.Generator().manual_seed(seed)
    return [
        Encoded(tuple(torch.randint(3, 60, (length + i % 4,), generator=generator).tolist()), 3) for i in range(count)
    ]


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def corpus():
    return TrainingData({"bio": records(1, 5), "cyber": records(2, 7)}, {"retain": records(3, 11)}, 0, CPU)


class Run:
    """FALCON on a small Llama; every call trains from the original weights."""

    def __init__(self, model, corpus):
        self.decoder = SplitDecoder(model, (1,), "mlp")
        self.corpus = corpus

    def __call__(self, path, *, seed=0, steps=STEPS, resume=False, optimizer=OPTIMIZERS["adamw"], every=3, **more):
        setup = Setup(self.decoder, self.corpus.first_batches(4), "answer", seed)
        masters, log = self.decoder.masters(), []
        more.setdefault("on_step", lambda record: None)
        observe = more.pop("on_step")
        say = more.pop("say", lambda line: None)

        def on_step(record):
            log.append(record)
            observe(record)

        config = TrainingConfig(steps=steps, batch_size=4, optimizer=optimizer, checkpoint_every=every)
        train(
            Falcon(FalconConfig(offset_rank=4), setup),
            masters,
            self.corpus,
            config,
            seed=seed,
            hidden_size=16,
            checkpoint=CheckpointPlan(path, f"seed {seed}", resume, say),
            on_step=on_step,
            **more,
        )
        return masters, log


@pytest.fixture(scope="module")
def run(llama, corpus):
    return Run(llama, corpus)


def saved_step(path):
    with safe_open(path, framework="pt") as handle:
        return json.loads(handle.metadata()["state"])["step"]


def interrupt_at(step, number=signal.SIGINT, times=1):
    def on_step(record):
        if record.step == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return on_step


class TestDeterminism:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_same_seed_same_bytes(self, run, tmp_path, optimizer):
        _, first = run(tmp_path / "a", optimizer=optimizer)
        torch.manual_seed(1234)
        _, second = run(tmp_path / "b", optimizer=optimizer)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert [(r.forget_loss, r.retain_loss) for r in first] == [(r.forget_loss, r.retain_loss) for r in second]

    def test_another_seed_another_result(self, run, tmp_path):
        first, _ = run(tmp_path / "a", seed=0)
        second, _ = run(tmp_path / "b", seed=1)
        assert all(not torch.equal(first[name], second[name]) for name in first)

    def test_callers_random_state_is_left_alone(self, run, tmp_path):
        torch.manual_seed(7)
        before = torch.get_rng_state()
        run(tmp_path / "a")
        assert torch.equal(torch.get_rng_state(), before)


class TestResume:
    @pytest.mark.parametrize("stop", [0, 2, 3, 7])
    @pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_is_bit_identical_to_the_uninterrupted_run(self, run, tmp_path, optimizer, stop):
        whole, whole_log = run(tmp_path / "whole", optimizer=optimizer)
        done = []
        with pytest.raises(InterruptedTrainingError) as caught:
            run(tmp_path / "state", optimizer=optimizer, on_step=interrupt_at(stop))
        assert caught.value.step == stop + 1
        resumed, log = run(tmp_path / "state", optimizer=optimizer, resume=True, on_resume=done.append)
        assert done == [stop + 1]
        assert [r.step for r in log] == list(range(stop + 1, STEPS))
        assert [r.forget_loss for r in log] == [r.forget_loss for r in whole_log[stop + 1 :]]
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
        assert (tmp_path / "state").read_bytes() == (tmp_path / "whole").read_bytes()

    def test_from_a_periodic_checkpoint_after_a_crash(self, run, tmp_path):
        whole, _ = run(tmp_path / "whole")
        with pytest.raises(RuntimeError, match="power"):
            run(tmp_path / "state", on_step=crash_at(7))
        assert saved_step(tmp_path / "state") == 6
        resumed, log = run(tmp_path / "state", resume=True)
        assert [r.step for r in log] == [6, 7]
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)

    def test_of_a_finished_run_does_nothing(self, run, tmp_path):
        whole, _ = run(tmp_path / "state")
        again, log = run(tmp_path / "state", resume=True)
        assert log == []
        assert all(torch.equal(again[name], whole[name]) for name in whole)

    def test_without_a_checkpoint_starts_at_zero(self, run, tmp_path):
        done = []
        _, log = run(tmp_path / "state", resume=True, on_resume=done.append)
        assert done == [0]
        assert len(log) == STEPS

    def test_not_asked_for_starts_at_zero(self, run, tmp_path):
        run(tmp_path / "state", steps=2)
        _, log = run(tmp_path / "state")
        assert len(log) == STEPS

    def test_of_another_run_is_refused(self, run, tmp_path):
        run(tmp_path / "state", seed=0, steps=2)
        with pytest.raises(UserError, match="another recipe, model or data"):
            run(tmp_path / "state", seed=1, resume=True)

    def test_with_the_newest_state_damaged_it_goes_on_from_the_one_before(self, run, tmp_path):
        whole, whole_log = run(tmp_path / "whole")
        with pytest.raises(InterruptedTrainingError):
            run(tmp_path / "state", on_step=interrupt_at(4))
        (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:-9])
        done, said = [], []
        resumed, log = run(tmp_path / "state", resume=True, on_resume=done.append, say=said.append)
        assert done == [3]
        assert [line.split(": ")[1] for line in said] == ["not a usable checkpoint (Error while deserializing header"]
        assert [r.forget_loss for r in log] == [r.forget_loss for r in whole_log[3:]]
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
        assert (tmp_path / "state").read_bytes() == (tmp_path / "whole").read_bytes()

    def test_with_all_states_damaged_it_is_refused(self, run, tmp_path):
        run(tmp_path / "state", steps=2)
        for file in checkpoint_files(tmp_path / "state"):
            file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(UserError, match="not a usable checkpoint"):
            run(tmp_path / "state", resume=True)

    def test_what_was_read_is_not_written_again(self, run, tmp_path):
        """It would push out the one before it."""
        with pytest.raises(RuntimeError, match="power"):
            run(tmp_path / "state", on_step=crash_at(7))
        steps = [saved_step(file) for file in checkpoint_files(tmp_path / "state")]
        with pytest.raises(RuntimeError, match="power"):
            run(tmp_path / "state", on_step=crash_at(7), resume=True)
        assert [saved_step(file) for file in checkpoint_files(tmp_path / "state")] == steps == [6, 3]


def crash_at(step):
    def on_step(record):
        if record.step == step:
            raise RuntimeError("power is gone")

    return on_step


def as_it_is(step, loss, masters):
    return loss


class Toy:
    """Two quadratics with random targets: forget moves ``a`` alone, retain both; both losses can be spoilt."""

    def __init__(self, forget=as_it_is, retain=as_it_is):
        self.spoil_forget, self.spoil_retain = forget, retain

    @staticmethod
    def masters():
        return {"a": torch.ones(3, requires_grad=True), "b": torch.ones(2, 2, requires_grad=True)}

    def weight(self, side, batch):
        return len(batch)

    def forget_loss(self, step, domain, batch, masters):
        towards = batch.input_ids.float().mean() / 60
        return self.spoil_forget(step, (masters["a"] - towards).square().sum(), masters)

    def retain_loss(self, step, batch, masters):
        towards = batch.input_ids.float().mean() / 60
        loss = (masters["a"] + towards).square().sum() + (masters["b"] - towards).square().sum()
        return self.spoil_retain(step, loss, masters)


def train_toy(corpus, path=None, *, toy=None, steps=STEPS, every=3, lr=1e-2, name="adamw", combination="sum", **more):
    masters = more.pop("masters", None) or Toy.masters()
    config = TrainingConfig(
        steps=steps,
        batch_size=4,
        checkpoint_every=every,
        optimizer=OptimizerConfig(name=name, lr=lr, betas=(0.0, 0.9)),
        gradients=GradientConfig(combination=combination),
    )
    plan = CheckpointPlan(path, "toy", resume=False) if path else None
    train(toy or Toy(), masters, corpus, config, seed=0, hidden_size=4, checkpoint=plan, **more)
    return masters


def nan(loss, masters):
    return loss * math.nan


def inf(loss, masters):
    return loss + math.inf


def nan_gradient(loss, masters):
    """A finite loss whose gradient is not: the square root at zero."""
    return loss + (masters["a"] - masters["a"].detach()).abs().sum().sqrt()


def spoilt(side, spoil, at):
    """A toy one of whose losses is spoilt at one step."""
    return Toy(**{side: lambda step, loss, masters: spoil(loss, masters) if step == at else loss})


class TestNonFinite:
    @pytest.mark.parametrize(
        ("side", "spoil", "what"),
        [
            ("forget", nan, "forget_loss and forget_grad_norm"),
            ("retain", inf, "retain_loss"),
            ("forget", nan_gradient, "forget_grad_norm"),
        ],
    )
    @pytest.mark.parametrize(("at", "last_good"), [(7, 6), (6, 3), (4, 3)])
    def test_stops_at_the_step_with_the_last_good_state_on_disk(
        self, corpus, tmp_path, side, spoil, what, at, last_good
    ):
        path, masters, logged = tmp_path / "state", Toy.masters(), []

        with pytest.raises(DivergedError, match=rf"^step {at}: {what} not finite; the last good state is in .*state;"):
            train_toy(
                corpus, path, toy=spoilt(side, spoil, at), masters=masters, on_step=lambda r: logged.append(r.step)
            )
        assert logged == list(range(at))
        assert saved_step(path) == last_good
        good, stored = train_toy(corpus, steps=last_good), load_file(path)
        assert all(torch.equal(stored[f"master/{name}"], value) for name, value in good.items())
        untouched = train_toy(corpus, steps=at)
        assert all(torch.equal(masters[name], value) for name, value in untouched.items())

    def test_before_the_first_checkpoint_none_is_claimed(self, corpus, tmp_path):
        path = tmp_path / "state"
        with pytest.raises(DivergedError, match=r"^step 0: forget_loss and .*; no state was saved before it;"):
            train_toy(corpus, path, toy=spoilt("forget", nan, 0))
        assert not path.exists()

    def test_the_state_before_the_first_update_is_kept(self, corpus, tmp_path):
        path = tmp_path / "state"
        with pytest.raises(DivergedError, match=r"^step 2: forget_loss and .*; the last good state is in"):
            train_toy(corpus, path, toy=spoilt("forget", nan, 2))
        assert saved_step(path) == 0

    def test_the_last_update_is_looked_at_too(self, corpus, tmp_path):
        path = tmp_path / "state"
        with pytest.raises(DivergedError, match=r"^step 7: after its update a not finite; the last good state is in"):
            train_toy(corpus, path, toy=self.explode_at(7), name="sgd", lr=1e30)
        assert saved_step(path) == 6

    def test_an_interrupt_does_not_save_a_bad_update(self, corpus, tmp_path):
        path = tmp_path / "state"
        with pytest.raises(DivergedError, match=r"^step 4: after its update a not finite"):
            train_toy(corpus, path, toy=self.explode_at(4), name="sgd", lr=1e30, on_step=interrupt_at(4))
        assert saved_step(path) == 3
        assert torch.isfinite(load_file(path)["master/a"]).all()

    @staticmethod
    def explode_at(at):
        """Finite loss and gradient, but the update overflows fp32 (with a learning rate of 1e30)."""

        def forget(step, loss, masters):
            return (1e10 if step == at else 0) * masters["a"].sum()

        def retain(step, loss, masters):
            return 0 * masters["a"].sum()

        return Toy(forget, retain)

    def test_trial_runs_stop_as_well(self, corpus):
        with pytest.raises(DivergedError, match="no state was saved"):
            train_toy(corpus, toy=spoilt("forget", nan, 0))


class TestInterrupt:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_saves_between_steps_and_puts_the_handlers_back(self, corpus, tmp_path, number):
        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        with pytest.raises(InterruptedTrainingError) as caught:
            train_toy(corpus, tmp_path / "state", on_step=interrupt_at(4, number))
        assert caught.value.step == 5
        assert isinstance(caught.value, KeyboardInterrupt)
        assert saved_step(tmp_path / "state") == 5
        assert {n: signal.getsignal(n) for n in before} == before
        expected, stored = train_toy(corpus, steps=5), load_file(tmp_path / "state")
        assert all(torch.equal(stored[f"master/{name}"], value) for name, value in expected.items())

    def test_in_the_middle_of_a_step_lets_it_finish(self, corpus, tmp_path):
        logged = []

        def interrupting(step, loss, masters):
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return loss

        with pytest.raises(InterruptedTrainingError):
            train_toy(corpus, tmp_path / "state", toy=Toy(interrupting), on_step=lambda r: logged.append(r.step))
        assert logged == [0, 1, 2]
        assert saved_step(tmp_path / "state") == 3

    def test_the_second_one_is_let_through(self, corpus, tmp_path):
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as caught:
            train_toy(corpus, tmp_path / "state", on_step=interrupt_at(4, times=2))
        assert not isinstance(caught.value, InterruptedTrainingError)
        assert saved_step(tmp_path / "state") == 3
        assert signal.getsignal(signal.SIGINT) is before

    def test_other_threads_train_without_handlers(self, corpus):
        found = []
        thread = threading.Thread(target=lambda: found.append(train_toy(corpus)))
        thread.start()
        thread.join()
        expected = train_toy(corpus)
        assert all(torch.equal(found[0][name], value) for name, value in expected.items())


class TestStep:
    def test_equals_the_plain_formula(self, corpus):
        """SGD without momentum on the sum of both gradients, written out."""
        a, b = torch.ones(3), torch.ones(2, 2)
        for step in range(STEPS):
            _, forget, retain = corpus.at(step, 4, 0)
            f, r = forget.input_ids.float().mean() / 60, retain.input_ids.float().mean() / 60
            a, b = a - 0.05 * (2 * (a - f) + 2 * (a + r)), b - 0.05 * 2 * (b - r)
        got = train_toy(corpus, name="sgd", lr=0.05)
        torch.testing.assert_close(got["a"].detach(), a)
        torch.testing.assert_close(got["b"].detach(), b)

    def test_linear_schedule_ends_just_above_zero(self, corpus):
        """Sign descent shows the rate of every step: 1, 7/8 ... 1/8 of lr."""
        masters, seen = Toy.masters(), []
        before = masters["a"].detach().clone()

        def on_step(record):
            seen.append((masters["a"].detach() - before).abs().max().item())
            before.copy_(masters["a"].detach())

        optimizer = OptimizerConfig(name="sophia", lr=1e-3, hessian="none", schedule="linear")
        config = TrainingConfig(steps=STEPS, batch_size=4, optimizer=optimizer)
        train(Toy(), masters, corpus, config, seed=0, hidden_size=4, on_step=on_step)
        assert seen == pytest.approx([1e-3 * (1 - k / STEPS) for k in range(STEPS)], rel=1e-3)

    def test_record_holds_losses_norms_and_conflict(self, corpus):
        log = []
        train_toy(corpus, on_step=log.append, name="sgd", lr=0.05)
        assert [r.step for r in log] == list(range(STEPS))
        _, forget, retain = corpus.at(0, 4, 0)
        f, r = forget.input_ids.float().mean().item() / 60, retain.input_ids.float().mean().item() / 60
        first = log[0]
        assert first.forget_loss == pytest.approx(3 * (1 - f) ** 2, rel=1e-5)
        assert first.retain_loss == pytest.approx(3 * (1 + r) ** 2 + 4 * (1 - r) ** 2, rel=1e-5)
        assert first.forget_grad_norm == pytest.approx(2 * math.sqrt(3) * (1 - f), rel=1e-5)
        assert first.retain_grad_norm == pytest.approx(2 * math.sqrt(3 * (1 + r) ** 2 + 4 * (1 - r) ** 2), rel=1e-5)
        # Only "a" has both gradients, and they agree there.
        assert (first.cosine, first.conflicts) == (pytest.approx(1, abs=1e-5), 0.0)
        assert all(r.seconds > 0 for r in log)

    def test_combination_is_the_configured_one(self, corpus):
        assert not torch.equal(train_toy(corpus, combination="falcon")["a"], train_toy(corpus, combination="sum")["a"])

    def test_bf16_models_train_in_fp32(self, llama, corpus):
        """Steps far below bf16's resolution still add up in the masters."""
        model = LlamaForCausalLM(llama.config).eval().requires_grad_(False).to(torch.bfloat16)
        decoder = SplitDecoder(model, (1,), "mlp")
        masters = decoder.masters()
        before = {name: value.detach().clone() for name, value in masters.items()}
        method = Falcon(FalconConfig(offset_rank=4), Setup(decoder, corpus.first_batches(4), "answer", 0))
        config = TrainingConfig(steps=3, batch_size=4, optimizer=OptimizerConfig(lr=1e-6))
        train(method, masters, corpus, config, seed=0, hidden_size=16)
        for name, value in masters.items():
            assert value.dtype == torch.float32
            assert (value != before[name]).float().mean() > 0.9
            assert (value.bfloat16() == before[name].bfloat16()).float().mean() > 0.9


def numbered(start, count):
    """Records that can be told apart by their first token."""
    return [Encoded((start + i, 1, 2), 1) for i in range(count)]


@given(
    forget=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    retain=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_domains_take_turns_and_every_sample_is_used_equally_often(forget, retain, batch_size, seed):
    sides = [{f"d{i}": numbered(100 * i, count) for i, count in enumerate(counts)} for counts in (forget, retain)]
    data = TrainingData(*sides, 0, CPU)
    steps = len(forget) * len(retain) * 60  # 60 = lcm(1..6): every stream ends with a whole epoch
    domains, uses = Counter(), (Counter(), Counter())
    for step in range(steps):
        domain, *batches = data.at(step, batch_size, seed)
        assert domain == f"d{step % len(forget)}"
        domains[domain] += 1
        for side, batch in zip(uses, batches, strict=True):
            first = batch.input_ids[:, 0].tolist()
            assert len(set(first)) == len(first) or len(first) == batch_size
            assert len({token // 100 for token in first}) == 1
            side.update(first)
    assert len(set(domains.values())) == 1
    for side, records_of in zip(uses, sides, strict=True):
        assert set(side) == {r.ids[0] for part in records_of.values() for r in part}
        for part in records_of.values():
            assert len({side[r.ids[0]] for r in part}) == 1


def test_a_step_depends_on_its_number_and_the_seed_alone(corpus):
    replay = {step: corpus.at(step, 4, 0) for step in (9, 2, 5)}
    for step, (domain, forget, retain) in replay.items():
        again = corpus.at(step, 4, 0)
        assert again[0] == domain
        assert torch.equal(again[1].input_ids, forget.input_ids)
        assert torch.equal(again[2].input_ids, retain.input_ids)
    other = corpus.at(2, 4, 1)
    assert not torch.equal(other[1].input_ids, replay[2][1].input_ids)


def test_first_batches_are_the_corpus_in_its_order():
    data = TrainingData({"a": numbered(10, 5), "b": numbered(30, 2)}, {"r": numbered(50, 1)}, 0, CPU)
    found = {domain: [b.input_ids[:, 0].tolist() for b in parts] for domain, parts in data.first_batches(2).items()}
    assert found == {"a": [[10, 11], [12, 13], [14]], "b": [[30, 31]]}


class TestMicroBatches:
    """Cutting a batch changes nothing but rounding; memory that does not suffice cuts it."""

    @pytest.mark.parametrize("combination", ["falcon", "sum", "pcgrad"])
    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_gradients_are_those_of_the_whole_batch(self, llama, corpus, combination, size):
        """Conflicts are resolved once, on the accumulated gradients of each objective."""
        found = []
        for micro in (None, size):
            config = TrainingConfig(
                steps=3, batch_size=4, micro_batch_size=micro, cache="never",
                optimizer=OptimizerConfig(name="sgd", lr=1e-1), gradients=GradientConfig(combination=combination),
            )  # fmt: skip
            decoder = SplitDecoder(llama, (1,), "mlp")
            method = Falcon(FalconConfig(offset_rank=4), Setup(decoder, corpus.first_batches(4), "answer", 0))
            masters, log = decoder.masters(), []
            with torch.no_grad():  # at the original weights the retain gradient is rounding and its sign a lottery
                for value in masters.values():
                    value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(4)))
            train(method, masters, corpus, config, seed=0, hidden_size=16, on_step=log.append)
            found.append((masters, log))
        (whole, log), (cut, cut_log) = found
        for name in whole:
            torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=1e-6)
        for record, expected in zip(cut_log, log, strict=True):
            assert record.micro_batches == math.ceil(4 / size)
            assert expected.micro_batches == 1
            assert record.forget_loss == pytest.approx(expected.forget_loss, rel=1e-5)
            assert record.retain_loss == pytest.approx(expected.retain_loss, rel=1e-4, abs=1e-6)
            assert record.conflicts == expected.conflicts

    def test_running_out_of_memory_halves_and_goes_on_from_the_same_step(self, corpus):
        sizes, halved, logged = [], [], []

        class Hungry(Toy):
            def retain_loss(self, step, batch, masters):
                sizes.append((step, len(batch)))
                if step >= 3 and len(batch) > 1:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return super().retain_loss(step, batch, masters)

        masters = train_toy(corpus, toy=Hungry(), on_halved=halved.append, on_step=logged.append)
        assert halved == [2, 1]
        assert [record.step for record in logged] == list(range(STEPS))
        assert [record.micro_batches for record in logged] == [1] * 3 + [4] * (STEPS - 3)
        assert [size for step, size in sizes if step == 3] == [4, 2, 1, 1, 1, 1]
        expected = train_toy(corpus)
        # The toy's targets are means over a batch's tokens, so cutting changes them a little; the order of data not.
        for name, value in masters.items():
            torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0.05)

    def test_the_cpus_allocator_is_understood_and_other_errors_are_not_swallowed(self, corpus):
        def failing(message):
            def forget(step, loss, masters):
                raise RuntimeError(message)

            return Toy(forget)

        with pytest.raises(UserError, match=r"^out of memory with a single record; lower corpus\.max_length"):
            train_toy(corpus, toy=failing("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            train_toy(corpus, toy=failing("mat1 and mat2 shapes cannot be multiplied"))

    def test_the_size_found_is_kept_over_a_resume(self, llama, corpus, tmp_path):
        class Hungry(Toy):
            def forget_loss(self, step, domain, batch, masters):
                if len(batch) > 2:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return super().forget_loss(step, domain, batch, masters)

        path, whole = tmp_path / "state", Toy.masters()
        train_toy(corpus, toy=Hungry(), masters=whole)
        with pytest.raises(InterruptedTrainingError):
            train_toy(corpus, path, toy=Hungry(), on_step=interrupt_at(4))
        masters, halved = Toy.masters(), []
        plan = CheckpointPlan(path, "toy", resume=True)
        config = TrainingConfig(
            steps=STEPS, batch_size=4, checkpoint_every=3, optimizer=OptimizerConfig(lr=1e-2, betas=(0.0, 0.9)),
            gradients=GradientConfig(combination="sum"),
        )  # fmt: skip
        train(Hungry(), masters, corpus, config, seed=0, hidden_size=4, checkpoint=plan, on_halved=halved.append)
        assert halved == []
        assert all(torch.equal(masters[name], value) for name, value in whole.items())

    def test_a_step_in_which_memory_ran_out_is_cut_the_same_way_again(self, llama, corpus, tmp_path):
        """It runs out on the retain side of step 3, whose state is saved: its forget side was not cut yet."""
        sizes = {}

        class Hungry(Toy):
            def forget_loss(self, step, domain, batch, masters):
                sizes.setdefault(step, []).append(("forget", len(batch)))
                return super().forget_loss(step, domain, batch, masters)

            def retain_loss(self, step, batch, masters):
                if len(batch) > 2 and step >= 3:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                sizes.setdefault(step, []).append(("retain", len(batch)))
                return super().retain_loss(step, batch, masters)

        path = tmp_path / "state"
        with pytest.raises(RuntimeError, match="power"):
            train_toy(corpus, path, toy=Hungry(), on_step=crash_at(4))
        assert saved_step(path) == 3
        before = dict(sizes)
        sizes.clear()
        config = TrainingConfig(
            steps=5, batch_size=4, checkpoint_every=3, optimizer=OptimizerConfig(lr=1e-2, betas=(0.0, 0.9)),
            gradients=GradientConfig(combination="sum"),
        )  # fmt: skip
        plan = CheckpointPlan(path, "toy", resume=True)
        train(Hungry(), Toy.masters(), corpus, config, seed=0, hidden_size=4, checkpoint=plan)
        assert sizes == {step: before[step] for step in (3, 4)}
        assert ("forget", 4) in sizes[3]
        assert ("retain", 2) in sizes[3]

    def test_tensors_without_memory_of_their_own_are_not_overwritten(self, corpus):
        """Autograd hands the same gradient to two parameters here, and one that is a view of a single number."""

        def forget(step, loss, masters):
            both = masters["a"] + masters["b"].flatten()[:3]
            return both.sum() + masters["b"].sum()

        masters = train_toy(corpus, toy=Toy(forget), combination="falcon", steps=2)
        assert all(value.isfinite().all() for value in masters.values())


@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 9), min_size=1),
    st.integers(1, 12),
    st.integers(1, 5),
)
def test_repeated_are_the_domains_that_steps_go_through_more_than_once(sizes, steps, batch_size):
    domains = {name: records(seed, size) for seed, (name, size) in enumerate(sizes.items())}
    data = TrainingData(domains, {"retain": records(9, 7)}, 0, CPU)
    seen = Counter(record.ids for step in range(steps) for record in data.at(step, batch_size, 3)[1].records)
    repeated = {record.ids for record in data.repeated(steps, batch_size)}
    for own in domains.values():
        more_than_once = any(seen[record.ids] > 1 for record in own)
        assert {record.ids in repeated for record in own} == {more_than_once}
