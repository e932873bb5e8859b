"""A program passes if and only if its last line ran, and no process that it started survives it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from minitron_megatron.evaluate.programs import PROBE, Isolation, candidates, isolation, passes, share_that_pass

TESTS = "\nassert add(1, 2) == 3\nassert add(0, 0) == 0\n"
RIGHT = {
    "plain": "def add(a, b): return a + b",
    "prints": "def add(a, b):\n    print('x' * 100_000)\n    return a + b",
    "main": "import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: 'int'\nif __name__ == '__main__':\n"
    "    def add(a, b): return P(a).x + b",
    "pickles": "import pickle\nclass P: pass\npickle.loads(pickle.dumps(P()))\ndef add(a, b): return a + b",
    "threads": "from concurrent.futures import ThreadPoolExecutor\n"
    "def add(a, b):\n    with ThreadPoolExecutor(4) as pool: return pool.submit(sum, [a, b]).result()",
    "processes": "import subprocess\ndef add(a, b): return a + b + len(subprocess.check_output(['true']))",
    "closes": "import sys, os\nsys.stdout.close()\nos.close(0)\ndef add(a, b): return a + b",
    "writes": "open('file', 'w').write('x')\ndef add(a, b): return a + b",
}
WRONG = {
    "value": "def add(a, b): return a * b",
    "syntax": "def add(a, b): return a +",
    "sys.exit": "import sys; sys.exit(0)",
    "os._exit 0": "import os; os._exit(0)",
    "os._exit 42": "import os; os._exit(42)",
    "in a call": "import os\ndef add(a, b): os._exit(0)",
    "at exit": "import atexit, os; atexit.register(os._exit, 0); raise SystemExit",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)\nos.kill(os.getppid(), 19)\nos._exit(0)",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "forks": "import os\nif os.fork(): os.wait()\nos._exit(0)",
    "a thread exits": "import os, threading, time\nthreading.Thread(target=os._exit, args=(0,)).start()\ntime.sleep(9)",
    "a signal exits": "import os, signal, time\nsignal.signal(signal.SIGALRM, lambda *_: os._exit(0))\n"
    "signal.alarm(1)\ntime.sleep(9)",
    "says so everywhere": "import os\nfor fd in range(256):\n    try: os.write(fd, b'passed' * 6)\n"
    "    except OSError: pass\nos._exit(0)",
    "reads and sends back": "import os\nfound = b'0' * 32\nfor fd in range(3, 64):\n    try:\n"
    "        os.set_blocking(fd, False); found = os.read(fd, 32) or found\n    except OSError: pass\n"
    "for fd in range(3, 64):\n    try: os.write(fd, found)\n    except OSError: pass\nos._exit(0)",
    "walks the frames": "import gc, os, sys\nframe, seen = sys._getframe(), []\nwhile frame:\n"
    "    seen += list(frame.f_locals.values()) + list(frame.f_globals.values()); frame = frame.f_back\n"
    "seen += [each for held in gc.get_objects() for each in gc.get_referents(held)]\n"
    "for each in seen:\n    if type(each) is bytes and len(each) == 32:\n        for fd in range(3, 16):\n"
    "            try: os.write(fd, each)\n            except OSError: pass\nos._exit(0)",
    "patches the runner": "import builtins, os, sys\nfor name in list(sys.modules): del sys.modules[name]\n"
    "builtins.compile = builtins.exec = lambda *a, **k: None\nos.read = os.write = os._exit = lambda *a: b''\n"
    "raise ValueError",
    "own environment": "import os\nopen('/proc/self/mem', 'rb').read(1)\nos._exit(0)",
    "swallows": "def add(a, b):\n    raise KeyboardInterrupt",
    "memory": "def add(a, b): return [0] * 10**12",
    "a big file": "open('big', 'wb').write(bytes(2**27))\ndef add(a, b): return a + b",
    "files": "held = [open('/dev/null') for _ in range(300)]\ndef add(a, b): return a + b",
}


@pytest.fixture(scope="module", params=["bubblewrap", "unshare", "limits"])
def how(request: pytest.FixtureRequest) -> Isolation:
    """Return the strongest isolation with these namespaces; for limits alone the current user, which always works."""
    kinds = [each for each in candidates() if each.spaces == request.param]
    kinds = kinds[-1:] if request.param == "limits" else kinds
    found = next((each for each in kinds if passes(PROBE, how=each)), None)
    return found or pytest.skip(f"{request.param} is not installed, or the kernel refuses it")


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_passes(how: Isolation, name: str) -> None:
    assert passes(RIGHT[name] + TESTS, how=how)


@pytest.mark.parametrize("name", WRONG)
def test_no_trick_makes_a_wrong_program_pass(how: Isolation, name: str) -> None:
    assert not passes(WRONG[name] + TESTS, seconds=4, how=how)


def alive(mark: str) -> bool:
    """Return whether a process with this word among its arguments is running."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(mark in each.read_text())
    return any(found)


DETACHED = """
import os, subprocess, sys, time
def start(): subprocess.Popen(["sh", "-c", "sleep 300; : {mark}"], start_new_session=True)
if not os.fork():
    os.setsid()
    if not os.fork(): start()
    os._exit(0)
os.wait(); start(); time.sleep(0.3)
"""


@pytest.mark.parametrize("end", ["", "os._exit(1)", "time.sleep(60)"], ids=["passes", "exits", "hangs"])
def test_what_it_starts_ends_with_it(how: Isolation, end: str) -> None:
    """Processes in sessions of their own and orphans are killed too."""
    mark = f"mark{os.getpid()}{time.monotonic_ns()}"
    assert passes(DETACHED.format(mark=mark) + end, seconds=3, how=how) is (not end)
    assert not alive(mark)


def test_processes_are_bounded(how: Isolation) -> None:
    bomb = "import os, time\nfor _ in range(300):\n    if not os.fork(): time.sleep(30); os._exit(0)\ntime.sleep(1)"
    began = time.monotonic()
    assert not passes(bomb, seconds=20, how=how)
    assert time.monotonic() - began < 15


def test_neither_environment_nor_network_is_seen(how: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_SECRET", "word")
    assert passes("import os\nassert 'MINITRON_SECRET' not in os.environ", how=how)
    seen = (
        "import glob\nfor path in glob.glob('/proc/[0-9]*/environ'):\n    try: text = open(path).read()\n"
        "    except OSError: continue\n    assert 'MINITRON_SECRET' not in text"
    )
    offline = (
        "import os\nassert os.listdir('/sys/class/net') and {l.split(':')[0].strip() for l in open('/proc/net/dev')"
    )
    offline += ".readlines()[2:]} <= {'lo'}"
    if how.spaces != "limits":
        assert passes(seen, how=how) and passes(offline, how=how)


def test_what_isolates_is_said_and_a_share_is_a_mean() -> None:
    assert isolation().spaces in isolation().description.replace("no namespaces", "limits")
    programs = [RIGHT["plain"], WRONG["value"], WRONG["os._exit 0"], RIGHT["threads"]]
    assert share_that_pass(programs, TESTS) == 0.5
