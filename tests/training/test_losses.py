"""Losses against loops written straight from the papers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from histossl.training.losses import contrast, nt_xent


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looped_nt_xent(a: torch.Tensor, b: torch.Tensor, temperature: float, groups: list[int] | None = None) -> float:
    views = [v / v.norm() for v in (*a, *b)]
    count, total = len(views), 0.0
    of = [*groups, *groups] if groups else [0] * count
    for i in range(count):
        denominator = 0.0
        for k in range(count):
            if k != i and of[k] == of[i]:
                denominator += math.exp(sum(x * y for x, y in zip(views[i], views[k], strict=True)) / temperature)
        j = (i + len(a)) % count
        similarity = sum(x * y for x, y in zip(views[i], views[j], strict=True)) / temperature
        total -= math.log(math.exp(similarity) / denominator)
    return total / count


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.floats(0.05, 2), st.integers(0, 9))
def test_nt_xent_is_the_paper_s_sum(batch, temperature, seed):
    a, b = normal(batch, 3, seed=seed), normal(batch, 3, seed=seed + 100)
    assert float(nt_xent(a, b, temperature)) == pytest.approx(looped_nt_xent(a, b, temperature), rel=1e-9, abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(0, 9))
def test_negatives_of_the_own_group_alone(groups, seed):
    a, b = normal(len(groups), 3, seed=seed), normal(len(groups), 3, seed=seed + 100)
    found = nt_xent(a, b, 0.3, torch.tensor(groups))
    assert float(found) == pytest.approx(looped_nt_xent(a, b, 0.3, groups), rel=1e-9, abs=1e-9)
    assert nt_xent(a, b, 0.3, torch.arange(len(a))) == 0  # each alone
    # How groups lie to one another is of no use: turning one of them changes nothing.
    turn, one = torch.linalg.qr(normal(3, 3, seed=seed + 7))[0], (torch.tensor(groups) == 0)[:, None]
    turned = (torch.where(one, v @ turn, v) for v in (a, b))
    torch.testing.assert_close(nt_xent(*turned, 0.3, torch.tensor(groups)), found)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_contrast_is_a_mean_over_positive_pairs(anchors, things, seed):
    similarity = normal(anchors, things, seed=seed)
    positives, candidates = normal(anchors, things, seed=seed + 1) > 0, normal(anchors, things, seed=seed + 2) > 0
    terms = []
    for i in range(anchors):
        denominator = sum(math.exp(similarity[i, k]) for k in range(things) if candidates[i, k])
        terms += [math.log(denominator) - similarity[i, j] for j in range(things) if positives[i, j] and denominator]
    expected = float(sum(terms)) / len(terms) if terms else 0.0
    assert float(contrast(similarity, positives, candidates)) == pytest.approx(expected, abs=1e-12)


def test_gradients_are_finite_where_an_anchor_has_no_candidate():
    similarity = normal(2, 3).requires_grad_()
    candidates = torch.tensor([[True, True, False], [False, False, False]])
    contrast(similarity, torch.ones(2, 3, dtype=torch.bool), candidates).backward()
    assert similarity.grad is not None
    assert similarity.grad.isfinite().all()
    assert (similarity.grad[1] == 0).all()


def test_nt_xent_gradient_by_finite_differences():
    a, b = normal(3, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: nt_xent(x, y, 0.3), (a, b))


def test_nt_xent_rises_as_partners_are_swapped_and_ignores_length():
    a = normal(6, 8)
    assert nt_xent(a, a, 0.1) < nt_xent(a, a.roll(1, 0), 0.1)
    torch.testing.assert_close(nt_xent(a, 3 * a, 0.1), nt_xent(2 * a, a, 0.1))


def test_nt_xent_stays_in_float32_under_autocast():
    a, b = normal(8, 16).float(), normal(8, 16, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = nt_xent(a.bfloat16(), b.bfloat16(), 0.05)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, nt_xent(a.bfloat16().float(), b.bfloat16().float(), 0.05))


def test_nt_xent_refuses_views_that_do_not_pair():
    with pytest.raises(ValueError, match="two views"):
        nt_xent(normal(3, 4), normal(2, 4), 0.1)
