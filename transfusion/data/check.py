"""What a source is good for, before anything is built: all of it is read, each image decoded, nothing written.

my/00000.tar: usable 9981, left out 19
  12 x no caption: 00000.tar/000000017.jpg, ...

Of what is built: whether it still is what it was, every file and every image by its checksum.

built/my, 8192 ... 16383: usable 8190, left out 2
  2 x bytes that have changed since it was built: 000001234, 000001240
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from transfusion.data.built import Rows, described, documents_of, images_of, is_built, names_of
from transfusion.data.encoded import spoiled
from transfusion.data.images import Size, decode, measure, plain
from transfusion.data.mapped import fingerprint
from transfusion.data.parts import UNREADABLE_SHARD
from transfusion.data.processes import side_by_side
from transfusion.data.report import NAMED
from transfusion.data.rows import COLUMNS, Columns, Left
from transfusion.data.samples import documents, image_samples, texts
from transfusion.data.shards import Shard, find_shards
from transfusion.data.storage import why

STRETCH = 8192  # things of a built folder that are checked by one process
AT_ONCE = 32  # of these, whose images are in memory together


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
    """What each shard, or each stretch of a built folder, holds, as it is read, by so many processes; 0 = this one."""
    for source in filter(is_built, sources):
        yield from check_built(kind, source, workers)
    shards = [shard for source in sources if not is_built(source) for shard in find_shards(kind, source)]
    yield from side_by_side(partial(check_shard, kind=kind, columns=columns), shards, workers)


def check_shard(shard: Shard, kind: str, columns: Columns) -> Found:
    """What the shard holds; one that cannot be read holds nothing."""
    items = {
        "images": lambda: image_samples(shard, columns, proven, None),
        "documents": lambda: documents(shard, proven, None),
        "text": lambda: texts(shard, columns.text),
    }[kind]()
    return counted(shard.url, items)


def counted(url: str, items: Iterable[Any]) -> Found:
    """The items, counted; what raises an OSError ends with it."""
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
    return Found(plain(url), usable, left)


def check_built(kind: str, source: str, workers: int) -> Iterator[Found]:
    """What a built folder holds: nothing, where one of its files is another than was built."""
    folder, dataset = described(source, kind)
    files = dataset["files"].items()
    other = [name for name, known in files if not (folder / name).is_file() or fingerprint(folder / name) != known]
    if other:
        yield counted(
            str(folder), (Left("file that has changed: remove it, and build the data anew", n) for n in other)
        )
        return
    if latents := spoiled(folder):
        reason = "latents that have changed: remove them, and call transfusion data encode again"
        yield counted(f"{folder}/latents", (Left(reason, name) for name in latents))
    if kind == "text":
        yield Found(str(folder), dataset["documents"]["all"], {})
    else:
        n = max(stop for _, stop in dataset["splits"].values())
        stretches = [Rows(start, min(start + STRETCH, n)) for start in range(0, n, STRETCH)]
        yield from side_by_side(partial(check_stretch, source=source, kind=kind), stretches, workers)


def check_stretch(rows: Rows, source: str, kind: str) -> Found:
    """What some images, or documents, of a built folder hold."""
    folder, dataset = described(source, kind)
    images = images_of(folder, dataset, [(64, 64)])
    names, told = names_of(images), documents_of(folder, rows) if kind == "documents" else None

    def judged(numbers: range) -> Iterator[str | Left]:
        of_thing = [
            [p.content for p in told[i][0] if isinstance(p.content, int)] if told else [rows[i]] for i in numbers
        ]
        wanted = sorted({image for own in of_thing for image in own})
        problem = {image: one for image, one in zip(wanted, images.read(wanted)) if isinstance(one, str)}
        for i, own in zip(numbers, of_thing):
            reason, _, more = next((problem[image] for image in own if image in problem), "").partition(": ")
            name = told.name(i) if told else names[rows[i]]
            yield Left(reason, f"{name} ({more})" if more else name) if reason else name

    parts = (judged(range(i, min(i + AT_ONCE, len(rows)))) for i in range(0, len(rows), AT_ONCE))
    return counted(f"{folder}, {rows.first} ... {rows.stop - 1}", chain.from_iterable(parts))


def proven(data: bytes) -> Size | str:
    """The size of an image file that is whole to its end."""
    pixels = decode(data, [(64, 64)])
    return pixels if isinstance(pixels, str) else measure(data)
