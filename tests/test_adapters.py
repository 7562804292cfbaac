"""LoRA adapters: merged exactly as peft merges them, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from p2l_engine import Engine, checkpoint
from p2l_engine.errors import CheckpointError
from tests.support import tiny
from tests.support.cases import slow_but

Q = "base_model.model.model.layers.1.self_attn.q_proj"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def theta(folder):
    return Engine.from_pretrained(folder, device="cpu", dtype=torch.float32).coefficients(["hello", "you"]).theta


def adapter(folder, base, rank=4, **changes):
    """A LoRA adapter on layer 1 of ``base`` in peft's file format; returns the merged weights."""
    folder.mkdir()
    whole = load_file(base / "model.safetensors")
    tensors, merged = {}, dict(whole)
    for name, weight in whole.items():
        if name.endswith("_proj.weight") and ".1." in name:
            down, up = torch.randn(rank, weight.shape[1]) * 0.1, torch.randn(weight.shape[0], rank) * 0.1
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
            merged[name] = weight + 2.0 * up @ down
        elif name.startswith("head."):
            tensors[f"base_model.model.{name}"] = weight
    write(folder, base, tensors, {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank} | changes)
    return merged


def write(folder, base, tensors, config):
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)} | config))
    for name in ("model_list.json", "training_config.json"):
        (folder / name).write_text((base / name).read_text())


def change_config(folder, **values):
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def change_factors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = change(load_file(file))
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)


def by_peft(base, folder, config, **saving):
    """Saves an adapter of random factors with peft, beside the base's head; returns peft's merged weights."""
    from peft import LoraConfig, get_peft_model

    body = AutoModel.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(body, LoraConfig(**config))
    if "path_initial_model_for_weight_conversion" in saving:
        model.save_pretrained(saving["path_initial_model_for_weight_conversion"])
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data += torch.randn_like(weight) * 0.1
    model.save_pretrained(folder, **saving)
    tensors = load_file(folder / "adapter_model.safetensors")
    head = {f"base_model.model.{n}": w for n, w in load_file(base / "model.safetensors").items() if n.startswith("head.")}
    kept = json.loads((folder / "adapter_config.json").read_text())
    write(folder, base, tensors | head, {k: v for k, v in kept.items() if k != "base_model_name_or_path"})
    return model.merge_and_unload().state_dict()


def assert_merged(folder, expected):
    found = checkpoint.load(folder).weights.read()
    assert set(found) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].float(), weight.float(), rtol=0, atol=2e-6, msg=name)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("base"))


def test_an_adapter_is_merged(base, tmp_path):
    merged = adapter(tmp_path / "adapter", base)
    same = tiny.write(tmp_path / "merged")
    save_file({n: t.contiguous() for n, t in merged.items()}, same / "model.safetensors")
    np.testing.assert_allclose(theta(tmp_path / "adapter"), theta(same), atol=1e-5)
    assert np.abs(theta(same) - theta(base)).max() > 1e-3


def test_an_adapter_on_no_module_is_a_head_over_the_backbone_as_it_is(base, tmp_path):
    whole = load_file(base / "model.safetensors")
    head = {f"base_model.model.{n}": w for n, w in whole.items() if n.startswith("head.")}
    (tmp_path / "adapter").mkdir()
    write(tmp_path / "adapter", base, head, {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": []})
    np.testing.assert_array_equal(theta(tmp_path / "adapter"), theta(base))
    factors = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight": torch.zeros(1, 1) for side in "AB"}
    change_factors(tmp_path / "adapter", lambda tensors: tensors | factors)
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "adapter")


settings_of_peft = st.fixed_dictionaries(
    {
        "r": st.integers(1, 6),
        "lora_alpha": st.integers(1, 40),
        "target_modules": st.one_of(
            st.lists(st.sampled_from(PROJECTIONS), min_size=1, unique=True),
            st.sampled_from(["all-linear", r".*layers\.[02]\..*_proj", r"(.*\.)?layers\.1\.mlp\.(up|down)_proj"]),
        ),
        "init_lora_weights": st.sampled_from([True, False, "gaussian", "orthogonal"]),
        "use_rslora": st.booleans(),
        "lora_dropout": st.sampled_from([0.0, 0.3]),
    },
    optional={
        "rank_pattern": st.dictionaries(
            st.sampled_from(["q_proj", "mlp.up_proj", "1.mlp.down_proj", "k.proj", "mlp.gate.proj"]), st.integers(1, 5)
        ),
        "alpha_pattern": st.dictionaries(
            st.sampled_from(["o_proj", "self_attn.v_proj", "0.mlp.up_proj", "q.proj", "1..lp.gate_proj"]), st.integers(1, 9)
        ),
        "exclude_modules": st.sampled_from([["k_proj"], ["layers.1.mlp.up_proj"], r".*layers\.2\.self_attn.*"]),
    },
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=25)
@given(values=settings_of_peft)
def test_what_peft_saves_is_merged_as_peft_does(values, base, tmp_path_factory):
    values = dict(values)
    if values["init_lora_weights"] == "orthogonal":  # needs even ranks
        values = {k: v for k, v in values.items() if k != "rank_pattern"} | {"r": 4}
    folder = tmp_path_factory.mktemp("adapter")
    assert_merged(folder, by_peft(base, folder, values))


@pytest.mark.slow
def test_dots_of_patterns_stand_for_any_character_as_in_peft(base, tmp_path):
    config = {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"],
        "alpha_pattern": {"q.proj": 1}, "rank_pattern": {"mlp.u._proj": 2},
    }  # fmt: skip
    assert_merged(tmp_path / "adapter", by_peft(base, tmp_path / "adapter", config))


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(("olora",), ["pissa", "pissa_niter_4", "olora"]))
def test_adapters_that_changed_their_backbone_are_refused_and_converted_ones_merged(name, base, tmp_path):
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    by_peft(base, tmp_path / "raw", config | {"init_lora_weights": name})
    with pytest.raises(
        CheckpointError, match=f"init_lora_weights: expected one of .*found '{name}': not supported; it changed"
    ):
        checkpoint.load(tmp_path / "raw")
    start = str(tmp_path / "start")
    expected = by_peft(
        base, tmp_path / "plain", config | {"init_lora_weights": name}, path_initial_model_for_weight_conversion=start
    )
    found = checkpoint.load(tmp_path / "plain").weights.read()
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-5, msg=key)


ACTIVE = {
    "peft_type": "LOHA", "bias": "all", "use_dora": True, "fan_in_fan_out": True, "lora_bias": True, "use_qalora": True,
    "init_lora_weights": "loftq", "modules_to_save": ["embed_tokens"], "trainable_token_indices": [1], "revision": "v2",
    "alora_invocation_tokens": [1, 2], "layer_replication": [[0, 2], [1, 3]], "target_parameters": ["experts.up"],
    "megatron_config": {"tensor": 2}, "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 1}, "kasa_config": {"beta": 1},
    "velora_config": {"rank": 1}, "monteclora_config": {"samples": 1}, "an_option_of_tomorrow": 0.5, "another": "on",
}  # fmt: skip


@pytest.mark.parametrize("key", ACTIVE)
def test_options_that_are_not_known_to_be_exact_are_refused_by_name(key, base, tmp_path):
    adapter(tmp_path / "adapter", base, **{key: ACTIVE[key]})
    with pytest.raises(CheckpointError, match=f"adapter_config.json: {key}: expected .*: not supported"):
        checkpoint.load(tmp_path / "adapter")


def test_initial_weights_that_changed_the_backbone_are_refused(base, tmp_path):
    for i, name in enumerate(["pissa_niter_16", "corda", "loftq", "lora_ga", "mica", "unheard of"]):
        adapter(tmp_path / f"{i}", base, init_lora_weights=name)
        with pytest.raises(CheckpointError, match="init_lora_weights: expected one of"):
            checkpoint.load(tmp_path / f"{i}")


def test_options_that_are_off_are_accepted(base, tmp_path):
    off = {key: off for key, off in zip(ACTIVE, [None, False, [], {}] * 9, strict=False) if key not in ("peft_type", "bias")}
    off |= {"init_lora_weights": False, "modules_to_save": ["head"], "revision": "main"}
    merged = adapter(tmp_path / "adapter", base, **off)
    assert_merged(tmp_path / "adapter", {n.removeprefix("model."): w for n, w in merged.items() if n.startswith("model.")})


@pytest.mark.slow
@settings(max_examples=20)
@given(data=st.data())
def test_lost_factors_are_refused(data, base, tmp_path_factory):
    """Also empty ones, which a sharded model that was not gathered leaves; any of them, and all."""
    folder = tmp_path_factory.mktemp("lost") / "adapter"
    adapter(folder, base, target_modules=list(PROJECTIONS), layers_to_transform=[1])
    names = [name for name in load_file(folder / "adapter_model.safetensors") if ".lora_" in name]
    lost = data.draw(st.one_of(st.just(names), st.lists(st.sampled_from(names), min_size=1, unique=True)))
    empty = data.draw(st.sampled_from([None, torch.zeros(0), torch.zeros(0, 4)]))
    change_factors(
        folder,
        lambda tensors: {n: t if n not in lost else empty for n, t in tensors.items() if n not in lost or empty is not None},
    )
    with pytest.raises(CheckpointError, match="factors|found no lora_[AB] for it"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, "gate_proj|down_proj.* but target_modules leaves it out"),
        ({"target_modules": list(PROJECTIONS)}, r"found none for layers.0.* \(14 such\)"),
        ({"target_modules": list(PROJECTIONS), "layers_to_transform": 2}, r"found none for layers.2.* \(7 such\)"),
        ({"target_modules": ["c_attn"]}, r"target_modules: expected some of the backbone's, found \['c_attn'\]"),
        ({"target_modules": "("}, "target_modules: expected a regular expression"),
        ({"target_modules": 5}, "target_modules: expected a list of names"),
        ({"rank_pattern": {"^layers": 2}}, "rank_pattern: expected names of modules, found the pattern"),
        ({"rank_pattern": {"q_proj": "4"}}, "q_proj: expected a int, found '4'"),
        ({"alpha_pattern": {"q_proj": 1, "self_attn.q_proj": 2}}, "expected one value for .*q_proj, found several"),
        ({"lora_alpha": float("inf")}, "lora_alpha: expected a number, found inf"),
        ({"use_rslora": "yes"}, "use_rslora: expected true or false, found 'yes'"),
    ],
)
def test_settings_that_do_not_fit_the_factors_are_named(change, message, base, tmp_path):
    adapter(tmp_path / "adapter", base, **change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "adapter")


def test_factors_of_something_else_are_named(base, tmp_path):
    for i, (key, shape) in enumerate(
        {"model.embed_tokens.lora_embedding_A": (4, 8), "head.head.lora_A.weight": (4, 48)}.items()
    ):
        adapter(tmp_path / f"{i}", base)
        change_factors(tmp_path / f"{i}", lambda tensors, key=key, shape=shape: tensors | {PREFIX + key: torch.zeros(shape)})
        with pytest.raises(CheckpointError, match=key):
            checkpoint.load(tmp_path / f"{i}")
    adapter(tmp_path / "twice", base)
    change_factors(
        tmp_path / "twice",
        lambda tensors: tensors | {f"{Q.replace('.model.model.', '.model.')}.lora_A.weight": torch.zeros(4, 48)},
    )
    with pytest.raises(CheckpointError, match="expected it once"):
        checkpoint.load(tmp_path / "twice")


PREFIX = "base_model.model."


def test_a_relative_base_starts_at_the_adapter(tmp_path, monkeypatch):
    tiny.write(tmp_path / "models" / "base")
    merged = adapter(tmp_path / "models" / "adapter", tmp_path / "models" / "base")
    change_config(tmp_path / "models" / "adapter", base_model_name_or_path="../base")
    (tmp_path / "elsewhere").mkdir()
    for place in (".", "models", "elsewhere"):
        monkeypatch.chdir(tmp_path / place)
        loaded = checkpoint.load(Path(tmp_path / "models" / "adapter"))
        torch.testing.assert_close(
            loaded.weights.read()["layers.1.mlp.up_proj.weight"], merged["model.layers.1.mlp.up_proj.weight"], rtol=0, atol=1e-6
        )
    monkeypatch.chdir(tmp_path)
    change_config(tmp_path / "models" / "adapter", base_model_name_or_path="models/base")  # else where the process runs
    checkpoint.load("models/adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora: expected it to be off, found True"),
        ({"base_model_name_or_path": "./nowhere"}, "expected a folder, a hub name"),
        ({"r": 5}, "of rank 5"),
        ({"r": None}, "r: expected a int, found None"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path: expected a str, found None"),
    ],
)
def test_a_broken_adapter_is_named(change, message, base, tmp_path):
    adapter(tmp_path / "adapter", base)
    change_config(tmp_path / "adapter", **change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "adapter")


def test_an_adapter_for_another_shape_is_named(base, tmp_path):
    adapter(tmp_path / "adapter", base)
    change_factors(tmp_path / "adapter", lambda tensors: tensors | {f"{Q}.lora_A.weight": torch.zeros(4, 47)})
    with pytest.raises(CheckpointError, match=r"lora_A.weight: expected factors of \[48, 48\]"):
        checkpoint.load(tmp_path / "adapter")
