"""A corpus that is damaged while ranks read it ends the run with exit code 5 and the name of the file."""

import json
import shutil
from pathlib import Path

from tests.helpers.forked import tiny_run


def test_ids_that_no_token_has_are_a_fault_of_the_data(zygote, tmp_path):
    run = tiny_run(tmp_path, {"parallel.pipeline": 1, "launch.ranks_per_node": 1})
    # A copy, because all tests of the session share the corpus.
    corpus = Path(shutil.copytree(run.corpus, tmp_path / "corpus"))
    shard = corpus / "train/tokens-00000.bin"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    (run.path / "corpus.json").write_text(json.dumps({"folder": str(corpus)}))

    assert zygote.run(["--config", str(run.config)], world_size=1) == [5]
    error = json.loads((run.rank(0) / "error.json").read_text())
    assert error["type"] == "DataError"
    assert f"{shard} is damaged (it holds token id 65535, and the corpus has 300)" in error["message"]
