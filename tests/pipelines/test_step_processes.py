"""Steps in processes that are forked from a server: each has its own process, and ends as if it had been started alone."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from mixtune.pipelines.local import step_processes
from mixtune.pipelines.local.step_processes import StepServer, StepServers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere KFP starts a process for each step")

Run = Callable[..., int]


@pytest.fixture(scope="module")
def server() -> Iterator[StepServer]:
    server = StepServer(["kfp.dsl.executor_main", "a_module_that_does_not_exist"], ["torch"])
    yield server
    server.close()


@pytest.fixture
def run(server: StepServer, tmp_path: Path) -> Run:
    def run_body(body: str, environment: dict[str, str] | None = None, threads: int | None = None) -> int:
        source = "from kfp import dsl\ndef component():\n" + textwrap.indent(textwrap.dedent(body), "    ")
        output = {"outputs": {"outputFile": str(tmp_path / "kfp.json")}}
        arguments = ["--executor_input", json.dumps(output), "--function_to_execute", "component"]
        request: dict[str, Any] = {"source": source, "arguments": arguments}
        return server.run({**request, "environment": environment or {}, "threads": threads})

    return run_body


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("pass", 0),
        ("raise SystemExit(2)", 2),
        ("raise SystemExit('a sentence')", 1),
        ("raise ValueError('no traceback ends the server')", 1),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", 1),
    ],
)
def test_a_step_ends_with_its_own_status(run: Run, body: str, status: int) -> None:
    assert run(body) == status


def test_steps_share_nothing(run: Run, tmp_path: Path) -> None:
    body = f"""
        import json, os, sys
        seen = [os.getpid(), os.environ.get("OF_ONE_STEP"), hasattr(sys, "of_one_step")]
        os.environ["OF_ONE_STEP"] = "left behind"
        sys.of_one_step = True
        with open({str(tmp_path / "seen")!r}, "a") as file:
            file.write(json.dumps(seen) + "\\n")
    """
    assert run(body, {"OF_ONE_STEP": "given"}) == 0
    assert run(body) == 0
    first, second = (json.loads(line) for line in (tmp_path / "seen").read_text().splitlines())
    assert first[0] != second[0]
    assert first[1:] == ["given", False]
    assert second[1:] == [None, False]


def test_exit_handlers_run_and_nothing_stays_behind(run: Run, tmp_path: Path) -> None:
    body = f"""
        import atexit, pathlib, sys
        atexit.register(pathlib.Path({str(tmp_path / "ended")!r}).touch)
        pathlib.Path({str(tmp_path / "folder")!r}).write_text(str(pathlib.Path(sys.argv[2]).parent))
    """
    assert run(body) == 0
    assert (tmp_path / "ended").exists()
    assert not Path((tmp_path / "folder").read_text()).exists()


def test_a_server_with_torch_is_safe_to_fork(run: Run, tmp_path: Path) -> None:
    """No Python thread, no CUDA context and no pool of torch exists before the fork."""
    body = f"""
        import sys, threading, torch
        assert threading.active_count() == 1
        assert not torch.cuda.is_initialized()
        assert torch.get_num_threads() == 1
        torch.set_num_threads(2)
        left = torch.arange(2.0**16).reshape(256, 256)
        open({str(tmp_path / "sum")!r}, "w").write(str((left @ left.T).trace().item()))
    """
    assert run(body, threads=1) == 0
    assert float((tmp_path / "sum").read_text()) == pytest.approx(sum(i * i for i in range(2**16)), rel=1e-5)


def test_several_steps_run_at_once(run: Run, tmp_path: Path) -> None:
    """Each waits for the other's file."""
    body = """
        import pathlib, time
        pathlib.Path({mine!r}).touch()
        while not pathlib.Path({other!r}).exists():
            time.sleep(0.01)
    """
    names = [str(tmp_path / "one"), str(tmp_path / "two")]
    bodies = [body.format(mine=mine, other=other) for mine, other in (names, names[::-1])]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, bodies)) == [0, 0]


def test_a_server_ends_with_the_process_that_started_it() -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        server = StepServer(["json"], [])
        branch = StepServer(["json"], [], server)
        children = psutil.Process().children(recursive=True)
        while len(children) < 2:
            children = psutil.Process().children(recursive=True)
        os.write(writer, json.dumps([child.pid for child in children]).encode())
        signal.pause()
        branch.close()
    os.close(writer)
    servers = [psutil.Process(server) for server in json.loads(os.read(reader, 100))]
    os.close(reader)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not psutil.wait_procs(servers, timeout=60)[1]


def test_the_light_server_imports_all_its_modules_and_no_torch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    modules = [*step_processes._RUNTIME, *step_processes._DATABASE, *step_processes._LIGHT]
    server = StepServer(modules, [])
    source = (
        "import sys\ndef component():\n"
        f"    assert not set({modules!r}) - set(sys.modules)\n"
        "    assert 'torch' not in sys.modules\n"
    )
    arguments = ["--executor_input", json.dumps({"outputs": {"outputFile": str(tmp_path / "kfp.json")}})]
    arguments += ["--function_to_execute", "component"]
    status = server.run({"source": source, "arguments": arguments, "environment": {}, "threads": None})
    server.close()
    assert status == 0, capfd.readouterr()


def test_the_server_with_torch_starts_with_the_first_step_that_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:9")
    monkeypatch.setattr(step_processes, "_TORCH", ("torch",))
    monkeypatch.setattr(step_processes, "_TORCH_LATER", ())
    monkeypatch.setattr(step_processes, "_LIGHT", ())
    servers = StepServers(parallel=2)

    def command(step: str) -> list[str]:
        source = (
            f"import json, os, sys\ndef {step}():\n"
            f"    threads = sys.modules['torch'].get_num_threads() if 'torch' in sys.modules else None\n"
            f"    open({str(tmp_path / step)!r}, 'w').write(json.dumps([threads, os.environ.get('GIVEN')]))\n"
        )
        executor_input = json.dumps({"outputs": {"outputFile": str(tmp_path / "kfp.json")}})
        return ["sh", "-c", "", source, "--executor_input", executor_input, "--function_to_execute", step]

    for step in ("plan", "prepare", "mixed", "pretrain"):
        assert servers.run(command(step), {"GIVEN": step}) == 0
    servers.close()
    seen = {file.name: json.loads(file.read_text()) for file in tmp_path.iterdir() if file.name != "kfp.json"}
    cores = len(os.sched_getaffinity(0))
    assert seen["plan"] == [None, "plan"]
    assert seen["prepare"] == [None, "prepare"]
    assert seen["mixed"] == [max(1, cores // 2), "mixed"]
    assert seen["pretrain"][0] >= seen["mixed"][0]
