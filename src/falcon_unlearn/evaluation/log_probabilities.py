"""Mean log-probabilities of answers under a model: batched, and all answers of a question in one pass.

The answers of a question begin alike: with the question, often with some words of their own. A tree holds every
distinct beginning once; an attention mask shows each token its own beginning and nothing else. On TOFU's perturbed
records that leaves about half of the tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from falcon_unlearn.corpus.batching import Encoded
from falcon_unlearn.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_ROWS_PER_LOG_SOFTMAX = 512
_TOLERANCE = 1e-4
_TOLERANCE_HALF = 0.1  # a few bf16 roundings of a large logit; a mask that is ignored moves some answer further


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block: eval mode and no gradients. After it every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def logits_at(
    model: PreTrainedModel,
    chosen: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Logits of some positions only, ``(N, vocabulary)`` in the model's dtype, in the order of ``chosen``'s true ones.

    The head never sees the other positions (unless it is no module of its own: then they are dropped behind it).

    Args:
        model: causal language model.
        chosen: boolean ``(batch, length)``.
        input_ids: ``(batch, length)``.
        attention_mask: ``(batch, length)``, or additive ``(batch, 1, length, length)``.
        position_ids: ``(batch, length)``, where they are not what the model counts by itself.
    """
    seen = False

    def choose(_head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal seen
        seen = True
        hidden, *rest = arguments
        return hidden[chosen.to(hidden.device)][None], *rest

    positions = {} if position_ids is None else {"position_ids": position_ids}
    head = model.get_output_embeddings()
    with contextlib.nullcontext() if head is None else head.register_forward_pre_hook(choose):
        logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions).logits
    return logits[0] if seen else logits[chosen.to(logits.device)]


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Sequences of tokens in which every distinct beginning stands once.

    Attributes:
        ids: token of each node.
        depths: its position in the sequences it belongs to.
        paths: for each sequence its nodes, first to last.
        starts: for each sequence the place in its path of the first token that counts, at least 1.
    """

    ids: tuple[int, ...]
    depths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def branches(self) -> int:
        """How many nodes are not on the longest path."""
        return len(self) - max(map(len, self.paths))

    @property
    def predicting(self) -> list[int]:
        """Nodes whose logits are needed, each once, in order."""
        return sorted(
            {node for path, start in zip(self.paths, self.starts, strict=True) for node in path[start - 1 : -1]}
        )


def prefix_tree(sequences: Sequence[Encoded]) -> PrefixTree:
    """The tree of ``sequences``; their answers are what counts."""
    ids: list[int] = []
    depths: list[int] = []
    paths = []
    nodes: dict[tuple[int, int], int] = {}
    for sequence in sequences:
        path: list[int] = []
        parent = -1
        for depth, token in enumerate(sequence.ids):
            node = nodes.setdefault((parent, token), len(ids))
            if node == len(ids):
                ids.append(token)
                depths.append(depth)
            path.append(node)
            parent = node
        paths.append(tuple(path))
    return PrefixTree(tuple(ids), tuple(depths), tuple(paths), tuple(max(s.answer_start, 1) for s in sequences))


def _tree_attention(trees: Sequence[PrefixTree], width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Additive mask ``(batch, 1, width, width)`` and positions ``(batch, width)``; padding sees itself."""
    visible = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    positions = torch.zeros((len(trees), width), dtype=torch.long)
    for row, tree in enumerate(trees):
        positions[row, : len(tree)] = torch.tensor(tree.depths)
        for path in map(torch.tensor, tree.paths):
            visible[row, path[:, None], path] = torch.ones((len(path), len(path)), dtype=torch.bool).tril()
    # Not booleans: eager attention adds the mask. Not minus infinity: the same in every dtype and kernel.
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    return mask[:, None], positions


def _tree_log_probabilities(
    model: PreTrainedModel, trees: Sequence[PrefixTree], pad_id: int, device: torch.device | str
) -> list[list[float]]:
    """Of each tree the mean log-probability per counted token of each of its sequences, from one forward pass."""
    width = max(map(len, trees))
    input_ids = torch.full((len(trees), width), pad_id, dtype=torch.long)
    attention = torch.zeros_like(input_ids)
    chosen = torch.zeros((len(trees), width), dtype=torch.bool)
    rows: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    before = 0
    for row, tree in enumerate(trees):
        input_ids[row, : len(tree)] = torch.tensor(tree.ids)
        attention[row, : len(tree)] = 1
        predicting = tree.predicting
        chosen[row, predicting] = True
        place = {node: before + i for i, node in enumerate(predicting)}
        before += len(predicting)
        for path, start in zip(tree.paths, tree.starts, strict=True):
            rows += [place[node] for node in path[start - 1 : -1]]
            targets += [tree.ids[node] for node in path[start:]]
            counts.append(len(path) - start)
    if all(len(tree.paths) == 1 for tree in trees):
        logits = logits_at(model, chosen.to(device), input_ids.to(device), attention.to(device))
    else:
        mask, positions = _tree_attention(trees, width, model.dtype)
        inputs = (tensor.to(device) for tensor in (chosen, input_ids, mask, positions))
        logits = logits_at(model, *inputs)
    log_sums = torch.cat([block.float().logsumexp(1) for block in torch.split(logits, _ROWS_PER_LOG_SOFTMAX)])
    at = torch.tensor(rows, device=logits.device)
    values = logits[at, torch.tensor(targets, device=logits.device)].float() - log_sums[at]
    means = iter([float(part.mean()) for part in torch.split(values.double().cpu(), counts)])
    return [[next(means) for _ in tree.paths] for tree in trees]


def length_sorted_trees(trees: Sequence[PrefixTree], batch_size: int) -> list[list[int]]:
    """Indices of ``trees`` in batches of similar length, of at most ``batch_size`` sequences each.

    A single tree may have more.
    """
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(trees)), key=lambda i: len(trees[i])):
        if len(trees[i].paths) > room:
            batches.append([])
            room = batch_size
        batches[-1].append(i)
        room -= len(trees[i].paths)
    return batches


def _window(model: PreTrainedModel) -> float:
    """How many tokens every layer sees at least."""
    config = model.config.get_text_config(decoder=True)
    sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((size for size in sizes if size), default=math.inf)


def shares_prefixes(
    model: PreTrainedModel, sequences: Sequence[Encoded], pad_id: int, device: torch.device | str
) -> bool:
    """Whether ``model`` can score sequences as one tree: it is tried on these and compared with one by one.

    It needs an attention that takes any mask, and no memory beside attention. ``sequences`` must be scorable, and no
    longer than a sliding window: a mask of ours replaces the model's own. Those that branch much tell most.
    """
    if getattr(model.config, "_attn_implementation", None) not in {"sdpa", "eager"}:
        return False
    apart = [prefix_tree([sequence]) for sequence in sequences]
    with evaluating(model):
        expected = [value for (value,) in _tree_log_probabilities(model, apart, pad_id, device)]
        try:
            (found,) = _tree_log_probabilities(model, [prefix_tree(sequences)], pad_id, device)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            return False  # each architecture has its own way to refuse such a mask
    tolerance = _TOLERANCE if torch.finfo(model.dtype).bits >= 32 else _TOLERANCE_HALF
    # False for NaN as well: nothing can be told from a broken model.
    return all(abs(a - b) <= tolerance for a, b in zip(expected, found, strict=True))


def _tree(groups: Sequence[Sequence[Encoded]], places: Sequence[tuple[int, int]]) -> PrefixTree:
    return prefix_tree([groups[g][i] for g, i in places])


def _parts(
    groups: Sequence[Sequence[Encoded]], batch_size: int, window: float
) -> tuple[list[list[tuple[int, int]]], list[list[tuple[int, int]]]]:
    """Places (group, item) of what can be scored: those that may share a tree, and those that stand alone."""
    together: list[list[tuple[int, int]]] = []
    apart: list[list[tuple[int, int]]] = []
    for g, group in enumerate(groups):
        scorable = [i for i, item in enumerate(group) if len(item) > max(item.answer_start, 1)]
        fitting = [(g, i) for i in scorable if len(group[i]) <= window]
        together += [fitting[start : start + batch_size] for start in range(0, len(fitting), batch_size)]
        apart += [[(g, i)] for i in scorable if len(group[i]) > window]
    return together, apart


def _trial(groups: Sequence[Sequence[Encoded]], together: Sequence[Sequence[tuple[int, int]]]) -> list[Encoded]:
    """What :func:`shares_prefixes` is tried on: the sequences that branch most; nothing where none share a tree."""
    most = max(together, key=lambda places: _tree(groups, places).branches, default=())
    return [groups[g][i] for g, i in most] if len(most) > 1 else []


def planned_passes(
    model: PreTrainedModel, groups: Sequence[Sequence[Encoded]], batch_size: int
) -> list[list[PrefixTree]]:
    """The forward passes of :func:`grouped_log_probabilities` on a model that shares prefixes, its trial first.

    A pass computes as many positions as its longest tree has nodes, for each tree, and logits of ``predicting`` only.
    """
    together, apart = _parts(groups, batch_size, _window(model))
    trial = _trial(groups, together)
    passes = [[prefix_tree([item]) for item in trial], [prefix_tree(trial)]] if trial else []
    for parts in (together, apart):
        trees = [_tree(groups, places) for places in parts]
        passes += [[trees[t] for t in batch] for batch in length_sorted_trees(trees, batch_size)]
    return passes


def grouped_log_probabilities(
    model: PreTrainedModel,
    groups: Sequence[Sequence[Encoded]],
    pad_id: int,
    batch_size: int,
    device: torch.device | str,
    *,
    ranks: Ranks = ALONE,
) -> list[list[float]]:
    """Mean log-probability (nats) per answer token of each sequence, in the order of ``groups``.

    Sequences of a group that begin alike share that beginning where the model allows (:func:`shares_prefixes`).
    Log-softmax runs in fp32 and where an answer token is predicted only. The first token of a sequence has nothing to
    predict it and never counts; a sequence without a countable answer token gets NaN.

    Args:
        model: causal language model on ``device``.
        groups: sequences within the model's context length, by question.
        pad_id: any token id.
        batch_size: sequences per forward pass; it changes nothing but rounding.
        device: where batches are put.
        ranks: they share the forward passes.
    """
    result = [[math.nan] * len(group) for group in groups]
    together, apart = _parts(groups, batch_size, _window(model))
    trial = _trial(groups, together)
    if trial and not shares_prefixes(model, trial, pad_id, device):
        together, apart = [], [[place] for places in (*together, *apart) for place in places]
    with evaluating(model):
        for parts in (together, apart):
            trees = [_tree(groups, places) for places in parts]
            batches = length_sorted_trees(trees, batch_size)
            passes = [[trees[t] for t in batch] for batch in batches]
            found = ranks.spread(passes, lambda each: _tree_log_probabilities(model, each, pad_id, device))
            for t, values in zip(itertools.chain(*batches), itertools.chain(*found), strict=True):
                for (g, i), value in zip(parts[t], values, strict=True):
                    result[g][i] = value
    return result


def answer_log_probabilities(
    model: PreTrainedModel,
    encoded: Sequence[Encoded],
    pad_id: int,
    batch_size: int,
    device: torch.device | str,
) -> list[float]:
    """:func:`grouped_log_probabilities` of sequences that have nothing to do with each other."""
    return [value for (value,) in grouped_log_probabilities(model, [[e] for e in encoded], pad_id, batch_size, device)]
