"""transformers' Trainer with this project's loss: the weighted mean over all votes of an optimiser step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import Trainer

from p2l_engine.train.batches import Order
from p2l_engine.train.progress import TrainedCounts


class VoteTrainer(Trainer):
    """Trains a P2LModel on batches from ``collate``.

    Each step minimises the weighted mean loss of its votes, so that gradient accumulation and several processes give the same
    weights as one large batch. Raises FloatingPointError for a loss or weights that are not finite, OSError if a state cannot
    be saved.

    shuffle: whether each epoch has its own order. counts: counts what this process has trained on.
    """

    def __init__(self, *args: Any, shuffle: bool, counts: TrainedCounts, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shuffle, self.counts = shuffle, counts
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the step's weight; the Trainer must not divide again

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of one optimiser step, and the total weight of their votes over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        weight = torch.tensor(sum(float(batch["weight"].sum()) for batch in batches), device=device)
        for batch in batches:
            self.counts.prompts += len(batch["packed"])
            self.counts.votes += len(batch["weight"])
            self.counts.tokens += len(batch["packed"].tokens)
        if self.args.world_size > 1:
            weight = self.accelerator.reduce(weight, "sum")
        return batches, weight

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's part of the step's mean loss.

        In training times the number of processes, because their gradients are averaged.
        """
        outputs = model(**inputs)
        total = inputs["weight"].sum() if num_items_in_batch is None else num_items_in_batch
        loss = outputs["loss"] / torch.as_tensor(total).clamp_min(torch.finfo(torch.float32).tiny)
        if model.training:
            loss = loss * self.args.world_size
            if not torch.isfinite(loss):
                votes = self.train_dataset.votes  # type: ignore[union-attr]
                prompts = [votes.prompts[i][0][:60] for i in inputs["prompts"].tolist()]
                raise FloatingPointError(
                    f"the loss is {loss.item()} at step {self.state.global_step + 1}; its batch has the prompts {prompts}: "
                    "lower learning_rate, or check these votes' weights and values"
                )
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The weighted mean loss per vote on the validation data, as ``{"eval_loss": value}``."""
        model, sums = self.model_wrapped, torch.zeros(2, dtype=torch.float64, device=self.args.device)
        model.eval()
        for batch in self.get_eval_dataloader():
            with self.compute_loss_context_manager():
                loss = model(**self._prepare_inputs(batch))["loss"]
            sums += torch.stack([loss.double(), batch["weight"].sum().double().to(sums.device)])
        total, weight = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {"eval_loss": total / weight}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return self._order(dataset, self.shuffle, self.args.train_batch_size)

    def _get_eval_sampler(self, eval_dataset: Dataset[Any]) -> Sampler[int] | None:
        return self._order(eval_dataset, False, self.args.eval_batch_size)

    def _order(self, dataset: Any, shuffle: bool, batch_size: int) -> Order:
        several = self.args.world_size > 1
        return Order(dataset, batch_size * self.args.world_size if several else 1, shuffle, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # theta and eta may share a layer; safetensors refuses tensors that share memory, so each is cloned.
        model: Any = self.model
        state = model.state_dict() if state_dict is None else state_dict
        if not all(torch.isfinite(tensor).all() for tensor in state.values()):
            raise FloatingPointError(f"the weights are not finite after step {self.state.global_step}: not saved")
        try:
            super()._save(output_dir, {name: tensor.clone() for name, tensor in state.items()})
        except SafetensorError as error:  # a full disk, for example
            raise OSError(f"{output_dir}: {error}") from error

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:  # all that torch's writer says when the disk is full
            if "inline_container" not in str(error):
                raise
            raise OSError(
                f"{self.args.output_dir}: the optimiser's state could not be written; is the disk full? ({error})"
            ) from error
