"""Check that a model is a bare GPTModel, without a DDP or Float16Module wrapper."""

from __future__ import annotations

from ..errors import PlanError
from ..model import Chunk, Model, chunks_of

__all__ = ["bare_chunks"]


def bare_chunks(model: Model) -> list[Chunk]:
    """Return the chunks of a model. Raises PlanError if one is wrapped (DDP, Float16Module)."""
    chunks = chunks_of(model)
    for chunk in chunks:
        if not hasattr(chunk, "decoder"):
            raise PlanError(
                f"scoring needs a bare GPTModel, but this is a {type(chunk).__name__}. Unwrap it: model.module."
            )
    return chunks
