"""The training config. Keys of published P2L configs keep their names and meanings; the others are this project's own."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from p2l_engine.feedback import feedback_model
from p2l_engine.tables.limits import MAX_DROPPED
from p2l_engine.unique_keys import UniqueKeys

# Keys of published configs with another name here.
SYNONYMS = {"deepspeed_config_path": "deepspeed", "data_path": "train_data_path"}
# Keys of published configs that mean nothing here.
WITHOUT_MEANING = {
    "reweight_scale": "a step is the weighted mean over its votes, whatever the scale of the weights",
    "repo_id": "nothing is uploaded; p2l-engine export writes the folder to upload",
}


def _iso(value: Any) -> Any:
    """YAML reads 2026-01-31 as a date; another text must be one."""
    return value if value is None else datetime.fromisoformat(str(value)).isoformat()


class LoraOptions(BaseModel):
    """LoRA adapters on all linear layers of the decoder blocks ``first_layer`` (counted from 0) and above."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    r: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[int, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    first_layer: Annotated[int, Field(ge=0)] = 0


class TopicsOptimum(BaseModel):
    """Topics beside hidden states (see ``topics``): the votes' categories, of which each has a leaderboard. deviation: of the
    prior of a topic's logit; leaderboards: of the prior of what a topic adds to a model's theta; words: whether topics are
    predicted from the prompts' words too."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    deviation: Annotated[float, Field(gt=0, le=1e6)] = 4.0
    leaderboards: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    words: bool = True


class ShrinkageOptimum(BaseModel):
    """How coefficients of prompts of new kinds fall back to one leaderboard (see ``backbone.shrinkage``): half of their
    differences are kept at this quantile of the training prompts' distances. width: of the decline, in units of their upper
    half, from the median to the 95% quantile."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    quantile: Annotated[float, Field(gt=0, lt=1)]
    width: Annotated[float, Field(gt=0, le=100)]


class HeadOptimum(BaseModel):
    """The head alone, at its greatest posterior probability (see ``optimum``). deviations: of the prior; of several the
    validation votes choose one. adapter: the folder of a checkpoint that ``lora`` has trained over the same backbone, whose
    hidden states the head reads; None: those of the backbone as it is. Kinds of prompts, for the shrinkage, are the votes'
    categories."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    deviations: Annotated[list[Annotated[float, Field(gt=0, le=1e6)]], Field(min_length=1)]
    adapter: str | None = None
    topics: TopicsOptimum | None = None
    shrinkage: ShrinkageOptimum | None = None


# What only training in steps reads.
OF_STEPS = (
    "learning_rate", "adam_epsilon", "batch_size", "gradient_accumulation_steps", "num_train_epochs", "lr_schedule",
    "init_type", "linear_head_downsize_factor", "head_config", "warmup_ratio", "weight_decay", "max_grad_norm",
    "token_dropout", "head_dropout", "shuffle", "gradient_checkpointing", "save_steps", "report_to", "deepspeed", "fsdp",
    "fsdp_config",
)  # fmt: skip


def _known_feedback(name: str) -> str:
    feedback_model(name)
    return name.replace("_", "-")


class TrainConfig(BaseModel):
    """The settings of one training run. ``load`` reads them from YAML; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # Keys of published configs.
    proj_name: Annotated[str, Field(pattern=r"^[^/\\.][^/\\]*$")]  # name of the checkpoint folder
    pretrain_model_name: str
    model_type: Annotated[str | None, Field(exclude=True)] = None  # checked against the backbone's, which the checkpoint keeps
    train_data_path: str | list[str]  # a file, folder or hub data set, or a list of them
    val_data_path: str | None = None
    load_train_data_from_disk: bool = False  # true: they are folders here, and never data sets of the hub
    load_val_data_from_disk: bool = False
    weighted_loss: bool = True  # false: each vote counts 1, whatever the column weight says
    output_dir: str = "runs"
    learning_rate: Annotated[float, Field(gt=0)] | None = None  # required, but for a head_optimum
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    batch_size: Annotated[int, Field(gt=0)] = 16  # prompts per process and forward pass, each with all its votes
    gradient_accumulation_steps: Annotated[int, Field(gt=0)] = 1
    num_train_epochs: Annotated[float, Field(gt=0)] = 1
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_length: Annotated[int, Field(gt=1)] = 8192  # tokens; longer prompts are truncated from the left
    chat_template: str | None = None
    date: Annotated[str | None, BeforeValidator(_iso)] = None  # what the clock shows to a chat template that reads it
    cls_token_if_none: str = "<|cls|>"
    pad_token_if_none: str = "<|pad|>"
    head_type: Literal["bt", "rk"]
    loss_type: Annotated[str, AfterValidator(_known_feedback)]  # a feedback model
    init_type: Literal["zeros", "reset_params", "he_unif", "xavier_unif", "tiny_normal"] = "zeros"  # of the head's last layers
    linear_head_downsize_factor: Annotated[float, Field(gt=0)] | None = None
    head_config: dict[str, Any] = {}
    train_head_only: bool = False
    # Keys of this project: training,
    license: str | None = None  # of the weights, for the model card
    description: str | None = None  # Markdown, for the model card
    lora: LoraOptions | None = None
    head_optimum: HeadOptimum | None = None  # with train_head_only: not in steps, but at once
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of prompt tokens left out, against overfitting
    head_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # dropout on the hidden state before the head
    shuffle: bool = True  # false: prompts in data order, as in the paper
    dtype: Literal["bfloat16", "float32", "int8"] | None = None  # of matrix products; trained weights stay float32
    gradient_checkpointing: bool = False
    seed: int = 42
    # data,
    columns: dict[str, str] = {}  # our name (prompt, model_a, winner ...): the column's name in the data
    csv_escape: str | None = None  # what escapes quotes in csv files; null: quotes are doubled
    leave_out: dict[str, list[str | int]] = {}  # column: values; rows with one of these values are skipped
    sources: str | None = None  # the column that names a row's source, or "file": scores are compared within one source only
    source_balance: Annotated[float, Field(ge=0, le=1)] = 1.0  # a source of weight W weighs W ** source_balance
    max_dropped: Annotated[float, Field(ge=0, le=1)] = MAX_DROPPED  # share of invalid rows that is tolerated
    # What to do with models outside the main connected component (the one with the most votes) of the graph of comparisons.
    disconnected_models: Literal["refuse", "leave_out", "train"] = "refuse"
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of prompts held out from training; 0 with val_data_path
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the remaining prompts, for model selection
    split_by: Literal["prompt", "hash", "time"] = "prompt"  # see votes.split; time: hold out the latest first votes
    split_seed: int = 0
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the training prompts that is used, for learning curves
    # and the run.
    save_steps: Annotated[int, Field(gt=0)] | None = None  # optimiser steps between saved states; None: once per epoch
    report_to: list[Literal["tensorboard", "wandb"]] = []  # tensorboard writes to output_dir/proj_name.logs
    deepspeed: str | dict[str, Any] | None = None  # like fsdp and fsdp_config: passed to transformers.TrainingArguments
    fsdp: bool = False
    fsdp_config: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key, why in WITHOUT_MEANING.items():
            if values.get(key) is not None:
                raise ValueError(f"{key}: has no meaning here, leave it out: {why}")
        values = {key: value for key, value in values.items() if key not in WITHOUT_MEANING}
        for theirs, ours in SYNONYMS.items():
            if theirs in values and ours in values:
                raise ValueError(f"{theirs}, {ours}: expected one of them, got both; they mean the same")
            if theirs in values:
                values[ours] = values.pop(theirs)
        return values

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
        if self.source_balance != 1 and not self.sources:
            raise ValueError("source_balance: expected 1 where sources is not given")
        if self.sources and self.val_data_path:
            raise ValueError("sources: cannot be combined with val_data_path; use held_out and validation")
        if self.deepspeed and self.fsdp:
            raise ValueError("deepspeed, fsdp: expected at most one of them")
        if self.lora and self.train_head_only:
            raise ValueError("train_head_only: expected false where lora is given")
        self._check_optimum()
        return self

    def _check_optimum(self) -> None:
        if self.head_optimum is None:
            if self.learning_rate is None:
                raise ValueError("learning_rate: expected a number above 0, got none")
            if self.dtype == "int8":
                raise ValueError(
                    "dtype: int8 is for weights that do not change: expected bfloat16 or float32, or a head_optimum"
                )
            return
        if not self.train_head_only:
            raise ValueError("head_optimum: expected train_head_only: true beside it, as nothing else is trained")
        if given := [key for key in OF_STEPS if getattr(self, key) != type(self).model_fields[key].default]:
            raise ValueError(f"{', '.join(given)}: mean nothing where head_optimum is given: leave them out")
        if len(self.head_optimum.deviations) > 1 and not (self.validation or self.val_data_path):
            raise ValueError("head_optimum.deviations: expected one, or validation prompts that choose among them")

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Reads a YAML file. Raises ValueError that names each unknown, missing or invalid key, and OSError."""
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
