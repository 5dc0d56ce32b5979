"""Copies of batches to a GPU, seen on a stand-in for CUDA."""

import threading

import numpy as np
import torch

from stack.data.batches import Batch
from stack.parallel.loading import DeviceBatch, Loader
from tests.helpers.fake_cuda import fake_cuda

RANKS_DEVICE = torch.device("cuda", 3)


def _batch() -> Batch:
    rows = np.arange(8, dtype=np.int64).reshape(2, 1, 4)
    return Batch(input_ids=rows, labels=rows, positions=rows % 4, global_target_tokens=8)


def _on_a_thread(loader: Loader) -> DeviceBatch:
    loaded: list[DeviceBatch] = []
    thread = threading.Thread(target=lambda: loaded.append(loader.load(_batch())))
    thread.start()
    thread.join()
    return loaded[0]


def test_the_thread_that_copies_opens_no_context_on_gpu_0():
    with fake_cuda(RANKS_DEVICE.index) as cuda:
        _on_a_thread(Loader(RANKS_DEVICE, reads_ids=True, reads_bounds=True))
        assert cuda.contexts == {RANKS_DEVICE.index}


def test_copies_are_from_pinned_memory_on_a_stream_of_their_own_and_end_with_an_event():
    with fake_cuda(RANKS_DEVICE.index) as cuda:
        _on_a_thread(Loader(RANKS_DEVICE, reads_ids=True, reads_bounds=True))
        *copies, event = cuda.calls
        assert copies == [("copy", "cuda:3", "cuda:3/1", "pinned", True)] * 4
        assert event == ("record", "cuda:3/1")


def test_the_step_waits_for_the_copies_and_keeps_their_memory():
    with fake_cuda(RANKS_DEVICE.index) as cuda:
        batch = _on_a_thread(Loader(RANKS_DEVICE, reads_ids=True, reads_bounds=False))
        cuda.calls.clear()
        batch.arrive()
        assert cuda.calls == [("wait", "cuda:3/0"), *[("keep", (2, 4), "cuda:3/0")] * 3]
