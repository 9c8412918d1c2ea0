"""Signals as requests: a run ends its step and writes its checkpoint, a queue winds up."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading


class Interrupted(KeyboardInterrupt):
    """A run was stopped by signal number `signal`, after its checkpoint was written."""

    def __init__(self, number: int, step: int):
        super().__init__(
            f"stopped at step {step}; its checkpoint is written, resume continues from there"
        )
        self.signal = number


@contextlib.contextmanager
def stop_requests():
    """Turn SIGINT and SIGTERM into a request (`.number`); a second SIGINT acts as usual.

    A second SIGTERM does not: torchrun and Slurm pass theirs on to those who had it already.
    """

    class Stop:
        number: int | None = None

    stop, kept = Stop(), {}

    def note(number, frame):
        stop.number = number
        if number == signal.SIGINT:
            signal.signal(number, kept[number])
        print("stopping after this step ...", file=sys.stderr, flush=True)

    if threading.current_thread() is threading.main_thread():
        kept = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible():
    """Turn the first SIGINT, SIGTERM or SIGHUP into KeyboardInterrupt(number), ignore the rest."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    caught = [getattr(signal, name) for name in names if hasattr(signal, name)]

    def interrupt(number, frame):
        for each in caught:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    before = {each: signal.signal(each, interrupt) for each in caught}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
