"""Ways to train that were tried beside FALCON's default preset, on the two seeds that settings are chosen on.

    python benchmarks/ways.py                            # every way, seeds 5 and 6; a quarter of an hour of CPU
    python benchmarks/ways.py --ways meta-2 sharp-0.1    # these alone
    python benchmarks/ways.py --json

Prototypes: each is on top of the default preset, on its data and with its losses unless said otherwise. Results are
kept line by line in --out and not made again. See ways_harness.py for what is measured and docs/science.md for what
came of it.

meta       every other step the forget gradient is taken at weights that k steps of finetuning on eight forget records
           have relearned, and applied to the weights as they were (first-order; Tamirisa et al. 2024, arXiv 2408.00761)
sharp      it is taken at w + rho e/|e|, e the forget loss's ascent, or the descent of the answers' loss (Foret et al.,
           ICLR 2021; Fan et al. 2025, arXiv 2502.05374)
latent     under a change of hidden states that makes the forget answers more probable, of at most this share of each
           state's norm (Sheshadri et al. 2024, arXiv 2407.15549)
average    of the weights: decaying by .9 a step, or the plain mean of the last 20 steps
distilled  a copy of the unlearned model with noise mixed into the MLP matrices of its upper half, taught by that model
           (Lee et al. 2025, arXiv 2506.06278)
noise      mixed into the same matrices before the default's training
layer      preset layer at layer 4, then so many steps of the default
weight     no way of its own: the default with a heavier forget loss, for comparison
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ways_harness import Result, Tensors, Way, World, default, measure, open_world, oracle_of, table

from falcon_unlearn.corpus.batching import Batch, collate
from falcon_unlearn.methods import WholeFalcon
from falcon_unlearn.methods.base import WholeSetup, generator_for
from falcon_unlearn.methods.whole_method import all_batches, nll
from falcon_unlearn.methods.whole_model import Pass, WholeModel
from falcon_unlearn.model.decoder import find_layers, first_tensor
from falcon_unlearn.model.loading import load_causal_lm, number_of_layers
from falcon_unlearn.objectives.vocabulary import kl_divergence
from falcon_unlearn.stages import CachePlan, Watch, given_layers, unlearn_layers

INNER_RECORDS = 8
INNER_RATE = 1e-3
"""Of relearning inside the loop; the attack's own at this width."""


class Elsewhere(WholeFalcon):
    """The forget gradient is taken at other weights than those it changes."""

    def moved(self, step: int, domain: str, batch: Batch, masters: Tensors) -> dict[str, Tensor]:
        """By how much they differ, without gradients; empty: not at all."""
        raise NotImplementedError

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        by = self.moved(step, domain, batch, masters)
        there = {name: value + by[name] if name in by else value for name, value in masters.items()}
        return super().forget_loss(step, domain, batch, there)


class Meta(Elsewhere):
    """At weights that finetuning on a few forget records has relearned."""

    def __init__(self, config: Any, setup: WholeSetup, *, steps: int, every: int = 2) -> None:
        super().__init__(config, setup)
        self._steps, self._every = steps, every
        self._records = [record for batch in all_batches(setup) for record in batch.records]

    def moved(self, step: int, domain: str, batch: Batch, masters: Tensors) -> dict[str, Tensor]:
        """See :class:`Elsewhere`."""
        if step % self._every != self._every - 1:
            return {}
        drawn = torch.randperm(len(self._records), generator=generator_for(self.setup.seed, "relearn", step))
        few = collate([self._records[i] for i in drawn[:INNER_RECORDS].tolist()], self.setup.pad_id)
        copy = {name: value.detach().clone().requires_grad_() for name, value in masters.items()}
        optimizer = torch.optim.AdamW(copy.values(), lr=INNER_RATE, weight_decay=0.0)
        for _ in range(self._steps):
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(nll(self.predictions(few, copy)))
            optimizer.step()
        return {name: value.detach() - masters[name].detach() for name, value in copy.items()}


class Sharp(Elsewhere):
    """At the weights within a ball that are worst for forgetting, to first order."""

    def __init__(self, config: Any, setup: WholeSetup, *, radius: float, of_answers: bool = False) -> None:
        super().__init__(config, setup)
        self._radius, self._of_answers = radius, of_answers

    def moved(self, step: int, domain: str, batch: Batch, masters: Tensors) -> dict[str, Tensor]:
        """See :class:`Elsewhere`."""
        if self._of_answers:
            loss = -nll(self.predictions(batch, masters))
        else:
            loss = WholeFalcon.forget_loss(self, step, domain, batch, masters)
        gradients = torch.autograd.grad(loss, list(masters.values()))
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        return {name: self._radius * g / norm for name, g in zip(masters, gradients, strict=True)}


class Nudged(WholeModel):
    """Where it runs with masters, ``added`` (by layer) is added to the layers' outputs."""

    added: Mapping[int, Tensor] = {}

    def run(self, batch: Batch, layers: Sequence[int], masters: Mapping[str, Tensor] | None) -> Pass:
        """See :class:`falcon_unlearn.methods.whole_model.WholeModel`."""
        with ExitStack() as hooks:
            if masters is not None:
                for layer, value in self.added.items():
                    handle = self._stack[layer].register_forward_hook(partial(_add, value))
                    hooks.callback(handle.remove)
            return super().run(batch, layers, masters)


def _add(value: Tensor, _module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> Any:
    changed = first_tensor(output) + value
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


class Latent(WholeFalcon):
    """Forgets under changes of hidden states that bring the answers back."""

    def __init__(self, config: Any, setup: WholeSetup, *, layers: Sequence[int], share: float, steps: int) -> None:
        self._model = Nudged(setup.model.model)
        super().__init__(config, replace(setup, model=self._model))
        self._at, self._share, self._steps = tuple(layers), share, steps

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        held = {name: value.detach() for name, value in masters.items()}
        with torch.no_grad():
            states = self._model.run(batch, self._at, held).layers
        bounds = self._share * states.norm(dim=-1, keepdim=True)
        added = torch.zeros_like(states)
        try:
            for _ in range(self._steps):
                added.requires_grad_()
                self._model.added = dict(zip(self._at, added.unbind(), strict=True))
                (gradient,) = torch.autograd.grad(nll(self.predictions(batch, held)), added)
                towards = gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-12)
                moved = added.detach() - bounds / self._steps * towards * (1 if self._steps == 1 else 1.5)
                added = moved * (bounds / moved.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp(max=1)
            self._model.added = dict(zip(self._at, added.unbind(), strict=True))
            return super().forget_loss(step, domain, batch, masters)
        finally:
            self._model.added = {}


def with_method(world: World, build: Callable[..., WholeFalcon]) -> Tensors:
    """The default's training with another method."""
    method = world.method(build)
    masters = method.setup.model.masters()
    world.train(method, masters)
    return masters


def averaged(world: World, *, decay: float | None = None, last: int = 0) -> Tensors:
    """The default's weights averaged over steps: with decay from the beginning, or the plain mean of the last."""
    method = world.method()
    masters = method.setup.model.masters()
    mean = {name: value.detach().clone() for name, value in masters.items()}
    first, done = world.recipe.training.steps - last, 0

    def on_step(_: Any) -> None:
        nonlocal done
        done += 1
        if decay is None and done <= first:
            return
        share = 1 / (done - first) if decay is None else 1 - decay
        for name, value in masters.items():
            mean[name].lerp_(value.detach(), share)

    world.train(method, masters, on_step=on_step)
    return mean


def mix_noise(world: World, masters: Tensors, share: float) -> None:
    """Mix noise of their own spread into the MLP matrices of the upper half of the layers."""
    model = load_causal_lm(world.source)
    stack, _ = find_layers(model)
    total = number_of_layers(model.config)
    with torch.no_grad():
        for name, value in masters.items():
            if any(name.startswith(f"{stack}.{n}.mlp.") for n in range(total // 2, total)):
                noise = torch.randn(value.shape, generator=generator_for(world.seed, "noise", name))
                value.mul_(1 - share).add_(noise, alpha=share * float(value.std()))


def noise_first(world: World, *, share: float, steps: int | None = None) -> Tensors:
    """Noise, then the default; its references stay those of the original model."""
    method = world.method()
    masters = method.setup.model.masters()
    mix_noise(world, masters, share)
    world.train(method, masters, steps=steps)
    return masters


def distilled(world: World, *, share: float, steps: int, rate: float = 1e-3) -> Tensors:
    """The unlearned model is the teacher of a noised copy, on retain, forget and stand-ins' records."""
    unlearned = default(world)
    model = load_causal_lm(world.source)
    for name, parameter in model.named_parameters():
        parameter.data = unlearned[name].detach().clone()
    whole, data, size = WholeModel(model), world.data, world.recipe.training.batch_size
    masters = whole.masters()
    mix_noise(world, masters, share)
    optimizer = torch.optim.AdamW(masters.values(), lr=rate, weight_decay=0.0)
    strangers = world.method().setup  # those that were not passed over

    def divergence(batch: Batch) -> Tensor:
        ours = whole.predictions(batch, world.encoded.loss_mask, masters)
        theirs = whole.predictions(batch, world.encoded.loss_mask, None)
        return kl_divergence(ours.hidden, ours.head, theirs.hidden, theirs.head).mean()

    for step in range(steps):
        _, forget, retain = data.at(step, size, world.seed)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        for batch, weight in ((retain, 1.0), (forget, 0.5), (strangers.alternative(step, forget), 0.5)):
            torch.autograd.backward(weight * divergence(batch))
        optimizer.step()
    return masters


def layer_first(world: World, *, steps: int, layer: int = 4) -> Tensors:
    """Preset layer, then the default's training on all parameters; its references stay those of the original model."""
    below = open_world(world.seed, world.folder.parent, ["method.preset=layer", f"selection.layers=[{layer}]"])
    model = load_causal_lm(below.source)
    selection = given_layers(below.recipe, number_of_layers(model.config))
    assert selection is not None
    watch = Watch(lambda *_: None, lambda _: None, lambda _: None, lambda _: None)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        cache = CachePlan(Path(folder) / "activations", resume=False, say=lambda _: None)
        edited = unlearn_layers(below.recipe, model, below.encoded, selection, cache=cache, watch=watch).tensors
    method = world.method()
    masters = method.setup.model.masters()
    with torch.no_grad():
        for name, value in edited.items():
            masters[name].copy_(value)
    if steps:
        world.train(method, masters, steps=steps)
    return {name: value.detach() for name, value in masters.items()}


def overridden(world: World, *, overrides: Sequence[str]) -> Tensors:
    """The default with other settings."""
    return default(open_world(world.seed, world.folder.parent, overrides))


def _method(build: Callable[..., WholeFalcon], **settings: Any) -> Way:
    return partial(with_method, build=partial(build, **settings))


WAYS: Mapping[str, Way] = {
    "default": default,
    "meta-2": _method(Meta, steps=2),
    "sharp-0.1": _method(Sharp, radius=0.1),
    "latent-2-0.3": _method(Latent, layers=(2,), share=0.3, steps=1),
    "average-0.9": partial(averaged, decay=0.9),
    "distilled-0.5": partial(distilled, share=0.5, steps=100),
    "noise-0.5": partial(noise_first, share=0.5),
    "layer-30": partial(layer_first, steps=30),
    "meta-5": _method(Meta, steps=5),
    "sharp-0.5": _method(Sharp, radius=0.5),
    "sharp-answers-0.25": _method(Sharp, radius=0.25, of_answers=True),
    "sharp-answers-0.5": _method(Sharp, radius=0.5, of_answers=True),
    "sharp-answers-1": _method(Sharp, radius=1.0, of_answers=True),
    "latent-1+3-0.2": _method(Latent, layers=(1, 3), share=0.2, steps=2),
    "average-last-20": partial(averaged, last=20),
    "noise-0.25": partial(noise_first, share=0.25),
    "layer-20": partial(layer_first, steps=20),
    "weight-2": partial(overridden, overrides=["method.forget_weight=2"]),
    "weight-4": partial(overridden, overrides=["method.forget_weight=4"]),
}


def read(path: Path) -> list[Result]:
    """Results kept so far."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Result(**json.loads(line)) for line in lines]


def main() -> None:
    """Do what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6])
    parser.add_argument("--draws", type=int, default=3, help="sets of known facts of the relearning attack")
    parser.add_argument("--known", type=int, default=5, help="how many of the 48 are known; the others are scored")
    parser.add_argument("--out", type=Path, default=Path("runs/ways"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"results-{arguments.known}.jsonl"
    worlds: dict[int, World] = {}
    for name in [*arguments.ways, "oracle"]:
        for seed in arguments.seeds:
            if any((r.way, r.seed) == (name, seed) and len(r.relearned) == arguments.draws for r in read(path)):
                continue
            if seed not in worlds:
                worlds[seed] = open_world(seed, arguments.out)
            world = worlds[seed]
            if name == "oracle":
                found = oracle_of(world, arguments.draws, arguments.known)
            else:
                found = measure(name, WAYS[name], world, arguments.draws, arguments.known)
            with path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(asdict(found)) + "\n")
            print(found, file=sys.stderr, flush=True)
    names = [*arguments.ways, "oracle"]
    shown = [
        r
        for name in names
        for r in read(path)
        if r.way == name and r.seed in arguments.seeds and len(r.relearned) == arguments.draws
    ]
    print(json.dumps([asdict(r) for r in shown]) if arguments.json else table(shown))


if __name__ == "__main__":
    main()
