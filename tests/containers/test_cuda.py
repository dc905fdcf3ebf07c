"""The images' CUDA variant, on a machine without a GPU: what a training compiles when it starts is compiled in it.

It takes 10 GB of disk and some minutes, so that it is built only with TEST_CUDA_IMAGE=1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.metadata import distribution
from pathlib import Path

import pytest

from . import engine
from .conftest import Built

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TEST_CUDA_IMAGE") != "1", reason="TEST_CUDA_IMAGE=1 builds 7 GB"),
]

IMAGE = "mixtune-test-cuda:1"
COMPILES = r"""
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.compiler import ASTSource
from triton.runtime.build import compile_module_from_src

@triton.jit
def add(x, y, n, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)

signature = {"x": "*fp32", "y": "*fp32", "n": "i32", "SIZE": "constexpr"}
kernel = triton.compile(ASTSource(add, signature, {"SIZE": 128}), target=GPUTarget("cuda", 90, 32))
assert kernel.asm["cubin"][:4] == b"\x7fELF"
# what triton builds in C for each process: needs its headers, Python's, and a compiler
source = '#include "cuda.h"\n#include <Python.h>\nstatic struct PyModuleDef of = {PyModuleDef_HEAD_INIT, "probe", 0, -1, 0};' \
    "PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&of); }"
assert compile_module_from_src(source, "probe", include_dirs=driver.include_dirs).__name__ == "probe"
assert torch.compile(lambda x: torch.nn.functional.gelu(x) * 2)(torch.ones(4)).shape == (4,)
print(torch.__version__, torch.version.cuda)
"""


@pytest.fixture(scope="module")
def cuda(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Built:
    settings = tmp_path_factory.mktemp("build") / "pip.conf"
    settings.write_text("[global]\nretries = 6\n", encoding="utf-8")
    secrets = [f"id=pip_conf,src={settings}"]
    secrets += [f"id=ca,src={os.environ['PIP_CERT']}"] if os.environ.get("PIP_CERT") else []
    command = [
        engine.docker(), "-H", built.host, "build", "--file=docker/Dockerfile", "--target=pretrain", f"--tag={IMAGE}",
        "--build-arg=TORCH_VARIANT=cuda", "--network=host", *(f"--secret={secret}" for secret in secrets), ".",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=engine.ROOT,
        env={**os.environ, "DOCKER_BUILDKIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return built


def python(cuda: Built, code: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs Python as anybody, where nothing but the home and /tmp can be written to; triton reads a kernel's source file."""
    script = folder / "script.py"
    script.write_text(code, encoding="utf-8")
    return cuda.docker(
        "run", "--rm", "--network=none", "--read-only", "--cap-drop=ALL", "--user=1234567:0", "--tmpfs=/tmp",
        "--tmpfs=/home/mixtune:mode=1777,exec", f"--volume={script}:/script.py:ro", "--entrypoint=python3",
        *options, IMAGE,
        "/script.py", check=False,
    )  # fmt: skip


def test_what_a_training_compiles_is_compiled(cuda: Built, tmp_path: Path) -> None:
    done = python(cuda, COMPILES, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1].startswith("13.")


def test_without_a_gpu_it_says_that_the_node_lacks_one(cuda: Built, tmp_path: Path) -> None:
    code = "from mixtune.components.shared.model.device import pick_device\npick_device()"
    done = python(cuda, code, tmp_path, "--env=MIXTUNE_GPUS=1")
    assert "the task asked for 1 GPU, but torch finds none" in done.stderr
    assert "is built for CUDA 13." in done.stderr


def test_what_a_gpu_is_compared_with_is_right_on_the_cpu(cuda: Built, tmp_path: Path) -> None:
    """All of tests/gpu that needs no GPU. The image has no pytest, so that it is mounted."""
    for name in ("pytest", "pluggy", "iniconfig", "hypothesis", "sortedcontainers"):
        for file in distribution(name).files or []:
            target = tmp_path / "packages" / file
            if ".." not in file.parts and Path(str(file.locate())).is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), target)
    done = cuda.docker(
        "run", "--rm", "--network=none", "--read-only", "--cap-drop=ALL", "--user=1234567:0", "--tmpfs=/tmp:exec",
        "--tmpfs=/home/mixtune:mode=1777,exec", f"--volume={engine.ROOT}:/repository:ro", "--workdir=/repository",
        f"--volume={tmp_path / 'packages'}:/packages:ro", "--env=PYTHONPATH=/packages", "--env=GPU_TESTS=all",
        "--entrypoint=python3", IMAGE, "-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider", "-q",
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
