"""What may be measured: a bare GPTModel."""

from __future__ import annotations

from typing import Any

from ..errors import PlanError
from ..model import chunks_of

__all__ = ["bare_chunks"]


def bare_chunks(model: Any) -> list[Any]:
    """The chunks of a model. Raises PlanError where one is wrapped (DDP, Float16Module)."""
    chunks = chunks_of(model)
    for chunk in chunks:
        if not hasattr(chunk, "decoder"):
            raise PlanError(
                f"a bare GPTModel can be scored, and this is a {type(chunk).__name__}. Unwrap it: model.module."
            )
    return chunks
