"""What a real cluster answered, read from tests/recordings, for servers that answer the same."""

from __future__ import annotations

import base64
import datetime
import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kfp_server_api as kfp_api

from mixtune.pipelines.cluster.tasks import node_id

_client: Any = kfp_api.ApiClient(kfp_api.Configuration(host="http://nowhere"))
RECORDINGS = Path(__file__).parent.parent / "recordings"


def recorded_run(name: str) -> kfp_api.V2beta1Run:
    """A run as a real KFP answered."""
    text = (RECORDINGS / f"run-{name}.json").read_text(encoding="utf-8")
    return _client.deserialize(SimpleNamespace(data=text), "V2beta1Run")


def as_of(run: kfp_api.V2beta1Run, time: str) -> kfp_api.V2beta1Run:
    """A recorded run as it was at a time of its day, by what its histories tell.

    Args:
        time: such as `11:26:30`.
    """
    hour, minute, second = map(int, time.split(":"))
    moment = run.created_at.replace(hour=hour, minute=minute, second=second)
    run.state_history = [one for one in run.state_history if one.update_time <= moment]
    run.state = run.state_history[-1].state
    tasks = []
    for task in run.run_details.task_details:
        past = [one for one in task.state_history or [] if one.update_time <= moment]
        if not past:
            continue
        if len(past) < len(task.state_history):
            task.end_time = datetime.datetime.min.replace(tzinfo=datetime.UTC)
        task.state, task.state_history = past[-1].state, past
        tasks.append(task)
    run.run_details.task_details = tasks
    return run


def recorded(name: str) -> Any:
    """What a real cluster answered."""
    return json.loads((RECORDINGS / f"{name}.json").read_text(encoding="utf-8"))


def workflow(nodes: list[dict[str, Any]], run_id: str, compressed: bool = False) -> dict[str, Any]:
    """An Argo workflow of recorded nodes, from which ids and full names were left out.

    They are put back: a child's name begins with its parent's, and an id is a hash of the name.
    """
    ids = {child for one in nodes for child in one.get("children") or []}
    name = next(iter(ids)).rpartition("-")[0]
    left, named, names = list(nodes), {}, [name]
    for path in names:
        display = path.removeprefix(path[: path.rfind(").") + 2]) if ")." in path else path
        same = [one for one in left if one["displayName"] == display]
        below = {node_id(name, f"{path}({number})") for number in range(9)}
        node = next((one for one in same if below & set(one.get("children") or [])), same[0] if same else None)
        if node is None:
            continue
        left.remove(node)
        named[node_id(name, path)] = {"id": node_id(name, path), "name": path, **node}
        displays = {one["displayName"] for one in left}
        more = [path + one.removeprefix(display) for one in displays if one.startswith(f"{display}(")]
        more += [f"{path}.{one}" for one in displays]
        names += [one for one in dict.fromkeys(more) if node_id(name, one) in ids]
    content = json.dumps(named)
    packed = base64.b64encode(gzip.compress(content.encode())).decode()
    status: dict[str, Any] = {"compressedNodes": packed} if compressed else {"nodes": named}
    return {"metadata": {"name": name, "labels": {"pipeline/runid": run_id}}, "status": status}
