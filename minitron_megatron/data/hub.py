"""Data sets of the Hugging Face Hub: downloaded by `datasets`, or taken from its cache, as Arrow files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ..errors import DataError, first_line
from .sources import HUB, text_files

__all__ = ["every_file", "hub_files"]

NAME = re.compile(rf"{HUB}([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::([\w.-]+))?")


def every_file(sources: Sequence[str | Path]) -> list[Path]:
    """Return the files to read of `sources`: those of this machine, then those of data sets of the Hub.

    Raises DataError as `text_files` does, and where a data set is neither in the cache of `datasets` nor reachable.
    """
    online = [str(source) for source in sources if str(source).startswith(HUB)]
    here = [source for source in sources if str(source) not in online]
    return [*text_files(here), *(file for source in online for file in hub_files(source))]


@cache
def hub_files(source: str) -> tuple[Path, ...]:
    """Return the Arrow files of `hf://owner/name[/configuration][:split]`; the split is `train` if none is named.

    No code of a data set runs. Raises DataError where it is neither in the cache of `datasets` nor reachable.
    """
    if not (parts := NAME.fullmatch(source)):
        raise DataError(f"{source} does not name a data set of the Hub. Write {HUB}owner/name, {HUB}owner/name:split.")
    name, configuration, split = parts.groups()
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"{source} can only be read with the package datasets: {error}. "
            "Install it (pip install 'minitron-megatron[data]')."
        ) from error
    try:
        rows = load_dataset(name, configuration, split=split or "train")
        return tuple(Path(file["filename"]) for file in rows.cache_files)
    except Exception as error:  # datasets, huggingface_hub, fsspec and httpx raise what they like
        raise DataError(
            f"{source} cannot be downloaded: {first_line(error)}. "
            "Correct its name or split, or download it where there is a network."
        ) from error
