"""Where what can be made again is kept: below $TRANSFUSION_CACHE, or ~/.cache/transfusion."""

import os
from pathlib import Path


def cachedir(name: str) -> Path:
    """The folder of that name, which may not be there yet."""
    return Path(os.environ.get("TRANSFUSION_CACHE") or Path.home() / ".cache" / "transfusion") / name
