"""``stretto train``: take the corpus of a run file through its plan."""

from __future__ import annotations

import argparse

from stretto.cli.run_file import add_run_arguments, read_run

SUMMARY = "train a model as a run file says"
DESCRIPTION = """\
Train the model of RUN_FILE under its plan. Starts one local process per rank of the plan, or, under torchrun,
Slurm or Kubernetes, joins the processes that are there. Goes on from the newest checkpoint of the run's
directory if it has one. SIGTERM writes a checkpoint and stops."""
EXAMPLES = (
    "stretto train examples/tiny.toml",
    "stretto train run.toml --set plan.pp=2 plan.dp_replicate=2 run.dir=runs/second",
    "torchrun --nproc-per-node 8 -m stretto.cli.main train run.toml --set plan.dp_shard=8",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what train takes."""
    add_run_arguments(parser)


def execute(options: argparse.Namespace) -> int:
    """Train; 0 when all steps are done, 143 when the run was asked to stop before."""
    run = read_run(options)
    from stretto.trainer.launch import run_training

    return run_training(run, run_file=options.run_file)
