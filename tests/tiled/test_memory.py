from __future__ import annotations

import pytest
import torch

from remote_vae.tiled.memory import free_memory, is_out_of_memory


def raising(*_: object) -> object:
    raise RuntimeError("the driver has gone away")


class Device:
    """A kind of device that there is here, with its cache."""

    def __init__(self) -> None:
        self.emptied = 0

    def is_available(self) -> bool:
        return True

    def empty_cache(self) -> None:
        self.emptied += 1


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_the_cache_of_whatever_device_there_is_is_emptied(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    device = Device()
    monkeypatch.setattr(torch, kind, device, raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: kind == "mps")
    free_memory()
    assert device.emptied == 1


def test_a_cache_that_cannot_be_emptied_does_not_end_the_next_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    failed, other = Device(), Device()
    monkeypatch.setattr(failed, "empty_cache", raising)
    monkeypatch.setattr(torch, "cuda", failed)
    monkeypatch.setattr(torch, "xpu", other, raising=False)
    free_memory()
    assert other.emptied == 1


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 9.00 GiB",
        "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
        "MPS backend out of memory (MPS allocated: 5 GB)",
        "Invalid buffer size: 19.38 GiB",
        "[MPSTemporaryNDArray initWithDevice:descriptor:] Error: total bytes of NDArray > 2**32",
        "MPSGraph does not support tensor dims larger than INT_MAX",
        "upsample_nearest2d only supports output tensors with less than INT_MAX elements, but got [8, 512, 1024, 1024]",
        "Current platform can NOT allocate memory block with size larger than 4GB! Tried to allocate 4.50 GiB",
        "Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)",
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "Could not allocate tensor with 268435456 bytes. There is not enough GPU video memory available!",
        "input tensor must fit into 32-bit index math",
        "Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true, but got false.",
        "could not create a primitive descriptor for a convolution forward propagation primitive",
        "could not execute a primitive",
        "could not create a memory object",
        "miopenStatusUnknownError",
        "MIOpen Error: No suitable algorithm was found to execute the required convolution",
        "HIP error: out of memory",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Unable to find a valid cuDNN algorithm to run convolution",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_what_a_device_says_of_too_much_is_known(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 16x8)"),
        RuntimeError("Expected all tensors to be on the same device, but found cuda:0 and cpu"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("out of memory"),
    ],
)
def test_another_error_is_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)
