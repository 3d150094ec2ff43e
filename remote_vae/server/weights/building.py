"""A VAE of diffusers out of weights: with the config that came with them, or the one that they show."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from remote_vae.errors import UnsupportedLayout
from remote_vae.server.weights.architecture import architecture
from remote_vae.server.weights.names import in_diffusers_names
from remote_vae.server.weights.reading import Weights
from remote_vae.vae.families import Family, load_families
from remote_vae.vae.shapes import Shape, shape_of

log = logging.getLogger("remote_vae")

_FACTORS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
# A BatchNorm counts its training steps; nothing is computed with the number, and some files leave it out.
_COUNTERS = "num_batches_tracked"
# Classes whose weights have the same names and shapes, and which compute something else.
_TWINS = {"AutoencoderKLHunyuanVideo15": ("AutoencoderKLHunyuanImageRefiner",)}
# Models whose weights stand beside their VAE's in a checkpoint: a family, and a part of the name of one of those weights.
_BESIDE = (
    ("sdxl", "conditioner.embedders."),
    ("sdxl", ".double_layers."),
    ("sd1", "cond_stage_model."),
    ("sd3", ".joint_blocks."),
    ("flux", ".double_blocks."),
    ("flux", ".double_stream_blocks."),
    ("flux", ".cap_embedder."),
)
# Models whose VAE has the same weights and another factor than that of the family, which a file does not say.
_SCALED_OTHERWISE = {"cogvideox": "CogVideoX 5B: 0.7"}
# Playground 2.5 looks like SDXL, and its VAE has factors of its own.
_OF_ITS_OWN = "edm_mean"


def build(weights: Weights, config: Mapping[str, Any] | None, family: Family | None) -> Any:
    """The VAE of diffusers with these weights.

    Args:
        weights: in any of the names that ``in_diffusers_names`` knows.
        config: diffusers' config that lay beside the weights. Another VAE's is passed over.
        family: named by the user. Without ``config`` the family is else recognised, where names and shapes tell it.

    Raises:
        UnsupportedLayout: these are the weights of no VAE that is known here or of another one than named, or the family has
            to be named.
    """
    state = in_diffusers_names(weights.state)
    if config is None:
        return _filled(infer_config(replace(weights, state=state), family), state)
    try:
        return _filled(config, state)
    except UnsupportedLayout as error:
        log.info("the config.json beside %s is not its own: %s", weights.name, error)
        try:
            return _filled(infer_config(replace(weights, state=state), family), state)
        except UnsupportedLayout as inferred:
            # Unless the user named a family, what is wrong with the config says more.
            raise inferred if family else error from None


def infer_config(weights: Weights, family: Family | None) -> dict[str, Any]:
    """The config of a VAE whose weights are in diffusers' names: architecture from the weights, factors from families.toml.

    Raises:
        UnsupportedLayout: as ``build``.
    """
    config = architecture(weights.state)
    kinds = (config["_class_name"], *_TWINS.get(config["_class_name"], ()))
    fitting = {
        kind: [entry for entry in load_families().values() if kind in entry.classes and entry.shape == _shape(kind, config)]
        for kind in kinds
    }
    chosen = _chosen([entry for entries in fitting.values() for entry in entries], config, weights, family)
    if chosen.key in _SCALED_OTHERWISE:
        log.warning(
            "%s does not say which model it is of: latents are scaled by %s where a client leaves that to the server (%s); "
            "with the model's config.json beside it, by its own",
            *(weights.name, chosen.scaling_factor, _SCALED_OTHERWISE[chosen.key]),
        )
    kind = next(kind for kind in kinds if chosen in fitting[kind])
    taken = _arguments(kind)
    factors = {name: getattr(chosen, name) for name in _FACTORS if name in taken and getattr(chosen, name)}
    return {**config, **factors, "_class_name": kind}


def _shape(kind: str, config: Mapping[str, Any]) -> Shape | None:
    return shape_of(kind, {**_arguments(kind), **config})


def _chosen(fitting: list[Family], config: Mapping[str, Any], weights: Weights, named: Family | None) -> Family:
    """Of the families whose VAE has this class and shape the named one, or the only one that it can be."""
    kind = config["_class_name"]
    if named is not None:
        if named in fitting:
            return named
        raise UnsupportedLayout(other_than(kind, _shape(kind, config), named))
    if not fitting:
        raise UnsupportedLayout(
            f"it is {described(kind, _shape(kind, config))}, which no family has ({', '.join(load_families())}): "
            "put its config.json beside it"
        )
    told = fitting if len(fitting) == 1 else _told(fitting, weights)
    if len(told) == 1:
        return told[0]
    keys = [family.key for family in fitting]
    raise UnsupportedLayout(
        f"a single file does not say which family it is, {' or '.join(keys)}; add --family, for example --family {keys[0]}"
    )


def _told(fitting: list[Family], weights: Weights) -> list[Family]:
    """Those of ``fitting`` that the weights of a model beside the VAE, or else the usual name of the file, speak for."""
    if _OF_ITS_OWN in weights.around:
        return []
    beside = {key for key, part in _BESIDE if any(part in name for name in weights.around)}
    if beside:
        return [family for family in fitting if family.key in beside]
    return [family for family in fitting if family.is_standard_file(weights.name)]


def other_than(kind: str, shape: Shape | None, named: Family) -> str:
    """Says that a VAE of this class and shape is not the one of the family that the user named."""
    theirs = described(" or ".join(named.classes), named.shape)
    return f"it is {described(kind, shape)}, and the VAE of {named.label} is {theirs}"


def described(kind: str, shape: Shape | None) -> str:
    """A VAE in words: its class, and how its latents are shaped."""
    if shape is None:
        return f"an {kind} of an unknown shape"
    return f"an {kind} with {shape.latent_channels} latent channels at {shape.downscale}x"


def _arguments(kind: str) -> dict[str, Any]:
    """What the class is made with, and its defaults."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters.values()
    return {entry.name: None if entry.default is entry.empty else entry.default for entry in parameters if entry.name != "self"}


def _filled(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> Any:
    """A VAE with this config and these weights, every one of them in its place."""
    import diffusers

    kind = config["_class_name"]
    try:
        vae = getattr(diffusers, kind).from_config(config)
    except (TypeError, ValueError, KeyError, IndexError, ZeroDivisionError, RuntimeError, AssertionError) as error:
        raise UnsupportedLayout(f"its config makes no {kind}: {error}") from None
    wanted = vae.state_dict()
    named = {key: _shaped(value, wanted.get(key)) for key, value in state.items()}
    named |= {key: value for key, value in wanted.items() if key.endswith(_COUNTERS) and key not in named}
    missing, unknown = sorted(wanted.keys() - named), sorted(named.keys() - wanted)
    if missing or unknown:
        raise UnsupportedLayout(f"not a {kind} as its config says: lacks {missing[:3]}, unknown {unknown[:3]}")
    try:
        vae.load_state_dict(named)
    except RuntimeError as error:
        line = next(iter(str(error).splitlines()[1:2]), str(error)).strip()
        raise UnsupportedLayout(f"not the {kind} of its config: {line}") from None
    return vae


def _shaped(value: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
    """Attention is stored as linear layers and as convolutions of one cell, ``[C, C, 1, 1]``."""
    if wanted is None or value.shape == wanted.shape or value.squeeze().shape != wanted.squeeze().shape:
        return value
    return value.reshape(wanted.shape)
