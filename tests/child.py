"""Runs `s4` commands in processes of their own without importing torch again for each.

Started by test_trainer.py. Reads a JSON list per line, [log file, byte limit of files, arguments],
forks, runs the command in the fork, and answers with its process id, then with its exit code.
"""

import json
import os
import resource
import signal
import sys
import traceback

from conftest import read_once  # also sets one thread

from s4lib.cli import main
from s4lib.data.mosaic import Mosaic

Mosaic.read = read_once
for part in ("train", "val"):
    images = Mosaic(part, size=(32, 32))
    for i in range(len(images)):
        images[i]


def run(log: str, limit: int, arguments: list[str]) -> int:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main(arguments)
    except BaseException:
        traceback.print_exc()
        return 99


print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        code = run(*json.loads(line))
        sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
