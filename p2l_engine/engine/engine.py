"""The engine: prompts in, coefficients out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import date as Date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p2l_engine import backbone, checkpoint
from p2l_engine.arguments import callback, instance, whole_number
from p2l_engine.backbone import DecoderConfig, PackedDecoder
from p2l_engine.backbone.packing import Packed, Tokens, weight_of
from p2l_engine.backbone.words import words
from p2l_engine.checkpoint import Checkpoint, weight_cache
from p2l_engine.coefficients import Coefficients
from p2l_engine.engine import cpu
from p2l_engine.engine.auto_dtype import auto_dtype
from p2l_engine.engine.compile_watch import CompileWatch
from p2l_engine.engine.device import AUTO, as_device, as_dtype, is_auto
from p2l_engine.engine.graphs import Graphs
from p2l_engine.engine.head_win_rates import HeadWinRates
from p2l_engine.engine.output_layers import OutputLayers
from p2l_engine.engine.pipeline import InFlightBatch, Outputs, in_flight_batches, outputs_in_order, prefetch
from p2l_engine.engine.prefix_cache import PrefixBytes, PrefixCache, checked_bytes, open_prefix_cache
from p2l_engine.errors import CheckpointError
from p2l_engine.prompts.encode import MAX_TOKENS, PromptEncoder
from p2l_engine.prompts.parse import Prompt, parse_batch

# On a CPU each batch reads all weights anew: at 512 tokens that takes as long again as the products.
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 32768}
PROMPTS_PER_CHUNK = 4096  # tokenised together, while an earlier chunk is computed
BATCHES_IN_FLIGHT = 3  # on a GPU: enough that it never waits for the host
LEAST_PREFIX = 8  # tokens: sharing a shorter prefix costs more than it saves

Stage = Callable[[Tensor, npt.NDArray[np.intp]], tuple[Tensor, ...]]

logger = logging.getLogger(__name__)


class Engine:
    """Computes the coefficients of prompts with one P2L checkpoint on one device. Safe to call from several threads."""

    def __init__(
        self,
        loaded: Checkpoint,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        tokens_per_batch: int | None = None,
        max_tokens: int | None = None,
        prefix_cache_bytes: PrefixBytes = 0,
    ) -> None:
        instance("loaded", loaded, Checkpoint)
        self.device = as_device(device)
        self.tokens_per_batch = TOKENS_PER_BATCH[self.device.type] if tokens_per_batch is None else tokens_per_batch
        self.tokens_per_batch = whole_number("tokens_per_batch", self.tokens_per_batch, 1)
        most = MAX_TOKENS if max_tokens is None else whole_number("max_tokens", max_tokens, 1)
        if self.device.type == "cpu":
            cpu.limit_threads()
        packed = isinstance(loaded.config, DecoderConfig)
        chosen = auto_dtype(loaded.folder, loaded.head, packed, self.device) if is_auto(dtype) else dtype
        self.dtype = as_dtype(chosen, self.device)
        self.models, self.feedback = loaded.models, loaded.feedback
        self.folder, self.base = loaded.folder, loaded.base
        keep = weight_cache.keep_for(loaded.weights.fingerprint)
        self.backbone = backbone.build(loaded.config, loaded.weights.read, self.device, self.dtype, keep)
        positions = self.backbone.positions
        if positions is not None and positions < most:
            logger.warning(
                "the backbone has %d positions: longer prompts are truncated from the left to %d tokens", *[positions] * 2
            )
            most = positions
        self.encoder = PromptEncoder(loaded.tokenizer, most)
        try:
            self.encoder.check()
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {error}") from error
        template = 0 if loaded.lengths is None else len(self.encoder.encode(["a"])[0]) - 1
        layers = OutputLayers(loaded, self.device, self.backbone, template)
        self._layers, self.width, self.usage_width = layers, layers.width, layers.usage_width
        self.head, self.uncertainty = layers.head, layers.uncertainty
        self.head_win_rates = HeadWinRates(layers)
        self.theta_map, self.lengths, self.shrinkage = layers.theta_map, layers.lengths, layers.shrinkage
        self.topics, self.hidden_size, self.state_size = layers.topics, layers.hidden_size, layers.state_size
        self.n_parameters = loaded.weights.parameters
        self._graphs: Graphs | None = None
        if isinstance(self.backbone, PackedDecoder):
            prefix = self.encoder.prefix()
            with CompileWatch.paused(), self._on_device():
                self.backbone.share(prefix if len(prefix) >= LEAST_PREFIX else None)
        self.prefix_cache = open_prefix_cache(prefix_cache_bytes, self.backbone, self.device, self.encoder)

    @property
    def date(self) -> str | None:
        """What the clock shows to the chat template, in ISO 8601; None where it reads none."""
        shown = self.encoder.tokenizer.template.date
        return None if shown is None else shown.isoformat()

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        tokens_per_batch: int | None = None,
        date: str | Date | None = None,
        prefix_cache_bytes: PrefixBytes = 0,
    ) -> Engine:
        """Reads a checkpoint: a folder, a hub name, a built-in name such as "builtin/llmrouter-9", or None for the default.

        device: "cpu", "cuda", "cuda:1" or a torch.device; None: CUDA where there is one, else the CPU. dtype: "float32",
        "bfloat16", "bf16", ... or a torch.dtype; None: bfloat16 on CUDA and on CPUs that multiply it in hardware (AMX,
        AVX512-BF16), else float32; "int8" on CPUs (see ``as_dtype``); "auto": int8 where the checkpoint's own figures say that
        it loses little, else as None (see ``auto_dtype``). tokens_per_batch: at most in a forward pass, where a shared prefix
        counts as an eighth of its tokens (a longer prompt gets a pass of its own); None: 4,096 on a CPU, 32,768 on CUDA. date:
        what the clock shows to a chat template that reads it, such as "2026-01-31"; None: as in training, if its config has a
        date; such a template without a date is refused. prefix_cache_bytes: for the keys and values of prompts, so that a turn
        that is added to a chat computes its own tokens only (see ``prefix_cache``); 0: none are kept; "auto": 512 MiB on a CPU
        for Llama and Qwen2 backbones, for which alone they can be kept. Raises CheckpointError, and ValueError for an argument
        that cannot be used.
        """
        place = as_device(device)
        kind = AUTO if is_auto(dtype) else as_dtype(dtype, place)
        if tokens_per_batch is not None:
            whole_number("tokens_per_batch", tokens_per_batch, 1)
        checked_bytes(prefix_cache_bytes, place)  # all checked before the checkpoint is read
        return cls(checkpoint.load(path_or_repo, date), place, kind, tokens_per_batch, None, prefix_cache_bytes)

    def coefficients(self, prompts: Sequence[Prompt], progress: Callable[[int], object] | None = None) -> Coefficients:
        """The coefficients of each prompt, in order. An empty batch gives empty arrays.

        ``progress`` is called with the number of prompts that each forward pass has finished. Raises PromptError, which
        names the index of a prompt that cannot be read or that the chat template refuses; TypeError when ``prompts`` is a
        single string.
        """
        callback("progress", progress)
        turns = parse_batch(prompts)
        if len(turns) == 1:
            out = self.forward(self.encoder.encode(turns))
            if progress is not None:
                progress(1)
            return self.coefficients_of(out)
        out = np.empty((len(turns), self.width), np.float32)
        for rows, (part,) in self.stream(turns):
            out[rows] = part
            if progress is not None:
                progress(len(rows))
        return self.coefficients_of(out)

    def forward(self, tokens: Sequence[Tokens]) -> npt.NDArray[np.float32]:
        """The outputs [n, K] of tokenised prompts, in one batch; a short one runs in a CUDA graph.

        tokens: as ``encoder.encode`` returns them, at least one token each. Raises ValueError for a prompt without tokens, or
        with more than the backbone has positions.
        """
        if not len(tokens):
            return np.empty((0, self.width), np.float32)
        for i, ids in enumerate(tokens):
            if not len(ids):
                raise ValueError(f"tokens[{i}]: expected one token at least, got none")
            if (most := self.backbone.positions) is not None and len(ids) > most:
                raise ValueError(f"tokens[{i}]: expected at most {most} tokens, the backbone's positions, got {len(ids)}")
        (outputs,) = self._launch(np.arange(len(tokens)), list(tokens), None, self.prefix_cache).wait()[1]
        return np.asarray(outputs)

    def outputs(self, states: Tensor) -> Tensor:
        """The outputs [n, K] float32 for states [n, S] of this engine, as ``stream`` has them: see ``OutputLayers``. K is
        ``width``; one less where the checkpoint has lengths: ``forward`` and ``stream`` add each prompt's number of tokens."""
        return self._layers(states)

    def read(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the head reads of states [n, S]: see ``OutputLayers.read``."""
        return self._layers.read(states)

    def read_normed(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """``read`` of states [n, S] after the final norm (``normed``)."""
        return self._layers.read_normed(states)

    def normed(self, states: Tensor) -> Tensor:
        """States [n, S] float32, their hidden states through the final norm: see ``OutputLayers.normed``."""
        return self._layers.normed(states)

    def words(self, prompts: Sequence[Prompt]) -> npt.NDArray[np.float32]:
        """[n, E]: the words of prompts, as topics may read them (see ``backbone.words``), without a forward pass. Raises as
        ``coefficients``."""
        turns, found = parse_batch(prompts), []
        for start in range(0, len(turns), PROMPTS_PER_CHUNK):
            tokens = self.encoder.encode(turns[start : start + PROMPTS_PER_CHUNK], start)
            found.append(words(tokens, self.backbone.embedding).cpu())
        return np.asarray(torch.cat(found).numpy()) if found else np.empty((0, self.backbone.embedding.shape[1]), np.float32)

    def warmup(self) -> float:
        """Compiles kernels, captures CUDA graphs and allocates buffers before the first request. Returns the seconds it took.

        On a GPU, every later compilation by Triton is logged as a warning. No other thread may use the engine meanwhile.
        """
        start = time.perf_counter()
        with CompileWatch.paused(), self._on_device():
            self.coefficients(["a" * n for n in (1, 3, 40, 700)])
            self.coefficients(["a"] * 33)
            if self.device.type == "cuda":
                from p2l_engine.kernels.pool_head import VARIANTS

                for n in VARIANTS:
                    self.outputs(torch.zeros((n, self.state_size), dtype=self.dtype, device=self.device))
                self.head_win_rates.measure(self.device, self.dtype)
                halves = self.dtype in (torch.bfloat16, torch.float16)  # else attention is a call for each length: no one graph
                if self._layers.reads_words:
                    logger.info("no CUDA graphs: the checkpoint's topics read words")
                elif isinstance(self.backbone, PackedDecoder) and halves:
                    prefix = self.backbone.prefix
                    keep = (self.backbone.prefix_kv, self.backbone.rope(0))
                    self._graphs = Graphs(lambda packed: self.outputs(self.backbone(packed)), prefix, self.device, keep)
                    self.coefficients(["a"])
                prompt = np.zeros(min(256, self.encoder.max_tokens), np.int32)  # a full batch, so that its memory is allocated
                self.forward([prompt] * (self.tokens_per_batch // len(prompt)))
                CompileWatch.start()
        if self.prefix_cache is not None:
            self.prefix_cache.clear()
        seconds = time.perf_counter() - start
        fused = self.head_win_rates.fused_up_to
        logger.info("warm-up: %.1f s; head and win rates in one launch up to %d prompts", seconds, fused)
        return seconds

    def stream(
        self, prompts: Sequence[Prompt], stage: Stage | None = None
    ) -> Iterator[tuple[npt.NDArray[np.intp], tuple[npt.NDArray[Any], ...]]]:
        """The results of ``stage`` on the prompts' states, batch by batch.

        stage: states [n, S] (hidden states [n, D], with words behind them where the checkpoint's topics read these: see
        ``OutputLayers``) and the rows of the n prompts -> tensors [n, ...] on the engine's device; it must not wait for the
        device. None: ``outputs`` [n, K]. Yields the rows, and the tensors as arrays. Every prompt comes once; a batch
        holds prompts of similar length. A thread tokenises the next chunk meanwhile, and on a GPU several batches run at once.
        Raises PromptError, and TypeError as ``coefficients`` does.
        """
        turns = parse_batch(prompts)
        rows = range(len(turns))
        chunks = (rows[start : start + PROMPTS_PER_CHUNK] for start in range(0, len(turns), PROMPTS_PER_CHUNK))

        def encode(chunk: range) -> list[Tokens]:
            return self.encoder.encode(turns[chunk.start : chunk.stop], chunk.start)

        tokens = prefetch(encode, chunks) if len(turns) > PROMPTS_PER_CHUNK else map(encode, chunks)
        for batch in self._in_flight(tokens, stage, self.prefix_cache):
            yield batch.wait()

    def outputs_of(self, chunks: Iterable[Sequence[Prompt]]) -> Iterator[Outputs]:
        """The outputs of each chunk of prompts, in order; every chunk has at least one prompt.

        For endless streams: a thread draws and tokenises at most two chunks in advance. Prompts of different chunks never share
        a batch, and the prefix cache is not used, so equal chunks give bit-identical outputs (on one machine, with the same
        number of threads). Outputs are NaN for prompts that the template or the tokenizer refuses (``encoder.problem`` says
        why); the caller checks that outputs are finite. Raises PromptError, with the index within its chunk, for a prompt that
        cannot be parsed.
        """
        return outputs_in_order(chunks, self.encoder.encode_each, lambda tokens: self._in_flight(tokens, None, None))

    def _in_flight(
        self, chunks: Iterable[list[Tokens] | None], stage: Stage | None, cache: PrefixCache | None
    ) -> Iterator[InFlightBatch]:
        return in_flight_batches(
            chunks,
            lambda rows, tokens: self._launch(rows, tokens, stage, cache),
            (lambda ids: weight_of(ids, self.backbone.prefix)) if cache is None else cache.weight,
            self.tokens_per_batch,
            BATCHES_IN_FLIGHT if self.device.type == "cuda" else 0,
        )

    def _launch(
        self, rows: npt.NDArray[np.intp], tokens: list[Tokens], stage: Stage | None, cache: PrefixCache | None
    ) -> InFlightBatch:
        if stage is None and self._graphs is not None and (done := self._graphs.run(tokens)) is not None:
            return InFlightBatch(rows, done.tokens, (self._layers.with_counts(torch.from_numpy(done.outputs), tokens),))
        on_gpu = self.device.type == "cuda"
        with torch.inference_mode(), self._on_device():
            if cache is not None:
                hidden, computed = cache.hidden(tokens)
            else:
                packed = Packed.of(tokens, self.backbone.prefix, pin=on_gpu)
                hidden, computed = self.backbone(packed.to(self.device)), sum(packed.lengths)
            states = self._layers.with_words(hidden, tokens)
            results = (self._layers.with_counts(self.outputs(states), tokens),) if stage is None else stage(states, rows)
            if not on_gpu:
                return InFlightBatch(rows, computed, results)
            copies = tuple(torch.empty(r.shape, dtype=r.dtype, pin_memory=True).copy_(r, non_blocking=True) for r in results)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        return InFlightBatch(rows, computed, copies, packed, event)

    def _on_device(self) -> AbstractContextManager[object]:
        """Makes the engine's device the thread's current one, which Triton and new streams use."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def coefficients_of(self, out: npt.NDArray[np.float32]) -> Coefficients:
        """Outputs [n, K] as coefficients. Raises FloatingPointError, which names the first prompt whose are not finite."""
        bad = ~np.isfinite(out).all(axis=1)
        if bad.any():
            raise FloatingPointError(
                f"prompts[{int(np.argmax(bad))}]: the backbone gave coefficients that are not finite ({int(bad.sum())} such "
                f"prompts) in {self.dtype}; are the checkpoint's weights sound?"
            )
        return self.split(out)

    def split(self, out: npt.NDArray[np.float32]) -> Coefficients:
        """Outputs [n, K] as coefficients, which may hold numbers that are not finite. Where they end before the numbers of
        ``ExpectedUsage``, there is no usage."""
        return self._layers.split(out)
