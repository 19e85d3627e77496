"""Low-rank algebra against dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tralign_mini.adapter_math import best_rank, product_norm


def factors(out: int, rank: int, into: int, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(3, out, rank, generator=generator, dtype=dtype)
    return B, torch.randn(3, rank, into, generator=generator, dtype=dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(out=st.integers(1, 7), rank=st.integers(1, 9), into=st.integers(1, 7), keep=st.integers(1, 9))
def test_the_best_rank_is_that_of_the_dense_svd(out, rank, into, keep):
    B, A = factors(out, rank, into)
    new_B, new_A, cut, used = best_rank(B, A, keep)
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    best = (U[..., :keep] * S[:, None, :keep]) @ Vh[:, :keep]
    torch.testing.assert_close(new_B @ new_A, best, rtol=0, atol=1e-9)
    torch.testing.assert_close(cut, S[:, keep:].norm(dim=1), rtol=0, atol=1e-9)
    assert used.tolist() == [min(out, rank, into, keep)] * 3
    # balanced: B'B and AA' are the same diagonal
    torch.testing.assert_close(new_B.mT @ new_B, new_A @ new_A.mT, rtol=0, atol=1e-9)


def test_numerically_zero_singular_values_are_dropped_and_counted():
    values = torch.tensor([[1.0, 1e-3, 5e-8, 0.0]], dtype=torch.float64)
    new_B, new_A, cut, used = best_rank(torch.diag_embed(values), torch.eye(4).double()[None], 4)
    assert used.tolist() == [2] and cut.item() == pytest.approx(5e-8)
    assert not new_B[..., 2:].any() and not new_A[:, 2:].any()


def test_zero_stays_zero():
    B, A = torch.zeros(2, 4, 3), torch.randn(2, 3, 5)
    new_B, new_A, cut, used = best_rank(B, A, 2)
    assert not (new_B @ new_A).any() and not cut.any() and not used.any()
    assert product_norm(B, A).tolist() == [0, 0]


def test_the_norm_needs_no_dense_weight_and_survives_cancellation():
    B, A = factors(6, 3, 5)
    torch.testing.assert_close(product_norm(B, A), (B @ A).flatten(1).norm(dim=1))
    nearly = torch.cat([B, -(1 + 1e-6) * B], 2), torch.cat([A, A], 1)
    torch.testing.assert_close(product_norm(*nearly), 1e-6 * product_norm(B, A), rtol=1e-3, atol=0)
    assert product_norm(torch.cat([B, -B], 2), torch.cat([A, A], 1)).max() < 1e-6  # never NaN
