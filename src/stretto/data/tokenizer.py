"""Text to token ids and back: bytes, or a Hugging Face tokenizer.json.

Both fulfil ``spec.contract.Tokenizer`` and add ``encode_many``, which encodes a batch of texts into numpy
arrays (the Hugging Face library does that on all cores).  The ``tokenizers`` library is imported only
when such a file is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stretto.spec.contract import Tokenizer
from stretto.spec.errors import ConfigError, DataError

END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "[SEP]", "<end_of_text>")
"""Names under which tokenizers keep the token that ends a document, most usual first."""


class BatchTokenizer(Tokenizer, Protocol):
    """A Tokenizer that also encodes many texts at once."""

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, integer arrays of one dim."""


class ByteTokenizer:
    """Ids 0-255 are the bytes of UTF-8, 256 ends a document: any text, nothing to download.

    >>> ByteTokenizer().encode("é")
    [195, 169]
    """

    vocab_size = 257
    end_of_text = 256
    fingerprint = "bytes/1"

    def encode(self, text: str) -> list[int]:
        """Bytes of ``text``; lone surrogates become ``?``."""
        return list(text.encode("utf-8", errors="replace"))

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """uint8 arrays."""
        return [np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; those above 255 are left out, broken UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


class FileTokenizer:
    """A Hugging Face tokenizer.json.

    end_of_text is the ``eos_token`` of a tokenizer_config.json that stands beside it, else the first of
    END_NAMES among the added tokens.  Special tokens that occur literally in a text keep their ids.
    """

    def __init__(self, file: Path) -> None:
        try:
            from tokenizers import Tokenizer as Engine
        except ImportError:
            raise ConfigError(
                f"{file} needs the library tokenizers, which isn't installed; "
                "install stretto[tokenizers], or set data.tokenizer = 'bytes'."
            ) from None
        try:
            content = json.loads(file.read_bytes())
            self.engine: Any = Engine.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise DataError(f"{file} isn't a Hugging Face tokenizer.json: {error}.") from None
        self.engine.no_truncation()
        self.engine.no_padding()
        self.vocab_size: int = max(self.engine.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.end_of_text: int = self._find_end(file, content)
        decisive = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
        text = json.dumps([decisive, self.end_of_text], sort_keys=True)
        self.fingerprint: str = "file/" + hashlib.sha256(text.encode()).hexdigest()

    def _find_end(self, file: Path, content: dict[str, Any]) -> int:
        config = file.with_name("tokenizer_config.json")
        if config.is_file():
            name = json.loads(config.read_bytes()).get("eos_token")
            name = name.get("content") if isinstance(name, dict) else name
            if isinstance(name, str) and self.engine.token_to_id(name) is not None:
                return self.engine.token_to_id(name)
        added = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
        for name in END_NAMES:
            if name in added:
                return added[name]
        raise DataError(
            f"{file} has no token that ends a document: none of its added tokens {sorted(added)[:20]} is one of "
            f"{list(END_NAMES)}; name it as eos_token in a tokenizer_config.json beside it."
        )

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` without special tokens around it."""
        return self.engine.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int64 arrays; runs on all cores."""
        found = self.engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        return self.engine.decode(list(ids), skip_special_tokens=True)


def load_tokenizer(name: str) -> BatchTokenizer:
    """The tokenizer that ``data.tokenizer`` names: ``bytes``, a tokenizer.json, or a folder that holds one."""
    if name == "bytes":
        return ByteTokenizer()
    file = Path(name).expanduser()
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise DataError(
            f"There is no tokenizer at {file}; "
            "data.tokenizer may be 'bytes', a tokenizer.json or a folder that holds one."
        )
    return FileTokenizer(file)
