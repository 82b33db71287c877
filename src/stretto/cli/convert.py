"""``stretto convert``: between Stretto's checkpoints and Hugging Face directories."""

from __future__ import annotations

import argparse

from stretto.spec.capabilities import DTYPES

SUMMARY = "turn a checkpoint into a Hugging Face directory, or back"
DESCRIPTION = """\
Write the model of SOURCE to the new directory TARGET. A run's directory or a checkpoint becomes a Hugging
Face directory (config.json and safetensors); a Hugging Face directory becomes a checkpoint that any
plan can start from. Needs no accelerator."""
EXAMPLES = (
    "stretto convert runs/demo exported/",
    "stretto convert llama/ checkpoint/ --dtype float32",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what convert takes."""
    parser.add_argument("source", metavar="SOURCE", help="a run's directory, a checkpoint, or a Hugging Face directory")
    parser.add_argument("target", metavar="TARGET", help="directory to write; must not exist or be empty")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="write the weights as this (as they are)")


def execute(options: argparse.Namespace) -> int:
    """Convert and print where the result lies."""
    from stretto.trainer.convert import convert

    print(convert(options.source, options.target, dtype=options.dtype))
    return 0
