"""What is talked about: frozen dataclasses that need no torch."""
