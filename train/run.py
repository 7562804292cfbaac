"""One training run, from a config to a checkpoint folder. A run that was killed can be resumed."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback

from p2l_engine.backbone import mixing
from p2l_engine.checkpoint.saving import replaceable
from p2l_engine.prompts.encode import PromptEncoder
from p2l_engine.prompts.tokenizer import TransformersTokenizer
from p2l_engine.train import data, frozen, resumption
from p2l_engine.train.batches import PromptVotes, collate
from p2l_engine.train.config import HeadOptimum, TrainConfig
from p2l_engine.train.model import bare, build, dtype_of
from p2l_engine.train.progress import EpochSetter, ProgressBar, TrainedCounts
from p2l_engine.train.resumption import IfPresent
from p2l_engine.train.saving import unseen_hashes, write
from p2l_engine.train.trainer import VoteTrainer
from p2l_engine.votes import Splits

logger = logging.getLogger(__name__)


def train(config: TrainConfig, max_steps: int = -1, if_present: IfPresent = "refuse") -> Path:
    """Trains, writes the checkpoint to ``output_dir/proj_name``, and returns that folder.

    Saved states are in ``output_dir/proj_name.run`` until the checkpoint is complete; TensorBoard's files stay in
    ``proj_name.logs``.

    max_steps: -1 trains for the config's epochs; 1 and more end after that many optimiser steps (trial runs). A head_optimum
    takes no such steps, and its states are the hidden states in the user's cache.
    if_present: what to do if the folder or states exist. "refuse" raises; "restart" deletes them; "resume" continues from the
    last complete state, and raises if config, data or backbone changed. A resumed run gives the same weights as an
    uninterrupted one.

    Raises ValueError for bad settings or data and for folders that ``if_present`` refuses, OSError if a state or the checkpoint
    cannot be written, and FloatingPointError if the loss is not finite.
    """
    folder = Path(config.output_dir) / config.proj_name
    state = folder.with_name(f"{folder.name}.run")
    set_seed(config.seed)
    if max_steps == 0 or max_steps < -1:
        raise ValueError(f"max_steps: expected at least 1, or -1 for the config's epochs, got {max_steps}")
    _check_deepspeed(config)
    parts = data.load(config)
    training, validation, _ = parts
    inputs = resumption.inputs_of(config, parts, max_steps)
    if config.head_optimum is not None:
        return _at_once(config, config.head_optimum, folder, parts, inputs, if_present)
    arguments = _arguments(config, state, max_steps, len(training.prompts), validation is not None)
    process = PartialState()
    if folder.exists() and not state.exists() and if_present == "resume":
        resumption.check_finished(folder, config, inputs)
        logger.info("%s is already complete", folder)
        return folder
    if folder.exists() and (if_present == "refuse" or not replaceable(folder)):
        raise ValueError(f"{folder}: exists already; --restart replaces it if it is a checkpoint, and never another folder")
    if arguments.n_gpu > 1:
        raise ValueError(f"got {arguments.n_gpu} GPUs: start one process per GPU (torchrun), or set CUDA_VISIBLE_DEVICES")
    resume_from = [resumption.last_state(state, config, inputs, if_present) if process.is_main_process else None]
    last = broadcast_object_list(resume_from)[0]
    model, tokenizer = build(config, len(training.models))
    encoder = PromptEncoder(TransformersTokenizer(tokenizer, config.date), config.max_length)
    encoder.check()
    counts = TrainedCounts()
    dataset = PromptVotes(training, encoder, config.token_dropout, config.seed)
    truncated = sum(len(ids) == config.max_length for ids in dataset.ids)
    if truncated:
        logger.warning("%s prompts reach max_length = %d tokens: truncated from the left", f"{truncated:,}", config.max_length)
    validation_set = None if validation is None else PromptVotes(validation, encoder)
    _check_context(
        model.context or mixing.context(bare(model.model).config),
        [dataset, *([] if validation_set is None else [validation_set])],
    )
    logs = _tensorboard(config, folder, if_present, process.is_main_process)
    trainer = VoteTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=validation_set,
        data_collator=collate,
        callbacks=[EpochSetter(dataset), ProgressBar(counts), *logs],
        shuffle=config.shuffle,
        counts=counts,
    )
    trainer.remove_callback(PrinterCallback)
    got = trainer.accelerator.distributed_type.value
    wanted = "FSDP" if config.fsdp else "DEEPSPEED" if config.deepspeed else got
    if got != wanted:
        with suppress(OSError):  # the Trainer has made it
            state.rmdir()
        raise ValueError(f"{wanted.lower()}: expected several processes on GPUs (torchrun), got {got} on {arguments.device}")
    logger.info("device: %s, processes: %d (%s)", arguments.device, arguments.world_size, got)
    if last is None and process.is_main_process:
        resumption.begin(state, config, inputs)
    if last is not None and resumption.is_last(Path(last)):
        model.load_state_dict(load_file(Path(last) / "model.safetensors"))  # all steps are done, only the checkpoint is missing
    else:
        trainer.train(resume_from_checkpoint=last)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        write(folder, model, weights, tokenizer, training.models, config, unseen_hashes(parts), inputs)
        shutil.rmtree(state)
    trainer.accelerator.wait_for_everyone()
    return folder


def _at_once(
    config: TrainConfig, wanted: HeadOptimum, folder: Path, parts: Splits, inputs: dict[str, Any], if_present: IfPresent
) -> Path:
    """The run of a ``head_optimum``."""
    if inputs["max_steps"] != -1:
        raise ValueError(f"max_steps: expected -1, as head_optimum takes no such steps, got {inputs['max_steps']}")
    if (processes := PartialState().num_processes) > 1:
        raise ValueError(f"head_optimum: expected one process, got {processes}")
    adapter = frozen.adapter_folder(config)
    if adapter is not None and adapter.resolve() == folder.resolve():
        raise ValueError(f"head_optimum: adapter: expected another folder than the run's own, {folder}: change proj_name")
    if folder.exists() and if_present == "resume":
        resumption.check_finished(folder, config, inputs)
        logger.info("%s is already complete", folder)
        return folder
    if folder.exists() and (if_present == "refuse" or not replaceable(folder)):
        raise ValueError(f"{folder}: exists already; --restart replaces it if it is a checkpoint, and never another folder")
    frozen.train(config, wanted, folder, parts, inputs)
    return folder


def _check_context(context: int | None, datasets: Sequence[PromptVotes]) -> None:
    too_long = sum(len(ids) > context for dataset in datasets for ids in dataset.ids) if context else 0
    if too_long:
        raise ValueError(
            f"max_length: {too_long:,} prompts have more tokens than the backbone's context of {context} "
            f"(max_position_embeddings): set max_length: {context} to truncate them from the left, or leave them out"
        )


def _tensorboard(config: TrainConfig, folder: Path, if_present: IfPresent, main: bool) -> list[TrainerCallback]:
    """The callback that writes TensorBoard's files to ``NAME.logs``, which stays when the run's states are deleted."""
    if "tensorboard" not in config.report_to or not main:
        return []
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"report_to: tensorboard cannot be imported ({error}): pip install tensorboard") from None
    logs = folder.with_name(f"{folder.name}.logs")
    if if_present == "restart":
        shutil.rmtree(logs, ignore_errors=True)
    logger.info("tensorboard --logdir %s", logs)
    return [TensorBoardCallback(SummaryWriter(str(logs)))]


def _check_deepspeed(config: TrainConfig) -> None:
    if config.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "deepspeed (or deepspeed_config_path): the package is not installed: pip install deepspeed, or leave the key out"
        )


def _arguments(config: TrainConfig, state: Path, max_steps: int, prompts: int, has_validation: bool) -> TrainingArguments:
    per_step = config.batch_size * config.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    assert config.learning_rate is not None  # steps need one, which the config has checked
    steps = int(np.ceil(prompts / per_step) * config.num_train_epochs) if max_steps < 0 else max_steps
    saving: dict[str, Any] = {"save_strategy": "epoch"}
    if config.save_steps is not None:
        saving = {"save_strategy": "steps", "save_steps": config.save_steps}
    return TrainingArguments(
        output_dir=str(state),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.num_train_epochs,
        max_steps=max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule,
        warmup_steps=int(config.warmup_ratio * steps),
        weight_decay=config.weight_decay,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        bf16=dtype_of(config) == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="epoch" if has_validation else "no",
        save_total_limit=2,
        logging_steps=10,
        disable_tqdm=True,
        report_to=[name for name in config.report_to if name != "tensorboard"] or "none",
        run_name=config.proj_name,
        remove_unused_columns=False,
        label_names=["pairs"],
        deepspeed=config.deepspeed,
        fsdp="full_shard" if config.fsdp else None,
        fsdp_config=config.fsdp_config,
        ddp_find_unused_parameters=False,
        seed=config.seed,
        data_seed=config.seed,
        **saving,
    )
