"""Signals while a replay runs, and interpreters that end or fork around one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from test_program import EXTERNAL, SIDE, chain_program, done, external, run_chain

from metafast import _C

LONG = 10**8  # steps: hours
SOON = 20.0  # seconds: the promise is one, the rest is for machines that do other things too


@contextmanager
def signalled(number: int, handler: Callable[..., Any], after: float = 0.3) -> Iterator[None]:
    """Sends this process a signal while the body runs."""
    before = signal.signal(number, handler)
    timer = threading.Timer(after, os.kill, [os.getpid(), number])
    timer.start()
    try:
        yield
    finally:
        timer.join()
        signal.signal(number, before)


def run_long(tasks: int, threads: int, steps: int = LONG, cancel: int = 0) -> tuple[int, int, int, str, int]:
    x, w = np.zeros((tasks, SIDE, SIDE), np.float32), np.zeros((SIDE, SIDE), np.float32)
    externals = external((x, x.strides[0], 0), (w, 0, 0), (np.zeros_like(x), x.strides[0], 0))
    return _C.run(chain_program(), externals, tasks, steps, threads=threads, cancel_ptr=cancel)


@pytest.mark.parametrize("tasks,threads", [(1, 1), (1, 2), (3, 2)])
def test_ctrl_c_stops_a_run(tasks: int, threads: int) -> None:
    expected = run_chain(chain_program(), 5, 2)[3]
    start = time.monotonic()
    with signalled(signal.SIGINT, signal.default_int_handler), pytest.raises(KeyboardInterrupt):
        run_long(tasks, threads)
    assert time.monotonic() - start < SOON
    np.testing.assert_array_equal(run_chain(chain_program(), 5, 2)[3], expected)


def test_ctrl_c_stops_one_long_section() -> None:
    """Its instructions alone take hours; the replay looks between them."""
    n = 1024
    product = ("gemm", [(EXTERNAL, 0), (EXTERNAL, 0), (0, 0)], [1, n, n, n, 0, n, 1, 0, n, 1, 0, n, 1, 0, 0, 0], [])
    program = _C.Program("f32", {"query": [product] * 20000}, arena_bytes=4 * n * n, n_external=1)
    with signalled(signal.SIGINT, signal.default_int_handler), pytest.raises(KeyboardInterrupt):
        _C.run(program, external((np.zeros((n, n), np.float32), 0, 0)), 2, 0, threads=2)


def test_ctrl_c_while_another_thread_has_the_engine() -> None:
    flag, outcome = np.zeros(1, np.int32), []
    other = threading.Thread(target=lambda: outcome.append(run_long(2, 2, cancel=flag.ctypes.data)))
    other.start()
    time.sleep(0.1)
    try:
        with signalled(signal.SIGINT, signal.default_int_handler), pytest.raises(KeyboardInterrupt):
            run_long(1, 1)
        assert not outcome  # the other one goes on
    finally:
        flag[0] = 1
        other.join()
    assert outcome[0][0] == _C.CANCELLED


def test_a_handler_that_returns_lets_the_run_go_on() -> None:
    """It may itself run programs, sees subnormal numbers, and cannot take the memory away."""
    expected, seen, flag = run_chain(chain_program(), 5, 2)[3], [], np.zeros(1, np.int32)

    def handler(*_: Any) -> None:
        bytes_before = _C.arena_bytes()
        _C.trim()
        seen.append(_C.arena_bytes() == bytes_before > 0)
        seen.append(np.array_equal(run_chain(chain_program(), 5, 2)[3], expected))
        seen.append(bool(np.full(1, 1e-40, np.float32)[0] * np.float32(2) > 0))
        flag[0] = 1

    with signalled(signal.SIGUSR1, handler):
        assert run_long(2, 2, cancel=flag.ctypes.data)[0] == _C.CANCELLED
    assert seen == [True, True, True]
    done(run_long(2, 2, steps=3))


def test_a_handler_that_raises_within_a_nested_run() -> None:
    def handler(*_: Any) -> None:
        run_chain(chain_program(), 5, 2)
        raise InterruptedError("enough")

    with signalled(signal.SIGUSR1, handler), pytest.raises(InterruptedError, match="enough"):
        run_long(1, 2)


SCRIPT = """
import os, sys, threading, time
sys.path.insert(0, {tests!r})
from test_interrupts import run_long
from test_program import chain_program, run_chain
{body}
"""

ENDINGS = {
    "sleeping pool": "run_chain(chain_program(), 5, 4)",
    "a daemon in a long run": "threading.Thread(target=run_long, args=(2, 2), daemon=True).start(); time.sleep(0.2)",
    "daemons in short runs": """
def forever():
    while True:
        run_chain(chain_program(), 3, 2)
for _ in range(2):
    threading.Thread(target=forever, daemon=True).start()
time.sleep(0.2)
""",
    "a run at exit": "import atexit; atexit.register(run_chain, chain_program(), 5, 2)",
    "forked while another thread runs": """
threading.Thread(target=run_long, args=(2, 2), daemon=True).start()
time.sleep(0.1)
for _ in range(5):
    child = os.fork()
    if child == 0:
        run_chain(chain_program(), 5, 2)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
""",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_interpreters_end_in_peace(ending: str) -> None:
    script = SCRIPT.format(tests=os.path.dirname(os.path.abspath(__file__)), body=ENDINGS[ending])
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stderr) == (0, "")
