"""A model to sample from in half precision: its matrices are converted once, not cast in every call, and those that
read the same stream are stacked. It is for sampling where it is: what copies or moves it leaves the stacks behind.

bfloat16   every matrix and kernel: trunk, head, patch layers
float32    embeddings, norms, the residual stream between the layers, rotary angles: what is added up over the depth
"""

from copy import deepcopy

import torch
from torch.nn import Module, Parameter

from transfusion.model.paths import Linear, multiply_by, plain, stack
from transfusion.model.transformer import ModelConfig, Transfusion, build_model


def halved(model: Transfusion) -> list[Module]:
    """The parts of a model whose products are in half precision."""
    linear = [module for module in model.layers.modules() if isinstance(module, Linear)]
    return [module for module in (model.output, model.patches, model.refine, *linear) if module is not None]


def empty_at_precision(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Transfusion:
    """A model with room for weights as its products in `dtype` take them, to be filled; nothing of it is stacked."""
    model = build_model(config, "meta")
    for module in halved(model):
        module.to(dtype)
    return model.to_empty(device=device)


def at_precision(model: Transfusion, dtype: torch.dtype) -> Transfusion:
    """The model with its products in `dtype`: itself where they are, else one with matrices of its own."""
    if model.output.weight.dtype == dtype:
        return model
    # what deepcopy finds here it does not copy: no second copy in float32 is made on the way
    known = {id(x): x for x in (*model.parameters(), *model.buffers())}
    for module in halved(model):
        known |= {id(p): Parameter(p.to(dtype), p.requires_grad) for p in module.parameters()}
        known |= {id(b): b.to(dtype) for b in module.buffers() if b.is_floating_point()}
    known |= {id(of_layer["forward"]): None for of_layer in map(vars, model.layers) if "forward" in of_layer}
    model = deepcopy(model, known)
    known.clear()  # or each matrix is kept beside the stack that it goes into
    # a copy's blocks are plain ones, neither compiled nor computed again, and so are its products
    model.compiled = False
    multiply_by(model.layers, plain)
    for layer in model.layers:
        vars(layer).pop("forward", None)
        a, f = layer.attention, layer.feed_forward
        stack((a.wq, a.wk, a.wv))
        stack((f.w1, f.w3))
    return model
