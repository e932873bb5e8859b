"""Command line in unusual environments: launchers' variables, pipes, terminals, early signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from minitron_megatron.__main__ import DEVICE_SETTINGS
from minitron_megatron.errors import TopologyError
from minitron_megatron.parallel import Topology, claim_device, launched
from minitron_megatron.parallel.topology import _launched_world
from tests.cli.test_commands import ENVIRONMENT, ROOT, call
from tests.limits import HANGS

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"WORLD_SIZE": "abc"},
        {"WORLD_SIZE": "-1"},
        {"WORLD_SIZE": "0"},
        {"RANK": "1"},
        {"RANK": "first"},
        {"MASTER_PORT": "x"},
        {"MASTER_PORT": "0"},
        {"MASTER_PORT": "99999"},
        {"MASTER_ADDR": ""},
    ],
    ids=str,
)
def test_variables_that_no_launcher_sets_are_named(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str]) -> None:
    for name, value in (LAUNCHED | wrong).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TopologyError, match=f"{next(iter(wrong))}='?{next(iter(wrong.values()))}"):
        _launched_world()


def test_a_world_without_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TopologyError, match="no RANK"):
        _launched_world()
    monkeypatch.setenv("WORLD_SIZE", "")
    assert (_launched_world(), launched("WORLD_SIZE", 3)) == (1, 3)


def test_a_rank_beyond_the_gpus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    claim_device()
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(
        TopologyError, match=r"LOCAL_RANK=4 needs 5 GPUs, and this process sees 4\. Start at most 4 processes here"
    ):
        claim_device()
    assert chosen == [3]


PRECISION = """
import torch
from minitron_megatron.parallel import claim_device
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.set_device = lambda number: None
before = torch.get_float32_matmul_precision()
claim_device()
print(before, torch.get_float32_matmul_precision())
"""


def test_fp32_is_fp32_though_nvidias_images_ask_for_tf32() -> None:
    """Not run on a GPU: this is the precision that torch asks of its products there."""
    environment = ENVIRONMENT | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run([sys.executable, "-c", PRECISION], env=environment, capture_output=True, text=True)
    assert done.stdout == "high highest\n", done.stderr


SETTINGS = """
import os, sys
import minitron_megatron.cli
minitron_megatron.cli.main = lambda: print([os.environ[name] for name in names], "torch" in sys.modules)
from minitron_megatron.__main__ import DEVICE_SETTINGS as names, main
main()
"""


def test_every_start_has_the_settings_of_devices_before_torch_is_imported() -> None:
    """Also that of `torchrun -m minitron_megatron`, which passes no script of ours; the user's own settings win."""
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in DEVICE_SETTINGS}
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "max_split_size_mb:64"
    done = subprocess.run([sys.executable, "-c", SETTINGS], env=environment, capture_output=True, text=True)
    assert done.stdout == "['1', 'max_split_size_mb:64', '1'] False\n", done.stderr


def test_a_wrong_environment_is_exit_2_and_one_message(recipe_file: object) -> None:
    recipe = recipe_file()  # type: ignore[operator]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = call("run", recipe, **LAUNCHED | {"MASTER_PORT": port})
    assert done.returncode == 2, done.stderr
    assert f"127.0.0.1:{port}" in done.stderr and "Traceback" not in done.stderr
    for variables in ({"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "abc", "RANK": "x"}):
        for arguments in (("run", recipe), ("run", recipe, "--dry-run")):
            done = call(*arguments, **variables)
            assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr


def shell(line: str) -> subprocess.CompletedProcess[str]:
    start = f'set -o pipefail; minitron() {{ {sys.executable} -m minitron_megatron "$@"; }}; {line}'
    options = {"env": ENVIRONMENT, "cwd": ROOT, "capture_output": True, "text": True, "timeout": HANGS}
    return subprocess.run(["bash", "-c", start], check=False, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("minitron schema | true", 0),
        ("minitron schema | head -c 10 > /dev/null", 0),
        ("minitron schema >&- 2>&-", 0),
        ("minitron show nowhere 2>&1 | true", 2),
        ("PYTHONIOENCODING=ascii minitron show 'é[/x]' 2>/dev/null", 2),
        ("minitron show $'\\xff' 2>/dev/null", 2),
    ],
)
def test_a_reader_that_goes_away_or_an_odd_name_changes_no_exit_code(line: str, code: int) -> None:
    done = shell(line)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr


@pytest.mark.parametrize("arguments", [("report", "README.md"), ("run", "README.md"), ("run", "docs")])
def test_a_path_of_something_else_is_exit_2(arguments: tuple[str, str]) -> None:
    verb, name = arguments
    done = call(verb, ROOT / name)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr


@pytest.mark.parametrize(
    ("number", "code", "ahead"),
    [
        *((signal.SIGINT, 130, ahead) for ahead in (0.0, 0.3, 0.9)),
        *((signal.SIGTERM, 75, ahead) for ahead in (0.0, 0.9)),
        (signal.SIGUSR1, 75, 0.3),  # handled as SIGTERM is
    ],
)
def test_a_signal_before_work_begins_has_its_exit_code(
    recipe_file: object, number: signal.Signals, code: int, ahead: float
) -> None:
    """ahead: seconds between the first line of our code and the signal."""
    seen = "import sys, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    seen += "import minitron_megatron.__main__ as m; signal_is_ready = m.main; "
    recipe = recipe_file()  # type: ignore[operator]
    start = f"{seen}sys.argv = ['minitron', 'run', {str(recipe)!r}]; print('here', flush=True); m.main()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", start], env=ENVIRONMENT, **pipes) as run:  # type: ignore[call-overload]
        assert run.stdout.readline() == "here\n"
        time.sleep(0.02 + ahead)
        run.send_signal(number)
        _, said = run.communicate(timeout=HANGS)
    assert run.returncode == code, said
    assert "Traceback" not in said and "Run the same command again to resume." in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_launcher_outlives_its_ranks_and_leaves_nothing(recipe_file: object, number: signal.Signals) -> None:
    """Both ranks end at once, while the shell still handles the signal; bash may then miss one of them."""
    command = [str(ROOT / "launch/local.sh"), "2", "run", str(recipe_file())]  # type: ignore[operator]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as run:
        launcher = psutil.Process(run.pid)
        until = time.monotonic() + HANGS
        while len(ranks := [each for each in launcher.children() if "python" in each.name()]) < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.5)
        run.send_signal(number)
        assert run.wait(timeout=HANGS) in (75, 128 + number)
    assert not [each for each in ranks if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    mine = [child for child in psutil.Process(os.getpid()).children(recursive=True) if child.status() == "zombie"]
    assert not [child for child in mine if child.pid in {each.pid for each in ranks}]


def test_a_planned_layout_needs_no_processes() -> None:
    from minitron_megatron.parallel import PlannedTopology

    planned = PlannedTopology(tp=2, pp=2, processes=8)
    assert (planned.world, planned.dp, planned.replicas) == (8, 2, 2)
    assert isinstance(planned, Topology)


def test_square_brackets_of_a_path_are_text(tmp_path: Path) -> None:
    odd = tmp_path / "[bold]a["
    odd.mkdir()
    (odd / "config.json").write_text('{"model_type": "[/x]"}')
    done = call("show", odd)
    assert done.returncode == 0 and "[bold]a[" in done.stdout.replace("\n", "") and "[/x]" in done.stdout
