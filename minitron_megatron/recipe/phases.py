"""Training in phases, each with all that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .schema import Data, Recipe
from .training_keys import Distill, TrainingKeys

__all__ = ["ResolvedPhase", "light_recipe", "prefixes", "resolved"]


@dataclass(frozen=True)
class ResolvedPhase:
    """What a phase trains with."""

    keys: TrainingKeys
    sequence: int
    """Tokens a sample."""
    weights: Sequence[float]
    """Of each source."""

    @property
    def steps(self) -> int:
        return self.keys.steps(self.sequence)

    @property
    def tokens(self) -> int:
        """Of whole steps."""
        return self.steps * self.keys.global_batch * self.sequence


def resolved(keys: TrainingKeys, data: Data) -> list[ResolvedPhase]:
    """The phases in order: one, and those that distillation adds."""
    found = [ResolvedPhase(keys, data.sequence, [source.weight for source in data.sources])]
    for phase in keys.phases if isinstance(keys, Distill) else ():
        last, given = found[-1], phase.model_dump(exclude_none=True)
        sequence, weights = given.pop("sequence", last.sequence), given.pop("weights", last.weights)
        found.append(ResolvedPhase(last.keys.model_copy(update=given), sequence, weights))
    return found


def prefixes(recipe: Recipe) -> list[Recipe]:
    """The recipe as it was when each of its phases was the last."""
    phases = recipe.distill.phases
    cut = [recipe.distill.model_copy(update={"phases": phases[:number]}) for number in range(len(phases) + 1)]
    return [recipe.model_copy(update={"distill": distill}) for distill in cut]


def light_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with a search's light distillation in place of its own."""
    assert recipe.search is not None and recipe.search.light is not None
    keys = recipe.search.light
    given = keys.model_dump(exclude_none=True, exclude={"top", "halvings", "measure_every", "independent_replicas"})
    given |= {"validate_every": keys.measure_every, "save_every": keys.measure_every, "save_async": False}
    distill = recipe.distill.model_copy(update={**given, "phases": (), "start": None, "retain": False})
    return recipe.model_copy(update={"distill": distill})
