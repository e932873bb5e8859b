"""launch/container.sh, with a docker that tells how it was called. No container was run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.cli.test_commands import ROOT


def test_docker_runs_as_the_user_whose_folder_it_writes_to(tmp_path: Path) -> None:
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text('#!/bin/sh\nfor each; do echo "$each"; done\n')
    docker.chmod(0o755)
    folder = tmp_path / "a folder"
    folder.mkdir()
    environment = {"PATH": f"{docker.parent}:{os.environ['PATH']}", "MINITRON_IMAGE": "minitron"}
    command = [str(ROOT / "launch" / "container.sh"), "minitron", "run", "a recipe.yaml"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[words.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"
    assert {f"HOME={folder}", f"{folder}:{folder}"} <= set(words)
    assert words[-4:] == ["minitron", "minitron", "run", "a recipe.yaml"]
