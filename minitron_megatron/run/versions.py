"""What a result was made with: versions, commit, machine."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__

__all__ = ["versions"]

PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "safetensors",
    "tokenizers",
    "transformer-engine",
    "nvidia-modelopt",
)


def versions() -> dict[str, str | int]:
    """Versions of what is installed, this project's commit where it runs from a checkout, and the machine."""
    found: dict[str, str | int] = {
        "minitron-megatron": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"machine": f"{platform.system()} {platform.machine()}"}


def _commit() -> str:
    """The commit of the checkout that this package lies in; `unknown` outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"
