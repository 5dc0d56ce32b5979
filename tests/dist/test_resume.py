"""A run that was killed at any moment resumes bit for bit as if it had never been killed."""

import json
from pathlib import Path
from typing import Any

import pytest

from stack.checkpoint import manifest as manifests
from stack.health.faults import FAULT
from stack.observe.jsonl import latest, read
from stack.train.rundir import RunDir, read_json
from tests.helpers.forked import tiny_again, tiny_run
from tests.helpers.tiers import in_ci_unless

_STEPS = 6
#: Has dropout and a corpus of few steps, so that an error in restoring either shows.
_RUN = {
    "train.steps": _STEPS,
    "checkpoint.every": 2,
    "checkpoint.keep_last": 2,
    "train.eval_every": 3,
    "model.attention": "eager",
    "+model.config.attention_dropout": 0.2,
    "schedule.warmup_steps": 2,
}
_SAVED_LAST = 4

Curve = list[tuple[int, str, str, int, str]]


def curve(run: RunDir) -> Curve:
    """(step, loss, gradient norm, tokens, held-out loss) of each step that counts; floats with all bits."""
    rows = latest(read(run.metrics))
    return [(r.step, r.loss.hex(), r.grad_norm.hex(), r.tokens_total, (r.heldout_loss or 0.0).hex()) for r in rows]


def start(zygote: Any, run: RunDir, ranks: int = 2, **environment: str) -> list[int]:
    return zygote.run(["--config", str(run.config)], ranks, env=environment)


def log(run: RunDir, rank: int = 0) -> str:
    return (run.rank(rank) / "log.txt").read_text()


def straight(zygote: Any, folder: Path, settings: dict[str, Any], ranks: int = 2) -> Curve:
    run = tiny_run(folder, settings)
    assert start(zygote, run, ranks) == [0] * ranks, log(run)
    return curve(run)


@pytest.fixture(scope="module")
def expected(_zygotes, tmp_path_factory):
    """The curve of `_RUN` without a fault."""
    made: list[Curve] = []

    def of(zygote: Any) -> Curve:
        if not made:
            made.append(straight(zygote, tmp_path_factory.mktemp("straight"), _RUN))
        return made[0]

    return of


_KILLS = [
    *((rank, phase) for rank in (0, 1) for phase in ("stage", "before_shard", "half_shard", "before_manifest")),
    (0, "before_rename"),
]
#: The cases of `make test`, which have each phase once.
_FAST = [
    (0, "stage", True), (1, "before_shard", True), (0, "half_shard", False), (1, "before_manifest", False),
    (0, "before_rename", True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rank", "phase", "in_background"),
    in_ci_unless(lambda case: case in _FAST, ((*kill, background) for kill in _KILLS for background in (True, False))),
)
def test_killed_in_any_phase_of_a_save_a_run_goes_on_bit_for_bit(
    zygote, tmp_path, expected, rank, phase, in_background
):
    settings = {**_RUN, "checkpoint.async_save": str(in_background).lower()}
    run = tiny_run(tmp_path, settings)
    fault = f"kill:rank={rank},step={_SAVED_LAST},phase=save.{phase}"
    codes = start(zygote, run, **{FAULT: fault})
    assert codes[rank] == -9
    root = run.path / "checkpoints"
    # If the rank was killed after it had delivered its part, the checkpoint may be whole.
    assert manifests.steps(root) in ([2], [2, _SAVED_LAST])
    assert start(zygote, tiny_again(run)) == [0, 0], log(run)
    assert curve(run) == expected(zygote)
    assert "resumed from" in log(run)
    assert sorted(path.name for path in root.iterdir()) == ["step-00000004", "step-00000006"]
    assert read_json(run.done)["step"] == _STEPS


_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0": (2, {"parallel.zero": 0}),
    "zero1": (2, {"parallel.zero": 1}),
    "zero2 dp2": (2, {"parallel.zero": 2, "parallel.pipeline": 1}),
    "zero3 pp2 dp2": (4, {"parallel.zero": 3, "launch.ranks_per_node": 4}),
    "bf16": (2, {"precision": "bf16"}),
    "fp16": (2, {"precision": "fp16"}),
    "sgd": (2, {"optim": "sgd", "optim.lr": 0.1}),
    "unpacked": (2, {"data.pack": "false"}),
    "zbv": (
        2,
        {
            "parallel.schedule": "zbv",
            "parallel.virtual_stages": 2,
            "parallel.zero": 1,
            "activation.checkpoint": "none",
            "model.config.num_hidden_layers": 4,
        },
    ),
}


@pytest.mark.parametrize("layout", in_ci_unless(lambda layout: layout in ("zero2 dp2", "bf16", "zbv"), _LAYOUTS))
def test_in_the_same_layout_the_curve_goes_on_bit_for_bit(zygote, tmp_path, layout):
    ranks, settings = _LAYOUTS[layout]
    settings = {**_RUN, **settings}
    expected = straight(zygote, tmp_path / "straight", settings, ranks)
    run = tiny_run(tmp_path, settings)
    codes = start(zygote, run, ranks, **{FAULT: f"kill:rank=1,step={_SAVED_LAST},phase=save.stage"})
    assert codes[1] == -9
    assert start(zygote, tiny_again(run), ranks) == [0] * ranks, log(run)
    assert curve(run) == expected


@pytest.mark.ci
def test_ten_kills_in_a_row_change_nothing(zygote, tmp_path):
    settings = {**_RUN, "train.steps": 12, "checkpoint.every": 1}
    expected = straight(zygote, tmp_path / "straight", settings)
    run = tiny_run(tmp_path, settings)
    for step in range(2, 12):
        assert -9 in start(zygote, run, **{FAULT: f"kill:rank={step % 2},step={step},phase=save.before_manifest"})
        tiny_again(run)
    assert start(zygote, run) == [0, 0], log(run)
    assert curve(run) == expected
    assert [row.attempt for row in latest(read(run.metrics))][-1] == 11


def test_another_layout_goes_on_within_rounding_and_sees_the_same_data(zygote, tmp_path, expected):
    without_dropout = {**_RUN, "+model.config.attention_dropout": 0.0}
    expected = straight(zygote, tmp_path / "straight", without_dropout)
    run = tiny_run(tmp_path, without_dropout)
    assert -9 in start(zygote, run, **{FAULT: f"kill:rank=0,step={_SAVED_LAST},phase=save.stage"})
    tiny_again(run, {"parallel.pipeline": 1, "parallel.zero": 1, "launch.ranks_per_node": 4, "batch.micro_size": 2})
    assert start(zygote, run, 4) == [0] * 4, log(run)
    for got, wanted in zip(curve(run), expected, strict=True):
        assert (got[0], got[3]) == (wanted[0], wanted[3])
        for index in (1, 2, 4):
            assert float.fromhex(got[index]) == pytest.approx(float.fromhex(wanted[index]), rel=1e-5)


def test_saving_does_not_change_training(zygote, tmp_path, expected):
    assert straight(zygote, tmp_path, {**_RUN, "checkpoint.every": 0}) == expected(zygote)
    assert straight(zygote, tmp_path, {**_RUN, "checkpoint.async_save": "false"}) == expected(zygote)


def test_the_rows_say_what_saving_cost(zygote, tmp_path):
    run = tiny_run(tmp_path, {**_RUN, "checkpoint.async_save": "false"})
    assert start(zygote, run) == [0, 0]
    for row in read(run.metrics):
        assert (row.checkpoint_stall_s is not None) == (row.step % 2 == 0)
        assert row.checkpoint_stall_s is None or row.checkpoint_stall_s >= row.checkpoint_write_s > 0


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(zygote, tmp_path, expected):
    run = tiny_run(tmp_path, _RUN)
    assert start(zygote, run, **{FAULT: "full:rank=1,step=4,phase=save.half_shard"}) == [0, 0], log(run)
    assert curve(run) == expected(zygote)
    assert manifests.steps(run.path / "checkpoints") == [2, 6]
    assert "checkpoint of step 4 could not be saved: rank 1: [Errno 28] No space left on device" in log(run)
    assert "checkpoint of step 4 could not be saved" in run.notes.read_text()


def test_a_last_save_that_fails_fails_the_run(zygote, tmp_path):
    run = tiny_run(tmp_path, _RUN)
    assert start(zygote, run, **{FAULT: "full:rank=1,step=6,phase=save.half_shard"}) == [6, 6]
    assert "checkpoint of step 6 could not be saved" in run.errors()[0]["message"]
    assert manifests.steps(run.path / "checkpoints") == [2, 4]


def test_without_a_place_to_save_the_run_ends_after_three_tries(zygote, tmp_path):
    run = tiny_run(tmp_path, {**_RUN, "checkpoint.every": 1, "checkpoint.path": "/proc/nowhere"})
    assert start(zygote, run) == [6, 6]
    assert "the 3rd failure in a row" in run.errors()[0]["message"]
    assert "set checkpoint.path to another disk" in run.errors()[0]["message"]
    assert len(read(run.metrics)) in (3, 4)


def test_damage_is_passed_over_with_a_warning(zygote, tmp_path, expected):
    run = tiny_run(tmp_path, _RUN)
    assert start(zygote, run) == [0, 0]
    root = run.path / "checkpoints"
    shard = manifests.folder_of(root, 6) / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert start(zygote, tiny_again(run)) == [0, 0], log(run)
    assert "checkpoint of step 6 is skipped" in run.notes.read_text()
    assert curve(run) == expected(zygote)
    # The damaged checkpoint was renamed, and the new one is whole.
    assert manifests.read(manifests.folder_of(root, 6)).step == 6
    assert (root / "step-00000006.left-by-attempt-2").is_dir()


def test_with_every_checkpoint_damaged_nothing_starts(zygote, tmp_path):
    run = tiny_run(tmp_path, _RUN)
    assert start(zygote, run) == [0, 0]
    for shard in run.path.glob("checkpoints/*/rank-00001.safetensors"):
        shard.unlink()
    rows = run.metrics.read_bytes()
    assert start(zygote, tiny_again(run)) == [6, 6]
    assert "none of 2 checkpoints" in run.errors()[0]["message"]
    assert run.metrics.read_bytes() == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.config.hidden_size": 64}, "model.embed_tokens.weight: [300, 32] there, [300, 64] here"),
        ({"batch.global_size": 16}, "use batch.global_size=8, or add checkpoint.allow=[batch]"),
        ({"data.seq_len": 16}, "use data.seq_len=32, or add checkpoint.allow=[data]"),
        ({"run.seed": 7}, "use run.seed=1234, or add checkpoint.allow=[data]"),
        ({"optim.kind": "sgd"}, "optim.kind=sgd needs momentum_buffer, but "),
        ({"model.config.rms_norm_eps": 0.5}, "use model.config.rms_norm_eps=1e-06, or add checkpoint.allow=[model]"),
    ],
)
def test_another_model_or_course_is_refused(zygote, tmp_path, change, message):
    run = tiny_run(tmp_path, {**_RUN, "train.steps": 2})
    assert start(zygote, run) == [0, 0]
    assert start(zygote, tiny_again(run, {**change, "train.steps": 4})) == [6, 6]
    assert message in run.errors()[0]["message"]


def test_another_batch_size_goes_on_where_the_data_were(zygote, tmp_path):
    run = tiny_run(tmp_path, {**_RUN, "train.steps": 4})
    assert start(zygote, run) == [0, 0]
    changes = {"batch.global_size": 16, "train.steps": 6, "checkpoint.allow": "[batch]"}
    assert start(zygote, tiny_again(run, changes)) == [0, 0], log(run)
    state = manifests.read(manifests.folder_of(run.path / "checkpoints", 6)).state
    assert state["sequences"] == 4 * 8 + 2 * 16
    assert start(zygote, tiny_again(run, {"train.steps": 8})) == [0, 0], log(run)


def test_other_data_are_read_from_their_beginning_whenever_the_run_stops(zygote, tmp_path):
    def other_data(folder: Path, *steps: int) -> Curve:
        run = tiny_run(folder, {**_RUN, "train.steps": 2, "schedule.kind": "constant"})
        assert start(zygote, run) == [0, 0]
        for number, last in enumerate(steps):
            allow = "[data]" if number == 0 else "[]"
            tiny_again(run, {"train.steps": last, "run.seed": 7, "checkpoint.allow": allow})
            assert start(zygote, run) == [0, 0], log(run)
        return [(*row[:4], "") for row in curve(run)]

    assert other_data(tmp_path / "at once", 6) == other_data(tmp_path / "in two parts", 4, 6)


def test_fp16_starts_with_its_own_loss_scale_whatever_saved_the_checkpoint(zygote, tmp_path):
    run = tiny_run(tmp_path, {**_RUN, "train.steps": 2})
    assert start(zygote, run) == [0, 0]
    assert start(zygote, tiny_again(run, {"train.steps": 4, "precision.dtype": "fp16"})) == [0, 0], log(run)
    assert read(run.metrics)[2].loss_scale == 2.0**16
    # The run goes back to fp32, which has no loss scale.
    assert start(zygote, tiny_again(run, {"train.steps": 6, "precision.dtype": "fp32"})) == [0, 0], log(run)
    assert manifests.read(manifests.folder_of(run.path / "checkpoints", 6)).scaling is None


def test_a_start_from_zero_after_the_first_is_said(zygote, tmp_path):
    run = tiny_run(tmp_path, {**_RUN, "checkpoint.every": 0})
    assert start(zygote, run) == [0, 0]
    assert start(zygote, tiny_again(run)) == [0, 0]
    assert "the run begins again with step 1" in run.notes.read_text()


def test_a_bare_launcher_goes_on_by_itself(zygote, tmp_path, expected):
    run = tiny_run(tmp_path, _RUN)
    assert -9 in start(zygote, run, **{FAULT: f"kill:rank=1,step={_SAVED_LAST},phase=save.stage"})
    # As when a queue starts the job again: the run directory is as the killed run left it.
    assert zygote.run(["--config", str(run.config)], 2, env={"STACK_AGENT_PID": None}) == [0, 0], log(run)
    assert curve(run) == expected(zygote)
    assert json.loads((run.path / "attempts" / "1" / "plan.json").read_text())["world_size"] == 2


def test_only_the_best_is_kept_beside_the_newest(zygote, tmp_path):
    keep = {"checkpoint.every": 1, "checkpoint.keep_last": 1, "checkpoint.keep_best": 1, "train.eval_every": 0}
    run = tiny_run(tmp_path, {**_RUN, **keep, "optim.lr": 0.5})
    assert start(zygote, run) == [0, 0], log(run)
    losses = {row.step: row.heldout_loss for row in read(run.metrics)}
    best = min(losses, key=lambda step: losses[step])
    assert manifests.steps(run.path / "checkpoints") == sorted({best, _STEPS})
