"""mixtune and what people would use instead, each in its own real training loop, stopped between steps by a gate.

Every contender runs in a thread of its own and trains only while the gate is open, so that the loops can be timed in
alternation, step for step, without being taken apart.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mixtune.components.shared.config import Training
from mixtune.components.shared.context import Context, Progress
from mixtune.components.shared.mix_weight import Constant, MixWeight, Pooled
from mixtune.components.shared.model import MixedModel
from mixtune.components.shared.streams import Mix
from mixtune.components.shared.training import train

from .workload import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    PAD_ID,
    WEIGHT_DECAY,
    Precision,
    Size,
    Steps,
    count_tokens,
    rows_in_order,
)

MAX_STEPS = 400


class Stopped(BaseException):
    """Ends a contender's thread."""


class Contender(ABC):
    """A training loop that can be run for a number of steps at a time.

    Attributes:
        losses: of each step, where asked for.
    """

    tokens_per_step: float

    def __init__(self, name: str, size: Size, precision: Precision, log: bool = False) -> None:
        self.name, self.size, self.precision, self.log = name, size, precision, log
        self.losses: list[float] = []
        self._open = threading.Semaphore(0)
        self._arrived = threading.Semaphore(0)
        self._left = 0
        self._stop = False
        self._error: BaseException | None = None
        self.model: Any = None
        self.steps_done = 0
        self._thread = threading.Thread(target=self._work, daemon=True)

    @abstractmethod
    def loop(self) -> None:
        """Trains, and calls `step_ended` after every optimizer step."""

    def step_ended(self) -> None:
        """Waits here while another contender is being timed."""
        self.steps_done += 1
        self._left -= 1
        if self._left <= 0:
            self._arrived.release()
            self._open.acquire()
        if self._stop:
            raise Stopped

    def _work(self) -> None:
        self._open.acquire()
        try:
            self.loop()
        except Stopped:
            pass
        except BaseException as error:
            self._error = error
        self._arrived.release()

    def run(self, steps: int) -> float:
        """Trains for some steps.

        Returns:
            The seconds that they took.
        """
        if not self._thread.is_alive():
            self._thread.start()
        self._left = steps
        started = time.perf_counter()
        self._open.release()
        self._arrived.acquire()
        seconds = time.perf_counter() - started
        if self._error is not None:
            raise self._error
        return seconds

    def stop(self) -> None:
        """Ends the loop and frees what it holds."""
        self._stop = True
        self._open.release()
        self._thread.join()
        self.model = None


class _GatedProgress(Progress):
    def __init__(self, contender: Contender) -> None:
        super().__init__(contender.name, MAX_STEPS, "steps", quiet=True)
        self._contender = contender

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        self._contender.step_ended()


class Mixtune(Contender):
    """mixtune's own loop, as every step of the pipeline runs it."""

    def __init__(
        self,
        size: Size,
        precision: Precision,
        mix_weight: float | None = None,
        labels_only: bool = False,
        log: bool = False,
        micro_batch: int = 64,
        seed: int = 0,
        name: str = "mixtune",
    ) -> None:
        super().__init__(name, size, precision, log)
        self._mix_weight: MixWeight = Pooled() if mix_weight is None else Constant(mix_weight)
        self._steps: Any = Steps(size, seed, labels_only)
        self._micro_batch = micro_batch
        self.tokens_per_step = count_tokens(size, 0, 50)[0] / 50

    def read(self, mix: Mix) -> None:
        """Has it train on data from disk instead."""
        self._steps, self.tokens_per_step = mix, mix.mean_tokens

    def loop(self) -> None:
        self.model = MixedModel(self.size.model())
        training = Training(
            steps=MAX_STEPS,
            learning_rate=LEARNING_RATE,
            schedule="constant",
            warmup_steps=0,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            micro_batch_size=self._micro_batch,
            precision="bf16" if self.precision == "bfloat16" else "float32",
            log_every_steps=1 if self.log else MAX_STEPS,
        )
        context = _GatedContext(self)
        train(self.model, self._steps, training, self._mix_weight, PAD_ID, 0, context)


class _GatedContext(Context):
    def __init__(self, contender: Mixtune) -> None:
        from mixtune.components.shared.tracking import Tracker

        super().__init__(title="benchmark", tracker=Tracker.off(), quiet=True)
        self._contender = contender
        if contender.log:
            self.tracker.log_metrics = lambda values, step=None: contender.losses.append(float(values["loss"] or 0))  # type: ignore[method-assign,assignment]

    @contextlib.contextmanager
    def progress(self, total: int, unit: str, what: str = "", done: int = 0) -> Iterator[Progress]:  # type: ignore[override]
        yield _GatedProgress(self._contender)


class _Gate(TrainerCallback):
    def __init__(self, contender: Contender) -> None:
        self._contender = contender

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._contender.step_ended()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self._contender.losses.append(float(logs["loss"]))


def _arguments(folder: str, micro_batch: int, accumulation: int, precision: Precision, log: bool) -> dict[str, Any]:
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
        "bf16": precision == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "steps" if log else "no",
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


class Trl(Contender):
    """TRL's SFTTrainer on both streams pooled.

    Args:
        packed: length of a packed row in tokens; None trains one sequence a row, padded.
    """

    def __init__(
        self, size: Size, precision: Precision, micro_batch: int, packed: int | None, steps: int, log: bool = False
    ) -> None:
        how = f"packed to {packed}" if packed else "not packed"
        super().__init__(f"TRL, {how}, micro-batch {micro_batch}", size, precision, log)
        self._micro_batch, self._packed, self._steps = micro_batch, packed, steps

    def loop(self) -> None:
        from trl import SFTConfig, SFTTrainer

        self.model = self.size.model()
        rows = datasets.Dataset.from_list(list(rows_in_order(self.size, self._steps)))
        real = count_tokens(self.size, 0, self._steps)[0]
        with tempfile.TemporaryDirectory() as folder:

            def trainer(accumulation: int) -> Any:
                given = _arguments(folder, self._micro_batch, accumulation, self.precision, self.log)
                given |= {"max_length": self._packed or 4096, "packing": self._packed is not None}
                made = SFTTrainer(
                    self.model, SFTConfig(**given), train_dataset=rows, processing_class=tokenizer(self.size)
                )
                made.remove_callback(PrinterCallback)
                made.add_callback(_Gate(self))
                return made

            made = trainer(-(-self.size.sequences // self._micro_batch))
            if self._packed is None:
                self.tokens_per_step = real / self._steps * made.args.gradient_accumulation_steps * self._micro_batch
                self.tokens_per_step /= self.size.sequences
            else:
                # As many packed rows in a step as make up its tokens.
                per_row = real / len(made.train_dataset)
                accumulation = max(1, round(real / self._steps / per_row / self._micro_batch))
                self.tokens_per_step = per_row * accumulation * self._micro_batch
                made = trainer(accumulation)
            made.train()


class TwoPass(Contender):
    """transformers' Trainer with the mixed loss in the way that people write it: one padded pass a stream, full logits.

    Args:
        parts: micro-batches of a step.
    """

    def __init__(
        self, size: Size, precision: Precision, mix_weight: float, parts: int, steps: int, log: bool = False
    ) -> None:
        super().__init__(f"two padded passes, {parts} micro-batches", size, precision, log)
        self._mix_weight, self._parts, self._steps = mix_weight, parts, steps
        self.tokens_per_step = count_tokens(size, 0, 50)[0] / 50

    def loop(self) -> None:
        self.model = self.size.model()
        rows, size, parts = list(rows_in_order(self.size, self._steps)), self.size, self._parts
        items = []
        for step in range(self._steps):
            these = rows[step * size.sequences : (step + 1) * size.sequences]
            text, labelled = these[: size.windows], these[size.windows :]
            counts = [supervised(text), supervised(labelled)]
            items += [(text[part::parts], labelled[part::parts], counts) for part in range(parts)]
        mix_weight = self._mix_weight

        class Mixing(Trainer):
            def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
                text, labelled, (num_text, num_labelled) = inputs
                loss = mix_weight * model(**text, num_items_in_batch=num_text).loss
                loss = loss + (1 - mix_weight) * model(**labelled, num_items_in_batch=num_labelled).loss
                return loss * parts  # the trainer divides by the number of micro-batches

            def _prepare_inputs(self, inputs: Any) -> Any:
                return inputs

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(**_arguments(folder, 1, parts, self.precision, self.log))
            trainer = Mixing(
                self.model, arguments, train_dataset=_Items(items), data_collator=_collate_pair, callbacks=[_Gate(self)]
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


def supervised(rows: list[dict[str, list[int]]]) -> int:
    """Tokens with a label, after the shift."""
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def _collate_pair(items: list[Any]) -> Any:
    (text, labelled, counts) = items[0]
    return padded(text), padded(labelled), counts


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows as tensors, padded to the longest."""
    width = max(len(row["input_ids"]) for row in rows)

    def tensor(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": tensor("input_ids", PAD_ID), "attention_mask": mask, "labels": tensor("labels", -100)}


def trl_variants(size: Size, precision: Precision, steps: int) -> list[Callable[[], Trl]]:
    """TRL with packing on and off, micro-batches of 1 to 8, accumulated to the same step."""
    chosen = [(micro, None) for micro in (1, 2, 4, 8)]
    lengths = (size.max_length, 4 * size.max_length)
    packed = [(micro, length) for length in lengths for micro in (1, 2, 4, 8) if micro * length <= 8 * size.max_length]
    return [
        (lambda micro=micro, length=length: Trl(size, precision, micro, length, steps))  # type: ignore[misc]
        for micro, length in [*chosen, *packed]
    ]
