"""Makes DeepSpeed's config from the config of a run. It sets explicitly every value that `stack` relies on.

Users never write DeepSpeed's JSON. The result is saved with the run as ds_config.json.
"""

from typing import Any

from stack.config.schema import Config

#: Gradient elements that are reduced in one collective. Larger buckets need fewer collectives and a larger buffer.
_BUCKET_ELEMENTS = 50_000_000


def ds_config(cfg: Config, *, replicas: int, rank_params: int, streams: bool) -> dict[str, Any]:
    """DeepSpeed's config for the engines of the pipeline stages of one rank.

    Args:
        cfg: config of the run.
        replicas: number of ranks in a data-parallel group.
        rank_params: largest number of parameters that the stages of any one rank have; no bucket is larger.
        streams: whether the device is a GPU. It has streams for communication, and copies from page-locked memory. On a
            CPU `overlap_comm` hangs.
    """
    return {
        "train_micro_batch_size_per_gpu": cfg.batch.micro_size,
        # DeepSpeed would divide the loss by this number at every pipeline stage. The last stage scales the loss once,
        # by the number of target tokens in the global batch.
        "gradient_accumulation_steps": 1,
        "train_batch_size": cfg.batch.micro_size * replicas,
        "bf16": {"enabled": cfg.precision.dtype == "bf16", "check_grad_overflow": not cfg.optim.fused},
        # All pipeline stages see the same overflows, and so keep the same scale. Same numbers as `LossScaler` (ZeRO-0).
        "fp16": {
            "enabled": cfg.precision.dtype == "fp16",
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 1,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": cfg.optim.grad_clip,
        "prescale_gradients": False,
        # tests/numerics compares SGD with the same model trained in one ordinary process.
        "zero_allow_untested_optimizer": cfg.optim.kind == "sgd",
        # With True, DeepSpeed refuses to offload any optimizer except its own compiled one.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(cfg, rank_params=rank_params, streams=streams),
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # Enabled by default, which makes each forward synchronize with the device.
        "timers": {"throughput": {"enabled": False}},
        "dump_state": False,
    }


def deepspeed_zero_stage(cfg: Config) -> int:
    """The ZeRO stage in DeepSpeed's config: 2 for `parallel.zero=1` in half precision, otherwise `parallel.zero`.

    With fp32 sums of half-precision gradients, DeepSpeed's stage 1 takes a code path that cannot reduce once a step.
    Stage 2 reduced once a step is the same algorithm: full local gradients, then one reduce-scatter.
    """
    return 2 if cfg.parallel.zero == 1 and cfg.precision.dtype != "fp32" else cfg.parallel.zero


def _zero(cfg: Config, *, rank_params: int, streams: bool) -> dict[str, Any]:
    bucket = max(1, min(_BUCKET_ELEMENTS, rank_params))
    zero: dict[str, Any] = {
        "stage": deepspeed_zero_stage(cfg),
        "contiguous_gradients": True,
        # Only with ZeRO-3: with `overlap_comm`, ZeRO-1 and ZeRO-2 synchronize with the device in each bucket.
        "overlap_comm": cfg.parallel.overlap and streams and cfg.parallel.zero == 3,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "round_robin_gradients": False,
    }
    if cfg.parallel.zero == 3:
        zero |= {
            "stage3_prefetch_bucket_size": 0,
            # stack/parallel/gathering.py gathers a whole decoder layer in one collective. Keeping the small tensors of
            # the layer ungathered would save none.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "sub_group_size": 1_000_000_000,
            # With True, zero.Init replaces torch's linear function in the whole process by one written in Python.
            "memory_efficient_linear": False,
            "stage3_gather_16bit_weights_on_model_save": False,
            "zero_hpz_partition_size": cfg.parallel.hpz,
            "zero_quantized_weights": cfg.parallel.quantized_weights,
        }
    return zero | _offload(cfg, pinned=streams)


def _offload(cfg: Config, *, pinned: bool) -> dict[str, Any]:
    """
    Args:
        pinned: whether host memory is page-locked. From pageable memory each copy to a GPU makes the host wait.
    """
    offload, found = cfg.parallel.offload, {}
    if offload.optimizer != "none":
        found["offload_optimizer"] = {"device": offload.optimizer, "pin_memory": pinned}
        if offload.optimizer == "nvme":
            found["offload_optimizer"]["nvme_path"] = offload.folder
    if offload.params != "none":
        found["offload_param"] = {"device": offload.params, "pin_memory": pinned}
    return found
