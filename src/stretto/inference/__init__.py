"""Text out of a trained model, on one process: a key/value cache, sampling, and where models come from."""

from stretto.inference.generate import generate
from stretto.inference.sampling import Sampling
from stretto.inference.text import Source, generate_text, load_source

__all__ = ["Sampling", "Source", "generate", "generate_text", "load_source"]
