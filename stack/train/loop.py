"""The training loop."""

import time
from collections.abc import Callable

from stack.checkpoint.save import Saved, Saver
from stack.config.schema import Config
from stack.data.batches import Batches
from stack.health.guard import check_finite
from stack.observe.metrics import StepRecord
from stack.parallel.engine import Engine
from stack.parallel.step import RunningStep, StepResult
from stack.train.ahead import Prefetch, results
from stack.train.lr import learning_rate
from stack.train.state import TrainState


def train(
    cfg: Config,
    state: TrainState,
    *,
    engine: Engine,
    training: Batches,
    heldout: Batches,
    saver: Saver,
    asked: Callable[[], bool],
    replica: int,
    mfu: Callable[[StepResult], float | None],
    record: Callable[[StepRecord], None],
) -> TrainState:
    """Trains from `state` to `cfg.train.steps`. Ends earlier, after a save, if any rank was asked to end. Collective.

    Args:
        cfg: the config.
        state: the state from which training goes on.
        engine: this rank's engine.
        training: training batches.
        heldout: held-out batches.
        saver: saves checkpoints.
        asked: whether this rank was asked to end the run.
        replica: number of this rank's replica.
        mfu: returns the model FLOPs utilisation of a step, or None.
        record: called with one row after each step, on every rank; with `train.eval_first` also with a row of step 0.

    Returns:
        The state after the last step.

    Raises:
        NumericsError: the loss or the gradient norm stopped being finite.
        CheckpointError: several saves in a row failed, or the last one did.
    """
    if cfg.train.eval_first and state.step == 0:
        first, _ = evaluate(cfg, engine, heldout, replica)
        record(StepRecord.before_training(first, attempt=state.attempt, time=time.time()))
    steps = range(state.step, cfg.train.steps)
    with Prefetch(
        lambda step: engine.load(training.train(step, replica)), stop=steps.stop, ahead=cfg.data.prefetch
    ) as batches:

        def start(step: int) -> RunningStep:
            lr = learning_rate(step, cfg.train.steps, optim=cfg.optim, schedule=cfg.schedule)
            engine.seed(step)
            return engine.start_batch(batches.take(step), lr=lr)

        for result, last in results(
            start,
            steps,
            ahead=engine.runs_ahead,
            settle_after=lambda step: _eval_due(cfg, step + 1) or _save_due(cfg, step + 1),
            asked=asked,
        ):
            state = state.advance(tokens=result.tokens, sequences=cfg.batch.global_size, skipped=result.skipped)
            check_finite(step=state.step, loss=result.loss, grad_norm=result.grad_norm, loss_scale=result.loss_scale)
            heldout_loss = evaluate(cfg, engine, heldout, replica)[0] if _eval_due(cfg, state.step) else None
            saved = _save(saver, state, heldout_loss, last=last) if _save_due(cfg, state.step, last=last) else None
            record(_row(state, result, mfu=mfu(result), heldout_loss=heldout_loss, saved=saved or saver.finished()))
    return state


def evaluate(cfg: Config, engine: Engine, heldout: Batches, replica: int) -> tuple[float, int]:
    """Mean token loss over the first `train.eval_sequences` held-out sequences, in nats, and their number of targets.
    Collective."""
    count = min(cfg.train.eval_sequences, heldout.num_sequences)
    total, tokens = 0.0, 0
    for start in range(0, count, cfg.batch.global_size):
        batch = heldout.heldout(start, min(cfg.batch.global_size, count - start), replica)
        total += engine.eval_batch(batch)
        tokens += batch.global_target_tokens
    return total / tokens, tokens


def _eval_due(cfg: Config, step: int) -> bool:
    # With checkpoint.keep_best every saved step is evaluated, because the best checkpoints are chosen by their loss.
    return _due(cfg.train.eval_every, cfg, step) or (cfg.checkpoint.keep_best > 0 and _save_due(cfg, step))


def _save_due(cfg: Config, step: int, *, last: bool = False) -> bool:
    """Whether the state after `step` is saved; `last` says that `step` is the last one of this attempt."""
    return _due(cfg.checkpoint.every, cfg, step) or (last and cfg.checkpoint.every > 0)


def _due(every: int, cfg: Config, step: int) -> bool:
    return every > 0 and (step % every == 0 or step == cfg.train.steps)


def _save(saver: Saver, state: TrainState, heldout_loss: float | None, *, last: bool) -> Saved:
    return saver.save(state.step, state.saved(), heldout_loss=heldout_loss, last=last)


def _row(
    state: TrainState, result: StepResult, *, mfu: float | None, heldout_loss: float | None, saved: Saved | None
) -> StepRecord:
    return StepRecord(
        step=state.step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=result.lr,
        tokens=result.tokens,
        tokens_total=state.tokens,
        tokens_per_s=result.tokens / result.step_time_s,
        step_time_s=result.step_time_s,
        mfu=mfu,
        bubble_fraction=result.bubble_fraction,
        memory_peak_bytes=result.memory_peak_bytes,
        skipped_steps=state.skipped_steps,
        attempt=state.attempt,
        time=time.time(),
        heldout_loss=heldout_loss,
        router_aux_loss=result.router_aux_loss,
        loss_scale=result.loss_scale,
        checkpoint_stall_s=saved.stall_s if saved else None,
        checkpoint_write_s=saved.write_s if saved else None,
        stage_busy_s=result.stage_busy_s if len(result.stage_busy_s) > 1 else None,
    )
