"""Passes: functions from Schedule to Schedule, each with its invariant in the first line of its docstring."""
