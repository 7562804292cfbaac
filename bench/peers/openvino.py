"""OpenVINO's CPU plugin: the decoder as a graph of OpenVINO's operations.

The graph spells RMSNorm, rotary embedding and repeated heads as exported models do, which OpenVINO's passes look for, and has
OpenVINO's own operation for causal attention. Settings, the fastest that were found: for latency that hint (one stream of all
threads); for throughput that hint, and as many requests at a time as the plugin asks for. Precisions: float32; bfloat16 where
the CPU multiplies it in hardware; int8 and int4 blocks: weights in whole numbers with a scale for each row and each 32 columns
of it, and activations in int8 with a scale for each group of columns, rounded while it runs ("dynamic quantisation"). For int8
the group is the largest that divides all products' inputs: with the whole row the plugin falls back to float32 products.
Static quantisation, whose scales are measured on samples, is left out: the figures would depend on the samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
import openvino.opset16 as op

from bench.peers.batches import Batch, padded
from bench.peers.decoder import Decoder, Floats, nibbles, rounded
from p2l_engine.backbone.weights import Linear
from p2l_engine.engine.cpu import multiplies_bf16

BLOCK = 32  # weights of four bits that share a scale


def precisions() -> tuple[str, ...]:
    """Those that this CPU computes at least as fast as float32."""
    return ("float32", *(["bfloat16"] if multiplies_bf16() else []), "int8", "int4 blocks")


class OpenVino:
    """See Peer."""

    name = "openvino"

    def __init__(self, decoder: Decoder, precision: str, threads: int, throughput: bool) -> None:
        self.precision, self.decoder = precision, decoder  # whose memory the graph reads
        group = math.gcd(decoder.config.hidden_size, decoder.config.intermediate_size)
        settings = {
            "PERFORMANCE_HINT": "THROUGHPUT" if throughput else "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": {"int8": group, "int4 blocks": BLOCK}.get(precision, 0),
        }
        compiled = ov.Core().compile_model(graph(decoder, precision), "CPU", settings)
        self.request = compiled.create_infer_request()
        self.queue = ov.AsyncInferQueue(compiled, int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")))
        self.queue.set_callback(self._finished)
        self._hidden: list[Floats] = []

    def run(self, batches: Sequence[Batch]) -> list[Floats]:
        """See Peer. A single batch runs on the calling thread."""
        if len(batches) == 1:
            return [self.decoder.outputs(self.request.infer(list(padded(batches[0])), share_inputs=True)[0])]
        self._hidden = [np.empty(0, np.float32)] * len(batches)
        for i, batch in enumerate(batches):
            self.queue.start_async(list(padded(batch)), i)
        self.queue.wait_all()
        return [self.decoder.outputs(hidden) for hidden in self._hidden]

    def _finished(self, request: Any, i: int) -> None:
        self._hidden[i] = request.get_output_tensor().data.copy()


def start(decoder: Decoder, precision: str, threads: int, throughput: bool, folder: Path) -> OpenVino:
    """The peer; it reads no file."""
    return OpenVino(decoder, precision, threads, throughput)


def graph(decoder: Decoder, precision: str) -> ov.Model:
    """Token ids [n, t] and the index of each prompt's last one [n] -> hidden states [n, D] after the final norm."""
    c = decoder.config
    ids, last = op.parameter([-1, -1], np.int64, "ids"), op.parameter([-1], np.int64, "last")
    shape = op.shape_of(ids, "i64")
    tokens = op.gather(shape, whole([1]), whole(0))
    cos, sin = (
        op.slice(op.constant(np.concatenate([half, half], axis=1)[None, None]), whole([0]), tokens, whole([1]), whole([2]))
        for half in decoder.rotations()
    )
    queries, keys = c.num_attention_heads, c.num_key_value_heads
    sizes = whole([queries * c.head_dim, keys * c.head_dim, keys * c.head_dim])
    x = op.gather(shared(decoder.embedding), ids, whole(0))
    for layer in decoder.layers:
        normed = norm(x, layer.attention_norm.numpy(), c.rms_norm_eps)
        parts = op.variadic_split(product(normed, layer.qkv, precision), whole(2), sizes).outputs()
        q, k, v = (heads(part, n, c.head_dim) for part, n in zip(parts, (queries, keys, keys), strict=True))
        q, k = (rotated(part, cos, sin, c.head_dim) for part in (q, k))
        k, v = (repeated(part, shape, keys, queries // keys, c.head_dim) for part in (k, v))
        attended = op.transpose(op.scaled_dot_product_attention(q, k, v, causal=True), whole([0, 2, 1, 3]))
        x = op.add(x, product(op.reshape(attended, whole([0, 0, queries * c.head_dim]), True), layer.out, precision))
        normed = norm(x, layer.mlp_norm.numpy(), c.rms_norm_eps)
        gate, up = op.variadic_split(
            product(normed, layer.gate_up, precision), whole(2), whole([c.intermediate_size] * 2)
        ).outputs()
        x = op.add(x, product(op.multiply(op.swish(gate), up), layer.down, precision))
    ends = op.squeeze(op.gather(x, op.unsqueeze(last, whole(1)), whole(1), 1), whole(1))
    return ov.Model([op.result(norm(ends, decoder.norm, c.rms_norm_eps))], [ids, last], "decoder")


def whole(values: int | Sequence[int]) -> Any:
    """A constant of whole numbers."""
    return op.constant(np.array(values, np.int64))


def shared(values: npt.NDArray[Any]) -> Any:
    """A constant that reads the array's memory."""
    return op.constant(values, shared_memory=True)


def norm(x: Any, weight: Floats, eps: float) -> Any:
    """RMSNorm."""
    mean = op.reduce_mean(op.power(x, np.float32(2)), whole([-1]), True)
    return op.multiply(op.multiply(x, op.divide(np.float32(1), op.sqrt(op.add(mean, np.float32(eps))))), shared(weight))


def product(x: Any, linear: Linear, precision: str) -> Any:
    """x times the weight, plus the bias."""
    weight: Floats = linear.weight.t().numpy()
    matrix = shared(weight)
    if precision == "int8":
        values, scales = rounded(weight, weight.shape[1], 8)
        matrix = op.multiply(op.convert(op.constant(values[:, 0]), "f32"), op.constant(scales[:, 0]))
    elif precision == "int4 blocks":
        values, scales = rounded(weight, BLOCK, 4)
        four_bits = ov.Tensor(ov.Type.i4, list(values.shape))
        four_bits.data[:] = nibbles(values).view(np.int8).reshape(-1)
        blocks = op.multiply(op.convert(op.constant(four_bits), "f32"), op.constant(scales))
        matrix = op.reshape(blocks, whole(list(weight.shape)), False)
    out = op.matmul(x, matrix, False, True)
    return out if linear.bias is None else op.add(out, shared(linear.bias.numpy()))


def heads(x: Any, count: int, size: int) -> Any:
    """[n, t, count * size] -> [n, count, t, size]."""
    return op.transpose(op.reshape(x, whole([0, 0, count, size]), True), whole([0, 2, 1, 3]))


def rotated(x: Any, cos: Any, sin: Any, size: int) -> Any:
    """The rotary embedding."""
    low, high = (op.slice(x, whole([at]), whole([at + size // 2]), whole([1]), whole([3])) for at in (0, size // 2))
    turned = op.concat([op.multiply(high, np.float32(-1)), low], 3)
    return op.add(op.multiply(x, cos), op.multiply(turned, sin))


def repeated(x: Any, shape: Any, keys: int, times: int, size: int) -> Any:
    """[n, keys, t, size] -> [n, keys * times, t, size], each head ``times`` times in a row."""
    if times == 1:
        return x
    n, t = (op.gather(shape, whole([i]), whole(0)) for i in (0, 1))
    target = op.concat([n, whole([keys, times]), t, whole([size])], 0)
    return op.reshape(
        op.broadcast(op.unsqueeze(x, whole(2)), target, "BIDIRECTIONAL"), whole([0, keys * times, -1, size]), True
    )
