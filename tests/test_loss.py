"""The loss: noise that depends on the row alone, sums that add up over micro-batches, means that the paper means."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rows import CHANNELS, FORMATS, PATCH_DIM, PATCH_SIZE, VOCAB, document, packed, rows_of_parts, seeds

from transfusion.diffusion.objective import DiffusionConfig
from transfusion.diffusion.schedule import SCHEDULES
from transfusion.diffusion.solver import denoiser_from
from transfusion.loss import Noise, draw_noise, image_errors, losses, noised
from transfusion.model.transformer import ModelConfig, build_model
from transfusion.sequence import collate, lay_out

PAPER = DiffusionConfig()
RAW = FORMATS["raster"]
ROWS = [[[2, (2, 2), 2], [3]], [[(1, 3), 1]], [[9]], [[2, (3, 3), 1, (1, 1), 1]]]  # uneven in text and in images


def tiny_model(dim=16, n_heads=2):
    torch.manual_seed(0)
    sizes = {"dim": dim, "n_layers": 1, "n_heads": n_heads, "ffn_dim": 32, "refine_width": 4}
    model = build_model(ModelConfig(**sizes, vocab_size=VOCAB, patch_size=PATCH_SIZE, channels=CHANNELS))
    with torch.no_grad():
        for out in (model.patches.out, model.refine.conv_out):
            out.weight.normal_(std=0.1)  # fresh read-outs are zero and would hide the trunk's gradients
    return model


def sequences(rows, seed=0):
    rng = np.random.default_rng(seed)
    return [[lay_out(document(rng, parts), RAW) for parts in row] for row in rows]


def split(rows, sizes, seq_len=24):
    """The rows in micro-batches of these sizes."""
    rows, first = sequences(rows), 0
    for size in sizes:
        yield collate(rows[first : first + size], seq_len, RAW, first)
        first += size


# -- noise


@settings(max_examples=50)
@given(seeds, rows_of_parts, st.integers(0, 2**31), st.integers(0, 10**6), st.integers(1, 2))
def test_noise_is_a_function_of_seed_step_and_row(seed, rows, noise_seed, step, size):
    rows = sequences(rows, seed)
    L = 1 + max(sum(map(len, row)) for row in rows)
    whole = draw_noise(collate(rows, L, RAW), PAPER, noise_seed, step)
    parts = [
        draw_noise(collate(rows[i : i + size], L, RAW, i), PAPER, noise_seed, step) for i in range(0, len(rows), size)
    ]
    assert torch.equal(torch.cat([n.t for n in parts]), whole.t)
    assert torch.equal(torch.cat([n.eps.reshape(-1) for n in parts]), whole.eps.reshape(-1))


def test_another_seed_step_or_row_has_other_noise():
    b = packed(0, ROWS)
    drawn = [draw_noise(b, PAPER, *key) for key in ((0, 0), (1, 0), (0, 1))]
    drawn.append(draw_noise(replace(b, first_row=1), PAPER, 0, 0))
    assert len({n.t.sum().item() for n in drawn}) == len({n.eps.sum().item() for n in drawn}) == 4
    same = packed(0, [ROWS[0], ROWS[0]])
    noise = draw_noise(same, PAPER, 0, 0)
    assert noise.t[0] != noise.t[1]


def test_noise_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw_noise(packed(0, ROWS), PAPER, 0, 0)
    assert torch.equal(torch.rand(3), expected)


def test_noise_levels_are_uniform_up_to_the_limit_of_each_image_and_eps_is_normal():
    b = packed(0, [[[(2, 2)] * 20] * 5] * 4)
    noise = draw_noise(b, PAPER, 0, 0)
    assert set(b.t_max.tolist()) == {0.5, 1.0} and len(noise.t) == 400
    u = noise.t / b.t_max
    assert (0 <= u).all() and (u <= 1).all()
    steps = torch.linspace(1 / len(u), 1, len(u))
    assert (u.sort().values - steps).abs().max() < 1.63 / len(u) ** 0.5  # Kolmogorov-Smirnov, 1 %
    assert noise.eps.shape == b.patches.shape
    assert abs(noise.eps.mean()) < 0.03 and abs(noise.eps.std() - 1) < 0.03


def test_the_law_of_t_is_for_images_to_draw_and_levels_below_a_limit_are_uniform():
    b = packed(0, [[[(2, 2)] * 20] * 5] * 4)
    noisy = DiffusionConfig(t_law="logit_normal", t_mean=3.0, t_std=0.1)  # t is near 0.95
    t = draw_noise(b, noisy, 0, 0).t
    assert (t[b.t_max == 1] > 0.9).all()
    assert torch.equal(t[b.t_max < 1], draw_noise(b, PAPER, 0, 0).t[b.t_max < 1])


def test_the_model_reads_the_same_in_training_and_in_sampling():
    config = DiffusionConfig(schedule="linear", prediction="x0", data_variance=0.4)
    b, seen = packed(0, ROWS), []
    noise = draw_noise(b, config, 0, 0)
    t = noise.t[b.patch_image, None]
    z = (1 - t) * b.patches + t * noise.eps
    denoise = denoiser_from(lambda z, t: seen.append(z) or z, "x0", SCHEDULES["linear"], None, config.data_variance)
    denoise(z, t)
    torch.testing.assert_close(noised(b, noise, config), seen[0])
    assert not torch.allclose(seen[0], z)


# -- image loss


@pytest.mark.parametrize(
    "config",
    [PAPER, DiffusionConfig(prediction="v"), DiffusionConfig(schedule="linear", prediction="x0", loss_space="flow")],
    ids=["eps", "v", "x0 in the space of flow"],
)
def test_the_image_loss_is_a_mean_over_numbers_and_then_over_images_whatever_their_sizes(config):
    b = packed(0, ROWS)
    noise = draw_noise(b, config, 0, 0)
    prediction = torch.randn(b.patches.shape, generator=torch.Generator().manual_seed(0))
    errors = []
    for i, t in enumerate(noise.t):
        a, s = SCHEDULES[config.schedule](t)
        numbers = []
        for n in (b.patch_image == i).nonzero()[:, 0]:
            for x, eps, p in zip(b.patches[n], noise.eps[n], prediction[n]):
                if config.prediction == "eps":
                    numbers.append((p - eps) ** 2)
                elif config.prediction == "v":
                    numbers.append((p - (a * eps - s * x)) ** 2)
                else:  # the velocity that follows from x0 = p: z = a x + s eps, a = 1 - s, v = eps - x = (z - x) / s
                    z = a * x + s * eps
                    numbers.append(((z - p) / s - (eps - x)) ** 2 if s > config.det_floor else None)
        errors.append(None if None in numbers else torch.stack(numbers).mean())
    assert sum(e is not None for e in errors) >= 3
    for found, e in zip(image_errors(prediction, b, noise, config), errors):
        if e is not None:
            torch.testing.assert_close(found, e, rtol=1e-4, atol=1e-5)


def test_an_image_of_one_patch_weighs_as_much_as_an_image_of_nine():
    b = packed(0, [[[(1, 1), (3, 3)]]])
    noise = Noise(torch.tensor([0.3, 0.6]), torch.zeros_like(b.patches))
    for off in range(2):
        prediction = torch.where((b.patch_image == off)[:, None], 2.0, 0.0).expand_as(b.patches)
        assert image_errors(prediction, b, noise, PAPER).tolist() == [4.0 * (off == 0), 4.0 * (off == 1)]


def test_the_perfect_prediction_has_no_image_loss():
    b = packed(0, ROWS)
    noise = draw_noise(b, PAPER, 0, 0)
    assert not image_errors(noise.eps, b, noise, PAPER).any()


# -- both


def test_losses_are_those_of_a_forward_pass_written_out():
    model, b = tiny_model(), packed(0, ROWS)
    noise = draw_noise(b, PAPER, 0, 0)
    seen = {}
    forward = model.forward
    model.forward = lambda *a, trunk, head: seen.update(args=a, out=forward(*a)) or forward(*a, head=head)
    lm, image = losses(model, b, noise, PAPER)
    alpha, sigma = (a[b.patch_image, None] for a in SCHEDULES["cosine"](noise.t))
    torch.testing.assert_close(seen["args"][3], alpha * b.patches + sigma * noise.eps)
    logits, prediction = seen["out"]
    log_p = torch.log_softmax(logits, -1)
    torch.testing.assert_close(lm, -sum(log_p[i, target] for i, target in enumerate(b.target)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(image, image_errors(prediction, b, noise, PAPER).sum())


def gradients(model, micro, seed=0, step=3):
    """The gradient of a step's loss, summed over its micro-batches with the counts of the whole step."""
    model.zero_grad()
    micro = list(micro)
    n_targets, n_images = sum(b.n_targets for b in micro), sum(b.n_images for b in micro)
    for b in micro:
        lm, image = losses(model, b, draw_noise(b, PAPER, seed, step), PAPER)
        (lm / n_targets + 5 * image / n_images).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 2], [3, 1]])
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(sizes):
    model = tiny_model()
    whole, accumulated = gradients(model, split(ROWS, [4])), gradients(model, split(ROWS, sizes))
    for name, gradient in whole.items():
        assert gradient.any(), name
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-5, atol=1e-6)


def test_padding_changes_neither_loss():
    model = tiny_model()
    found = []
    for seq_len in (24, 50):
        (b,) = split(ROWS, [4], seq_len)
        found.append(torch.stack(losses(model, b, draw_noise(b, PAPER, 0, 0), PAPER)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


# -- batches that lack something


def test_a_batch_without_images_has_a_text_loss_and_no_image_loss():
    model, b = tiny_model(), packed(0, [[[5], [4]], [[9]]])
    noise = draw_noise(b, PAPER, 0, 0)
    assert noise.t.shape == (0,)
    lm, image = losses(model, b, noise, PAPER)
    (lm + 5 * image).backward()
    assert image == 0 and lm.isfinite() and lm > 0
    assert model.layers[0].attention.wq.weight.grad.any() and model.output.weight.grad.isfinite().all()


def test_a_batch_without_text_targets_has_an_image_loss_and_no_text_loss():
    model, b = tiny_model(), packed(0, [[[(2, 2)]], [[(1, 3)]]])
    assert b.n_targets == 0
    lm, image = losses(model, b, draw_noise(b, PAPER, 0, 0), PAPER)
    (lm + 5 * image).backward()
    assert lm == 0 and image.isfinite() and image > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.layers[0].attention.wq.weight.grad.any()


def test_a_batch_of_padding_alone_has_no_loss():
    model, b = tiny_model(), packed(0, [[], []], seq_len=4)
    lm, image = losses(model, b, draw_noise(b, PAPER, 0, 0), PAPER)
    assert lm == 0 and image == 0


def test_a_row_without_images_between_rows_with_images_shifts_nothing():
    with_gap, without = (packed(0, rows) for rows in ([[[(2, 2)]], [], [[(2, 2)]]], [[[(2, 2)]], [[(2, 2)]]]))
    a, b = (draw_noise(x, PAPER, 0, 0) for x in (with_gap, without))
    assert torch.equal(a.eps[:4], b.eps[:4]) and not torch.equal(a.eps[4:], b.eps[4:])
    assert torch.equal(a.eps[4:], draw_noise(replace(packed(0, [[[(2, 2)]]]), first_row=2), PAPER, 0, 0).eps)
    assert a.eps.shape == (8, PATCH_DIM)


def test_the_text_loss_is_the_cross_entropy_of_the_targets_alone():
    model, b = tiny_model(), packed(0, [[[6]]])
    lm, _ = losses(model, b, draw_noise(b, PAPER, 0, 0), PAPER)
    every = torch.arange(6)
    none = torch.zeros(0, dtype=torch.long)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    logits, _ = model(b.tokens, b.place, causal, torch.zeros(0, PATCH_DIM), torch.zeros(0), none, (), none, every)
    torch.testing.assert_close(lm, F.cross_entropy(logits[:-1], b.tokens[0, 1:], reduction="sum"))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # what the compiler says of itself is no business of ours
def test_losses_and_gradients_are_the_same_on_a_gpu_compiled_or_not():
    found, b = [], packed(0, ROWS, seq_len=128)
    noise = draw_noise(b, PAPER, 0, 0)
    for device, compiled in (("cpu", False), ("cuda", False), ("cuda", True)):
        model = tiny_model(dim=64, n_heads=2).to(device)
        if compiled:
            model.compile_layers()
        sums = losses(model, b.to(device), Noise(*(x.to(device) for x in noise)), PAPER)
        sum(sums).backward()
        found.append([x.detach().cpu() for x in (*sums, *(p.grad for p in model.parameters()))])
    for cpu, eager, compiled in zip(*found):
        for gpu in (eager, compiled):
            assert (gpu - cpu).norm() <= 1e-3 * cpu.norm()
