"""Algebra on low-rank products B A, batched over modules of equal shape, without ever forming a dense weight.

B: (modules, out, k), A: (modules, k, in). `reference.py` moves the adapter reference with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-7  # relative; a singular value below it is lost in the float32 of the stored factors anyway


def precise(tensor: Tensor) -> Tensor:
    """float64, so that differences of nearly equal products keep their digits; float32 on MPS."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def product_norm(B: Tensor, A: Tensor) -> Tensor:
    """Frobenius norms (modules,) of the products B A, from Gram matrices: |B A|^2 = tr(B'B AA')."""
    squared = ((B.mT @ B) * (A @ A.mT)).sum((-2, -1))
    return squared.clamp(min=0).sqrt()  # rounding may leave a tiny negative where the product is zero


def best_rank(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The closest product of at most `rank` (Eckart-Young): thin QRs of both factors, SVD of what is between.

    Returns B (modules, out, kept), A (modules, kept, in), the singular values shared evenly between the two;
    the Frobenius norms (modules,) of what was cut off; and the ranks in use (modules,): zero from there on,
    numerically zero singular values included.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    kept = torch.where(S > ROUNDING * S[:, :1], S, 0)[:, :rank]
    rest = S.clone()
    rest[:, : kept.shape[1]] -= kept
    root = kept.sqrt()
    new_B = (Q_B @ U[:, :, :rank]) * root[:, None, :]
    new_A = root[:, :, None] * (Vh[:, :rank] @ Q_A.mT)
    return new_B, new_A, torch.linalg.vector_norm(rest, dim=1), (kept > 0).sum(1)
