"""Numerical tolerances of the tests by dtype. Loosen a row only with a comment that gives the reason."""

from __future__ import annotations

import torch

__all__ = ["TOLERANCES", "tolerance"]

TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}


def tolerance(dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Return `rtol` and `atol` for `torch.testing.assert_close` of sums in different orders of addition."""
    return TOLERANCES[dtype]
