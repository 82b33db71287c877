"""What a run over clips can't be is said in a sentence before any process starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from stretto.spec.check import check
from stretto.spec.errors import StrettoError
from stretto.spec.resolve import resolve_text

TEXT = """
[model]
name = "tiny-video"
[data]
path = "waves"
"""


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"plan.cp": 4, "plan.context": "switch", "plan.dp_shard": 2, "plan.zero": 3, "plan.recompute": "full"},
        {"model.video.frames": 6, "model.video.patches": 5, "training.sequence_length": 30, "model.name": "tiny-video"},
    ],
)
def test_runs(overrides: dict[str, object]) -> None:
    check(resolve_text(TEXT, overrides=[f"{key}={value}" for key, value in overrides.items()]))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("training.sequence_length=64", "8 frames x 16 patches = 128 tokens; set training.sequence_length = 128"),
        ("plan.pp=2 plan.schedule=skip-pipe", 'plan.schedule = "skip-pipe" can\'t go with model.family'),
        ("plan.tp=2", "plan.tp = 2 can't go with model.family"),
        ("plan.cp=2", 'set plan.context = "switch"'),
        ("plan.cp=16 plan.context=switch training.global_batch_size=16", "8 frames can't be cut over cp=16"),
        ("plan.context_groups=dynamic", "can't go with"),
        ("plan.compile=regions", 'set plan.compile = "none"'),
        ("plan.recompute=selective", 'set it to "none" or "full"'),
        ("plan.passes=['vocabulary']", "The pass vocabulary can't go with"),
        ("plan.pp=2 plan.passes=['fill-bubbles'] training.freeze=['inputs.*']", "The pass fill-bubbles can't go with"),
        ("plan.inner_ring=2", "plan.inner_ring can't go with"),
        ("plan.context_keep=true", "no keys travel"),
        ("plan.attention_backend=flash", "leave it out: whole frames"),
        ("plan.asynchronous=plain training.optimizer=sgd", "plan.asynchronous"),
        ("model.dropout=0.1", "model.dropout has no meaning in family video"),
        ("model.vocab_size=5", "model.vocab_size has no meaning in family video"),
        ("model.video.frames=0", "model.video.frames = 0 must be above 0"),
        ("model.num_heads=5", "can't be divided among 5 heads"),
        ("data.packing=whole", "data.packing has no meaning for clips"),
        ("data.path=nowhere", "The clips 'nowhere' don't exist"),
        ("training.eval_every=2", "validation_fraction = 0 holds none out"),
        (
            "model.name=tiny model.video.frames=2 model.video.patches=2 model.video.channels=2",
            "is read with model.family",
        ),
        ("model.name=tiny plan.context=switch data.path=stdlib", "cuts clips, which have two dims"),
        ("model.name=mine model.family=video", "To describe a model of your own"),
    ],
)
def test_is_refused(overrides: str, told: str) -> None:
    with pytest.raises(StrettoError) as error:
        check(resolve_text(TEXT, overrides=overrides.split()))
    assert told in str(error.value), error.value


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    sizes = "hidden_size = 8\nnum_layers = 1\nnum_heads = 2\n[model.video]\nframes = 2\npatches = 3\nchannels = 5\n"
    run = resolve_text(f'[model]\nname = "mine"\nfamily = "video"\n{sizes}[training]\nsequence_length = 6\n')
    check(run, data=False)
    assert run.model.video is not None and run.model.video.tokens == 6 and run.model.num_outputs == 5
