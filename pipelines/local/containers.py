"""Runs the steps in their images on this machine with KFP's DockerRunner, and adds what that lacks.

The containers run without root, without capabilities and with a read-only file system. The output folder and the local paths in
the configuration are mounted at the same paths as outside. KFP's runner ignores a container's exit status, treats a container
that ends very quickly as successful and stops no containers when it is stopped itself. `ContainerRunner.run_container`
therefore replaces its innermost function (`third_party/kfp.py`).
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mixtune.components.config import Config
from mixtune.components.shared.checkpoints.store import CHECKPOINT_DIR, folder_of, is_url
from mixtune.components.shared.config import EMBEDDED
from mixtune.components.shared.data.data_sets import HUB
from mixtune.components.shared.data.sources import named_sources
from mixtune.components.shared.errors import RefusedError, UnreachableError, first_line
from mixtune.components.shared.outcome import EXIT_STATUS, Outcome, load_outcomes
from mixtune.components.shared.running.context import started_titles
from mixtune.components.shared.task_name import STEPS

from ..images import Images, images, source_digest
from ..third_party.kfp import run_containers_with

if TYPE_CHECKING:
    from docker.models.containers import Container

    from docker import DockerClient

HOME = "/home/mixtune"
USER = 1001
"""User of the containers if the caller is root; the images' own user."""
GRACE_SECONDS = 27  # less than the 30 s that the command waits; enough for a training
KILLED = 128 + signal.SIGKILL
# Variables that steps may need from the caller's environment. Paths are excluded, since they do not exist in a container.
_PASSED_ON = ("MIXTUNE_", "MLFLOW_", "HF_", "FSSPEC_", "AWS_", "OMP_", "MKL_", "OPENBLAS_", "TOKENIZERS_", "CUBLAS_")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
_OWN_PATHS = ("MIXTUNE_", "MLFLOW_")


@dataclass(frozen=True)
class Containers:
    """Settings of the containers of a run.

    Attributes:
        image_prefix: registry and folder of the images; None uses those of `images.json`.
        tag: tag of the images; None uses that of `images.json`.
        memory: memory limit of each container, such as `4g`; None for no limit.
        network: Docker network. With `host`, addresses are the same as outside.
    """

    image_prefix: str | None = None
    tag: str | None = None
    memory: str | None = None
    network: str = "host"

    def __post_init__(self) -> None:
        if self.memory is not None and not re.fullmatch(r"[1-9]\d*[bkmgBKMG]?", self.memory):
            raise RefusedError(f"--memory: must be a number with b, k, m or g, such as 4g, found {self.memory}")

    @property
    def images(self) -> Images:
        return images(self.image_prefix, self.tag)

    def check(self) -> str:
        """Checks that Docker and the images are available.

        Returns:
            A digest of the images, for the cache key.

        Raises:
            UnreachableError: if no Docker engine answers.
            RefusedError: if an image is missing or contains other code.
        """
        from docker.errors import ImageNotFound

        digest = hashlib.sha256()
        problems = []
        with engine() as client:
            for step in STEPS:
                name = self.images.of(step)
                try:
                    image = client.images.get(name)
                except ImageNotFound:
                    problems.append(name)
                    continue
                code = image.labels.get("mixtune.code")
                if code != source_digest():
                    raise RefusedError(
                        f"--runner docker: {name} contains different code than this installation; rebuild it with `make images`"
                    )
                digest.update("\n".join(image.attrs["RootFS"]["Layers"]).encode())
        if problems:
            raise RefusedError(
                f"--runner docker: not on this machine: {', '.join(problems)}; build them with `make images`, "
                "or name others with --image-prefix and --tag"
            )
        return digest.hexdigest()[:16]

    def spec(self, config: Config, output: Path, environment: Mapping[str, str]) -> dict[str, Any]:
        """Returns the JSON specification for the process that runs the DAG. Creates the folders that it names.

        Args:
            config: configuration of the run.
            output: the output folder.
            environment: environment of steps outside of containers.
        """
        home = output / ".mixtune" / "home"
        for folder in (home / "tmp", output / ".mixtune" / "artifacts"):
            folder.mkdir(parents=True, exist_ok=True)  # the engine would create them with root as the owner
        writable = {str(output): str(output), str(home): HOME}
        writable |= {path: path for path in _written(environment) if not Path(path).is_relative_to(output)}
        inside = {"TMPDIR": f"{HOME}/tmp"}
        hub = Path(environment.get("HF_HOME") or Path("~/.cache/huggingface").expanduser())
        if (
            os.getuid() != 0 and hub.is_dir()
        ):  # models that are already downloaded, at the path where publishing looks for them
            writable[str(hub)] = inside["HF_HOME"] = str(hub)
        readable = [path for path in _read(config) if not Path(path).is_relative_to(output)]
        for path in writable:
            if os.getuid() == 0 and Path(path).is_relative_to(output):
                _let_group_write(Path(path))
        return asdict(self) | {
            "writable": writable,
            "readable": readable,
            "environment": inside,
            "output": str(output),
            "directory": str(Path.cwd()),
        }


@contextmanager
def engine() -> Iterator[DockerClient]:
    """Connects to the Docker engine.

    Raises:
        UnreachableError: if it does not answer.
    """
    from docker.errors import DockerException

    import docker

    try:
        client = docker.from_env()
        client.ping()
    except DockerException as error:
        where = os.environ.get("DOCKER_HOST", "its usual socket")
        raise UnreachableError(
            f"--runner docker: no Docker engine answers at {where} ({first_line(error)}); start it, or set DOCKER_HOST, "
            "or run without --runner docker"
        ) from None
    try:
        yield client
    finally:
        client.close()


@dataclass
class ContainerRunner:
    """Runs and tracks the containers of a run for KFP.

    Attributes:
        run: id of the pipeline run.
        output: the output folder.
        memory: memory limit of each container, for messages.
        progress: file with the started steps.
        outcomes: folder of the outcome records.
    """

    run: str
    output: str
    memory: str | None
    progress: Path
    outcomes: Path
    _stopping: bool = field(default=False, init=False)

    def run_container(
        self, client: DockerClient, image: str, command: list[str], volumes: Mapping[str, Any], **arguments: Any
    ) -> int:
        """Runs a container in place of KFP's function. Always returns the container's exit status."""
        found = client.images.get(image)
        named = next(iter(found.attrs["RepoDigests"] or []), f"{image}@{found.id}")
        environment = {**arguments.pop("environment", {}), "MIXTUNE_IMAGE": named}
        container = client.containers.create(
            image,
            command,
            volumes=volumes,
            environment=environment,
            entrypoint=[],  # KFP's command is complete; the image's entrypoint is for manual use
            labels={"mixtune.run": self.run, "mixtune.output": self.output},
            **arguments,
        )
        try:
            container.start()
            for line in container.logs(stream=True, follow=True):
                print(line.decode(errors="replace"), end="", flush=True)
            status = int(container.wait()["StatusCode"])
            container.reload()
            if status and not self._stopping:
                self._record(image, status, bool(container.attrs["State"].get("OOMKilled")))
        finally:
            with suppress(Exception):  # already removed
                container.remove(force=True)
        return status

    def _record(self, image: str, status: int, out_of_memory: bool) -> None:
        """Writes an outcome record for a step that was killed before it could."""
        ended = {outcome.title for outcome in load_outcomes(self.outcomes)}
        step = image.rsplit("mixtune-", 1)[-1].partition("@")[0].partition(":")[0]
        started = [title for title in started_titles(self.progress) if title not in ended]
        if not started and not out_of_memory and status != KILLED:
            return  # the step has written its own record
        title = started[-1] if started else step
        if out_of_memory or (status == KILLED and self.memory):
            sentence = (
                f"its container was killed because it exceeded its memory limit of {self.memory} (--memory); raise the limit "
                "or lower micro_batch_size"
                if self.memory
                else "its container was killed because the machine ran out of memory; add memory or lower micro_batch_size"
            )
        else:
            sentence = f"its container exited with status {status} and left no outcome record; see KFP's log"
        Outcome(title=title, kind="failed", sentences=[sentence]).save(self.outcomes)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Stops this run's containers, first with SIGTERM, and then this process. Handles SIGTERM."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._stopping = True
        with suppress(Exception), engine() as client:
            _end(client, f"mixtune.run={self.run}", GRACE_SECONDS)
        os._exit(EXIT_STATUS["terminated"])


def docker_runner(spec: Mapping[str, Any], run: str, progress: Path, outcomes: Path) -> Any:
    """Creates KFP's runner for a run, in the process that runs the DAG.

    Args:
        spec: result of `Containers.spec`.
        run: id of the pipeline run.
        progress: file with the started steps.
        outcomes: folder of the outcome records.
    """
    from docker.types import Mount
    from kfp import local

    container_runner = ContainerRunner(run, spec["output"], spec["memory"], progress, outcomes)
    run_containers_with(container_runner.run_container)
    signal.signal(signal.SIGTERM, container_runner.stop)
    with engine() as client:
        # Remove containers of an earlier run in this folder that was killed without cleanup.
        _end(client, f"mixtune.output={spec['output']}", 0)
    if os.getuid() == 0:
        os.umask(0o002)  # new files must be writable for the containers, which run in root's group
    mounts = [Mount(target, source, type="bind") for source, target in spec["writable"].items()]
    mounts += [Mount(path, path, type="bind", read_only=True) for path in spec["readable"]]
    limits = {"mem_limit": spec["memory"], "memswap_limit": spec["memory"]} if spec["memory"] else {}
    return local.DockerRunner(
        user=f"{os.getuid() or USER}:0",
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        tmpfs={"/tmp": "mode=1777"},
        network_mode=spec["network"],
        mounts=mounts,
        working_dir=spec["directory"],
        environment={
            **_environment(os.environ),
            **spec["environment"],
        },  # set here, since no file should contain credentials
        **limits,
    )


def _end(client: DockerClient, label: str, seconds: float) -> None:
    """Ends all containers with a label. SIGTERM is sent to all their processes, since shells do not forward it."""
    found: list[Container] = client.containers.list(all=True, filters={"label": label})
    for container in found:
        with suppress(Exception):
            container.exec_run(["sh", "-c", "kill -s TERM -- -1"])
        with suppress(Exception):
            container.kill("SIGTERM")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and client.containers.list(filters={"label": label}):
        time.sleep(0.2)
    for container in found:
        with suppress(Exception):
            container.remove(force=True)


def _environment(outside: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables to pass to the containers."""
    return {
        name: value
        for name, value in outside.items()
        if name in _PROXIES
        or (
            (name.startswith(_PASSED_ON) and (name.startswith(_OWN_PATHS) or not value.startswith(("/", "~"))))
            and name != "MIXTUNE_IMAGE"
        )
    }


def _read(config: Config) -> list[str]:
    """Returns the local files and folders in the configuration."""
    sources = [one.path for stream in (config.data.pretrain, config.data.finetune) for one in named_sources(stream)]
    paths = [_fixed_part(source.removeprefix("file://")) for source in sources if _is_path(source)]
    named = [config.model.base, config.evaluate.champion or "", config.evaluate.lm_eval.tasks_folder or ""]
    paths += [Path(name) for name in named if name and "://" not in name and Path(name).is_dir()]
    return sorted({os.path.abspath(path) for path in paths if path.exists()})  # noqa: PTH100 - keeps links as they are named


def _is_path(source: str) -> bool:
    return source != EMBEDDED and not source.startswith(HUB) and ("://" not in source or source.startswith("file://"))


def _fixed_part(pattern: str) -> Path:
    """Returns the folder above the first wildcard; without a wildcard, the path itself."""
    parts = Path(pattern).parts
    wildcards = (number for number, part in enumerate(parts) if re.search(r"[*?\[]", part))
    fixed = parts[: next(wildcards, len(parts))]
    return Path(*fixed) if fixed else Path()


def _written(environment: Mapping[str, str]) -> list[str]:
    """Returns the folders outside of the output folder that the steps write to."""
    paths = []
    place = environment.get(CHECKPOINT_DIR, "")
    if place and not is_url(place):
        paths.append(folder_of(place))
    uri = environment.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("sqlite:///"):
        paths.append(Path(uri.removeprefix("sqlite:///")).parent)
    elif uri.startswith(("file://", "/")):
        paths.append(Path(uri.removeprefix("file://")))
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
    return [str(path.absolute()) for path in paths]


def _let_group_write(folder: Path) -> None:
    """Makes a folder writable for its group. If the caller is root, the containers run as another user in root's group."""
    for path in [folder, *folder.rglob("*")]:
        with suppress(OSError):
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(mode | 0o060 | (0o010 if mode & 0o100 else 0))
