"""Training configs of lmarena/p2l: the keys that mean something are read, the others named; and what they say is done."""

from __future__ import annotations

import json
import math

import hypothesis
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from p2l_engine.errors import CheckpointError
from p2l_engine.train import data
from p2l_engine.train import run as runs
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.model import CoefficientHead, build
from tests.support.cases import slow_but
from tests.support.training import settings, write_votes

# As in their training_configs/, by key; the heads go with the losses.
COMMON = {
    "proj_name": "Qwen2.5-1.5B-Instruct-full-train",
    "learning_rate": 8.0e-6,
    "num_train_epochs": 1,
    "output_dir": "training_outputs",
    "pretrain_model_name": "Qwen/Qwen2.5-1.5B-Instruct",
    "chat_template": "{{ messages[0].content }}",
    "weighted_loss": False,
    "deepspeed_config_path": "deepspeed/zero1.json",
}
LOSSES = [("bt", "bt"), ("bt_tie", "bt"), ("bt-tie", "bt"), ("rk", "rk"), ("bag", "rk")]
published = st.fixed_dictionaries(
    {
        "batch_size": st.sampled_from([1, 2, 4, 5]),
        "max_length": st.sampled_from([4096, 8192, 16384]),
        "gradient_accumulation_steps": st.sampled_from([13, 16, 64, 256]),
        "model_type": st.sampled_from(["llama", "qwen2"]),
    },
    optional={
        "adam_epsilon": st.sampled_from([1e-8, 7.071068e-9]),
        "init_type": st.sampled_from(["reset_params", "he_unif", "xavier_unif", "tiny_normal"]),
        "load_train_data_from_disk": st.booleans(),
        "load_val_data_from_disk": st.booleans(),
        "val_data_path": st.just("p2el/canonical_bt_val_data_11092024"),
        "cls_token_if_none": st.just("<|reserved_special_token_3|>"),
        "pad_token_if_none": st.just("<|finetune_right_pad_id|>"),
        "train_head_only": st.booleans(),
        "reweight_scale": st.none(),
    },
)


@hypothesis.settings(max_examples=25)
@given(values=published, loss=st.sampled_from(LOSSES), path=st.sampled_from(["train_data_path", "data_path"]))
def test_published_configs_are_read(values, loss, path, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(COMMON | values | {"loss_type": loss[0], "head_type": loss[1], path: "full-p2l-data"}))
    config = TrainConfig.load(file)
    assert config.train_data_path == "full-p2l-data"
    assert config.deepspeed == "deepspeed/zero1.json"
    assert config.loss_type == loss[0].replace("_", "-")
    assert not config.weighted_loss
    same = set(values) - {"reweight_scale"}
    assert {key: getattr(config, key) for key in same} == {key: values[key] for key in same}
    again = TrainConfig.model_validate(config.model_dump(mode="json"))  # as training_config.json keeps it
    assert again == config.model_copy(update={"model_type": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reweight_scale": 2.0}, "reweight_scale: has no meaning here, leave it out: a step is the weighted mean"),
        ({"repo_id": "me/mine"}, "repo_id: has no meaning here, leave it out: nothing is uploaded"),
        ({"deepspeed": "a.json", "deepspeed_config_path": "b.json"}, "deepspeed_config_path, deepspeed: expected one of them"),
        ({"data_path": "votes.parquet"}, "data_path, train_data_path: expected one of them, got both"),
        ({"init_type": "ones"}, "init_type: Input should be 'zeros', 'reset_params', 'he_unif'"),
        ({"loss_type": "ba"}, "feedback model: expected one of bt, "),
        ({"learning_rates": 1.0}, "learning_rates: Extra inputs are not permitted"),
    ],
)
def test_other_keys_are_named(change, message, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings(tmp_path).model_dump(exclude_none=True) | change))
    with pytest.raises(ValueError, match=message):
        TrainConfig.load(file)


def test_deepspeed_is_named_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="deepspeed .*: the package is not installed: pip install deepspeed, or leave the key"):
        runs.train(settings(tmp_path, deepspeed="deepspeed/zero1.json"))


def test_the_type_of_the_backbone_is_checked(tmp_path):
    config = settings(tmp_path, model_type="qwen2")
    with pytest.raises(ValueError, match="model_type: expected 'llama', which .*base is, or no such key, got 'qwen2'"):
        build(config, 3)
    build(config.model_copy(update={"model_type": "llama"}), 3)


BOUNDS = {
    "reset_params": lambda inputs, outputs: 1 / math.sqrt(inputs),
    "he_unif": lambda inputs, outputs: math.sqrt(3 / inputs),
    "xavier_unif": lambda inputs, outputs: math.sqrt(6 / (inputs + outputs)),
}


@pytest.mark.parametrize("factor", [None, 2.0])
@pytest.mark.parametrize("name", [*BOUNDS, "tiny_normal", "zeros"])
def test_the_head_starts_as_its_config_says(name, factor, tmp_path):
    config = settings(tmp_path, init_type=name, linear_head_downsize_factor=factor)
    head = CoefficientHead(640, 400, config)
    layers = [module for module in head.modules() if isinstance(module, torch.nn.Linear)]
    assert all(not layer.bias.any() for layer in layers)
    for layer in layers:
        outputs, inputs = layer.weight.shape
        if name in BOUNDS:  # uniform
            assert layer.weight.abs().max().item() == pytest.approx(BOUNDS[name](inputs, outputs), rel=0.02)
            assert layer.weight.std().item() == pytest.approx(BOUNDS[name](inputs, outputs) / math.sqrt(3), rel=0.1)
        elif name == "tiny_normal":
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / inputs), rel=0.1)
    if name == "zeros":
        assert not head(torch.randn(3, 640))[0].any()


def test_weights_of_votes_count_as_the_config_says(tmp_path):
    import pyarrow.parquet as pq

    config = settings(tmp_path, held_out=0)
    votes = pq.read_table(config.train_data_path)
    pq.write_table(votes.append_column("weight", [[2.5] * len(votes)]), config.train_data_path)
    assert set(data.load(config).training.weight) == {2.5}
    assert set(data.load(config.model_copy(update={"weighted_loss": False})).training.weight) == {1.0}


def test_data_that_must_be_on_disk_are_not_looked_for_on_the_hub(tmp_path):
    config = settings(tmp_path, train_data_path="owner/votes", load_train_data_from_disk=True)
    with pytest.raises(ValueError, match="load_train_data_from_disk: expected a folder, found none at owner/votes"):
        data.load(config)
    write_votes(tmp_path / "votes.parquet", [("p", "x", "y", "model_a")])
    val = {"val_data_path": "owner/val", "load_val_data_from_disk": True, "held_out": 0.0}
    config = settings(tmp_path, **val)
    with pytest.raises(ValueError, match="load_val_data_from_disk: expected a folder, found none at owner/val"):
        data.load(config)


LAYER = "layers.1.self_attn.q_proj.weight"


def without(part):
    return lambda tensors: {name: weight for name, weight in tensors.items() if part not in name}


BROKEN = {
    "a weight": (without(LAYER), r"found no (model\.)?layers.1.self_attn.q_proj.weight \(1"),
    "a layer": (without(".layers.1."), r"found no .*layers.1.* \(9 such\)"),
    "the last layer": (without(".layers.2."), r"\(9 such\)"),
    "the embedding": (without("embed"), "found no .*embed_tokens.weight"),
    "everything": (without("model."), "found no "),
    "a shape": (
        lambda tensors: tensors | {f"model.{LAYER}": torch.zeros(48, 47)},
        r"q_proj.weight of shape \[48, 47\] instead of \[48, 48\]",
    ),
    "one layer more": (
        lambda tensors: tensors | {"model.layers.3.mlp.up_proj.weight": torch.zeros(80, 48)},
        "layers.3.*, which it does not know",
    ),
}


@pytest.mark.parametrize("lora", [None, {"r": 2}])
@pytest.mark.parametrize("name", BROKEN)
def test_a_backbone_whose_weights_are_not_its_configs_is_refused(name, lora, tmp_path):
    config, (change, message) = settings(tmp_path, lora=lora), BROKEN[name]
    file = tmp_path / "base" / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"base: expected the weights that config.json describes, .*{message}"):
        build(config, 3)


@pytest.mark.slow
@hypothesis.settings(max_examples=25)
@given(drawn=st.data())
def test_any_weight_that_is_missing_is_named(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    config = settings(folder)
    file = folder / "base" / "model.safetensors"
    tensors = load_file(file)
    names = sorted(name for name in tensors if not name.startswith("head."))
    lost = drawn.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    save_file({name: weight for name, weight in tensors.items() if name not in lost}, file, {"format": "pt"})
    with pytest.raises(CheckpointError) as refused:
        build(config, 3)
    assert all(name.removeprefix("model.") in str(refused.value) for name in lost)


def test_heads_of_a_backbone_are_left_out(tmp_path):
    config = settings(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(300, 48)}, file, {"format": "pt"})
    build(config, 3)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="transformers cannot load the backbone"):
        build(config, 3)


@pytest.mark.parametrize("method", slow_but(["gptq"], ["gptq", "awq", "of tomorrow"]))
def test_a_quantised_backbone_is_refused_without_its_package(method, tmp_path):
    config, file = settings(tmp_path), tmp_path / "base" / "config.json"
    quantised = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantised}))
    with pytest.raises(CheckpointError):
        build(config, 3)


def test_a_model_of_several_parts_is_refused(tmp_path):
    config = settings(tmp_path)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gemma3"}')
    with pytest.raises(CheckpointError, match="expected one decoder of text, found the model of several parts 'gemma3'"):
        build(config, 3)
