"""One rank: our trainer's step over a bare PyTorch loop, and over a transformers Llama of the same size.

OMP_NUM_THREADS=1 python -m benchmarks.one_rank
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.model import LENGTH, MODEL, MeanLoss, bare_loop, our_builder, plain_stack, run_of
from benchmarks.pairs import Case, Side
from benchmarks.processes import main
from stretto.models.hugging_face import hugging_face_tensors
from stretto.spec.contract import Batch
from stretto.spec.plan import PlanSpec

RUN = run_of(PlanSpec(micro_batch_size=4))


def same_module() -> Side:
    """A bare loop on our own modules."""
    module = MeanLoss(plain_stack(RUN))
    return bare_loop(RUN, 0, module, module)


def transformers_llama() -> Side:
    """A bare loop on transformers' Llama with our values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=MODEL.vocab_size,
        hidden_size=MODEL.hidden_size,
        intermediate_size=MODEL.intermediate_size,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_heads,
        num_key_value_heads=MODEL.num_heads,
        max_position_embeddings=LENGTH,
        rms_norm_eps=MODEL.norm_eps,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    theirs = dict(model.named_parameters())
    places = hugging_face_tensors(MODEL)
    with torch.no_grad():
        for name, parameter in plain_stack(RUN).named_parameters():
            theirs[places[name].name].copy_(parameter)

    def mean_loss(batch: Batch) -> Tensor:
        return model(input_ids=batch.tokens, labels=batch.labels, shift_labels=batch.labels).loss

    return bare_loop(RUN, 0, model, mean_loss)


def sides(peer: Callable[[], Side], rank: int) -> tuple[Callable[[], Side], Callable[[], Side]]:
    """What builds both sides."""
    return our_builder(RUN, rank), peer


CASES = [
    Case(name="one rank : bare loop, same module", num_ranks=1, make=partial(sides, same_module), wanted=1.03),
    Case(name="one rank : transformers Llama", num_ranks=1, make=partial(sides, transformers_llama), wanted=1.02),
]

if __name__ == "__main__":
    main("one_rank", __doc__, CASES)
