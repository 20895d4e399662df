"""Transfusion: one transformer that predicts the next token and diffuses images (arXiv 2408.11039).

engine = transfusion.load("pretrained:emoji")
engine.generate([["a red apple"], ["what is this?", pil_image]])
"""

from transfusion.pretrained import load

__version__ = "0.1.0"
__all__ = ["load"]
