"""The training loop of all three stages: λ = 1 pretrains, λ = 0 fine-tunes, and values in between do both.

For each optimizer step, with N_pt and N_ft the counts of supervised tokens over all micro-batches and ranks,

    L = Σ_i w_i · ce_i,   w_i = λ / N_pt  for pretraining tokens,   (1 - λ) / N_ft  for fine-tuning tokens

times the number of ranks before backward, since DDP averages gradients. Every rank computes the rows of all ranks, so the
counts need no communication.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from ..artifacts import Utilisation
from ..checkpoints.keys import find_store
from ..checkpoints.resume import Sigterm, TrainingCheckpointer, TrainingJob, TrainingState
from ..checkpoints.store import CheckpointStore
from ..config import Training
from ..errors import RefusedError
from ..model.bf16_on_cpu import fast_bf16
from ..model.device import pick_device, require_compiler
from ..model.mixed_model import MixedModel
from ..model.packing import Segment
from ..model.precision import pick_precision
from ..model.sharding import fits, gather, is_sharded, shard, whole
from ..running.context import Context
from ..running.processes import is_main
from ..third_party.accelerate import reset_state
from ..third_party.torch import uncompile
from ..value_text import losses_text
from .control import ControlText
from .easy_examples import weigh_examples
from .interval import Interval, LogEntry
from .lora import add_adapters, merge_adapters
from .micro_batches import MicroBatchMaker
from .mix_weight import MixWeight
from .not_finite import explain_not_finite
from .optimizer import is_task_head, learning_rates, make_optimizer, make_schedule
from .osf import split_by_singular_values
from .out_of_memory import ExplainOutOfMemory
from .pull_back import pull_back
from .reference_models import ReferenceModel
from .stream_gradients import TugOfWar
from .streams import Mix
from .utilisation import Meter


@dataclass
class Result:
    """The result of a training.

    Attributes:
        curve: one object for each logged step.
        steps: optimizer steps.
        tokens: tokens processed, by stream.
        realised_mix_weight: pretraining tokens' share of the gradient weights, averaged over the steps.
        pull_back: α of the pull back to the forgetting budget, 1 if there was none; None without a budget.
        seconds: wall-clock time of the loop, summed over all attempts.
        flops: model FLOPs, of all processes and attempts.
        utilisation: what the training made of its machine.
        main: whether this is the process that writes the outputs.
        checkpoints: the checkpoint store; to be marked as finished after the model is written.
    """

    curve: list[LogEntry] = field(default_factory=list)
    steps: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: {"pretrain": 0, "finetune": 0})
    realised_mix_weight: float = 0.0
    pull_back: float | None = None
    seconds: float = 0.0
    flops: float = 0.0
    utilisation: Utilisation = field(default_factory=Utilisation)
    device: str = "cpu"
    precision: str = "float32"
    processes: int = 1
    main: bool = field(default_factory=is_main)
    checkpoints: CheckpointStore | None = None


@dataclass(frozen=True)
class TrainingVariant:
    """Optional parts of a training besides the mixed loss.

    Attributes:
        control: text on which forgetting is measured, for a forgetting budget.
        reference: model that forgetting is measured against; None means the start model.
        load_reference: loads the model that forgetting is measured against.
        limit: forgetting on control text that the trained model may have, in nats per token; None means any.
        start: model that the penalties pull towards.
        kl_weight: penalty on KL(start || model), a mean over the tokens of the fine-tuning stream.
        l2sp_weight: penalty on the squared distance from the start model's weights.
        lora_rank: train low-rank adapters of this rank instead of the backbone.
        osf_share: keep this fraction of each matrix's singular directions, and train the others.
        flow: weigh the labelled examples by the start model's loss on them.
    """

    control: ControlText | None = None
    reference: MixedModel | None = None
    load_reference: Callable[[], MixedModel] | None = None
    limit: float | None = None
    start: ReferenceModel | None = None
    kl_weight: float = 0.0
    l2sp_weight: float = 0.0
    lora_rank: int | None = None
    osf_share: float | None = None
    flow: bool = False

    @property
    def adapted(self) -> bool:
        """Tells whether peft's modules are trained instead of the backbone's weights."""
        return self.lora_rank is not None or self.osf_share is not None


def train(
    model: MixedModel,
    mix: Mix,
    training: Training,
    mix_weight: MixWeight,
    pad_id: int,
    seed: int,
    context: Context,
    variant: TrainingVariant | None = None,
    job: TrainingJob | None = None,
) -> Result:
    """Trains the model in place. Resumes from the newest checkpoint of the same training if there is one.

    Args:
        model: on the CPU; the accelerator moves it.
        mix: the data of each optimizer step. A stream that is None is not part of the loss.
        mix_weight: λ.
        pad_id: token id for padding.
        variant: reference models, penalties, adapters.
        job: identity of the training; None disables checkpoints.

    Raises:
        RefusedError: if warm-up would take longer than the training, or if code cannot be compiled here.
        MixtuneError: if a loss or a gradient is not finite (the weights are then those before that step), or if there is no
            space for a checkpoint.
        SystemExit: with status 143 after a SIGTERM; the state is saved.
    """
    variant = variant or TrainingVariant()
    kl_weight = variant.kl_weight
    steps = mix.steps(training)
    if steps and training.warmup_steps >= steps:
        raise RefusedError(
            f"warmup_steps: must be below the {steps} steps of the training, found {training.warmup_steps}"
        )
    if training.compile:
        require_compiler("compile")
    precision = pick_precision(training.precision)
    # bf16 libraries compile or select kernels for each shape, so widths are rounded to reduce the number of shapes.
    width_multiple = 8 if precision == "bf16" else 1
    reset_state()  # an earlier training in this process may have used another precision
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=pick_device().type == "cpu")
    set_seed(seed)
    device = accelerator.device
    world, rank = accelerator.num_processes, accelerator.process_index
    result = Result(
        steps=steps,
        device=_device_name(device),
        precision=precision,
        processes=world,
        main=accelerator.is_main_process,
    )
    start, reference = variant.start, variant.reference
    others = [reference, start.model if start is not None else None]
    if result.main:
        layout = {"device": result.device, "precision": precision}
        read = [other for other in others if other is not None]
        result.checkpoints = find_store(job, model, read, layout, context)
    if variant.lora_rank is not None:
        add_adapters(model, variant.lora_rank)
    if variant.osf_share is not None:
        split_by_singular_values(model, variant.osf_share)
    if rank:
        set_seed(seed, device_specific=True)  # new adapters are the same on all ranks, dropout is not
    _freeze_what_has_no_loss(model, mix)
    sharded = _shards(training, [model, *(other for other in others if other is not None)], accelerator)
    if sharded and variant.lora_rank is not None and variant.limit is not None:
        raise RefusedError(
            "parallelism: with fsdp, low-rank adapters cannot be trained to a forgetting budget; use ddp"
        )
    if sharded and variant.osf_share is not None:
        raise RefusedError("parallelism: OSF cannot be trained with fsdp; use ddp")
    place = partial(_place, sharded=sharded, device=device, precision=precision)
    trained = place(model)
    if start is not None:
        start.model = place(start.model)
    if reference is not None and sharded:
        reference = place(reference)
    references = [each for each in (reference, start.model if start is not None else None) if each is not None]
    if training.gradient_checkpointing:
        trained.lm.gradient_checkpointing_enable({"use_reentrant": False})
    if training.compile:
        trained.lm.base_model.compile(dynamic=True)
    optimizer = make_optimizer(trained, training)
    schedule = make_schedule(optimizer, training, steps)
    state = TrainingState(trained, optimizer, schedule, mix_weight, result)
    meter = Meter(trained, device, result)
    # A sharded model exchanges gradients by itself: it is prepared as one that does not.
    wrapped = accelerator.prepare_model(trained, device_placement=False, evaluation_mode=sharded)
    optimizer = accelerator.prepare_optimizer(optimizer)
    wrapped.train()
    maker = MicroBatchMaker(mix, rank, world, training.micro_batch_size, pad_id, width_multiple)
    tug_of_war = TugOfWar(accelerator, wrapped, mix_weight, steps)

    with (
        fast_bf16([each.lm for each in (trained, *references)], device, precision),
        ExplainOutOfMemory(trained, training) as memory,
        Sigterm() as sigterm,
        TrainingCheckpointer(result.checkpoints, state, training, accelerator, context, sigterm, job) as checkpointer,
    ):
        checkpointer.claim()
        control = variant.control
        if control is not None:  # before a checkpoint's weights replace those of the start model
            control.read_reference(place(reference) if reference is not None else trained, accelerator)
            if reference is not None and not sharded:
                reference.to("cpu")
        if variant.flow:
            weigh_examples(trained, mix, training, pad_id, accelerator, context)
        first, counters = checkpointer.restore()
        interval = Interval.restored(counters, device) if counters else Interval.new(device)
        started = time.monotonic() - result.seconds
        upcoming = maker.step(first) if first < steps else None
        with context.progress(steps, "steps", done=first) as progress:
            for step in range(first, steps):
                checkpointer.before_step(step, interval)
                assert upcoming is not None
                data, micro_batches, batches = upcoming.data, upcoming.rows, partial(upcoming.on, device)
                memory.note(data, micro_batches[0])
                tug_of_war.before_first(data, batches)
                mix_weight_now = mix_weight.at(step)
                weights = mix_weight.weights(step, data.num_pretrain, data.sum_finetune)
                tug_of_war.before_step(step, data, weights, batches)
                for number, (rows, batch) in enumerate(zip(micro_batches, batches(), strict=True)):
                    # Gradients are summed over micro-batches; ranks exchange them with the last micro-batch only.
                    with accelerator.no_sync(wrapped) if number + 1 < len(micro_batches) else contextlib.nullcontext():
                        start_logits = _start_logits(variant, rows, maker, accelerator)
                        losses = wrapped(batch, *weights, kl_weight / max(data.tokens_finetune, 1), start_logits)
                        accelerator.backward(losses.pop("weighted") * world)
                    for name, loss in losses.items():
                        interval.sums[name] += loss
                    interval.sums["positions"] += batch.input_ids.numel()
                    if number + 1 < len(micro_batches):
                        checkpointer.end_if_terminated()
                interval.gradients = tug_of_war.after_step(data, weights) or interval.gradients
                if start is not None and variant.l2sp_weight:
                    penalty = start.pull(trained, variant.l2sp_weight)
                    interval.sums["l2sp"] += penalty / world  # each rank has the whole of it
                norm = whole(accelerator.clip_grad_norm_(wrapped.parameters(), training.max_grad_norm))
                # A GPU still computes here. The check of the norm waits for it.
                upcoming = maker.step(step + 1) if step + 1 < steps else None
                if not torch.isfinite(norm):
                    optimizer.zero_grad(set_to_none=True)
                    raise explain_not_finite(trained, mix, data, step, pad_id)
                rates = learning_rates(optimizer)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)

                if control is not None and control.is_due(step + 1):
                    share = rates.get("learning_rate", 0.0) / training.learning_rate
                    mix_weight.observe(*control.measure(trained, step + 1, accelerator), step + 1, share)
                share = interval.count(data, mix_weight_now, weights)
                result.realised_mix_weight += share
                result.tokens["pretrain"] += data.tokens_pretrain
                result.tokens["finetune"] += data.tokens_finetune
                meter.after_step(data)
                progress.advance(tokens=data.tokens_pretrain + data.tokens_finetune)
                if (step + 1) % training.log_every_steps == 0 or step + 1 == steps:
                    entry = interval.entry(accelerator, step + 1, float(norm), rates, mix_weight)
                    result.curve.append(entry)
                    progress.measured(losses_text(entry))
                    context.tracker.log_metrics(
                        {name: value for name, value in entry.items() if name != "step"}, step + 1
                    )
                    interval = Interval.new(device)
                result.seconds = time.monotonic() - started
                checkpointer.after_step(step + 1, interval)
    result.realised_mix_weight /= max(steps, 1)
    result.utilisation = meter.measured()
    uncompile(trained.lm.base_model)
    if variant.adapted and not sharded:
        merge_adapters(trained)
    if control is not None and variant.load_reference is not None and variant.limit is not None:
        started = time.monotonic() - result.seconds
        result.pull_back, found = pull_back(trained, variant.load_reference, control, variant.limit, accelerator)
        result.seconds = time.monotonic() - started
        if result.pull_back < 1:
            context.say(
                f"the trained model forgets {found:.4f} nats per token of control text, more than {variant.limit:.4f}: its "
                f"weights were pulled back to α = {result.pull_back:.3f} of their distance from the pretrained model's"
            )
    _undo(accelerator, wrapped, trained, model, training, variant)
    return result


def _start_logits(
    variant: TrainingVariant, rows: list[list[Segment]], maker: MicroBatchMaker, accelerator: Accelerator
) -> Tensor | None:
    """Returns the start model's logits for a micro-batch's examples, for the penalty on the divergence from them."""
    parts = [[segment for segment in row if not segment.pretrain] for row in rows]
    labelled = [row for row in parts if row]
    if variant.start is None or not variant.kl_weight or not (labelled or is_sharded(variant.start.model)):
        return None
    # All processes run a sharded model, including those that have no example.
    batch = maker.collate(labelled or rows[:1]).to(accelerator.device)
    with accelerator.autocast():
        logits = variant.start.finetune_logits(batch)
    return logits if labelled else None


def _freeze_what_has_no_loss(model: MixedModel, mix: Mix) -> None:
    """Freezes the head that has no loss at λ = 0 or λ = 1, so that weight decay does not change it."""
    backbone = model.lm.base_model
    if mix.finetune is None:
        # Selected by name: a weight that both heads share is listed under its name in the LM head.
        for name, parameter in model.named_parameters():
            if is_task_head(name):
                parameter.requires_grad_(False)
    if mix.pretrain is None and model.task is not None:
        # Keep weights tied to the embeddings, which belong to the backbone, and weights that the task head shares.
        with_loss = {id(parameter) for parameter in (*backbone.parameters(), *model.task.parameters())}
        for parameter in model.lm.parameters():
            if id(parameter) not in with_loss:
                parameter.requires_grad_(False)


def _shards(training: Training, models: list[MixedModel], accelerator: Accelerator) -> bool:
    """Tells whether the processes share the models' weights."""
    if accelerator.num_processes == 1 or training.parallelism == "ddp":
        return False
    if training.parallelism == "fsdp":
        return True
    device = accelerator.device
    return (
        device.type == "cuda"
        and not training.compile
        and not fits(models, torch.cuda.get_device_properties(device).total_memory)
    )


def _place(model: MixedModel, sharded: bool, device: torch.device, precision: str) -> MixedModel:
    """Returns the model on this process's device: a sharded copy, or the model itself."""
    return model.to(device) if not sharded or is_sharded(model) else shard(model, device, precision)


def _undo(
    accelerator: Accelerator,
    wrapped: torch.nn.Module,
    trained: MixedModel,
    model: MixedModel,
    training: Training,
    variant: TrainingVariant,
) -> None:
    """Returns the model to its original form: unwrapped, with plain weights, on the CPU.

    After a sharded training, the first process only has weights.
    """
    if is_sharded(trained):
        gather(trained, model, accelerator.is_main_process)
        if not accelerator.is_main_process:
            return
        if variant.adapted:
            merge_adapters(model)
    else:
        # accelerate also wraps `forward`; unwrap it too.
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False).to("cpu")
    if training.gradient_checkpointing:
        model.lm.gradient_checkpointing_disable()
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
