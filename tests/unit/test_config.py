"""The config: which configs compose, which are refused with which message, and the list of keys."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stack.config import recipes
from stack.config.auto import without_auto
from stack.config.check import leaves, schema_tree, to_config
from stack.config.compose import compose, from_yaml, to_yaml
from stack.config.families import FAMILIES
from stack.config.recipes import conf_folder
from stack.config.schema import Config
from stack.config.values import show
from stack.errors import ConfigError
from stack.plan.layout import make_plan

REPO = Path(__file__).resolve().parents[2]
SURFACE = Path(__file__).parent / "goldens" / "config_surface.txt"
RECIPES = sorted(file.stem for file in (REPO / "conf" / "experiment").glob("*.yaml"))
CHOICES = sorted(
    f"{file.parent.name}={file.stem}"
    for file in (REPO / "conf").glob("*/*.yaml")
    if file.parent.name != "experiment" and file.stem != "folder"
)
#: Choice in a group -> the overrides that it needs in addition.
NEEDS = {"data=files": ["data.paths=[corpus/*.jsonl]"], "optim=sgd": ["optim.lr=0.1"]}
RECIPE_NEEDS = {"finetune": ["model=llama_4m", "model.init=scratch", "data=python_stdlib"]}
#: Packages whose import takes seconds. A wrong config must be refused without importing them.
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "wandb", "numpy")


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return str(caught.value)


FAMILIES_LINE = (
    "the families are llama, mistral, qwen2, qwen3, gemma2, gemma3_text, phi3, olmo2, gpt_neox, gpt2, granite, "
    "smollm3, cohere, mixtral, qwen3_moe, olmoe, and docs/add-a-family.md adds one"
)
BAD = """
# unknown keys
parallel.pipelin=2 | no such key; did you mean parallel.pipeline?
paralel.pipeline=2 | no such key; did you mean parallel.pipeline?
pipeline=2 | no such key; did you mean parallel.pipeline?
lr=0.1 | no such key; did you mean optim.lr?
parallel.foo=2 | no such key; the keys of parallel are pipeline, data, zero, schedule, virtual_stages, \
reduce, gather, hpz, quantized_weights, overlap, offload, split
parallel.pipeline.stages=2 | no such key; parallel.pipeline is a single value
+parallel.stages=2 | no such key; did you mean parallel.virtual_stages?
log.wandb={mod: online} -> log.wandb.mod=online | no such key; did you mean log.wandb.mode?
model.config.hiden_size=4 | no such key; did you mean model.config.hidden_size?
model.config.rope_theta=1e4 | no such key; did you mean model.config.rope_parameters.rope_theta?
model.config.n_embd=4 | no such key; did you mean model.config.hidden_size?
model.config.foo=4 | no such key; no family has it
# keys that the family does not have
model.config.n_inner=4 | llama has no such key; did you mean intermediate_size? drop a preset's key with \
~model.config.n_inner
model.config.layer_norm_eps=1e-5 -> model.config.layer_norm_eps=1e-05 | llama has no such key; did you mean \
rms_norm_eps? drop a preset's key with ~model.config.layer_norm_eps
model.config.rope_parameters={partial_rotary_factor: 0.5} -> model.config.rope_parameters.partial_rotary_factor=0.5 | \
llama has no such key; its keys are rope_type, rope_theta, factor, original_max_position_embeddings, \
low_freq_factor, high_freq_factor, attention_factor, beta_fast, beta_slow, mscale, mscale_all_dim, truncate, \
short_factor, long_factor; drop a preset's key with ~model.config.rope_parameters.partial_rotary_factor
model.name=gpt2 -> model.config.intermediate_size=512 | gpt2 has no such key; did you mean n_inner? drop a preset's \
key with ~model.config.intermediate_size
model.name=qwen3_moe -> model.config.intermediate_size=512 | qwen3_moe has no such key; did you mean \
moe_intermediate_size? drop a preset's key with ~model.config.intermediate_size
# groups
experment=8b | no such key; did you mean experiment?
experiment=8bb | no such choice; did you mean 8b? choices are 1b, 405b_plan, 70b, 8b, finetune, quickstart
precision=float64 | no such choice; choices are bf16, fp16, fp32
experiment=[1b,8b] | experiment takes one choice; set its keys one by one, or choose among 1b, 405b_plan, \
70b, 8b, finetune, quickstart
precision=bf16,fp32 | precision takes one choice; set its keys one by one, or choose among bf16, fp16, fp32; \
add -m to stack train for a sweep
+experiment=8b | experiment has a choice already; drop the +
experiment@x=8b | packages are not used here; drop @x
precision=null | write ~precision to compose without it; choices are bf16, fp16, fp32
~precision=bf16 | write ~precision to compose without it
log.wandb=3 | it is a section, not a value; its keys are mode, project, entity, group, tags, timeout_s
# types, and what Hydra or OmegaConf would convert in silence
batch.micro_size=abc | an integer is needed, for example 2
batch.micro_size=1.5 | an integer is needed, for example 2
batch.micro_size=1e3 -> batch.micro_size=1000.0 | an integer is needed; write 1000
batch.micro_size=true | an integer is needed, for example 2
batch.micro_size='4' -> batch.micro_size=4 | an integer is needed, and this is text; drop the quotes
batch.micro_size=null | an integer is needed, for example 2
batch.micro_size= | an integer is needed, for example 2
batch.micro_size=[4] | an integer is needed, for example 2
optim.lr=fast | auto or a number is needed, for example 0.0003
optim.lr=true | auto or a number is needed, for example 0.0003
data.pack=1 | true or false is needed
data.pack=yes | true or false is needed
run.name=123 | text is needed; quote it past the shell: '"123"'
run.name=true | text is needed; quote it past the shell: '"true"'
data.paths=a.txt | a list of strings is needed; write data.paths=[a.txt]
model.config.hidden_size=4.5 | an integer is needed, for example 4096
model.config.tie_word_embeddings=1 | true or false is needed
# ranges and choices
parallel.zero=4 | must be one of 0, 1, 2, 3; the nearest is 3
parallel.zero=true | must be one of 0, 1, 2, 3
parallel.schedule=gpip | must be one of 1f1b, gpipe, interleaved_1f1b, interleaved_zero_bubble, zbv; \
did you mean gpipe?
parallel.schedule=GPipe | must be one of 1f1b, gpipe, interleaved_1f1b, interleaved_zero_bubble, zbv; \
did you mean gpipe?
precision.dtype=fp8 | must be one of fp32, bf16, fp16; did you mean fp32?
parallel.pipeline=0 | must be at least 1
optim.lr=0 | must be above 0, for example 0.0003
optim.lr=nan | must be finite, for example 0.0003
health.hang_timeout_s=inf | must be finite, for example 600.0
run.seed=99999999999999999999 | must fit in 64 bits, for example 1234
schedule.min_lr_ratio=2 | must be at most 1
model.config.rope_parameters.rope_type=ntk | must be one of default, linear, dynamic, yarn, longrope, llama3
# auto
parallel.data=automatic | auto or an integer is needed, for example 4
parallel.data=0 | must be at least 1
launch.ranks_per_node=2.5 | auto or an integer is needed, for example 8
parallel.split=3 | auto or a list of integers is needed, for example [0,5,9]
parallel.split=[] | the first stage starts at layer 0, for example [0,5,9]
parallel.split=[1,2] | the first stage starts at layer 0, for example [0,5,9]
parallel.split=[0,5,5] | first layers must grow from stage to stage; the nearest is [0,5]
# betas
optim.betas=[0.9] | 2 values are needed, for example [0.9,0.95]
optim.betas=[0.9,1] -> optim.betas[1]=1 | must be below 1, for example 0.95
optim.betas=[0.9,x] -> optim.betas[1]=x | a number is needed, for example 0.95
# empty, missing, not a name
run.root= | must not be empty, for example runs
data.name= | must not be empty; write null for none
data.paths=[''] -> data.paths[0]= | must not be empty
train.steps=??? | a value is needed, for example 100
run.name=a/b | a folder name cannot contain a slash; for example a-b
model.name=lama | neither a family nor a folder (did you mean llama?); {families}
model.name=deepseek_v3 | neither a family nor a folder; {families}
model.name=/nowhere/7b | its config.json cannot be read (No such file or directory); give a Hugging Face folder
model=folder -> model.name= | must not be empty, for example llama, or a folder such as /models/my-llama
# two values that contradict each other
data.source=files -> data.paths=[] | data.source=files needs some, for example data.paths=[corpus/*.jsonl]
data.source=hf -> data.name=null | data.source=hf needs one, for example data.name=HuggingFaceFW/fineweb-edu
data.paths=[a.txt] | not read with data.source=python_stdlib; add data.source=files
data.extensions=[.log] | not read with data.source=python_stdlib; add data.source=files
data.extensions=[log] | an extension begins with a dot; use .log
data.name=c4 | not read with data.source=python_stdlib; add data.source=hf
schedule.warmup_steps=201 | more than train.steps=200; use schedule.warmup_steps=20, at most 200
schedule.decay_steps=190 | more than the steps after warm-up, train.steps=200 less schedule.warmup_steps=20; at most 180
model.attention=flash_attention_2 | its kernels have no fp32; add precision=bf16, or use model.attention=sdpa
model.config.max_position_embeddings=128 -> data.seq_len=256 | longer than model.config.max_position_embeddings=128; \
at most 128
model.config.rope_parameters={factor: 2} -> model.config.rope_parameters.factor=2.0 | not read with rope_type default, \
only with linear, dynamic, yarn, longrope, llama3; set model.config.rope_parameters.rope_type, or drop it with \
~model.config.rope_parameters.factor
# grammar
train.steps | not an override; write key=value, for example train.steps=100
8b | not an override; write key=value, for example train.steps=200
--config-name=x | not an override; write key=value, for example train.steps=200
-m | only stack train starts a sweep; drop it
train.steps=1,2 | several values are a sweep, and this is one run; add -m to stack train, or give one value
data.paths=a,b | several values are a sweep, and this is one run; add -m to stack train, or write data.paths=[a,b]
optim.betas=[0.9 | not in Hydra's grammar (no viable alternative at input '[0.9'); quote a special value past the \
shell: 'key="value"'
+parallel.pipeline=2 | parallel.pipeline exists already; drop the +
~parallel.pipeline | only ~model.config.KEY can be deleted; write parallel.pipeline=VALUE to change it
~model.config.head_dim | model.config.head_dim is not set; drop it
hydra.run.dir=x | hydra.* is for a sweep, which stack train -m starts; drop it
+hydra.verbose=true | hydra.* is for a sweep, which stack train -m starts; drop it
hydra/launcher=joblib | hydra.* is for a sweep, which stack train -m starts; drop it
# interpolation
run.name=${run.nam} -> run.name | its interpolation cannot be resolved (Interpolation key 'run.nam' not found)
run.name=${run.name} -> run.name | its interpolation cannot be resolved (Recursive interpolation detected)
train.steps=${run.name} -> train.steps=run | an integer is needed, for example 100
""".replace("\\\n", "").replace("{families}", FAMILIES_LINE)


def bad_rows() -> list[tuple[str, str]]:
    """Pairs of an override and its message. The message begins with the override, or with the text after an arrow."""
    rows = []
    for line in BAD.strip().splitlines():
        if not line.startswith("#"):
            given, why = line.split(" | ")
            override, _, shown = given.partition(" -> ")
            rows.append((override, f"{shown or override}: {why}"))
    return rows


@pytest.mark.parametrize(("override", "message"), bad_rows(), ids=[row[0] for row in bad_rows()])
def test_a_mistake_is_one_line(override: str, message: str) -> None:
    assert refusal(override) == message


def test_the_table_is_long_and_its_exit_code_is_documented() -> None:
    assert len(bad_rows()) >= 40
    assert ConfigError.exit_code == 3


def test_a_key_given_twice_is_refused() -> None:
    message = "parallel.pipeline=4: parallel.pipeline is given twice, first as parallel.pipeline=2; keep one"
    assert refusal("parallel.pipeline=2", "parallel.pipeline=4") == message


def test_control_characters_and_long_values_stay_on_one_line() -> None:
    assert refusal('run.name="a\nb"') == "run.name='a\\nb': must be one line without control characters"
    assert len(refusal(f"parallel.schedule={'x' * 5000}")) < 200


def test_no_recipe_is_neutral() -> None:
    config = compose()
    assert compose(["~experiment"]) == config
    assert (config.run.name, config.optim.lr, config.schedule.warmup_steps, config.data.tokenizer) == (
        *("run", 3e-4),
        *(20, "bpe"),
    )
    recipe = compose(["experiment=quickstart"])
    assert (recipe.run.name, recipe.optim.lr, recipe.schedule.warmup_steps) == ("quickstart", 3e-3, 20)
    assert config.model.config == {
        "vocab_size": 4096,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_composes_plans_and_reads_back_equal(recipe: str, tmp_path: Path) -> None:
    config = compose([f"experiment={recipe}", *RECIPE_NEEDS.get(recipe, [])])
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert from_yaml(saved) == config
    assert (
        make_plan(config, world_size=4 if recipe in ("quickstart", "finetune") else None).microbatches
        >= config.parallel.pipeline
    )


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes(choice: str) -> None:
    compose([choice, *NEEDS.get(choice, [])])


@pytest.mark.parametrize(
    "file", sorted((REPO / "conf").glob("*/*.yaml")), ids=lambda file: f"{file.parent.name}-{file.stem}"
)
def test_every_yaml_says_the_command_that_uses_it(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if line != "# @package _global_"]
    assert lines[0].startswith("# stack ")
    assert f"{file.parent.name}={file.stem}" in lines[0]


def test_values_that_hydra_may_set_in_its_own_ways() -> None:
    config = compose(
        [
            "experiment=8b",
            "model=llama_1b",
            "+model.config.attention_bias=true",
            "model.config.rms_norm_eps=1",
            "~model.config.head_dim",
            "run.name=seed-${run.seed}",
            "log.wandb={tags: [a, b]}",
            "optim.betas=[0, 0.99]",
            "parallel.split=[0, 9]",
        ]
    )
    assert config.model.config["attention_bias"] is True
    assert config.model.config["num_hidden_layers"] == 16
    assert "head_dim" not in config.model.config
    assert config.run.name == "seed-1234"
    assert config.log.wandb.tags == ["a", "b"]
    assert config.log.wandb.mode == "online"
    # transformers 5 refuses an int where its config says float.
    assert [type(x) for x in (*config.optim.betas, config.model.config["rms_norm_eps"])] == [float] * 3
    assert config.parallel.split == [0, 9]


def test_llama3_rope_is_whole_or_refused() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    override = f"model.config.rope_parameters={show(rope).replace(':', ': ')}"
    path = "model.config.rope_parameters"
    needs = f"rope_type llama3 needs original_max_position_embeddings; add {path}.original_max_position_embeddings=8192"
    assert refusal(override).endswith(needs)
    compose([override, f"{path}.original_max_position_embeddings=8192"])
    assert (
        refusal(override, f"{path}.original_max_position_embeddings=8192", f"{path}.high_freq_factor=0.5")
        == f"{path}.high_freq_factor=0.5: must be above low_freq_factor=1"
    )


def test_a_model_folder_must_be_of_a_known_family(tmp_path: Path) -> None:
    override = f"model.name={tmp_path}"
    config = tmp_path / "config.json"
    config.write_text("{")
    assert "its config.json is not JSON" in refusal("model=folder", override)
    config.write_text(json.dumps({"model_type": "bert"}))
    assert refusal("model=folder", override).endswith(f"its config.json has model_type bert; {FAMILIES_LINE}")
    config.write_text(json.dumps({"model_type": "llama"}))
    assert compose(["model=folder", override]).model.config == {}
    assert refusal("model=folder", override, "model.config.use_qk_norm=true").startswith(
        "model.config.use_qk_norm=true: llama has no such key"
    )


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gpt_neox", "gpt2", "qwen3_moe")])
def test_a_family_by_its_name_alone(family: str) -> None:
    kernel = "sdpa" if FAMILIES[family].sdpa else "eager"
    assert make_plan(compose([f"model.name={family}", f"model.attention={kernel}"]), world_size=4).shape.layers == 6


def test_what_cannot_be_compiled() -> None:
    assert "use full, or compile=false" in refusal("precision.compile=true", "activation=selective")
    assert "cannot be compiled; use false" in refusal("precision.compile=true", "model=mixtral_4m")


def test_experts_of_a_width_that_half_precision_cannot_multiply() -> None:
    overrides = ("model=mixtral_4m", "model.config.intermediate_size=100")
    assert "multiple of 8; use 96" in refusal("precision=bf16", *overrides)
    assert compose(["precision=fp32", *overrides]).model.config["intermediate_size"] == 100


def test_a_family_without_sdpa_says_so() -> None:
    assert refusal("model.name=gemma2").endswith("which sdpa cannot; use model.attention=eager")


def test_a_family_narrows_what_a_key_takes() -> None:
    assert refusal("model.name=qwen3", "model.config.head_dim=null") == (
        "model.config.head_dim=null: an integer is needed, for example 128"
    )
    assert compose(["model.config.head_dim=null"]).model.config["head_dim"] is None
    linear = "model.config.rope_parameters={rope_type: linear, factor: 2}"
    assert refusal("model.name=phi3", linear) == (
        "model.config.rope_parameters.rope_type=linear: must be one of default, longrope"
    )


def test_rotary_settings_of_each_layer_type() -> None:
    path = "model.config.rope_parameters"
    full = f"{path}.full_attention={{rope_type: linear, rope_theta: 1e6, factor: 8}}"
    rope = compose(["model.name=gemma3_text", full]).model.config["rope_parameters"]
    assert rope == {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}
    assert refusal("model.name=gemma3_text", f"{path}.full_attention.factor=8") == (
        f"{path}.full_attention.factor=8.0: not read with rope_type default, only with linear, dynamic, yarn, "
        f"longrope, llama3; set {path}.full_attention.rope_type, or drop it with ~{path}.full_attention.factor"
    )
    assert refusal("model.name=gemma3_text", f"{path}.rope_theta=1e4").startswith(
        f"{path}.rope_theta=10000.0: gemma3_text has no such key; its keys are full_attention, sliding_attention"
    )


def test_a_table_of_positions_ends_the_sequence() -> None:
    overrides = ["model=gpt2_4m", "~model.config.max_position_embeddings"]
    assert refusal(*overrides, "data.seq_len=1025").endswith("max_position_embeddings=1024; at most 1024")
    compose([*overrides, "data.seq_len=1024"])


def test_a_saved_config_takes_keys_and_no_choices(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(compose()))
    assert from_yaml(saved, ["parallel.pipeline=1"]).parallel.pipeline == 1
    with pytest.raises(
        ConfigError, match="experiment=8b: a group choice works for a new run only; set its keys one by one"
    ):
        from_yaml(saved, ["experiment=8b"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a whole saved config; it lacks run, model"),
        ("- 1\n", "a list of values and no mapping; give the config.yaml of a run"),
        ("run: [", "not YAML of a config ({saved}, line 2: did not find expected node content"),
        ("{whole}\nrun: {{}}\n", "not YAML of a config ({saved}, line {line}: found duplicate key run"),
        ("{whole}\nfoo: 1\n", "foo=1: no such key; the sections are run, model"),
        ("{pipelin}", "parallel.pipelin=2: no such key; did you mean parallel.pipeline?"),
        ("{quoted}", "train.steps=200: an integer is needed, and this is text; drop the quotes"),
    ],
)
def test_a_damaged_saved_config_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    whole = to_yaml(compose())
    variants = {"pipelin": whole.replace("pipeline:", "pipelin:"), "quoted": whole.replace(": 200\n", ": '200'\n")}
    saved = tmp_path / "config.yaml"
    saved.write_text(text.format(whole=whole, **variants))
    with pytest.raises(ConfigError) as caught:
        from_yaml(saved)
    line = whole.count("\n") + 2
    assert str(caught.value).startswith(f"{saved}: {message.format(saved=saved, line=line)}")
    assert "\n" not in str(caught.value)


def test_no_saved_config(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"cannot be read \(No such file or directory\); give the config.yaml of a run"
    ):
        from_yaml(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parallel:\n  pipelin: 2", "parallel.pipelin=2: no such key; did you mean parallel.pipeline?"),
        ("train: {steps: '5'}", "train.steps=5: an integer is needed, and this is text; drop the quotes"),
        ("data: {pack: 1}", "data.pack=1: true or false is needed"),
        ("parallel: [", "experiment=mine: {conf}/experiment/mine.yaml, line 3: expected the node"),
        (
            "defaults: [{override /model: big}]",
            "experiment=mine: In 'config': Could not find 'model/big' Available options",
        ),
    ],
)
def test_a_recipe_of_ones_own_is_held_to_the_same(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(conf_folder(), conf)
    (conf / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    monkeypatch.setattr(recipes, "conf_folder", lambda: conf)
    assert refusal("experiment=mine").startswith(message.format(conf=conf))


def test_the_schema_allows_its_own_defaults() -> None:
    assert to_config(dataclasses.asdict(Config())) == without_auto(Config())


def test_the_surface_changes_only_on_purpose() -> None:
    """`UPDATE_GOLDENS=1 pytest tests/unit/test_config.py` rewrites the golden file. A change needs a line in
    CHANGELOG.md."""
    defaults = dict(_flat(dataclasses.asdict(Config())))
    lines = []
    for path, spec in leaves(schema_tree()):
        default = "" if path.startswith("model.config.") else f" = {show(defaults[path])}"
        lines.append(f"{path}{default}  # {spec}\n")
    surface = "".join(lines)
    if os.environ.get("UPDATE_GOLDENS") == "1":
        SURFACE.write_text(surface)
    assert surface == SURFACE.read_text()


def _flat(tree: dict, prefix: str = "") -> list[tuple[str, object]]:
    flat: list[tuple[str, object]] = []
    for key, value in tree.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
        flat.extend(inner)
    return flat


def run_fresh(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(cwd)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_fresh_process_refuses_in_under_two_seconds() -> None:
    code = (
        "import sys; from stack.config.compose import compose; from stack.errors import ConfigError\n"
        "compose([])\n"
        "try: compose(['parallel.pipelin=2'])\n"
        f"except ConfigError as error: print(error, [m for m in {HEAVY} if m in sys.modules])\n"
    )
    start = time.perf_counter()
    done = run_fresh(code, REPO)
    assert done.stdout == "parallel.pipelin=2: no such key; did you mean parallel.pipeline? []\n", done.stderr
    assert time.perf_counter() - start < 2


def test_an_installed_wheel_finds_its_conf(tmp_path: Path) -> None:
    """In a wheel `conf/` is `stack/conf` (package-dir in pyproject.toml)."""
    ignore = shutil.ignore_patterns("__pycache__")
    for part in ("config", "errors.py", "__init__.py"):
        source, target = REPO / "stack" / part, tmp_path / "stack" / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copy(source, target)
    shutil.copytree(REPO / "conf", tmp_path / "stack" / "conf")
    code = "from stack.config import compose, recipes; compose.compose(['experiment=8b']); print(recipes.conf_folder())"
    done = run_fresh(code, tmp_path)
    assert done.stdout.strip() == str(tmp_path / "stack" / "conf"), done.stderr
