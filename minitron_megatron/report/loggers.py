"""wandb and TensorBoard as listeners. `metrics.jsonl` holds the same values and is authoritative."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from ..errors import RecipeError, first_line
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
    config: Mapping[str, object],
    *,
    wandb: WandbMode | None = None,
    project: str | None = None,
    tensorboard: bool = False,
) -> Iterator[Listener]:
    """Yield a listener for all configured loggers. They open at the first measurement, when the run folder is locked.

    config: the run's recipe. Raises RecipeError if a package is not installed, or wandb refuses.
    """
    for name, wanted in (("wandb", wandb), ("tensorboard", tensorboard)):
        if wanted and find_spec(name) is None:
            raise RecipeError(f"`{name}` is set, but {name} is not installed. Run `pip install {name}`.")
    with ExitStack() as held:
        listeners: list[Listener] = []

        def listen(event: Event) -> None:
            if not event.values:
                return
            if not listeners and wandb:
                listeners.append(held.enter_context(_wandb(folder, wandb, project, config)))
            if len(listeners) < bool(wandb) + tensorboard:
                listeners.append(held.enter_context(_tensorboard(RunFolder(folder).tensorboard, config)))
            for listener in listeners:
                listener(event)

        yield listen


@contextmanager
def _wandb(folder: Path, mode: WandbMode, project: str | None, config: Mapping[str, object]) -> Iterator[Listener]:
    """Log to the wandb run whose id is stored in `folder`; each stage has its own step axis."""
    import wandb

    id_file = RunFolder(folder).wandb_id
    if not id_file.exists():
        write_json(id_file, {"id": secrets.token_hex(8)})
    try:
        log = wandb.init(
            id=read_as(id_file, WandbId)["id"],
            name=folder.resolve().name,
            project=project,
            mode=mode,
            dir=folder,
            resume="allow" if mode == "online" else None,
            config=dict(config) | {"versions": read_as(RunFolder(folder).versions, dict[str, str | int | None])},
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.Error as error:
        raise RecipeError(
            f"wandb failed: {first_line(error)}. Run `wandb login`, or set `wandb` to offline."
        ) from error
    stages: set[str] = set()

    def listen(event: Event) -> None:
        values = _finite(event)
        if not values:
            return
        if event.label not in stages:
            stages.add(event.label)
            log.define_metric(f"{event.label}/*", step_metric=f"{event.label}/step")
        log.log({**values, f"{event.label}/step": event.done})

    try:
        yield listen
    except BaseException:
        log.finish(exit_code=1)
        raise
    log.finish()


@contextmanager
def _tensorboard(folder: Path, config: Mapping[str, object]) -> Iterator[Listener]:
    """Log to TensorBoard; each start of a run adds an event file."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    writer.add_text("recipe", f"```\n{json.dumps(config, indent=2)}\n```")

    def listen(event: Event) -> None:
        for name, value in _finite(event).items():
            writer.add_scalar(name, value, event.done)
        if event.done >= event.total:
            writer.flush()

    try:
        yield listen
    finally:
        writer.close()
