"""JSON lines read with suspicion: each line comes back as an object, or as what is wrong with it."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path


def read_jsonl(path: Path) -> Iterator[tuple[int, dict | str]]:
    """(line number from 1, the object or a problem in words); blank lines are passed over."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        lines = []
        yield 0, "file that cannot be read"
    yield from parse_lines(lines)


def parse_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, dict | str]]:
    """The same of lines that come one by one."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
        except UnicodeError:
            yield number, "line that is not UTF-8 text"
        except (ValueError, RecursionError):
            yield number, "line that is not JSON"
        else:
            yield number, record if isinstance(record, dict) else "line that is not a JSON object"
