"""What is computed again gives the same gradients, keeps less, and costs the work that is said."""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from test_transformer import random_model, row
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from transfusion.model.mask import dense_mask
from transfusion.model.precision import at_precision
from transfusion.model.recompute import MODES, recompute

OPTIONS = {"n_layers": 2}
DOCUMENTS = [[2, (2, 3), 3], [1, (3, 3), 2]]


def run(mode: str, compile: bool = False, watch=nullcontext, watch_backward=nullcontext):
    """Outputs and gradients of a model in that mode."""
    model = random_model(**OPTIONS)
    recompute(model.layers, mode)
    if compile:
        model.compile_layers()
    b, z, t = row({}, DOCUMENTS, 0)
    mask = dense_mask(b.document, b.image, b.hidden, True)
    with watch():
        found = model(b.tokens, b.place, mask, z, t, b.patch_image, b.grids, b.patch_at, b.text_at)
    with watch_backward():
        sum(x.square().sum() for x in found).backward()
    return [*found, *(p.grad for p in model.parameters())]


def step(mode: str):
    """(outputs and gradients, numbers kept for the way back, FLOPs forward, FLOPs in all)."""
    kept, forward, backward = [0], FlopCounterMode(display=False), FlopCounterMode(display=False)

    def count(tensor):
        kept[0] += tensor.numel()
        return tensor

    @contextmanager
    def watch():
        with forward, saved_tensors_hooks(count, lambda x: x):
            yield

    found = run(mode, watch=watch, watch_backward=lambda: backward)
    return found, kept[0], forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


def test_what_is_computed_again_gives_the_same_gradients_and_keeps_less():
    plain, selective, full = (step(mode) for mode in MODES)
    for other in (selective, full):
        assert all(torch.equal(a, b) for a, b in zip(plain[0], other[0], strict=True))
        assert other[1] < plain[1] / 2
    assert plain[3] == selective[3], "products and attention are kept"
    of_layers = full[3] - plain[3]
    assert 0.5 * plain[2] < of_layers <= plain[2], "the layers' forward pass is computed a second time"


@pytest.mark.filterwarnings("ignore")  # what the compiler says of itself is no business of ours
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_compiled_layers_are_computed_again_too(mode, monkeypatch):
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for a, b in zip(run("none"), run(mode, compile=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(compilations) == 1, "one graph for all layers, checkpointing within it"


def test_what_samples_is_neither_compiled_nor_computed_again():
    model = random_model(**OPTIONS)
    recompute(model.layers, "full")
    assert all("forward" not in vars(layer) for layer in at_precision(model, torch.bfloat16).layers)
    assert all("forward" in vars(layer) for layer in model.layers)
