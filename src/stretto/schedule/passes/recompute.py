"""Recompute: keep nothing but the input of a stage and run its forward again before its backward (Chen et al. 2016).

    0F0 0F1 0F2 0B0       ──►      0F0 0F1 0F2 0R0 0B0

**Arrows**: sRm needs sFm; sBm or sIm needs sRm.
**Memory**: where a stage has R for a micro-batch, its F gives back at its end what it took at its start, and R takes it
again at its start.
**Complete**: R at most once for each F, on the rank of the stage; a stage without backward has none.
"""
