"""Tokenizer worker processes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from minitron_megatron import data
from minitron_megatron.data import encode
from minitron_megatron.errors import DataError
from tests.limits import HANGS

ENDLESS = """
    import sys
    from itertools import repeat
    from tokenizers import Tokenizer
    from minitron_megatron.data import prepare, token_writer
    from minitron_megatron.data.encode import Encoder, encode_all

    if __name__ == "__main__":
        encoder = Encoder(Tokenizer.from_file(sys.argv[1]), 0, token_writer.token_dtype(3))
        slow = {"torch", "megatron", "transformers"} & set(sys.modules)
        for each in encode_all(repeat(["w1 w2"]), encoder, 2):
            print(each, slow, flush=True)
"""


def test_they_import_no_torch_and_end_with_a_process_that_is_killed(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(textwrap.dedent(ENDLESS))
    code = [sys.executable, str(tmp_path / "endless.py"), str(tokenizer / "tokenizer.json")]
    with subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "[(array([1, 2, 0], dtype=uint16),)] set()\n"
        parent.kill()
        parent.communicate(timeout=HANGS)  # returns once no process holds its output open


def test_a_name_that_the_package_lacks_is_named() -> None:
    with pytest.raises(AttributeError, match=r"^module 'minitron_megatron\.data' has no attribute 'nothing'$"):
        data.nothing


def test_a_process_that_is_killed_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(contextlib.nullcontext):
        def submit(self, *_: object) -> None:
            raise BrokenProcessPool

    monkeypatch.setattr(encode, "ProcessPoolExecutor", lambda *_: Broken(Broken()))
    with pytest.raises(
        DataError, match=r"^A tokenizer process was killed, perhaps for lack of memory\. Use fewer `workers`\.$"
    ):
        list(encode.encode_all([["w1"]], list, workers=2))
