"""Whether a batch is larger than is useful.

Up to the critical batch size twice the batch halves the steps; beyond it more data ranks buy less and less (McCandlish
et al. 2018, arXiv 1812.06162).  It grows with the tokens that are trained on and hardly with the size of the model
(Zhang et al. 2024, arXiv 2410.21676), so it belongs to a training run and isn't guessed here: who plans says it, as a
bound that was measured or taken from such a paper.
"""

from __future__ import annotations

from stretto.spec.errors import ConfigError


def verdict(batch_tokens: int, critical_tokens: int) -> str:
    """One sentence on a batch of so many tokens.  Extra steps follow McCandlish: 1 + batch / critical, times the data.

    >>> verdict(1_000_000, 4_000_000)
    'batch of 1,000,000 tokens, 0.25 of the critical 4,000,000: 1.25 times the data of the smallest batches'
    """
    if critical_tokens < 1:
        raise ConfigError(f"--critical-batch {critical_tokens} must be at least 1 token.")
    share = batch_tokens / critical_tokens
    text = (
        f"batch of {batch_tokens:,} tokens, {share:.2f} of the critical {critical_tokens:,}: "
        f"{1 + share:.2f} times the data of the smallest batches"
    )
    if share <= 1:
        return text
    return f"{text}; more data ranks hardly save steps, take a smaller global batch"
