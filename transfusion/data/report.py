"""What a source of data left out, and why: bad files are counted and named, never fatal and never silent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

NAMED = 3  # names shown of each reason
LISTED = 1000  # names of each reason that are kept of what lies on disk


@dataclass(frozen=True)
class Report:
    """`kept` things, and the names of the skipped ones under the reason they were skipped for; of a source of any size
    the first names, and how many more there are."""

    kept: int
    skipped: dict[str, list[str]] = field(default_factory=dict)
    unnamed: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str, name: str) -> "Report":
        """The report after one of the kept is left out too."""
        return replace(self.without_part(reason, name), kept=self.kept - 1)

    def without_part(self, reason: str, name: str) -> "Report":
        """The report after something of one of the kept is left out."""
        return replace(self, skipped={**self.skipped, reason: [*self.skipped.get(reason, []), name]})

    def without_all(self, reason: str, name: Callable[[int], str], numbers: Sequence[int]) -> "Report":
        """The report after those of these numbers, which have a `name` each, are left out, or something of each."""
        room = LISTED - len(self.skipped.get(reason, []))
        named = [name(i) for i in numbers[: max(room, 0)]]
        if not len(numbers):
            return self
        skipped = {**self.skipped, reason: [*self.skipped.get(reason, []), *named]}
        more = self.unnamed.get(reason, 0) + len(numbers) - len(named)
        return replace(self, skipped=skipped, unnamed={**self.unnamed, reason: more} if more else self.unnamed)

    def count(self, reason: str) -> int:
        """How many were left out for this reason."""
        return len(self.skipped[reason]) + self.unnamed.get(reason, 0)

    def names(self) -> str:
        """Every name that is kept under its reason, one a line."""
        lines = []
        for reason, names in self.skipped.items():
            more = [f"and {self.unnamed[reason]} more"] if reason in self.unnamed else []
            lines += [f"  {reason}\n", *(f"    {line}\n" for line in (*names, *more))]
        return "".join(lines)

    def summary(self) -> str:
        """One line for what was kept and one for each reason, with the first few names."""
        lines = [f"kept {self.kept}, skipped {sum(map(self.count, self.skipped))}"]
        for reason, names in self.skipped.items():
            n = self.count(reason)
            more = f", and {n - NAMED} more" if n > NAMED else ""
            lines.append(f"  {n} x {reason}: {', '.join(names[:NAMED])}{more}")
        return "\n".join(lines)


@dataclass
class Lost:
    """The documents, or images, that a run could not read since it began or went on: in a file, counted, limited."""

    file: Path
    most: int
    what: str = "documents"
    count: int = 0  # of all ranks

    def __post_init__(self):
        if self.most < 0:
            raise ValueError(f"data.max_lost = {self.most}: a number of {self.what}, at least 0")

    def found(self, names: list[str], of_all: int):
        """Takes note of a step's, and of how many all ranks have; ValueError, on all of them, beyond the limit."""
        if names:
            with self.file.open("a") as file:
                file.write("".join(f"{name}\n" for name in names))
        self.count += of_all
        if self.count > self.most:
            raise ValueError(
                f"{self.count} {self.what} could not be read, more than data.max_lost = {self.most}: {self.file} names "
                "them; mend or leave out their sources, or raise the limit"
            )
