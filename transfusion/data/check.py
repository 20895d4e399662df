"""What a source is good for, before anything is built: all of it is read, each image decoded, nothing written.

my/00000.tar: usable 9981, left out 19
  12 x no caption: 00000.tar/000000017.jpg, ...
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from transfusion.data.images import Size, decode, measure
from transfusion.data.parts import UNREADABLE_SHARD
from transfusion.data.processes import side_by_side
from transfusion.data.report import NAMED
from transfusion.data.rows import COLUMNS, Columns, Left
from transfusion.data.samples import documents, image_samples, texts
from transfusion.data.shards import Shard, find_shards
from transfusion.data.storage import why


class Found(NamedTuple):
    """What a shard holds."""

    url: str
    usable: int
    left: dict[str, tuple[int, list[str]]]  # reason -> how many, and the first names

    def summary(self) -> str:
        """One line for all, one for each reason."""
        lines = [f"{self.url}: usable {self.usable}, left out {sum(n for n, _ in self.left.values())}"]
        for reason, (n, names) in self.left.items():
            lines.append(f"  {n} x {reason}: {', '.join(names)}{', ...' if n > len(names) else ''}")
        return "\n".join(lines)


def check(kind: str, sources: Sequence[str], workers: int = 0, columns: Columns = COLUMNS) -> Iterator[Found]:
    """What each shard holds, as it is read, by so many processes; 0 = this one."""
    shards = [shard for source in sources for shard in find_shards(kind, source)]
    yield from side_by_side(partial(check_shard, kind=kind, columns=columns), shards, workers)


def check_shard(shard: Shard, kind: str, columns: Columns) -> Found:
    """What the shard holds; one that cannot be read holds nothing."""
    items = {
        "images": lambda: image_samples(shard, columns, proven, None),
        "documents": lambda: documents(shard, proven, None),
        "text": lambda: texts(shard, columns.text),
    }[kind]()
    usable, left = 0, {}
    try:
        for item in items:
            if not isinstance(item, Left):
                usable += 1
                continue
            n, names = left.get(item.reason, (0, []))
            left[item.reason] = n + 1, names + [item.name] if n < NAMED else names
    except OSError as error:
        left[UNREADABLE_SHARD] = 1, [why(error)]
    return Found(shard.url, usable, left)


def proven(data: bytes) -> Size | str:
    """The size of an image file that is whole to its end."""
    pixels = decode(data, [(64, 64)])
    return pixels if isinstance(pixels, str) else measure(data)
