"""The only definition of what a run can be told.

Every field carries its meaning, its unit and its legal values: `choices`, `low`, `above`, `high`, `below`,
`length` (of a list), `auto` (the type beside the word auto) and `example` are read by `stack.config.values`, which
turns a violation into one line for the user. No torch here: a bad config must fail in well under two seconds.
"""

from dataclasses import dataclass, field
from typing import Any


def _one_of(default: str, *choices: str) -> Any:
    return field(default=default, metadata={"choices": choices})


def _at_least(default: Any, low: float) -> Any:
    return field(default=default, metadata={"low": low})


def _between(default: Any, low: float, high: float) -> Any:
    return field(default=default, metadata={"low": low, "high": high})


def _size(default: int, low: int) -> Any:
    # 16 M: beyond any run, and small enough for arithmetic and loops.
    return _between(default, low, 2**24)


def _above(default: Any, above: float) -> Any:
    return field(default=default, metadata={"above": above})


def _seconds(default: float) -> Any:
    # Twelve days. A longest wait that is longer is none, and the libraries count it in 32 bits of milliseconds.
    return field(default=default, metadata={"above": 0, "high": 1e6})


@dataclass
class Run:
    root: str = "runs"
    """Folder that holds all runs; on several hosts a folder all of them see."""
    name: str = "run"
    """Name of the experiment; each start of it makes `<root>/<name>/<run_id>`."""
    seed: int = _at_least(1234, 0)
    """Seeds parameter initialisation, data order and dropout."""


@dataclass
class Model:
    name: str = field(default="llama", metadata={"example": "llama, or a folder such as /models/my-llama"})
    """A family by its Hugging Face `model_type` (`llama`, `qwen3`, ...), or a model folder whose config.json is of one
    and gives the shape, or the name of one on the Hugging Face hub, such as `org/name`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the family's Hugging Face config, e.g. {hidden_size: 192}; they override a folder's, and those left
    out are the class's own."""
    attention: str = _one_of("sdpa", "sdpa", "eager", "flash_attention_2")
    """Attention implementation by its Hugging Face name."""
    init: str = _one_of("scratch", "scratch", "pretrained")
    """First weights: `scratch` draws them; `pretrained` reads the model folder's safetensors, of whatever dtype, each
    rank those of its own layers. A hub's are downloaded once."""


@dataclass
class Data:
    source: str = _one_of("python_stdlib", "python_stdlib", "files", "hf")
    """`python_stdlib`: source text of the running interpreter's standard library. `files`: plain text, csv, jsonl, json
    or parquet, compressed or not. `hf`: a `datasets` name or local folder."""
    paths: list[str] = field(default_factory=list)
    """Files, folders or globs, for `files`."""
    extensions: list[str] = field(default_factory=list, metadata={"example": [".log"]})
    """More endings of files that are read as plain text, one document each, for `files`."""
    name: str | None = None
    """Dataset name or local folder, for `hf`."""
    subset: str | None = None
    """Configuration name of the dataset, for `hf`."""
    split: str = "train"
    """Split of the dataset, for `hf`."""
    text_key: str = "text"
    """Column that holds the text, for csv, jsonl, json, parquet and `hf`; `data.text` is the field `text` in `data`."""
    tokenizer: str = field(default="auto", metadata={"example": "bpe"})
    """`bpe` trains a byte-level BPE of `vocab_size` on the corpus; else a Hugging Face tokenizer folder or name. `auto`
    is the one of `model.name` with model.init=pretrained, else `bpe`."""
    special_tokens: str = _one_of("parse", "parse", "text")
    """What a document means by spelling a special token such as `<|im_start|>`: `parse` gives it that token's id, as
    transformers does; `text` takes it for ordinary text, which is safe for text that strangers wrote."""
    vocab_size: int = _size(4096, 257)
    """Size of the trained BPE, all 256 bytes and the end-of-document token included."""
    seq_len: int = _size(256, 8)
    """Tokens in a sequence, as the model sees it."""
    pack: bool = True
    """True: documents are joined and cut into full sequences. False: one document a sequence, cut or padded."""
    heldout_fraction: float = _between(0.02, 0.0001, 0.5)
    """Share of the documents kept out of training."""
    prefetch: bool = True
    """Make the next step's batch on a thread, and copy it to the device beside the step that runs."""
    split_seed: int = _at_least(0, 0)
    """Chooses the held-out documents. Apart from `run.seed`, so that runs of a sweep are held to the same text."""
    root: str = "data"
    """Folder of prepared token shards; a corpus is prepared once and found again by its fingerprint."""


@dataclass
class Offload:
    optimizer: str = _one_of("none", "none", "cpu", "nvme")
    """Where ZeRO keeps masters and optimizer state: on the device, in host memory, or in files (ZeRO-3)."""
    params: str = _one_of("none", "none", "cpu")
    """ZeRO-3: where the shards of the parameters are while nobody uses them."""
    folder: str | None = field(default=None, metadata={"example": "/local/nvme"})
    """Folder for `nvme`, on a disk of each host."""


@dataclass
class Parallel:
    pipeline: int = _size(2, 1)
    """Ranks along the pipe; each holds `virtual_stages` stages."""
    data: Any = field(default="auto", metadata={"auto": int, "low": 1, "high": 2**24, "example": 4})
    """Replicas; `auto` is ranks / pipeline."""
    zero: int = field(default=3, metadata={"choices": (0, 1, 2, 3)})
    """ZeRO stage inside each pipeline stage's data group."""
    schedule: str = _one_of("1f1b", "1f1b", "gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv")
    """Order of forwards and backwards of the microbatches."""
    virtual_stages: int = _size(1, 1)
    """Stages on each rank of the pipe: more than one for the interleaved schedules, two for `zbv`."""
    reduce: str = _one_of("step", "step", "microbatch")
    """Reduce gradients once a step (full stage gradients live meanwhile) or after every backward."""
    gather: str = _one_of("step", "step", "microbatch")
    """ZeRO-3: hold a stage's gathered parameters for the whole step, or gather them again for each microbatch."""
    hpz: int = _size(1, 1)
    """ZeRO-3 with gather=microbatch: ranks that keep a second copy of the parameters between them, so that backwards
    gather inside a host; 1 keeps none."""
    quantized_weights: bool = False
    """ZeRO-3: gather parameters as 8-bit integers. Needs NVIDIA GPUs, and is not exact."""
    overlap: bool = True
    """Communicate beside the computation where the policies allow it: gradients are reduced while the last backward
    goes on, and with ZeRO-3 and gather=microbatch parameters are gathered ahead of their use."""
    offload: Offload = field(default_factory=Offload)
    split: Any = field(default="auto", metadata={"auto": list[int], "low": 0, "example": [0, 5, 9]})
    """`auto` balances FLOPs, or the first layer of each stage, e.g. [0, 5, 9]."""


@dataclass
class Activation:
    checkpoint: str = _one_of("full", "none", "full", "selective", "every_k")
    """`full` keeps only each decoder layer's input and recomputes the layer in the backward; `every_k` does so in one
    layer of `every`; `selective` also keeps the results of matrix products, those of experts too, and of attention
    without dropout."""
    every: int = _size(2, 1)
    """The k of `every_k`: layers 0, k, 2k, ... are recomputed."""


@dataclass
class Batch:
    global_size: int = _size(16, 1)
    """Sequences in one optimizer step, over all replicas and microbatches."""
    micro_size: int = _size(2, 1)
    """Sequences in one microbatch of one replica; the number of microbatches follows."""


@dataclass
class Precision:
    dtype: str = _one_of("fp32", "fp32", "bf16", "fp16")
    """Compute dtype. Masters, optimizer state, gradient accumulation and reduction are always fp32; fp16 has a dynamic
    loss scale, the same on all stages."""
    compile: bool = False
    """Compile the decoder layers with torch.compile: faster steps after a first one that takes a minute."""


@dataclass
class Kernels:
    loss: str = _one_of("auto", "auto", "logits", "chunked", "liger")
    """The last stage's loss. `logits`: from the logits of a whole microbatch. `chunked`: from a few tokens' logits at a
    time, with their gradients. `liger`: the same by Liger's kernels. `auto` is chunked, or logits where the model
    changes its logits after the head."""
    rms_norm: str = _one_of("torch", "torch", "liger")
    """RMS norms by transformers, or by Liger's kernels (NVIDIA GPUs; `pip install stack[gpu]`)."""
    rope: str = _one_of("torch", "torch", "liger")
    """Rotary embeddings of queries and keys, likewise."""
    swiglu: str = _one_of("torch", "torch", "liger")
    """Activation and product inside a gated MLP or expert, likewise."""


@dataclass
class Optim:
    kind: str = _one_of("adamw", "adamw", "sgd")
    """`sgd` is SGD with `momentum`."""
    lr: Any = field(default="auto", metadata={"auto": float, "above": 0, "example": 3e-4})
    """Peak learning rate. `auto` is 3e-4 for AdamW with model.init=scratch; SGD or pretrained weights need a number."""
    momentum: float = field(default=0.9, metadata={"low": 0, "below": 1})
    """SGD's momentum."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95], metadata={"length": 2, "low": 0, "below": 1})
    """AdamW's two moment decays."""
    eps: float = _above(1e-8, 0)
    """AdamW's denominator floor."""
    weight_decay: float = _at_least(0.1, 0)
    """Applied to matrices only (decoupled in AdamW, part of the gradient in SGD); norms and biases are not decayed."""
    grad_clip: float = _at_least(1.0, 0)
    """Largest global gradient norm; 0 does not clip."""
    fused: bool = True
    """Update all parameters in one kernel, which leaves a step out by itself where the gradient is not finite."""


@dataclass
class Schedule:
    kind: str = _one_of("cosine", "cosine", "wsd", "linear", "constant")
    """Learning rate after warm-up; `wsd` is constant, then linear decay over `decay_steps`."""
    warmup_steps: Any = field(default="auto", metadata={"auto": int, "low": 0, "example": 20})
    """Steps of linear warm-up from 0 to `optim.lr`; `auto` is a tenth of `train.steps`, at most 2000."""
    decay_steps: int = _at_least(0, 0)
    """Length of the final decay of `wsd`, in steps; 0 is a tenth of `train.steps`."""
    min_lr_ratio: float = _between(0.1, 0, 1)
    """Learning rate at the last step as a share of `optim.lr`, for cosine, wsd and linear."""


@dataclass
class Train:
    steps: int = _at_least(100, 1)
    """Optimizer steps."""
    eval_every: int = _at_least(20, 0)
    """Steps between held-out evaluations; 0 never evaluates. The last step is always evaluated otherwise."""
    eval_first: bool = False
    """Also evaluate before the first step, as a row of step 0: what a pretrained model knows before it is tuned."""
    eval_sequences: int = _at_least(64, 1)
    """Held-out sequences in one evaluation (fewer where the held-out split is smaller); it costs whole global
    batches of forwards."""
    log_every: int = _at_least(5, 1)
    """Steps between console lines; metrics.jsonl has every step."""


@dataclass
class Checkpoint:
    every: int = _at_least(50, 0)
    """Steps between checkpoints; the last step has one too. 0 saves none."""
    keep_last: int = _at_least(2, 1)
    """Newest checkpoints to keep."""
    keep_every: int = _at_least(0, 0)
    """Keep for ever what was saved at a multiple of so many steps; 0 keeps none."""
    keep_best: int = _at_least(0, 0)
    """Checkpoints of lowest held-out loss to keep beside the newest."""
    async_save: bool = True
    """Copy the state to host memory, which training waits for, and write it in the background: 12 bytes a parameter of
    the rank's share stay taken. False writes while training waits."""
    path: str | None = field(default=None, metadata={"example": "/checkpoints"})
    """Folder for checkpoints, each run's in `<path>/<run.name>/<run_id>`; null is the run directory."""
    step: Any = field(default="auto", metadata={"auto": int, "low": 1, "example": 100})
    """Step of the checkpoint to resume, evaluate or export; `auto` is the newest one that is whole."""
    allow: list[str] = field(default_factory=list, metadata={"choices": ("batch", "data", "model")})
    """What a resumed run may have another of than its checkpoint: `batch` (its size), `data` (corpus, sequence length,
    packing or seed; the new data are read from their beginning), `model` (settings that change no shape)."""
    timeout_s: float = _seconds(1800.0)
    """Longest wait of the ranks for each other within one save, and while a checkpoint is found and read."""


@dataclass
class Export:
    dtype: str = _one_of("fp32", "fp32", "bf16")
    """Dtype of the exported weights."""


@dataclass
class Wandb:
    mode: str = _one_of("offline", "online", "offline", "shared", "disabled")
    """`offline` writes W&B's files into the run directory, for `stack wandb-sync` later. `shared` is `online` with the
    system metrics of every host instead of the first one's alone."""
    project: str = "stack"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    timeout_s: float = _seconds(60.0)
    """Longest that the end of a run waits for W&B; half of it is what the server has to answer at the beginning."""


@dataclass
class Log:
    wandb: Wandb = field(default_factory=Wandb)


@dataclass
class Launch:
    backend: str = _one_of("deepspeed", "deepspeed", "torchrun", "slurm", "local")
    """Who starts the ranks: DeepSpeed's launcher or torchrun on each host; Slurm's srun, inside an allocation; or
    `stack` itself, on this host."""
    hostfile: str | None = field(default=None, metadata={"example": "hosts"})
    """File with a line `NAME slots=RANKS` for each host, reached by ssh without a password; null is this host."""
    nodes: Any = field(default="auto", metadata={"auto": int, "low": 1, "high": 100_000, "example": 2})
    """Hosts to use, the first ones of the hostfile; `auto` is all of them, those of the Slurm allocation, or this one.
    A bare launcher's ranks are counted as they come up."""
    ranks_per_node: Any = field(default="auto", metadata={"auto": int, "low": 1, "high": 1024, "example": 8})
    """Ranks on each host; `auto` is its slots, its NVIDIA GPUs, or 4 on a host without any."""
    env: list[str] = field(
        default_factory=lambda: ["NCCL_*", "GLOO_*", "TORCH_*", "HF_*", "WANDB_*", "OMP_NUM_THREADS", "PYTHONPATH"]
    )
    """Variables of this environment that ranks on other hosts get too, by name; `*` stands for any letters. They travel
    inside the ssh connection, and are written nowhere."""
    slurm: list[str] = field(default_factory=list, metadata={"example": ["--partition=gpu"]})
    """More options for Slurm's srun, or for the salloc of each job of a sweep."""
    bind_cores: bool = False
    """Keep each rank on its share of its host's cores, where there is one for each."""
    grace_s: float = _seconds(10.0)
    """Seconds between SIGTERM and SIGKILL when a run is stopped."""


@dataclass
class Health:
    hang_timeout_s: float = _seconds(600.0)
    """Longest wait in one collective before the ranks give up with exit code 8."""


@dataclass
class Config:
    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    parallel: Parallel = field(default_factory=Parallel)
    activation: Activation = field(default_factory=Activation)
    batch: Batch = field(default_factory=Batch)
    precision: Precision = field(default_factory=Precision)
    kernels: Kernels = field(default_factory=Kernels)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    export: Export = field(default_factory=Export)
    log: Log = field(default_factory=Log)
    launch: Launch = field(default_factory=Launch)
    health: Health = field(default_factory=Health)
