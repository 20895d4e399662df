"""What an evaluation looks at: how much of which split, and how the engine draws for it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvalConfig:
    """Sizes are of each split, 0 leaves the part out. The same config gives the same numbers."""

    n_captions: int = 200  # captioned and drawn; documents with images anywhere: read
    n_images: int = 200  # denoised
    n_candidates: int = 4096  # real images, of all splits, that what is drawn is compared with; those asked for too
    n_edits: int = 100  # of documents that end with an image to draw
    text_windows: int = 64  # of the run's seq_len, spread evenly over the held-out text
    times: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # t of the diffusion loss
    steps: int | None = None  # of the solver, as the next three: None = the run's own
    solver: str | None = None
    guidance: float | None = None
    image_guidance: float | None = None
    features: str = ""  # EfficientNet-Lite0 weights for draw accuracy in features: a path, or "installed"; "" = none
    sheets: str = ""  # folder for sheets of what was drawn; "" = none
    batch: int = 32  # documents at once
    seed: int = 0

    def __post_init__(self):
        for name in ("n_captions", "n_images", "n_candidates", "n_edits", "text_windows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: give how many to look at, 0 for none")
        if self.batch < 1:
            raise ValueError(f"batch = {self.batch}: at least 1 document goes through the model at once")
        if not self.times or not all(0 <= t <= 1 for t in self.times):
            raise ValueError(f"times = {self.times}: give noise levels from 0 (data) to 1 (noise), e.g. times=0.2,0.5")

    @property
    def sampling(self) -> dict:
        """The fields of SampleConfig that are set here."""
        names = ("steps", "solver", "guidance", "image_guidance", "batch")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
