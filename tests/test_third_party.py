"""The private names of other libraries that the modules in `third_party` use still exist and do the same."""

import inspect
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch
from kfp import compiler, dsl
from transformers import LlamaConfig, LlamaForCausalLM

from mixtune.components.compare.component import compare
from mixtune.components.prepare.component import prepare
from mixtune.components.shared.third_party import accelerate, sacrebleu, transformers, transformers_sources
from mixtune.components.shared.third_party import lm_eval as harness
from mixtune.components.shared.third_party import torch as torch_names
from mixtune.pipelines.third_party import kfp as kfp_names

FOLDERS = {"kfp": "pipelines/third_party"}
NAMES = (
    ("torch", "torch", "ops.mkldnn._is_mkldnn_bf16_supported"),
    ("torch", "torch._functorch.config", "backward_pass_autocast"),
    ("torch", "torch.nn", "Module._compiled_call_impl"),
    ("transformers", "transformers", "PretrainedConfig._attn_implementation"),
    ("transformers", "transformers", "PreTrainedModel._init_weights"),
    ("transformers", "transformers", "PreTrainedTokenizerBase._get_control_tokens"),
    ("transformers", "transformers.utils.chat_template_utils", "_CONTROL_TOKEN_END"),
    ("transformers", "transformers.utils.chat_template_utils", "_CONTROL_TOKEN_START"),
    ("transformers", "transformers.utils.chat_template_utils", "_compile_jinja_template"),
    ("transformers", "transformers.utils.chat_template_utils", "_get_control_token_patterns"),
    ("accelerate", "accelerate.state", "AcceleratorState._reset_state"),
    ("sacrebleu", "sacrebleu.metrics.base", "Metric._extract_corpus_statistics"),
    ("lm_eval", "lm_eval.api.task", "tqdm"),
    ("lm_eval", "evaluate", "load"),
    ("kfp", "kfp.local.docker_task_handler", "run_docker_container"),
    ("kfp", "kfp.local.subprocess_task_handler", "run_local_subprocess"),
    ("kfp", "kfp.local.cache", "LocalCache._serialize_value_for_key"),
    ("kfp", "kfp.local.cache", "LocalCache.compute_key"),
    ("kfp", "kfp.local.cache", "LocalCache.get"),
    ("kfp", "kfp.compiler.compiler_utils", "additional_input_name_for_pipeline_channel"),
)


def changed(library: str, what: str) -> str:
    folder = FOLDERS.get(library, "components/shared/third_party")
    return f"{library} {version(library)} has changed {what}: adapt {folder}/{library}.py"


@pytest.mark.parametrize(("library", "module", "name"), NAMES, ids=[f"{module}.{name}" for _, module, name in NAMES])
def test_the_name_exists(library: str, module: str, name: str) -> None:
    try:
        attrgetter(name)(import_module(module))
    except (ImportError, AttributeError):
        pytest.fail(changed(library, f"{module}.{name}"))


def test_torch_tells_whether_onednn_may_use_bf16_instructions() -> None:
    if not torch_names.has_bf16_products():
        pytest.skip("needs a processor with bf16 instructions")
    code = "from mixtune.components.shared.third_party.torch import has_bf16_products; print(has_bf16_products())"
    limited = {"ONEDNN_MAX_CPU_ISA": "AVX2", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=limited, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False", changed("torch", "_is_mkldnn_bf16_supported")


def test_torch_compiles_backward_passes_without_autocast() -> None:
    import torch._functorch.config as config

    before = config.backward_pass_autocast
    with torch_names.compiled_backward_without_autocast():
        assert config.backward_pass_autocast == "off", changed("torch", "the configuration of compiled backward passes")
    assert config.backward_pass_autocast == before


def test_torch_reverts_compile() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(2 * x)

    layer = Doubled(2, 2)
    layer.compile(backend=backend)
    layer(torch.ones(1, 2))
    assert len(compiled) == 1
    torch_names.uncompile(layer)
    layer.to(torch.float64)(torch.ones(1, 2, dtype=torch.float64))  # would be compiled again
    assert len(compiled) == 1, changed("torch", "Module._compiled_call_impl")


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(config)


def test_transformers_returns_the_attention_implementation() -> None:
    model = tiny_llama()
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        assert transformers.attention_implementation(model.config) == name, changed("transformers", "attention names")


def test_transformers_initializes_one_module() -> None:
    model = tiny_llama()
    layer = torch.nn.Linear(64, 64)
    torch.nn.init.constant_(layer.weight, 1.0)
    transformers.initialize(model, layer)
    spread = float(layer.weight.detach().std())
    assert spread == pytest.approx(model.config.initializer_range, rel=0.1), changed("transformers", "_init_weights")
    assert not layer.bias.any()


def test_accelerate_forgets_the_precision() -> None:
    from accelerate import Accelerator

    for precision in ("no", "bf16", "no"):
        accelerate.reset_state()
        chosen = Accelerator(mixed_precision=precision, cpu=True).mixed_precision
        assert chosen == precision, changed("accelerate", "AcceleratorState._reset_state")


def test_sacrebleu_computes_scores_from_sums_of_counts() -> None:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    from mixtune.components.shared.metrics import bleu_of_counts, chrf, over_split

    answers = ["The cat sat on the mat", "a dog barks loudly at the moon"]
    references = ["The cat sat on the old mat", "the dog barks at the full moon"]
    for metric, size in ((BLEU(), 10), (CHRF(), 18)):
        counts = [
            sacrebleu.counts_of(metric, answer, reference)
            for answer, reference in zip(answers, references, strict=True)
        ]
        assert {len(row) for row in counts} == {size}, changed("sacrebleu", "the counts of an example")
        sums = np.array(counts).sum(0)
        score = bleu_of_counts(sums) if size == 10 else over_split(chrf(sums[None].astype(float)), 1)
        expected = metric.corpus_score(answers, [references]).score / 100
        assert score == pytest.approx(expected), changed("sacrebleu", "scores")


def test_lm_eval_shows_no_progress_bars(capfd: pytest.CaptureFixture[str]) -> None:
    import lm_eval.api.task

    with harness.without_progress_bars():
        list(lm_eval.api.task.tqdm(range(3)))
    assert capfd.readouterr().err == "", changed("lm_eval", "its progress bars")
    list(lm_eval.api.task.tqdm(range(3)))
    assert "3/3" in capfd.readouterr().err


def test_lm_eval_loads_other_metrics_with_our_function() -> None:
    from lm_eval.api.registry import get_metric

    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        raise RuntimeError

    with harness.loading_metrics_with(load):
        get_metric("a metric that nobody has")
    assert asked == ["a metric that nobody has"], changed("lm_eval", "how it loads metrics")


def test_lm_eval_tells_missing_metrics() -> None:
    """`tests/components/evaluate/test_harness.py` loads such a task."""
    from lm_eval.api.task import ConfigurableTask

    assert "self._metric_fn_list[metric_name] =" in inspect.getsource(ConfigurableTask), changed(
        "lm_eval", "ConfigurableTask._metric_fn_list"
    )


def test_kfp_sets_a_variable_at_run_time(tmp_path: Any) -> None:
    @dsl.pipeline(name="shown")  # type: ignore[untyped-decorator]
    def pipeline(count: str = "1") -> None:
        task = prepare(config="{}")
        kfp_names.set_variable_at_run_time(task, "COUNT", count)
        task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(count)

    compiler.Compiler().compile(pipeline, str(tmp_path / "shown.yaml"))
    text = (tmp_path / "shown.yaml").read_text(encoding="utf-8")
    setting = "COUNT={{$.inputs.parameters['pipelinechannel--count']}}"
    assert setting in text, changed("kfp", "the command of a task or the names of its additional inputs")


def test_kfp_describes_the_inputs_of_a_component() -> None:
    inputs = kfp_names.inputs_of(compare)
    found = {name: (one.type.partition("@")[0], one.is_artifact_list) for name, one in inputs.items()}
    assert found["config"] == ("String", False), changed("kfp", "the inputs of a component")
    assert found["pretrained"] == ("system.Artifact", False), changed("kfp", "the inputs of a component")
    assert found["mixed"] == ("system.Artifact", True), changed("kfp", "the inputs of a component")
    assert "JSON" in inputs["config"].description, changed("kfp", "descriptions of inputs")


def test_kfp_runs_containers_with_our_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is not needed: KFP must look the function up when it runs a container, and give it these arguments."""
    from kfp.local import docker_task_handler

    monkeypatch.setattr(docker_task_handler, "run_docker_container", docker_task_handler.run_docker_container)
    theirs = inspect.signature(docker_task_handler.run_docker_container)
    expected = ["client", "image", "command", "volumes", "container_run_args"]
    assert list(theirs.parameters) == expected, changed("kfp", "run_docker_container")
    calls = inspect.getsource(docker_task_handler.DockerTaskHandler.run).count("return_code = run_docker_container(")
    assert calls, changed("kfp", "DockerTaskHandler.run")
    kfp_names.run_containers_with(lambda **_: 0)
    assert docker_task_handler.run_docker_container(image="any") == 0


def test_kfp_runs_commands_with_our_function(monkeypatch: pytest.MonkeyPatch) -> None:
    from kfp.local import config, subprocess_task_handler

    monkeypatch.setattr(subprocess_task_handler, "run_local_subprocess", subprocess_task_handler.run_local_subprocess)
    commands = []

    def run(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        commands.append((full_command, env_vars))
        return 0

    kfp_names.run_commands_with(run)
    # The command of a component as KFP compiles it, from which the step server takes the parts.
    container = prepare.pipeline_spec.deployment_spec["executors"]["exec-prepare"]["container"]
    command = [*container["command"], *container["args"]]
    handler = subprocess_task_handler.SubprocessTaskHandler(
        "python", command, "", config.SubprocessRunner(use_venv=False), {"NAME": "value"}
    )
    handler.run()
    ((given, environment),) = commands
    assert environment == {"NAME": "value"}, changed("kfp", "SubprocessTaskHandler.run")
    source, arguments = kfp_names.parts_of_command(given)
    assert "def prepare(" in source, changed("kfp", "the command of a component")
    assert arguments[0] == "--executor_input", changed("kfp", "the command of a component")
    assert arguments[2:] == ["--function_to_execute", "prepare"], changed("kfp", "the command of a component")


@pytest.mark.parametrize("module", ["sacrebleu", "lm_eval"])
def test_the_module_imports_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, mixtune.components.shared.third_party.{module}; "
        "print([name for name in ('torch', 'transformers', 'sacrebleu', 'lm_eval', 'evaluate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name",
    ["MASKED_LM", "CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "QUESTION_ANSWERING"],
)
def test_classes_are_read_from_the_source_of_transformers(name: str) -> None:
    theirs = getattr(import_module("transformers.models.auto.modeling_auto"), f"MODEL_FOR_{name}_MAPPING_NAMES")
    wanted = {kind: one if isinstance(one, str) else one[0] for kind, one in theirs.items()}
    found = transformers_sources.auto_classes(f"MODEL_FOR_{name}_MAPPING_NAMES")
    assert found == wanted, changed("transformers", "the mappings in models/auto/modeling_auto.py")
    assert transformers_sources.auto_classes("NO_SUCH_MAPPING") is None


def test_prefixes_are_read_from_the_source_of_transformers() -> None:
    names = import_module("transformers")
    for kind in ("llama", "gpt2", "qwen2", "bert", "xlm-roberta", "modernbert"):
        found = transformers_sources.base_prefixes(kind)
        assert found, changed("transformers", f"models/{kind}")
        for name, prefix in found.items():
            assert getattr(names, name).base_model_prefix == prefix, changed("transformers", name)
    assert transformers_sources.base_prefixes("no-such-type") == {}
