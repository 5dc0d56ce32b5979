"""The GPU suite on a host without a GPU: its commands, its page, its messages, and its cheapest part on a CPU."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_page import page

ROOT = Path(__file__).parents[2]


def arguments(**given: Any) -> Namespace:
    shared = {"part": list(gpu.PARTS), "work": "1b", "set": [], "device": "cuda", "steps": 5, "warmup": 2}
    return Namespace(**{**shared, "limit_s": 60, **given})


def run(*given: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *given]
    everything = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True, check=False, timeout=100)


def test_every_part_has_jobs_that_exist():
    jobs = list(gpu.jobs(arguments()))
    assert [part for part in gpu.PARTS if any(job.part == part for job in jobs)] == list(gpu.PARTS)
    for job in jobs:
        option, module, *_ = job.command
        assert option == "-m"
        if module != "pytest":
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), job
    names = [(job.part, job.name) for job in jobs]
    assert len(set(names)) == len(names)


def test_the_ablation_turns_one_key_at_a_time():
    best, *others = (job for job in gpu.jobs(arguments(part=["c"])) if "--set" not in job.command)
    for job in others:
        changed = set(job.command) - set(best.command)
        assert len(changed) <= (2 if job.name.startswith("reduce and") else 1), job
    assert "precision.compile=true" in best.command
    # A kernel whose package is not installed is left out.
    assert not any("flash" in job.name for job in others)


def test_without_a_gpu_it_says_what_it_needs():
    done = run()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "NVIDIA GPU" in done.stderr


def test_no_time_left_is_written_down(tmp_path):
    done = run("--device", "cpu", "--work", "tiny", "--part", "a,f", "--limit-s", "0", "--out", str(tmp_path))
    assert done.returncode == 0
    [record] = json.loads((tmp_path / "gpu_results.json").read_text())
    assert all("not run" in job["error"] for job in record["jobs"])


def test_the_cheapest_part_runs_on_a_cpu(tmp_path):
    done = run("--device", "cpu", "--work", "tiny", "--part", "a", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    [record] = json.loads((tmp_path / "gpu_results.json").read_text())
    assert record["jobs"][0]["matmul_tflops"] > 0
    assert "matmul TFLOP/s" in (tmp_path / "gpu_results.md").read_text()


def test_a_job_that_fails_or_hangs_is_a_row():
    failed = gpu._process([sys.executable, "-c", "raise ValueError('no room')"], 20, device="cpu")
    assert failed["error"] == "exit code 1: ValueError: no room"
    assert gpu._process([sys.executable, "-c", "import time; time.sleep(60)"], 1, device="cpu")["error"] == (
        "no end after 1 s"
    )


def test_the_page_has_a_table_for_each_part():
    job = {"part": "b", "name": "ours", "command": "", "took_s": 40.0, "step_s": 0.5, "tokens_per_s": 6e4, "mfu": 0.5}
    record = {
        "date": "2026-11-23",
        "gpu": "",
        "device": "cpu",
        "command": "c",
        "work": "w",
        "parts": {"b": "contestants"},
    }
    text = page([{**record, "jobs": [job, {**job, "name": "peer", "mfu": None, "error": "exit code 1"}]}])
    assert "| ours | 60,000 | 0.500 | 50.0 | 40 |  |" in text
    assert "| peer | 60,000 | 0.500 |  | 40 | exit code 1 |" in text


@pytest.mark.parametrize("wanted", ["a,z", ""])
def test_an_unknown_part_is_refused(wanted):
    assert run("--part", wanted).returncode == 2
