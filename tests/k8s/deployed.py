"""The tracking server as it is deployed: PostgreSQL, an S3 server, and MLflow, each started as its manifest says.

What a cluster would do is done by hand here and nothing else: addresses are put in where a Service's name stands, ConfigMaps
are files, secrets are made up, and the object store is moto's S3 server.
"""

from __future__ import annotations

import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.mlflow_server import free_port

from .manifests import Manifest, command, containers, environment, find
from .tools import postgres

BUILD = "base"
STEPS_USER = "mixtune-steps"


class Postgres:
    """PostgreSQL with the manifest's settings, first made as the image's entry point does.

    Args:
        known: the secrets.
    """

    def __init__(self, known: dict[str, dict[str, str]]) -> None:
        self._programs = postgres()
        # Not below pytest's folder, which only root may enter, as whom PostgreSQL does not run.
        self.folder = Path(tempfile.mkdtemp(prefix="mixtune-postgres-"))
        self.port = free_port()
        (self._container,) = containers(find(BUILD, "StatefulSet", "mixtune-postgres")["spec"]["template"])
        self._settings = environment(self._container, BUILD, known)
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            os.chown(self.folder, pwd.getpwnam(self._user).pw_uid, pwd.getpwnam(self._user).pw_gid)

    def make(self) -> None:
        """What the image does where the data folder is empty, then the first start."""
        password = self.folder / "password"
        password.write_text(self._settings["POSTGRES_PASSWORD"])
        password.chmod(0o644)
        options = self._settings["POSTGRES_INITDB_ARGS"].split()
        name = self._settings["POSTGRES_USER"]
        self._run("initdb", f"--pgdata={self.folder / 'data'}", f"--username={name}", f"--pwfile={password}", *options)
        password.unlink()
        self.start()
        self.sql(f"CREATE DATABASE {self._settings['POSTGRES_DB']}", "postgres")

    def start(self) -> None:
        """Starts it with the manifest's arguments and waits until it answers."""
        arguments = [
            *self._container["args"],
            "-c",
            f"unix_socket_directories={self.folder}",
            "-c",
            "listen_addresses=127.0.0.1",
        ]
        options = " ".join([*arguments, "-p", str(self.port)])
        log = self.folder / "log"
        self._run(
            "pg_ctl", f"--pgdata={self.folder / 'data'}", f"--log={log}", f"--options={options}", "--wait", "start"
        )

    def stop(self, mode: str = "immediate") -> None:
        """Stops it; `immediate` is what a node that fails does."""
        self._run("pg_ctl", f"--pgdata={self.folder / 'data'}", f"--mode={mode}", "--wait", "stop")

    def remove(self) -> None:
        """Stops it where it runs, and leaves nothing behind."""
        if (self.folder / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def sql(self, statement: str, database: str = "mlflow") -> str:
        """What a statement answers."""
        command = ["psql", "--no-psqlrc", "--tuples-only", "--no-align", "--dbname", database, "--command", statement]
        environment = {
            **os.environ,
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": self._settings["POSTGRES_USER"],
            "PGPASSWORD": self._settings["POSTGRES_PASSWORD"],
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def change_password(self, password: str) -> None:
        """What docs/operations.md says to do before the secret is changed."""
        self.sql(f"ALTER ROLE {self._settings['POSTGRES_USER']} PASSWORD '{password}'")
        self._settings["POSTGRES_PASSWORD"] = password

    def probe(self, kind: str) -> int:
        """Exit status of one of the manifest's probes."""
        words = [*self._container[kind]["exec"]["command"], f"--port={self.port}"]
        words[0] = str(self._programs / words[0])
        return subprocess.run(words, check=False).returncode

    def _run(self, program: str, *arguments: str) -> None:
        # The server that pg_ctl leaves behind keeps what it was given as output, so that a pipe would never end. The locale
        # is C, so that the encoding comes from the manifest and not from this machine.
        with (self.folder / "output").open("wb") as output:
            done = subprocess.run(
                [self._programs / program, *arguments], user=self._user, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, check=False, env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            )  # fmt: skip
        assert done.returncode == 0, (self.folder / "output").read_text()


class Deployed:
    """All of `k8s/base/tracking`.

    Args:
        folder: for logs, dumps and what ConfigMaps hold.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secrets = {
            "mixtune-postgres": {"PGUSER": "mlflow", "PGPASSWORD": made_up()},
            "mixtune-mlflow-server": {
                "MLFLOW_AUTH_ADMIN_PASSWORD": made_up(),
                "MLFLOW_FLASK_SERVER_SECRET_KEY": made_up(),
            },
            "mixtune-object-store": {
                "AWS_ACCESS_KEY_ID": "made-up-key-id",
                "AWS_SECRET_ACCESS_KEY": made_up(),
                "AWS_DEFAULT_REGION": "us-east-1",
            },
        }
        self.steps_password = made_up()
        self.database = Postgres(self.secrets)
        self._server: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.backups = folder / "backups"
        self.backups.mkdir(parents=True)
        files = find(BUILD, "ConfigMap", "mixtune-mlflow-files")["data"]
        for name, text in files.items():
            (folder / name).write_text(text)
        self._template = find(BUILD, "Deployment", "mixtune-mlflow")["spec"]["template"]

    def start(self) -> None:
        """An object store with the bucket, a database, the migrations and the server, in this order."""
        import boto3
        from moto.server import ThreadedMotoServer

        self._store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._store.start()
        host, port = self._store.get_host_and_port()
        keys = self.secrets["mixtune-object-store"]
        keys["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
        self.s3 = boto3.client(
            "s3", endpoint_url=keys["AWS_ENDPOINT_URL"], region_name=keys["AWS_DEFAULT_REGION"],
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"], aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        )  # fmt: skip
        self.s3.create_bucket(Bucket="mixtune")
        self.database.make()
        self.migrate()
        self.start_server()

    def migrate(self) -> None:
        """The init containers."""
        for container in self._template["spec"]["initContainers"]:
            done = self.once(container)
            assert done.returncode == 0, done.stdout + done.stderr

    def start_server(self) -> None:
        """The server, until its probe is answered."""
        container = self.server_container()
        with self.log.open("ab") as log:
            self._server = subprocess.Popen(
                self._words(container), env=self._environment(container), stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 90
        while self.probe("startupProbe") != 200:
            assert self._server.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def stop_server(self) -> None:
        """SIGTERM, as a pod gets it; then what is left of it is killed."""
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGTERM)
            try:
                self._server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(self._server.pid, signal.SIGKILL)
                self._server.wait()
            self._server = None

    def remove(self) -> None:
        """Ends all of it."""
        self.stop_server()
        self.database.remove()
        if hasattr(self, "_store"):
            self._store.stop()

    def server_container(self) -> Manifest:
        """The manifest's server."""
        (container,) = self._template["spec"]["containers"]
        return dict(container)

    @property
    def log(self) -> Path:
        """What the server wrote."""
        return self.folder / "server.log"

    def probe(self, kind: str) -> int:
        """HTTP status that a probe gets, which calls the pod by its address."""
        path = self.server_container()[kind]["httpGet"]["path"]
        request = urllib.request.Request(f"{self.uri}{path}", headers={"Host": "10.1.2.3:5000"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def set_password(self, user: str, password: str) -> subprocess.CompletedProcess[str]:
        """`kubectl exec` of users.py in the server's pod."""
        environment = self._environment(self.server_container()) | {"MIXTUNE_MLFLOW_ADDRESS": self.uri}
        words = [sys.executable, str(self.folder / "users.py"), user]
        return subprocess.run(
            words, env=environment, input=password + "\n", capture_output=True, text=True, check=False
        )

    def job(self, template: Manifest, **extra: str) -> subprocess.CompletedProcess[str]:
        """A pod that works on the database and on the claim for dumps."""
        (container,) = containers(template)
        return self.once(container, BACKUPS=str(self.backups), **extra)

    def once(self, container: Manifest, **extra: str) -> subprocess.CompletedProcess[str]:
        """Runs a container to its end."""
        return subprocess.run(
            self._words(container),
            env=self._environment(container) | extra,
            capture_output=True,
            text=True,
            check=False,
        )

    def _environment(self, container: Manifest) -> dict[str, str]:
        found = environment(container, BUILD, self.secrets)
        found |= {"PGHOST": "127.0.0.1", "PGPORT": str(self.database.port)}
        if "MLFLOW_AUTH_CONFIG_PATH" in found:
            folder, name = found["MLFLOW_AUTH_CONFIG_PATH"].rsplit("/", 1)
            assert folder in {mount["mountPath"] for mount in container["volumeMounts"]}
            found["MLFLOW_AUTH_CONFIG_PATH"] = str(self.folder / name)
        found["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), str(postgres()), os.environ["PATH"]])
        return found

    def _words(self, container: Manifest) -> list[str]:
        """The command, at an address that is free here, with the ConfigMap's files where they are here."""
        words = command(container, self._environment(container))
        files = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "files"}
        for path in files:
            words = [re.sub(rf"^{path}(?=/)", str(self.folder), word) for word in words]
        return [
            re.sub(r"\b5000\b", str(self.port), word).replace("--host=0.0.0.0", "--host=127.0.0.1") for word in words
        ]

    def for_steps(self, experiment: str = "mixtune") -> dict[str, str]:
        """What the secret `mixtune-mlflow` gives a step."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_EXPERIMENT_NAME": experiment,
            "MLFLOW_TRACKING_USERNAME": STEPS_USER,
            "MLFLOW_TRACKING_PASSWORD": self.steps_password,
        }

    def all_secrets(self) -> list[str]:
        """What must stand in no log."""
        found = [value for keys in self.secrets.values() for name, value in keys.items() if is_secret(name)]
        return [*found, self.steps_password]


def is_secret(name: str) -> bool:
    """Whether a secret's key names something that nobody may read, and no address or name."""
    return any(part in name for part in ("PASSWORD", "SECRET"))


def made_up() -> str:
    """A password that stands nowhere by chance."""
    return secrets.token_urlsafe(24)


def secrets_in(folder: Path, wanted: list[str]) -> list[str]:
    """Files below a folder that hold one of the secrets."""
    found = []
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            content = file.read_bytes()
            found += [str(file) for secret in wanted if secret.encode() in content]
    return found
