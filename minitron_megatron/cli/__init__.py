"""Command line: each command calls one function.

Knows: commands, flags, exit codes. Must not know: how anything is done.
"""

from .app import app
from .main import main

__all__ = ["app", "main"]
