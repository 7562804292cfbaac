"""One training run: config in, checkpoint folder out; killed, it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PrinterCallback, TrainingArguments, set_seed

from p2l_engine.prompts import PromptEncoder
from p2l_engine.saving import replaceable, write_json
from p2l_engine.train import data
from p2l_engine.train.batches import PromptVotes, collate
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.model import build, dtype_of
from p2l_engine.train.progress import Epochs, Seen, Show
from p2l_engine.train.saving import write
from p2l_engine.train.trainer import VoteTrainer
from p2l_engine.votes import Votes, prompts_hash

logger = logging.getLogger(__name__)

ASKED = "asked.json"
IfPresent = Literal["refuse", "resume", "restart"]


def train(config: TrainConfig, max_steps: int = -1, if_present: IfPresent = "refuse") -> Path:
    """Trains, and writes the checkpoint to ``output_dir/proj_name``; returns that folder.

    States to go on from are kept in ``output_dir/proj_name.run`` until then. if_present: what to do where that folder is there
    already: refuse; resume from its last whole state, which gives what an uninterrupted run gives, and is refused where config
    or data changed; or restart. ``max_steps`` > 0 ends early (trials). Raises ValueError, and FloatingPointError where the loss
    is not finite.
    """
    folder = Path(config.output_dir) / config.proj_name
    state = folder.with_name(f"{folder.name}.run")
    set_seed(config.seed)
    training, validation, held_out = data.load(config)
    arguments = _arguments(config, state, max_steps, len(training.prompts), validation is not None)
    process = PartialState()
    if folder.exists() and not state.exists() and if_present == "resume":
        logger.info("%s is there already, whole", folder)
        return folder
    if folder.exists() and (if_present == "refuse" or not replaceable(folder)):
        raise ValueError(f"{folder}: expected no such folder yet; --restart replaces a checkpoint, anything else is left alone")
    if arguments.n_gpu > 1:
        raise ValueError(f"{arguments.n_gpu} GPUs are here: start one process for each (torchrun), or set CUDA_VISIBLE_DEVICES")
    asked_first = [_prepare(state, config, training, max_steps, if_present) if process.is_main_process else None]
    last = broadcast_object_list(asked_first)[0]
    model, tokenizer = build(config, len(training.models))
    encoder = PromptEncoder(tokenizer, config.max_length)
    seen = Seen()
    dataset = PromptVotes(training, encoder, config.token_dropout, config.seed)
    cut = sum(len(ids) == config.max_length for ids in dataset.ids)
    if cut:
        logger.warning("%s prompts reach max_length = %d tokens: cut from the left", f"{cut:,}", config.max_length)
    validating = None if validation is None else PromptVotes(validation, encoder)
    trainer = VoteTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=validating,
        data_collator=collate,
        callbacks=[Epochs(dataset), Show(seen)],
        shuffle=config.shuffle,
        seen=seen,
    )
    trainer.remove_callback(PrinterCallback)
    spread = trainer.accelerator.distributed_type.value
    wanted = "FSDP" if config.fsdp else "DEEPSPEED" if config.deepspeed else spread
    if spread != wanted:
        raise ValueError(f"{wanted.lower()}: expected several processes on GPUs (torchrun), got {spread} on {arguments.device}")
    logger.info("device: %s, processes: %d (%s)", arguments.device, arguments.world_size, spread)
    if last is not None and _is_last(Path(last)):
        model.load_state_dict(load_file(Path(last) / "model.safetensors"))  # killed after its last step
    else:
        trainer.train(resume_from_checkpoint=last)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        parts = {"held-out": held_out, "validation": validation}
        hashes = {name: prompts_hash(votes) for name, votes in parts.items() if votes is not None}
        write(folder, model, weights, tokenizer, training.models, config, hashes)
        shutil.rmtree(state)
    trainer.accelerator.wait_for_everyone()
    return folder


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
        report_to=list(config.report_to) or "none",
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


def _prepare(state: Path, config: TrainConfig, votes: Votes, max_steps: int, if_present: IfPresent) -> str | None:
    """Makes the run's folder; the state to resume from, where there is one and that is asked for."""
    # Written down as JSON has it, so that what is read again compares equal.
    asked = json.loads(
        json.dumps(
            {
                "config": config.model_dump(),
                "max_steps": max_steps,
                "votes": _fingerprint(votes),
                "processes": os.environ.get("WORLD_SIZE", "1"),
            }
        )
    )
    if state.exists():
        if if_present == "refuse":
            raise ValueError(
                f"{state}: a run of this name is there already; --resume goes on with it, --restart throws it away"
            )
        if if_present == "resume":
            return _resume(state, asked)
        shutil.rmtree(state)
    elif if_present == "resume":
        logger.info("%s: no state to resume from: starting", state)
    state.mkdir(parents=True, exist_ok=True)
    write_json(state / ASKED, asked)
    return None


def _resume(state: Path, asked: dict[str, Any]) -> str | None:
    try:
        before = json.loads((state / ASKED).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{state}: expected {ASKED}, which says what the run was asked for: {error}; --restart") from None
    flat, now = ({**x["config"], **{key: x[key] for key in x if key != "config"}} for x in (before, asked))
    changed = [f"{key}: was {flat.get(key)!r:.60}, is {now.get(key)!r:.60}" for key in now if flat.get(key) != now[key]]
    if changed:
        raise ValueError(f"{state}: cannot be resumed, since this changed: {'; '.join(changed)}. Undo it, or --restart")
    folders = sorted(state.glob("checkpoint-*"), key=lambda folder: int(folder.name.rsplit("-", 1)[1]), reverse=True)
    whole = next((folder for folder in folders if _is_whole(folder)), None)
    for folder in folders[: folders.index(whole) if whole else None]:
        logger.warning("%s was cut short while it was written: removed", folder)
        shutil.rmtree(folder)
    logger.info("resuming from %s" if whole else "no whole state yet: starting again in %s", whole or state)
    return None if whole is None else str(whole)


def _is_last(folder: Path) -> bool:
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"]) >= int(state["max_steps"]) and (folder / "model.safetensors").is_file()


def _is_whole(folder: Path) -> bool:
    """The Trainer writes trainer_state.json last."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        weights = folder / "model.safetensors"
        if weights.exists():
            with safe_open(weights, "pt"):
                pass
    except (OSError, json.JSONDecodeError, SafetensorError):
        return False
    return True


def _fingerprint(votes: Votes) -> str:
    """A hash of everything that is trained on."""
    digest = hashlib.sha256(json.dumps([votes.prompts, votes.models]).encode())
    for column in (votes.prompt, votes.a, votes.b, votes.outcome, votes.weight):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()
