"""Frozen encoders: H&E patches to tokens [B, C, 16, 16], computed once and cached.

`filterbank` needs no weights. Every other name is a Vision Transformer of timm, Virchow2 included.
"""

from __future__ import annotations

import importlib.util
import itertools
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
import zarr
from torch import Tensor, nn

from sparsity_trap.config import Encoder as EncoderSettings
from sparsity_trap.config import UserError
from sparsity_trap.files import building
from sparsity_trap.patches import PatchStore
from sparsity_trap.progress import track

TOKEN_GRID = 16

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
        maps = torch.cat(maps, dim=1)
        side = images.shape[1] // TOKEN_GRID
        quarters = F.avg_pool2d(maps, side // 2)
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
    (14² or 28² from patch 16 or 8) are resampled to 16².

    Attributes
    ----------
    channels : int
        Width of the transformer.
    """

    def __init__(self, name: str, pretrained: bool = True):
        super().__init__()
        timm = _import_timm()
        model_name, extra = name, {}
        if name == "virchow2":
            model_name = "hf-hub:paige-ai/Virchow2"
            extra = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}
        try:
            model = timm.create_model(
                model_name, pretrained=pretrained, num_classes=0, dynamic_img_size=True, **extra
            )
        except Exception as error:
            raise UserError(
                f"encoder '{name}' could not be loaded through timm "
                f"({type(error).__name__}: {str(error).splitlines()[0]}); for gated weights accept "
                "the licence on the model's Hugging Face page and set HF_TOKEN, or set "
                "encoder.name to 'filterbank', which needs no weights"
            ) from error
        if not hasattr(model, "num_prefix_tokens"):
            raise UserError(f"encoder '{name}' is not a Vision Transformer of timm")
        self.model = model.eval().requires_grad_(False)
        self.channels = model.num_features
        data = timm.data.resolve_model_data_config(model)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(data[key]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Encode uint8 images [B, 224, 224, 3] to tokens [B, C, 16, 16]."""
        x = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        tokens = self.model.forward_features(x)[:, self.model.num_prefix_tokens :]
        side = int(tokens.shape[1] ** 0.5)
        tokens = tokens.transpose(1, 2).unflatten(2, (side, side))
        if side != TOKEN_GRID:
            tokens = F.interpolate(
                tokens, size=(TOKEN_GRID, TOKEN_GRID), mode="bilinear", antialias=True
            )
        return tokens


def load_encoder(name: str) -> nn.Module:
    """Return a frozen encoder in evaluation mode.

    Parameters
    ----------
    name
        ``filterbank``, ``virchow2`` or any Vision Transformer known to timm.

    Returns
    -------
    Module with attribute ``channels`` that maps uint8 [B, 224, 224, 3] to float [B, C, 16, 16].

    Raises
    ------
    UserError
        The model is unknown, gated without access, or not a Vision Transformer.
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
    if spec is None or hasattr(torch.ops.torchvision, "nms"):
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
    store_path: Path, path: Path, settings: EncoderSettings, *, seed: int = 0, batch: int = 4
) -> None:
    """Encode every view of every patch of a section once.

    Parameters
    ----------
    store_path
        Patch store of the section.
    path
        Zarr group to write: ``tokens`` float16 [N, views, C, 16, 16]; attributes ``encoder``,
        ``channels``, ``views``. Written under a temporary name and renamed.
    settings
        Encoder name and views.
    seed
        Seed of the colour jitter.
    batch
        Patches encoded together.
    """
    store = PatchStore(store_path)
    encoder = load_encoder(settings.name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder.to(device)
    jitter = _colour_jitter(settings) if settings.jitter_views else None
    shape = (len(store), len(views(settings)), encoder.channels, TOKEN_GRID, TOKEN_GRID)
    starts = range(0, len(store), batch)
    with building(path) as partial, torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        group = zarr.open_group(partial, mode="w")
        tokens = group.create_array(
            "tokens", shape=shape, chunks=(1, *shape[1:]), dtype="float16", compressors=None
        )
        group.attrs.update(
            encoder=settings.name, channels=encoder.channels, views=views(settings), seed=seed
        )
        for start in track(starts, f"encoding {store.patient}", "batch"):
            images = torch.from_numpy(store.images[start : start + batch])
            encoded = []
            for j, turn in views(settings):
                if turn == 0:
                    coloured = images if j == 0 else jitter(images)
                view = dihedral(coloured, turn, (1, 2)).to(device)
                encoded.append(encoder(view).half().cpu())
            tokens[start : start + batch] = torch.stack(encoded, dim=1).numpy()


def _colour_jitter(settings: EncoderSettings):
    declare_torchvision_ops()
    from torchvision.transforms import ColorJitter

    transform = ColorJitter(*settings.jitter)

    def apply(images: Tensor) -> Tensor:
        each = [transform(image) for image in images.permute(0, 3, 1, 2)]
        return torch.stack(each).permute(0, 2, 3, 1)

    return apply
