"""The command line: `transfusion COMMAND ...`.

A command's arguments and its work are in `commands.py`, which brings torch and is imported once a command is named: to
show what there is, and to refuse what there is not, this table is enough.

The user's mistakes are ValueErrors with their remedy: they end in one line and exit code 2, never in a traceback.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence

COMMANDS = {
    "train": "Train a model, or go on training one.",
    "train-codec": "Train an autoencoder, whose latents a model may then draw.",
    "generate": "Draw an image for each prompt, or let the model write and draw as it likes.",
    "caption": "Say what is on each image.",
    "edit": "Draw an image anew as an instruction says, by a model that has learned to edit.",
    "inpaint": "Draw the part of an image anew that a mask shows in white; the rest stays.",
    "eval": "Measure a model on its data: text, captions, diffusion, drawings.",
    "eval-codec": "Measure how well a codec gives images back.",
    "data": "Check, build and encode data sets that are larger than memory.",
    "plan": "Print a config's parameters, FLOPs and memory, on one device or on many GPUs; runs nothing.",
    "tokenize": "Train a byte-level BPE tokenizer on text.",
    "export": "Write a trained model as one folder to share.",
}


def build_parser(words: Iterable[str]) -> argparse.ArgumentParser:
    """The parser of a command line of these words: with every command's arguments where one of them is a command."""
    parser = argparse.ArgumentParser(
        prog="transfusion", description="One transformer that writes text and draws images."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help in COMMANDS.items():
        commands.add_parser(name, help=help, description=help)
    if not COMMANDS.keys().isdisjoint(words):
        from transfusion.commands import declare  # here, so that all else need not wait for torch

        declare(commands.choices)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; overrides may stand before and behind an option, which argparse by itself does not take."""
    words = sys.argv[1:] if argv is None else argv
    parser = build_parser(words)
    args, rest = parser.parse_known_args(words)
    if rest and ("overrides" not in args or any("=" not in r or r.startswith("-") for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        words = [args.command, *filter(None, [getattr(args, "action", "")])]
        print(f"transfusion {' '.join(words)}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as shells count a program that Ctrl-C ended


if __name__ == "__main__":
    sys.exit(main())
