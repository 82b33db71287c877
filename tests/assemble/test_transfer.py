"""Micro-batches on their way to a device: what goes, and what stays for the host to read."""

from __future__ import annotations

import torch

from stretto.assemble.sequence import SequenceCut
from stretto.assemble.transfer import to_device
from stretto.spec.contract import Batch

META = torch.device("meta")
TOKENS = torch.arange(2 * 12).view(2, 12)


def rows(*, documents: bool) -> Batch:
    found = TOKENS // 5 if documents else None
    return Batch(tokens=TOKENS, labels=TOKENS, positions=TOKENS, documents=found, samples=TOKENS[:, 0])


def test_whole_rows_go_as_they_are() -> None:
    for documents in (True, False):
        there = to_device(rows(documents=documents), META)
        moved = [there.tokens, there.labels, there.positions, there.samples]
        moved += [] if there.documents is None else [there.documents]
        assert len(moved) == 4 + documents and all(tensor.device == META for tensor in moved) and there.part is None


def test_documents_of_whole_rows_stay_where_the_host_reads_them() -> None:
    cut = SequenceCut(ranks=2, index=1, layout="zigzag", unit=1)(rows(documents=True))
    there = to_device(cut, META)
    assert cut.part is not None and there.part is not None and there.documents is not None
    assert there.part.tokens.device == there.documents.device == META and there.part.shares == cut.part.shares
    assert there.part.documents is cut.part.documents and there.part.sources is None
