"""Training phases with all their settings filled in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .data_keys import Data
from .schema import Recipe
from .training_keys import Distill, TrainingKeys

__all__ = ["ResolvedPhase", "light_recipe", "prefixes", "resolved"]


@dataclass(frozen=True)
class ResolvedPhase:
    """Settings of one training phase, with inherited keys filled in."""

    keys: TrainingKeys
    sequence: int
    """Tokens per sample."""
    weights: Sequence[float]
    """Blend weight of each source."""

    @property
    def steps(self) -> int:
        return self.keys.steps(self.sequence)

    @property
    def samples(self) -> int:
        return self.steps * self.keys.global_batch

    @property
    def tokens(self) -> int:
        """Tokens of the phase, in whole steps."""
        return self.samples * self.sequence


def resolved(keys: TrainingKeys, data: Data) -> list[ResolvedPhase]:
    """Return the phases in order: the stage's own keys first, then `distill.phases`."""
    found = [ResolvedPhase(keys, data.sequence, [source.weight for source in data.sources])]
    for phase in keys.phases if isinstance(keys, Distill) else ():
        last, given = found[-1], phase.model_dump(exclude_none=True)
        sequence, weights = given.pop("sequence", last.sequence), given.pop("weights", last.weights)
        found.append(ResolvedPhase(last.keys.replaced(**given), sequence, weights))
    return found


def prefixes(recipe: Recipe) -> list[Recipe]:
    """Return one recipe for each phase: the recipe cut off after that phase."""
    phases = recipe.distill.phases
    cut = [recipe.distill.replaced(phases=phases[:number]) for number in range(len(phases) + 1)]
    return [recipe.replaced(distill=distill) for distill in cut]


def light_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with a search's light distillation in place of its own."""
    assert recipe.search is not None and recipe.search.light is not None
    keys = recipe.search.light
    given = keys.model_dump(exclude_none=True, exclude={"top", "halvings", "measure_every", "independent_replicas"})
    given |= {"validate_every": keys.measure_every, "save_every": keys.measure_every, "save_async": False}
    distill = recipe.distill.replaced(**given, phases=(), start=None, retain=False)
    return recipe.replaced(distill=distill)
