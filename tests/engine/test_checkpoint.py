import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from falcon_unlearn.engine.checkpoint import Progress, load_checkpoint, save_checkpoint
from falcon_unlearn.engine.optimizers import OptimizerConfig, build_optimizer
from falcon_unlearn.errors import UserError

OPTIMIZERS = {
    "adamw": OptimizerConfig(lr=1e-2, weight_decay=0.1),
    "sgd": OptimizerConfig(name="sgd", lr=1e-2),
    "sgd_plain": OptimizerConfig(name="sgd", lr=1e-2, betas=(0.0, 0.9)),
    "sophia": OptimizerConfig(name="sophia", lr=1e-2, rho=0.9, hessian_every=3),
    "sophia_published": OptimizerConfig(name="sophia", lr=1e-2, hessian="published_code"),
    "sophia_none": OptimizerConfig(name="sophia", lr=1e-2, hessian="none"),
}


def fresh(config=OPTIMIZERS["adamw"]):
    """Masters (one name with a slash, one a prefix of another) and their optimiser."""
    shapes = {"layers.1.w": (3, 4), "layers.1.w.b": (4,), "odd/name": (2, 2)}
    masters = {name: torch.ones(shape, requires_grad=True) for name, shape in shapes.items()}
    return masters, build_optimizer(config, masters.values(), hidden_size=8, batch_size=2)


def advance(masters, optimizer, steps):
    for step in steps:
        for i, parameter in enumerate(masters.values()):
            generator = torch.Generator().manual_seed(100 * step + i)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("config", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_going_on_is_bit_identical(tmp_path, config, stop):
    masters, optimizer = fresh(config)
    advance(masters, optimizer, range(stop))
    save_checkpoint(tmp_path / "state", Progress(stop, 4), "same", masters, optimizer)
    advance(masters, optimizer, range(stop, 9))
    resumed, resumed_optimizer = fresh(config)
    assert load_checkpoint(tmp_path / "state", "same", resumed, resumed_optimizer) == Progress(stop, 4)
    advance(resumed, resumed_optimizer, range(stop, 9))
    for name, value in masters.items():
        assert torch.equal(resumed[name], value)
        assert not torch.equal(value, torch.ones_like(value))
    save_checkpoint(tmp_path / "a", Progress(9, 4), "same", masters, optimizer)
    save_checkpoint(tmp_path / "b", Progress(9, 4), "same", resumed, resumed_optimizer)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_without_the_optimizer_state_it_would_not_be(tmp_path):
    """The test above can fail: momentum matters."""
    masters, optimizer = fresh()
    advance(masters, optimizer, range(4))
    save_checkpoint(tmp_path / "state", Progress(4, 4), "same", masters, optimizer)
    advance(masters, optimizer, range(4, 9))
    resumed, resumed_optimizer = fresh()
    load_checkpoint(tmp_path / "state", "same", resumed, resumed_optimizer)
    resumed_optimizer.state.clear()
    advance(resumed, resumed_optimizer, range(4, 9))
    assert not torch.equal(resumed["layers.1.w"], masters["layers.1.w"])


def test_masters_stay_the_same_leaves(tmp_path):
    masters, optimizer = fresh()
    advance(masters, optimizer, range(2))
    save_checkpoint(tmp_path / "state", Progress(2, 4), "same", masters, optimizer)
    resumed, resumed_optimizer = fresh()
    leaves = dict(resumed)
    load_checkpoint(tmp_path / "state", "same", resumed, resumed_optimizer)
    assert all(resumed[name] is leaves[name] and leaves[name].requires_grad for name in leaves)
    assert set(resumed_optimizer.state) == set(leaves.values())


def test_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    masters, optimizer = fresh()
    for step in range(3):
        save_checkpoint(tmp_path / "state", Progress(step, 4), "same", masters, optimizer)
        advance(masters, optimizer, [step])
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert load_checkpoint(tmp_path / "state", "same", *fresh()) == Progress(2, 4)


def test_a_failed_write_keeps_the_last_state(tmp_path, monkeypatch):
    masters, optimizer = fresh()
    save_checkpoint(tmp_path / "state", Progress(1, 4), "same", masters, optimizer)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "state", Progress(2, 4), "same", masters, optimizer)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert load_checkpoint(tmp_path / "state", "same", *fresh()) == Progress(1, 4)


class TestRefused:
    @pytest.fixture
    def state(self, tmp_path):
        masters, optimizer = fresh()
        advance(masters, optimizer, range(3))
        save_checkpoint(tmp_path / "state", Progress(3, 4), "mine", masters, optimizer)
        return tmp_path / "state"

    def refuse(self, path, match, fingerprint="mine"):
        """Loading fails with one line and changes nothing."""
        masters, optimizer = fresh()
        with pytest.raises(UserError, match=match) as caught:
            load_checkpoint(path, fingerprint, masters, optimizer)
        assert "--overwrite" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(value, torch.ones_like(value)) for value in masters.values())
        assert not optimizer.state

    def test_another_fingerprint(self, state):
        self.refuse(state, "another recipe, model or data", fingerprint="yours")

    @pytest.mark.parametrize("keep", [0, 5, 40, 0.5, 0.99, -1])
    def test_truncated(self, state, keep):
        data = state.read_bytes()
        state.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
        self.refuse(state, "not a usable checkpoint")

    def test_something_else(self, state):
        state.write_bytes(b"PK\x03\x04" * 100)
        self.refuse(state, "not a usable checkpoint")

    def test_a_folder(self, tmp_path):
        (tmp_path / "folder").mkdir()
        self.refuse(tmp_path / "folder", "not a usable checkpoint")

    @pytest.mark.parametrize(
        "metadata",
        [
            None,
            {"state": "{"},
            {"state": "[]"},
            {"state": json.dumps({"step": 3})},
            {"state": json.dumps({"step": None, "fingerprint": "mine"})},
        ],
    )
    def test_safetensors_without_a_state(self, state, metadata):
        save_file(load_file(state), state, metadata=metadata)
        self.refuse(state, "not a usable checkpoint")

    @pytest.mark.parametrize("change", ["absent", "reshaped"])
    def test_a_master_that_does_not_fit(self, state, change):
        tensors = load_file(state)
        value = tensors.pop("master/layers.1.w")
        if change == "reshaped":
            tensors["master/layers.1.w"] = value[:1]
        save_file(
            tensors, state, metadata={"state": json.dumps({"step": 3, "micro_batch_size": 4, "fingerprint": "mine"})}
        )
        self.refuse(state, r"no layers\.1\.w in it")
