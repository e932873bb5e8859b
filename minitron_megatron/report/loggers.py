"""wandb and TensorBoard as listeners. What they are told stands in `metrics.jsonl` too, which is the truth."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from ..errors import RecipeError
from ..events import Event, Listener
from ..files import read_as, write_json
from ..run_folder import RunFolder

__all__ = ["logged"]

WandbMode = Literal["online", "offline"]


class WandbId(TypedDict):
    id: str


def _finite(event: Event) -> dict[str, float]:
    return {f"{event.label}/{name}": float(value) for name, value in event.values.items() if math.isfinite(value)}


@contextmanager
def logged(
    folder: Path,
    config: Mapping[str, Any],
    *,
    wandb: WandbMode | None = None,
    project: str = "minitron",
    tensorboard: bool = False,
) -> Iterator[Listener]:
    """A listener that tells all that is asked for, opened at the first measurement: before it the folder may be
    somebody else's.

    config: what the run was told. Raises RecipeError where a package is not installed, or wandb refuses.
    """
    for name, asked in (("wandb", wandb), ("tensorboard", tensorboard)):
        if asked and find_spec(name) is None:
            raise RecipeError(f"log.{name} is set, and {name} is not installed. Run `pip install {name}`.")
    with ExitStack() as held:
        listeners: list[Listener] = []

        def tell(event: Event) -> None:
            if not event.values:
                return
            if not listeners and wandb:
                listeners.append(held.enter_context(_wandb(folder, wandb, project, config)))
            if len(listeners) < bool(wandb) + tensorboard:
                listeners.append(held.enter_context(_tensorboard(RunFolder(folder).tensorboard, config)))
            for listener in listeners:
                listener(event)

        yield tell


@contextmanager
def _wandb(folder: Path, mode: WandbMode, project: str, config: Mapping[str, Any]) -> Iterator[Listener]:
    """Under the id that `folder` keeps; each stage has steps of its own."""
    import wandb

    known = RunFolder(folder).wandb_id
    if not known.exists():
        write_json(known, {"id": secrets.token_hex(8)})
    try:
        log = wandb.init(
            id=read_as(known, WandbId)["id"],
            name=folder.resolve().name,
            project=project,
            mode=mode,
            dir=folder,
            resume="allow" if mode == "online" else None,
            config=dict(config) | {"versions": read_as(RunFolder(folder).versions, dict[str, str | int | None])},
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.Error as error:
        raise RecipeError(f"wandb refuses: {error}. Run `wandb login`, or set log.wandb to offline.") from error
    stages: set[str] = set()

    def tell(event: Event) -> None:
        values = _finite(event)
        if not values:
            return
        if event.label not in stages:
            stages.add(event.label)
            log.define_metric(f"{event.label}/*", step_metric=f"{event.label}/step")
        log.log({**values, f"{event.label}/step": event.done})

    try:
        yield tell
    except BaseException:
        log.finish(exit_code=1)
        raise
    log.finish()


@contextmanager
def _tensorboard(folder: Path, config: Mapping[str, Any]) -> Iterator[Listener]:
    """One more event file each time a run goes on."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder))  # type: ignore[no-untyped-call]
    writer.add_text("recipe", f"```\n{json.dumps(config, indent=2)}\n```")

    def tell(event: Event) -> None:
        for name, value in _finite(event).items():
            writer.add_scalar(name, value, event.done)
        if event.done >= event.total:
            writer.flush()

    try:
        yield tell
    finally:
        writer.close()
