"""The answers of transfusion-pytorch 0.20, in its own Python, called as its README calls it.

Text and images [h, w, channels] go in as lists; the loss is its own (text, flow). Its markers for an image are six
tokens to our two. The batched sampler caches always; written tokens are kept from being special ids. bf16 is autocast,
but plain text is written by weights in bf16: the batched sampler fails with such (Float against BFloat16).
"""

from functools import partial
from unittest.mock import patch

import torch
import transfusion_pytorch.transfusion as package
from answer import Repeat, autocast, facts_of, plain_training
from clock import Clock
from content import Case, Document, prompts
from loguru import logger
from tqdm import tqdm
from transfusion_pytorch import Transfusion

logger.remove()


def build(case: Case) -> Transfusion:
    """The model with fresh weights, whose images take `steps` of Euler's method."""
    if case.patch_size != 1 or case.config:
        raise ValueError("transfusion-pytorch is given latents cell by cell: leave out patch_size and config")
    package.tqdm = partial(tqdm, disable=True)
    torch.manual_seed(0)
    return Transfusion(
        num_text_tokens=case.vocab,
        dim_latent=case.channels,
        modality_default_shape=(case.side, case.side),
        add_pos_emb=True,
        odeint_kwargs={"method": "euler", "atol": 1e-5, "rtol": 1e-5},
        transformer={"dim": case.dim, "depth": case.depth, "heads": case.heads, "dim_head": case.dim // case.heads},
    ).to(case.device)


def parts(document: Document, device: str) -> list[torch.Tensor]:
    """The document as the package takes it: integers are text, the rest is an image with its channels last."""
    return [torch.from_numpy(p if p.ndim == 1 else p.transpose(1, 2, 0).copy()).to(device) for p in document]


def training(case: Case, clock: Clock) -> tuple[Repeat, dict]:
    """A training step; documents of a row are samples of their own, as it packs none."""
    model = build(case).train()

    def batch_of(rows: list[list[Document]]) -> list[list[torch.Tensor]]:
        return [parts(document, case.device) for row in rows for document in row]

    return plain_training(case, clock, model, batch_of, model)


def drawing(case: Case, clock: Clock) -> tuple[Repeat, dict]:
    """An image behind each of the prompts."""
    model, shape = build(case).eval(), (case.side, case.side)

    def repeat(i: int):
        given = [parts(prompt, case.device)[0] for prompt in prompts(case, i)]
        torch.manual_seed(i)
        with clock("draw"), autocast(case), torch.no_grad():
            drawn = model.sample_many(
                given,
                max_length=0,  # it ends with the first image
                modality_steps=case.steps + 1,  # times, one more than steps
                cfg_scale=case.guidance,
                force_modality_at_start=(0, shape),
            )
        images = [part for sample in drawn for part in sample if not torch.is_tensor(part)]
        assert [tuple(x.tensor.shape) for x in images] == [(*shape, case.channels)] * case.batch
        assert all(x.tensor.isfinite().all() for x in images)

    return repeat, facts_of(model, images=case.batch)


def writing(case: Case, clock: Clock) -> tuple[Repeat, dict]:
    """`new` tokens behind each of the prompts: the way for text alone, or where an image was read the mixed one."""
    model, pick = build(case).eval(), package.sample_text_token
    if case.precision == "bf16" and not case.image_in_prompt:
        model = model.bfloat16()

    def only_text(logits: torch.Tensor, *arguments, **keys) -> torch.Tensor:
        logits = logits.clone()
        logits[..., case.vocab :] = -1e9
        return pick(logits, *arguments, **keys)

    def repeat(i: int):
        given = [parts(prompt, case.device) for prompt in prompts(case, i)]
        torch.manual_seed(i)
        with clock("write"), torch.no_grad():
            if not case.image_in_prompt:
                tokens = torch.stack([prompt[0] for prompt in given])
                written = model.generate_text_only(tokens, case.prompt + case.new)
            else:  # it stops at one token more than max_length
                mixed = [[text, (0, image)] for text, image in given]
                with autocast(case), patch.object(package, "sample_text_token", only_text):
                    written = [s[-1][1:] for s in model.sample_many(mixed, max_length=case.new - 1, cfg_scale=1.0)]
        assert [len(tokens) for tokens in written] == [case.new] * case.batch

    return repeat, facts_of(model, tokens=case.batch * case.new)
