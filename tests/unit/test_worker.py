"""A rank before training: its limit of open files, the encoding of its output, and which rank finds the corpus."""

import contextlib
import subprocess
import sys

import pytest

from stack.config.compose import compose
from stack.plan.layout import make_plan
from stack.train import bare

#: A program that prints whether the limit is raised after `_prepare_process`, and a letter that ASCII lacks.
PREPARED = """
import resource
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
from stack.train.worker import _prepare_process
_prepare_process()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] == most, "é")
"""


def test_a_rank_may_open_as_many_files_as_the_host_allows_and_prints_to_any_terminal(monkeypatch):
    # A gloo group over all ranks of a large run has more connections than the usual limit of 1,024 files.
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = subprocess.run([sys.executable, "-P", "-c", PREPARED], check=True, capture_output=True, text=True)
    assert done.stdout == "True \\xe9\n"


def test_of_ranks_without_a_driver_only_the_first_looks_for_the_corpus(monkeypatch, tmp_path):
    from stack.parallel import messages, zero

    monkeypatch.setattr(zero, "init_distributed", lambda **_: None)
    monkeypatch.setattr(messages, "broadcast", lambda _own: [None, str(tmp_path)])
    monkeypatch.setattr(bare, "locate", lambda *_, **__: pytest.fail("this rank lists the corpus too"))
    cfg = compose()
    with contextlib.ExitStack() as held:
        assert bare.agree_on_run(cfg, make_plan(cfg), 1, None, held).path == tmp_path
        with pytest.raises(pytest.fail.Exception):
            bare.agree_on_run(cfg, make_plan(cfg), 0, None, held)
