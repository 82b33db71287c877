"""What is talked about: frozen dataclasses that need no torch.

A run file becomes a ``RunSpec`` in ``resolve``, is refused by ``check`` where it can't work, and is written
back by ``toml``.  The dataclasses say what every key means; ``contract`` and ``sharding`` hold what the
rooms above need of each other.
"""
