"""``remote_decode`` and ``remote_encode``: diffusers' two functions, with the same arguments and results.

What is better than there: non-contiguous latents are sent right, a batch comes back whole, waiting is bounded, and an answer
that is not one is an error instead of a broken picture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional, TypeVar, Union

import torch
from PIL import Image

from remote_vae.errors import InvalidRequest
from remote_vae.remote.client import DEFAULT_DEADLINES, client_for
from remote_vae.remote.waiting import USUAL_PIXELS, Deadlines
from remote_vae.wire import DecodeAnswer, DecodeRequest, EncodeRequest, Output, Scaling
from remote_vae.wire.latents import VIDEOS

Item = TypeVar("Item")
Result = TypeVar("Result")

# How many pictures of a batch are asked for at once where the protocol wants one request each.
PARALLEL = 8


def remote_decode(
    endpoint: str,
    tensor: torch.Tensor,
    processor: Any = None,
    do_scaling: bool = True,
    scaling_factor: Optional[float] = None,
    shift_factor: Optional[float] = None,
    output_type: str = "pil",
    return_type: str = "pil",
    image_format: str = "jpg",
    partial_postprocess: bool = False,
    input_tensor_type: str = "binary",
    output_tensor_type: str = "binary",
    height: Optional[int] = None,
    width: Optional[int] = None,
) -> Any:
    """Decode latents at a remote endpoint; arguments and results are those of ``diffusers.utils.remote_utils.remote_decode``.

    Args:
        endpoint: URL of the decode endpoint.
        tensor: latents ``[B, C, h, w]``, packed ``[B, S, 4 C]`` (with ``height`` and ``width``) or Flux.2's
            ``[B, 128, h / 2, w / 2]``, or video ``[B, C, F, h, w]``.
        processor: diffusers' VaeImageProcessor or VideoProcessor; with output_type "pil" any value asks for tensors.
        do_scaling: deprecated; False or None switches scaling off.
        scaling_factor, shift_factor: the endpoint computes tensor / scaling_factor + shift_factor. None: ``tensor`` is raw.
        output_type: what the endpoint sends: "pil" (one picture file), "pt" (a tensor), "mp4".
        return_type: what this function returns: "pil", "pt" or "mp4".
        image_format: "jpg" or "png", with output_type "pil".
        partial_postprocess: with output_type "pt": uint8 ``[B, H, W, 3]`` instead of float ``[B, 3, H, W]`` in [-1, 1].
        input_tensor_type, output_tensor_type: deprecated; always "binary".
        height, width: pixels, for packed latents.

    Returns:
        A PIL image, a list of them for a batch or a video, a tensor on the CPU, or the bytes of an mp4 file. What has an alpha
        channel keeps it.

    Raises:
        InvalidRequest: a ValueError; the arguments contradict each other. Nothing was sent.
        RouteFailed: a RuntimeError; the endpoint did not answer, refused, or answered with something else.
    """
    _warn_base64(input_tensor_type=input_tensor_type, output_tensor_type=output_tensor_type)
    if do_scaling and scaling_factor is None:
        warnings.warn(
            "`do_scaling` is deprecated, pass `scaling_factor` and `shift_factor` if required.", FutureWarning, stacklevel=2
        )
    output = _output(output_type, image_format, partial_postprocess, processor)
    _check_return(output, return_type, processor)
    if tensor.ndim == VIDEOS:
        _check_video(tensor, output, return_type, processor)
    scaling = Scaling()
    if do_scaling:
        scaling = Scaling(scaling_factor, shift_factor, by_model=scaling_factor is None)
    client = client_for(endpoint)

    def decode(latents: torch.Tensor) -> DecodeAnswer:
        request = DecodeRequest(latents, output, scaling, height=height, width=width)
        return client.decode(request, _deadlines(_most_pixels(request))).answer

    # What has one picture only need not be looked through twice.
    if output.is_image and len(tensor) > 1 and DecodeRequest(tensor, height=height, width=width).batch > 1:
        # The protocol's picture answer holds one picture.
        answers = in_parallel(decode, one_by_one(tensor))
        return [_picture(answer) for answer in answers]
    return _result(decode(tensor), return_type, processor, is_video=tensor.ndim == 5)


def remote_encode(
    endpoint: str,
    image: Union[torch.Tensor, Image.Image],
    scaling_factor: Optional[float] = None,
    shift_factor: Optional[float] = None,
    *,
    seed: Optional[int] = None,
) -> torch.Tensor:
    """Encode a picture at a remote endpoint; as ``diffusers.utils.remote_utils.remote_encode``.

    Args:
        endpoint: URL of the encode endpoint.
        image: a PIL image of any mode (sent as RGB), or a tensor ``[B, 3, H, W]``, of videos ``[B, 3, F, H, W]``, in [-1, 1],
            with 4 channels for a VAE of pictures with alpha.
        scaling_factor, shift_factor: the endpoint computes (z - shift_factor) * scaling_factor. None: raw latents come back.
        seed: of the sample of the posterior that our own server answers, the same for the same seed whatever the batch: picture
            ``i`` has ``seed + i``. None: its mode. Other servers answer as they always do.

    Returns:
        Latents ``[B, C, h, w]``, of videos ``[B, C, F, h, w]``, on the CPU, in the endpoint's dtype.

    Raises:
        InvalidRequest: a ValueError; nothing was sent.
        RouteFailed: a RuntimeError; the endpoint did not answer, refused, or answered with something else.
    """
    request = EncodeRequest(image, Scaling(scaling_factor, shift_factor), sample=seed)
    batch, rows, columns = request.size
    return client_for(endpoint).encode(request, _deadlines(batch * request.frames * rows * columns)).answer.latents


def _most_pixels(request: DecodeRequest) -> int:
    """What latents make of most VAEs: 8 pixels a cell along each side, and 4 frames of one."""
    rows, columns = request.latents.shape[-2:]
    frames = request.latent_frames * 4 if request.is_video else 1
    pixels = (request.height or 0) * (request.width or 0) if request.is_packed else rows * columns * 64
    return request.batch * frames * pixels


def _deadlines(pixels: int) -> Deadlines:
    """Those of a picture, as often as the call has its pixels: a video's may take minutes."""
    return DEFAULT_DEADLINES.times(pixels / USUAL_PIXELS)


def in_parallel(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """``function`` of every item, several at once, results in order; the first error is raised after all have ended."""
    with ThreadPoolExecutor(min(PARALLEL, len(items)), thread_name_prefix="remote-vae") as executor:
        return list(executor.map(function, items))


def one_by_one(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A batch as batches of one."""
    return [tensor[index : index + 1] for index in range(tensor.shape[0])]


def _output(output_type: str, image_format: str, partial_postprocess: bool, processor: Any) -> Output:
    if output_type == "pt":
        return Output.UINT8 if partial_postprocess else Output.TENSOR
    if output_type == "mp4":
        return Output.MP4
    if output_type != "pil":
        raise InvalidRequest(f"output_type must be pil, pt or mp4, not {output_type!r}")
    if processor is not None:
        return Output.UNIT
    if image_format not in ("jpg", "png"):
        raise InvalidRequest(f"image_format must be jpg or png, not {image_format!r}")
    return Output.PNG if image_format == "png" else Output.JPG


def _check_return(output: Output, return_type: str, processor: Any) -> None:
    if return_type not in ("pil", "pt", "mp4"):
        raise InvalidRequest(f"return_type must be pil, pt or mp4, not {return_type!r}")
    if (output is Output.MP4) != (return_type == "mp4"):
        raise InvalidRequest("output_type and return_type must both be mp4, or neither")
    if output.is_image and return_type == "pt":
        raise InvalidRequest("return_type pt needs output_type pt, or a processor")
    if output is Output.TENSOR and return_type == "pil" and not hasattr(processor, "postprocess"):
        raise InvalidRequest("`processor` is required to make pictures of a tensor; or ask for return_type pt")


def _check_video(latents: torch.Tensor, output: Output, return_type: str, processor: Any) -> None:
    """Raises InvalidRequest: a video, and what makes pictures of tensors knows pictures only."""
    makes_pictures = output is Output.TENSOR and return_type == "pil"
    if makes_pictures and latents.shape[2] > 1 and not hasattr(processor, "postprocess_video"):
        raise InvalidRequest("a video needs diffusers' VideoProcessor as `processor`, or return_type pt")


def _result(answer: DecodeAnswer, return_type: str, processor: Any, *, is_video: bool) -> Any:
    if answer.output is Output.MP4:
        return answer.payload
    if answer.output.is_image:
        return _picture(answer)
    tensor = answer.tensor
    if return_type == "pt":
        return tensor
    if answer.output is Output.UINT8:
        return _one_or_all([Image.fromarray(levels) for levels in tensor.numpy()])
    if answer.output is Output.UNIT:
        levels = (tensor.permute(0, 2, 3, 1).float().numpy() * 255).round().astype("uint8")
        return [Image.fromarray(picture) for picture in levels]
    if is_video and hasattr(processor, "postprocess_video"):
        return _one_or_all(processor.postprocess_video(tensor, output_type="pil"))
    if is_video:
        tensor = tensor[:, :, 0]
    return _one_or_all(processor.postprocess(tensor, output_type="pil"))


def _picture(answer: DecodeAnswer) -> Image.Image:
    if not isinstance(answer.payload, Image.Image):
        raise TypeError("not a picture answer")
    return answer.payload


def _one_or_all(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items


def _warn_base64(**arguments: str) -> None:
    for name, value in arguments.items():
        if value == "base64":
            warnings.warn(f"{name}='base64' is deprecated. Using `binary`.", FutureWarning, stacklevel=3)
        elif value != "binary":
            raise InvalidRequest(f"{name} must be binary, not {value!r}")
