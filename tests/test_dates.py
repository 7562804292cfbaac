"""Chat templates that read the clock: the same coefficients on any day, in the engine, in files and in training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from p2l_engine import Engine, Router, checkpoint
from p2l_engine.batch import BatchConfig, Route, run
from p2l_engine.errors import CheckpointError
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.run import train
from tests.support import tiny
from tests.support.batch_files import contents, write
from tests.support.catalogs import catalog
from tests.support.command import p2l_engine
from tests.support.training import settings

TEMPLATE = "{{ 'Today: ' + strftime_now('%Y-%m-%d') + '\n' }}" + tiny.TEMPLATE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("clock") / "checkpoint", template=TEMPLATE)


def engine(folder, **options):
    return Engine.from_pretrained(folder, device="cpu", dtype=torch.float32, **options)


def written(folder, date):
    """The same checkpoint with a date in its template's place."""
    copy = folder.parent / f"written {date}"
    if not copy.exists():
        tiny.write(copy, template=TEMPLATE.replace("strftime_now('%Y-%m-%d')", f"'{date}'"))
    return copy


def test_a_checkpoint_with_a_clock_needs_a_date(folder):
    with pytest.raises(CheckpointError, match="reads the clock .*give the date"):
        engine(folder)
    for date in ("2026-01-31", "2020-02-29"):
        pinned = engine(folder, date=date)
        expected = engine(written(folder, date)).coefficients(["hello", "you"]).theta
        np.testing.assert_array_equal(pinned.coefficients(["hello", "you"]).theta, expected)
        assert pinned.date == f"{date}T00:00:00"
    with pytest.raises(ValueError, match="date: expected a date like 2026-01-31, got '31/01/2026'"):
        engine(folder, date="31/01/2026")
    with pytest.raises(ValueError, match="date: expected none, because the chat template of .* does not read the clock"):
        engine(written(folder, "2026-01-31"), date="2026-01-31")


def test_the_date_of_training_is_the_default(folder, tmp_path):
    copy = tiny.write(tmp_path / "trained", template=TEMPLATE)
    file = copy / "training_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"date": "2025-12-24"}))
    assert engine(copy).date == "2025-12-24T00:00:00"
    assert engine(copy, date="2026-01-31").encoder.text(["a"]).startswith("Today: 2026-01-31\n")
    assert checkpoint.load(written(folder, "2026-01-31")).tokenizer.template.date is None


def test_a_run_is_resumed_only_with_its_date(folder, tmp_path):
    given = write(tmp_path / "in.parquet")

    def routed(date, name="out"):
        run(Router(engine(folder, date=date), catalog()), BatchConfig([given], str(tmp_path / name)))
        return contents(tmp_path / name)

    first = routed("2026-01-31")
    assert routed("2026-01-31") == first
    with pytest.raises(ValueError, match="date: was '2026-01-31T00:00:00', is '2026-02-01T00:00:00'"):
        routed("2026-02-01")
    step = Route(str(folder), catalog(), device="cpu", dtype="float32", date="2026-01-31")
    assert step.router.engine.date == "2026-01-31T00:00:00"


@pytest.mark.slow
def test_commands_take_a_date(folder):
    ended = p2l_engine("leaderboard", "hello", "--checkpoint", str(folder), "--device", "cpu")
    assert (ended.status, "--date 2026-01-31" in ended.message) == (2, True)
    ended = p2l_engine("info", "--checkpoint", str(folder), "--device", "cpu", "--date", "2026-01-31")
    assert ended.status == 0, ended.message


@pytest.mark.slow
def test_training_pins_a_date(tmp_path):
    config = settings(tmp_path, chat_template=TEMPLATE, num_train_epochs=1)
    with pytest.raises(ValueError, match="reads the clock .*date: in the training config"):
        train(config, max_steps=1)
    dated = train(TrainConfig.model_validate(config.model_dump() | {"date": "2026-01-31"}), max_steps=1, if_present="restart")
    assert engine(dated).encoder.text(["a"]).startswith("Today: 2026-01-31\n")
    with pytest.raises(ValueError, match="date"):
        TrainConfig.model_validate(config.model_dump() | {"date": "soon"})
