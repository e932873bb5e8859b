"""A Ctrl-C that Python or a library drops still ends the process."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from tests.limits import HANGS

BEGIN = """
    import os, signal, time
    from minitron_megatron.cli.interrupt import ignore, interrupted, listen, raise_if_interrupted
    from minitron_megatron.events import Event

    def end():
        os._exit(7)

    class Falls:
        def __del__(self):  # what is raised in here is dropped
            os.kill(os.getpid(), signal.SIGINT)
"""


def ends(program: str) -> int:
    code = [sys.executable, "-c", textwrap.dedent(BEGIN) + textwrap.dedent(program)]
    return subprocess.run(code, timeout=HANGS, check=False, stderr=subprocess.DEVNULL).returncode


def test_it_is_a_keyboard_interrupt() -> None:
    program = """
        listen(60, end)
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            os._exit(3 if interrupted() else 4)
    """
    assert ends(program) == 3


def test_a_lost_one_is_raised_by_the_next_event() -> None:
    program = """
        listen(60, end)
        raise_if_interrupted(Event("score", 1, 2))
        Falls()
        try:
            raise_if_interrupted(Event("score", 2, 2))
        except KeyboardInterrupt:
            os._exit(3)
    """
    assert ends(program) == 3


def test_the_process_ends_though_nothing_of_it_moves() -> None:
    assert ends("listen(0.2, end); Falls(); time.sleep(600)") == 7


def test_the_second_ends_at_once() -> None:
    assert ends("listen(600, end); Falls(); time.sleep(1.5); Falls(); time.sleep(600)") == 7


def test_two_of_one_key_are_one() -> None:
    program = """
        listen(600, end)
        try:
            Falls()
            Falls()
            time.sleep(2)
        finally:
            os._exit(3)
    """
    assert ends(program) == 3


def test_nothing_that_python_holds_delays_the_end() -> None:
    program = """
        import threading
        listen(0.2, end)
        lock = threading.Lock()
        lock.acquire()
        Falls()
        while True:
            try:
                lock.acquire()
            except KeyboardInterrupt:
                pass
    """
    assert ends(program) == 7


@pytest.mark.parametrize("waits", [0.0, 0.5])
def test_a_forked_process_has_a_plain_one(waits: float) -> None:
    program = f"""
        listen(0.1, end)
        if child := os.fork():
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            time.sleep({waits})
            os._exit(4 if interrupted() else 3)
    """
    assert ends(program) == 3


def test_none_is_heard_when_the_work_is_done() -> None:
    assert ends("listen(60, end); ignore(); Falls(); os.kill(os.getpid(), signal.SIGINT); os._exit(0)") == 0


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
def test_a_lost_signal_of_the_scheduler_is_raised_by_the_next_event(number: str) -> None:
    program = f"""
        from minitron_megatron.cli.interrupt import listen_to_scheduler, preempted
        from minitron_megatron.errors import Preempted
        listen_to_scheduler()
        raise_if_interrupted(Event("score", 1, 2))
        try:
            os.kill(os.getpid(), signal.{number})
        except Exception:  # as a library does
            pass
        try:
            raise_if_interrupted(Event("score", 2, 2))
        except Preempted:
            os._exit(3 if preempted() else 4)
    """
    assert ends(program) == 3


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_that_a_reader_took_for_damage_is_no_wrong_input(number: str, code: int) -> None:
    program = f"""
        import sys, types
        from minitron_megatron.cli import main
        from minitron_megatron.errors import DataError

        def app():
            try:
                os.kill(os.getpid(), signal.{number})
            except BaseException as error:
                raise DataError("this is no tokenizer") from error

        sys.modules["minitron_megatron.cli.app"] = types.SimpleNamespace(app=app)
        main()
    """
    assert ends(program) == code


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_that_python_drops_prints_nothing_and_another_exception_does(number: str) -> None:
    program = f"""
        from minitron_megatron.cli.interrupt import listen_to_scheduler
        listen(60, end)
        listen_to_scheduler()

        class Broken:
            def __init__(self, does):
                self.does = does
            def __del__(self):
                self.does()

        Broken(lambda: os.kill(os.getpid(), signal.{number}))
        Broken(lambda: [].pop())
        os._exit(0)
    """
    code = [sys.executable, "-c", textwrap.dedent(BEGIN) + textwrap.dedent(program)]
    said = subprocess.run(code, timeout=HANGS, check=False, capture_output=True, text=True).stderr
    assert said.count("Exception ignored") == 1 and "IndexError" in said
