"""Versions, commit and machine that produced a result."""

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
    """Return versions of installed packages, this project's commit if run from a checkout, and the machine."""
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
    """Return the commit of this package's checkout; `unknown` outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"
