"""The compiled trunk: what the plain one answers, from few graphs, whatever is asked for and in whatever order."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_batching import ASKED, asked, run, wants_images
from test_generate import OPTIONS, SAMPLE, alike, code_engine, engine_of, picture, rig

from transfusion.generate import Engine
from transfusion.model.transformer import Block

pytestmark = pytest.mark.filterwarnings("ignore")  # what the compiler says of itself is no business of ours


def compiled(engine: Engine) -> Engine:
    return Engine(engine.model, engine.tokenizer, engine.config, engine.codec, compile=True)


def answers(engine: Engine, which, batch: int) -> list:
    """What it answers to some of the requests of all kinds, which enter at different steps where they are several."""
    company, engine.batching = engine.batching, engine.batching
    rig(engine, wants_images)
    requests = [asked(engine, i, batch=batch) for i in which]
    run(engine.batching(), [(ASKED[i][0] if len(requests) > 1 else 0, r) for i, r in zip(which, requests)])
    engine.batching = company
    assert not any(r.error for r in requests), [r.error for r in requests]
    return [engine.read(r.answer) for r in requests]


ALONE = [[4], [1], [0], [3]]  # one lane draws, one writes, guidance, what it likes
ORDERS = {
    "together first": [(range(8), 64), *((i, 1) for i in ALONE), (range(7, -1, -1), 3)],
    "alone first": [*((i, 1) for i in ALONE), (range(8), 3), (range(8), 64)],
}


@pytest.mark.parametrize(
    "name, most, order", [(name, most, o) for name, most in (("plain", 4), ("separate", 5)) for o in ORDERS]
)
def test_mixed_requests_in_any_order_take_few_graphs_and_come_out_as_without(graphs, name, most, order):
    plain = engine_of(seq_len=60, n_layers=1, **OPTIONS[name])
    fast = compiled(plain)
    for which, batch in ORDERS[order]:
        for a, b in zip(answers(fast, which, batch), answers(plain, which, batch), strict=True):
            alike(a, b)
    assert len(graphs) == most


@pytest.mark.parametrize("name", ["lora", "unet", "all", "sides"])
def test_every_kind_of_model_is_compiled_and_draws_and_writes_as_without(graphs, name):
    plain = engine_of(seq_len=60, n_layers=1, **OPTIONS[name])
    fast, which = compiled(plain), [0, 3]
    for a, b in zip(answers(fast, which, 64), answers(plain, which, 64), strict=True):
        alike(a, b)
    assert 0 < len(graphs) <= 5


def test_codes_are_written_by_the_graphs_of_text(graphs):
    plain = code_engine(seq_len=60)
    prompts = ["ab", ["c", picture(0)]]
    for a, b in zip(*(e.generate(prompts, mode="draw", temperature=0) for e in (compiled(plain), plain))):
        alike(a, b)
    assert len(graphs) == 1, "two requests with guidance: four lanes, a token each"


@pytest.mark.parametrize("name, per_layer", [("plain", 4), ("separate", 8), ("lora", 14 + 28)])
def test_one_row_goes_through_matrices_by_a_loop_of_the_graphs_own_and_several_by_products(graphs, name, per_layer):
    plain = engine_of(precision="bf16", n_layers=1, **OPTIONS[name])
    fast = compiled(plain)
    for mode, prompts in (("text", ["abc"]), ("text", ["abc", "d"]), ("draw", ["abc"])):
        given = {"max_tokens": 3} if mode == "text" else {}
        for a, b in zip(*(e.generate(prompts, mode=mode, **given) for e in (fast, plain)), strict=True):
            alike(a, b)
    rows = [[len(x.flatten(0, -2)) for x in multiplied(graph)] for graph in graphs]
    assert len(rows) > 1 and 1 not in rows[0] and all(len(of_graph) == per_layer for of_graph in rows[1:])
    assert len(rows[0]) == (0 if name == "plain" else per_layer // 2), "the empty stream of patches"


def multiplied(graph: torch.fx.GraphModule) -> list[torch.Tensor]:
    """What goes through `F.linear` in a graph, as its compiler saw it."""
    return [node.args[0].meta["example_value"] for node in graph.graph.nodes if node.target is F.linear]


def test_what_is_the_same_in_all_layers_and_for_all_numbers_is_computed_outside_of_the_graph(graphs):
    compiled(engine_of()).draw(["abc"])
    inside = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op.startswith("call")}
    assert inside and not any(op in name for name in inside for op in ("cos", "sin", "pow", "roll"))


def test_a_stream_of_one_row_beside_one_of_more_takes_one_graph_more(graphs):
    plain = engine_of(seq_len=60, n_layers=1, **OPTIONS["separate"])
    fast = compiled(plain)

    def drawn(engine: Engine, sizes) -> list:
        sampling = replace(SAMPLE, guidance=1.0)
        asked = [engine.request(engine.open(["abc"]), "draw", i, sampling, size) for i, size in enumerate(sizes)]
        run(engine.batching(), [(0, r) for r in asked])
        return [engine.read(r.answer) for r in asked]

    three_fill_up, one, two = [(2, 2), (1, 1)], [(2, 2), (1, 3)], [(2, 2), (2, 1)]
    for n, sizes in enumerate((three_fill_up, one, two)):
        for a, b in zip(drawn(fast, sizes), drawn(plain, sizes), strict=True):
            alike(a, b)
        assert len(graphs) == min(n + 1, 2), "torch asks itself whether a norm's rows are one"


def test_an_engine_in_full_precision_follows_a_model_that_trains_on_and_leaves_it_as_it_is(graphs):
    plain = engine_of()
    fast = compiled(plain)
    before = fast.draw(["abc"])
    with torch.no_grad():
        plain.model.layers[0].feed_forward.w2.weight.mul_(-1)
    after = fast.draw(["abc"])
    alike(after, plain.draw(["abc"]))
    assert np.abs(np.asarray(before[0], int) - np.asarray(after[0], int)).max() > 1 and len(graphs) == 1
    assert fast.sampled is plain.model and not {"forward", "trunk"} & set(vars(plain.model))


def test_models_of_equal_sizes_share_graphs_and_no_weights(graphs):
    first, second = engine_of(), engine_of()
    with torch.no_grad():
        second.model.layers[0].feed_forward.w2.weight.mul_(-1)
    for engine in (first, second):
        alike(compiled(engine).draw(["abc"]), engine.draw(["abc"]))
    assert len(graphs) == 1


def test_blocks_that_were_compiled_for_training_are_part_of_the_trunks_graph_and_not_compiled_for_prompts(
    graphs, monkeypatch
):
    plain, of_blocks = engine_of(), []

    def backend(graph, inputs):
        of_blocks.append(graph)
        return graph.forward

    trained = engine_of()
    compile_block = partial(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(Block, "compile", lambda block, **given: compile_block(block, **given))
    trained.model.compile_layers()
    fast = compiled(trained)
    assert trained.model.compiled and fast.sampled is trained.model
    for prompt in (["abc"], ["ab", picture(0), "cd"]):
        alike(fast.generate([prompt], mode="draw")[0], plain.generate([prompt], mode="draw")[0])
        alike(trained.generate([prompt], mode="draw")[0], plain.generate([prompt], mode="draw")[0])
    assert len(graphs) == 1 and not of_blocks


def test_where_there_is_no_cpp_compiler_the_error_says_what_to_do(monkeypatch):
    import torch._inductor.cpp_builder as builder

    def missing():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(builder, "get_cpp_compiler", missing)
    with pytest.raises(ValueError, match=r"install g\+\+, or leave --compile"):
        compiled(engine_of())


def drawn_and_written(engine: Engine) -> tuple[np.ndarray, torch.Tensor]:
    """(latents of an image drawn with guidance, logits of the tokens of a text)."""
    ((image,),) = engine.complete([engine.open("abc")], "draw", 0, SAMPLE)
    logits = []
    rig(engine, lambda r, n: 6 + n)
    batching = engine.batching()
    write = batching.write
    batching.write = lambda r, found: (logits.append(found), write(r, found))
    engine.generate(["abc"], mode="text", max_tokens=5)
    return image.latents, torch.stack(logits)


def test_what_torchs_compiler_makes_of_it_draws_and_writes_the_same_and_no_worse_in_half_precision():
    plain, half = (engine_of(precision=precision, n_layers=1) for precision in ("fp32", "bf16"))
    engines = (plain, compiled(plain), half, compiled(half))
    for exact, fast, *halved in zip(*map(drawn_and_written, engines), strict=True):
        np.testing.assert_allclose(fast, exact, rtol=0, atol=1e-4)
        error, error_compiled = (np.abs(np.asarray(x) - np.asarray(exact)).mean() for x in halved)
        assert 0 < error_compiled < 1.5 * error < 0.05, "what is drawn and logits spread by about 1"


@pytest.mark.gpu
def test_a_gpu_draws_and_writes_the_same_compiled():
    plain = engine_of(n_layers=1)
    plain = Engine(plain.model.cuda(), plain.tokenizer, plain.config)
    for a, b in zip(drawn_and_written(compiled(plain)), drawn_and_written(plain)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
