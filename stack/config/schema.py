"""The schema of the config: every key, with its default, meaning, unit and legal values.

The metadata of a field bounds its value. `choices` lists the legal values. `low` and `high` are inclusive bounds,
`above` and `below` exclusive ones. `length` is the length of a list. `auto` is the type of a value that may also be the
word `auto`. `example` is a legal value for messages. `stack.config.values` checks values and turns a violation into one
line for the user.

This module does not import torch, because a wrong config must fail in well under two seconds.
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
    # 2**24 (16.8 M) is beyond any real run, and still small enough for loops and exact arithmetic.
    return _between(default, low, 2**24)


def _above(default: Any, above: float) -> Any:
    return field(default=default, metadata={"above": above})


def _seconds(default: float) -> Any:
    # At most 1e6 s (twelve days): the libraries hold timeouts in 32-bit milliseconds.
    return field(default=default, metadata={"above": 0, "high": 1e6})


@dataclass
class Run:
    root: str = "runs"
    """Folder that holds all runs; with several hosts, a folder that all of them share."""
    name: str = "run"
    """Name of the experiment; each start of it makes `<root>/<name>/<run_id>`."""
    seed: int = _at_least(1234, 0)
    """Seeds parameter initialisation, data order and dropout."""


@dataclass
class Model:
    name: str = field(default="llama", metadata={"example": "llama, or a folder such as /models/my-llama"})
    """A family by its Hugging Face `model_type` (`llama`, `qwen3`, ...); or a model folder, whose config.json gives the
    family and the shape; or the name of a model on the Hugging Face hub, such as `org/name`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the family's Hugging Face config, e.g. {hidden_size: 192}. They override the fields of the model
    folder. A field that is set in neither place has the default of the family's config class."""
    attention: str = _one_of("sdpa", "sdpa", "eager", "flash_attention_2")
    """Attention implementation by its Hugging Face name."""
    init: str = _one_of("scratch", "scratch", "pretrained")
    """Initial weights. `scratch` draws them at random. `pretrained` reads the model folder's safetensors files of any
    dtype; each rank reads the weights of its own layers only. Weights on the hub are downloaded once."""


@dataclass
class Data:
    source: str = _one_of("python_stdlib", "python_stdlib", "files", "hf")
    """`python_stdlib`: source text of the running interpreter's standard library. `files`: plain text, csv, jsonl, json
    or parquet, compressed or not. `hf`: a dataset for the `datasets` library, by its name or local folder."""
    paths: list[str] = field(default_factory=list)
    """Files, folders or globs, for `files`."""
    extensions: list[str] = field(default_factory=list, metadata={"example": [".log"]})
    """Further file extensions to read as plain text, one document per file, for `files`."""
    name: str | None = None
    """Dataset name or local folder, for `hf`."""
    subset: str | None = None
    """Configuration name of the dataset, for `hf`."""
    split: str = "train"
    """Split of the dataset, for `hf`."""
    text_key: str = "text"
    """Column that holds the text, for csv, jsonl, json, parquet and `hf`; `data.text` is the field `text` in `data`."""
    tokenizer: str = field(default="auto", metadata={"example": "bpe"})
    """`bpe` trains a byte-level BPE with `vocab_size` tokens on the corpus. Any other value is the folder or hub name
    of a Hugging Face tokenizer. `auto` is `model.name` with model.init=pretrained, otherwise `bpe`."""
    special_tokens: str = _one_of("parse", "parse", "text")
    """How to tokenize a special token such as `<|im_start|>` that is spelled out in a document. `parse` gives it the
    id of the special token, as transformers does. `text` tokenizes it as ordinary text, which is safe for text by
    unknown authors."""
    vocab_size: int = _size(4096, 257)
    """Tokens of the trained BPE, including the 256 bytes and the end-of-document token."""
    seq_len: int = _size(256, 8)
    """Tokens in one input sequence of the model."""
    pack: bool = True
    """True: documents are concatenated and cut into full sequences. False: each sequence holds one document, cut or
    padded to `seq_len`."""
    heldout_fraction: float = _between(0.02, 0.0001, 0.5)
    """Share of the documents kept out of training."""
    prefetch: bool = True
    """Prepare the batch of the next step on a thread, and copy it to the device while the current step runs."""
    split_seed: int = _at_least(0, 0)
    """Seed that chooses the held-out documents. It is separate from `run.seed`, so that runs with different seeds are
    evaluated on the same text."""
    root: str = "data"
    """Folder of prepared token shards. A corpus is prepared once and later found by its fingerprint."""


@dataclass
class Offload:
    optimizer: str = _one_of("none", "none", "cpu", "nvme")
    """Where ZeRO keeps the fp32 master weights and the optimizer state: `none` on the device, `cpu` in host memory,
    `nvme` in files (ZeRO-3)."""
    params: str = _one_of("none", "none", "cpu")
    """ZeRO-3: where the parameter shards are between uses: `none` on the device, `cpu` in host memory."""
    folder: str | None = field(default=None, metadata={"example": "/local/nvme"})
    """Folder for the files of `nvme`, on a local disk of each host."""


@dataclass
class Parallel:
    pipeline: int = _size(2, 1)
    """Ranks along the pipeline; each holds `virtual_stages` stages."""
    data: Any = field(default="auto", metadata={"auto": int, "low": 1, "high": 2**24, "example": 4})
    """Data-parallel replicas; `auto` is the number of ranks / `pipeline`."""
    zero: int = field(default=3, metadata={"choices": (0, 1, 2, 3)})
    """ZeRO stage, applied within the data-parallel group of each pipeline stage."""
    schedule: str = _one_of("1f1b", "1f1b", "gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv")
    """Pipeline schedule: the order of forward and backward passes of the microbatches."""
    virtual_stages: int = _size(1, 1)
    """Pipeline stages on each rank: more than one for the interleaved schedules, two for `zbv`."""
    reduce: str = _one_of("step", "step", "microbatch")
    """When gradients are reduced over the replicas: `step` once per step, with the whole gradients of a stage in memory
    until then; `microbatch` after every backward, with less memory."""
    gather: str = _one_of("step", "step", "microbatch")
    """ZeRO-3: `step` keeps the gathered parameters of a stage for the whole step; `microbatch` gathers them again for
    each microbatch, with less memory."""
    hpz: int = _size(1, 1)
    """ZeRO-3 with gather=microbatch: number of ranks, on one host, over which a second copy of the parameters is
    sharded. The backward gathers from that copy without leaving the host. 1 keeps no second copy."""
    quantized_weights: bool = False
    """ZeRO-3: gather parameters as 8-bit integers. Needs NVIDIA GPUs, and changes the results."""
    overlap: bool = True
    """Overlap communication with computation where the other keys allow it. Gradients are reduced during the last
    backward. With ZeRO-3 and gather=microbatch, parameters are gathered ahead of their use."""
    offload: Offload = field(default_factory=Offload)
    split: Any = field(default="auto", metadata={"auto": list[int], "low": 0, "example": [0, 5, 9]})
    """The first layer of each pipeline stage, e.g. [0, 5, 9]; `auto` balances the FLOPs of the stages."""


@dataclass
class Activation:
    checkpoint: str = _one_of("full", "none", "full", "selective", "every_k")
    """`full` keeps only the input of each decoder layer and recomputes the layer in the backward. `every_k` does so for
    one layer in `every`. `selective` also keeps the results of matrix products, including those of experts, and of
    attention without dropout. `none` keeps all activations."""
    every: int = _size(2, 1)
    """The k of `every_k`: layers 0, k, 2k, ... are recomputed."""


@dataclass
class Batch:
    global_size: int = _size(16, 1)
    """Sequences in one optimizer step, summed over all replicas and microbatches."""
    micro_size: int = _size(2, 1)
    """Sequences in one microbatch of one replica. Microbatches per step = global_size / (micro_size * replicas)."""


@dataclass
class Precision:
    dtype: str = _one_of("fp32", "fp32", "bf16", "fp16")
    """Compute dtype. Master weights, optimizer state, gradient accumulation and gradient reduction are always fp32.
    fp16 uses a dynamic loss scale, which is the same on all pipeline stages."""
    compile: bool = False
    """Compile the decoder layers with torch.compile: the first step takes about a minute, later ones are faster."""


@dataclass
class Kernels:
    loss: str = _one_of("auto", "auto", "logits", "chunked", "liger")
    """How the last stage computes the loss. `logits` holds the logits of a whole microbatch. `chunked` computes logits,
    loss and gradients of a few tokens at a time. `liger` does the same with Liger's kernels. `auto` is `chunked`, or
    `logits` if the model scales or caps its logits after the head."""
    rms_norm: str = _one_of("torch", "torch", "liger")
    """RMS norms: transformers' code, or Liger's kernels (NVIDIA GPUs only; `pip install stack[gpu]`)."""
    rope: str = _one_of("torch", "torch", "liger")
    """Rotary embeddings of queries and keys: transformers' code, or Liger's kernels."""
    swiglu: str = _one_of("torch", "torch", "liger")
    """Activation and elementwise product in a gated MLP or expert: transformers' code, or Liger's kernels."""


@dataclass
class Optim:
    kind: str = _one_of("adamw", "adamw", "sgd")
    """`sgd` is SGD with `momentum`."""
    lr: Any = field(default="auto", metadata={"auto": float, "above": 0, "example": 3e-4})
    """Peak learning rate. `auto` is 3e-4 for AdamW with model.init=scratch; SGD or pretrained weights need a number."""
    momentum: float = field(default=0.9, metadata={"low": 0, "below": 1})
    """Momentum of SGD."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95], metadata={"length": 2, "low": 0, "below": 1})
    """AdamW's decay rates of the first and second moment."""
    eps: float = _above(1e-8, 0)
    """Term that AdamW adds to the denominator of its update."""
    weight_decay: float = _at_least(0.1, 0)
    """Applied to matrices only (decoupled in AdamW, part of the gradient in SGD); norms and biases are not decayed."""
    grad_clip: float = _at_least(1.0, 0)
    """Gradients are scaled down to this global norm if theirs is larger; 0 does not clip."""
    fused: bool = True
    """Update all parameters in one fused kernel, which itself skips the step if a gradient is not finite."""


@dataclass
class Schedule:
    kind: str = _one_of("cosine", "cosine", "wsd", "linear", "constant")
    """Course of the learning rate after warm-up; `wsd` is constant, then decays linearly over `decay_steps`."""
    warmup_steps: Any = field(default="auto", metadata={"auto": int, "low": 0, "example": 20})
    """Steps of linear warm-up from 0 to `optim.lr`; `auto` is a tenth of `train.steps`, at most 2000."""
    decay_steps: int = _at_least(0, 0)
    """Steps of the final decay of `wsd`; 0 is a tenth of `train.steps`."""
    min_lr_ratio: float = _between(0.1, 0, 1)
    """Learning rate at the last step as a fraction of `optim.lr`, for cosine, wsd and linear."""


@dataclass
class Train:
    steps: int = _at_least(100, 1)
    """Optimizer steps."""
    eval_every: int = _at_least(20, 0)
    """Steps between held-out evaluations. Unless it is 0, which disables them, the last step is evaluated too."""
    eval_first: bool = False
    """Also evaluate the initial weights before the first step, as a row of step 0."""
    eval_sequences: int = _at_least(64, 1)
    """Held-out sequences in one evaluation, fewer if the held-out split is smaller. The forward passes take whole
    global batches, so a number below a multiple of `batch.global_size` saves no time."""
    log_every: int = _at_least(5, 1)
    """Steps between console lines; metrics.jsonl has every step."""


@dataclass
class Checkpoint:
    every: int = _at_least(50, 0)
    """Steps between checkpoints. Unless it is 0, which saves none, the last step is saved too."""
    keep_last: int = _at_least(2, 1)
    """Number of newest checkpoints to keep."""
    keep_every: int = _at_least(0, 0)
    """Checkpoints at multiples of this many steps are never deleted; 0 keeps none of them."""
    keep_best: int = _at_least(0, 0)
    """Number of checkpoints with the lowest held-out loss to keep in addition to the newest."""
    async_save: bool = True
    """True: training waits only while the state is copied to host memory; files are written in the background. The copy
    permanently takes 12 bytes of host memory for each parameter of the rank's shard. False: training waits until the
    files are written."""
    path: str | None = field(default=None, metadata={"example": "/checkpoints"})
    """Folder for checkpoints, those of a run in `<path>/<run.name>/<run_id>`; null is the run directory."""
    step: Any = field(default="auto", metadata={"auto": int, "low": 1, "example": 100})
    """Step of the checkpoint to resume, evaluate or export; `auto` is the newest complete one."""
    allow: list[str] = field(default_factory=list, metadata={"choices": ("batch", "data", "model")})
    """What a resumed run may change against its checkpoint: `batch` (the batch size), `data` (corpus, sequence length,
    packing or seed; the new data are read from their beginning), `model` (settings that change no parameter's shape).
    """
    timeout_s: float = _seconds(1800.0)
    """Longest time, in seconds, that ranks wait for each other during a save, and while they find and read a
    checkpoint."""


@dataclass
class Export:
    dtype: str = _one_of("fp32", "fp32", "bf16")
    """Dtype of the exported weights."""


@dataclass
class Wandb:
    mode: str = _one_of("offline", "online", "offline", "shared", "disabled")
    """`online` uploads during the run. `shared` also uploads the system metrics of every host, instead of the first
    host's only. `offline` writes W&B's files into the run directory, and `stack wandb-sync` uploads them later."""
    project: str = "stack"
    """W&B project of the run."""
    entity: str | None = None
    """W&B user or team that owns the project; null is W&B's default for the API key."""
    group: str | None = None
    """W&B group of the run."""
    tags: list[str] = field(default_factory=list)
    """W&B tags of the run."""
    timeout_s: float = _seconds(60.0)
    """Longest time, in seconds, that the end of a run waits for W&B. At the start, the server must answer within half
    of it."""


@dataclass
class Log:
    wandb: Wandb = field(default_factory=Wandb)


@dataclass
class Launch:
    backend: str = _one_of("deepspeed", "deepspeed", "torchrun", "slurm", "local")
    """What starts the ranks: `deepspeed` and `torchrun` start that launcher on each host; `slurm` starts srun inside an
    allocation; `local` starts the ranks directly, on this host only."""
    hostfile: str | None = field(default=None, metadata={"example": "hosts"})
    """File with a line `NAME slots=RANKS` for each host. Each host must be reachable by ssh without a password. null
    uses this host only."""
    nodes: Any = field(default="auto", metadata={"auto": int, "low": 1, "high": 100_000, "example": 2})
    """Number of hosts to use, the first ones of the hostfile. `auto` is all hosts of the hostfile, or those of the
    Slurm allocation, or this host. It has no effect where torchrun or another launcher starts `stack.train` directly:
    there the launcher's environment gives the number of hosts."""
    ranks_per_node: Any = field(default="auto", metadata={"auto": int, "low": 1, "high": 1024, "example": 8})
    """Ranks on each host; `auto` is its slots in the hostfile, or its number of NVIDIA GPUs, or 4 without GPUs."""
    env: list[str] = field(
        default_factory=lambda: [
            *("NCCL_*", "GLOO_*", "TORCH_*", "PYTORCH_*", "HF_*", "WANDB_*", "OMP_NUM_THREADS", "PYTHONPATH")
        ]
    )
    """Names of environment variables to pass to ranks on other hosts; `*` stands for any characters. The values are
    sent over the ssh connection and are never written to a file."""
    slurm: list[str] = field(default_factory=list, metadata={"example": ["--partition=gpu"]})
    """Additional options for Slurm's srun, or for the salloc of each job of a sweep."""
    bind_cores: bool = False
    """Pin each rank to its share of the host's cores, if the host has at least one core per rank."""
    grace_s: float = _seconds(10.0)
    """Seconds between SIGTERM and SIGKILL when a run is stopped."""


@dataclass
class Health:
    hang_timeout_s: float = _seconds(600.0)
    """Longest time, in seconds, that a rank waits in one collective before the run ends with exit code 8."""


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
