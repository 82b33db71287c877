"""``stretto VERB ...``: find the verb, run it, and turn errors into one line and an exit code.

    0  done
    1  the run failed, or verify found a difference
    2  the input can't be used (arguments, run file, corpus, checkpoint)
  143  the run was asked to stop (SIGTERM) and saved its state

The last line on standard error is ``stretto: error: ...``; a traceback appears only with ``--debug``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from stretto.cli import convert, diagnose, generate, plan, simulate, train, verify
from stretto.spec.errors import RankError, StrettoError

VERBS = (train, plan, verify, generate, convert, simulate, diagnose)
"""The verbs in the order in which ``stretto --help`` shows them."""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="stretto",
        description="Train transformers through any mix of pipeline, tensor, context and data parallelism.",
        epilog="example:\n  stretto train examples/tiny.toml --set plan.dp_replicate=2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    for module in VERBS:
        verb = verbs.add_parser(
            module.__name__.rpartition(".")[2],
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog="examples:\n" + "\n".join(f"  {example}" for example in module.EXAMPLES),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(verb)
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
        verb.set_defaults(execute=module.execute)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` where ``arguments`` is None) and return the exit code.

    argparse itself exits with 2 on arguments that it can't read.
    """
    options = parser().parse_args(arguments)
    options.command = shlex.join(["stretto", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        code: int = options.execute(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("stretto: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Who reads our output has left (``| head``); give the interpreter nothing to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except StrettoError as error:
        if options.debug:
            raise
        print(f"stretto: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, RankError) else 2
    except OSError as error:  # a full disk, a folder that may not be written
        if options.debug:
            raise
        print(f"stretto: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
