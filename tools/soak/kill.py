"""Cases of kind "kill": a process is killed while it writes a file; the next start works.

The process is a fork that writes the same thing again and again, each time in its own place, until it is killed
after a random time. Then each place holds all of what was written or nothing, reading that works, and so does writing
into the place that the killed process was at.

Not handled: a machine that loses power (nothing here waits for the disk).
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from tools.soak.cases import Case, Failure
from tools.soak.stored import STORED


def draw(rng: random.Random) -> Case:
    return {"what": rng.choice([*STORED]), "milliseconds": round(rng.uniform(0, 120), 2), "again": rng.random() < 0.5}


def run(case: Case, folder: Path) -> str:
    """Fork, kills, read what there is, writes once more and read that."""
    stored = STORED[case["what"]]
    (folder / "first").mkdir()
    stored.write(folder / "first")  # (in this process, so that the fork has packed and imported what it needs)
    started = folder / "started"
    child = os.fork()
    if child == 0:
        _write_forever(case, folder, started)
    while not started.exists():
        time.sleep(0.001)
    time.sleep(case["milliseconds"] / 1000)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        raise Failure("the process ended by itself while it wrote")
    places = sorted(folder.glob("place*"), key=lambda path: int(path.name.removeprefix("place")))
    for place in places:
        if any(any(place.glob(file)) for file in stored.files):
            stored.read(place)
    if places:
        if not any(any(places[-1].glob(file)) for file in stored.files):
            stored.write(places[-1])
        stored.read(places[-1])
    return "passed"


def smaller(case: Case) -> Iterator[Case]:
    yield from ()


def _write_forever(case: Case, folder: Path, started: Path) -> None:
    """The killed process: never returns."""
    # The usual lock of progress bars is shared with forks: one that is killed while it holds it stops its parent.
    tqdm.set_lock(threading.RLock())
    try:
        place = 0
        started.touch()
        while True:
            target = folder / f"place{place}"
            target.mkdir(exist_ok=True)
            STORED[case["what"]].write(target)
            place += 1 if case["what"] == "twins" or not case["again"] else 0
    finally:
        os._exit(1)
