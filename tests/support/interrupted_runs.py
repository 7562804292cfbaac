"""Batch runs in child processes that are killed at random moments, or that write to a full disk.

    python -m tests.support.interrupted_runs killed CHECKPOINT INPUT SEED
    python -m tests.support.interrupted_runs decided CHECKPOINT INPUT SEED
    python -m tests.support.interrupted_runs full CHECKPOINT INPUT CATALOG

Runs in an empty working directory and ends with an AssertionError where a run does not resume to byte-identical output; in
"decided", each run has other options than the one before, whose coefficients it uses. The engine is loaded once, before the
first fork, so that kills hit the run itself.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from p2l_engine import Engine, Router
from p2l_engine.batch import BatchConfig, run
from tests.support.catalogs import catalog

KILLS = 20
ROWS = 24  # per part
SCOPES = ("prompt", "batch")
DECISIONS: tuple[dict[str, Any], ...] = (
    {},
    {"budget": 2.0},
    {"keep": ["id"]},
    {"max_share": {"beta": 0.2}, "source": False},
    {"split_by": "model", "write_as": "openai-batch"},
    {"split_by": "model", "format": "csv"},
    {"format": "jsonl", "budget": 1.2},
)
LOG = Path("log")


def config(given: str, output: str, scope: str, **more: Any) -> BatchConfig:
    return BatchConfig([given], output, **{"budget": 1.5, "budget_scope": scope, "rows_per_part": ROWS} | more)


def forked(work: Callable[[], int]) -> int:
    """The process id of a child that does the work, exits with its result and writes its errors to the log."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        code = work()
    except OSError as error:
        print(error, file=sys.stderr)
        code = 2
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def routed(router: Router, batch: BatchConfig) -> int:
    run(router, batch)
    return 0


def child_run(router: Router, given: str, output: str, scope: str, **more: Any) -> int:
    return forked(lambda: routed(router, config(given, output, scope, **more)))


def killed(router: Router, given: str, scope: str, rng: random.Random) -> None:
    """Kills runs at random moments and resumes them; sometimes lets one finish and starts again."""
    whole_folder, out = Path(f"whole-{scope}"), Path(f"out-{scope}")
    start = time.monotonic()
    assert exit_code(child_run(router, given, str(whole_folder), scope)) == 0, LOG.read_text()
    longest = time.monotonic() - start
    whole, kills, finished = contents(whole_folder), 0, 0
    while kills < KILLS:
        child = child_run(router, given, str(out), scope)
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        code = exit_code(child)
        assert code in (0, -signal.SIGKILL), LOG.read_text()
        kills += code != 0
        assert all(name == "_SUCCESS" or name.startswith("part-") for name in (contents(out) if out.exists() else {}))
        if code == 0 or rng.random() < 0.2:
            assert exit_code(child_run(router, given, str(out), scope)) == 0, LOG.read_text()
            assert contents(out) == whole, "the output differs from that of an uninterrupted run"
            for folder in (out, out.with_suffix(".run")):
                shutil.rmtree(folder)
            finished += 1
    assert exit_code(child_run(router, given, str(out), scope)) == 0, LOG.read_text()
    assert contents(out) == whole, "the output differs from that of an uninterrupted run"
    print(f"{scope}: {kills} kills, {finished + 1} runs to the end, {len(whole)} files, {longest:.1f} s uninterrupted")


def decided(router: Router, given: str, scope: str, rng: random.Random) -> None:
    """Kills runs at random moments, and goes on with other options each time."""
    wholes, out = [], Path(f"decided-{scope}")
    for i, more in enumerate(DECISIONS):
        start = time.monotonic()
        assert exit_code(child_run(router, given, f"whole-{scope}-{i}", scope, **more)) == 0, LOG.read_text()
        longest = time.monotonic() - start
        wholes.append(contents(Path(f"whole-{scope}-{i}")))
    kills = finished = 0
    while kills < KILLS:
        which = rng.randrange(len(DECISIONS))
        child = child_run(router, given, str(out), scope, **DECISIONS[which])
        time.sleep(rng.uniform(0, 0.7 * longest))
        os.kill(child, signal.SIGKILL)
        code = exit_code(child)
        assert code in (0, -signal.SIGKILL), LOG.read_text()
        kills += code != 0
        found = contents(out) if out.exists() else {}
        assert all(name == "_SUCCESS" or name.startswith(("part-", "errors-")) for name in found), sorted(found)
        if "_SUCCESS" in found:
            assert found in wholes, "an output that is marked as complete is of no one run"
        if code == 0 or rng.random() < 0.3:
            which = rng.randrange(len(DECISIONS))
            assert exit_code(child_run(router, given, str(out), scope, **DECISIONS[which])) == 0, LOG.read_text()
            assert contents(out) == wholes[which], "the output differs from that of a new run"
            finished += 1
    print(f"{scope}: {kills} kills between {len(DECISIONS)} kinds of decisions, {finished} runs to the end")


def full_disk(router: Router, given: str, scope: str, command: Sequence[str]) -> None:
    """Runs on a disk that is too small, which grows until a run succeeds. The first attempt goes through the command line."""
    whole_folder, disk = Path(f"whole-{scope}"), Path(f"disk-{scope}")
    out = disk / "out"
    assert exit_code(child_run(router, given, str(whole_folder), scope)) == 0, LOG.read_text()
    whole, failures, size = contents(whole_folder), 0, 16
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(disk)], check=True)
    child = forked(lambda: through_command([*command, "--budget-scope", scope, "-o", str(out)]))
    while (code := exit_code(child)) != 0:
        log = LOG.read_text()
        assert code == 2, (code, log)
        assert "No space left on device" in log, log
        assert "Traceback" not in log, log
        for name, data in (contents(out) if out.is_dir() else {}).items():
            assert name.startswith("part-"), name
            assert not name.startswith("part-") or data == whole[name], f"{name} is not whole"
        failures, size = failures + 1, size + 24
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
        child = child_run(router, given, str(out), scope)
    assert contents(out) == whole, "the output differs from that of an uninterrupted run"
    assert failures >= 3, failures
    other, again = Path(f"other-{scope}"), 0
    assert exit_code(child_run(router, given, str(other), scope, budget=3.0, coefficients="float32")) == 0, LOG.read_text()
    while (code := exit_code(child_run(router, given, str(out), scope, budget=3.0, coefficients="float32"))) != 0:
        assert "No space left on device" in LOG.read_text(), LOG.read_text()
        again, size = again + 1, size + 24
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
    assert contents(out) == contents(other), "the output differs from that of a new run"
    print(f"{scope}: {failures} times full, and {again} times while it was decided again, at last {size} KiB")


def through_command(arguments: Sequence[str]) -> int:
    from p2l_engine import cli

    return cli.run(["batch", *arguments])


def main() -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    kind, checkpoint, given, last = sys.argv[1:]
    router = Router(Engine.from_pretrained(checkpoint, "cpu", torch.float32), catalog())
    options = [
        given, "--checkpoint", checkpoint, "--device", "cpu", "--dtype", "float32", "--catalog", last, "--budget", "1.5",
        "--rows-per-part", str(ROWS),
    ]  # fmt: skip
    for scope in SCOPES:
        run(router, config(given, f"first-{scope}", scope))  # what a first run imports is imported before the forks
        if kind in ("killed", "decided"):
            {"killed": killed, "decided": decided}[kind](router, given, scope, random.Random(f"{last} {scope}"))
        else:
            full_disk(router, given, scope, options)


if __name__ == "__main__":
    main()
