"""The losses of five steps of a tiny model, as they were when they were right.

A change that should not change training must leave them; one that should, records new ones and says why:

    python tests/test_golden.py        prints the values to put into GOLDEN
"""

import pytest
import torch
from random_rows import CHANNELS, PATCH_SIZE, VOCAB, packed

from transfusion.diffusion.objective import DiffusionConfig
from transfusion.loss import draw_noise, losses
from transfusion.model.transformer import ModelConfig, build_model
from transfusion.optim import OptimConfig, build_optimizers, clip_gradients, set_lr

ROWS = [[[3, (2, 2), 2], [1, (2, 3), 4]], [[9], [(3, 3), 5]], [[2, (1, 2), 1, (2, 1), 1], [6]]]
GOLDEN = [  # (LM loss a target, image loss an image) before each step, torch 2.13, CPU, float32
    (3.699775, 1.137204),
    (3.590046, 1.103997),
    (3.414003, 0.878301),
    (3.306968, 0.962329),
    (3.268706, 1.056571),
]


def train(steps: int) -> list[tuple[float, float]]:
    """The losses of each step."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 64, "qk_norm": True}
    model = build_model(ModelConfig(**sizes, vocab_size=VOCAB, patch_size=PATCH_SIZE, channels=CHANNELS))
    config, diffusion = OptimConfig(lr=3e-3, min_lr=3e-4, warmup_steps=2), DiffusionConfig()
    optimizers, batch, found = build_optimizers(model, config), packed(0, ROWS), []
    for step in range(steps):
        set_lr(optimizers, step, steps, config)
        lm, image = losses(model, batch, draw_noise(batch, diffusion, 0, step), diffusion)
        lm, image = lm / batch.n_targets, image / batch.n_images
        found.append((lm.item(), image.item()))
        model.zero_grad()
        (lm + 5 * image).backward()
        clip_gradients(model, config.clip)
        for optimizer in optimizers:
            optimizer.step()
    return found


def test_five_steps_give_the_losses_on_record():
    for found, golden in zip(train(5), GOLDEN, strict=True):
        assert found == pytest.approx(golden, abs=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for lm, image in train(5):
        print(f"    ({lm:.6f}, {image:.6f}),")
