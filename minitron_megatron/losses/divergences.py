"""Divergences of the student's logits from the teacher's, per token: value and gradient in one pass.

A divergence is called with the logits of both models, which it overwrites, and the vocabulary entries that they cover.
It returns this rank's part of each token's value (the ranks' parts add up to the value), and the gradient of the whole
value by this rank's student logits. `live` is the number of tensors of the logits' size that are alive at once, both
arguments included.

p is the student's softmax, q the teacher's. Values are in nats, except for MSE and Cosine, which compare the logits.
"""

from __future__ import annotations

import math
from dataclasses import Field, dataclass
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float32
from torch import Tensor

from ..errors import RecipeError
from ..parallel import one_kernel
from ..registry import Registry
from .vocab import Entries

__all__ = ["DIVERGENCES", "JSD", "MSE", "Cosine", "Divergence", "ForwardKL", "ReverseKL", "divergence_named"]


Logits = Float32[Tensor, "chunk entries"]
PerToken = Float32[Tensor, "chunk"]


class Divergence(Protocol):
    """Interface of a divergence (a plugin point): a dataclass whose fields are its constants."""

    live: ClassVar[int]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __call__(self, student: Logits, teacher: Logits, entries: Entries) -> tuple[PerToken, Logits]: ...


def divergence_named(name: str, **constants: float) -> Divergence:
    """Return the divergence of that name. Raises RecipeError for an unknown name or an unknown constant."""
    kind = DIVERGENCES[name]
    for constant in constants:
        if constant not in kind.__dataclass_fields__:
            raise RecipeError(f"divergence {name!r} has no {constant}. Leave {constant} out.")
    return kind(**constants)


@dataclass(frozen=True)
class ForwardKL:
    """KL(teacher || student): sum q (log q - log p). Source: Minitron, section 3."""

    live: ClassVar[int] = 3

    def __call__(self, student: Logits, teacher: Logits, entries: Entries) -> tuple[PerToken, Logits]:
        entries.log_softmax_(student, teacher)
        return _forward_kl(student, teacher)


@one_kernel
def _forward_kl(student: Logits, teacher: Logits) -> tuple[PerToken, Logits]:
    q = teacher.exp()
    value = teacher.sub_(student).mul_(q).sum(-1)
    return value, student.exp_().sub_(q)


@dataclass(frozen=True)
class ReverseKL:
    """KL(student || teacher): sum p (log p - log q). Its gradient is p (log p - log q - value)."""

    live: ClassVar[int] = 3

    def __call__(self, student: Logits, teacher: Logits, entries: Entries) -> tuple[PerToken, Logits]:
        entries.log_softmax_(student, teacher)
        ratio = teacher.neg_().add_(student)
        p = student.exp_()
        weighted = ratio.mul_(p)
        value = weighted.sum(-1)
        return value, weighted.sub_(p.mul_(entries.total(value).unsqueeze(-1)))


@dataclass(frozen=True)
class JSD:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), with m = beta q + (1 - beta) p.

    With k = KL(student || m), its gradient is (1 - beta) p (log p - log m - k), exactly 0 where both models are equal.
    Source: Agarwal et al., On-Policy Distillation of Language Models (arXiv 2306.13649), section 2.
    """

    beta: float = 0.5
    """Teacher's share of the mixture, between 0 and 1."""
    live: ClassVar[int] = 4

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise RecipeError(
                f"beta is {self.beta}. It must lie between 0 and 1; forward_kl and reverse_kl are its limits."
            )

    def __call__(self, student: Logits, teacher: Logits, entries: Entries) -> tuple[PerToken, Logits]:
        entries.log_softmax_(student, teacher)
        log_m = student + math.log1p(-self.beta)
        log_m = torch.logaddexp(log_m, teacher + math.log(self.beta), out=log_m)
        alike = student == teacher
        torch.where(alike, student, log_m, out=log_m)  # so that equal models have a gradient of exactly 0
        del alike
        log_p_ratio, log_q_ratio = student.sub_(log_m), teacher.sub_(log_m)  # log p - log m, log q - log m
        m = log_m.exp_()
        value = torch.exp(log_q_ratio).mul_(m).mul_(log_q_ratio).sum(-1).mul_(self.beta)
        p = torch.exp(log_p_ratio, out=log_q_ratio).mul_(m)
        weighted = log_p_ratio.mul_(p)
        student_part = weighted.sum(-1)
        gradient = weighted.sub_(p.mul_(entries.total(student_part).unsqueeze(-1))).mul_(1 - self.beta)
        return value.add_(student_part, alpha=1 - self.beta), gradient


@dataclass(frozen=True)
class MSE:
    """Squared difference of the logits, averaged over the entries."""

    live: ClassVar[int] = 3

    def __call__(self, student: Logits, teacher: Logits, entries: Entries) -> tuple[PerToken, Logits]:
        difference = student.sub_(teacher)
        value = torch.mul(difference, difference, out=teacher).sum(-1) / entries.size
        return value, difference.mul_(2 / entries.size)


@dataclass(frozen=True)
class Cosine:
    """1 - cosine similarity of the two logit vectors; the temperature does not change it."""

    live: ClassVar[int] = 3

    def __call__(self, student: Logits, teacher: Logits, entries: Entries) -> tuple[PerToken, Logits]:
        products = ((student, teacher), (student, student), (teacher, teacher))
        dot, student_sq, teacher_sq = entries.total(torch.stack([(a * b).sum(-1) for a, b in products])).unsqueeze(-1)
        student_sq, norms = student_sq.clamp_min(TINY), (student_sq * teacher_sq).sqrt().clamp_min(TINY)
        cosine = dot / norms
        gradient = student.mul_(cosine / student_sq).sub_(teacher.mul_(1 / norms))  # exactly 0 where both are equal
        if entries.size == 1:  # the direction of a single number is its sign, so that the gradient is 0
            gradient.zero_()
        return (1 - cosine).squeeze(-1) / entries.ranks, gradient


TINY = 1e-16
"""Lower bound of squared norms: all-zero logits have no direction."""

DIVERGENCES: Registry[type[Divergence]] = Registry(
    "divergence", {"forward_kl": ForwardKL, "reverse_kl": ReverseKL, "jsd": JSD, "mse": MSE, "cosine": Cosine}
)
