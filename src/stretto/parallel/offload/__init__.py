"""Activations in the host's memory: buffers (pool), copies beside the arithmetic (mover), what moves (offloader)."""
