"""Sharded parameters: gather before use, free after it, reduce gradients after the last (ZeRO-3, Rajbhandari et al.
2020).

    0UNSHARD0 0F0 0F1 0RESHARD0 ... 0UNSHARD0 0I0 0W0 0I1 0W1 0RESHARD0 0REDUCE_GRAD0 OPT

A stage has one or more blocks, each gathered, freed and reduced by itself; the number after the kind is the block.
UNSHARD and REDUCE_GRAD run on a stream of their own (one per rank, a queue in the order of the rank) and occupy no
arithmetic; RESHARD takes no time.  Each starts when the operation before it in the rank's order that does occupy
arithmetic has ended, and where it is on the stream, when the stream is free.

**Arrows**, all on one rank, in its order (these kinds may occur several times):

    F, B, I, R of stage s      need the latest UNSHARD of each block of s that stands before them
    W                          needs no parameters: the input and the output's gradient are kept
    sREDUCE_GRADb              needs the latest B or W of stage s before it
    OPT                        needs every REDUCE_GRAD and every B or W of the rank

**Complete**: where a block of a stage is ever unsharded, each F, B, I and R of the stage has it unsharded: an UNSHARD
stands before it with no RESHARD between; the latest REDUCE_GRAD of each block stands behind the last B or W.
"""
