import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F

from falcon_unlearn.objectives import vocabulary
from falcon_unlearn.objectives.vocabulary import Head, ce_u, kl_divergence, target_log_probabilities, undial


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_logits(hidden, head):
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


class Case:
    """A current model, a reference of another width over the same vocabulary, and targets."""

    def __init__(self, tokens=7, hidden=5, size=23, *, bias=True, scale=1.0, softcap=None, seed=0):
        self.hidden = normal(tokens, hidden, seed=seed)
        self.head = Head(normal(size, hidden, seed=seed + 1), normal(size, seed=seed + 2) if bias else None)
        self.head = Head(self.head.weight, self.head.bias, scale, softcap)
        self.reference_hidden = normal(tokens, hidden + 1, seed=seed + 3)
        self.reference_head = Head(normal(size, hidden + 1, seed=seed + 4), None, 0.7, softcap)
        self.targets = torch.randint(size, (tokens,), generator=torch.Generator().manual_seed(seed))

    def inputs(self):
        tensors = [self.hidden, self.head.weight, *([] if self.head.bias is None else [self.head.bias])]
        return [tensor.clone().requires_grad_() for tensor in tensors]

    def with_inputs(self, hidden, weight, bias=None):
        return hidden, Head(weight, bias, self.head.scale, self.head.softcap)

    def reference(self):
        return self.reference_hidden, self.reference_head


def plain_target(case, hidden, head):
    return F.log_softmax(plain_logits(hidden, head), -1)[torch.arange(len(hidden)), case.targets]


def plain_forward_kl(case, hidden, head):
    current, reference = plain_logits(hidden, head).log_softmax(-1), plain_logits(*case.reference()).log_softmax(-1)
    return (reference.exp() * (reference - current)).sum(-1)


def plain_reverse_kl(case, hidden, head):
    current, reference = plain_logits(hidden, head).log_softmax(-1), plain_logits(*case.reference()).log_softmax(-1)
    return (current.exp() * (current - reference)).sum(-1)


def plain_undial(case, hidden, head):
    aim = plain_logits(*case.reference()) - 3.0 * F.one_hot(case.targets, len(head.weight))
    return -(aim.softmax(-1) * plain_logits(hidden, head).log_softmax(-1)).sum(-1)


def plain_ce_u(case, hidden, head):
    logits = plain_logits(hidden, head)
    aim = logits.detach().masked_fill(F.one_hot(case.targets, len(head.weight)).bool(), -math.inf)
    return -(aim.softmax(-1) * logits.log_softmax(-1)).sum(-1)


PAIRS = {
    "target": (lambda c, h, head, **k: target_log_probabilities(h, head, c.targets, **k), plain_target),
    "forward_kl": (lambda c, h, head, **k: kl_divergence(h, head, *c.reference(), **k), plain_forward_kl),
    "reverse_kl": (lambda c, h, head, **k: kl_divergence(h, head, *c.reference(), "reverse", **k), plain_reverse_kl),
    "undial": (lambda c, h, head, **k: undial(h, head, c.targets, *c.reference(), strength=3.0, **k), plain_undial),
    "ce_u": (lambda c, h, head, **k: ce_u(h, head, c.targets, **k), plain_ce_u),
}
every = pytest.mark.parametrize(("ours", "plain"), PAIRS.values(), ids=PAIRS)


@every
@given(
    tokens=st.integers(0, 9),
    hidden=st.integers(1, 6),
    size=st.integers(2, 40),
    block=st.integers(1, 50),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.3, 4.0]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_value_and_gradients_are_those_of_the_plain_way(
    ours, plain, tokens, hidden, size, block, bias, scale, softcap, seed
):
    case = Case(tokens, hidden, size, bias=bias, scale=scale, softcap=softcap, seed=seed)
    upstream = normal(tokens, seed=seed + 9)
    mine, theirs = case.inputs(), case.inputs()
    value = ours(case, *case.with_inputs(*mine), block=block)
    expected = plain(case, *case.with_inputs(*theirs))
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    gradients = torch.autograd.grad(value, mine, upstream)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, theirs, upstream), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "ce_u"])  # whose target moves, but counts as still
def test_finite_differences(name):
    case = Case(3, 2, 5, scale=1.3, softcap=4.0)
    assert gradcheck(lambda *inputs: PAIRS[name][0](case, *case.with_inputs(*inputs), block=2), case.inputs())


@every
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=["hidden", "weight", "bias", "hidden_and_bias"])
def test_only_what_wants_a_gradient_gets_one(ours, plain, wanted):
    case = Case()
    inputs, reference = case.inputs(), case.inputs()
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i in wanted)
    ours(case, *case.with_inputs(*inputs), block=4).sum().backward()
    plain(case, *case.with_inputs(*reference)).sum().backward()
    for i, tensor in enumerate(inputs):
        if i in wanted:
            torch.testing.assert_close(tensor.grad, reference[i].grad)
        else:
            assert tensor.grad is None


@every
def test_nothing_of_tokens_times_vocabulary_is_saved_or_made(ours, plain, monkeypatch):
    tokens, size, block = 6, 500, 16
    case = Case(tokens, 3, size)
    saved, widest = [], []
    logits = Head.logits

    def watched(head, hidden):
        result = logits(head, hidden)
        widest.append(result.numel())
        return result

    monkeypatch.setattr(Head, "logits", watched)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        value = ours(case, *case.with_inputs(*case.inputs()), block=block).sum()
    value.backward()
    assert max(saved) == size * 3  # the head's own weight
    assert max(widest) == tokens * block
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        plain(case, *case.with_inputs(*case.inputs())).sum()
    assert max(saved) == tokens * size  # what the hook sees of the plain way


def test_default_block_keeps_the_budget(monkeypatch):
    widths = []
    rows = Head.rows
    monkeypatch.setattr(Head, "rows", lambda head, start, end: widths.append(end - start) or rows(head, start, end))
    monkeypatch.setattr(vocabulary, "BLOCK_BYTES", 4 * 10 * 150)
    case = Case(10, 3, 300)
    target_log_probabilities(case.hidden, case.head, case.targets)
    assert widths == [128, 128, 44]


@every
def test_a_graph_kept_gives_the_same_gradient_twice(ours, plain):
    case = Case()
    inputs = case.inputs()
    value = ours(case, *case.with_inputs(*inputs), block=5).sum()
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(value, inputs), strict=True):
        assert torch.equal(one, two)


def test_a_head_tied_to_the_embedding_gets_both_gradients():
    case = Case()
    gradients = []
    for value_of in (PAIRS["target"][0], plain_target):
        weight = case.head.weight.clone().requires_grad_()
        value_of(case, torch.tanh(weight[case.targets]), Head(weight)).sum().backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


def test_the_reference_gets_no_gradient():
    case = Case()
    hidden, weight = case.reference_hidden.requires_grad_(), case.reference_head.weight.requires_grad_()
    for name in ("forward_kl", "reverse_kl", "undial"):
        assert not PAIRS[name][0](case, case.hidden, case.head).requires_grad
    assert hidden.grad is None
    assert weight.grad is None


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_divergence_from_itself_is_zero_and_so_is_its_gradient(direction):
    case = Case()
    hidden, weight, bias = case.inputs()
    value = kl_divergence(hidden, Head(weight, bias), case.hidden, case.head, direction, block=4)
    assert value.abs().max() < 1e-12
    for gradient in torch.autograd.grad(value.sum(), (hidden, weight, bias)):
        assert gradient.abs().max() < 1e-12


def test_directions_are_each_other_with_the_models_swapped():
    case = Case()
    there = kl_divergence(case.hidden, case.head, *case.reference(), "forward")
    back = kl_divergence(*case.reference(), case.hidden, case.head, "reverse")
    torch.testing.assert_close(there, back)
    assert (there > 0).all()


def test_undial_of_infinite_strength_at_the_reference_itself_is_ce_u():
    case = Case()
    lowered = undial(case.hidden, case.head, case.targets, case.hidden, case.head, strength=math.inf, block=1)
    torch.testing.assert_close(lowered, ce_u(case.hidden, case.head, case.targets, block=3))


def test_undial_of_no_strength_is_divergence_plus_the_references_entropy():
    case = Case()
    reference = plain_logits(*case.reference()).log_softmax(-1)
    entropy = -(reference.exp() * reference).sum(-1)
    loss = undial(case.hidden, case.head, case.targets, *case.reference(), strength=0.0)
    torch.testing.assert_close(loss, kl_divergence(case.hidden, case.head, *case.reference()) + entropy)


@every
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_logits_overflow_nothing(ours, plain, shift):
    case = Case()
    shifted = Head(case.head.weight, case.head.bias + shift)
    torch.testing.assert_close(
        ours(case, case.hidden, shifted, block=3), ours(case, case.hidden, case.head), rtol=1e-7, atol=1e-7
    )


@every
def test_bfloat16_is_reduced_in_fp32(ours, plain):
    case = Case(6, 8, 64)
    inputs = [tensor.detach().bfloat16().requires_grad_() for tensor in case.inputs()]
    case.reference_hidden = case.reference_hidden.bfloat16()
    case.reference_head = Head(case.reference_head.weight.bfloat16())
    hidden, head = case.with_inputs(*inputs)
    value = ours(case, hidden, head, block=16)
    assert value.dtype == torch.float32
    gradients = torch.autograd.grad(value.sum(), inputs)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 3

    case.reference_hidden = case.reference_hidden.double()
    case.reference_head = Head(case.reference_head.weight.double())
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = plain(case, *case.with_inputs(*exact))
    torch.testing.assert_close(value.double(), expected, rtol=0.02, atol=0.05)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert (gradient.double() - reference).norm() < 0.02 * reference.norm()


def test_logits_are_the_plain_ones_for_any_leading_shape():
    case = Case(scale=0.5, softcap=3.0)
    torch.testing.assert_close(case.head.logits(case.hidden[None]), plain_logits(case.hidden, case.head)[None])


def test_a_shift_is_added_to_the_logits_of_a_reference():
    generator = torch.Generator().manual_seed(0)
    hidden, other, weight, shift, targets = (
        torch.randn(7, 16, generator=generator), torch.randn(7, 16, generator=generator),
        torch.randn(300, 16, generator=generator), 3 * torch.randn(300, generator=generator),
        torch.randint(300, (7,), generator=generator),
    )  # fmt: skip
    expected = (other @ weight.T + shift).log_softmax(-1)
    shifted = Head(weight, shift=shift)
    found = target_log_probabilities(other, shifted, targets, block=64)
    assert torch.allclose(found, expected.gather(-1, targets[:, None])[:, 0], atol=1e-5)
    now = (hidden @ weight.T).log_softmax(-1)
    divergence = (expected.exp() * (expected - now)).sum(-1)
    assert torch.allclose(kl_divergence(hidden, Head(weight), other, shifted, block=64), divergence, atol=1e-5)
