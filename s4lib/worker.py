"""One run of a queue, in a process of its own: python -m s4lib.worker CONFIG OUT, or by torchrun.

CONFIG is JSON. Standard input is a leash: a pipe whose other end is held by whoever started the
process. When that end closes, because its holder wants it or has died of whatever, the run stops as
on SIGTERM: it writes its checkpoint and ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from . import distributed
from .config import Config
from .interrupts import Interrupted
from .trainer import fit


def main(config: str, out: str) -> int:
    threading.Thread(target=_end_with_the_leash, daemon=True).start()
    try:
        fit(Config.from_dict(json.loads(config)), out=out, resume=True, wait=True)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal
    distributed.stop()
    return 0


def _end_with_the_leash() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
