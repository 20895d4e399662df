"""The model: a Llama where there is text alone, no leak anywhere, and two roads to every number that agree."""

import math
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from random_rows import CHANNELS, FORMATS, PATCH_SIZE, SPECIAL, VOCAB, document, packed

from transfusion.model.lora import TARGETS, LoraConfig
from transfusion.model.mask import allow, block_mask, dense_mask
from transfusion.model.rope import RopeScaling, angles, rotate
from transfusion.model.transformer import SEPARABLE, ModelConfig, Transfusion, build_model, parameter_counts, row_mask
from transfusion.model.varlen import varlen_mask
from transfusion.sequence import NONE, collate, lay_out

TINY = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "ffn_dim": 48,
    "vocab_size": VOCAB,
    "patch_size": PATCH_SIZE,
    "channels": CHANNELS,
}
SCALED = RopeScaling(8.0, 0.1, 0.5, original_max_position_embeddings=16)  # of 6 pairs 2 stay, 1 is slowed in part
OPTIONS = {
    "plain": {},
    "grouped heads": {"n_kv_heads": 2},
    "qk_norm": {"qk_norm": True},
    "axial": {"image_positions": "axial"},
    "scaled, wide heads": {"rope_scaling": SCALED, "head_width": 12, "n_kv_heads": 2, "image_positions": "axial"},
    "post-norm": {"norm": "post"},
    "refine": {"refine_width": 4},
    "causal images": {"causal_images": True},
    "separate ffn": {"separate": ("ffn",)},
    "separate": {"separate": SEPARABLE, "qk_norm": True},
    "lora": {"lora": LoraConfig(2, alpha=0.1, target_modules=TARGETS)},
    "lora on text": {"qk_norm": True, "lora": LoraConfig(2, alpha=0.1, paths=("text",))},
    "all": {
        "n_kv_heads": 1,
        "qk_norm": True,
        "image_positions": "axial",
        "patch_positions": True,
        "time_scale": True,
        "refine_width": 4,
        "separate": SEPARABLE,
        "lora": LoraConfig(3, alpha=0.1, target_modules=TARGETS),
    },
    "unet": {"patches": "unet", "unet_width": 4},
    "unet of two stages, all": {
        "patches": "unet",
        "unet_width": 4,
        "unet_blocks": 1,
        "patch_size": 4,
        "n_kv_heads": 1,
        "qk_norm": True,
        "image_positions": "axial",
        "patch_positions": True,
    },
    "unet of three stages": {"patches": "unet", "unet_width": 4, "unet_blocks": 1, "patch_size": 8},
    "sides": {"sides": 9, "vocab_size": VOCAB + 9},
}
CODES = 7
CODED = {  # images without patches: for tests that look at positions alone
    "codes": {"patches": "codes", "patch_size": 1, "vocab_size": VOCAB + CODES},
    "codes, all": {
        "patches": "codes",
        "patch_size": 1,
        "sides": 9,
        "vocab_size": VOCAB + 9 + CODES,
        "n_kv_heads": 1,
        "qk_norm": True,
        "norm": "post",
        "image_positions": "axial",
    },
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
options_and_codes = pytest.mark.parametrize("options", [*OPTIONS.values(), *CODED.values()], ids=[*OPTIONS, *CODED])

# three images of different sizes in one document, one with a clean copy, a second document with one that is given, a
# third of text, padding
DOCUMENTS = [[2, (2, 2), 2, (1, 3, "copy"), 1, (2, 1)], [(2, 1, "given"), 2], [3]]


def random_model(device="cpu", **options):
    """A model in which every parameter matters: none is zero, as fresh read-outs are, and scores are not flat."""
    model = build_model(ModelConfig(**{**TINY, **options})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            gain = 0.7 if p.ndim == 4 else 1.5  # convolutions: or numbers grow with a U-Net's depth
            scale = gain / p[0].numel() ** 0.5 if p.ndim > 1 else 0.2
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
            if p.ndim == 1:
                p.add_(1)
    return model.to(device)


def format_of(options):
    fmt = FORMATS[options.get("image_positions", "raster")]
    sizes = {"patch_size": options.get("patch_size", PATCH_SIZE), "sides": options.get("sides", 0)}
    return replace(fmt, **sizes, text_tokens=VOCAB, codes=CODES * (options.get("patches") == "codes"))


def row(options, documents=DOCUMENTS, padding=2):
    """One row of documents, and noise levels and noisy patches for it."""
    fmt = format_of(options)
    b = packed(0, [documents], fmt)
    b = packed(0, [documents], fmt, seq_len=b.tokens.shape[1] + padding)
    generator = torch.Generator().manual_seed(1)
    return b, torch.randn(b.patches.shape, generator=generator), torch.rand(len(b.grids), generator=generator)


def layout_of(model, b):
    """What a mask is built from."""
    return b.document, b.image, b.hidden, not model.config.causal_images


@torch.no_grad()
def outputs(model, b, z, t, build=None):
    """(logits [B * L, V], predictions [B * L, P]): an output at every position, zero where the model has none."""
    mask = build(*layout_of(model, b)) if build else row_mask(b, model)
    every = torch.arange(b.tokens.numel())
    logits, p = model(b.tokens, b.place, mask, z, t, b.patch_image, b.grids, b.patch_at, every)
    return logits, p.new_zeros(len(every), p.shape[1]).index_copy(0, b.patch_at, p)


def changed(before, after):
    """Bool [B * L]: where any bit of an output differs."""
    return torch.stack([(a != b).any(-1) for a, b in zip(before, after)]).any(0)


# -- foreign reference


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_trunk_is_llama(kv_heads):
    transformers = pytest.importorskip("transformers")
    model = random_model(n_layers=3, n_kv_heads=kv_heads, rope_base=5000.0)
    c = model.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=c.hidden_dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.kv_heads,
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_base,  # transformers 4
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},  # transformers 5
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    theirs = {
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        **{f"attention.w{x}": f"self_attn.{x}_proj" for x in "qkvo"},
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }

    def their_name(name):
        part = name.removesuffix(".weight")
        if part.startswith("layers."):
            _, i, part = part.split(".", 2)
            return f"model.layers.{i}.{theirs[part]}.weight"
        return f"{theirs[part]}.weight"

    llama = transformers.LlamaForCausalLM(config).eval()
    weights = {their_name(k): v for k, v in model.state_dict().items() if not k.startswith("patches.")}
    llama.load_state_dict(weights, strict=True)
    b, z, t = row({}, [[40]], padding=0)
    logits, _ = outputs(model, b, z, t)
    with torch.no_grad():
        torch.testing.assert_close(logits, llama(b.tokens).logits[0], rtol=1e-5, atol=1e-5)


# -- slow reference


@pytest.mark.parametrize("scaling", [RopeScaling(), RopeScaling(4.0), SCALED], ids=["none", "linear", "llama 3"])
def test_a_pair_turns_by_its_own_coordinate_at_the_published_frequency(scaling):
    place = torch.tensor([[[30, 30, 0, 0], [35, 39, 5, 9]]])  # a word; a patch of an axial image
    cos, sin = angles(place, 12, 1e4, scaling)
    length, kinds = scaling.original_max_position_embeddings, set()
    for at, pair in product(range(2), range(6)):
        frequency = 1e4 ** (-pair / 6)
        wavelength = 2 * math.pi / frequency
        if wavelength > length / scaling.low_freq_factor:
            kind, frequency = "slowed", frequency / scaling.factor
        elif wavelength < length / scaling.high_freq_factor:
            kind = "kept"
        else:
            kind, span = "between", scaling.high_freq_factor - scaling.low_freq_factor
            smooth = (length / wavelength - scaling.low_freq_factor) / span
            frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        angle, halves = place[0, at, pair % 2].item() * frequency, [pair, pair + 6]
        assert cos[0, 0, at, halves].tolist() == pytest.approx([math.cos(angle)] * 2, abs=1e-5)
        assert sin[0, 0, at, halves].tolist() == pytest.approx([-math.sin(angle), math.sin(angle)], abs=1e-5)
        kinds.add(kind)
    assert kinds == ({"slowed", "kept", "between"} if length else {"slowed"})


@pytest.mark.parametrize(
    "wrong", [{"factor": 0.5}, {"low_freq_factor": 4.0}, {"original_max_position_embeddings": -1}], ids=str
)
def test_impossible_scalings_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} = .*: factor is 1 for none or above"):
        RopeScaling(**{"factor": 8.0, **wrong})


@torch.no_grad()
def test_a_post_norm_layer_is_the_one_written_out():
    model = random_model(norm="post", n_kv_heads=2)
    b, z, t = row({})
    c, rms = model.config, lambda x: x / (x.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt()
    h = model.tok_embeddings(b.tokens[0])
    patches, _ = model.patches.encode(z, t, b.patch_image, b.place[0, b.patch_at, 2:], b.grids)
    h[b.patch_at] = patches
    cos, sin = angles(b.place, c.head_dim, c.rope_base, c.rope_scaling)
    sees = dense_mask(b.document, b.image, b.hidden)[0, 0]
    for layer in model.layers:
        a, f, heads = layer.attention, layer.feed_forward, []
        q, k, v = ((h @ w.weight.T).unflatten(-1, (-1, c.head_dim)).transpose(0, 1)[None] for w in (a.wq, a.wk, a.wv))
        q, k = rotate(q, cos, sin)[0], rotate(k, cos, sin)[0]
        for i in range(c.n_heads):
            of = i // (c.n_heads // c.kv_heads)
            scores = (q[i] @ k[of].T / c.head_dim**0.5).masked_fill(~sees, -torch.inf)
            heads.append(scores.softmax(-1) @ v[0, of])
        h = h + rms(torch.cat(heads, -1) @ a.wo.weight.T) * layer.attention_norm.weight
        x = (torch.sigmoid(h @ f.w1.weight.T) * (h @ f.w1.weight.T) * (h @ f.w3.weight.T)) @ f.w2.weight.T
        h = h + rms(x) * layer.ffn_norm.weight
    last = rms(h) * model.norm.weight
    logits, p = outputs(model, b, z, t)
    real = b.document[0] >= 0  # padding takes no part in attention
    torch.testing.assert_close(logits[real], (last @ model.output.weight.T)[real], rtol=1e-4, atol=1e-4)
    want = model.patches.decode(last[b.patch_at], None, t, b.grids)
    torch.testing.assert_close(p[b.patch_at], want, rtol=1e-4, atol=1e-4)


# -- leaks


@options_and_codes
@pytest.mark.parametrize("build", [dense_mask, varlen_mask])
def test_an_output_changes_exactly_where_the_mask_lets_it_see_the_change(options, build):
    model = random_model(**options)
    b, z, t = row(options)
    sees = dense_mask(*layout_of(model, b))[0, 0]
    if build is varlen_mask:  # padding takes no part in attention
        sees &= (b.document[0] >= 0) | torch.eye(len(sees), dtype=torch.bool)
    before = outputs(model, b, z, t, build)
    patch_of = {at: n for n, at in enumerate(b.patch_at.tolist())}
    for i in range(b.tokens.shape[1]):
        tokens, other = b.tokens.clone(), z.clone()
        if i in patch_of:
            other[patch_of[i]] += 1
        else:
            tokens[0, i] = tokens[0, i] % (VOCAB - 1) + 1
        after = outputs(model, replace(b, tokens=tokens), other, t, build)
        assert torch.equal(changed(before, after), sees[:, i]), f"position {i}"


def patches_of(b, image):
    """Flat positions of an image's patches."""
    return (b.image == image).flatten().nonzero()[:, 0]


@options
def test_each_patch_is_seen_by_every_patch_of_its_image_the_earlier_ones_too(options):
    model = random_model(**options)
    b, z, t = row(options)
    _, before = outputs(model, b, z, t)
    for n, image in enumerate(b.patch_image.tolist()):
        other = z.clone()
        other[n] += 1
        _, after = outputs(model, b, other, t)
        mates = patches_of(b, image)
        seen = (before[mates] != after[mates]).any(-1)
        assert seen.all() if not model.config.causal_images else seen[mates >= b.patch_at[n]].all()
        assert not model.config.causal_images or not seen[mates < b.patch_at[n]].any()


@options
def test_the_first_image_of_a_document_never_sees_the_second_which_sees_the_first(options):
    model = random_model(**options)
    b, z, t = row(options)
    before = outputs(model, b, z, t)
    first, second = patches_of(b, 0), patches_of(b, 1)
    for level_too in (False, True):  # neither its patches nor its noise level
        for changed_image, seen_by, unseen_by in ((0, second, []), (1, [], first)):
            other_t = t.clone()
            other_t[changed_image] += 0.1 * level_too
            other_z = torch.where((b.patch_image == changed_image)[:, None], z + 1, z)
            change = changed(before, outputs(model, b, other_z, other_t))
            assert change[seen_by].all() and not change[unseen_by].any()


def test_the_noise_level_of_an_image_reaches_its_own_patches():
    model = random_model()
    b, z, t = row({})
    before, after = outputs(model, b, z, t), outputs(model, b, z, t + torch.eye(len(t))[0] * 0.2)
    assert changed(before, after)[patches_of(b, 0)].all()


def test_the_tokens_at_patch_positions_mean_nothing():
    model = random_model()
    b, z, t = row({})
    tokens = b.tokens.masked_fill(b.image != NONE, 9)
    assert not changed(outputs(model, b, z, t), outputs(model, replace(b, tokens=tokens), z, t)).any()


def test_patches_of_one_image_that_look_the_same_are_told_apart_by_their_place():
    for name in FORMATS:
        options = {"image_positions": name}
        model = random_model(**options)
        b, z, t = row(options, [[2, (3, 3), 1]])
        _, p = outputs(model, b, z[:1].expand_as(z), t)
        assert len(p[b.patch_at].unique(dim=0)) == 9


# -- two roads


@options_and_codes
def test_a_packed_document_has_the_outputs_that_it_has_alone(options):
    model = random_model(**options)
    fmt = format_of(options)
    rows = [DOCUMENTS, [[4], [1, (3, 2), 1]], [[(2, 2)], [(1, 1), 1, (2, 3), 3]]]
    rng = np.random.default_rng(0)
    sequences = [[lay_out(document(rng, parts, fmt), fmt) for parts in row] for row in rows]
    b = collate(sequences, 40, fmt)
    z, t = torch.from_numpy(rng.standard_normal(b.patches.shape, np.float32)), torch.linspace(0.1, 1, len(b.grids))
    logits, p = outputs(model, b, z, t)
    n_patches, n_images = 0, 0
    for r, row_of_sequences in enumerate(sequences):
        at = 40 * r
        for s in row_of_sequences:
            alone = collate([[s]], len(s), fmt)
            patches = slice(n_patches, n_patches + len(s.patches) * (len(s.t_max) > 0))
            images = slice(n_images, n_images + len(s.t_max))
            n_patches, n_images = patches.stop, images.stop
            alone_logits, alone_p = outputs(model, alone, z[patches], t[images])
            torch.testing.assert_close(logits[at : at + len(s)], alone_logits, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(p[at : at + len(s)], alone_p, rtol=1e-5, atol=1e-5)
            at += len(s)
    assert n_patches == len(z) and n_images == len(t)


def by_cache(model, cache, spans, z, t):
    """(logits, predictions), each a list by span, of spans (lane, sequence, start, stop) that the cache carries on;
    z [lanes] of [N, P] and t [lanes] of [I]. Shorter spans are filled up with queries that write to the bin."""
    q, length = max(stop - start for _, _, start, stop in spans), max(stop for *_, stop in spans)
    shape = (len(spans), q)
    tokens, place = torch.full(shape, SPECIAL.pad), torch.zeros(*shape, 4, dtype=torch.long)
    slots, index, image_q = torch.full(shape, cache.bin), torch.zeros(shape, dtype=torch.long), torch.full(shape, NONE)
    image_k = torch.full((len(spans), length), NONE)
    levels, patches, patch_image, grids = [], [], [], []
    for i, (lane, s, start, stop) in enumerate(spans):
        here, n = slice(start, stop), stop - start
        tokens[i, :n], place[i, :n] = torch.from_numpy(s.tokens[here]), torch.from_numpy(s.place[here])
        image_q[i, :n], image_k[i, :stop] = torch.from_numpy(s.image[here]), torch.from_numpy(s.image[:stop])
        slots[i, :n] = index[i, :n] = torch.arange(start, stop)
        before, inside = (s.image[:start] != NONE).sum(), (s.image[here] != NONE).sum()
        patches.append(z[lane][before : before + inside])
        inside = [j for j in s.image[here] if j != NONE]
        images = sorted(set(inside))
        patch_image += [len(grids) + images.index(j) for j in inside]
        grids += [s.grids[j] for j in images]
        levels.append(t[lane][images])
    hidden = torch.stack([torch.from_numpy(np.pad(s.hidden, (0, length))[:length]) for _, s, *_ in spans])
    k = (0, image_k[:, None], torch.arange(length), hidden[:, None])
    full = not model.config.causal_images
    mask = allow(0, image_q[:, :, None], index[:, :, None], *k, full)[:, None]
    patch_at = (image_q.flatten() != NONE).nonzero()[:, 0]
    layers = cache.at([lane for lane, *_ in spans], slots, length)
    with torch.no_grad():
        logits, p = model(
            *(tokens, place, mask, torch.cat(patches), torch.cat(levels), torch.tensor(patch_image, dtype=torch.long)),
            *(tuple(grids), patch_at, torch.arange(tokens.numel()), layers),
        )
    counts = [stop - start for _, _, start, stop in spans]
    return [row[:n] for row, n in zip(logits.unflatten(0, shape), counts)], list(p.split([len(x) for x in patches]))


IN_CACHE = [4, (2, 3), 5, (2, 2), 3]  # patches at 5 .. 10 and 18 .. 21, each image between <boi> and <eoi>
CUTS = {
    "all at once": [],
    "an image by itself, as it is drawn": [5, 11, 18, 22],
    "an image and its eoi, as it is settled": [5, 12, 18, 23],
    "text by threes": [3, 5, 11, 14, 17, 18, 22, 25],
    "token by token": [*range(1, 6), *range(11, 19), *range(22, 26)],
}


@options_and_codes
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_the_cache_gives_what_the_whole_sequence_gives(options, cuts):
    model = random_model(**options)
    fmt = format_of(options)
    s = lay_out(document(np.random.default_rng(0), IN_CACHE, fmt), fmt)
    unsized = np.flatnonzero((s.tokens < VOCAB) | (s.tokens >= fmt.first_code))  # where it stands without its sides
    cuts = unsized[cuts].tolist()
    z, t = torch.randn(s.patches.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 0.7])
    logits, p = outputs(model, collate([[s]], len(s), fmt), z, t)
    cache = model.new_cache(3, len(s) + 4, torch.float32)
    cached_logits, cached_p = [], []
    for start, stop in pairwise([0, *cuts, len(s)]):
        (chunk_logits,), (chunk_p,) = by_cache(model, cache, [(1, s, start, stop)], {1: z}, {1: t})
        cached_logits.append(chunk_logits), cached_p.append(chunk_p)
    torch.testing.assert_close(torch.cat(cached_logits), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(cached_p), p[s.image != NONE], rtol=1e-5, atol=1e-5)
    assert not any(x[[0, 2]].any() for x in (*cache.k, *cache.v)), "the other lanes stay untouched"


@options
def test_sequences_of_different_lengths_share_a_cache(options):
    model = random_model(**options)
    fmt, rng = format_of(options), np.random.default_rng(0)
    sequences = [lay_out(document(rng, parts, fmt), fmt) for parts in ([2, (3, 3)], [7, (1, 2)], [1, (2, 2)])]
    z = [torch.from_numpy(s.patches) for s in sequences]
    t = [torch.tensor([level]) for level in (0.2, 0.5, 0.9)]
    cache = model.new_cache(3, 32, torch.float32)
    starts = [int((s.image != NONE).argmax()) for s in sequences]
    stops = [start + len(s.patches) for start, s in zip(starts, sequences)]
    lanes = (2, 0, 1)  # prompts side by side, then images side by side, the lanes in another order
    prompts, _ = by_cache(model, cache, [(i, sequences[i], 0, starts[i]) for i in lanes], z, t)
    for noise in (5.0, 0.0):  # the second writing of an image overwrites the first
        noisy = [x + noise for x in z]
        _, images = by_cache(model, cache, [(i, sequences[i], starts[i], stops[i]) for i in lanes], noisy, t)
    ends, _ = by_cache(model, cache, [(i, sequences[i], stops[i], stops[i] + 1) for i in lanes], z, t)
    for i, prompt, image, end in zip(lanes, prompts, images, ends):
        s = sequences[i]
        logits, p = outputs(model, collate([[s]], len(s), fmt), z[i], t[i])
        torch.testing.assert_close(prompt, logits[: starts[i]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(image, p[s.image != NONE], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(end[0], logits[stops[i]], rtol=1e-5, atol=1e-5)


def test_heads_compute_only_what_is_asked_for():
    model = random_model()
    b, z, t = row({})
    logits, p = outputs(model, b, z, t)
    with torch.no_grad():
        mask = row_mask(b, model)
        asked, patches = model(b.tokens, b.place, mask, z, t, b.patch_image, b.grids, b.patch_at, b.text_at)
    assert asked.shape == (b.n_targets, VOCAB) and patches.shape == z.shape
    torch.testing.assert_close(asked, logits[b.text_at], rtol=1e-6, atol=1e-6)
    assert torch.equal(patches, p[b.patch_at])


@options
def test_attention_by_documents_gives_the_loss_and_gradients_of_the_dense_mask(options):
    model = random_model(**options)
    b, z, t = row(options)

    def loss_and_gradients(build, bf16):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            mask = build(*layout_of(model, b))
            logits, p = model(b.tokens, b.place, mask, z, t, b.patch_image, b.grids, b.patch_at, b.text_at)
        loss = torch.nn.functional.cross_entropy(logits.float(), b.target) + (p.float() - z).square().mean()
        loss.backward()
        return [loss.detach()] + [w.grad.clone() for w in model.parameters() if w.grad is not None]

    exact = loss_and_gradients(dense_mask, False)
    for a, e in zip(loss_and_gradients(varlen_mask, False), exact, strict=True):
        assert (a - e).norm() <= 1e-4 * e.norm() + 1e-6
    dense, varlen = (loss_and_gradients(build, True) for build in (dense_mask, varlen_mask))
    sizes = [sum((a - e).norm() / (e.norm() + 1e-6) for a, e in zip(x, exact, strict=True)) for x in (dense, varlen)]
    assert sizes[1] < 2 * sizes[0], "in bf16, beside what the rest of the model rounds"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # what the compiler says of itself is no business of ours
@options
def test_compiled_blocks_on_a_gpu_give_the_loss_and_gradients_of_the_dense_mask(options, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    options = {**options, "dim": 128}
    model = random_model("cuda", **options)
    found = []
    for road in ("dense", "compiled"):
        if road == "compiled":
            model.compile_layers()
        model.zero_grad()
        losses = []
        for documents in (DOCUMENTS, [[4, (5, 5), 30], [(6, 9), 3]]):  # two layouts, one compilation
            length = row(options, documents, 0)[0].tokens.shape[1]
            b, z, t = row(options, documents, padding=-length % 128)
            b, z, t = b.to("cuda"), z.cuda(), t.cuda()
            mask = (block_mask if road == "compiled" else dense_mask)(*layout_of(model, b))
            logits, p = model(b.tokens, b.place, mask, z, t, b.patch_image, b.grids, b.patch_at, b.text_at)
            losses.append(torch.nn.functional.cross_entropy(logits, b.target) + (p - z).square().mean())
        sum(losses).backward()
        found.append([*(loss.detach() for loss in losses), *(p.grad.clone() for p in model.parameters())])
    for dense, compiled in zip(*found):
        assert (dense - compiled).norm() <= 1e-4 * dense.norm()


# -- sizes


def test_the_parts_of_a_model_add_up_to_all_its_parameters():
    model = random_model(n_kv_heads=2, qk_norm=True)
    counts = dict(parameter_counts(model))
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


# -- beginnings and mistakes


@options
def test_fresh_weights_are_a_function_of_the_seed_and_predict_nothing_yet(options):
    models = []
    for _ in range(2):
        with torch.device("meta"):
            model = Transfusion(ModelConfig(**{**TINY, **options}))
        model.to_empty(device="cpu")
        for p in model.parameters():
            p.data.fill_(torch.nan)
        torch.manual_seed(3)
        model.init_weights()
        models.append(model)
    for a, b in zip(*(m.parameters() for m in models)):
        assert torch.equal(a, b) and a.isfinite().all()
    _, p = outputs(models[0], *row(options))
    assert not p.any()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"dim": 30}, "dim = 30, n_heads = 4, head_width = 0: .* and dim / n_heads where head_width is 0"),
        ({"dim": 24}, "dim = 24, n_heads = 4, head_width = 0: a head's width is a multiple of 4"),
        ({"head_width": 6}, "head_width = 6: a head's width is a multiple of 4"),
        ({"head_width": -4}, "head_width = -4"),
        ({"n_kv_heads": 3}, "n_heads = 4 must be a multiple of n_kv_heads = 3"),
        ({"image_positions": "spiral"}, "image_positions = 'spiral': choose one of raster, axial"),
        ({"refine_width": 8, "patch_size": 3}, "refine_width = 8, patch_size = 3: set refine_width=0"),
        ({"refine_width": -1}, "refine_width = -1"),
        ({"patches": "spiral"}, "patches = 'spiral': choose one of linear, codes, unet"),
        ({"norm": "sandwich"}, "norm = 'sandwich': choose one of pre, post"),
        ({"separate": ("heads",)}, r"separate = \['heads'\]: choose some of ffn, attention, norms"),
        ({"patches": "codes", "patch_size": 1, "separate": ("ffn",)}, r"codes are tokens.*set separate=\[\]"),
        ({"patches": "codes", "patch_size": 1, "lora": LoraConfig(2)}, r"codes are tokens.*lora\.paths=text"),
        ({"patches": "unet", "patch_size": 16}, "patch_size = 16: .* set patch_size to one of 2, 4, 8, or patches="),
        ({"patches": "unet", "unet_width": 0}, "unet_width = 0, unet_blocks = 2: at least 1"),
        ({"patches": "unet", "unet_blocks": 0}, "unet_width = 64, unet_blocks = 0: at least 1"),
        ({"patches": "unet", "time_scale": True}, "set time_scale=false, refine_width=0"),
        ({"patches": "unet", "refine_width": 4}, "set time_scale=false, refine_width=0"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**TINY, **wrong})


def test_a_model_without_a_vocabulary_or_channels_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size = 0, model.channels = 0: set both"):
        build_model(ModelConfig(), "meta")
