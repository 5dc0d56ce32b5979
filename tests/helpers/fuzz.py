"""Random command lines for `stack plan`, with legal and illegal values of every key, huge sizes, and whole and damaged
model folders, hostfiles and recipes. The same seed gives the same lines."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stack.config.check import leaves, schema_tree
from stack.config.families import FAMILIES
from stack.config.recipes import conf_folder
from stack.config.values import Spec

_LEAVES = dict(leaves(schema_tree()))
_GROUPS = {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in conf_folder().glob("*/")}
#: Values that are wrong for most keys.
_ODD = (
    *("", "null", "true", "???", "auto", "nan", "inf", "-inf", "-0.0", "1e400", "0x10", "1_000", "0.1.2"),
    *("-1", "0", "1", "2", "3", "7", "1000000000000000003", "1000000000000000000", "99999999999999999999", "9" * 5000),
    *("[]", "[1,2]", "{}", "{a: 1}", "[" * 200, "{" * 200, "[[[[1]]]]", "1,2", "range(1,3)", "glob(*)", "choice(1,2)"),
    *("'\\n'", '"a\\tb"', "${oc.env:HOME}", "${oc.env:NOT_THERE}", "${run.name}", "${data.seq_len}", "${a", "$${x}"),
    *(
        "${oc.decode:'['}",
        "${oc.create:{a: 1}}",
        "${train.steps}",
        "é",
        "\udcff",
        "a\udcff",
        "\x00",
        "a\x1bb",
        "x" * 3000,
    ),
    *("/dev/zero", "/dev/stdin", "/proc/self/environ", "~nobody/x", "a/b", "..", ".", "a.yaml", "/nowhere/a.yaml"),
)
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 97, 127, 128, 256, 360, 1000, 1009, 4096, 65536, 2**20, 2**24)
#: Keys that affect the layout; they are chosen more often than others.
_LAYOUT = (
    *("parallel.pipeline", "parallel.virtual_stages", "parallel.schedule", "parallel.zero", "parallel.reduce"),
    *("parallel.gather", "parallel.hpz", "parallel.offload.optimizer", "parallel.offload.params", "parallel.split"),
    *("batch.global_size", "batch.micro_size", "launch.nodes", "launch.ranks_per_node", "launch.hostfile"),
    *("activation.checkpoint", "precision.dtype", "precision.compile", "kernels.loss", "data.seq_len", "train.steps"),
    *("schedule.kind", "schedule.warmup_steps", "schedule.decay_steps", "optim.lr", "optim.kind", "model.init"),
    *("model.config.num_hidden_layers", "model.config.hidden_size", "model.config.num_attention_heads"),
    *("model.config.num_key_value_heads", "model.config.vocab_size", "model.config.head_dim", "data.tokenizer"),
    *("model.config.rope_parameters.rope_type", "model.config.rope_parameters.factor", "model.name"),
)


class Fuzz:
    """Makes lines of overrides, and the files that they name."""

    def __init__(self, folder: Path, seed: int):
        self._rng = random.Random(seed)
        self._models, self._hostfiles, self._recipes = models(folder), hostfiles(folder), recipes(folder)

    def lines(self) -> Iterator[list[str]]:
        """An endless sequence of command lines, each as its words."""
        while True:
            yield self._line()

    def _line(self) -> list[str]:
        rng, found = self._rng, {}
        for group in rng.sample(sorted(_GROUPS), rng.choice((0, 0, 1, 2, 3))):
            found[group] = f"{group}={self._choice(group)}"
        if rng.random() < 0.35:
            found["model"], found["model.name"] = "model=folder", f"model.name={rng.choice(self._models)}"
        for _ in range(rng.choice((0, 1, 1, 2, 3, 5, 8))):
            key = rng.choice(_LAYOUT) if rng.random() < 0.7 else rng.choice(sorted(_LEAVES))
            found[key] = self._override(key)
        line = list(found.values())
        rng.shuffle(line)
        return line

    def _choice(self, group: str) -> str:
        rng = self._rng
        if rng.random() < 0.85:
            return rng.choice(_GROUPS[group])
        return rng.choice((*self._recipes, *_ODD))

    def _override(self, key: str) -> str:
        rng, spec = self._rng, _LEAVES[key]
        chance = rng.random()
        if chance < 0.03:
            section = key.rpartition(".")[0]
            return f"{section}={rng.choice(_ODD)}"
        if chance < 0.05:
            return rng.choice((f"{key}x=1", f"x{key}=1", f"~{key}", f"+{key}=1", key, f"{key}.x=1", f"--{key}=1"))
        if chance < 0.15:
            return f"{key}={rng.choice(_ODD)}"
        if key == "launch.hostfile":
            return f"{key}={rng.choice(self._hostfiles)}"
        if key == "model.name":
            return f"{key}={rng.choice((*FAMILIES, *self._models))}"
        return f"{key}={self._value(spec)}"

    def _value(self, spec: Spec) -> str:
        rng = self._rng
        if spec.is_list:
            return "[" + ",".join(self._scalar(spec) for _ in range(rng.choice((0, 1, 2, 3, 4)))) + "]"
        return "auto" if spec.auto and rng.random() < 0.2 else self._scalar(spec)

    def _scalar(self, spec: Spec) -> str:
        rng = self._rng
        if spec.choices:
            return str(rng.choice(spec.choices))
        if spec.kind is bool:
            return rng.choice(("true", "false"))
        if spec.kind is int:
            return str(rng.choice((rng.choice(_SIZES), rng.randrange(0, 40), rng.randrange(2**64))))
        if spec.kind is float:
            return repr(rng.choice((rng.random(), rng.random() * 10, 10.0 ** rng.randrange(-12, 12), 0.0)))
        return rng.choice(("a", "run-1", "bpe", "text", "gpt2", str(spec.example) if spec.example else "b"))


def models(folder: Path) -> list[str]:
    """Writes model folders, whole and damaged ones; returns values for `model.name`."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 5000}
    good: dict[str, Any] = {"model_type": "llama", "intermediate_size": 128, "max_position_embeddings": 512, **sizes}
    values: tuple[Any, ...] = (-5, 0, "96", None, [], {}, True, 1.5, 10**18, 10**30, "x" * 2000)
    damaged = {f"{key}-{number}": {**good, key: value} for key in sizes for number, value in enumerate(values)}
    families = {name: {"model_type": name, **sizes} for name in FAMILIES}
    contents: dict[str, str] = {name: json.dumps(fields) for name, fields in {**families, **damaged}.items()}
    contents |= {
        "theta4": json.dumps({**good, "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        "theta5": json.dumps({**good, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}),
        "rope-list": json.dumps({**good, "rope_parameters": [1]}),
        "rope-text": json.dumps({**good, "rope_scaling": "linear"}),
        "rope-odd": json.dumps({**good, "rope_parameters": {"rope_type": ["x"], "rope_theta": {}}}),
        "kind-list": json.dumps({**good, "model_type": ["llama"]}),
        "layer-types": json.dumps({**good, "model_type": "qwen2", "layer_types": ["x", 1]}),
        "nan": json.dumps({**good, "hidden_size": float("nan")}),
        "no-kind": "{}",
        "list": "[]",
        "cut": '{"model_type": ',
        "deep": "[" * 100_000,
        "digits": '{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}",
        "binary": "\x00\x01",
    }
    made = []
    for name, text in contents.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
        (folder / name / "model.safetensors").write_bytes(b"")
        made.append(str(folder / name))
    return [*made, *_not_files(folder, "config.json"), str(folder / "nowhere"), "org/name/x"]


def hostfiles(folder: Path) -> list[str]:
    """Writes hostfiles, whole and damaged ones; returns values for `launch.hostfile`."""
    contents = {
        "one": "a slots=8\n",
        "four": "".join(f"node-{number} slots=8\n" for number in range(4)),
        "uneven": "a slots=8\nb slots=4\n",
        "huge": "a slots=99999999999999999999\n",
        "digits": f"a slots={'9' * 5000}\n",
        "many": "".join(f"n{number} slots=1024\n" for number in range(3000)),
        "none": "# none\n",
        "odd": "\x00\x01 slots\n",
        "long": "x" * 100_000,
    }
    made = []
    for name, text in contents.items():
        (folder / f"hosts-{name}").write_text(text)
        made.append(str(folder / f"hosts-{name}"))
    (folder / "hosts-binary").write_bytes(b"\xff\xfe\x00a")
    return [
        *made,
        str(folder / "hosts-binary"),
        *_not_files(folder, "hosts"),
        str(folder / "hosts-nowhere"),
        "/dev/zero",
    ]


def recipes(folder: Path) -> list[str]:
    """Writes files for `experiment=` and other groups, whole and damaged ones; returns their paths."""
    laughs = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" if i else "a0: &a0 [x]" for i in range(12))
    contents = {
        "good": "optim: {lr: 0.001}\n",
        "typed": "train: {steps: '5'}\n",
        "unknown": "trian: {steps: 5}\n",
        "deep": "a: " + "[" * 20_000,
        "laughs": laughs,
        "digits": f"train: {{steps: {'9' * 5000}}}\n",
        "date": "run: {name: 2001-99-99}\n",
        "tag": "run: !!python/object/apply:os.system [true]\n",
        "list": "- 1\n",
        "empty": "",
        "defaults": "defaults: [{override /model: nowhere}]\n",
        "loop": "run: {name: '${run.name}'}\n",
    }
    made = []
    for name, text in contents.items():
        (folder / f"{name}.yaml").write_text(text)
        made.append(str(folder / f"{name}.yaml"))
    return [*made, *_not_files(folder, "fifo.yaml"), str(folder / "nowhere.yaml")]


def _not_files(folder: Path, name: str) -> list[str]:
    """Makes a FIFO, which blocks a process that opens it, and a folder, in the place of a file. For config.json,
    returns the two folders that contain them."""
    inner: Callable[[str], Path] = lambda kind: folder / f"{kind}-{name}"  # noqa: E731
    if name == "config.json":
        for kind, make in (("fifo", os.mkfifo), ("folder", os.mkdir)):
            inner(kind).mkdir()
            make(inner(kind) / name)
    else:
        os.mkfifo(inner("fifo"))
        inner("folder").mkdir()
    return [str(inner("fifo")), str(inner("folder"))]
