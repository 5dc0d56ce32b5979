"""DeepSpeed's config on a device with streams, which is a GPU, and without."""

import pytest

from stack.config.deepspeed import ds_config
from tests.helpers.tiny import tiny_config


@pytest.mark.parametrize("on_gpu", [False, True])
def test_host_memory_is_page_locked_where_a_gpu_copies_to_it(on_gpu):
    cfg = tiny_config(parallel__offload__optimizer="cpu", parallel__offload__params="cpu")
    zero = ds_config(cfg, replicas=2, rank_params=1000, streams=on_gpu)["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": on_gpu}
    assert zero["overlap_comm"] == on_gpu
