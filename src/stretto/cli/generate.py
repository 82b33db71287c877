"""``stretto generate``: text from a trained model, on one process."""

from __future__ import annotations

import argparse
import sys

from stretto.cli import verbs
from stretto.spec.errors import ConfigError

SUMMARY = "write text with a trained model"
DESCRIPTION = """\
Continue a prompt with the model of SOURCE, on one process, whatever plan it was trained under. The text
streams to standard output, the prompt first."""
EXAMPLES = (
    'stretto generate runs/demo --prompt "def "',
    "stretto generate exported/ --prompt 'import ' --max-tokens 400 --temperature 0.7 --seed 3",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what generate takes."""
    parser.add_argument("source", metavar="SOURCE", help="a run's directory, a checkpoint, or a Hugging Face directory")
    parser.add_argument("--prompt", default="", help="text to go on from")
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N", help="tokens to write at most (200)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token (0.8)")
    parser.add_argument("--top-k", type=int, default=None, metavar="K", help="draw from the K likeliest tokens only")
    parser.add_argument("--seed", type=int, default=0, help="decides the draws (0)")


def execute(options: argparse.Namespace) -> int:
    """Stream the text."""
    if options.max_tokens < 1:
        raise ConfigError(f"--max-tokens {options.max_tokens} must be at least 1.")
    if not 0 <= options.temperature < float("inf"):
        raise ConfigError(f"--temperature {options.temperature} must be a finite number, 0 or above.")
    if options.top_k is not None and options.top_k < 1:
        raise ConfigError(f"--top-k {options.top_k} must be at least 1; leave it out to draw from all tokens.")
    pieces = verbs.generate(
        options.source,
        prompt=options.prompt,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )
    first = True
    for piece in pieces:
        if first:  # only once there is text, so that an error in the source prints no prompt before it
            sys.stdout.write(options.prompt)
            first = False
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0
