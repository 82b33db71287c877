"""What layers a model can have, and what of linear ones can't work."""

from __future__ import annotations

from typing import Any

import pytest

from stretto.models.hugging_face import hugging_face_tensors
from stretto.spec.check import check
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.model import ModelSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec

BAD: list[tuple[dict[str, Any], str]] = [
    ({"attention": ("softmax", "liner")}, "model.attention[1] = 'liner' is none of 'softmax', 'linear', 'delta'"),
    ({"attention": ()}, "model.attention is empty; write a kind of layer"),
    ({"attention": ("delta",), "qk_norm": True}, "model.qk_norm is read by softmax layers only"),
    ({"attention": ("linear",), "sliding_window": 8}, "model.sliding_window is read by softmax layers only"),
    ({"attention": ("linear",), "family": "foreign", "module": "a:b"}, "has no meaning in a foreign model"),
]


def run_of(**model: Any) -> RunSpec:
    return RunSpec(model=ModelSpec(**model), training=TrainingSpec(sequence_length=32))


@pytest.mark.parametrize(("model", "message"), BAD)
def test_what_cannot_be_a_layer_is_said(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        check(run_of(**model), data=False)
    assert message in str(found.value)


def test_a_pattern_goes_over_the_layers() -> None:
    hybrid = ModelSpec(num_layers=5, attention=("linear", "delta", "softmax"), sliding_window=8)
    check(RunSpec(model=hybrid, training=TrainingSpec(sequence_length=32)), data=False)
    assert [hybrid.attention_of(i) for i in range(5)] == ["linear", "delta", "softmax", "linear", "delta"]
    assert hybrid.keeps_states and not ModelSpec().keeps_states


def test_the_format_that_has_no_such_layers_is_refused() -> None:
    run = run_of(attention=("linear", "softmax"))
    with pytest.raises(UnsupportedError, match="Hugging Face has no model with these"):
        hugging_face_tensors(run.model)
