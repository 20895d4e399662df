"""The trunk compiled, to sample from: one graph for each of four kinds of chunk [b, q], whatever their sizes.

                   b = 1                        b > 1
    q = 1          one request writes           several write
    q > 1          one draws without guidance   several lanes draw

Where text and patches take different weights (paths.py), lanes that draw images of several sizes take a fifth, and a
sixth where just one position fills up.
torch compiles anew where a size is 1 and where it was not. By itself it also does where two sizes that were equal no
longer are, as those of four lanes and of four heads, and it would give up for good after eight graphs of all models.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from transfusion.model.transformer import Transfusion

GRAPHS = 64  # of all models in a process; those beyond run uncompiled


def compiled_trunk(model: Transfusion) -> Callable[..., Tensor]:
    """`model.trunk`, compiled where it is called for the first time; the model stays as it is."""
    # imported here: torch's compiler takes seconds to import, and few want it
    from torch._dynamo import config as tracing
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch.fx.experimental import _config as sizes

    try:
        get_cpp_compiler()
    except Exception:  # of torch's own, whose name differs between versions
        raise ValueError(
            "compile wants a C++ compiler, and torch finds none: install g++, or leave --compile (compile=True) out"
        ) from None
    trunk = torch.compile(model.trunk, dynamic=True)

    def call(*arguments) -> Tensor:
        with tracing.patch(recompile_limit=GRAPHS), sizes.patch(use_duck_shape=False):
            return trunk(*arguments)

    return call
