"""Values of a study that depend on the recipe: arithmetic over its numbers and its teacher's sizes, in braces."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..convert import read_config
from ..errors import MinitronError, RecipeError, first_line
from ..forecast import student_shape
from ..layout import flops_per_token, parameters
from ..recipe import Recipe

__all__ = ["filled", "parameters_of", "quantities"]

OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "round": round,
    "range": lambda end: list(range(end)),
}
BRACES = re.compile(r"\{([^{}]*)\}")


def quantities(recipe: Recipe) -> dict[str, float]:
    """Return the names that a study may use: the teacher's sizes, and numbers of the recipe."""
    teacher = read_config(recipe.model).shape
    student, sequence = student_shape(recipe, teacher), recipe.data.sequence
    names = ("layers", "hidden", "ffn", "heads", "kv_groups")
    sizes = {name: getattr(teacher, name) for name in names} | {"vocab": teacher.vocab}
    sizes |= {f"student_{name}": getattr(student, name) for name in names}
    taught = flops_per_token(teacher, sequence) / (3 * flops_per_token(student, sequence))
    return {
        **sizes,
        "tokens": recipe.distill.tokens,
        "equal_compute_tokens": round(recipe.distill.tokens * (1 + taught)),
        "warmup_steps": recipe.distill.warmup_steps,
        "lr": recipe.distill.lr,
        "samples": recipe.score.samples,
    }


def parameters_of(recipe: Recipe) -> int:
    """Return the parameters of a recipe's student; with a search, of its largest candidate."""
    return parameters(student_shape(recipe, read_config(recipe.model).shape))


def filled(value: object, names: Mapping[str, float]) -> Any:
    """Return a value with every text in braces computed; text that is nothing but braces becomes a number.

    Raises RecipeError for a name, function or operator that is not known.
    """
    if isinstance(value, Mapping):
        return {key: filled(inner, names) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [filled(inner, names) for inner in value]
    if not isinstance(value, str):
        return value
    if whole := BRACES.fullmatch(value):
        return _computed(whole[1], names)
    return BRACES.sub(lambda found: str(_computed(found[1], names)), value)


def _computed(text: str, names: Mapping[str, float]) -> Any:
    def value(node: ast.AST) -> Any:
        match node:
            case ast.Expression(body=body):
                return value(body)
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
            case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]) if name in FUNCTIONS:
                return FUNCTIONS[name](*map(value, parts))
        raise RecipeError(
            f"{{{text}}} cannot be computed: use numbers, + - * / //, {', '.join(FUNCTIONS)} and the names "
            f"{', '.join(names)}."
        )

    try:
        return value(ast.parse(text.strip(), mode="eval"))
    except MinitronError:
        raise
    except (SyntaxError, ArithmeticError, TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{{{text}}} cannot be computed: {first_line(error)}. Correct it.") from error
