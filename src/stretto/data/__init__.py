"""From text on disk to the micro-batches of a step.

    source ──► tokenizer ──► tokens (memory-mapped, cached) ──► split ──► packing ──► order ──► loader

``prepare(spec, ...)`` gives a Corpus, ``Loader(corpus, share).step(n)`` the Batches of step n.  All of it
is numpy over memory maps; torch is imported where a Batch is made.  Clips (family video) come by ``prepare_clips`` and
``ClipLoader``, likewise.
"""

from stretto.data.clips import ClipCorpus, ClipLoader, prepare_clips
from stretto.data.corpus import Corpus, Split, prepare
from stretto.data.loader import Loader, Share
from stretto.data.tokenizer import BatchTokenizer, ByteTokenizer, FileTokenizer, load_tokenizer

__all__ = [
    "BatchTokenizer",
    "ByteTokenizer",
    "ClipCorpus",
    "ClipLoader",
    "Corpus",
    "FileTokenizer",
    "Loader",
    "Share",
    "Split",
    "load_tokenizer",
    "prepare",
    "prepare_clips",
]
