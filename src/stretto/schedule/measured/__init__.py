"""What was measured when a schedule was played, and why it took longer than simulated.

format     the files of a trace
trace      a run's trace, held against its schedule
medians    costs from measured durations
overlay    measured over simulated, and the difference in parts
findings   the same in sentences
diagnosis  all of it: ``stretto diagnose``
"""
