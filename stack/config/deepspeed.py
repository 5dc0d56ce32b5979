"""The DeepSpeed config of a run: one pure function, every value we rely on spelled out.

Users never write a DeepSpeed JSON. The result is saved with the run as ds_config.json.
"""

from typing import Any

from stack.config.schema import Config

#: Elements reduced together. Larger buckets mean fewer collectives and a larger buffer of the reduction dtype.
_BUCKET_ELEMENTS = 50_000_000


def ds_config(cfg: Config, *, replicas: int, rank_params: int) -> dict[str, Any]:
    """DeepSpeed's config for the stages of one rank.

    Args:
        cfg: the run.
        replicas: ranks of a data group.
        rank_params: parameters of the stages of the rank that has most; no bucket is larger.
    """
    bf16 = cfg.precision.dtype == "bf16"
    return {
        "train_micro_batch_size_per_gpu": cfg.batch.micro_size,
        # DeepSpeed would divide the loss by it at every stage; the last stage scales once, by the global tokens.
        "gradient_accumulation_steps": 1,
        "train_batch_size": cfg.batch.micro_size * replicas,
        "bf16": {"enabled": bf16 and cfg.parallel.zero > 0, "check_grad_overflow": False},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # ZeRO-0 is clipped by our own engine, which also sums the norm over the stages.
        "gradient_clipping": cfg.optim.grad_clip if cfg.parallel.zero else 0.0,
        "prescale_gradients": False,
        # SGD is equal to a dense process in tests/numerics.
        "zero_allow_untested_optimizer": cfg.optim.kind == "sgd",
        "zero_optimization": _zero(cfg, rank_params=rank_params),
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "dump_state": False,
    }


def deepspeed_zero_stage(cfg: Config) -> int:
    """The stage DeepSpeed is told.

    Under bf16 with fp32 sums DeepSpeed turns its stage 1 into another optimizer that cannot reduce once a step.
    Stage 2 reduced once a step is the same algorithm: full local gradients, then one reduce-scatter.
    """
    return 2 if cfg.parallel.zero == 1 and cfg.precision.dtype == "bf16" else cfg.parallel.zero


def _zero(cfg: Config, *, rank_params: int) -> dict[str, Any]:
    bucket = max(1, min(_BUCKET_ELEMENTS, rank_params))
    zero: dict[str, Any] = {
        "stage": deepspeed_zero_stage(cfg),
        "contiguous_gradients": True,
        # Overlap and prefetch exist on a GPU only: off until they are proved equal there.
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "round_robin_gradients": False,
    }
    if cfg.parallel.zero == 3:
        zero |= {
            "stage3_prefetch_bucket_size": 0,
            # A decoder layer is one leaf module and gathered whole, so keeping its small tensors resident saves
            # no collective.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "sub_group_size": 1_000_000_000,
            # Else zero.Init replaces torch's linear, for the whole process, by one written in Python.
            "memory_efficient_linear": False,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    return zero
