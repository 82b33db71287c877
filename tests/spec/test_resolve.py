"""Presets lie beneath what the user wrote, overrides on top."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stretto.spec import toml
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.model import ModelSpec, RopeScaling
from stretto.spec.presets_cluster import CLUSTERS, cluster_preset
from stretto.spec.presets_model import MODELS, model_preset
from stretto.spec.resolve import load_run, resolve_text
from stretto.spec.run import RunSpec


def test_preset_beneath_written_keys_on_top() -> None:
    model = resolve_text("[model]\nname = 'llama-3-8b'\nnum_layers = 2\ndropout = 0.1").model
    assert model == model_preset("llama-3-8b", num_layers=2, dropout=0.1)


def test_a_written_default_still_wins_over_the_preset() -> None:
    default = ModelSpec().max_positions
    assert MODELS["gpt2"].max_positions != default
    assert resolve_text(f"[model]\nname = 'gpt2'\nmax_positions = {default}").model.max_positions == default


def test_part_of_a_table_over_the_presets_table() -> None:
    model = resolve_text("[model]\nname = 'llama-3.1-8b'\nrope_scaling.factor = 16").model
    assert model.rope_scaling == RopeScaling(factor=16.0)
    assert resolve_text("[model]\nname = 'llama-3.2-1b'").model.rope_scaling == RopeScaling(factor=32.0)


def test_no_name_is_the_documented_defaults() -> None:
    assert resolve_text("[model]\nnum_layers = 3").model == ModelSpec(num_layers=3)
    assert resolve_text("") == RunSpec()


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"r\.toml: There is no model preset 'llama-3-8B'; did you mean 'llama-3-8b'"):
        resolve_text("[model]\nname = 'llama-3-8B'\nnum_layers = 2", "r.toml")


def test_a_label_for_ones_own_sizes() -> None:
    sizes = "hidden_size = 32\nnum_layers = 2\nnum_heads = 2\nvocab_size = 300"
    assert resolve_text(f"[model]\nname = 'mine'\n{sizes}").model.name == "mine"
    assert resolve_text("[model]\nname = 'mine'\nfamily = 'foreign'\nmodule = 'a:b'").model.module == "a:b"


def test_all_presets_can_be_built_and_are_consistent() -> None:
    from stretto.spec.check_values import check_model

    for name, model in MODELS.items():
        assert model.name == name
        check_model(model)


def test_resolved_file_stands_alone(tmp_path: Path) -> None:
    """What a run saves needs neither preset nor directory, even where it differs from them."""
    run = RunSpec(model=ModelSpec(name="llama-3.1-8b", path="gone/since", num_layers=1))
    assert load_run(toml.save(run, tmp_path / "run.toml")) == run
    assert load_run(tmp_path / "run.toml", ["model.num_layers=2"]).model.num_layers == 2


def test_hugging_face_directory(tmp_path: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
    config |= {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 77, "tie_word_embeddings": True}
    folder = tmp_path / "my-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = resolve_text(f"[model]\npath = '{folder}'\ndropout = 0.2").model
    assert (model.name, model.path, model.dropout) == ("my-llama", str(folder), 0.2)
    assert (model.num_layers, model.kv_heads, model.max_positions, model.tied_embeddings) == (3, 2, 77, True)
    with pytest.raises(ConfigError, match="both say what the model is"):
        resolve_text(f"[model]\nname = 'tiny'\npath = '{folder}'")


def test_directories_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model directory .*gone doesn't exist"):
        resolve_text(f"[model]\npath = '{tmp_path / 'gone'}'")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        resolve_text(f"[model]\npath = '{tmp_path}'")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        resolve_text(f"[model]\npath = '{tmp_path}'")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        resolve_text(f"[model]\npath = '{tmp_path}'")


@pytest.mark.parametrize(
    ("name", "nodes", "devices"), [("h100", 1, 8), ("h100:512", 64, 8), ("a100:4", 1, 4), ("local-cpu:96", 1, 96)]
)
def test_cluster_sizes(name: str, nodes: int, devices: int) -> None:
    cluster = resolve_text(f"[cluster]\nname = '{name}'").cluster
    assert (cluster.name, cluster.num_nodes, cluster.devices_per_node) == (name, nodes, devices)
    assert cluster.memory_bytes == CLUSTERS[name.partition(":")[0]].memory_bytes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100:12", "12 devices aren't whole nodes of 8; write h100:8 or h100:16."),
        ("h100:0", "must end in a number of devices"),
        ("h100:", "must end in a number of devices"),
        ("h10", "There is no cluster preset 'h10'; did you mean 'h100'"),
    ],
)
def test_cluster_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        cluster_preset(name)
    assert message in str(error.value)


def test_own_cluster_and_own_figures() -> None:
    assert resolve_text("[cluster]\nname = 'ours'\nmemory_bytes = 24e9").cluster.name == "ours"
    cluster = resolve_text("[cluster]\nname = 'h200:16'\nnetwork_bytes_per_second = 1e9").cluster
    assert (cluster.num_nodes, cluster.network_bytes_per_second, cluster.memory_bytes) == (2, 1e9, 141e9)


def test_overrides() -> None:
    text = "[plan]\npp = 1\n[model]\nname = 'tiny'"
    words = ["plan.pp=4", "plan.stages=[1, 1,1,1]", "run.dir=runs/a=b", "data.path=2024", "training.learning_rate=1"]
    words += ["model.name=llama-3.1-8b", "model.rope_scaling.factor=4", "data.tokenizer='bytes'"]
    words += ["plan.compile=regions"]
    run = resolve_text(text, "r.toml", words)
    assert (run.plan.pp, run.plan.stages, run.plan.compile) == (4, (1, 1, 1, 1), "regions")
    assert (run.run.dir, run.data.path, run.data.tokenizer) == ("runs/a=b", "2024", "bytes")
    assert run.model == model_preset("llama-3.1-8b", rope_scaling=RopeScaling(factor=4.0))
    assert run.training.learning_rate == 1.0
    assert resolve_text("[plan]\ncompile = true").plan.compile == "blocks"  # as it was written once


def test_overrides_of_one_table_add_up() -> None:
    words = ["model.rope_scaling.factor=4", "model.rope_scaling.original_positions=64"]
    assert resolve_text("", "r", words).model.rope_scaling == RopeScaling(factor=4.0, original_positions=64)


def test_later_override_wins() -> None:
    assert resolve_text("", "r", ["plan.tp=2", "plan.tp=4"]).plan.tp == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.pp", "--set plan.pp: write section.key=value"),
        ("=4", "write section.key=value"),
        ("pp=4", "--set: there is no section [pp]; did you mean 'plan.pp'?"),
        ("plam.pp=4", "--set: there is no section [plam]; did you mean 'plan'?"),
        ("plan.ppp=4", "--set: unknown key plan.ppp; did you mean 'plan.pp'?"),
        ("plan.pp=four", "--set: plan.pp must be a whole number, not 'four'"),
        ("plan.pp.x=4", "--set: plan.pp has no keys of its own"),
        ("model.rope_scaling.factr=4", "--set: unknown key model.rope_scaling.factr; did you mean 'factor'?"),
        ("training.dtype=float16", "did you mean"),
    ],
)
def test_overrides_that_are_none(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_text("", "r.toml", [override])
    assert message in str(error.value)


def test_auto_as_an_override() -> None:
    assert resolve_text("[plan]\nstages = [1, 1]", "r", ["plan.stages=auto"]).plan.stages is None
    for override in ("plan=auto", "plan.pp=auto"):
        with pytest.raises(UnsupportedError, match="needs the planner"):
            resolve_text("", "r", [override])


def test_a_misspelt_key_beside_auto_is_named() -> None:
    for misspelt in ("tpp = 3", 'tpp = "auto"'):
        with pytest.raises(ConfigError, match=r"unknown key plan\.tpp; did you mean 'plan\.tp'\?"):
            resolve_text(f'[plan]\npp = "auto"\n{misspelt}')
