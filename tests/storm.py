"""Kills a training at random moments, starting it again each time, and compares what comes out with an undisturbed one.

    python tests/storm.py --kills 30 --seed 1 [--processes 2] [--parallelism fsdp] [--sigterm | --one]

The last line is `30 kills, bitwise equal`; the exit status is 1 where it is not. Half of the kills wait for a checkpoint
that is just being written. With `--one`, one of the processes is killed, and the others are left to end by themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from mixtune.components.mixed.config import MixedCandidate, MixedStep, MixedTraining
from mixtune.components.shared.config import Budget
from tests.components.stages import Stages
from tests.pipelines import forked

STEPS_A_KILL = 16
GRACE_SECONDS = 30.0
PATIENCE_SECONDS = 180.0


class Storm:
    """One training, killed again and again.

    Args:
        folder: for data, models and checkpoints.
        kills: how often it is killed.
        seed: of the moments.
        processes: of the training.
        parallelism: how they share it.
        number: the signal.
        one: whether one process of the training is killed instead of all.
    """

    def __init__(
        self,
        folder: Path,
        kills: int,
        seed: int,
        processes: int,
        parallelism: str,
        number: signal.Signals,
        one: bool = False,
    ) -> None:
        self.folder, self.kills, self.processes, self.number = folder, kills, processes, number
        self.one = one
        self.draw = random.Random(seed)
        self.stages = Stages(folder)
        self.stages.pretrain()
        steps = max(STEPS_A_KILL * kills, 40)
        options = {
            "steps": steps,
            "batch_size": 8,
            "micro_batch_size": 1,
            "learning_rate": 1e-3,
            "precision": "float32",
            "parallelism": parallelism,
        }
        training = MixedTraining.model_validate(options | {"log_every_steps": 5, "checkpoint_steps": 2})
        # A budget, since it takes two trainings, each of which can be cut off.
        self.candidate = MixedCandidate(id="mixed-budget-0.05", forgetting_budget=0.05, budget=Budget(max_trainings=2))
        self.config = MixedStep(seed=0, max_length=32, mixed=training)

    def start(self, output: str, checkpoints: str) -> BaseProcess:
        """The step in a process (group) of its own."""
        names = {"start": "pretrained", "pretrain_data": "text", "finetune_data": "labels", "metrics": f"{output}.json"}
        given = [f"{name}={self.folder / path}" for name, path in (names | {"model": output}).items()]
        command = ["step", "mixed", "--config", self.config.to_json()]
        command += [word for one in given for word in ("--artifact", one)]
        command += ["--parameter", f"candidate={self.candidate.to_json()}"]
        environment = {
            "MIXTUNE_CHECKPOINT_DIR": str(self.folder / checkpoints),
            "MIXTUNE_PROCESSES": str(self.processes),
            "OMP_NUM_THREADS": "1",
            "MLFLOW_TRACKING_URI": "",
        }
        return forked.start(command, self.folder, environment, self.folder / f"{output}.log")

    def kill_one(self) -> str | None:
        """Starts the training and kills it; a sentence where it ended by itself or did not end as it should."""
        process = self.start("killed", "checkpoints")
        while_saving = self.draw.random() < 0.5
        wanted, delay = self.draw.randint(0, 4), self.draw.random() * 0.05
        root = self.folder / "checkpoints"
        seen = {path.name for path in root.glob("*/step-*")}
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and process.is_alive():
            new = {path.name for path in root.glob("*/step-*")} - seen
            if len(new) > 2 or len(new) >= min(wanted, 2):  # two are kept, so more are never seen at once
                seen |= new
                wanted -= len(new)
                if wanted <= 0 and (not while_saving or any(root.glob("*/aside-*/*.safetensors"))):
                    break
            time.sleep(0.0005)
        if not while_saving:
            time.sleep(delay)
        if not process.is_alive():
            return f"the training ended by itself with status {process.exitcode}"
        assert process.pid
        started = time.monotonic()
        if self.number == signal.SIGTERM:
            process.terminate()
            status = _status_of(process, GRACE_SECONDS + 30)
            if status != 128 + signal.SIGTERM or time.monotonic() - started > GRACE_SECONDS:
                return f"SIGTERM: status {status} after {time.monotonic() - started:.0f} s"
        elif self.one:
            while len(ranks := _ranks_of(process.pid)) < self.processes and process.is_alive():
                time.sleep(0.01)
            self.draw.choice(ranks).kill()
            if _status_of(process, PATIENCE_SECONDS) != 1:
                return f"a killed process: status {process.exitcode} after {time.monotonic() - started:.0f} s"
        else:
            os.killpg(process.pid, self.number)
            process.join()
        return None

    def run(self) -> int:
        """All of it.

        Returns:
            Exit status.
        """
        if _status_of(self.start("undisturbed", "others")) != 0:
            return self.give_up("the undisturbed training failed", "undisturbed")
        for number in range(self.kills):
            problem = self.kill_one()
            if problem is not None:
                return self.give_up(f"kill {number + 1}: {problem}", "killed")
            steps = sorted(path.name for path in (self.folder / "checkpoints").glob("*/step-*"))
            print(f"kill {number + 1}: {steps[-1] if steps else 'no checkpoint yet'}", flush=True)  # noqa: T201
        if _status_of(self.start("killed", "checkpoints")) != 0:
            return self.give_up("the last attempt failed", "killed")
        differing = self.compare()
        verdict = f"{self.kills} kills, " + (f"different: {', '.join(differing)}" if differing else "bitwise equal")
        print(verdict)  # noqa: T201
        return 1 if differing else 0

    def compare(self) -> list[str]:
        """What differs between the two: weights, curves."""
        differing = []
        for file in sorted((self.folder / "undisturbed").glob("*.safetensors")):
            other = self.folder / "killed" / file.name
            if _digest(file) != _digest(other):
                differing.append(file.name)
        curves = [_curve(self.folder / name / "training.jsonl") for name in ("undisturbed", "killed")]
        return differing + ([] if curves[0] == curves[1] else ["training.jsonl"])

    def give_up(self, problem: str, log: str) -> int:
        """Shows the log's end."""
        print((self.folder / f"{log}.log").read_text(encoding="utf-8", errors="replace")[-3000:])  # noqa: T201
        print(problem)  # noqa: T201
        return 1


def _status_of(process: BaseProcess, seconds: float | None = None) -> int | None:
    """Waits until a process ends; its exit status, None where it goes on."""
    process.join(seconds)
    return process.exitcode


def _ranks_of(pid: int) -> list[psutil.Process]:
    """The processes of a training that torchrun started."""
    found = []
    with contextlib.suppress(psutil.Error):
        for one in psutil.Process(pid).children(recursive=True):
            if "mixtune.components.shared.running.processes" in one.cmdline() and "RANK" in one.environ():
                found.append(one)
    return found


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "missing"


def _curve(file: Path) -> list[dict[str, float]]:
    """All that is no speed."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def main() -> int:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--parallelism", default="ddp")
    parser.add_argument("--one", action="store_true")
    parser.add_argument("--sigterm", action="store_true", help="end it by SIGTERM instead of SIGKILL")
    given = parser.parse_args()
    number = signal.SIGTERM if given.sigterm else signal.SIGKILL
    with tempfile.TemporaryDirectory() as folder:
        return Storm(Path(folder), given.kills, given.seed, given.processes, given.parallelism, number, given.one).run()


if __name__ == "__main__":
    sys.exit(main())
