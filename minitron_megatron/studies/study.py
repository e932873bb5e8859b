"""Settings of a study, and the studies of the package: one YAML file each."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from ..errors import RecipeError, did_you_mean
from ..files import read_text
from ..recipe import read_yaml
from ..settings import Field, Settings, Text, model_validator

__all__ = ["Arm", "Measure", "Study", "load_study", "shipped", "slug"]

FOLDER = Path(__file__).parent
OWN = ("out", "seed", "parallel", "model", "tokenizer", "plugins")
"""Recipe keys that are the user's or the command's, in every arm."""

Axis = Literal["layers", "hidden", "ffn"]


class Measure(Settings):
    """A number that is compared: a column of one row of a run's summary."""

    about: Text
    """Description of the number, with its unit."""
    model: Text = "distilled"
    """Row of the summary: `pruned`, `distilled`, `random init`, ..."""
    column: Text = "loss_nats_per_token"
    """Column of the summary; the name of a task of `evaluate`; or `loss of source N`, of the N-th one of
    `data.sources`."""
    better: Literal["lower", "higher"] = "lower"
    order: tuple[tuple[Text, ...], ...] = ()
    """The paper's order: groups of arms, the best group first. Default: the order of the printed numbers."""


class Arm(Settings):
    """One variant of the recipe."""

    set: dict[str, Any] = Field(default_factory=dict)
    """Recipe key, with dots, -> value, as with `--set`. Text in braces is computed from the recipe and its teacher."""
    match: Axis | None = None
    """Axis whose size is chosen so that the student has as many parameters as the recipe's own."""
    models: dict[str, str | None] = Field(default_factory=dict)
    """Row of the summary that a measure names -> the row that it is in this arm; null: the arm has no such number."""
    printed: dict[str, float] = Field(default_factory=dict)
    """Measure -> the number that the paper printed."""


class Study(Settings):
    """A comparison of arms, each run with several seeds."""

    title: Text
    claim: Text
    """Statement of the paper, in one sentence."""
    paper: Text
    """Place in the paper. [A] and [B] are the two papers."""
    measures: Annotated[dict[str, Measure], Field(min_length=1)]
    """Name -> number that is compared. The curves and the costs are those of the last one's model."""
    arms: Annotated[dict[str, Arm], Field(min_length=2)]
    """The first arm is the one that all others are compared with."""
    needs: tuple[Text, ...] = ()
    """Recipe keys that must be given."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides of every arm."""
    ranks: bool = False
    """Whether to show the rank of each arm by the first measure, and at each validation of the training after it."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Study:
        names = [slug(name) for name in self.arms]
        if twice := next((name for name in names if names.count(name) > 1 or not name), None):
            raise ValueError(f"Two arms would have the folder {twice!r}: rename one")
        for name, arm in self.arms.items():
            _known(f"arms.{name}.printed", arm.printed, self.measures)
            _known(f"arms.{name}.models", arm.models, {each.model for each in self.measures.values()})
        for name, measure in self.measures.items():
            _known(f"measures.{name}.order", [arm for group in measure.order for arm in group], self.arms)
        for key in (*self.set, *(key for arm in self.arms.values() for key in arm.set)):
            if key.partition(".")[0] in OWN:
                raise ValueError(f"A study cannot set {key}: it is the same in every arm")
        return self

    def order(self, measure: str) -> tuple[tuple[str, ...], ...]:
        """Return the paper's order of arms by a measure, the best group first; empty if it gave none."""
        if given := self.measures[measure].order:
            return given
        printed = {name: arm.printed[measure] for name, arm in self.arms.items() if measure in arm.printed}
        values = sorted(set(printed.values()), reverse=self.measures[measure].better == "higher")
        return tuple(tuple(name for name in printed if printed[name] == value) for value in values)


def _known(where: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{where} names {name!r}, which is not there.{did_you_mean(name, known)}")


def slug(name: str) -> str:
    """Return a name as the name of a folder."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def shipped() -> Iterator[tuple[str, Study]]:
    """Yield name and content of every study of the package."""
    for path in sorted(FOLDER.glob("*.yaml")):
        yield path.stem, _read(path)


def load_study(name: str) -> Study:
    """Return a study by its name, or by the path of its YAML file. Raises RecipeError for any other."""
    names = [path.stem for path in sorted(FOLDER.glob("*.yaml"))]
    if name in names:
        return _read(FOLDER / f"{name}.yaml")
    if Path(name).suffix in (".yaml", ".yml"):
        return _read(Path(name))
    raise RecipeError(
        f"there is no study {name!r}.{did_you_mean(name, names)} Give one of {', '.join(names)}, or a YAML file."
    )


def _read(path: Path) -> Study:
    text = read_text(path)
    try:
        tree: object = read_yaml(text)
        if not isinstance(tree, dict):
            raise RecipeError(f"it is not a mapping of keys. Start from a copy of {FOLDER / 'losses.yaml'}.")
        return Study(**tree)
    except RecipeError as error:
        raise RecipeError(f"study {path}: {error}") from error
