"""The training config: the keys that published P2L configs use where they mean the same, and this project's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from p2l_engine.catalog import UniqueKeys
from p2l_engine.feedback import feedback_model


class Lora(BaseModel):
    """A LoRA adapter on every linear layer of the decoder's blocks from ``first_layer`` up."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    r: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[int, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    first_layer: Annotated[int, Field(ge=0)] = 0


class TrainConfig(BaseModel):
    """One training run. ``load`` reads it from YAML; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # as in published configs
    proj_name: Annotated[str, Field(pattern=r"^[^/\\.][^/\\]*$")]  # the name of the checkpoint's folder
    pretrain_model_name: str
    train_data_path: str | list[str]  # a file, folder or hub data set; or several, read as one
    val_data_path: str | None = None
    output_dir: str = "runs"
    learning_rate: Annotated[float, Field(gt=0)]
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    batch_size: Annotated[int, Field(gt=0)] = 16  # prompts for each process and pass, each with all of its votes
    gradient_accumulation_steps: Annotated[int, Field(gt=0)] = 1
    num_train_epochs: Annotated[float, Field(gt=0)] = 1
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_length: Annotated[int, Field(gt=1)] = 8192  # tokens, truncated from the left
    chat_template: str | None = None
    cls_token_if_none: str = "<|cls|>"
    pad_token_if_none: str = "<|pad|>"
    head_type: Literal["bt", "rk"]
    loss_type: Literal["bt", "bt-tie", "rk", "rk-reparam", "grk", "bag", "ols", "poisson"]
    linear_head_downsize_factor: Annotated[float, Field(gt=0)] | None = None
    head_config: dict[str, Any] = {}
    train_head_only: bool = False
    # this project's own
    license: str | None = None  # of the weights, and what readers of the model card should know
    description: str | None = None
    lora: Lora | None = None
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the prompts' tokens, against learning few prompts by heart
    head_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the hidden state that the head reads
    shuffle: bool = True  # false: prompts in the order of the data, as the paper trained
    dtype: Literal["bfloat16", "float32"] | None = None  # of the products; what is trained stays float32
    gradient_checkpointing: bool = False
    seed: int = 42
    # data
    columns: dict[str, str] = {}  # the data's own names for prompt, model_a, winner ...
    leave_out: dict[str, list[str | int]] = {}  # values of the data's columns: rows that have them are not read
    max_dropped: Annotated[float, Field(ge=0, le=1)] = 0.01  # share of the rows that may be unusable
    islands: Literal["refuse", "leave_out", "train"] = "refuse"  # models that no chain of votes ties to most others
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the prompts kept from training, when there is no val data
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the others that choices are made on, not trained on either
    split_by: Literal["prompt", "time"] = "prompt"  # time: the prompts whose first votes came last are held out
    split_seed: int = 0
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the prompts that are left to train on, for learning curves
    # the run
    save_steps: Annotated[int, Field(gt=0)] | None = None  # optimiser steps between states to resume from; None: each epoch
    report_to: list[Literal["tensorboard", "wandb"]] = []  # tensorboard: in output_dir/proj_name.logs
    deepspeed: str | dict[str, Any] | None = None  # as transformers' TrainingArguments
    fsdp: bool = False
    fsdp_config: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if feedback_model(self.loss_type).has_eta != (self.head_type == "rk"):
            raise ValueError(
                f"head_type: expected {'bt' if self.head_type == 'rk' else 'rk'!r} for loss_type {self.loss_type!r}"
            )
        if set(self.head_config) - {"eta_downsize"}:
            raise ValueError(f"head_config: expected only 'eta_downsize', got {sorted(self.head_config)}")
        if self.val_data_path and (self.held_out or self.validation):
            raise ValueError("held_out, validation: expected 0 where val_data_path is given")
        if self.val_data_path and self.train_share < 1:
            raise ValueError("train_share: expected 1 where val_data_path is given; cut the training file instead")
        if self.deepspeed and self.fsdp:
            raise ValueError("deepspeed, fsdp: expected at most one of them")
        if self.lora and self.train_head_only:
            raise ValueError("train_head_only: expected false where lora is given")
        return self

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Reads YAML. Raises ValueError with a line for every key that is unknown, missing or of a wrong value."""
        try:
            values = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeys)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: expected YAML: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a mapping of keys to values, got {type(values).__name__}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}, got {e['input']!r:.80}" for e in error.errors()]
            raise ValueError(f"{path}: " + "; ".join(lines)) from None
