"""Cases of kind "damage": a stored file is damaged between two uses.

The next use either gives what an undamaged file gives, or raises a ValueError of this package.

Not handled: damage while a file is read, and saved twins that were edited and given a hash that is right
(`tests/twins/test_file.py` does those).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tools.soak.cases import Case, Failure, refused_by_us
from tools.soak.stored import STORED

DAMAGES = ("flip", "cut", "insert", "overwrite", "empty", "delete", "digit", "nest", "text")


def draw(rng: random.Random) -> Case:
    what = rng.choice([*STORED])
    damages = [
        {"how": rng.choice(DAMAGES), "at": rng.random() ** rng.choice((1, 4)), "seed": rng.randrange(1000)}
        for _ in range(rng.choice((1, 1, 1, 3)))
    ]
    return {"what": what, "file": rng.choice(STORED[what].files), "damages": damages}


def run(case: Case, folder: Path) -> str:
    """Write, damages and read."""
    stored = STORED[case["what"]]
    stored.write(folder)
    for damage in case["damages"]:
        for file in [*folder.glob(case["file"])]:
            _damage(file, **damage)
    try:
        stored.read(folder)
    except ValueError as error:
        if not refused_by_us(error):
            raise
        return f"refused ({type(error).__name__})"
    return "passed"


def smaller(case: Case) -> Iterator[Case]:
    for i in range(len(case["damages"])):
        if len(case["damages"]) > 1:
            yield {**case, "damages": [*case["damages"][:i], *case["damages"][i + 1 :]]}


def _damage(file: Path, how: str, at: float, seed: int) -> None:
    """Damages a file or what is left of it; `at` is the place, as a share of its length."""
    rng = random.Random(seed)
    if how == "delete":
        file.unlink()
        return
    content = bytearray(file.read_bytes()) or bytearray(1)
    place = int(at * len(content))
    if how == "flip":
        content[place] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[place:]
    elif how == "insert":
        content[place:place] = rng.randbytes(rng.randint(1, 20))
    elif how == "overwrite":
        content[place : place + 50] = rng.randbytes(50)
    elif how == "empty":
        content.clear()
    elif how == "digit":
        digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
        if digits:
            content[rng.choice(digits)] = ord(str(rng.randrange(10)))
    elif how == "nest":
        content = bytearray(b"[" * 100_000)
    elif how == "text":
        content = bytearray(rng.choice((b"{}", b"[]", b"null", b"NaN", b'{"version": 2}', b"\xff\xfe")))
    else:
        raise Failure(f"there is no damage {how!r}")
    file.write_bytes(content)
