"""The engine of building blocks: make them, repeat them, polish what came out.

``making`` puts one micro-batch's F, I and W modulo the period; ``running`` runs the repeated order under a memory
limit, with W where there is room; ``polishing`` moves operations of the critical path.  All three are loops over
arrays that are compiled where numba is at hand, so they are imported only when a schedule is built.
"""
