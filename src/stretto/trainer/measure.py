"""Measuring what one process does with one thread: products, attention, the rest of a block, loss, update, the runtime.

Each figure is the median of a few calls after one that isn't counted, in processor time of the thread: on a quiet
machine that is the time that passes, and neighbours disturb it least.  The rest of a block is a whole block of the
model without its products and attention as just measured; what the runtime adds is a step of a tiny model without its
parts.  Everything runs in this process, on the CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from stretto.models.build import build_model
from stretto.models.loss import cross_entropy_sum
from stretto.parallel.pipeline.virtual import wake_on_time
from stretto.planner.machine import Curve, Machine
from stretto.planner.measured_step import attention_seconds, elements_of, head, layer, product_seconds
from stretto.planner.own_stack import own_stack
from stretto.planner.workload import Workload
from stretto.spec.cluster import ClusterSpec
from stretto.spec.contract import Batch, Place
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.processor import processor_name, usable_cores
from stretto.trainer.session import Session

SIDES = (32, 128, 512, 2048)
"""Sizes of products."""
ATTENTION = ((1, 32, 32), (4, 64, 32), (8, 128, 32), (8, 256, 32), (16, 256, 64), (16, 512, 64))
"""Heads, tokens, size of a head."""
BLOCKS = ((32, 64), (64, 128), (128, 256), (128, 1024), (256, 1024))
"""Width and tokens."""
LOGITS = ((32, 260), (256, 260), (512, 1024), (1024, 4096))
"""Tokens and vocabulary."""
PARAMETERS = (10_000, 100_000, 1_000_000, 8_000_000)
COPIES = (65_536, 1_048_576, 16_777_216, 67_108_864)
"""Bytes."""
ENOUGH_SECONDS = 0.04
"""How long a figure is measured at least."""
LEAST_FRACTION = 0.05
"""Of a measured block, the least that is left for what is neither product nor attention."""


def median_seconds(
    call: Callable[[], object],
    *,
    enough: float = ENOUGH_SECONDS,
    least: int = 5,
    clock: Callable[[], float] = time.thread_time,
) -> float:
    """Median time of ``call``, after one call that isn't counted; ``enough`` seconds and ``least`` calls at least."""
    call()
    found: list[float] = []
    while len(found) < least or sum(found) < enough:
        start = clock()
        call()
        found.append(clock() - start)
        if sum(found) > 10 * enough and len(found) >= 3:  # large: three say enough
            break
    return statistics.median(found)


def measure_process() -> dict[str, Any]:
    """Every field of Machine that one process can tell."""
    torch.manual_seed(0)
    known: dict[str, Any] = {
        "processor": processor_name(),
        "cores": usable_cores(),
        "sides": SIDES,
        "products": tuple(_product(m, n, k) for m in SIDES for n in SIDES for k in SIDES),
        **_attention(),
        **_loss(),
        "optimizer": _curve(PARAMETERS, _update),
        "copy": _curve(COPIES, _copy),
        "sleep_seconds": _sleep(),
        "spread": _spread(),
    }
    known |= _blocks(_partly(known))
    return known | _runtime(_partly(known))


def _product(m: int, n: int, k: int) -> float:
    x, weight = torch.randn(m, k), torch.randn(n, k)
    enough = ENOUGH_SECONDS if m * n * k > 2**24 else ENOUGH_SECONDS / 8
    return median_seconds(lambda: F.linear(x, weight), enough=enough)


def _attention() -> dict[str, Curve]:
    forward, backward = [], []
    for heads, length, size in ATTENTION:
        q, k, v = (torch.randn(1, heads, length, size, requires_grad=True) for _ in range(3))
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        attend = partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask)
        there, back = _both(attend, [q, k, v], torch.randn(1, heads, length, size))
        forward.append((float(heads * length**2 * size), there))
        backward.append((float(heads * length**2 * size), back))
    return {"attention_forward": Curve(points=tuple(forward)), "attention_backward": Curve(points=tuple(backward))}


def _loss() -> dict[str, Curve]:
    forward, backward = [], []
    for tokens, vocabulary in LOGITS:
        logits, labels = torch.randn(tokens, vocabulary, requires_grad=True), torch.zeros(tokens, dtype=torch.int64)
        there, back = _both(partial(cross_entropy_sum, logits, labels), [logits], torch.ones(()))
        forward.append((float(tokens * vocabulary), there))
        backward.append((float(tokens * vocabulary), back))
    return {"loss_forward": Curve(points=tuple(forward)), "loss_backward": Curve(points=tuple(backward))}


def _both(forward: Callable[[], Any], leaves: Sequence[Any], dy: Any) -> tuple[float, float]:
    """Seconds of a forward, and of its backward by what both take together."""
    there = median_seconds(forward)
    both = median_seconds(lambda: torch.autograd.grad(forward(), leaves, dy))
    return there, max(both - there, LEAST_FRACTION * both)


def _update(parameters: int) -> float:
    """Norm, clipping and AdamW over ten tensors."""
    tensors = [torch.randn(parameters // 10) for _ in range(10)]
    for tensor in tensors:
        tensor.grad = torch.randn_like(tensor)
    optimizer = torch.optim.AdamW(tensors, fused=True)

    def update() -> None:
        for tensor in tensors:
            assert tensor.grad is not None
            torch.linalg.vector_norm(tensor.grad)
            tensor.grad.mul_(0.999)
        optimizer.step()

    return median_seconds(update)


def _copy(num_bytes: int) -> float:
    source = torch.zeros(num_bytes // 8)  # as many bytes are read as written
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source))


def _sleep() -> float:
    wake_on_time()
    asked = 0.002
    return max(1e-6, median_seconds(lambda: time.sleep(asked), least=9, clock=time.perf_counter) - asked)


def _spread() -> float:
    """Relative spread of a few medians of one and the same product."""
    found = [_product(128, 512, 512) for _ in range(7)]
    return statistics.pstdev(found) / statistics.fmean(found)


def _curve(sizes: Sequence[int], measure: Callable[[int], float]) -> Curve:
    return Curve(points=tuple((float(size), measure(size)) for size in sizes))


def _partly(known: dict[str, Any]) -> Machine:
    """A machine of what is known so far; the rest takes no time."""
    nothing = Curve(points=((1.0, 1e-12), (1e30, 1e-12)))
    rest = {"rest_forward": nothing, "rest_backward": nothing, "messages": nothing}
    zeros: dict[str, Any] = {"operation_seconds": 0.0, "step_seconds": 0.0, "collectives": (), "contention": ()}
    return Machine(**{**rest, **zeros, **known})


def _blocks(machine: Machine) -> dict[str, Curve]:
    """What blocks take beyond products and attention."""
    forward, backward = [], []
    for width, tokens in BLOCKS:
        work = _work(width, tokens)
        there, back = _block(work)
        products, attention = product_seconds(work, machine), attention_seconds(work, machine)
        elements = elements_of(work)
        forward.append((elements, max(there - products[0] - attention[0], LEAST_FRACTION * there)))
        inside = products[1] + products[2] + attention[1]
        backward.append((elements, max(back - inside, LEAST_FRACTION * back)))
    return {"rest_forward": Curve(points=tuple(forward)), "rest_backward": Curve(points=tuple(backward))}


def _model(width: int, layers: int) -> ModelSpec:
    heads = max(1, width // 32)
    return ModelSpec(
        hidden_size=width, intermediate_size=11 * width // 4, num_layers=layers, num_heads=heads,
        num_kv_heads=max(1, heads // 2),
    )  # fmt: skip


def _work(width: int, tokens: int, *, layers: int = 1, microbatches: int = 1) -> Workload:
    length = min(tokens, 256)
    rows = tokens // length
    return Workload(
        model=_model(width, layers), plan=PlanSpec(micro_batch_size=rows), cluster=ClusterSpec(),
        sequence_length=length, global_batch_size=rows * microbatches, stack=own_stack(TrainingSpec(dtype="float32")),
    )  # fmt: skip


def packed_batch(rows: int, length: int) -> Batch:
    """Two documents in a row, as packing makes them."""
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    documents = (torch.arange(length) >= length // 2).long().expand(rows, length)
    positions = torch.arange(length).remainder(length // 2).expand(rows, length)
    samples = torch.arange(rows)
    return Batch(tokens=tokens, labels=tokens, positions=positions, documents=documents, samples=samples)


def _block(work: Workload) -> tuple[float, float]:
    """Seconds of a whole block, forward and backward."""
    stack: Any = build_model(work.model)
    rows = work.plan.micro_batch_size
    context = stack.context(packed_batch(rows, work.sequence_length), Place())
    block = stack.blocks[0]
    x = torch.randn(rows, work.sequence_length, work.model.hidden_size, requires_grad=True)
    return _both(lambda: block(x, context), [x, *block.parameters()], torch.randn_like(x))


def _runtime(machine: Machine) -> dict[str, float]:
    """What the runtime adds to an operation, and to a step, by steps of 2 and of 8 micro-batches of a tiny model."""
    work = _work(64, 64, layers=2)
    few, many = 2, 8
    short, long = _steps(work, few), _steps(work, many)
    one, last = layer(work, machine), head(work, machine)
    inside = 2 * (one.forward + one.inputs + one.weights) + sum(last)
    per_microbatch = max(0.0, (long - short) / (many - few))
    operation = max((per_microbatch - inside) / 2, LEAST_FRACTION * per_microbatch / 2)
    parameters = work.largest_share
    fixed = short - few * per_microbatch - machine.optimizer.at(parameters)
    return {"operation_seconds": operation, "step_seconds": max(fixed, 1e-5)}


def _steps(work: Workload, microbatches: int) -> float:
    """Median time of a step of one rank."""
    training = TrainingSpec(global_batch_size=microbatches, sequence_length=work.sequence_length)
    run = replace(RunSpec(), model=work.model, training=training)
    session = Session.start(run, 0)
    batches = [packed_batch(1, work.sequence_length)] * microbatches
    steps = iter(range(1, 10_000))
    return median_seconds(lambda: session.train_step(next(steps), batches), enough=4 * ENOUGH_SECONDS)
