"""The training loop of all three stages: λ = 1 pretrains, λ = 0 fine-tunes, and values in between do both.

For each optimizer step, with N_pt and N_ft the counts of supervised tokens over all micro-batches and ranks,

    L = Σ_i w_i · ce_i,   w_i = λ / N_pt  for pretraining tokens,   (1 - λ) / N_ft  for fine-tuning tokens

times the number of ranks before backward, since DDP averages gradients. Every rank computes the rows of all ranks, so the
counts need no communication.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from ..checkpoints.keys import find_store
from ..checkpoints.resume import Sigterm, TrainingCheckpointer, TrainingJob, TrainingState
from ..config import Training
from ..errors import RefusedError
from ..model.bf16_on_cpu import fast_bf16
from ..model.device import pick_device, require_compiler
from ..model.expert_types import ADAPTED_EXPERTS, COMPILED_EXPERTS
from ..model.mixed_model import MixedModel
from ..model.packing import Segment
from ..model.precision import pick_precision
from ..model.sharding import is_sharded, whole
from ..running.context import Context
from ..third_party.accelerate import reset_state
from ..third_party.torch import uncompile
from ..value_text import losses_text
from .balance import routing_of_step
from .easy_examples import weigh_examples
from .interval import Interval, LogEntry
from .lora import add_adapters, merge_adapters
from .micro_batches import MicroBatchMaker
from .mix_weight import MixWeight
from .not_finite import explain_not_finite
from .optimizer import is_task_head, learning_rates, make_optimizer, make_schedule
from .osf import split_by_singular_values
from .out_of_memory import ExplainOutOfMemory
from .placing import place_model, shards, undo
from .pull_back import allowed_forgetting, pull_back
from .result import Result
from .stream_gradients import TugOfWar
from .streams import Mix
from .utilisation import Meter
from .variant import TrainingVariant


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
        model: on the CPU; the accelerator moves it. After a sharded training it is still sharded.
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
        if model.balance_weight is not None:
            raise RefusedError(COMPILED_EXPERTS.format(option="compile"))
    if variant.lora_rank is not None and not variant.lora_merge and model.balance_weight is not None:
        raise RefusedError(ADAPTED_EXPERTS)
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
    sharded = shards(training, [model, *(other for other in others if other is not None)], accelerator)
    if sharded and variant.osf_share is not None:
        raise RefusedError("parallelism: OSF cannot be trained with fsdp; use ddp")
    place = partial(place_model, sharded=sharded, device=device, precision=precision)
    trained = place(model)
    if start is not None:
        if not sharded:
            start.own_weights()
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

    def log(entry: LogEntry) -> None:
        result.curve.append(entry)
        values = {name: value for name, value in entry.items() if name != "step"}
        context.tracker.log_metrics(values, int(entry["step"] or 0) + (job.steps_before if job else 0))

    with (
        fast_bf16([each.lm for each in (trained, *references)], device, precision),
        ExplainOutOfMemory(trained, training) as memory,
        Sigterm() as sigterm,
        TrainingCheckpointer(result.checkpoints, state, training, accelerator, context, sigterm, job) as checkpointer,
    ):
        checkpointer.claim()
        search, watch = variant.search, variant.watch
        # Before a checkpoint's weights replace those of the start model.
        if reference is not None:
            reference = place(reference)
        if search is not None and search.control.reference is None:  # the first training of a search
            search.control.read_reference(reference or trained, accelerator)
        if watch is not None:
            if reference is not None:
                watch.read_reference(reference, accelerator, maker)
            at_start = watch.measure(trained, 0, accelerator, maker)
        if reference is not None and not sharded:
            reference.to("cpu")
        if variant.flow:
            weigh_examples(trained, mix, training, pad_id, accelerator, context)
        first, counters = checkpointer.restore()
        interval = Interval.restored(counters, device) if counters else Interval.new(device)
        started = time.monotonic() - result.seconds
        upcoming = maker.step(first) if first < steps else None
        if watch is not None and not first:
            log(at_start)
        ends = watch is not None and watch.stops(result.curve)
        with context.progress(steps, "steps", done=first) as progress:
            done = first
            for step in range(first, steps):
                if ends:
                    break
                checkpointer.before_step(step, interval)
                assert upcoming is not None
                data, micro_batches, batches = upcoming.data, upcoming.rows, partial(upcoming.on, device)
                memory.note(data, micro_batches[0])
                tug_of_war.before_first(data, batches)
                mix_weight_now = mix_weight.at(step)
                weights = mix_weight.weights(step, data.num_pretrain, data.sum_finetune)
                tug_of_war.before_step(step, data, weights, batches)
                routing = routing_of_step(trained, batches, accelerator)
                for number, (rows, batch) in enumerate(zip(micro_batches, batches(), strict=True)):
                    # Gradients are summed over micro-batches; ranks exchange them with the last micro-batch only.
                    with accelerator.no_sync(wrapped) if number + 1 < len(micro_batches) else contextlib.nullcontext():
                        start_logits = _start_logits(variant, rows, maker, accelerator)
                        losses = wrapped(
                            batch, *weights, kl_weight / max(data.tokens_finetune, 1), start_logits, routing
                        )
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

                if watch is not None and watch.is_due(step + 1):
                    log(watch.measure(trained, step + 1, accelerator, maker))
                    ends = watch.stops(result.curve)
                share = interval.count(data, mix_weight_now, weights)
                result.realised_mix_weight += share
                result.tokens["pretrain"] += data.tokens_pretrain
                result.tokens["finetune"] += data.tokens_finetune
                meter.after_step(data)
                progress.advance(tokens=data.tokens_pretrain + data.tokens_finetune)
                done = step + 1
                if done % training.log_every_steps == 0 or done == steps or ends:
                    entry = interval.entry(accelerator, done, float(norm), rates)
                    progress.measured(losses_text(entry))
                    log(entry)
                    interval = Interval.new(device)
                result.seconds = time.monotonic() - started
                checkpointer.after_step(done, interval)
    if watch is not None and done < steps:
        result.steps, result.stopped = done, watch.stopped(result.curve, done, steps)
        context.say(f"{context.title}: {result.stopped.sentence}")
    result.realised_mix_weight /= max(done, 1)
    result.utilisation = meter.measured()
    uncompile(trained.lm.base_model)
    if variant.merges:
        merge_adapters(trained)
    if search is not None:
        started = time.monotonic() - result.seconds
        found, error = search.control.forgetting(trained, accelerator)
        allowed = allowed_forgetting(search.limit, error)
        search.note(found, allowed)
        if search.done:
            result.pull_back = pull_back(trained, search.load_reference, search.control, found, allowed, accelerator)
            if found > allowed:
                how = (
                    f"its weights were pulled back to α = {result.pull_back:.3f} of their distance from the pretrained model's"
                    if result.pull_back < 1
                    else "pulling its weights back toward the pretrained model's does not lower that"
                )
                context.say(
                    f"the trained model forgets {found:.4f} nats per token of control text, with {allowed:.4f} allowed: {how}"
                )
        result.seconds = time.monotonic() - started
    if not sharded:
        undo(accelerator, wrapped, model, training)
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


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
