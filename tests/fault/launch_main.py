"""``python -m tests.fault.launch_main RUN_FILE STUB``: train with a stand-in, errors as the command line shows them."""

import sys

from stretto.spec import toml
from stretto.spec.errors import RankError, StrettoError
from stretto.trainer.launch import run_training

if __name__ == "__main__":
    try:
        run = toml.from_text(toml.read(sys.argv[1]))
        sys.exit(run_training(run, entry=f"tests.fault.stubs:{sys.argv[2]}"))
    except StrettoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, RankError) else 2)
