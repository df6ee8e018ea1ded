"""Losses for unlearning, against formulas written out in numpy."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from echelon.edit import gradient_ascent_loss, gradient_difference_loss, inverted_hinge_loss, kl_loss, npo_loss, sequence_log_probs, token_cross_entropy

LABELS = torch.tensor([[3, -100, 5, 0, 2], [1, 4, 4, -100, -100]])  # after the shift: 5, 0, 2 and 4, 4


def drawn(seed=0, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def hinge_by_hand(logits, labels, margin=1.0):
    """Value and gradient from the closed forms, one token after the other."""
    z, total, gradient, count = logits.detach().double().numpy(), 0.0, np.zeros(tuple(logits.shape)), 0
    for row in range(len(z)):
        for place in range(z.shape[1] - 1):
            y = int(labels[row, place + 1])
            if y == -100:
                continue
            p = softmax(z[row, place])
            other = max((v for v in range(len(p)) if v != y), key=lambda v: p[v])
            count += 1
            if margin + p[y] - p[other] <= 0:
                continue
            total += margin + p[y] - p[other]
            here = p * (p[other] - p[y])
            here[y] = p[y] * (1 - p[y] + p[other])
            here[other] = -p[other] * (1 - p[other] + p[y])
            gradient[row, place] = here
    return total / count, gradient / count


@pytest.mark.parametrize("margin", [1.0, 0.1])
@pytest.mark.parametrize("chunk", [1024, 2])
def test_the_hinge_and_its_gradient_are_those_of_the_formulas(margin, chunk):
    logits = drawn()
    loss = inverted_hinge_loss(logits, LABELS, margin=margin, chunk=chunk)
    loss.backward()
    value, gradient = hinge_by_hand(logits, LABELS, margin)
    assert float(loss.detach()) == pytest.approx(value, abs=1e-6)
    np.testing.assert_allclose(logits.grad.numpy(), gradient, atol=1e-6)


def test_the_hinge_at_its_ends():
    labels = torch.tensor([[0, 2]])
    uniform = torch.zeros(1, 2, 7)
    sure, gone = uniform.clone(), uniform.clone()
    sure[0, 0, 2], gone[0, 0, 5] = 100, 100
    assert [float(inverted_hinge_loss(z, labels)) for z in (uniform, sure, gone)] == pytest.approx([1, 2, 0], abs=1e-6)
    gone.requires_grad_()
    inverted_hinge_loss(gone, labels).backward()
    assert float(gone.grad.abs().max()) < 1e-6


def test_logits_between_0_and_1_get_their_softmax_too():
    logits = drawn().detach().sigmoid().requires_grad_()
    assert float(inverted_hinge_loss(logits, LABELS).detach()) == pytest.approx(hinge_by_hand(logits, LABELS)[0], abs=1e-6)


def test_of_a_tie_one_runner_up_gets_the_gradient():
    logits = torch.zeros(1, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    inverted_hinge_loss(logits, torch.tensor([[0, 1]])).backward()
    pushed = logits.grad[0, 0]
    assert pushed[1] > 0 and sorted(pushed[[0, 2, 3]].tolist()) == pytest.approx([-0.25, 0, 0], abs=1e-3)


LOSSES = {
    "ihl": inverted_hinge_loss, "ce": token_cross_entropy, "ga": gradient_ascent_loss, "kl": lambda z, y: kl_loss(z, drawn(1).detach()[:, : z.shape[1]], y),
    "gd": lambda z, y: gradient_difference_loss(z, y, z, y, retain_weight=0.5), "npo": lambda z, y: npo_loss(sequence_log_probs(z, y), torch.zeros(len(y))),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_label_there_is_neither_loss_nor_gradient(name):
    logits = drawn()
    loss = LOSSES[name](logits, torch.full((2, 5), -100))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(20 * np.log(2) if name == "npo" else 0) and not logits.grad.any()  # npo: -(2 / 0.1) log sigmoid(0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_constant_on_the_logits_changes_nothing(name):
    logits = drawn().detach()
    assert float(LOSSES[name](logits + 5.0, LABELS)) == pytest.approx(float(LOSSES[name](logits, LABELS)), rel=1e-5)


@pytest.mark.parametrize("name", ["ihl", "ce", "ga", "gd", "npo"])
def test_padding_changes_nothing(name):
    logits = drawn().detach()
    longer, labels = torch.cat([logits, drawn(2).detach()], 1), torch.cat([LABELS, torch.full((2, 5), -100)], 1)
    assert float(LOSSES[name](longer, labels)) == pytest.approx(float(LOSSES[name](logits, LABELS)), rel=1e-6)


@pytest.mark.parametrize("name", ["ihl", "ce", "kl"])
def test_chunks_change_nothing(name):
    whole, parts = drawn(), drawn()
    first = {"ihl": inverted_hinge_loss, "ce": token_cross_entropy, "kl": lambda z, y, **k: kl_loss(z, drawn(1), y, **k)}[name]
    (a, b) = first(whole, LABELS), first(parts, LABELS, chunk=2)
    a.backward()
    b.backward()
    assert float(b.detach()) == pytest.approx(float(a.detach()), rel=1e-6)
    torch.testing.assert_close(parts.grad, whole.grad)


def test_one_row_is_as_good_as_several():
    logits = drawn().detach()
    each = [float(inverted_hinge_loss(logits[i : i + 1], LABELS[i : i + 1])) for i in range(2)]
    assert float(inverted_hinge_loss(logits, LABELS)) == pytest.approx((3 * each[0] + 2 * each[1]) / 5, rel=1e-6)


def test_cross_entropies_are_torchs():
    logits = drawn().detach()
    expected = float(cross_entropy(logits[:, :-1].reshape(-1, 7), LABELS[:, 1:].reshape(-1)))
    assert float(token_cross_entropy(logits, LABELS)) == pytest.approx(expected, rel=1e-6)
    assert float(gradient_ascent_loss(logits, LABELS)) == pytest.approx(-expected, rel=1e-6)
    other = drawn(3).detach()
    kept = float(cross_entropy(other[:, :-1].reshape(-1, 7), LABELS[:, 1:].reshape(-1)))
    assert float(gradient_difference_loss(logits, LABELS, other, LABELS, retain_weight=2.0)) == pytest.approx(2 * kept - expected, rel=1e-6)


def test_divergence_and_log_probabilities_by_hand():
    logits, before = drawn().detach(), drawn(1).detach()
    divergences, sums = [], [0.0, 0.0]
    for row, place in ((0, 1), (0, 2), (0, 3), (1, 0), (1, 1)):
        p, q = softmax(logits[row, place].double().numpy()), softmax(before[row, place].double().numpy())
        divergences.append((q * np.log(q / p)).sum())
        sums[row] += np.log(p[int(LABELS[row, place + 1])])
    assert float(kl_loss(logits, before, LABELS)) == pytest.approx(np.mean(divergences), rel=1e-5)
    assert float(kl_loss(before, before, LABELS)) == pytest.approx(0, abs=1e-6)
    assert sequence_log_probs(logits, LABELS).tolist() == pytest.approx(sums, rel=1e-5)


def test_npo_is_gradient_ascent_for_small_beta_and_fades_below_the_reference():
    p = torch.tensor([-3.0, -5.0], requires_grad=True)
    npo_loss(p, torch.tensor([-4.0, -4.0]), beta=1e-4).backward()
    assert p.grad.tolist() == pytest.approx([0.5, 0.5], rel=1e-3)
    low = torch.tensor([-300.0, -4.0], requires_grad=True)
    loss = npo_loss(low, torch.tensor([-4.0, -4.0]), beta=0.1)
    loss.backward()
    assert low.grad[0] < 1e-10 and float(low.grad[1]) == pytest.approx(0.5)
    assert float(loss.detach()) == pytest.approx(10 * np.log(2), rel=1e-6)  # the mean of 0 and (2 / 0.1) log 2


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="vocabulary of 1; a runner-up needs at least 2"):
        inverted_hinge_loss(torch.zeros(1, 3, 1), torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"logits have shape \(1, 3, 4\) and labels \(1, 2\)"):
        token_cross_entropy(torch.zeros(1, 3, 4), torch.zeros(1, 2, dtype=torch.long))
