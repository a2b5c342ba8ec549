"""Frozen encoders: H&E patches to tokens [B, C, 16, 16], computed once and cached.

`filterbank` needs no weights. The other names of `ENCODERS` are pathology models that timm loads
from Hugging Face without code of their own; ``timm:<name>`` is any other Vision Transformer of
timm. Patches reach all of them at 1.143 µm per pixel, whatever they were trained at.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity_trap.data.patches import PatchStore
from sparsity_trap.decoders import TOKEN_GRID
from sparsity_trap.files import building
from sparsity_trap.progress import track
from sparsity_trap.settings import Encoder as EncoderSettings
from sparsity_trap.settings import Preset, UserError

if TYPE_CHECKING:
    import pandas as pd
    from huggingface_hub.errors import HfHubHTTPError


#: A patch: pixels a side, and µm per pixel (256 µm over 224 pixels).
PATCH_PX = 224
PATCH_UM_PER_PX = 256 / PATCH_PX


@dataclass(frozen=True)
class EncoderCard:
    """What is known of an encoder. None means that no source was found, never a guess.

    Attributes
    ----------
    hub
        Repository of the weights on Hugging Face.
    architecture
        Name of the model in timm; with ``kwargs`` and ``swiglu`` it builds without weights.
    kwargs
        Arguments of ``timm.create_model``.
    swiglu
        The transformer's MLPs are SwiGLU with SiLU, given to timm as classes.
    licence
        Licence of the weights.
    gated
        Whether Hugging Face hands the weights only to accounts that accepted the licence.
    um_per_px
        µm per pixel that the authors trained at, or ask for.
    note
        What a user should know besides.
    """

    hub: str | None = None
    architecture: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    swiglu: bool = False
    licence: str | None = None
    gated: bool | None = None
    um_per_px: tuple[float, ...] | None = None
    note: str = ""

    @property
    def page(self) -> str | None:
        """Model card, where a licence is accepted."""
        return f"https://huggingface.co/{self.hub}" if self.hub else None


_BY_ND = "CC-BY-NC-ND 4.0"
_LUNIT: dict[str, Any] = {
    "licence": "Lunit, non-commercial",
    "gated": False,
    "note": "converted to timm by 1aurent",
}
_KAIKO: dict[str, Any] = {
    "licence": "kaiko.ai, non-commercial",
    "gated": False,
    "note": "converted to timm by 1aurent; trained at several magnifications",
}

#: Encoders by the name that a preset gives. Calls, licences and gating are those of the model
#: cards and of TRIDENT (github.com/mahmoodlab/TRIDENT), the resolutions those of cards and papers.
ENCODERS: dict[str, EncoderCard] = {
    "filterbank": EncoderCard(
        licence="MIT", gated=False, note="part of this project; no weights, nothing learned"
    ),
    "virchow2": EncoderCard(
        hub="paige-ai/Virchow2",
        architecture="vit_huge_patch14_224",
        kwargs={"init_values": 1e-5, "reg_tokens": 4, "mlp_ratio": 5.3375, "global_pool": ""},
        swiglu=True,
        licence=_BY_ND,
        gated=True,
        um_per_px=(0.25, 0.5, 1.0, 2.0),
        note="the published encoder",
    ),
    "virchow": EncoderCard(
        hub="paige-ai/Virchow",
        architecture="vit_huge_patch14_224",
        kwargs={"init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": ""},
        swiglu=True,
        licence="Apache 2.0",
        gated=True,
        um_per_px=(0.5,),
    ),
    "uni2-h": EncoderCard(
        hub="MahmoodLab/UNI2-h",
        architecture="vit_giant_patch14_224",
        kwargs={
            "img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "embed_dim": 1536,
            "init_values": 1e-5, "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "reg_tokens": 8,
        },
        swiglu=True,
        licence=_BY_ND,
        gated=True,
    ),
    "uni": EncoderCard(
        hub="MahmoodLab/UNI",
        architecture="vit_large_patch16_224",
        kwargs={"init_values": 1e-5},
        licence=_BY_ND,
        gated=True,
        um_per_px=(0.5,),
    ),
    "h-optimus-0": EncoderCard(
        hub="bioptimus/H-optimus-0",
        architecture="vit_giant_patch14_reg4_dinov2",
        kwargs={"img_size": 224, "init_values": 1e-5},
        licence="Apache 2.0",
        um_per_px=(0.5,),
        note="sources differ on whether it is gated",
    ),
    "h-optimus-1": EncoderCard(
        hub="bioptimus/H-optimus-1",
        architecture="vit_giant_patch14_reg4_dinov2",
        kwargs={"img_size": 224, "init_values": 1e-5},
        licence=_BY_ND,
        gated=True,
    ),
    "lunit-vits8": EncoderCard(
        "1aurent/vit_small_patch8_224.lunit_dino", "vit_small_patch8_224", **_LUNIT
    ),
    "lunit-vits16": EncoderCard(
        "1aurent/vit_small_patch16_224.lunit_dino", "vit_small_patch16_224", **_LUNIT
    ),
    "kaiko-vits8": EncoderCard(
        "1aurent/vit_small_patch8_224.kaiko_ai_towards_large_pathology_fms",
        "vit_small_patch8_224",
        **_KAIKO,
    ),
    "kaiko-vitb8": EncoderCard(
        "1aurent/vit_base_patch8_224.kaiko_ai_towards_large_pathology_fms",
        "vit_base_patch8_224",
        **_KAIKO,
    ),
    "kaiko-vitb16": EncoderCard(
        "1aurent/vit_base_patch16_224.kaiko_ai_towards_large_pathology_fms",
        "vit_base_patch16_224",
        **_KAIKO,
    ),
    "kaiko-vitl14": EncoderCard(
        "1aurent/vit_large_patch14_reg4_dinov2.kaiko_ai_towards_large_pathology_fms",
        "vit_large_patch14_reg4_dinov2",
        {"img_size": 518},
        **_KAIKO,
    ),
    "phikon": EncoderCard(
        "1aurent/vit_base_patch16_224.owkin_pancancer",
        "vit_base_patch16_224",
        licence="Owkin, non-commercial",
        gated=False,
        note="converted to timm by 1aurent; the original is owkin/phikon for transformers",
    ),
}  # fmt: skip

#: What to take without access to gated weights: a 16 × 16 grid of its own, as Virchow2.
UNGATED = "kaiko-vitl14"


class Unreachable(UserError):
    """Hugging Face gives no answer, so nothing is known of the access to weights."""


def encoder_card(name: str) -> EncoderCard:
    """Look an encoder up.

    Parameters
    ----------
    name
        Name in `ENCODERS`, or ``timm:`` and a Vision Transformer of timm, ``hf-hub:owner/model``
        included.

    Raises
    ------
    UserError
        There is none of that name.
    """
    if name in ENCODERS:
        return ENCODERS[name]
    if not name.startswith("timm:"):
        raise UserError(
            f"encoder.name '{name}' does not exist: choose one of {', '.join(ENCODERS)}, or "
            "timm:<name> for another Vision Transformer of timm"
        )
    model = name.removeprefix("timm:")
    hub = model.removeprefix("hf-hub:") if model.startswith("hf-hub:") else None
    return EncoderCard(hub=hub, architecture=model)


def encoder_table() -> pd.DataFrame:
    """Known encoders for the methods chapter.

    Shapes and parameters are those of the architecture as timm builds it here, without weights.

    Returns
    -------
    DataFrame with one row per encoder: ``encoder``, ``weights`` (repository on Hugging Face),
    ``licence``, ``gated``, ``um_per_px``, ``patch_px``, ``grid`` (tokens a side of a 224-pixel
    patch, before resampling to 16), ``prefix_tokens``, ``channels``, ``parameters`` (millions),
    ``page`` and ``note``. Text; "not stated" where no source was found, empty where nothing
    applies.
    """
    import pandas as pd

    rows = []
    for name, card in ENCODERS.items():
        row = {
            "encoder": name,
            "weights": card.hub or "",
            "licence": card.licence or "not stated",
            "gated": {True: "yes", False: "no", None: "not stated"}[card.gated],
            "um_per_px": ", ".join(f"{r:g}" for r in card.um_per_px or ()) or "not stated",
        }
        if card.architecture is None:
            row |= {
                "um_per_px": "", "patch_px": "", "grid": str(TOKEN_GRID), "prefix_tokens": "",
                "channels": str(FilterBank().channels), "parameters": "0",
            }  # fmt: skip
        else:
            with torch.device("meta"):
                model = TimmTokens(name, pretrained=False).model
            patch = model.patch_embed.patch_size[0]
            row |= {
                "patch_px": str(patch),
                "grid": str(PATCH_PX // patch),
                "prefix_tokens": str(model.num_prefix_tokens),
                "channels": str(model.num_features),
                "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}",
            }
        rows.append(row | {"page": card.page or "", "note": card.note})
    return pd.DataFrame(rows)


# Optical density of haematoxylin, eosin and a residual, one stain per row (Ruifrok & Johnston
# 2001, Anal Quant Cytol Histol 23:291-299); the residual is the cross product of the first two.
_HAEMATOXYLIN = (0.650, 0.704, 0.286)
_EOSIN = (0.072, 0.990, 0.105)


class FilterBank(nn.Module):
    """Fixed stain-separated multi-scale filters, pooled to the 16 × 16 token grid.

    Optical density is separated into haematoxylin, eosin and a residual. Each stain is filtered at
    s.d. of 1, 2 and 4 pixels (1.1 to 4.6 µm: chromatin, nuclei, cells) for edges (gradient
    magnitude) and for dark and pale blobs (the two signs of the Laplacian); the structure tensor
    gives the coherence of fibres. Responses are averaged over quarters of a token, 8 × 8 µm, which
    stay apart as channels; their mean over 3 × 3 and 7 × 7 tokens adds context, and the stains'
    standard deviation adds texture.

    Attributes
    ----------
    channels : int
        Token channels C.
    """

    scales = (1.0, 2.0, 4.0)

    def __init__(self) -> None:
        super().__init__()
        h, e = (F.normalize(torch.tensor(v), dim=0) for v in (_HAEMATOXYLIN, _EOSIN))
        stains = torch.stack([h, e, F.normalize(torch.linalg.cross(h, e), dim=0)])
        self.register_buffer("unmix", torch.linalg.inv(stains).T.contiguous())
        responses = 3 * (1 + 3 * len(self.scales)) + 1
        self.channels = responses * (4 + 2) + 3

    def forward(self, images: Tensor) -> Tensor:
        """Encode uint8 images [B, 224, 224, 3] to tokens [B, C, 16, 16]."""
        density = -torch.log((images.float() + 1) / 256).permute(0, 3, 1, 2)
        stains = torch.einsum("sc,bchw->bshw", self.unmix, density)
        maps = [stains]
        for scale in self.scales:
            smooth = _gaussian(stains, scale)
            dy, dx = _gradient(smooth)
            if scale == 2.0:
                maps.append(_coherence(dy.sum(1, keepdim=True), dx.sum(1, keepdim=True)))
            laplacian = scale**2 * (_gradient(dy)[0] + _gradient(dx)[1])
            edges = scale * torch.sqrt(dy.square() + dx.square())
            maps += [edges, F.relu(laplacian), F.relu(-laplacian)]
        side = images.shape[1] // TOKEN_GRID
        quarters = F.avg_pool2d(torch.cat(maps, dim=1), side // 2)
        token = F.avg_pool2d(quarters, 2)
        context = [
            F.avg_pool2d(token, k, stride=1, padding=k // 2, count_include_pad=False)
            for k in (3, 7)
        ]
        variance = F.avg_pool2d(stains.square(), side) - F.avg_pool2d(stains, side).square()
        texture = variance.clamp(min=0).sqrt()
        return torch.cat([F.pixel_unshuffle(quarters, 2), *context, texture], dim=1)


@lru_cache
def _blur_matrix(size: int, sigma: float, device: torch.device) -> Tensor:
    """Gaussian smoothing of a line of pixels as a [size, size] matrix, edges renormalised."""
    t = torch.arange(size, dtype=torch.float32, device=device)
    kernel = torch.exp(-0.5 * ((t[:, None] - t[None]) / sigma) ** 2)
    return kernel / kernel.sum(1, keepdim=True)


def _gaussian(x: Tensor, sigma: float) -> Tensor:
    # On a 224 px patch two dense products are several times faster than separable convolutions.
    blur = _blur_matrix(x.shape[-1], sigma, x.device)
    return blur @ x @ blur.T


def _gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    dy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    return dy, dx


def _coherence(dy: Tensor, dx: Tensor) -> Tensor:
    """Coherence of the structure tensor over 4 px: 0 isotropic, 1 parallel fibres."""
    yy, xx, xy = (_gaussian(p, 4.0) for p in (dy * dy, dx * dx, dy * dx))
    return torch.sqrt((yy - xx).square() + 4 * xy.square()) / (yy + xx + 1e-6)


class TimmTokens(nn.Module):
    """Patch tokens of a frozen timm Vision Transformer on the 16 × 16 grid.

    The number of prefix tokens (class and registers) is read from the model; other token grids
    (14² or 28² from patch 16 or 8) are resampled to 16². On a GPU the transformer runs in
    bfloat16 autocast, on a CPU in float32.

    Parameters
    ----------
    name
        As for `encoder_card`; not ``filterbank``.
    pretrained
        Load the weights; otherwise they are random.
    overrides
        Arguments of ``timm.create_model`` that replace the card's.

    Attributes
    ----------
    channels : int
        Width of the transformer.
    """

    mean: Tensor
    std: Tensor
    model: Any  # of timm

    def __init__(self, name: str, pretrained: bool = True, **overrides: Any):
        super().__init__()
        timm = _import_timm()
        model = _create(name, pretrained, overrides)
        self.model = model.eval().requires_grad_(False)
        self.channels = model.num_features
        data = timm.data.resolve_model_data_config(model)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(data[key]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Encode uint8 images [B, 224, 224, 3] to tokens float32 [B, C, 16, 16]."""
        x = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
            tokens = self.model.forward_features(x)
        tokens = tokens[:, self.model.num_prefix_tokens :].float()
        side = int(tokens.shape[1] ** 0.5)
        tokens = tokens.transpose(1, 2).unflatten(2, (side, side))
        if side != TOKEN_GRID:
            tokens = F.interpolate(
                tokens, size=(TOKEN_GRID, TOKEN_GRID), mode="bilinear", antialias=True
            )
        return tokens


def _create(name: str, pretrained: bool, overrides: Mapping[str, Any]) -> nn.Module:
    """Build a timm model; every failure becomes a `UserError` without the token in it."""
    timm = _import_timm()
    card = encoder_card(name)
    kwargs = {"num_classes": 0, "dynamic_img_size": True, **card.kwargs}
    if card.swiglu:
        kwargs |= {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}
    source = card.architecture
    if pretrained and card.hub:
        source = f"hf-hub:{card.hub}"
        if not weights_cached(name):
            check_access(name)  # answers at once, where a download tries again for half a minute
    try:
        model = timm.create_model(source, pretrained=pretrained, **{**kwargs, **overrides})
    except Exception as error:
        problem = _failure(name, card, error)
    else:
        if hasattr(model, "num_prefix_tokens"):
            return model
        problem = UserError(f"encoder '{name}' is not a Vision Transformer: choose another")
    # Raised outside the handler: the error of the request would else stay attached to it.
    raise problem


def check_access(name: str, timeout: float = 5.0) -> None:
    """Ask Hugging Face whether the weights of an encoder could be downloaded; download nothing.

    Parameters
    ----------
    name
        As for `encoder_card`, with weights on Hugging Face.
    timeout
        Seconds to wait for the answer.

    Raises
    ------
    Unreachable
        There is no connection, or ``HF_HUB_OFFLINE`` is set.
    UserError
        The weights are gated, the token is not accepted, or there is no such repository.
    """
    import huggingface_hub

    card = encoder_card(name)
    if card.hub is None:
        return
    problem = None
    try:
        url = huggingface_hub.hf_hub_url(card.hub, "config.json")
        huggingface_hub.get_hf_file_metadata(url, timeout=timeout)
    except huggingface_hub.errors.HfHubHTTPError as error:
        problem = _refusal(name, card, error)
    except Exception:  # each HTTP library has its own kinds of "no answer"
        problem = _no_connection(name)
    if problem is not None:
        raise problem


def weights_cached(name: str) -> bool:
    """Whether the weights of an encoder lie in the cache of Hugging Face, ready without a network."""
    from huggingface_hub import try_to_load_from_cache

    hub = encoder_card(name).hub
    files = ("model.safetensors", "pytorch_model.bin")
    return hub is not None and any(
        isinstance(try_to_load_from_cache(hub, file), str) for file in files
    )


# Messages below never quote the text of a request: it may hold the token.
def _refusal(name: str, card: EncoderCard, error: HfHubHTTPError) -> UserError:
    """Say why Hugging Face does not hand the weights over."""
    from huggingface_hub import errors, get_token

    instead = f"or set encoder.name to '{UNGATED}', which is not gated"
    if isinstance(error, errors.GatedRepoError):
        if not get_token():
            return UserError(
                f"encoder '{name}' is gated and no Hugging Face token is present: accept its "
                f"licence at {card.page} and set HF_TOKEN to a token of that account, {instead}"
            )
        return UserError(
            f"encoder '{name}' is gated and the account of the token in HF_TOKEN has no access: "
            f"accept the licence at {card.page} and wait for the approval, {instead}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"encoder '{name}': {card.page} does not exist or is private: correct encoder.name, "
            f"{instead}"
        )
    status = error.response.status_code
    found = f"encoder '{name}': Hugging Face answers {status} for {card.hub}"
    if status == 401:
        return UserError(f"{found}: put a valid token into HF_TOKEN, {instead}")
    if status == 403:
        return UserError(
            f"{found}: let the token in HF_TOKEN read public gated repositories, {instead}"
        )
    return Unreachable(f"{found}: try again later, {instead}")


def _no_connection(name: str) -> Unreachable:
    from huggingface_hub import constants

    return Unreachable(
        f"the weights of encoder '{name}' are not in {constants.HF_HUB_CACHE} and huggingface.co "
        "cannot be reached: connect once, copy that folder from a computer that has them, or set "
        "encoder.name to 'filterbank', which needs no weights"
    )


def _failure(name: str, card: EncoderCard, error: Exception) -> UserError:
    """Say why timm could not build or download a model."""
    from huggingface_hub import errors, get_token

    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(name, card, error)
    if isinstance(error, (errors.LocalEntryNotFoundError, ConnectionError)):
        return _no_connection(name)
    text = (str(error).splitlines() or [""])[0].replace(get_token() or "\0", "***")
    return UserError(
        f"encoder '{name}' could not be loaded through timm ({type(error).__name__}: {text}): "
        "name a Vision Transformer that timm.list_models() lists, or set encoder.name to "
        "'filterbank', which needs no weights"
    )


def load_encoder(name: str) -> nn.Module:
    """Return a frozen encoder in evaluation mode.

    Parameters
    ----------
    name
        A name in `ENCODERS`, or ``timm:<name>`` for another Vision Transformer of timm.

    Returns
    -------
    Module with attribute ``channels`` that maps uint8 [B, 224, 224, 3] to float32 [B, C, 16, 16].

    Raises
    ------
    UserError
        The encoder is unknown, gated without access, out of reach, or not a Vision Transformer.
    """
    encoder = FilterBank() if name == "filterbank" else TimmTokens(name)
    return encoder.eval().requires_grad_(False)


def _import_timm():
    """Import timm beside a CPU build of torch.

    torchvision's wheel links CUDA. Beside a CPU build its compiled operators do not load, and its
    import then fails on registering `nms`; declaring the operators' schemas first lets it pass.
    """
    declare_torchvision_ops()
    import timm

    return timm


def declare_torchvision_ops() -> None:
    """Declare torchvision's operators where its compiled ones cannot load; else do nothing."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    compiled = list(Path(spec.origin).parent.glob("_C*.so"))
    try:
        for library in compiled:
            torch.ops.load_library(str(library))
    except OSError:
        compiled = []
    if not compiled:
        torch.library.define("torchvision::nms", "(Tensor a, Tensor b, float c) -> Tensor")
        torch.library.define(
            "torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )


def views(settings: EncoderSettings) -> list[tuple[int, int]]:
    """Augmented views of a patch as (jitter, dihedral); (0, 0) is the patch itself.

    Jitter 0 leaves colours alone. The dihedral index counts quarter turns (0-3), plus 4 for a
    horizontal flip applied first; see `dihedral`.
    """
    turns = range(8 if settings.dihedral else 1)
    return list(itertools.product(range(settings.jitter_views + 1), turns))


def dihedral(x: Tensor, element: int, dims: tuple[int, int]) -> Tensor:
    """Apply one of the eight flips and quarter turns to two axes of ``x``.

    The published augmentation (horizontal flip, vertical flip and quarter turn, each with
    probability one half) draws every element with probability 1/8.
    """
    if element >= 4:
        x = x.flip(dims[1])
    return torch.rot90(x, element % 4, dims)


def cache_tokens(
    store_path: Path,
    path: Path,
    settings: EncoderSettings,
    *,
    seed: int = 0,
    batch: int | None = None,
) -> None:
    """Encode every view of every patch of a section once.

    Parameters
    ----------
    store_path
        Patch store of the section.
    path
        Folder to write: ``tokens.npy``, float16 [N, views, C, 16, 16], and ``about.json`` with
        ``encoder``, ``views`` and ``seed``. It appears when it is complete.
    settings
        Encoder name and views.
    seed
        Seed of the colour jitter, which does not depend on ``batch``.
    batch
        Images encoded together. Default: 4 on a CPU, what half of the free memory holds on a GPU.

    Raises
    ------
    UserError
        The encoder cannot be loaded, or a token does not fit float16 (65,504) or is undefined.
    """
    store = PatchStore(store_path)
    encoder = load_encoder(settings.name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder.to(device)
    jitter = _colour_jitter(settings) if settings.jitter_views else None
    each = views(settings)
    shape = (len(store), len(each), encoder.channels, TOKEN_GRID, TOKEN_GRID)
    with building(path) as partial, torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        batch = batch or _images_at_once(encoder, device)
        partial.mkdir()
        # A plain array: training reads single views of it, as they lie on the disk.
        tokens = np.lib.format.open_memmap(partial / "tokens.npy", "w+", np.float16, shape)
        about = {"encoder": settings.name, "views": each, "seed": seed}
        (partial / "about.json").write_text(json.dumps(about))
        step = max(1, batch // len(each))
        starts = range(0, len(store), step)

        def write(start: int, encoded: Tensor) -> None:
            if not torch.isfinite(encoded).all():
                raise UserError(
                    f"encoder '{settings.name}' gives tokens beyond the range of float16, or "
                    f"undefined ones, for {store_path}: take another encoder.name"
                )
            tokens[start : start + step] = encoded.unflatten(0, (-1, len(each))).cpu().numpy()

        # A GPU encodes one block while the block before it is written.
        waiting: tuple[int, Tensor] | None = None
        for start in track(starts, f"encoding {store.patient}", "batch"):
            patches = torch.from_numpy(store.images[start : start + step])
            images = torch.cat([_views_of(patch, each, jitter) for patch in patches])
            encoded = torch.cat([encoder(b.to(device)).half() for b in images.split(batch)])
            if waiting is not None:
                write(*waiting)
            waiting = start, encoded
        if waiting is not None:
            write(*waiting)
        tokens.flush()


def open_tokens(preset: Preset, patient: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Open the token cache of a patient.

    Returns
    -------
    Tokens float16 [N, views, C, 16, 16], on the disk until they are read, and the list of views.

    Raises
    ------
    UserError
        The cache is missing.
    """
    path = preset.tokens(patient)
    if not path.is_dir():
        raise UserError(f"{path} does not exist: run notebooks/01_data.py for patient {patient}")
    views = json.loads((path / "about.json").read_text())["views"]
    return np.load(path / "tokens.npy", mmap_mode="r"), [tuple(view) for view in views]


def _views_of(
    patch: Tensor, each: list[tuple[int, int]], jitter: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Augmented views uint8 [views, 224, 224, 3] of one patch [224, 224, 3]."""
    # One draw of colours per jittered copy, in the order of the copies, for all its turns.
    copies = sorted({j for j, _ in each})
    coloured = {j: jitter(patch[None]) if jitter and j else patch[None] for j in copies}
    return torch.cat([dihedral(coloured[j], turn, (1, 2)) for j, turn in each])


def _images_at_once(encoder: nn.Module, device: torch.device, trial: int = 8) -> int:
    """Images to encode together; on a GPU, from the memory that a few take."""
    if device.type != "cuda":
        return 4
    blank = torch.zeros(trial, PATCH_PX, PATCH_PX, 3, dtype=torch.uint8, device=device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    encoder(blank)
    taken = (torch.cuda.max_memory_allocated(device) - before) / trial
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    # Larger batches than 256 only take memory: the matrix units are busy long before.
    return int(min(max(free / 2 / taken, 1), 256))


def _colour_jitter(settings: EncoderSettings) -> Callable[[Tensor], Tensor]:
    declare_torchvision_ops()
    from torchvision.transforms import ColorJitter

    transform = ColorJitter(*settings.jitter)

    def apply(images: Tensor) -> Tensor:
        each = [transform(image) for image in images.permute(0, 3, 1, 2)]
        return torch.stack(each).permute(0, 2, 3, 1)

    return apply
