"""What worker processes feed to a training, through `load_batches`: how much of it, and how much memory they hold.

    worker 0   decode -> pack -> collate   steps 0, 2, 4 ...     of each process memory is looked at after every step:
    worker 1   decode -> pack -> collate   steps 1, 3, 5 ...     the least of each tenth of the steps is what it holds
    lead       takes a batch after the other                     beside the batch that it is making

Memory is Pss_Anon of /proc/PID/smaps_rollup: what a process holds of its own, and its share of what it shares since it
was forked. Batches on their way (shared memory) and data files mapped into memory (the system's cache) are not in it.
"""

import math
from multiprocessing import active_children
from os import getpid
from pathlib import Path

from loading import packer_of

from transfusion.codec.load import load_codec
from transfusion.data.documents import DataConfig
from transfusion.data.loader import Packer, load_batches
from transfusion.model.transformer import ModelConfig
from transfusion.run import RunConfig, TrainConfig, resolve

TENTHS = 10
AHEAD = 3  # steps that a worker may be before the lead: two that it has sent, and the one that it makes
PATCH = 16  # pixels a side
ROWS, IMAGES_OF_A_ROW = 8, 16  # half a row is images


def packer_of_images(built: Path, side: int) -> Packer:
    """What makes batches of the images of a built folder and of the shipped text, half of each row one of both."""
    codec = load_codec("pixels")
    data = DataConfig(images=(str(built),), image_size=side)
    train = TrainConfig(rows=ROWS, seq_len=IMAGES_OF_A_ROW * (side // PATCH) ** 2)
    config = resolve(RunConfig(model=ModelConfig(patch_size=PATCH), data=data, train=train), codec)
    return packer_of(config, codec)


def epoch(packer: Packer) -> int:
    """Steps that take each image of training once."""
    return math.ceil(len(packer.corpus.captions["train"].images) / packer.images_per_step)


def feed(packer: Packer, steps: int, workers: int) -> dict:
    """Images and positions of so many steps, and the MiB that the lead and each worker held in each tenth of them."""
    looked_at = steps - AHEAD * workers  # behind these workers end
    if looked_at < TENTHS:
        raise ValueError(f"{steps} steps by {workers} workers are too few to part into {TENTHS}: give more images")
    images = positions = 0
    held: dict[str, list[float]] = {}
    for step, batches in enumerate(load_batches(packer, 0, steps, workers, pin_memory=False)):
        for batch in batches:
            assert not batch.lost, batch.lost
            images += len(batch.grids)
            positions += int((batch.document >= 0).sum())
        if step < looked_at:
            pids = sorted(child.pid for child in active_children())
            names = ["lead", *(f"worker {i}" for i in range(len(pids)))]
            for name, pid in zip(names, [getpid(), *pids]):
                of_tenth, tenth = held.setdefault(name, [math.inf] * TENTHS), step * TENTHS // looked_at
                of_tenth[tenth] = min(of_tenth[tenth], own_memory(pid))
    return {"images": images, "positions": positions, "MiB": held}


def own_memory(pid: int) -> float:
    """MiB that a process holds of its own."""
    kib = int(Path(f"/proc/{pid}/smaps_rollup").read_text().partition("Pss_Anon:")[2].split()[0])
    return round(kib / 1024, 1)


def growth(held: list[float]) -> float:
    """MiB more in the last tenth than in the first one of the second half."""
    return held[-1] - held[TENTHS // 2]
