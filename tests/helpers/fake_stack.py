"""A stand-in for `stack train` and `stack resume` in tests of sweeps. It makes a run directory and trains nothing, so a
job takes milliseconds. It imports nothing of stack; the file $FAKE_STACK has its settings.

The held-out loss of a job is its optim.lr. By its optim.lr a job may also have an act:
    fail       exit code 7, no checkpoint
    crash      a checkpoint, then exit code 9
    interrupt  a checkpoint, then sends Ctrl-C to the sweep, and waits until it is stopped
    wait       waits until it is stopped, without a checkpoint
    save       a checkpoint, then sends SIGTERM to the sweep, and saves when it gets SIGTERM itself
    unevaluated  succeeds; the optim.lr is its training loss
    nan        succeeds, with a held-out loss that is not a number
Acts apply to `train`; `resume` always succeeds.
"""

import json
import os
import re
import signal
import sys
import time
import uuid
from pathlib import Path

_PATIENCE_S = 60


def main() -> None:
    verb, *arguments = sys.argv[1:]
    plan = json.loads(Path(os.environ["FAKE_STACK"]).read_text())
    if verb == "resume":
        run = Path(arguments[0])
        lr = (run / "lr").read_text()
    else:
        told = dict(argument.split("=", 1) for argument in arguments)
        lr = told.get("optim.lr", "0.0003")
        run = Path(json.loads(told["run.root"]), "run", f"{time.time_ns()}-{uuid.uuid4().hex[:4]}")
        run.mkdir(parents=True)
        (run / "lr").write_text(lr)
        (run / "config.yaml").write_text(plan["config"])
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    about = {"lr": lr, "verb": verb, "arguments": arguments, "devices": devices, "run": str(run), "pid": os.getpid()}
    _note(plan, {**about, "event": "began"})
    _meet(plan)
    act = plan["acts"].get(lr) if verb == "train" else None
    _act(act, run)
    losses = {"unevaluated": {"loss": float(lr)}, "nan": {"heldout_loss": "NaN"}}
    row = {**plan["row"], **losses.get(act, {"heldout_loss": float(lr)})}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (run / "DONE.json").write_text("{}")
    _note(plan, {**about, "event": "ended"})


def _act(act: str | None, run: Path) -> None:
    if act == "fail":
        (run / "FAILED.json").write_text(json.dumps({"type": "NumericsError", "message": "the loss is nan"}))
        sys.exit(7)
    if act in ("crash", "interrupt", "save"):
        (run / "checkpoints" / "step-00000002").mkdir(parents=True)
    if act == "crash":
        sys.exit("RankFailure: rank 1 was killed")
    if act in ("interrupt", "wait", "save"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75 if act == "save" else 143))
        if act != "wait":
            os.kill(os.getppid(), signal.SIGTERM if act == "save" else signal.SIGINT)
        time.sleep(_PATIENCE_S)


def _meet(plan: dict) -> None:
    """Waits until as many jobs have begun as the test wants to run at the same time."""
    deadline = time.monotonic() + _PATIENCE_S
    while len(re.findall('"began"', Path(plan["journal"]).read_text())) < plan["together"]:
        if time.monotonic() > deadline:
            sys.exit("no other job began")
        time.sleep(0.01)


def _note(plan: dict, event: dict) -> None:
    with open(plan["journal"], "a") as journal:
        journal.write(json.dumps(event) + "\n")


if __name__ == "__main__":
    main()
