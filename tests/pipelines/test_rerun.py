"""Running an earlier run again, on a cluster that is a small server; `test_run.py` does it on this machine for real."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixtune.components.config import Fingerprints, parts
from mixtune.components.form import FIELDS, read_form
from mixtune.components.shared.artifacts import write_json
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.outcome import Outcome
from mixtune.components.shared.tracking.tracker import Tracker
from mixtune.pipelines.cluster import rerun
from mixtune.pipelines.cluster import runs as client
from mixtune.pipelines.cluster.api import Api, Connection, Patience
from mixtune.pipelines.cluster.records import StepRecord
from mixtune.pipelines.configuration import read_config
from mixtune.pipelines.local.folder import Run, claim
from mixtune.pipelines.local.rerun import forget, forget_from, run_only
from tests.stores import new_store

from .kfp_server import KfpServer

QUICK = Patience(seconds=3.0, first=0.01, longest=0.05, answer=5)
STEPS = ("prepare", "pretrain", "finetune", "mixed", "evaluate")


@pytest.fixture(scope="module")
def server() -> Iterator[KfpServer]:
    with KfpServer() as running:
        yield running


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def earlier(server: KfpServer) -> str:
    """A run of the whole pipeline."""
    api = Api(Connection(server.url), QUICK)
    config = read_config(None, ["mixed.lambdas=[0.3]", "seed=5"])
    version = client.upload(api, client.package_of(config))
    values = client.run_parameters(config)
    values["placement"] |= {"gpus": 2, "node_selector": {"pool": "theirs"}}
    return client.submit(api, version, config.name, values, experiment="theirs").id


@pytest.fixture
def api(server: KfpServer) -> Api:
    return Api(Connection(server.url), QUICK)


def cached_tasks(package: dict[str, Any]) -> set[str]:
    """The tasks whose results may come from the cache."""
    return {name for task, name, _ in rerun._tasks(package) if task.get("cachingOptions", {}).get("enableCache")}


EVALUATIONS = {"evaluate", "evaluate-2", "evaluate-3", "evaluate-4"}
"""Of the mixed candidates, of pretrained, of finetuned, and of the interpolated ones."""


@pytest.mark.parametrize(
    ("step", "from_the_cache"),
    [
        ("prepare", set()),
        ("pretrain", {"prepare", "prepare-2"}),
        ("finetune", {"prepare", "prepare-2", "pretrain", "mixed", "evaluate", "evaluate-2"}),
        ("mixed", {"prepare", "prepare-2", "pretrain", "finetune", "evaluate-2", "evaluate-3", "evaluate-4"}),
        ("evaluate", {"prepare", "prepare-2", "pretrain", "finetune", "mixed"}),
        ("compare", {"prepare", "prepare-2", "pretrain", "finetune", "mixed", *EVALUATIONS}),
    ],
)
def test_the_step_and_what_depends_on_it_run_anew_and_nothing_else_changes(
    step: str, from_the_cache: set[str], server: KfpServer, api: Api, earlier: str
) -> None:
    made = rerun.rerun_from(api, earlier, step, [])
    old, new = (
        server.store.packages[server.store.runs[run].pipeline_version_reference.pipeline_version_id]
        for run in (earlier, made.id)
    )
    containers = {name for _, name, one in rerun._tasks(new) if one in STEPS}
    assert cached_tasks(new) & containers == from_the_cache
    # What enters KFP's cache key is the same to the letter: executors, inputs, outputs, name, and mounts.
    before, after = copy.deepcopy(old), copy.deepcopy(new)
    for package in (before, after):
        for task, _, _ in rerun._tasks(package):
            task.pop("cachingOptions", None)
    assert before == after
    assert new["pipelineInfo"]["name"] == "mixtune"
    pipelines = {server.store.runs[run].pipeline_version_reference.pipeline_id for run in (earlier, made.id)}
    assert len(pipelines) == 1, "KFP's cache goes by the pipeline's name"


def test_tasks_that_read_portions_belong_to_prepare_and_use_its_image() -> None:
    plain, spec = (
        next(yaml.safe_load_all(client.package_of(read_config(None, [f"placement.prepare_workers={number}"])).text))
        for number in (1, 2)
    )
    portions = {f"prepare-portion{more}{number}" for more in ("", "s") for number in ("", "-2")}
    assert portions | {"prepare", "prepare-2", "pretrain", "compare"} <= rerun.tasks_from(spec, "prepare")
    assert not portions & rerun.tasks_from(spec, "pretrain")
    assert not portions & rerun.tasks_from(plain, "prepare")
    assert rerun.images_in(spec) == rerun.images_in(plain)


def test_what_starts_from_the_finetuned_model_depends_on_it() -> None:
    package = client.package_of(read_config(None, ["mixed.start=finetuned"]))
    (spec, *_) = yaml.safe_load_all(package.text)
    assert {"finetune", "mixed", "evaluate", "evaluate-3", "evaluate-4", "compare"} <= rerun.tasks_from(
        spec, "finetune"
    )
    assert not {"pretrain", "evaluate-2"} & rerun.tasks_from(spec, "finetune")


def test_old_parameters_with_overrides(server: KfpServer, api: Api, earlier: str) -> None:
    made = rerun.rerun_from(api, earlier, "mixed", ["mixed.lambdas=[0.2]", "mixed.learning_rate=0.0007"], "again")
    old, new = (server.store.runs[run].runtime_config.parameters for run in (earlier, made.id))
    assert {name for name in old if old[name] != new[name]} == {"mix_lambdas", "mix_learning_rate"}
    config = read_form(new)
    assert (config.mixed.lambdas, config.mixed.learning_rate, config.seed) == ([0.2], 0.0007, 5)
    assert new["placement"] == old["placement"]
    assert server.store.runs[made.id].experiment_id == server.store.runs[earlier].experiment_id
    assert earlier in server.store.runs[made.id].description
    assert rerun.rerun_from(api, earlier, "mixed", ["mixed.lambdas=[0.2]"], "again").id == made.id


def test_a_run_that_was_started_in_the_ui_has_the_packages_defaults(server: KfpServer, api: Api, earlier: str) -> None:
    run = copy.copy(server.store.runs[earlier])
    run.runtime_config = copy.copy(run.runtime_config)
    run.runtime_config.parameters = dict.fromkeys(("model_base", "data_text", "data_labelled"), "embedded")
    run.runtime_config.parameters |= {"model_base": "scratch", "pretrain_steps": 3, "seed": 9}
    from_ui = server.add_run(run).run_id
    made = rerun.rerun_from(api, from_ui, "mixed", ["mixed.lambdas=[0.2]"])
    values = server.store.runs[made.id].runtime_config.parameters
    assert (values["seed"], values["mix_lambdas"], values["placement"]["gpus"]) == (9, [0.2], 0)
    assert set(values) == {*FIELDS, "advanced", "placement"}


def test_a_run_of_another_version_is_refused(server: KfpServer, api: Api, earlier: str) -> None:
    package = copy.deepcopy(server.store.packages[version_of(server, earlier)])
    fields = package["root"]["inputDefinitions"]["parameters"]
    fields["mixed_lambdas"] = fields.pop("mix_lambdas")
    run = copy.deepcopy(server.store.runs[earlier])
    run.pipeline_version_reference = None
    run.pipeline_spec = {"pipeline_spec": package, "platform_spec": package.pop("platform")}
    older = server.add_run(run).run_id
    with pytest.raises(RefusedError, match=r"another version of mixtune, whose form has other fields \(mix_lambdas is"):
        rerun.rerun_from(api, older, "mixed", [])
    package["pipelineInfo"]["name"] = "pipeline/other"
    with pytest.raises(RefusedError, match="is a run of the pipeline other, not of mixtune"):
        rerun.rerun_from(api, older, "mixed", [])


def version_of(server: KfpServer, run_id: str) -> str:
    return str(server.store.runs[run_id].pipeline_version_reference.pipeline_version_id)


def test_the_number_of_gpus_is_a_value_of_the_form(server: KfpServer, api: Api, earlier: str) -> None:
    made = rerun.rerun_from(api, earlier, "mixed", ["placement.gpus=4"])
    old, new = (server.store.runs[run].runtime_config.parameters for run in (earlier, made.id))
    assert new == old | {"placement": old["placement"] | {"gpus": 4}}


@pytest.mark.parametrize("override", ["placement.profile=gke", "mixed.start=finetuned"])
def test_what_is_compiled_in_cannot_be_overridden(override: str, api: Api, earlier: str) -> None:
    with pytest.raises(RefusedError, match="is fixed in the compiled pipeline"):
        rerun.rerun_from(api, earlier, "mixed", [override])


def test_wrong_words_are_refused_before_anything_is_made(server: KfpServer, api: Api, earlier: str) -> None:
    before = len(server.store.runs)
    with pytest.raises(RefusedError, match="--from: must be one of"):
        rerun.rerun_from(api, earlier, "train", [])
    with pytest.raises(RefusedError, match=r"mixed\.lamdas"):
        rerun.rerun_from(api, earlier, "mixed", ["mixed.lamdas=[1]"])
    with pytest.raises(RefusedError, match="--only: must be one of"):
        rerun.rerun_only(api, earlier, "plan", [])
    with pytest.raises(RefusedError, match="has no such run"):
        rerun.rerun_from(api, "nothing", "mixed", [])
    assert len(server.store.runs) == before


@pytest.fixture
def on_record(recorded: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """MLflow has the earlier run on record; the configuration that `mixed` was given."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", recorded[0])
    return recorded[1]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, earlier: str) -> tuple[str, str]:
    """A store with the record of the earlier run, of which one evaluation came from the cache."""
    uri = new_store(tmp_path_factory.mktemp("mlflow") / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        return uri, write_record(earlier)


def write_record(earlier: str) -> str:
    """Writes it as the steps do."""
    config = read_config(None, ["mixed.lambdas=[0.3]", "seed=5"])
    cut = parts(config, Fingerprints("of text", "of labels", "of base"))
    heldout = {"pretrain_heldout": "s3://a/text", "finetune_heldout": "s3://a/labels"}

    def leave(run: str, step: str, title: str, config: str, uris: dict[str, Any], **more: str) -> str:
        tracker = Tracker.open(step, title, run)
        given = {"config": config, "artifacts": json.dumps(uris), **more}
        tracker.close("FINISHED", {"kind": "done", **{f"given.{name}": text for name, text in given.items()}})
        return str(tracker.run_id)

    mixed = {"start": "s3://a/pretrained", "pretrain_data": "s3://a/t", "finetune_data": "s3://a/l"}
    leave(earlier, "mixed", "mixed-0.3", cut.mixed.to_json(), mixed, candidate=cut.candidates[0].to_json())
    of_mixed = {"model": "s3://a/mixed", "pretrained": "s3://a/pretrained", **heldout}
    leave(earlier, "evaluate", "evaluate mixed-0.3", cut.evaluate_mixed.to_json(), of_mixed)
    two = {"model": "s3://a/pretrained", "other": "s3://a/finetuned", **heldout}
    leave(earlier, "evaluate", "evaluate interpolated", cut.interpolate.to_json(), two)
    of_pretrained = {"model": "s3://b/pretrained", **heldout}
    cached = leave("before", "evaluate", "evaluate pretrained", cut.evaluate_pretrained.to_json(), of_pretrained)
    evaluations = {name: f"s3://a/{name}" for name in ("pretrained", "finetuned", "interpolated")}
    leave(earlier, "compare", "compare", cut.compare.to_json(), {**evaluations, "mixed": ["s3://a/one", "s3://a/two"]})
    tracker = Tracker.open("finish", "finish", earlier)
    tracker.link({"evaluate pretrained": cached})
    tracker.close("FINISHED", {"kind": "done"})
    return cut.mixed.to_json()


def test_one_step_alone_on_the_artifacts_that_it_had(server: KfpServer, api: Api, earlier: str, on_record: str) -> None:
    (made,) = rerun.rerun_only(api, earlier, "mixed", ["mixed.learning_rate=0.5"])
    values = server.store.runs[made.id].runtime_config.parameters
    assert (values["start_model_uri"], values["text_train_uri"]) == ("s3://a/pretrained", "s3://a/t")
    assert "0.3" in values["candidate"]
    assert json.loads(values["config"])["mixed"]["learning_rate"] == 0.5
    assert json.loads(on_record)["mixed"]["learning_rate"] != 0.5
    package = server.store.packages[server.store.runs[made.id].pipeline_version_reference.pipeline_version_id]
    assert "mixed" not in cached_tasks(package), "it is to run, also the second time"
    defaults = {
        name: one.get("defaultValue") for name, one in package["root"]["inputDefinitions"]["parameters"].items()
    }
    assert (defaults["gpus"], defaults["node_selector"]) == ("2", {"pool": "theirs"}), "it is placed as the run was"
    names = [one.display_name for one in server.store.pipelines.values()]
    assert "mixtune-mixed" in names


@pytest.fixture(scope="module")
def placed(server: KfpServer) -> str:
    """A run that was placed on GPU nodes, with sizes of its own."""
    api = Api(Connection(server.url), QUICK)
    options = ("profile=gke", "gpus=2", "gpu_cpu='1'", "gpu_memory=3Gi", "queue=team", "run_as_user=2000")
    config = read_config(None, ["mixed.lambdas=[0.3]", *(f"placement.{option}" for option in options)])
    version = client.upload(api, client.package_of(config))
    values = client.run_parameters(config)
    values["placement"]["gpus"] = 4
    return client.submit(api, version, config.name, values).id


def container_of(server: KfpServer, run_id: str, step: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The container of a step in a run's package, its Kubernetes settings, and the run's parameters."""
    run = server.store.runs[run_id]
    package = server.store.packages[run.pipeline_version_reference.pipeline_version_id]
    platform = package["platform"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{step}"]
    container = package["deploymentSpec"]["executors"][f"exec-{step}"]["container"]
    return container, platform, run.runtime_config.parameters


def test_one_step_alone_is_placed_as_the_run_was(
    server: KfpServer, api: Api, placed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path / "mlflow.db"))
    write_record(placed)
    (made,) = rerun.rerun_only(api, placed, "mixed", [])
    container, platform, values = container_of(server, made.id, "mixed")
    whole, whole_platform, _ = container_of(server, placed, "mixed")
    assert container["resources"]["resourceCpuLimit"] == whole["resources"]["resourceCpuLimit"] == "1"
    assert container["resources"]["resourceMemoryLimit"] == whole["resources"]["resourceMemoryLimit"] == "3Gi"
    assert platform["podMetadata"] == whole_platform["podMetadata"]
    assert platform["podMetadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert (
        platform["securityContext"] == whole_platform["securityContext"] == {"runAsNonRoot": True, "runAsUser": "2000"}
    )
    of_run = server.store.runs[placed].runtime_config.parameters["placement"]
    assert values["gpus"] == "4", "what was chosen for the run counts, not the package's default"
    assert values["tolerations"] == of_run["tolerations"]
    assert container["resources"]["accelerator"]["resourceType"] == of_run["gpu_type"]
    # It has no `finish` behind it, so it closes its record itself.
    assert {"name": "MIXTUNE_ALONE", "value": "1"} in container["env"]

    (other,) = rerun.rerun_only(api, placed, "mixed", ["placement.gpu_cpu='500m'", "placement.gpus=1"])
    container, _, values = container_of(server, other.id, "mixed")
    assert container["resources"]["resourceCpuLimit"] == "500m"
    assert container["resources"]["resourceMemoryLimit"] == "3Gi"
    assert values["gpus"] == "1"


def test_every_task_of_a_step_also_those_from_the_cache(
    server: KfpServer, api: Api, earlier: str, on_record: str
) -> None:
    made = rerun.rerun_only(api, earlier, "evaluate", ["evaluate.batch_size=3"])
    runs = {server.store.runs[one.id].display_name.rpartition(" alone, ")[0]: server.store.runs[one.id] for one in made}
    assert set(runs) == {f"demo, evaluate {name}" for name in ("mixed-0.3", "interpolated", "pretrained")}
    of = {name: run.runtime_config.parameters for name, run in runs.items()}
    assert of["demo, evaluate pretrained"]["model_uri"] == "s3://b/pretrained"
    assert "finetuned_model_uri" not in of["demo, evaluate pretrained"]
    # What a task can do without, it gets where it had it.
    assert of["demo, evaluate interpolated"]["finetuned_model_uri"] == "s3://a/finetuned"
    assert of["demo, evaluate mixed-0.3"]["pretrained_model_uri"] == "s3://a/pretrained"
    for values in of.values():
        assert json.loads(values["config"])["batch_size"] == 3
    assert "of base" not in of["demo, evaluate mixed-0.3"]["config"]


def test_a_list_of_artifacts(server: KfpServer, api: Api, earlier: str, on_record: str) -> None:
    (made,) = rerun.rerun_only(api, earlier, "compare", ["gate.max_forgetting=0.9"])
    values = server.store.runs[made.id].runtime_config.parameters
    assert values["mixed_evaluation_uris"] == ["s3://a/one", "s3://a/two"]
    assert json.loads(values["config"])["gate"]["max_forgetting"] == 0.9


def test_one_task_by_its_title(api: Api, earlier: str, on_record: str) -> None:
    (made,) = rerun.rerun_only(api, earlier, "evaluate mixed-0.3", [], "key")
    assert re.fullmatch(r"demo, evaluate mixed-0\.3 alone, [-\d]+ [:\d]+", made.name)
    with pytest.raises(RefusedError, match=r"has no record of mixed-0\.9; it has records of "):
        rerun.rerun_only(api, earlier, "mixed-0.9", [])


def test_without_a_record_nothing_can_run_alone(api: Api, earlier: str) -> None:
    with pytest.raises(RefusedError, match="set MLFLOW_TRACKING_URI"):
        rerun.rerun_only(api, earlier, "mixed", [])


def test_fingerprints_stay_where_an_option_changes() -> None:
    before, after = read_config(None), read_config(None, ["data.finetune.dev_fraction=0.25"])
    config = parts(before, Fingerprints("text", "labels", "base")).prepare_finetune.to_json()
    changed = json.loads(rerun.with_overrides("prepare finetune", "prepare", config, before, after))
    assert changed["fingerprint"] == json.loads(config)["fingerprint"]
    assert changed["finetune"]["dev_fraction"] == 0.25


def test_forgetting_leaves_what_comes_before(tmp_path: Path) -> None:
    run = Run("", tmp_path)
    for task in ("pretrain", "for-loop-2-iteration-0/mixed", "evaluate-4", "prepare-2"):
        entry = {"model": {"uri": str(run.state / "artifacts" / "mixtune-1" / task / "model")}}
        write_json(run.state / "cache" / "code" / f"{task.rsplit('/', maxsplit=1)[-1]}.json", entry)
    (run.state / "cache" / "code" / "broken.json").write_text("{")
    assert forget(run, {"mixed", "evaluate-4"}) == 2
    left = {file.name for file in (run.state / "cache" / "code").iterdir()}
    assert left == {"pretrain.json", "prepare-2.json", "broken.json"}


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="contains no run"):
        forget_from(tmp_path, "mixed", [])
    claim(tmp_path, "one").release()
    (tmp_path / ".mixtune" / "outcomes" / "one").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(read_config(None).model_dump(mode="json")))
    with pytest.raises(RefusedError, match="has no record of mixed"):
        run_only(tmp_path, "mixed", [])
    Outcome(title="mixed-0.1", kind="done").save(tmp_path / ".mixtune" / "outcomes" / "one")
    with pytest.raises(RefusedError, match="use --from"):
        run_only(tmp_path, "mixed", [])


def test_one_step_alone_runs_the_candidates_of_the_configuration_and_no_earlier_ones(tmp_path: Path) -> None:
    config = read_config(None, ["mixed.lambdas=[0.3, 0.6]"])
    records = {
        title: StepRecord(title, "FINISHED", step=step)
        for step, titles in {
            "mixed": ("mixed-0.2", "mixed-0.3", "mixed-0.6", "mixed-budget-0.5"),
            "evaluate": ("evaluate pretrained", "evaluate mixed-0.2", "evaluate mixed-0.6", "evaluate interpolated"),
        }.items()
        for title in titles
    }
    records["compare"] = StepRecord("compare", "FINISHED", step="compare")

    def chosen(only: str) -> list[str]:
        return [one.title for one in rerun.choose(only, records, "a-run", config)]

    assert chosen("mixed") == ["mixed-0.3", "mixed-0.6"]
    assert chosen("evaluate") == ["evaluate pretrained", "evaluate mixed-0.6", "evaluate interpolated"]
    assert chosen("compare") == ["compare"]
    with pytest.raises(
        RefusedError, match=r"has no record of evaluate mixed-0\.2; it has records of compare, evaluate "
    ):
        chosen("evaluate mixed-0.2")
