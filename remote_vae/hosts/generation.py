"""One generation of a host: what the user wants of it, what has happened in it, and what was encoded already."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Optional, TypeVar
from urllib.parse import urlsplit

import torch

from remote_vae.call import Answer, VaeCall
from remote_vae.history import Record
from remote_vae.settings import Settings
from remote_vae.vae.fingerprint import excerpt
from remote_vae.wire import EncodeAnswer

FOLLOW = "follow settings"
MODES = (FOLLOW, "off", "auto", "remote")
# What the accordion, the API and the X/Y/Z plot leave on a host's processing object; the plot's cell wins.
REQUEST = "remote_vae_request"
CELL = "remote_vae_cell"
# What is written into infotexts.
INFOTEXT = "Remote VAE"
MODE_TEXT = f"{INFOTEXT} mode"
TRANSFER_TEXT = f"{INFOTEXT} transfer"
# What the user has pressed is no news for him.
_OWN_DOING = ("interrupted", "skipped")
# At the end of a record's detail.
_ON_DEVICE = re.compile(r"on (the CPU|[a-z]+(:\d+)?)$")
_AGO = re.compile(r",? \d+ s ago")
# Letters of a reason there.
_REASON = 60

# Moments are an eighth of their picture in both directions: these are a few megabytes.
_KEPT_ENCODINGS = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What the user wants of one generation.

    Attributes:
        mode: one of ``MODES``. "off": the UI's own VAE. "auto": remote as the settings say, were they switched on.
            "remote": every VAE call, also where the settings keep decodes, encodes or another VAE on this machine. Whatever
            fails remotely is done on this machine in all of them.
        transfer: a transfer of the settings, or "follow settings".
    """

    mode: str = FOLLOW
    transfer: str = FOLLOW

    @property
    def enabled(self) -> bool | None:
        """Whether VAE calls are taken over; None: as the settings say."""
        return None if self.mode == FOLLOW else self.mode != "off"

    def adjusted(self, settings: Settings) -> Settings:
        """The settings of this generation."""
        if self.transfer != FOLLOW:
            settings = replace(settings, transfer=self.transfer)
        if self.enabled is not None:
            settings = replace(settings, enabled=self.enabled)
        if self.mode == "remote":
            settings = replace(settings, decode=True, encode=True, when_vae_differs="remote")
        return settings


@dataclass
class Generation:
    """From the beginning to the end of a host's ``process_images_inner``.

    Attributes:
        p: the host's processing object; see ``params``.
        outer: the generation that this one is a part of (a face detailer's).
        stops: whether no further picture of it is to be begun.
        hurried: whether the user has pressed something in one of its VAE calls.
        names_endpoint: whether the endpoint's name goes into the infotext.
        entered: whether a VAE call of it has come by.
    """

    p: Any
    outer: Optional[Generation] = None
    stops: bool = False
    hurried: bool = False
    names_endpoint: bool = False
    entered: bool = False
    _records: list[tuple[int, Record]] = field(default_factory=list)
    _answers: OrderedDict[object, EncodeAnswer] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        # The cells of a plot share their infotext with the cell before; a pass within a generation shares it with that.
        if self.outer is None or self.outer.params is not self.params:
            for key in (INFOTEXT, MODE_TEXT, TRANSFER_TEXT):
                self.params.pop(key, None)
            if self._asked.mode == "off":
                # There will be no record.
                self.params[MODE_TEXT] = "off"

    @property
    def params(self) -> dict[str, Any]:
        """What becomes the infotext; of a processing object of somebody else's that has none, nothing does."""
        params = getattr(self.p, "extra_generation_params", None)
        return params if isinstance(params, dict) else {}

    @property
    def request(self) -> Request:
        """What was asked for by a cell of a plot, else by the accordion or the API, else around this generation."""
        cell = getattr(self.p, CELL, None)
        asked = self._asked if isinstance(getattr(self.p, REQUEST, None), Request) or self.outer is None else self.outer.request
        return replace(asked, **cell) if cell else asked

    @property
    def _asked(self) -> Request:
        """What the accordion or the API asked for this very generation."""
        asked = getattr(self.p, REQUEST, None)
        return asked if isinstance(asked, Request) else Request()

    # --- infotext ------------------------------------------------------------------------------------------------------

    def record(self, record: Record) -> None:
        """Write what has happened into the infotext of the pictures to come."""
        self._records.append((self._iteration, record))
        # What was asked for is said of a picture that was made so, and brought back when its infotext is pasted.
        was_remote = any(each.route == "remote" for each in self._of_this_picture())
        asked = self._asked if was_remote else Request()
        texts = [(MODE_TEXT, asked.mode), (TRANSFER_TEXT, asked.transfer), (INFOTEXT, self.summary())]
        # A pass within this generation, which was asked for nothing, leaves what was asked of that around it.
        for key, value in texts if self._asked != Request() else texts[2:]:
            if value and value != FOLLOW:
                self.params[key] = value
            else:
                self.params.pop(key, None)

        problem = fallback(record)
        if problem and callable(getattr(self.p, "comment", None)):
            # A line under the picture, in the UIs that have such.
            self.p.comment(f"Remote VAE: {problem}")

    def summary(self) -> str:
        """Such as "decode remote (u8), encode local (503)"; empty where nothing was to be remote."""
        return in_words(self._of_this_picture(), names_endpoint=self.names_endpoint)

    def _of_this_picture(self) -> list[Record]:
        # A source picture is encoded once for all iterations; what decoded an earlier one says nothing of this one.
        return [record for iteration, record in self._records if record.op == "encode" or iteration == self._iteration]

    @property
    def _iteration(self) -> int:
        return int(getattr(self.p, "iteration", 0) or 0)

    # --- encodings -----------------------------------------------------------------------------------------------------

    def encode_once(self, call: VaeCall[T], run: Callable[[VaeCall[T]], T]) -> T:
        """Answer an encode by ``run``, or by what an equal picture gave before. A batch of one picture is one picture."""
        batch = call.tensor.shape[0]
        picture = call.tensor[:1]
        if any(not torch.equal(picture[0], other) for other in call.tensor[1:]):
            return run(call)
        vae = call.vae.module
        weights = None if vae is None else excerpt(vae)
        key = (call.vae.family.key, _digest(picture), id(vae), weights)
        known = self._answers.get(key)
        if known is not None:
            return call.adopt(_repeated(known, batch))

        def keep(answer: EncodeAnswer) -> EncodeAnswer:
            self._answers[key] = answer
            while len(self._answers) > _KEPT_ENCODINGS:
                self._answers.popitem(last=False)
            return _repeated(answer, batch)

        def adopt(answer: Answer) -> T:
            return call.adopt(keep(answer) if isinstance(answer, EncodeAnswer) else answer)

        return run(replace(call, tensor=picture, adopt=adopt))


def in_words(records: Sequence[Record], *, names_endpoint: bool) -> str:
    """What ``records`` say of a picture: "decode remote (u8), encode local (503)".

    Empty where nothing was to be remote and nothing was made elsewhere than the host itself would have made it.
    """
    if all(record.route != "remote" and not record.fallback_reason and not _device(record) for record in records):
        return ""
    parts = []
    for op in ("decode", "encode"):
        ways = list(dict.fromkeys(_way(record, names_endpoint=names_endpoint) for record in records if record.op == op))
        if ways:
            parts.append(f"{op} {' and '.join(ways)}")
    return ", ".join(parts)


def _way(record: Record, *, names_endpoint: bool) -> str:
    host = urlsplit(record.endpoint).hostname or ""
    if record.route == "remote":
        return f"remote {host} ({record.detail})" if names_endpoint else f"remote ({record.detail})"
    name = record.route if record.route == "failed" else " ".join(filter(None, ("local", _device(record))))
    reason = _shortly(record.fallback_reason)
    if host and not names_endpoint:
        reason = reason.replace(host, "the endpoint")
    return f"{name} ({reason})" if reason else name


def _device(record: Record) -> str:
    """Which device made it, where that is not the host's: "on cuda:1"."""
    found = _ON_DEVICE.search(record.detail) if record.route in ("local", "tiled") else None
    return found[0] if found else ""


def fallback(record: Record) -> str:
    """What the user has to know of a call that was to be remote and was not; "" where he knows, or nothing was wrong."""
    if record.route in ("remote", "failed") or not record.endpoint or record.fallback_reason.startswith(_OWN_DOING):
        return ""
    made = "made" if record.op == "decode" else "encoded"
    # In a pause the cause is the same as before, and no news.
    cause = _AGO.sub("", _shortly(record.fallback_reason))
    return f"the endpoint did not do it ({cause}): the picture was {made} on this machine"


def _shortly(reason: str) -> str:
    """Without the details, such as the seconds of a pause, which would make another text for every call."""
    reason = " ".join(reason.partition(";")[0].split())
    if reason.startswith("bad answer:"):
        return "bad answer"
    return reason if len(reason) <= _REASON else f"{reason[:_REASON].rpartition(' ')[0] or reason[:_REASON]} ..."


def _repeated(answer: EncodeAnswer, batch: int) -> EncodeAnswer:
    latents = answer.latents
    return answer if batch == 1 else EncodeAnswer(latents.repeat(batch, *[1] * (latents.ndim - 1)), answer.is_posterior)


def _digest(picture: torch.Tensor) -> bytes:
    values = picture.detach().to("cpu").contiguous()
    digest = hashlib.blake2b(f"{values.dtype} {list(values.shape)}".encode())
    digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.digest()
