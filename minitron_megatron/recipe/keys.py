"""What recipe keys are made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["Count", "DType", "Keys", "Layers", "NotNegative", "Positive", "Written"]

DType = Literal["float32", "bfloat16"]


def _whole(value: Any) -> Any:
    """YAML reads `94e9` as text and `94.0e9` as a float: both are whole numbers here."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _layers(value: Any) -> Any:
    """A number of layers, or a list of them; said once, where pydantic would tell of each alternative."""
    listed = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(layer, int) for layer in listed) or (isinstance(value, int) and value < 1):
        raise ValueError("Give how many layers to keep, or a list of those that stay")
    return value


Written = Annotated[str, BeforeValidator(str)]
Count = Annotated[int, BeforeValidator(_whole), Field(gt=0)]
Layers = Annotated[int | tuple[int, ...], BeforeValidator(_layers)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Keys(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
