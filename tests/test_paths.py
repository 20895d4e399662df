"""Paths: the order is undone, each position takes its own path's weights, and a copied path changes nothing."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from random_rows import packed, rows_of_parts, seeds
from test_transformer import OPTIONS, outputs, random_model, row

from transfusion.model.float8 import use_float8
from transfusion.model.lora import LoraConfig
from transfusion.model.mask import dense_mask
from transfusion.model.paths import IMAGE, TEXT, Linear, Norm, Order, linear, products, stack, text_twin
from transfusion.model.transformer import SEPARABLE, build_model, row_mask
from transfusion.sequence import NONE

SORTED = {name: o for name, o in OPTIONS.items() if "separate" in o or "lora" in o}
sorted_options = pytest.mark.parametrize("options", SORTED.values(), ids=SORTED)


def test_some_options_sort():
    assert {"separate", "separate ffn", "lora", "all"} <= set(SORTED)


@given(seeds, rows_of_parts)
def test_text_stands_before_patches_each_in_their_order_and_join_undoes_split(seed, rows):
    b = packed(seed, rows)
    order, positions = Order(b.tokens.shape, b.patch_at), torch.arange(b.tokens.numel()).view_as(b.tokens)
    text, patches = order.split(positions)
    assert torch.equal(patches, b.patch_at)
    assert torch.equal(text, (b.image.flatten() == NONE).nonzero()[:, 0])
    assert torch.equal(order.join([text, patches]), positions)


def test_rows_that_nothing_sorts_stay_as_they_are():
    x = torch.randn(2, 5, 3)
    order = Order((2, 5), None)
    (stream,) = order.split(x)
    assert stream is x and order.join([stream]) is x


def test_the_derivatives_of_split_and_join_go_where_the_values_came_from():
    b = packed(0, [[[2, (2, 2), 1]], [[(1, 3), 4]]])
    order = Order(b.tokens.shape, b.patch_at)
    x = torch.randn(*b.tokens.shape, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(order.split(x)), x)
    assert torch.autograd.gradcheck(lambda x: order.join([s * s for s in order.split(x)]), x)


def test_a_position_takes_the_weights_of_its_path():
    torch.manual_seed(0)
    for separate in (False, True):
        for paths in (None, ("text",), ("image",), ("text", "image")):
            w = Linear(6, 4, separate, LoraConfig(2, 3.0, paths=paths) if paths else None)
            norm = Norm(6, 1e-5, separate)
            for p in [*w.parameters(), *norm.parameters()]:
                torch.nn.init.normal_(p)
            x = torch.randn(5, 6)
            for path, prefix in ((TEXT, ""), (IMAGE, "image_")):
                own = prefix if separate else ""
                W = getattr(w, f"{own}weight")
                if paths and ("text", "image")[path] in paths:
                    W = W + 3.0 / 2 * getattr(w, f"{prefix}lora_B") @ getattr(w, f"{prefix}lora_A")
                torch.testing.assert_close(w(x, path), x @ W.T)
                scale = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
                torch.testing.assert_close(norm(x, path), scale * getattr(norm, f"{own}weight"))


@torch.no_grad()
def test_stacked_matrices_give_what_each_gives_and_their_weights_are_views_of_the_stack():
    x = torch.randn(5, 6)
    for separate in (False, True):
        for adapted in (None, LoraConfig(2, 3.0, paths=("image",))):
            linears = [Linear(6, n, separate, lora) for n, lora in ((4, None), (2, adapted), (3, None))]
            for p in (p for w in linears for p in w.parameters()):
                torch.nn.init.normal_(p)
            alone = [[w(x, path) for w in linears] for path in (TEXT, IMAGE)]
            stack(linears)
            for path in (TEXT, IMAGE):
                torch.testing.assert_close(list(products(linears, x, path)), alone[path])
                torch.testing.assert_close([w(x, path) for w in linears], alone[path])
            assert (linears[0].stacked is None) == (adapted is not None)
            if linears[0].stacked:
                pieces = {p.untyped_storage().data_ptr() for p in linears[0].stacked}
                assert {p.untyped_storage().data_ptr() for w in linears for p in w.parameters()} == pieces
                assert len(pieces) == 1 + separate


@torch.no_grad()
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_a_row_by_a_graphs_own_loop_is_a_product_rounded_once(graphs, dtype, error):
    weight, rows = torch.randn(24, 48).to(dtype), torch.randn(2, 3, 48).to(dtype)
    compiled = torch.compile(linear)
    for x in (rows, rows[:1, :1], rows[0, :1]):
        y = compiled(x, weight)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=error, atol=1e-5)
    linears = [any(node.target is F.linear for node in graph.graph.nodes) for graph in graphs]
    assert linears == [True, False, False]


@pytest.mark.parametrize(
    "name, twin",
    [
        ("layers.0.attention.wq.image_weight", "layers.0.attention.wq.weight"),
        ("layers.0.attention.q_norm.image_weight", "layers.0.attention.q_norm.weight"),
        ("layers.11.feed_forward.w1.image_lora_A", "layers.11.feed_forward.w1.lora_A"),
        ("norm.image_weight", "norm.weight"),
        ("layers.0.attention.wq.weight", None),
        ("patches.image_proj.weight", None),
        ("layers.0.attention.wq.lora_B", None),
    ],
)
def test_a_twin_stands_beside_the_weight_of_the_text_path(name, twin):
    assert text_twin(name) == twin


# ---- two roads ----


def with_paths(dense, **options):
    """The dense model with weights of their own for patches, copies of the text path's."""
    model = build_model(replace(dense.config, **options)).eval()
    own = dense.state_dict()
    model.load_state_dict({name: own[text_twin(name) or name] for name in model.state_dict()})
    return model


@pytest.mark.parametrize("separate", [*[(part,) for part in SEPARABLE], SEPARABLE], ids=str)
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("bf16", [False, True])
def test_patches_with_a_copy_of_the_text_path_are_the_dense_model(separate, norm, bf16):
    dense = random_model(qk_norm=True, n_kv_heads=2, norm=norm)
    model, (b, z, t) = with_paths(dense, separate=separate), row({})
    assert len(model.state_dict()) > len(dense.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found, want = outputs(model, b, z, t), outputs(dense, b, z, t)
    for a, w in zip(found, want):
        assert a.dtype == w.dtype
        torch.testing.assert_close(a, w, rtol=0, atol=0.05 * w.abs().max().item() if bf16 else 1e-5)


@pytest.mark.parametrize("options", [{}, {"separate": SEPARABLE}], ids=str)
def test_fresh_adapters_change_no_bit_of_the_model_that_they_stand_beside(options):
    base = random_model(**options)
    for paths in (("text",), ("image",), ("text", "image")):
        model = build_model(replace(base.config, lora=LoraConfig(4, paths=paths))).eval()
        model.load_state_dict(base.state_dict(), strict=False)
        b, z, t = row({})
        assert all(p.any() != name.endswith("lora_B") for name, p in model.named_parameters())
        # sorted as the adapters' model is: in another order of rows, matrix products may round otherwise
        same = base if options else with_paths(base, separate=("norms",))
        assert all(torch.equal(a, w) for a, w in zip(outputs(model, b, z, t), outputs(same, b, z, t)))


@sorted_options
def test_the_weights_of_patches_take_no_part_in_text_alone(options):
    model = random_model(**options)
    b, z, t = row(options, [[9], [4]])
    before, _ = outputs(model, b, z, t)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if text_twin(name):
                p.add_(1)
    after, _ = outputs(model, b, z, t)
    assert torch.equal(before, after)


@sorted_options
def test_every_weight_of_both_paths_has_a_gradient_where_there_are_text_and_images(options):
    model = random_model(**options)
    b, z, t = row(options)
    mask = dense_mask(b.document, b.image, b.hidden)
    logits, p = model(b.tokens, b.place, mask, z, t, b.patch_image, b.grids, b.patch_at, b.text_at)
    (logits.square().mean() + p.square().mean()).backward()
    still = [name for name, w in model.named_parameters() if not w.grad.any()]
    assert not still


@pytest.mark.filterwarnings("ignore")  # what the compiler says of itself is no business of ours
@pytest.mark.parametrize("options", [{}, SORTED["separate"]], ids=["one path", "separate"])
@pytest.mark.parametrize("in_float8", [False, True], ids=["plain", "float8"])
def test_compiled_blocks_take_any_documents_and_are_not_compiled_for_each(options, in_float8, monkeypatch):
    options, compilations = {**options, "n_layers": 1}, []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain, compiled = random_model(**options), random_model(**options)
    for model in (plain, compiled) if in_float8 else ():
        use_float8(model.layers)
    compiled.compile_layers()
    for documents in (
        [[2, (2, 2), 2]],
        [[2, (3, 3), 1]],
        [[1, (3, 4), 1]],
        [[5, (2, 3), 3]],
        [[1, (1, 2), 3], [(2, 2), 1]],
    ):
        length = row(options, documents, 0)[0].tokens.shape[1]
        b, z, t = row(options, documents, padding=24 - length)  # rows of a run are of one length
        given = (z, t, b.patch_image, b.grids, b.patch_at, b.text_at)
        found = [model(b.tokens, b.place, row_mask(b, model), *given) for model in (plain, compiled)]
        for a, c in zip(*found):
            torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)
        gradients = [
            torch.autograd.grad(sum(x.square().sum() for x in of_model), list(model.layers.parameters()))
            for of_model, model in zip(found, (plain, compiled))
        ]
        for a, c in zip(*gradients):
            torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4 * a.abs().max().item())
        if documents == [[1, (3, 4), 1]]:
            before = len(compilations)
    assert 0 < len(compilations) == before
