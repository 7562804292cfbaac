"""One training run: config in, checkpoint folder out; killed, it goes on where it was."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from transformers import PretrainedConfig, PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback

from p2l_engine.checkpoint.saving import replaceable
from p2l_engine.prompts.encode import PromptEncoder
from p2l_engine.prompts.tokenizer import TransformersTokenizer
from p2l_engine.train import data, resumption
from p2l_engine.train.batches import PromptVotes, collate
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.model import bare, build, dtype_of
from p2l_engine.train.progress import Epochs, Seen, Show
from p2l_engine.train.resumption import IfPresent
from p2l_engine.train.saving import write
from p2l_engine.train.trainer import VoteTrainer
from p2l_engine.votes import prompts_hash

logger = logging.getLogger(__name__)


def train(config: TrainConfig, max_steps: int = -1, if_present: IfPresent = "refuse") -> Path:
    """Trains, and writes the checkpoint to ``output_dir/proj_name``; returns that folder.

    States to go on from are kept in ``output_dir/proj_name.run`` until then, TensorBoard's files in ``proj_name.logs``.
    if_present: what to do where that folder is there already: refuse; resume from its last whole state, which gives what an
    uninterrupted run gives, and is refused where config, data or backbone changed; or restart. ``max_steps`` > 0 ends early
    (trials); -1: the config's epochs. Raises ValueError, OSError where a state or the checkpoint cannot be written, and
    FloatingPointError where the loss is not finite.
    """
    folder = Path(config.output_dir) / config.proj_name
    state = folder.with_name(f"{folder.name}.run")
    set_seed(config.seed)
    if max_steps == 0 or max_steps < -1:
        raise ValueError(f"max_steps: expected 1 at least, or -1 for the config's epochs, got {max_steps}")
    parts = data.load(config)
    training, validation, held_out = parts
    inputs = resumption.inputs_of(config, parts, max_steps)
    arguments = _arguments(config, state, max_steps, len(training.prompts), validation is not None)
    process = PartialState()
    if folder.exists() and not state.exists() and if_present == "resume":
        resumption.check_finished(folder, config, inputs)
        logger.info("%s is there already, whole", folder)
        return folder
    if folder.exists() and (if_present == "refuse" or not replaceable(folder)):
        raise ValueError(f"{folder}: expected no such folder yet; --restart replaces a checkpoint, anything else is left alone")
    if arguments.n_gpu > 1:
        raise ValueError(f"{arguments.n_gpu} GPUs are here: start one process for each (torchrun), or set CUDA_VISIBLE_DEVICES")
    asked_first = [resumption.prepare(state, config, inputs, if_present) if process.is_main_process else None]
    last = broadcast_object_list(asked_first)[0]
    model, tokenizer = build(config, len(training.models))
    encoder = PromptEncoder(TransformersTokenizer(tokenizer), config.max_length)
    seen = Seen()
    dataset = PromptVotes(training, encoder, config.token_dropout, config.seed)
    cut = sum(len(ids) == config.max_length for ids in dataset.ids)
    if cut:
        logger.warning("%s prompts reach max_length = %d tokens: cut from the left", f"{cut:,}", config.max_length)
    validating = None if validation is None else PromptVotes(validation, encoder)
    _check_context(bare(model.model).config, [dataset, *([] if validating is None else [validating])])
    trainer = VoteTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=validating,
        data_collator=collate,
        callbacks=[Epochs(dataset), Show(seen), *_tensorboard(config, folder, if_present, process.is_main_process)],
        shuffle=config.shuffle,
        seen=seen,
    )
    trainer.remove_callback(PrinterCallback)
    spread = trainer.accelerator.distributed_type.value
    wanted = "FSDP" if config.fsdp else "DEEPSPEED" if config.deepspeed else spread
    if spread != wanted:
        raise ValueError(f"{wanted.lower()}: expected several processes on GPUs (torchrun), got {spread} on {arguments.device}")
    logger.info("device: %s, processes: %d (%s)", arguments.device, arguments.world_size, spread)
    if last is not None and resumption.is_last(Path(last)):
        model.load_state_dict(load_file(Path(last) / "model.safetensors"))  # killed after its last step
    else:
        trainer.train(resume_from_checkpoint=last)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        unseen = {"held-out": held_out, "validation": validation}
        hashes = {name: prompts_hash(votes) for name, votes in unseen.items() if votes is not None}
        write(folder, model, weights, tokenizer, training.models, config, hashes, inputs)
        shutil.rmtree(state)
    trainer.accelerator.wait_for_everyone()
    return folder


def _check_context(config: PretrainedConfig, datasets: Sequence[PromptVotes]) -> None:
    context = getattr(config, "max_position_embeddings", None)
    beyond = sum(len(ids) > context for dataset in datasets for ids in dataset.ids) if context else 0
    if beyond:
        raise ValueError(
            f"max_length: {beyond:,} prompts have more tokens than the {context} that the backbone was made for "
            f"(max_position_embeddings): set max_length: {context} to cut them from the left, or leave them out"
        )


def _tensorboard(config: TrainConfig, folder: Path, if_present: IfPresent, writes: bool) -> list[TrainerCallback]:
    """TensorBoard's files in a folder that outlives the run's states."""
    if "tensorboard" not in config.report_to or not writes:
        return []
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"report_to: tensorboard cannot be used ({error}): pip install tensorboard") from None
    logs = folder.with_name(f"{folder.name}.logs")
    if if_present == "restart":
        shutil.rmtree(logs, ignore_errors=True)
    logger.info("tensorboard --logdir %s", logs)
    return [TensorBoardCallback(SummaryWriter(str(logs)))]


def _arguments(config: TrainConfig, state: Path, max_steps: int, prompts: int, validates: bool) -> TrainingArguments:
    per_step = config.batch_size * config.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    steps = int(np.ceil(prompts / per_step) * config.num_train_epochs) if max_steps < 0 else max_steps
    more: dict[str, Any] = {"save_strategy": "epoch"}
    if config.save_steps is not None:
        more = {"save_strategy": "steps", "save_steps": config.save_steps}
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
        eval_strategy="epoch" if validates else "no",
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
        **more,
    )
