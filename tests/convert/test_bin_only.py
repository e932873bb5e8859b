"""A folder whose weights are pickles is refused with a command, and the command gives a folder that loads."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minitron_megatron.convert import check_weights, folder_hash
from minitron_megatron.errors import CheckpointError


def test_the_command_in_the_message_converts_it(material: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(material / "model", tmp_path / "it's old"))
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"has no model.safetensors .*not opened here.*safely: python -c "
    ) as refused:
        check_weights(model)
    command = re.search(r"python (-c .*)$", str(refused.value))
    assert command is not None
    subprocess.run(f"{sys.executable} {command[1]}", shell=True, check=True, capture_output=True)
    assert folder_hash(tmp_path / "it's old-safetensors") == folder_hash(material / "model")
    assert (tmp_path / "it's old-safetensors" / "tokenizer.json").is_file()
