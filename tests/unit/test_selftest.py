"""The self-test for untested versions of DeepSpeed runs in a process of its own, and names a missing attribute."""

import subprocess
import sys

import pytest

from stack.errors import ConfigError
from stack.parallel import selftest
from tests.helpers.tiers import in_ci_unless

#: Runs the self-test with one private attribute of DeepSpeed removed or changed.
WITHOUT = """
import deepspeed, runpy, sys
from deepspeed.runtime import engine
from deepspeed.runtime.zero import stage3
{change}
runpy.run_module("stack.parallel.selftest", run_name="__main__")
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_tested_version_is_taken_at_its_word(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    selftest.require(selftest.TESTED[-1], "2.13.0")


def test_another_version_is_tried_once(monkeypatch, tmp_path):
    selftest.require("99.0", "2.13.0")
    assert (tmp_path / "stack" / "selftest-deepspeed-99.0-torch-2.13.0.json").exists()
    monkeypatch.setattr(subprocess, "run", None)
    selftest.require("99.0", "2.13.0")


CHANGES = {
    "del engine.DeepSpeedEngine._flush_coalesced_reduction_zero3": "'_flush_coalesced_reduction_zero3'",
    "del stage3.DeepSpeedZeroOptimizer_Stage3._get_norm_groups": "DeepSpeedZeroOptimizer_Stage3._get_norm_groups",
    "stage3.DeepSpeedZeroOptimizer_Stage3.clear_backward_seen_flag = lambda self: None": "is off by",
}


@pytest.mark.parametrize("change", in_ci_unless(lambda change: CHANGES[change] == "is off by", CHANGES))
def test_what_changed_is_named(change, monkeypatch):
    run = subprocess.run
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT.format(change=change)]
    monkeypatch.setattr(subprocess, "run", lambda _command, **options: run(command, **options))
    with pytest.raises(ConfigError) as caught:
        selftest.require("99.0", "2.13.0")
    message = str(caught.value)
    assert CHANGES[change] in message
    assert message.startswith("deepspeed 99.0 is not one that stack was tested with")
    assert message.endswith("install deepspeed==0.19.8")
