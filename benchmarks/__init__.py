"""Speed and memory against the peers that people would otherwise use; docs/benchmarks.md has the figures."""
