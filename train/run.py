"""One training run: config in, checkpoint folder out."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, set_seed

from p2l_engine.prompts import PromptEncoder
from p2l_engine.train import votes as vote_files
from p2l_engine.train.batches import Collator, LengthGroupedBatches, PromptVotes
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.model import P2LModel, build, published_tensors
from p2l_engine.train.votes import Votes

logger = logging.getLogger(__name__)


def split(config: TrainConfig) -> tuple[Votes, Votes | None]:
    """Training votes and, from val_data_path or the held-out prompts, validation votes."""
    votes = vote_files.read(config.train_data_path)
    if config.val_data_path:
        return votes, vote_files.read(config.val_data_path, votes.models)
    if not config.held_out:
        return votes, None
    kept, held_out = vote_files.split_by_prompt(len(votes.prompts), config.held_out, config.split_seed)
    return votes.of(kept), votes.of(held_out)


def train(config: TrainConfig, max_steps: int = -1) -> Path:
    """Trains and writes the checkpoint to ``output_dir/proj_name``, anew after every epoch; returns that folder.

    ``max_steps`` > 0 ends early (trials).
    """
    folder = Path(config.output_dir) / config.proj_name
    set_seed(config.seed)
    training, validation = split(config)
    logger.info("%d votes on %d prompts, %d models", len(training), len(training.prompts), len(training.models))
    model, tokenizer = build(config, len(training.models))
    encoder = PromptEncoder(tokenizer, config.max_length)
    on_gpu = torch.cuda.is_available()
    steps = int(np.ceil(len(training.prompts) / config.batch_size / config.gradient_accumulation_steps))
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.num_train_epochs,
        max_steps=max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_schedule,
        warmup_steps=int(config.warmup_ratio * steps * config.num_train_epochs),
        weight_decay=config.weight_decay,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        bf16=True,
        use_cpu=not on_gpu,
        eval_strategy="epoch" if validation is not None else "no",
        prediction_loss_only=True,
        save_strategy="no",
        logging_steps=25,
        report_to="none",
        remove_unused_columns=False,
        label_names=["votes"],
        seed=config.seed,
        data_seed=config.seed,
    )
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=PromptVotes(training, encoder),
        eval_dataset=PromptVotes(validation, encoder) if validation is not None else None,
        data_collator=Collator(int(tokenizer.pad_token_id)),
        callbacks=[_WriteEachEpoch(folder, model, tokenizer, training.models, config)],
    )
    trainer.train()
    write(folder, model, tokenizer, training.models, config)
    return folder


def write(
    folder: Path, model: P2LModel, tokenizer: PreTrainedTokenizerBase, models: Sequence[str], config: TrainConfig
) -> None:
    """The checkpoint in the published layout; for LoRA an adapter folder, which names its backbone."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in published_tensors(model, config).items()}
    _json(folder / "model_list.json", list(models))
    _json(folder / "training_config.json", {"model_type": _decoder(model).config.model_type} | config.model_dump())
    if config.lora is None:
        # A layer that theta and eta share is stored under both of its names.
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
        _decoder(model).config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    else:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
        adapter = {
            "peft_type": "LORA",
            "base_model_name_or_path": config.pretrain_model_name,
            "r": config.lora.r,
            "lora_alpha": config.lora.alpha,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "layers_to_transform": list(range(config.lora.first_layer, int(_decoder(model).config.num_hidden_layers))),
            "bias": "none",
        }
        _json(folder / "adapter_config.json", adapter)


class _Trainer(Trainer):
    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedBatches([len(ids) for ids in dataset.ids], size, self.args.seed)


class _WriteEachEpoch(TrainerCallback):
    def __init__(self, folder: Path, *parts: Any) -> None:
        self.folder, self.parts = folder, parts

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        write(self.folder, *self.parts)


def _decoder(model: P2LModel) -> Any:
    return model.model


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
