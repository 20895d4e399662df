"""Products in float8: those of numbers rounded by hand; a model learns by them, and nothing samples by them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_rows import CHANNELS, PATCH_SIZE, VOCAB, packed
from test_generate import engine_of
from test_loss import PAPER, ROWS, tiny_model
from test_transformer import OPTIONS, random_model, row
from tiny_run import write_tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from transfusion.config import load_config, override
from transfusion.loss import Noise, draw_noise, losses
from transfusion.model import float8
from transfusion.model.float8 import products, use_float8
from transfusion.model.paths import TEXT, multiply_by, plain
from transfusion.model.transformer import SEPARABLE, ModelConfig, build_model, row_mask
from transfusion.optim import OptimConfig, build_optimizers
from transfusion.pretrained import load
from transfusion.run import RunConfig, TrainConfig, uses_float8
from transfusion.train import gradients, train

E4M3, E5M2 = (448, 3, -6), (57344, 2, -14)  # largest number, bits of mantissa, least exponent
SHAPES = [(1, 64), (15, 64), (16, 64), (2, 17, 64), (4, 3, 5, 64)]
KINDS = {name: OPTIONS[name] for name in ("plain", "post-norm", "separate", "separate ffn", "lora", "all")}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def rounded(x, form):
    """x in float64, rounded to the nearest number of the form times the tensor's scale, by its definition."""
    (largest, bits, least), x = form, x.detach().double()
    scale = (x.abs().max().float() / largest).double()
    ratio = (x.float() / scale.float()).double()
    step = 2.0 ** ((torch.frexp(ratio).exponent - 1).clamp(min=least) - bits)
    return (ratio / step).round() * step * scale


def by_hand(x, weights, gs):
    """(y of each weight, dL/dx, dL/dW of each weight) in float64, and the same of numbers that are not rounded."""
    for to_x, to_w, to_g in ((E4M3, E4M3, E5M2), (None, None, None)):
        a, *ws = (rounded(v, f) if f else v.detach().double() for v, f in [(x, to_x), *((w, to_w) for w in weights)])
        g2 = [(rounded(g, to_g) if to_g else g.double()).flatten(0, -2) for g in gs]
        of_weights = [g.T @ a.flatten(0, -2) for g in g2]
        yield [a @ w.T for w in ws], sum(g @ w for g, w in zip(g2, ws)).view_as(x), of_weights


def given(shape, dtype=torch.bfloat16, outs=(48, 32)):
    """x, weights that want gradients, and gradients of what comes out."""
    r = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=r).to(dtype).requires_grad_()
    weights = [torch.randn(n, shape[-1], generator=r).mul_(0.1).requires_grad_() for n in outs]
    gs = [torch.randn(*shape[:-1], n, generator=r).mul_(1e-4).to(dtype) for n in outs]
    return x, weights, gs


def apart(a, b):
    """|a - b| / |b|."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---- one product ----


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_and_gradients_are_those_of_the_numbers_rounded_by_hand(shape, dtype):
    x, weights, gs = given(shape, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ys = products(x, weights)
    found = [*ys, *torch.autograd.grad(ys, [x, *weights], gs)]
    (y, of_x, of_w), (y_exact, of_x_exact, of_w_exact) = by_hand(x, weights, gs)
    bound = 4e-3 if dtype == torch.bfloat16 else 1e-6
    for i, (got, want, exact) in enumerate(zip(found, [*y, of_x, *of_w], [*y_exact, of_x_exact, *of_w_exact])):
        assert got.shape == want.shape and got.dtype == (torch.float32 if i > len(y) else dtype)
        assert apart(got, want) < (1e-6 if i > len(y) else bound)  # those of weights are added up and kept in float32
        assert 0.01 < apart(got, exact) < (0.06 if i < len(y) else 0.12), "4 bits of mantissa forward, 3 backward"


def test_an_empty_stream_has_empty_products_and_gives_the_weights_no_gradient():
    x, weights, gs = given((0, 64))
    ys = products(x, weights)
    of_x, *of_w = torch.autograd.grad(ys, [x, *weights], gs)
    assert [y.shape for y in ys] == [(0, 48), (0, 32)] and of_x.shape == (0, 64)
    assert all(w.shape == g.shape and not g.any() for w, g in zip(weights, of_w))


def test_where_a_factor_is_zero_so_are_products_and_gradients_and_none_is_nan():
    for zero in range(3):
        x, (w,), (g,) = given((5, 64), outs=(48,))
        with torch.no_grad():
            (x, w, g)[zero].zero_()
        (y,) = products(x, [w])
        of_x, of_w = torch.autograd.grad(y, [x, w], g)
        assert [bool(v.any()) for v in (y, of_x, of_w)] == [zero == 2, zero == 0, zero == 1]
        assert all(v.isfinite().all() for v in (y, of_x, of_w))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_size_of_the_numbers_does_not_matter(scale):
    x, weights, gs = given((7, 64), torch.float32)
    ys, scaled = products(x, weights), products(x * scale, weights)
    for y, s in zip(ys, scaled):
        assert apart(s.double() / scale, y) < 0.06 and s.any()  # ratios to another scale may round otherwise
    of_x, of_scaled = (torch.autograd.grad(ys, x, [g * k for g in gs], retain_graph=True)[0] for k in (1, scale))
    assert apart(of_scaled.double() / scale, of_x) < 0.1 or scale < 1e-20, "below float32's least numbers"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_leaves_nothing_finite_behind_so_that_the_step_is_skipped(bad):
    x, (w,), (g,) = given((5, 64), outs=(48,))
    with torch.no_grad():
        x[2, 3] = bad
    (y,) = products(x, [w])
    assert not y.isfinite().any()
    x, (w,), (g,) = given((5, 64), outs=(48,))
    g[1, 2] = bad
    assert not any(v.isfinite().any() for v in torch.autograd.grad(products(x, [w]), [x, w], [g]))


def test_matrices_of_one_stream_convert_it_once(monkeypatch):
    converted, quantise = [], float8.quantise
    monkeypatch.setattr(float8, "quantise", lambda x, form: converted.append(x.shape) or quantise(x, form))
    x, weights, gs = given((16, 64))
    ys = products(x, weights)
    assert converted == [(16, 64), (48, 64), (32, 64)]
    torch.autograd.grad(ys, [x, *weights], gs)
    assert converted[3:] == [(16, 48), (16, 32)]


@pytest.mark.parametrize("of_x, of_w", [(True, True), (True, False), (False, True)])
def test_what_wants_no_gradient_costs_no_product_and_nothing_is_kept_for_it(of_x, of_w, monkeypatch):
    calls, kept, multiply = [], [], float8.multiply
    monkeypatch.setattr(float8, "multiply", lambda a, b, dtype: calls.append(dtype) or multiply(a, b, dtype))
    x, (w,), (g,) = given((32, 64), outs=(48,))
    x.requires_grad_(of_x), w.requires_grad_(of_w)
    with saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        (y,) = products(x, [w])
    assert sum(v.nbytes for v in kept if v.ndim) == 32 * 64 * of_w + 48 * 64 * of_x, "a byte a number"
    y.backward(g)
    assert len(calls) == 1 + of_x + of_w and ((x.grad is None), (w.grad is None)) == (not of_x, not of_w)


@pytest.mark.parametrize("m", [0, 1, 16, 33])
def test_a_gpu_takes_what_is_multiplied_in_both_directions(m, monkeypatch):
    """By torch's own rules of layouts and sizes on CUDA, which it checks without one."""
    asked, scaled_mm = [], F.scaled_mm

    def on_cuda(*given, **options):
        def there(v):
            return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda")

        with FakeTensorMode():
            asked.append(scaled_mm(*(there(v) if isinstance(v, torch.Tensor) else v for v in given), **options))
        return scaled_mm(*given, **options)

    monkeypatch.setattr(F, "scaled_mm", on_cuda)
    x, weights, gs = given((m, 64))
    torch.autograd.grad(products(x, weights), [x, *weights], gs)
    assert len(asked) == 6
    monkeypatch.setattr("torch._subclasses.fake_tensor.log.exception", lambda *given, **options: None)
    for outs, width in (((48,), 24), ((24,), 64)):  # what has other sizes is refused there, and RunConfig says so
        x, weights, gs = given((16, width), outs=outs)
        with pytest.raises(RuntimeError, match="divisible by 16"):
            torch.autograd.grad(products(x, weights), [x, *weights], gs)


# ---- a model ----


def step_of(model, options, bf16=True):
    """Loss and gradients of a row of documents."""
    b, z, t = row(options)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        given = (z, t, b.patch_image, b.grids, b.patch_at, b.text_at)
        logits, p = model(b.tokens, b.place, row_mask(b, model), *given)
        loss = F.cross_entropy(logits.float(), b.target) + (p.float() - z).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def joined(grads):
    return torch.cat([g.flatten() for g in grads.values()])


@kinds
def test_a_model_in_float8_has_the_gradients_of_float32_within_its_rounding_and_no_weight_of_its_own(
    options, monkeypatch
):
    model, counted, multiply = random_model(**options), [], float8.multiply
    monkeypatch.setattr(float8, "multiply", lambda *given: counted.append(given) or multiply(*given))
    names = list(model.state_dict())
    _, exact = step_of(model, options, bf16=False)
    loss, grads = step_of(model, options)
    assert not counted
    use_float8(model.layers)
    loss8, grads8 = step_of(model, options)
    matrices = 7 * (1 + bool(model.config.sorts)) * model.config.n_layers  # a stream each where patches are apart
    assert len(counted) == 3 * matrices, "forward, and both gradients"
    assert list(model.state_dict()) == names and grads.keys() == grads8.keys()
    assert 0 < abs(loss8 - loss) < 0.05 * loss
    off, off8 = (apart(joined(g), joined(exact)) for g in (grads, grads8))
    assert 4 * off < off8 < 16 * off, "4 bits for 8 forward, 3 for 8 backward"
    multiply_by(model.layers, plain)
    assert torch.equal(step_of(model, options)[0], loss)


def test_frozen_matrices_under_adapters_get_no_gradient_and_the_adapters_do(monkeypatch):
    model, dtypes, multiply = random_model(**OPTIONS["lora"]), [], float8.multiply
    monkeypatch.setattr(float8, "multiply", lambda a, b, dtype: dtypes.append(dtype) or multiply(a, b, dtype))
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name)
    use_float8(model.layers)
    _, grads = step_of(model, OPTIONS["lora"])
    assert grads and all("lora" in name and g.any() for name, g in grads.items())
    assert dtypes and set(dtypes) == {torch.bfloat16}, "gradients of weights would be float32"


@pytest.mark.parametrize("options", [{}, {"separate": SEPARABLE}], ids=str)
def test_a_training_in_float8_follows_the_losses_of_bf16(options):
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "ffn_dim": 128, "vocab_size": VOCAB}
    config = RunConfig(
        model=ModelConfig(**sizes, patch_size=PATCH_SIZE, channels=CHANNELS, **options),
        optim=OptimConfig(lr=3e-3),
        train=TrainConfig(precision="bf16"),
    )
    batch, curves = packed(0, ROWS), []
    for in_float8 in (False, True):
        torch.manual_seed(0)
        model = build_model(config.model)
        if in_float8:
            use_float8(model.layers)
        optimizers, curve = build_optimizers(model, config.optim), []
        for step in range(40):
            lm, image, _ = gradients(model, [batch], config, step)
            curve.append([lm.item() / batch.n_targets, image.item() / batch.n_images])
            for optimizer in optimizers:
                optimizer.step()
        curves.append(np.array(curve))
    bf16, in8 = curves
    assert (bf16[-1] < 0.6 * bf16[0]).all(), "it learns"
    off = np.abs(in8 / bf16 - 1)
    assert (0 < off.max(0)).all() and off.max() < 0.1 and off.mean() < 0.02


@pytest.mark.filterwarnings("ignore")  # what the compiler says of itself is no business of ours
@pytest.mark.parametrize("frozen", [False, True])
def test_products_are_compiled_in_one_graph_with_what_is_around_them_for_any_number_of_rows(graphs, frozen):
    part = random_model().layers.requires_grad_(not frozen)[0].feed_forward
    use_float8(part)
    traced = torch.compile(part, fullgraph=True, dynamic=True)
    differentiated = torch.compile(part, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (5, 16, 33, 40):
        found = []
        for call in (part, traced, differentiated):
            x = torch.randn(m, 32, generator=torch.Generator().manual_seed(m)).requires_grad_(m != 40)
            with torch.autocast("cpu", torch.bfloat16):
                y = call(x, TEXT)
            wanted = [v for v in (x, *part.parameters()) if v.requires_grad]
            found.append([y, *(torch.autograd.grad(y.float().square().sum(), wanted) if wanted else ())])
        for eager, *others in zip(*found, strict=True):
            assert eager.any() and all(torch.equal(other, eager) for other in others)
    assert len(graphs) == 2, "with and without a gradient of the rows"


# ---- a run ----


def test_what_samples_from_a_model_that_trains_in_float8_is_what_samples_from_any_other(monkeypatch):
    want = engine_of(precision="bf16").draw(["abc"])
    engine = engine_of(precision="bf16")
    use_float8(engine.model.layers)
    monkeypatch.setattr(float8, "multiply", None)  # whoever calls it fails
    assert engine.draw(["abc"]) == want
    with pytest.raises(TypeError):
        step_of(engine.model, {})


def test_a_run_in_float8_draws_on_its_way_goes_on_without_and_loads_at_any_precision(tmp_path, monkeypatch):
    options = ["train.float8=true", "train.precision=bf16", "train.sample_every=2", "train.steps=4"]
    config = load_config(RunConfig, write_tiny(tmp_path / "data"), options)
    calls, multiply = [], float8.multiply
    monkeypatch.setattr(float8, "multiply", lambda *given: calls.append(given) or multiply(*given))
    train(config, tmp_path / "run")
    assert len(calls) == 4 * 3 * 7 * 2, "steps, directions, matrices, layers; the sheets have none"
    assert (tmp_path / "run/samples/step_00000004.png").exists()
    calls.clear()
    for precision in ("", "bf16", "fp32"):
        assert load(tmp_path / "run", "cpu", precision).config.train.float8
    train(override(config, ["train.float8=false", "train.steps=6"]), tmp_path / "run", resume=True)
    assert not calls


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_float8_is_used_where_it_is_asked_for():
    assert uses_float8(TrainConfig(float8=True, precision="bf16"), CPU)
    assert not uses_float8(TrainConfig(precision="bf16"), CPU)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)])
def test_a_gpu_without_float8_is_refused_by_name(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    config = TrainConfig(float8=True, precision="bf16")
    if capability >= (8, 9):
        assert uses_float8(config, CUDA)
    else:
        with pytest.raises(ValueError, match=r"A GPU multiplies no float8.* 8.9 or more.* set train.float8=false"):
            uses_float8(config, CUDA)


def test_mps_and_full_precision_are_refused_before_any_data_is_read(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="mps multiplies no float8"):
        uses_float8(TrainConfig(float8=True), torch.device("mps"))
    with pytest.raises(ValueError, match=r"train.precision = 'fp32'.* set train.precision=bf16"):
        train(RunConfig(device="cpu", train=TrainConfig(float8=True, precision="fp32")), tmp_path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(ValueError, match=r"train.precision = 'auto'"):
        uses_float8(TrainConfig(float8=True), CPU)


def test_sizes_that_a_gpu_does_not_multiply_are_refused_by_name():
    config = RunConfig(model=ModelConfig(dim=64, n_heads=4, n_kv_heads=2, ffn_dim=64), train=TrainConfig(float8=True))
    for sizes, said in (
        ({"dim": 72, "head_width": 16}, "dim = 72"),
        ({"ffn_dim": 100}, "ffn_dim = 100"),
        ({"n_kv_heads": 1, "head_width": 8}, "keys' width = 8"),
        ({"n_heads": 3, "n_kv_heads": 3, "head_width": 8, "dim": 48}, "queries' width = 24, keys' width = 24"),
    ):
        with pytest.raises(ValueError, match=rf"of the model {said}: .* multiples of 16; .* train.float8=false"):
            replace(config, model=replace(config.model, **sizes))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # what the compiler says of itself is no business of ours
def test_losses_and_gradients_in_float8_are_those_of_a_cpu_on_a_gpu_compiled_or_not():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("multiplies no float8")
    found, b = [], packed(0, ROWS, seq_len=128)
    noise = draw_noise(b, PAPER, 0, 0)
    roads = ("cpu", False, False), ("cpu", True, False), ("cuda", True, False), ("cuda", True, True)
    for device, in_float8, compiled in roads:
        model = tiny_model(dim=64).to(device)
        if in_float8:
            use_float8(model.layers)
        if compiled:
            model.compile_layers()
        with torch.autocast(device, torch.bfloat16):
            sums = losses(model, b.to(device), Noise(*(x.to(device) for x in noise)), PAPER)
        sum(sums).backward()
        found.append(joined({name: p.grad.cpu() for name, p in model.layers.named_parameters()}))
    bf16, cpu, *gpus = found
    for gpu in gpus:
        assert apart(gpu, cpu) < apart(bf16, cpu)  # what a GPU rounds otherwise tips some numbers over
