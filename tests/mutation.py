"""Files with bytes changed, cut and doubled, as disks, networks and editors leave them."""

import random
from pathlib import Path

_WINDOW = 1000


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four faults, most of them in the first 800 bytes, where headers are."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(max(1, len(changed) if rng.random() < 0.3 else min(len(changed), 800)))
        match rng.randrange(4):
            case 0:
                changed[start : start + 1] = bytes([rng.randrange(256)])
            case 1:
                del changed[start : start + rng.randint(1, 50)]
            case 2:
                changed[start:start] = changed[start : start + rng.randint(1, 50)]
            case 3:
                changed = changed[: max(start, 1)]
    return bytes(changed)


def write_mutated(path: Path, data: bytes, rng: random.Random) -> None:
    """Writes a large file with faults in a part of it, or cut short, without holding it twice."""
    start = 0 if rng.random() < 0.7 else rng.randrange(len(data))
    whole = memoryview(data)
    with open(path, "wb") as file:
        file.write(whole[:start])
        file.write(mutate(data[start : start + _WINDOW], rng))
        if rng.random() < 0.8:
            file.write(whole[start + _WINDOW :])
