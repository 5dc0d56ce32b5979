"""Reads the config of a run whose folders were moved, or whose data settings are changed."""

import json
import shutil
from pathlib import Path

import pytest

from stack.config.compose import MODEL_COPY, as_saved, compose, from_yaml, to_yaml
from stack.config.model_folder import copy_without_weights, is_copy
from stack.errors import ConfigError
from stack.plan.shape import model_fields


@pytest.fixture
def base(tmp_path) -> Path:
    """A model folder whose weight files have the right names; their content is never read."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 48, "my_own": 3}))
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json", "README.md", "model.bin"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def saved(base, tmp_path) -> Path:
    """config.yaml of a run that was fine-tuned from `base`, in a run directory with a copy of `base`."""
    cfg = compose(["model=folder", f"model.name={base}", "model.init=pretrained", "optim.lr=1e-5"])
    (tmp_path / "run").mkdir()
    copy_without_weights(str(base), tmp_path / "run" / MODEL_COPY)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(cfg))
    return tmp_path / "run" / "config.yaml"


def test_a_copy_describes_the_model_and_has_no_weights(base, tmp_path):
    copy_without_weights(str(base), tmp_path / "copy")
    there = {path.name for path in (tmp_path / "copy").iterdir()}
    assert there == {"config.json", "tokenizer.json", "generation_config.json", "copied_from.json"}
    assert is_copy(tmp_path / "copy")
    assert not is_copy(base)


def test_the_folder_itself_is_read_while_it_is_there(saved, base):
    assert from_yaml(saved).model.name == str(base)


@pytest.mark.parametrize("what", ["moved", "without weights", "damaged"])
def test_the_copy_stands_in_for_a_folder_that_is_gone(saved, base, what):
    if what == "moved":
        base.rename(base.with_name("elsewhere"))
    elif what == "without weights":
        (base / "model.safetensors").unlink()
    else:
        (base / "config.json").write_text("{")
    for overrides in ([], ["train.steps=500"]):
        model = from_yaml(saved, overrides).model
        assert model.name == str(saved.parent / MODEL_COPY)
        assert (model_fields(model)["hidden_size"], model_fields(model)["my_own"]) == (48, 3)
    assert as_saved(saved).model.name == str(base)
    # The run directory may be moved too; then the copy inside it is used.
    moved = saved.parent.rename(saved.parents[1] / "moved")
    assert from_yaml(moved / "config.yaml").model.name == str(moved / MODEL_COPY)


def test_an_override_mends_what_the_file_names(saved, base):
    new = base.rename(base.with_name("new"))
    shutil.rmtree(saved.parent / MODEL_COPY)
    with pytest.raises(ConfigError, match=r"config\.yaml: model\.name=.*its config\.json cannot be read"):
        from_yaml(saved)
    assert from_yaml(saved, [f"model.name={new}"]).model.name == str(new)


def test_an_override_that_is_wrong_is_not_passed_over_for_the_copy(saved):
    with pytest.raises(ConfigError, match=r"^model\.name=/nowhere/at/all: its config\.json cannot be read"):
        from_yaml(saved, ["model.name=/nowhere/at/all"])


def test_without_a_checkpoint_the_copy_is_not_enough_and_the_line_names_the_folder(saved, base):
    from stack.config.model_folder import check_weights

    base.rename(base.with_name("elsewhere"))
    copy = Path(from_yaml(saved).model.name)
    with pytest.raises(ConfigError, match=f"model.name={base}: it was moved or deleted, and there is no checkpoint"):
        check_weights(str(copy), copy)


def test_another_source_brings_none_of_the_old_ones_settings(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(compose(["data=hf", "data.text_key=body", "data.seq_len=128"])))
    data = from_yaml(file, ["data.source=files", "data.paths=[a.jsonl]"]).data
    assert (data.name, data.subset, data.text_key, data.paths, data.seq_len) == (None, None, "text", ["a.jsonl"], 128)
    assert from_yaml(file, ["data.source=hf", "data.split=test"]).data.name == "HuggingFaceFW/fineweb-edu"
    # The advice of the message works.
    with pytest.raises(ConfigError, match=r"add data\.source=files"):
        from_yaml(file, ["data.paths=[a.jsonl]"])


def test_values_of_a_saved_file_are_still_judged_by_themselves(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(compose()).replace("seq_len: 256", "seq_len: 1"))
    for overrides in ([], ["data.seq_len=64"]):
        with pytest.raises(ConfigError, match=rf"^{file}: data\.seq_len=1"):
            from_yaml(file, overrides)
