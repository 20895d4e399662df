"""What each command of `cli.py` takes (`declare`) and what it does (`run_...`)."""

import argparse
import json
import os
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import get_origin

import PIL.Image

from transfusion.cluster import GPUS, Cluster
from transfusion.codec.load import load_codec
from transfusion.config import load_config, override, to_toml
from transfusion.data.build import build
from transfusion.data.built import is_built
from transfusion.data.check import check
from transfusion.data.corpus import build_corpus
from transfusion.data.crops import build_crops
from transfusion.data.encode import encode_built
from transfusion.data.images import parse_size
from transfusion.data.processes import cores
from transfusion.data.rows import COLUMNS, Columns
from transfusion.data.shards import KINDS
from transfusion.data.text import load_text
from transfusion.diffusion.solver import SOLVERS
from transfusion.evals.reconstruction import CodecEvalConfig, evaluate_codec
from transfusion.evals.run import EvalConfig, evaluate, table
from transfusion.export import DTYPES, export
from transfusion.generate import Answer, Engine
from transfusion.hub import HUB, client, push
from transfusion.llama import is_llama
from transfusion.plan import plan, plan_cluster
from transfusion.pretrained import TOKENIZER, load
from transfusion.run import PRECISIONS, RunConfig, SampleConfig, pick_device, resolve
from transfusion.shards import leads
from transfusion.tokenizer import train_tokenizer
from transfusion.train import train
from transfusion.train_codec import CodecRunConfig, data_of, train_codec

DRAWING = ("steps", "guidance", "guidance_interval", "renormalise", "solver")
RUN_HELP = "a run folder, a checkpoint, an exported folder, hub:OWNER/NAME, or pretrained:emoji"
CODEC_HELP = "pixels, a run of train-codec, a checkpoint, an exported folder, pretrained:emoji or diffusers:FOLDER"

SAMPLING = {
    "steps": "of the solver: more is slower and finer",
    "solver": f"how noise becomes an image: {', '.join(SOLVERS)}",
    "guidance": "how much an image follows its text; 1 = no guidance",
    "image_guidance": "how much an image follows those before it; 1 = no guidance",
    "guidance_interval": "guide only at noise levels t between these, 0 = image, 1 = noise",
    "renormalise": "keep strong guidance from overdriving contrast",
    "temperature": "of text; 0 = always the likeliest token",
    "top_p": "pick tokens among the likeliest of this total probability",
    "top_k": "pick tokens among so many likeliest; 0 = all",
    "max_tokens": "of text, at most",
    "max_images": "that it draws of itself in one answer, at most",
    "batch": "prompts at once: fewer need less memory",
}


def declare(parsers: Mapping[str, argparse.ArgumentParser]):
    """Gives each command's parser its arguments, and the function that does its work as `run`."""

    def command(name: str, run) -> argparse.ArgumentParser:
        parsers[name].set_defaults(run=run)
        return parsers[name]

    def with_config(p: argparse.ArgumentParser):
        p.add_argument("config", metavar="CONFIG.toml", help="a file of configs/, or your own")
        p.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="e.g. out=runs/mine data.images=my/folder train.steps=500; without out: runs/NAME OF THE CONFIG",
        )

    def with_out(p: argparse.ArgumentParser):
        p.add_argument("--out", type=Path, default=Path("."), help="folder for the images; default: here")

    def with_json(p: argparse.ArgumentParser):
        p.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")

    def with_device(p: argparse.ArgumentParser):
        p.add_argument("--device", default="auto", help="cuda, mps or cpu; default: the first that is there")

    def with_model(p: argparse.ArgumentParser):
        p.add_argument("model", metavar="RUN", help=RUN_HELP)
        with_device(p)
        p.add_argument("--precision", choices=PRECISIONS, default="", help="of its products; default: the run's own")
        p.add_argument("--compile", action="store_true", help="minutes in the first answers, faster ones from then on")

    def with_sampling(p: argparse.ArgumentParser, *names: str):
        for field in fields(SampleConfig):
            if field.name in names:
                flag = "--" + field.name.replace("_", "-")
                kind = {"type": field.type}
                if field.type is bool:
                    kind = {"action": argparse.BooleanOptionalAction}
                elif get_origin(field.type) is tuple:
                    kind = {"type": float, "nargs": 2, "metavar": ("FROM", "TO")}
                p.add_argument(flag, dest=field.name, **kind, help=f"{SAMPLING[field.name]}; default: the run's own")
        p.add_argument("--seed", type=int, default=0, help="the same seed gives the same result; default 0")

    for name, run in (("train", run_train), ("train-codec", run_train_codec)):
        p = command(name, run)
        with_config(p)
        p.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")

    p = command("generate", run_generate)
    with_model(p)
    p.add_argument("prompts", nargs="+", metavar="PROMPT", help='what to draw, e.g. "a red apple"')
    p.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        help="a picture file that stands before each prompt; again: more",
    )
    with_out(p)
    p.add_argument(
        "--mode", choices=("draw", "text", "auto"), default="draw", help="draw an image (default), write text, or both"
    )
    p.add_argument(
        "--size", type=parse_size, help='of the drawings, height x width, e.g. "48x80"; default: the run\'s own'
    )
    with_sampling(p, *DRAWING, "temperature", "top_p", "top_k", "max_tokens", "max_images", "batch")

    p = command("caption", run_caption)
    with_model(p)
    p.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="a picture file: PNG, JPEG, WebP, ...")
    with_sampling(p, "temperature", "max_tokens", "batch")

    p = command("edit", run_edit)
    with_model(p)
    p.add_argument("image", type=Path, metavar="IMAGE", help="a picture file")
    p.add_argument("instructions", nargs="+", metavar="INSTRUCTION", help='e.g. "make it green"; one drawing each')
    with_out(p)
    with_sampling(p, *DRAWING, "image_guidance")

    p = command("inpaint", run_inpaint)
    with_model(p)
    p.add_argument("image", type=Path, metavar="IMAGE", help="a picture file")
    p.add_argument("mask", type=Path, metavar="MASK", help="a picture file: white = draw anew, black = keep")
    p.add_argument("prompts", nargs="+", metavar="PROMPT", help="what the whole image shows; one drawing each")
    with_out(p)
    with_sampling(p, *DRAWING)

    p = command("eval", run_eval)
    with_model(p)
    with_json(p)
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="n_captions=500, data.images=FOLDER, ...: fields of EvalConfig, and other data than the run's own",
    )

    p = command("eval-codec", run_eval_codec)
    p.add_argument("codec", metavar="CODEC", help=CODEC_HELP)
    with_device(p)
    with_json(p)
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="n_images=100, features=installed, sheets=FOLDER: fields of CodecEvalConfig; data.images=FOLDER, "
        "data.image_size=128: other data than the run's own",
    )

    declare_data(parsers["data"], with_config)

    p = command("plan", run_plan)
    with_config(p)
    p.add_argument("--gpus", type=int, default=0, metavar="N", help="plan for so many: memory of each, traffic, days")
    p.add_argument("--gpu", choices=GPUS, default="h100", help="which one; default h100")
    p.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="that NVLink joins; default 8")
    p.add_argument("--mfu", type=float, default=0.4, help="the share of their peak that a run reaches; default 0.4")
    p.add_argument("--storage", type=float, default=10.0, metavar="GB/s", help="that checkpoints go to; default 10")

    p = command("tokenize", run_tokenize)
    p.add_argument("out", type=Path, metavar="TOKENIZER.json")
    p.add_argument("texts", nargs="+", metavar="TEXT", help="text files or folders, or shakespeare")
    p.add_argument("--vocab-size", type=int, default=4096)

    p = command("export", run_export)
    p.add_argument("model", metavar="RUN", help=RUN_HELP)
    p.add_argument("out", type=Path, metavar="FOLDER")
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--license", default="other", help="of the weights, for the model card")
    p.add_argument("--push", metavar="OWNER/NAME", help="put the folder on the Hugging Face hub too")


def declare_data(parser: argparse.ArgumentParser, with_config):
    """Gives `transfusion data` its three commands."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, run, help: str) -> argparse.ArgumentParser:
        p = actions.add_parser(name, help=help, description=help)
        p.set_defaults(run=run)
        return p

    def with_sources(p: argparse.ArgumentParser):
        p.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
        p.add_argument(
            "sources",
            nargs="+",
            metavar="SOURCE",
            help='tars, .parquet, .jsonl, .txt, folders of them, "my/{00000..00099}.tar", s3://..., hf:OWNER/NAME',
        )
        p.add_argument("--workers", type=int, default=cores(), help="processes; default: one a core")
        for name, default in zip(Columns._fields, COLUMNS):
            what = f"the column of a table with {name}s; default {default}"
            p.add_argument(f"--{name}-column", default=default, help=what)

    p = action("check", run_data_check, "Read sources, or what is built, and say what is usable, and what is wrong.")
    with_sources(p)

    p = action("build", run_data_build, "Index and tokenise sources into a folder that training reads in place.")
    with_sources(p)
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    p.add_argument("--tokenizer", default="", metavar="FILE", help="that of data.tokenizer; default: the shipped one")

    p = action("encode", run_data_encode, "Encode the images of built folders with a config's codec, once.")
    with_config(p)


def run_train(args):
    config = load_config(RunConfig, args.config, args.overrides)
    run = Path(config.out or Path("runs") / Path(args.config).stem)
    with nullcontext() if leads() else redirect_stdout(None):  # of many ranks one says what there is to say
        print(f"run folder: {run}")
        saved = train(config, run, args.resume)
        print(f"newest checkpoint: {saved}")
        print(f'try:  transfusion generate {run} "a red apple"\n      transfusion eval {run}')


def run_train_codec(args):
    if "RANK" in os.environ:
        raise ValueError("a codec trains in one process: start it without torchrun")
    config = load_config(CodecRunConfig, args.config, args.overrides)
    run = Path(config.out or Path("runs") / Path(args.config).stem)
    print(f"run folder: {run}")
    saved = train_codec(config, run, args.resume)
    print(f"newest checkpoint: {saved}")
    print(f"try:  transfusion eval-codec {run}\n      transfusion train CONFIG data.codec={run}")


def engine_of(args) -> Engine:
    return load(args.model, args.device, args.precision, args.compile)


def run_generate(args):
    images, engine = [open_image(path) for path in args.image], engine_of(args)
    prompts = [[*images, prompt] for prompt in args.prompts]
    answers = engine.generate(prompts, mode=args.mode, size=args.size, seed=args.seed, **sampling_of(args))
    show(args.prompts, answers, args.out)


def run_edit(args):
    image, engine = open_image(args.image), engine_of(args)
    drawn = engine.edit([image] * len(args.instructions), args.instructions, seed=args.seed, **sampling_of(args))
    show(args.instructions, [[one] for one in drawn], args.out)


def run_inpaint(args):
    image, mask, n = open_image(args.image), open_image(args.mask), len(args.prompts)
    engine = engine_of(args)
    drawn = engine.inpaint([image] * n, [mask] * n, args.prompts, seed=args.seed, **sampling_of(args))
    show(args.prompts, [[one] for one in drawn], args.out)


def show(prompts: list[str], answers: list[Answer], folder: Path):
    """Prints what was written and saves what was drawn for each prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    for prompt, answer in zip(prompts, answers):
        print(f"{prompt}:")
        for part in answer:
            if not isinstance(part, str):
                path = free_name(folder, prompt)
                part.save(path)
                part = path
            print(f"  {part}")


def run_caption(args):
    images = [open_image(path) for path in args.images]
    engine = engine_of(args)
    captions = engine.caption(images, seed=args.seed, **sampling_of(args))
    for path, caption in zip(args.images, captions):
        print(f"{path}: {caption}")


def run_eval(args):
    engine = engine_of(args)
    of_data, others = of_data_or_not(args.overrides)
    c = override(engine.config, of_data)
    corpus, _ = build_corpus(
        c.data, engine.tokenizer, load_codec(c.data.codec, engine.device), engine.fmt, c.train.seq_len
    )
    config, results = load_config(EvalConfig, None, others), {}
    try:
        results.update(evaluate(engine, corpus, config))
    finally:  # what was found before a failure is not lost with it
        print(table(results))
        if args.json and results:
            write_json(args.json, results)


def run_eval_codec(args):
    device = pick_device(args.device)
    codec = load_codec(args.codec, device)
    of_data, others = of_data_or_not(args.overrides)
    config = load_config(CodecEvalConfig, None, others)
    crops, _ = build_crops(override(data_of(args.codec), [text.removeprefix("data.") for text in of_data]))
    results = evaluate_codec(codec, crops, config, device)
    print(table(results))
    if args.json:
        write_json(args.json, results)


def of_data_or_not(overrides: list[str]) -> tuple[list[str], list[str]]:
    """(those of other data than the run's own, those of the evaluation)."""
    of_data = [text for text in overrides if text.startswith("data.")]
    return of_data, [text for text in overrides if text not in of_data]


def run_plan(args):
    config = load_config(RunConfig, args.config, args.overrides)
    m, factor = config.model, config.data.factor
    if is_llama(config.init) or not (m.vocab_size and m.channels and factor):  # else the config says it all
        config = resolve(config, load_codec(config.data.codec))
    if args.gpus:
        cluster = Cluster(args.gpus, config.parallel.shards, config.parallel.context, args.gpus_per_node)
        text = plan_cluster(config, cluster, args.gpu, args.mfu, args.storage)
    else:
        text = plan(config)
    print(to_toml(config) + "\n" + text)


def run_data_check(args) -> int:
    """1 where nothing is usable."""
    usable = 0
    for found in check(args.kind, args.sources, args.workers, Columns(args.image_column, args.text_column)):
        print(found.summary(), flush=True)
        usable += found.usable
    print(f"{usable} {args.kind} can be used")
    return 0 if usable else 1


def run_data_build(args) -> int:
    """1 where a shard could not be read."""
    columns = Columns(args.image_column, args.text_column)
    dataset = build(args.kind, args.sources, args.out, args.tokenizer, args.workers, columns)
    print(f"use it by data.{args.kind}={args.out}")
    lacking = sum("problem" in shard for shard in dataset["shards"])
    if lacking:
        print(f"it lacks {lacking} of {len(dataset['shards'])} shards, which the same call tries again")
    return 1 if lacking else 0


def run_data_encode(args):
    config = load_config(RunConfig, args.config, args.overrides)
    folders = [path for path in (*config.data.images, *config.data.documents) if is_built(path)]
    if not folders:
        raise ValueError(
            f"{args.config} names no built images: build them by `transfusion data build images SOURCE --out FOLDER`, "
            "and say data.images=FOLDER"
        )
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    device = pick_device(config.device)
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # as a run does: each rank of torchrun has a GPU of its own
    codec, codes = load_codec(config.data.codec, device), config.model.patches == "codes"
    with nullcontext() if leads() else redirect_stdout(None):
        for folder in folders:
            latents, missing = encode_built(folder, codec, config.data.sizes, codes, rank, ranks)
            print(f"{folder}: {f'{missing} blocks to come from others' if missing else 'latents'} in {latents}")


def run_tokenize(args):
    texts = [text for path in args.texts for text in load_text(path)[0].train]
    tokenizer = train_tokenizer(texts, args.vocab_size)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(args.out)
    print(f"{args.out}: {tokenizer.vocab_size} tokens; use it by data.tokenizer={args.out}")


def run_export(args):
    address = f"{HUB}{args.push}" if args.push else ""
    if args.push:
        client()  # whether it is there is better known before the export than after
    out = export(args.model, args.out, args.dtype, args.license, address)
    is_model = (out / TOKENIZER).is_file()
    use = f'transfusion generate {out} "a red apple"' if is_model else f"transfusion train CONFIG data.codec={out}"
    print(f"{out}\ntry:  {use}")
    if args.push:
        print(f"{push(out, args.push)}\nits name from now on: {address}")


def write_json(file: Path, numbers: dict[str, float]):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(numbers, indent=1) + "\n")


def sampling_of(args) -> dict:
    """The sampling options that were given."""
    names = {f.name for f in fields(SampleConfig)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def open_image(path: Path) -> PIL.Image.Image:
    try:
        image = PIL.Image.open(path)
        image.load()
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except Exception as error:  # Pillow's plugins raise what they like on broken files
        raise ValueError(f"{path} cannot be read as an image ({error}): convert it to PNG or JPEG") from None
    return image


def free_name(folder: Path, prompt: str) -> Path:
    """A file name made of the prompt that overwrites nothing."""
    stem = "-".join("".join(c if c.isalnum() else " " for c in prompt).split())[:60] or "image"
    names = (folder / f"{stem}{suffix}.png" for suffix in ("", *(f"-{i}" for i in range(2, 10**6))))
    return next(name for name in names if not name.exists())
