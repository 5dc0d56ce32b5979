"""An exported folder has the form in which transformers saves a model, and holds the trained model."""

import hashlib
import json
import os
import subprocess
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, safe_open

from stack.config.model_folder import copy_without_weights
from stack.disk import place
from stack.errors import DataError, UsageError
from stack.models import export as export_module
from stack.models.build import parameter_shapes
from stack.models.export import export
from tests.helpers.tiers import each_in_turn
from tests.helpers.tiny import FAMILIES, family_settings, global_batch, tiny_config


def trained(cfg) -> dict[str, torch.Tensor]:
    """Random parameters, also for norms and biases, which a class would initialise with constants."""
    generator = torch.Generator().manual_seed(11)
    return {
        name: (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        + 0.05 * torch.randn(shape, generator=generator)
        for name, shape in parameter_shapes(cfg).items()
    }


def write(cfg, out: Path, parameters=None, **options):
    parameters = trained(cfg) if parameters is None else parameters
    settings = {"dtype": torch.float32, "tokenizer": None, "progress": lambda *_: None, **options}
    return export(cfg, parameters.__getitem__, out, **settings)


def load(out: Path, dtype=torch.float32, **options):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=dtype, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("family", "tied"), each_in_turn(FAMILIES, [False, True]))
@torch.no_grad()
def test_transformers_loads_what_was_trained(family, tied, tmp_path):
    cfg = tiny_config(**family_settings(family, tied=tied))
    parameters = trained(cfg)
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = transformers.AutoConfig.for_model(family, **cfg.model.config, **ids)
    config._attn_implementation = cfg.model.attention
    dense = transformers.AutoModelForCausalLM.from_config(config)
    dense.load_state_dict(parameters, strict=not tied)
    dense.save_pretrained(tmp_path / "theirs")
    tokens = torch.from_numpy(global_batch(cfg, 0, "full")[0])

    for out, size in ((tmp_path / "one", 10**9), (tmp_path / "many", 20_000)):
        write(cfg, out, parameters, max_file=size)
        assert (out / "model.safetensors.index.json").exists() == (size == 20_000)
        found = load(out, attn_implementation=cfg.model.attention)
        assert (found(tokens).logits - dense(tokens).logits).abs().max() <= 1e-5
        assert found.config.tie_word_embeddings == tied
        ours, theirs = contents(out), contents(tmp_path / "theirs")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_bf16(tmp_path):
    cfg = tiny_config()
    parameters = trained(cfg)
    assert write(cfg, tmp_path / "out", parameters, dtype=torch.bfloat16) == 2 * sum(
        p.numel() for p in parameters.values()
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    found = load(tmp_path / "out", dtype="auto")
    assert all(torch.equal(p, parameters[name].bfloat16()) for name, p in found.named_parameters())


def test_files_keep_to_the_size_and_the_index_says_what_is_where(tmp_path):
    out = tmp_path / "out"
    total = write(tiny_config(), out, max_file=30_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": total}
    files = sorted(out.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    there = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
            assert sum(sizes) <= 30_000 or len(sizes) == 1
            there |= dict.fromkeys(opened.keys(), file.name)
    assert index["weight_map"] == there


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_no_more_than_one_unit_is_held(family, tmp_path):
    cfg = tiny_config(**family_settings(family, tied=False))
    parameters = trained(cfg)
    live: dict[str, weakref.ref] = {}
    largest = 0

    def read(name):
        nonlocal largest
        value = parameters[name].clone()
        live[name] = weakref.ref(value.untyped_storage())
        held = {other.split(".layers.")[-1].split(".")[0] for other, ref in live.items() if ref() is not None}
        assert len(held) == 1, held
        largest = max(largest, sum(ref() is not None for ref in live.values()))
        return value

    export(cfg, read, tmp_path / "out", dtype=torch.float32, tokenizer=None, progress=lambda *_: None)
    assert live.keys() == parameters.keys()
    assert largest == sum(".layers.2." in name for name in parameters)


def _tokenizer(folder: Path) -> Path:
    from stack.config.schema import Data
    from stack.data.tokenizer import load_or_train

    load_or_train(Data(tokenizer="bpe", vocab_size=260), ["to be or not to be, to be"] * 9, folder)
    return folder


def test_a_model_from_scratch_has_the_ids_of_its_tokenizer(tmp_path):
    cfg = tiny_config(shape__vocab_size=260)
    tokenizer = _tokenizer(tmp_path / "tokenizer")
    seen: list[tuple[int, int]] = []
    out = tmp_path / "a" / "out"
    extra = {"stack.yaml": "run: {}\n"}
    total = write(cfg, out, tokenizer=tokenizer, extra=extra, progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (total, total)
    assert (out / "stack.yaml").read_text() == extra["stack.yaml"]
    config, hf = transformers.AutoConfig.from_pretrained(out), transformers.AutoTokenizer.from_pretrained(out)
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (hf.eos_token_id, None, None)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.use_cache
    assert hf("to be").input_ids == transformers.AutoTokenizer.from_pretrained(tokenizer)("to be").input_ids
    prompt = hf("to be", return_tensors="pt")
    model = load(out)
    assert model.generate(**prompt, max_new_tokens=2, pad_token_id=hf.pad_token_id).shape[1] > prompt.input_ids.shape[1]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_pretrained_models_folder_keeps_its_fields_and_ids(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    cfg = tiny_config()
    parameters = trained(cfg)
    write(cfg, first, parameters)
    config = json.loads((first / "config.json").read_text())
    ids = {"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": 6}
    (first / "config.json").write_text(json.dumps({**config, **ids, "rms_norm_eps": 1e-4, "dtype": "bfloat16"}))
    (first / "generation_config.json").write_text(json.dumps({**ids, "temperature": 0.5, "do_sample": True}))

    cfg = tiny_config(model__name=str(first), model__init="pretrained")
    cfg.model.config = {}
    write(cfg, second, parameters, tokenizer=_tokenizer(tmp_path / "tokenizer"))
    found = json.loads((second / "config.json").read_text())
    assert {key: found[key] for key in ids} == ids
    assert (found["rms_norm_eps"], found["dtype"]) == (1e-4, "float32")
    assert json.loads((second / "generation_config.json").read_text())["temperature"] == 0.5

    # With weights from scratch the special token ids are those of the tokenizer.
    cfg.model.init = "scratch"
    write(cfg, tmp_path / "third", parameters, tokenizer=tmp_path / "tokenizer")
    assert json.loads((tmp_path / "third" / "config.json").read_text())["eos_token_id"] == 0
    assert "temperature" not in json.loads((tmp_path / "third" / "generation_config.json").read_text())


def test_what_is_there_is_not_written_over(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(tiny_config(), out)
    with pytest.raises(UsageError, match=r"out exists and is not an empty folder; name a new one"):
        write(tiny_config(), out)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="exists and is not an empty folder"):
        write(tiny_config(), tmp_path / "file")
    with pytest.raises(UsageError, match=r"cannot be written \(File exists\)"):
        write(tiny_config(), tmp_path / "file" / "out")


def test_a_full_disk_is_seen_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda _: export_module.shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(UsageError, match=r"needs \d+\.\d KB and its disk has 0 bytes"):
        export(
            tiny_config(), pytest.fail, tmp_path / "out", dtype=torch.float32, tokenizer=None,
            progress=lambda *_: None,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_what_other_exports_and_others_have_left_beside_it_stays(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    made_by = f"out.partial-{hashlib.blake2b(place().encode(), digest_size=4).hexdigest()}"
    kept = ["out.partial-x", "out.partial-backup-7", f"out.partial-0badcafe-{ended.pid}", f"{made_by}-{os.getppid()}"]
    for name in (*kept, f"{made_by}-{ended.pid}"):
        (tmp_path / name).mkdir()
    write(tiny_config(), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "out"}


def test_of_a_tokenizers_folder_only_its_files_are_published(tmp_path):
    tokenizer = _tokenizer(tmp_path / "tokenizer")
    (tmp_path / "secret").write_text("secret")
    (tokenizer / "id_rsa").symlink_to(tmp_path / "secret")
    (tokenizer / "notes.txt").write_text("mine")
    (tokenizer / "additional_chat_templates").mkdir()
    (tokenizer / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    cfg = tiny_config(shape__vocab_size=260)
    write(cfg, tmp_path / "out", tokenizer=tokenizer)
    there = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert "additional_chat_templates/tools.jinja" in there
    assert not there & {"id_rsa", "notes.txt"}
    # A link to itself is not copied.
    (tokenizer / "merges.txt").symlink_to("merges.txt")
    write(cfg, tmp_path / "again", tokenizer=tokenizer)
    (tokenizer / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match=r"vocab\.json is a link that leads out of the tokenizer's folder"):
        write(cfg, tmp_path / "other", tokenizer=tokenizer)
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_with_code_of_its_own_is_one_line(tmp_path, monkeypatch):
    tokenizer = _tokenizer(tmp_path / "tokenizer")
    (tokenizer / "tokenizer.json").unlink()
    (tokenizer / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    wish = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(wish))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(DataError, match=r"needs Python code of its own, and code .* is never run here") as caught:
        write(tiny_config(shape__vocab_size=260), tmp_path / "out", tokenizer=tokenizer)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


@pytest.mark.parametrize("cache", [False, True])
def test_what_a_model_folder_links_to_is_not_published(tmp_path, cache):
    """Exception: a snapshot in the Hugging Face cache consists of links to the blobs of the same model."""
    folder = tmp_path / "models--org--name" / "snapshots" / "f00d"
    cfg = tiny_config()
    parameters = trained(cfg)
    write(cfg, folder, parameters)
    blobs = tmp_path / "models--org--name" / "blobs" if cache else tmp_path / "home"
    blobs.mkdir()
    (folder / "generation_config.json").rename(blobs / "0123")
    (folder / "generation_config.json").symlink_to(os.path.relpath(blobs / "0123", folder))
    cfg = tiny_config(model__name=str(folder), model__init="pretrained")
    cfg.model.config = {}
    copy_without_weights(str(folder), tmp_path / "copy")
    assert (tmp_path / "copy" / "generation_config.json").exists() == cache
    if cache:
        write(cfg, tmp_path / "out", parameters)
        assert (tmp_path / "out" / "generation_config.json").read_bytes() == (blobs / "0123").read_bytes()
        return
    with pytest.raises(DataError, match=r"generation_config\.json is a link that leads out of the model's folder; put"):
        write(cfg, tmp_path / "out", parameters)
    assert not (tmp_path / "out").exists()


def test_an_export_that_fails_leaves_nothing(tmp_path):
    parameters = trained(tiny_config())
    del parameters["model.layers.3.mlp.up_proj.weight"]
    with pytest.raises(KeyError):
        write(tiny_config(), tmp_path / "out", parameters)
    assert list(tmp_path.iterdir()) == []
