"""``stretto verify``: is this plan the same training as one rank?"""

from __future__ import annotations

import argparse
import json

from stretto.cli.run_file import add_run_arguments, read_run

SUMMARY = "compare a plan with one rank, parameter by parameter"
DESCRIPTION = """\
Shrink the model and the plan of RUN_FILE, keeping their structure (uneven stages, key/value heads, ties,
packing, masks), train a few steps under the plan and on one rank, both on the CPU from the same weights
and tokens, and compare the loss and every parameter's gradient. Exits 1 if they differ."""
EXAMPLES = (
    "stretto verify examples/demo.toml",
    "stretto verify run.toml --set plan.tp=2 plan.zero=3 --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what verify takes."""
    add_run_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON alone")


def execute(options: argparse.Namespace) -> int:
    """Verify and print; 0 if equal, 1 if not."""
    run = read_run(options, data=False)
    from stretto.trainer.verify import verify

    report = verify(run)
    if options.json:
        names = ("equal", "loss_error", "grad_error", "worst_parameter")
        print(json.dumps({name: getattr(report, name) for name in names}))
    else:
        verdict = "equal to one rank" if report.equal else "NOT equal to one rank"
        print(f"{verdict}: loss error {report.loss_error:.1e}, gradient error {report.grad_error:.1e}")
        if report.worst_parameter is not None:
            print(f"{'largest' if report.equal else 'first'} difference in {report.worst_parameter}")
    return 0 if report.equal else 1
