"""What a source of data left out, and why: bad files are counted and named, never fatal and never silent."""

from dataclasses import dataclass, field, replace
from pathlib import Path

NAMED = 3  # names shown of each reason


@dataclass(frozen=True)
class Report:
    """`kept` things, and the names of the skipped ones under the reason they were skipped for."""

    kept: int
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, name: str) -> "Report":
        """The report after one of the kept is left out too."""
        names = [*self.skipped.get(reason, []), name]
        return Report(self.kept - 1, {**self.skipped, reason: names})

    def without_part(self, reason: str, name: str) -> "Report":
        """The report after something of one of the kept is left out."""
        return replace(self.skip(reason, name), kept=self.kept)

    def names(self) -> str:
        """Every name under its reason, one a line."""
        return "".join(f"  {reason}\n" + "".join(f"    {n}\n" for n in names) for reason, names in self.skipped.items())

    def summary(self) -> str:
        """One line for what was kept and one for each reason, with the first few names."""
        lines = [f"kept {self.kept}, skipped {sum(map(len, self.skipped.values()))}"]
        for reason, names in self.skipped.items():
            more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
            lines.append(f"  {len(names)} x {reason}: {', '.join(names[:NAMED])}{more}")
        return "\n".join(lines)


@dataclass
class Lost:
    """The documents that a run could not read since it began or went on: named in a file, counted, limited."""

    file: Path
    most: int
    count: int = 0  # of all ranks

    def found(self, names: list[str], of_all: int):
        """Takes note of a step's, and of how many all ranks have; ValueError, on all of them, beyond the limit."""
        if names:
            with self.file.open("a") as file:
                file.write("".join(f"{name}\n" for name in names))
        self.count += of_all
        if self.count > self.most:
            raise ValueError(
                f"{self.count} documents could not be read, more than data.max_lost = {self.most}: {self.file} names "
                "them; mend or leave out their sources, or raise the limit"
            )
