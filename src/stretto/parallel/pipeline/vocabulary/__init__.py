"""Vocabulary parallelism at run time: S and T, and what carries their operands between ranks (Yeung et al. 2024)."""
