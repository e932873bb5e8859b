"""Tasks of conversations that the harness lacks: BFCL v2 live, MT-Bench and ChatRAG-Bench."""

from .engine import CHAT_TASKS, NEED_JUDGE, ChatResults, check_chat_task, run_chat_task
from .judge import Judge

__all__ = ["CHAT_TASKS", "NEED_JUDGE", "ChatResults", "Judge", "check_chat_task", "run_chat_task"]
