"""ONNX Runtime's CPU provider: the decoder as a graph of its own operations, as its generator of language models writes it.

Fused operations (skip connection with RMSNorm, grouped-query attention with rotary embedding), all graph optimisations, one
pool of threads that spins. Precisions: float32; int8: weights with a scale for each row, activations with one scale for all,
rounded while it runs (DynamicQuantizeMatMul: what quantize_dynamic's graphs become), with weights of 7 bits on CPUs
without VNNI, whose sums of 16 bits would saturate, as its documentation advises; int8 blocks and int4 blocks: weights with a
scale for each 32 in a row, products in int8 (MatMulNBits, accuracy_level 4). It has no bfloat16 on CPUs. Batches run one after
the other on all threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as rt
from onnx import TensorProto, helper, numpy_helper

from bench.machine import extensions
from bench.peers.batches import Batch, padded
from bench.peers.decoder import Decoder, Floats, nibbles, rounded
from p2l_engine.backbone.weights import Linear

OWN = "com.microsoft"  # the domain of its own operations
BLOCK = 32


def precisions() -> tuple[str, ...]:
    """All."""
    return "float32", "int8", "int8 blocks", "int4 blocks"


class OnnxRuntime:
    """See Peer."""

    name = "onnxruntime"

    def __init__(self, decoder: Decoder, precision: str, threads: int, file: Path) -> None:
        self.precision, self.decoder = precision, decoder
        options = rt.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.graph_optimization_level = rt.GraphOptimizationLevel.ORT_ENABLE_ALL
        self.session = rt.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(self, batches: Sequence[Batch]) -> list[Floats]:
        """See Peer."""
        out = []
        for batch in batches:
            ids, last = padded(batch)
            (hidden,) = self.session.run(None, {"ids": ids, "last": last})
            out.append(self.decoder.outputs(hidden))
        return out


def start(decoder: Decoder, precision: str, threads: int, throughput: bool, folder: Path) -> OnnxRuntime:
    """The peer, whose settings are the same for latency and throughput; its graph is written on first use."""
    file = folder / f"{precision.replace(' ', '-')}.onnx"
    if not file.exists():
        graph = Graph(decoder, precision).model()
        onnx.save_model(graph, file, save_as_external_data=True, location=f"{file.name}.data")
    return OnnxRuntime(decoder, precision, threads, file)


class Graph:
    """Token ids [n, t] and the index of each prompt's last one [n] -> hidden states [n, D] after the final norm."""

    def __init__(self, decoder: Decoder, precision: str) -> None:
        self.decoder, self.precision = decoder, precision
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def model(self) -> Any:
        """The ONNX model."""
        c, layers = self.decoder.config, self.decoder.layers
        for name, table in zip(("cos", "sin"), self.decoder.rotations(), strict=True):
            self.constant(name, table)
        self.node("Cast", ["last"], ["lengths"], to=TensorProto.INT32)  # attention expects them less one
        self.node("Shape", ["ids"], ["tokens64"], start=1, end=2)
        self.node("Cast", ["tokens64"], ["tokens"], to=TensorProto.INT32)
        self.node("Gather", [self.constant("embedding", self.decoder.embedding), "ids"], ["x"])
        x, delta = "x", ""
        for i, layer in enumerate(layers):
            x, normed = self.norm(f"{i}.attention_norm", x, delta, layer.attention_norm.numpy())
            qkv = self.product(f"{i}.qkv", normed, layer.qkv)
            attended = [f"{i}.attended", f"{i}.keys", f"{i}.values"]
            sizes = {"num_heads": c.num_attention_heads, "kv_num_heads": c.num_key_value_heads, "do_rotary": 1}
            given = [qkv, "", "", "", "", "lengths", "tokens", "cos", "sin"]
            self.node("GroupQueryAttention", given, attended, OWN, **sizes)
            x, normed = self.norm(f"{i}.mlp_norm", x, self.product(f"{i}.out", attended[0], layer.out), layer.mlp_norm.numpy())
            gate, up = f"{i}.gate", f"{i}.up"
            self.node("Split", [self.product(f"{i}.gate_up", normed, layer.gate_up)], [gate, up], axis=-1, num_outputs=2)
            self.node("Sigmoid", [gate], [f"{gate}.sigmoid"])
            self.node("Mul", [gate, f"{gate}.sigmoid"], [f"{gate}.silu"])
            self.node("Mul", [f"{gate}.silu", up], [f"{i}.inner"])
            delta = self.product(f"{i}.down", f"{i}.inner", layer.down)
        self.node("Add", [x, delta], ["sum"])
        self.node("Unsqueeze", ["last", self.constant("one", np.array([1]))], ["index"])
        self.node("GatherND", ["sum", "index"], ["ends"], batch_dims=1)
        _, hidden = self.norm("hidden", "ends", "", self.decoder.norm)
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT64, shape)
            for name, shape in (("ids", ["n", "t"]), ("last", ["n"]))
        ]
        outputs = [helper.make_tensor_value_info(hidden, TensorProto.FLOAT, ["n", c.hidden_size])]
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(OWN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def node(self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0], domain=domain, **attributes))

    def constant(self, name: str, values: npt.NDArray[Any]) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def norm(self, name: str, x: str, delta: str, weight: Floats) -> tuple[str, str]:
        """x plus delta where there is one, and RMSNorm of the sum."""
        given, eps = self.constant(f"{name}.weight", weight), self.decoder.config.rms_norm_eps
        if not delta:
            self.node("SimplifiedLayerNormalization", [x, given], [name], axis=-1, epsilon=eps)
            return x, name
        outputs = [name, "", "", f"{name}.sum"]
        self.node("SkipSimplifiedLayerNormalization", [x, delta, given], outputs, OWN, epsilon=eps)
        return outputs[-1], name

    def product(self, name: str, x: str, linear: Linear) -> str:
        """x times the weight, plus the bias."""
        weight: Floats = linear.weight.t().numpy()
        if self.precision == "float32":
            self.node("MatMul", [x, self.constant(f"{name}.weight", weight.T)], [name])
        elif self.precision == "int8":
            values, scales = rounded(weight, weight.shape[1], 8 if "VNNI" in extensions() else 7)
            parts: dict[str, npt.NDArray[Any]] = {
                "weight": values[:, 0].T,
                "scales": scales.reshape(-1),
                "zeros": np.zeros(len(weight), np.int8),
            }
            self.node("DynamicQuantizeMatMul", [x, *self._constants(name, parts)], [name], OWN)
        else:
            bits = 8 if self.precision == "int8 blocks" else 4
            values, scales = rounded(weight, BLOCK, bits)
            shifted = values.view(np.uint8) ^ 128 if bits == 8 else nibbles(values) ^ 0x88  # from two's complement to an offset
            sizes = {"K": weight.shape[1], "N": len(weight), "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
            parts = {"weight": shifted, "scales": scales[..., 0]}
            self.node("MatMulNBits", [x, *self._constants(name, parts)], [name], OWN, **sizes)
        if linear.bias is None:
            return name
        self.node("Add", [name, self.constant(f"{name}.bias", linear.bias.numpy())], [f"{name}.sum"])
        return f"{name}.sum"

    def _constants(self, name: str, parts: dict[str, npt.NDArray[Any]]) -> list[str]:
        return [self.constant(f"{name}.{part}", values) for part, values in parts.items()]
