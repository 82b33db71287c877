"""Offload: activations that wait long for their backward spend the time in the host's memory (PipeOffload, Wan et al.
2025).

    0F0 0O0 0F1 0F2 ... 0L0 0B0          O moves what 0F0 kept to the host, L brings it back for 0B0

O and L run on streams of their own (one per direction and rank, each a queue in the order of the rank) and
occupy no arithmetic: the rank goes on at once.  One starts when the operation before it in the rank's order that does
occupy arithmetic has ended and its stream is free.

**Arrows**: sOm needs sFm; sLm needs sOm; sBm or sIm (and sRm) needs sLm.
**Memory**: what F took is given back at the end of O and taken again at the start of L.  Counted by order alone,
without times, O gives back and L takes where they stand.
**Complete**: O and L come in pairs, on the rank of the stage, once each.
"""
