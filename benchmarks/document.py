"""Writes the figures of the results folder into docs/benchmarks.md.

python -m benchmarks.document
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.pairs import RESULTS

PAGE = RESULTS.parent.parent / "docs" / "benchmarks.md"
START, END = "<!-- figures -->\n", "<!-- end of figures -->\n"
ORDER = ("one_rank", "replicate", "shard", "tensor", "pipeline")
HEAD = (
    "| ours : peer | ours, ms | peer, ms | ratio | quartiles | min - max | wanted "
    "| processor time | memory, MB | ratio |\n"
    "|---|---:|---:|---:|---|---|---|---:|---|---:|\n"
)


def main() -> None:
    """Replace what lies between the two marks of the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    PAGE.write_text(before + START + figures() + END + after, encoding="utf-8")


def figures() -> str:
    """The table of all results, and where it was measured."""
    records = [json.loads((RESULTS / f"{name}.json").read_text()) for name in ORDER]
    rows = "".join(row_line(row) for record in records for row in record["rows"])
    machines = {json.dumps(record["machine"], sort_keys=True) for record in records}
    places = "".join(machine_line(json.loads(machine)) for machine in sorted(machines))
    pairs = sorted({row["pairs"] for record in records for row in record["rows"]})
    counted = " or ".join(str(count) for count in pairs)
    return f"\n{HEAD}{rows}\n{places}Pairs per row: {counted}.\n\n"


def row_line(row: dict[str, Any]) -> str:
    """One line of the table."""
    ours, peer = (f"{1e3 * row['seconds'][side]:.0f}" for side in ("ours", "peer"))
    low, high = row["ratio_quartiles"]
    least, most = row["ratio_range"]
    memory = " : ".join(f"{row['memory_bytes'][side]['peak'] / 1e6:.1f}" for side in ("ours", "peer"))
    wanted = "" if row["wanted"] is None else f"<= {row['wanted']:.2f}"
    cells = (
        row["name"],
        ours,
        peer,
        f"**{row['ratio']:.3f}**",
        f"{low:.3f} - {high:.3f}",
        f"{least:.3f} - {most:.3f}",
        wanted,
        f"{row['processor_time_ratio']:.3f}",
        memory,
        f"{row['memory_ratio']:.3f}",
    )
    return f"| {' | '.join(cells)} |\n"


def machine_line(machine: dict[str, Any]) -> str:
    """Where figures come from."""
    return (
        f"Measured on {machine['cores']} cores ({machine['processor']}), Python {machine['python']}, "
        f"torch {machine['torch']}, {machine['threads']} thread per process.\n"
    )


if __name__ == "__main__":
    main()
