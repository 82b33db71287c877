"""What was measured when a schedule was played, and why it took longer than simulated.

format     the files of a trace
trace      a run's trace, held against its schedule
medians    costs from measured durations
overlay    measured over simulated, and the difference in parts
findings   the same in sentences
diagnosis  all of it: ``stretto diagnose``
identity   whose plan a trace is of

Steps whose documents have groups of ranks of their own have no schedule in common: document_format, document_diagnosis
and document_findings say what each rank computed, and which documents it was.
"""
