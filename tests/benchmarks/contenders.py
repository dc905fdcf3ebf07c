"""mixtune and what people would use instead, each in its own real training loop, stopped between steps by a gate.

Every contender is a process of its own and trains only while its gate is open, so that the loops can be timed in alternation,
step for step, without being taken apart and without sharing threads, memory or a Python lock.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mixtune.components.shared.config import Training
from mixtune.components.shared.data.prepared import Documents
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.running.context import Context, ProgressCounter
from mixtune.components.shared.training.loop import train
from mixtune.components.shared.training.mix_weight import Constant, MixWeight, Pooled
from mixtune.components.shared.training.streams import FinetuneStream, PretrainStream, make_mix

from .workload import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    PAD_ID,
    WEIGHT_DECAY,
    Precision,
    Size,
    Steps,
    count_tokens,
    padded,
    rows_in_order,
    supervised,
)

MAX_STEPS = 400
datasets.disable_progress_bars()


@dataclass
class Taken:
    """What a process tells of the steps that it was let do.

    Attributes:
        seconds: that they took.
        tokens_per_step: real tokens.
        losses: of the steps so far, where asked for.
        peak_megabytes: of the process, since its start.
        anonymous_megabytes: that it holds now, without files that are mapped into it.
    """

    seconds: float
    tokens_per_step: float
    losses: list[float]
    peak_megabytes: int
    anonymous_megabytes: int


class Stopped(BaseException):
    """Ends a contender's loop."""


class Gate:
    """The process's end: lets its loop go on for as many steps as the other end asks for."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.losses: list[float] = []
        self.tokens_per_step = 0.0
        self._left, self._started = pipe.recv(), time.perf_counter()

    def step_ended(self) -> None:
        """Waits here while another contender is being timed."""
        self._left -= 1
        if self._left:
            return
        seconds = time.perf_counter() - self._started
        memory = (_megabytes("VmHWM"), _megabytes("RssAnon"))
        self._pipe.send(Taken(seconds, self.tokens_per_step, self.losses, *memory))
        self._left = self._pipe.recv()
        if not self._left:
            raise Stopped
        self._started = time.perf_counter()


def _megabytes(name: str) -> int:
    # Not getrusage, whose peak starts with the parent's.
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(name))
    return int(line.split()[1]) // 1024


@dataclass(frozen=True)
class Contender(ABC):
    """A training loop on a workload.

    Attributes:
        log: whether the loss of every step is wanted.
        compiled: by torch.compile, in each one's own way.
    """

    size: Size
    precision: Precision
    log: bool = field(default=False, kw_only=True)
    compiled: bool = field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        """For tables."""
        return self.setting + (", compiled" if self.compiled else "")

    @property
    @abstractmethod
    def setting(self) -> str:
        """All but whether it is compiled."""

    @abstractmethod
    def loop(self, gate: Gate) -> None:
        """Trains, and tells the gate after every optimizer step."""


class Running:
    """A contender's process, from outside."""

    def __init__(self, contender: Contender) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "trl"])
        self._pipe, theirs = context.Pipe()
        self.contender, self.name, self.last = contender, contender.name, Taken(0.0, 0.0, [], 0, 0)
        self._process = context.Process(target=_run, args=(contender, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, steps: int) -> Taken:
        """Trains for some steps; the first of all includes whatever the loop prepares."""
        self._pipe.send(steps)
        try:
            self.last = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} ended before its time; see its traceback above") from None
        return self.last

    def stop(self) -> None:
        """Ends the process."""
        self._pipe.send(0)
        self._process.join()


def _run(contender: Contender, pipe: Connection) -> None:
    with contextlib.suppress(Stopped):
        contender.loop(Gate(pipe))


class _GatedProgress(ProgressCounter):
    def __init__(self, gate: Gate) -> None:
        super().__init__("benchmark", MAX_STEPS, "steps", quiet=True)
        self._gate = gate

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        self._gate.step_ended()


class _GatedContext(Context):
    def __init__(self, gate: Gate) -> None:
        from mixtune.components.shared.tracking.tracker import Tracker

        super().__init__(title="benchmark", tracker=Tracker.off(), quiet=True)
        self._gate = gate
        self.tracker.log_metrics = lambda values, step=None: gate.losses.append(float(values["loss"] or 0))  # type: ignore[method-assign,assignment]

    @contextlib.contextmanager
    def progress(self, total: int, unit: str, what: str = "", done: int = 0) -> Iterator[ProgressCounter]:  # type: ignore[override]
        yield _GatedProgress(self._gate)


@dataclass(frozen=True)
class Mixtune(Contender):
    """mixtune's own loop, as every step of the pipeline runs it.

    Attributes:
        mix_weight: λ; None for the one that pooling gives.
        labels_only: a plain SFT step with as many tokens and as many labels.
        data: folders `pretrain` and `finetune` to read, in place of the drawn tokens.
    """

    mix_weight: float | None = None
    labels_only: bool = False
    data: Path | None = None

    @property
    def setting(self) -> str:
        return "mixtune, plain SFT step" if self.labels_only else "mixtune"

    def loop(self, gate: Gate) -> None:
        read: Any = Steps(self.size, labels_only=self.labels_only)
        gate.tokens_per_step = count_tokens(self.size, 0, 50)[0] / 50
        if self.data is not None:
            text = PretrainStream(Documents(self.data / "pretrain", "train"), self.size.max_length, 0)
            labelled = FinetuneStream(Documents(self.data / "finetune", "train"), 0, "generation")
            read = make_mix(text, labelled, 16, self.size.max_length, 0.4)
            gate.tokens_per_step = read.mean_tokens
        training = Training(
            steps=MAX_STEPS,
            learning_rate=LEARNING_RATE,
            schedule="constant",
            warmup_steps=0,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            micro_batch_size=64,
            compile=self.compiled,
            precision="bf16" if self.precision == "bfloat16" else "float32",
            log_every_steps=1 if self.log else MAX_STEPS,
        )
        weight: MixWeight = Pooled() if self.mix_weight is None else Constant(self.mix_weight)
        train(MixedModel(self.size.model()), read, training, weight, PAD_ID, 0, _GatedContext(gate))


class _GateCallback(TrainerCallback):
    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._gate.step_ended()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self._gate.losses.append(float(logs["loss"]))


def _arguments(contender: Contender, folder: str, micro_batch: int, accumulation: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": MAX_STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_GRAD_NORM,
        "optim": "adamw_torch_fused",
        "bf16": contender.precision == "bfloat16",
        "torch_compile": contender.compiled,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "steps" if contender.log else "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


def tokenizer(size: Size) -> PreTrainedTokenizerFast:
    """Words that are numbers: the data is token ids already, but trainers want a tokenizer."""
    words = {str(number): number for number in range(size.vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), pad_token="0", bos_token="1", eos_token="2"
    )


@dataclass(frozen=True)
class Trl(Contender):
    """TRL's SFTTrainer on both streams pooled.

    Attributes:
        micro_batch: rows in one forward pass.
        packed: length of a packed row in tokens; None trains one sequence a row, padded.
        steps: whose data there is.
    """

    micro_batch: int
    packed: int | None
    steps: int

    @property
    def setting(self) -> str:
        how = f"packed to {self.packed}" if self.packed else "not packed"
        return f"TRL, {how}, micro-batch {self.micro_batch}"

    def loop(self, gate: Gate) -> None:
        from trl import SFTConfig, SFTTrainer

        model = self.size.model()
        rows = datasets.Dataset.from_list(list(rows_in_order(self.size, self.steps)))
        real = count_tokens(self.size, 0, self.steps)[0]
        with tempfile.TemporaryDirectory() as folder:

            def trainer(accumulation: int) -> Any:
                given = _arguments(self, folder, self.micro_batch, accumulation)
                given |= {"max_length": self.packed or 4096, "packing": self.packed is not None}
                made = SFTTrainer(model, SFTConfig(**given), train_dataset=rows, processing_class=tokenizer(self.size))
                made.remove_callback(PrinterCallback)
                made.add_callback(_GateCallback(gate))
                return made

            made = trainer(-(-self.size.sequences // self.micro_batch))
            if self.packed is None:
                gate.tokens_per_step = real / self.steps * made.args.gradient_accumulation_steps * self.micro_batch
                gate.tokens_per_step /= self.size.sequences
            else:
                # As many packed rows in a step as make up its tokens.
                per_row = real / len(made.train_dataset)
                accumulation = max(1, round(real / self.steps / per_row / self.micro_batch))
                gate.tokens_per_step = per_row * accumulation * self.micro_batch
                made = trainer(accumulation)
            made.train()


@dataclass(frozen=True)
class TwoPass(Contender):
    """transformers' Trainer with the mixed loss in the way that people write it: one padded pass a stream, full logits.

    Attributes:
        mix_weight: λ.
        parts: micro-batches of a step.
        steps: whose data there is.
    """

    mix_weight: float
    parts: int
    steps: int

    @property
    def setting(self) -> str:
        return f"two padded passes, {self.parts} micro-batches"

    def loop(self, gate: Gate) -> None:
        rows, size, parts = list(rows_in_order(self.size, self.steps)), self.size, self.parts
        gate.tokens_per_step = count_tokens(size, 0, 50)[0] / 50
        items = []
        for step in range(self.steps):
            these = rows[step * size.sequences : (step + 1) * size.sequences]
            text, labelled = these[: size.windows], these[size.windows :]
            counts = [supervised(text), supervised(labelled)]
            items += [(text[part::parts], labelled[part::parts], counts) for part in range(parts)]
        mix_weight = self.mix_weight

        class Mixing(Trainer):
            def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
                text, labelled, (num_text, num_labelled) = inputs
                loss = mix_weight * model(**text, num_items_in_batch=num_text).loss
                loss = loss + (1 - mix_weight) * model(**labelled, num_items_in_batch=num_labelled).loss
                return loss * parts  # the trainer divides by the number of micro-batches

            def _prepare_inputs(self, inputs: Any) -> Any:
                return inputs

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(**_arguments(self, folder, 1, parts))
            trainer = Mixing(
                size.model(),
                arguments,
                train_dataset=_Items(items),
                data_collator=_collate_pair,
                callbacks=[_GateCallback(gate)],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()


class _Items(torch.utils.data.Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._items[index]


def _collate_pair(items: list[Any]) -> Any:
    (text, labelled, counts) = items[0]
    return padded(text), padded(labelled), counts


def trl_variants(size: Size, precision: Precision, steps: int) -> list[Trl]:
    """TRL with packing on and off, micro-batches of 1 to 8, accumulated to the same step."""
    lengths = (size.max_length, 4 * size.max_length)
    chosen: list[tuple[int, int | None]] = [(micro, None) for micro in (1, 2, 4, 8)]
    chosen += [(micro, length) for length in lengths for micro in (1, 2, 4, 8) if micro * length <= 8 * size.max_length]
    return [Trl(size, precision, micro, length, steps) for micro, length in chosen]


@dataclass(frozen=True)
class MatrixProduct(Contender):
    """Square matrix products, by which the machine's rate is measured in the same alternation: its tokens are FLOPs.

    Attributes:
        width: rows and columns.
        products: in a step.
    """

    width: int = 2048
    products: int = 10

    @property
    def setting(self) -> str:
        return "matrix product"

    def loop(self, gate: Gate) -> None:
        gate.tokens_per_step = self.products * 2 * self.width**3
        a, b, c = (torch.randn(self.width, self.width).to(getattr(torch, self.precision)) for _ in range(3))
        while True:
            for _ in range(self.products):
                torch.mm(a, b, out=c)
            gate.step_ended()
