"""Transfusion: one transformer that predicts the next token and diffuses images (arXiv 2408.11039).

engine = transfusion.load("pretrained:emoji")
engine.generate([["a red apple"], ["what is this?", pil_image]])
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["load"]

if TYPE_CHECKING:  # a type checker that saw `__getattr__` would take every name for one of the package's
    from transfusion.pretrained import load
else:

    def __getattr__(name: str):
        """`load`, imported when it is first asked for, so that what needs no torch does not wait for it."""
        if name != "load":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from transfusion.pretrained import load

        return load

    def __dir__() -> list[str]:
        return [*globals(), *__all__]
