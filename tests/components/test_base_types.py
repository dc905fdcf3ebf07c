"""What a base model's type rules out is told by `check`, in the words in which a step would refuse it later."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtune.components.base_model import hub_config, notes
from mixtune.components.checks import find_problems, missing_here
from mixtune.components.config import Config, load
from mixtune.components.form import PLACEMENT, parameters
from mixtune.components.plan.config import PlanStep
from mixtune.components.plan.step import run as run_plan
from mixtune.components.shared.config import Task
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.model import device
from mixtune.components.shared.model.masking import Masking
from mixtune.components.shared.running.context import NODES, Context
from mixtune.pipelines.configuration import read_config, to_yaml

from .shared.test_loss import TASKS
from .shared.tiny import ARCHITECTURES, ENCODERS, tiny_model, tiny_tokenizer


def config(base: str | Path, task: Task = "classification", **options: Any) -> Config:
    sources: dict[str, Any] = {"pretrain": {"source": "embedded"}, "finetune": {"source": "embedded", "task": task}}
    model = {"base": str(base), "max_length": 32, **options.pop("model", {})}
    return load({"model": model, "data": sources, "pretrain": {"steps": 1}, **options})


def save(folder: Path, architecture: str) -> Path:
    tiny_model(architecture).save(folder, tiny_tokenizer())
    return folder


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *ENCODERS])
def test_check_and_the_model_agree_on_each_task(tmp_path: Path, architecture: str) -> None:
    folder = save(tmp_path / "model", architecture)
    for task in TASKS:
        problems = [one for one in find_problems(config(folder, task)) if not one.startswith("data.finetune.source")]
        try:
            tiny_model(architecture).add_head(task, ["a", "b"], 0)
            wanted = []
        except RefusedError as error:
            wanted = error.problems
        assert problems == wanted, (task, problems)


def test_an_objective_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    for architecture, other in (("bert", "causal_lm"), ("llama", "masked_lm")):
        folder = save(tmp_path / architecture, architecture)
        (problem,) = find_problems(config(folder, model={"objective": other}))
        assert problem.startswith(f"model.objective: is {other}, but {folder} is of type {architecture}, which is for")


def test_a_type_without_a_language_model_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"model_type": "llama"', '"model_type": "vit"'))
    assert "is of type vit, for which transformers has no language model" in find_problems(config(folder))[0]


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_cannot_work_is_refused(tmp_path: Path, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "bert", "bert")
    (problem,) = find_problems(config(folder, mixed={"attention": attention}))
    assert problem.startswith(
        f"mixed.attention: is {attention}, which keeps packed documents apart in causal models only"
    )
    scratch = config("scratch", mixed={"attention": attention})
    assert find_problems(scratch) == []
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    monkeypatch.setattr("mixtune.components.base_model.has_gpu", lambda: False)
    assert missing_here(scratch) == [
        f"mixed.attention: is {attention}, which needs a GPU, and there is none here; use sdpa"
    ]
    monkeypatch.setattr("mixtune.components.base_model.has_gpu", lambda: True)
    assert missing_here(scratch) == []


def test_a_cpu_build_of_torch_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_torch_version", lambda: "2.13.0+cpu")
    assert not device.has_gpu()


@pytest.mark.parametrize(("gpus", "refused"), [(0, True), (1, False)])
def test_plan_knows_the_gpus_of_a_cluster(
    tmp_path: Path, gpus: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NODES, "{}")
    chosen = config("scratch", mixed={"attention": "flash_attention_2"})
    names = ("gpus", "node_selector", "tolerations", "affinity")
    files = {f"pretrain_{name}": str(tmp_path / name) for name in names}

    def plan() -> None:
        step = PlanStep(form=parameters(chosen) | {PLACEMENT: {"gpus": gpus}})
        run_plan(step, context=Context.for_tests(), outputs=files)

    if refused:
        with pytest.raises(
            RefusedError, match=r"mixed\.attention: is flash_attention_2, .* none where placement\.gpus is 0"
        ):
            plan()
    else:
        plan()


def test_a_hub_name_that_looks_like_a_path_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here / "m", there / "n"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    for base in ("m/gtp2", "n/gpt2"):  # in the working directory, and beside the configuration file
        (note,) = notes(config(base), there)
        assert note.startswith(
            f"model.base: {base} is taken as a name on the Hugging Face hub, because there is no such"
        )
    assert not any(notes(config(base), there) for base in ("o/gpt2", "scratch", "gpt2", "./m/gpt2"))


def test_a_folder_of_the_working_directory_is_not_taken_for_one_beside_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "here" / "m" / "gpt", "gpt2")
    (tmp_path / "mixtune.yaml").write_text(to_yaml(config("m/gpt")))
    monkeypatch.chdir(tmp_path / "here")
    (problem,) = find_problems(read_config(tmp_path / "mixtune.yaml"))
    assert problem.startswith(
        "model.base: m/gpt is a folder in the working directory, but the configuration file is in"
    )
    assert find_problems(read_config(tmp_path / "mixtune.yaml", ["model.base=m/gpt"])) == []


def test_the_configuration_of_a_hub_model_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache on this machine suffices."""
    commit = "0123456789" * 4
    cached = tmp_path / "models--owner--encoder"
    save(cached / "snapshots" / commit, "bert")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (problem,) = find_problems(config("owner/encoder", "generation"))
    assert problem.startswith("data.finetune.task: ")
    assert find_problems(config("owner/encoder")) == []
    assert find_problems(config("owner/another", "generation")) == []  # which nobody here knows


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("RepositoryNotFoundError", "model.base: there is no model owner/it on the Hugging Face hub, or it is private"),
        ("GatedRepoError", "model.base: access to owner/it on the Hugging Face hub is restricted"),
        ("RevisionNotFoundError", "model.revision: owner/it has no revision v2 on the Hugging Face hub"),
    ],
)
def test_what_the_hub_answers_is_told_by_check(monkeypatch: pytest.MonkeyPatch, error: str, sentence: str) -> None:
    from huggingface_hub import HfApi, errors

    def answer(*_: Any, **__: Any) -> None:
        kind = getattr(errors, error)
        raise kind.__new__(kind)  # its response would have to be made up

    hub_config.cache_clear()
    monkeypatch.setattr(HfApi, "model_info", answer)
    (problem,) = find_problems(config("owner/it", model={"revision": "v2"}))
    hub_config.cache_clear()
    assert problem.startswith(sentence)


def test_the_command_tells_it_too(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "config.yaml").write_text(to_yaml(config("m/gtp2")))
    done = subprocess.run(
        [sys.executable, "-m", "mixtune.pipelines.cli", "check", "config.yaml"], cwd=tmp_path, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "note: model.base: m/gtp2 is taken as a name on the Hugging Face hub" in done.stdout


def test_an_encoder_whose_tokenizer_has_no_mask_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "bert", "bert")
    tokenizer: Any = tiny_tokenizer()
    tokenizer.mask_token = None
    for file in folder.glob("*token*"):
        file.unlink()
    tokenizer.save_pretrained(folder)
    (problem,) = find_problems(config(folder))
    with pytest.raises(RefusedError) as refused:
        Masking.of(tokenizer, 0.15)
    assert refused.value.problems == [problem]
