"""Text to token ids and back: a byte-level BPE, so that every text is in its alphabet and comes back to the letter.

    ids   0 ... 5                                    <pad> <bos> <eos> <boi> <eoi> <patch>: never the result of a text
          6 ... 261                                  the 256 bytes
          262 ... vocab_size - 1                     merges, the most frequent first

Another Hugging Face tokenizer.json works too: the special tokens it lacks are added behind its vocabulary.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, the library warns at every fork of a loader's worker
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from transfusion.sequence import Special

SHIPPED = Path(__file__).resolve().parent / "assets" / "tokenizer.json"
PROBE = (
    " The quick brown fox's 12,345 jumps: <boi>\n\tna\u00efve \u00c5 A\u030a \ufb01 \u4f60\u597d \U0001f34e  \r\n..."
)
NAMES = {f.name: f"<{f.name}>" for f in fields(Special)}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A Hugging Face tokenizer that takes whatever a text contains as text."""

    hf: tokenizers.Tokenizer
    special: Special

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.hf.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def key(self) -> str:
        """Changes with whatever changes the ids of texts, and with no more: not with the release that saved it."""
        said = sorted(self.hf.get_vocab(with_added_tokens=True).items()), self.encode(PROBE)
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, none of them special."""
        return self.hf.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""
        return [e.ids for e in self.hf.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special ones left out; bytes that are no UTF-8 come back as U+FFFD."""
        return self.hf.decode(list(ids), skip_special_tokens=True)

    def save(self, path: str | Path) -> None:
        self.hf.save(str(path))


def wrap(hf: tokenizers.Tokenizer, source: str) -> Tokenizer:
    """A Tokenizer; the special tokens that are missing are added, and texts can no longer spell them."""
    hf.no_truncation()
    hf.no_padding()
    hf.add_special_tokens(list(NAMES.values()))
    hf.encode_special_tokens = True  # '<boi>' in a text is five letters, not the token
    special = Special(**{field: hf.token_to_id(name) for field, name in NAMES.items()})
    tokenizer = Tokenizer(hf, special)
    ids = set(vars(special).values())
    for name in NAMES.values():
        if ids & set(tokenizer.encode(name)):
            raise ValueError(f"{source} turns the text {name!r} into a special token: use a tokenizer that does not")
    return tokenizer


def load_tokenizer(path: str | Path = "") -> Tokenizer:
    """The shipped tokenizer, or any Hugging Face tokenizer.json; ValueError if it cannot be read."""
    file = Path(path).expanduser() if str(path) else SHIPPED
    return wrap(read_tokenizer(file), str(file))


def read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a file as it is, without our special tokens."""
    if not file.is_file():
        raise ValueError(f"no tokenizer {file}: give a tokenizer.json, or make one by `transfusion tokenize`")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is not a Hugging Face tokenizer.json: {error}") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with at most `vocab_size` tokens; ValueError if that leaves no room for the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(NAMES) + len(alphabet)
    if vocab_size < least:
        raise ValueError(f"vocab_size = {vocab_size}: the special tokens and the bytes alone take {least}")
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    hf.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(NAMES.values()), initial_alphabet=alphabet, show_progress=False
    )
    hf.train_from_iterator(texts, trainer)
    return wrap(hf, "the new tokenizer")
