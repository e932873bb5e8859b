"""The command line: a verb calls a function, nothing else.

Knows: verbs, flags, exit codes. Must not know: how anything is done.
"""

from .app import app
from .main import main

__all__ = ["app", "main"]
