"""What low-rank adapters are (LoRA, arXiv 2106.09685): beside a frozen matrix W [out, in], two thin trained ones.

    y = W x + alpha / r * B A x,    A [r, in] random,    B [out, r] zero, so that step 0 is the frozen model

Each path has its own. On a trunk that both paths share, a path's adapter acts on its own positions alone.
"""

from dataclasses import dataclass

PATHS = ("text", "image")
MODULE_OF = {
    **dict.fromkeys(("wq", "wk", "wv", "wo"), "attention"),
    **dict.fromkeys(("w1", "w2", "w3"), "feed_forward"),
}
TARGETS = tuple(MODULE_OF)  # the matrices of a layer


@dataclass(frozen=True)
class LoraConfig:
    r: int = 0  # rank; 0 = no adapters
    alpha: float = 16.0  # the adapters' result is scaled by alpha / r
    target_modules: tuple[str, ...] = ("wq", "wk", "wv", "wo")  # which matrices of the trunk; also w1, w2, w3
    paths: tuple[str, ...] = ("text", "image")

    def __post_init__(self):
        if self.r < 0 or self.alpha <= 0:
            raise ValueError(f"r = {self.r}, alpha = {self.alpha}: r is 0 for no adapters, else both are above 0")
        for name, values, known in (
            ("target_modules", self.target_modules, TARGETS),
            ("paths", self.paths, PATHS),
        ):
            if not values or len(set(values)) < len(values) or not set(values) <= set(known):
                raise ValueError(f"{name} = {list(values)}: choose some of {', '.join(known)}, each once; r=0 for none")
