"""Tokenizing text and chats to disk, and batches of tokens, with megatron-core's indexed datasets.

Knows: text files, tokenizers and their chat templates, `.bin/.idx` pairs, the samples of each step and data-parallel
rank. Must not know: models, losses, recipes. Every rank reads its own batches; no tokens are broadcast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .chat import REWARD_KEYS
from .chat_encode import LossOn
from .document import SEPARATOR, TEXT_KEY
from .preferences import PreferencePair, preference_pairs
from .prepare import HELD_OUT_SHARE, prepare
from .prompts import ChatCodec, PromptRecord, chat_codec, read_prompts
from .sources import HUB, Sources, check_source, input_files, most_bytes, places, text_files
from .template import chat_marks
from .token_files import Prepared, PreparedSplit, check_content
from .tokenizer import (
    check_same_tokenizer,
    check_tokenizer,
    corpus_marks,
    end_of_document,
    load_tokenizer,
    settings_without_chat,
    transformers_tokenizer,
    vocabulary,
)

if TYPE_CHECKING:
    from .batches import Batch, calibration, calibration_batches, check_split, held_out_batches, step_batches
    from .corpus import Corpus, samples_by_source

__all__ = [
    "HELD_OUT_SHARE",
    "HUB",
    "REWARD_KEYS",
    "SEPARATOR",
    "TEXT_KEY",
    "Batch",
    "ChatCodec",
    "Corpus",
    "LossOn",
    "PreferencePair",
    "Prepared",
    "PreparedSplit",
    "PromptRecord",
    "Sources",
    "calibration",
    "calibration_batches",
    "chat_codec",
    "chat_marks",
    "check_content",
    "check_same_tokenizer",
    "check_source",
    "check_split",
    "check_tokenizer",
    "corpus_marks",
    "end_of_document",
    "held_out_batches",
    "input_files",
    "load_tokenizer",
    "most_bytes",
    "places",
    "preference_pairs",
    "prepare",
    "read_prompts",
    "samples_by_source",
    "settings_without_chat",
    "step_batches",
    "text_files",
    "transformers_tokenizer",
    "vocabulary",
]


def __getattr__(name: str) -> object:
    """Import what needs torch when it is first asked for: the processes that tokenize do without."""
    if name in __all__:
        from . import batches, corpus

        return getattr(batches if name in batches.__all__ else corpus, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
