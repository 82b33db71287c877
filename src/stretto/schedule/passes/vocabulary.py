"""Vocabulary parallelism: the output layer as passes S and T on every rank (Yeung et al. 2024, figures 4 and 10).

The last stage's output layer costs as much as several blocks where the vocabulary is large, and all ranks wait
for it.  Here it is cut along the vocabulary: rank r holds shard r, one of R, and runs ``rSm`` and ``rTm`` for each
micro-batch m (the shard stands where other operations have their stage; it is always the rank).

*S* multiplies the last stage's output with the shard, and takes the maximum and the sum of exponentials over
the shard's part of the vocabulary.  *T* uses those of the whole vocabulary, known after an all-reduce.

    algorithm 1   S: logits                       ─► all-reduce ─► T: both gradients ─► reduce ─► B of the last stage
    algorithm 2   S: logits, gradient of inputs   ─► all-reduce ─► B of the last stage
                                                               └─► T: gradient of weights, at any time

Algorithm 2 sums the gradient of the inputs over the shards with the same all-reduce that makes the softmax
whole, so that one barrier lies between the forward and the backward of the last stage instead of two.

**Arrows** (what ``dependencies`` and the simulator hold a schedule to; l is the last stage of m's path, and b the
first backward of m: its B or I on the last stage that has one):

    rSm needs lFm                             for each rank r: l's output is broadcast
    rTm needs qSm of all ranks q              both algorithms: the all-reduce
    b   needs qTm of all ranks q              where b's rank runs its own T of m before b: algorithm 1
    b   needs qSm of all ranks q              elsewhere: algorithm 2

An arrow between two ranks takes the latency of the largest boundary, one inside a rank none.  The collectives are
not part of the order, lowered or not; the arrows stand for them.  A schedule says nowhere which algorithm it
is of: the order of T and b on b's rank does, for each micro-batch.

**Complete** means: where any S or T appears, each rank r has rSm and rTm once for each micro-batch that has a
backward, rSm alone for the others, and no rank has another's shard.  All ranks run S in the same order of
micro-batches, and T likewise, because collectives must meet.

**Costs**: a scalar S or T is the time of one rank's shard, not divided by chunks; a list is indexed by the shard.
They keep no activation that counts: the shard's logits live from S to T only.
"""
