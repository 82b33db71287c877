"""Attention over a sequence that is cut over the ranks of cp: one file per idea.

merge        two partial results of a softmax become one
sight        who sees whom, by position in the whole row
blockwise    attention of some queries to some keys, block by block, with its own gradient
rectangles   a block as squares and triangles that kernels without masks take
flash, flex  the same through fused kernels, and through FlexAttention
backends     which of these a plan gets on which device
pieces       a rank's queries against somebody's keys, range by range
ring, token_ring, all_gather      what circulates between ranks that hold different tokens
alone        nothing circulates: one rank has whole rows
ulysses      tokens against heads: all-to-all
states       linear layers: what states travel instead of tokens
switch       several sequence dims: the cut moves from one to another
results      what a recomputed block needn't compute again
opening      all of it behind the models' ``attend``
groups       the same for documents that each have ranks of their own
"""
