"""Frozen encoders: H&E patches to tokens [B, C, 16, 16], computed once and cached.

`filterbank` needs no weights. The other names of `ENCODERS` are pathology models that timm loads
from Hugging Face without code of their own; ``timm:<name>`` is any other Vision Transformer of
timm. Patches reach all of them at 1.143 µm per pixel, whatever they were trained at.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity_trap.bins import TOKEN_GRID
from sparsity_trap.data.patches import PATCH_PIXELS, PatchStore
from sparsity_trap.files import building
from sparsity_trap.filterbank import FilterBank
from sparsity_trap.presets import read_yaml
from sparsity_trap.progress import track
from sparsity_trap.settings import Encoder as EncoderSettings
from sparsity_trap.settings import Preset, UserError

#: µm per pixel of a patch (256 µm over 224 pixels).
PATCH_UM_PER_PX = 256 / PATCH_PIXELS


@dataclass(frozen=True)
class EncoderCard:
    """What is known of an encoder; ``encoders.yaml`` explains the fields and holds the values.

    None means that no source was found, never a guess.
    """

    hub: str | None = None
    architecture: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    swiglu: bool = False
    licence: str | None = None
    gated: bool | None = None
    um_per_px: Sequence[float] | None = None
    note: str = ""

    @property
    def page(self) -> str | None:
        """Model card, where a licence is accepted."""
        return f"https://huggingface.co/{self.hub}" if self.hub else None


#: Encoders by the name that a preset gives.
ENCODERS: dict[str, EncoderCard] = {
    name: EncoderCard(**card)
    for name, card in read_yaml(Path(__file__).with_name("encoders.yaml")).items()
}

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
        check_access(name)  # answers at once, where a download tries again for half a minute
    try:
        model = timm.create_model(source, pretrained=pretrained, **{**kwargs, **overrides})
        problem = None
    except Exception as error:
        problem = _problem(name, error)
    if problem is None and not hasattr(model, "num_prefix_tokens"):
        problem = UserError(f"encoder '{name}' is not a Vision Transformer: choose another")
    if problem is not None:
        # Outside the handler: the error of the request, which may hold the token, would else stay
        # attached to it.
        raise problem
    return model


def check_access(name: str, online: bool = True) -> bool:
    """Whether the weights of an encoder are on this computer, ready without a network.

    Parameters
    ----------
    name
        As for `encoder_card`.
    online
        Where they are not, ask Hugging Face if they could be downloaded, which takes at most some
        seconds. Nothing is downloaded.

    Raises
    ------
    Unreachable
        Hugging Face gives no answer, or ``HF_HUB_OFFLINE`` is set.
    UserError
        It refuses: the weights are gated, the token is not accepted, or there are none.
    """
    import huggingface_hub

    hub = encoder_card(name).hub
    if hub is None:
        return False
    for file in ("model.safetensors", "pytorch_model.bin"):
        if isinstance(huggingface_hub.try_to_load_from_cache(hub, file), str):
            return True
    problem = None
    if online:
        try:
            url = huggingface_hub.hf_hub_url(hub, "config.json")
            huggingface_hub.get_hf_file_metadata(url, timeout=5)
        except huggingface_hub.errors.HfHubHTTPError as error:
            problem = _problem(name, error)
        except Exception:  # each HTTP library has its own kinds of "no answer"
            problem = _problem(name, ConnectionError())
    if problem is not None:
        raise problem
    return False


def _problem(name: str, error: Exception) -> UserError:
    """Say why an encoder cannot be had, in the words of Hugging Face or timm, without the token."""
    from huggingface_hub import constants, errors, get_token

    card = encoder_card(name)
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    said = said.splitlines()[0].replace(get_token() or "\0", "***").rstrip(". ")
    answer = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if answer in (401, 403, 404):
        return UserError(
            f"Hugging Face refuses the weights of encoder '{name}' ({answer}, {said}): accept the "
            f"licence at {card.page} and set HF_TOKEN to a token of that account, or set "
            f"encoder.name to '{UNGATED}', which is not gated"
        )
    if answer or isinstance(error, (errors.LocalEntryNotFoundError, ConnectionError)):
        return Unreachable(
            f"the weights of encoder '{name}' are not in {constants.HF_HUB_CACHE} and Hugging Face "
            f"does not serve them ({answer or 'no answer'}): connect once or try later, copy that "
            "folder from a computer that has them, or set encoder.name to 'filterbank'"
        )
    return UserError(
        f"encoder '{name}' could not be loaded through timm ({type(error).__name__}: {said}): "
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
        about = {"encoder": settings.name, "views": each, "seed": seed}
        (partial / "about.json").write_text(json.dumps(about))
        # Tokens that turn with the image are computed once for all its turns.
        seen = each if not hasattr(encoder, "turned") else [(j, t) for j, t in each if t == 0]
        step = max(1, batch // len(seen))
        # Written in order, not through memory: a full disk would end the process there.
        with (partial / "tokens.npy").open("wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)

            def write(encoded: Tensor) -> None:
                if not torch.isfinite(encoded).all():
                    raise UserError(
                        f"encoder '{settings.name}' gives tokens beyond the range of float16, or "
                        f"undefined ones, for {store_path}: take another encoder.name"
                    )
                file.write(encoded.cpu().numpy().tobytes())

            # A GPU encodes one block while the block before it is written.
            waiting: Tensor | None = None
            for start in track(range(0, len(store), step), f"encoding {store.patient}", "batch"):
                patches = torch.from_numpy(store.images[start : start + step])
                images = torch.cat([_views_of(patch, seen, jitter) for patch in patches])
                encoded = torch.cat([encoder(b.to(device)) for b in images.split(batch)])
                if seen != each:
                    encoded = _turned(encoder, encoded.unflatten(0, (-1, len(seen))), each)
                encoded = encoded.half()
                if waiting is not None:
                    write(waiting)
                waiting = encoded
            if waiting is not None:
                write(waiting)


def open_tokens(preset: Preset, patient: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Open the token cache of a patient.

    Returns
    -------
    Tokens float16 [N, views, C, 16, 16], on the disk until they are read, and the list of views.

    Raises
    ------
    UserError
        The cache is missing, or holds another encoder's tokens or other views.
    """
    path, asked = preset.tokens(patient), views(preset.encoder)
    if not path.is_dir():
        raise UserError(f"{path} does not exist: run notebooks/01_data.py for patient {patient}")
    about = json.loads((path / "about.json").read_text())
    if (about["encoder"], [tuple(view) for view in about["views"]]) != (preset.encoder.name, asked):
        raise UserError(
            f"{path} holds tokens of encoder '{about['encoder']}' in {len(about['views'])} views, "
            f"the preset asks for '{preset.encoder.name}' in {len(asked)}: run "
            "notebooks/01_data.py again"
        )
    return np.load(path / "tokens.npy", mmap_mode="r"), asked


def _views_of(
    patch: Tensor, each: list[tuple[int, int]], jitter: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Augmented views uint8 [views, 224, 224, 3] of one patch [224, 224, 3]."""
    # One draw of colours per jittered copy, in the order of the copies, for all its turns.
    copies = sorted({j for j, _ in each})
    coloured = {j: jitter(patch[None]) if jitter and j else patch[None] for j in copies}
    return torch.cat([dihedral(coloured[j], turn, (1, 2)) for j, turn in each])


def _turned(encoder: Any, tokens: Tensor, each: list[tuple[int, int]]) -> Tensor:
    """Tokens of every view [B · views, C, 16, 16] from those of upright copies [B, copies, ...]."""
    turns = [partial(dihedral, element=turn, dims=(-2, -1)) for _, turn in each]
    views = [encoder.turned(tokens[:, j], turn) for (j, _), turn in zip(each, turns, strict=True)]
    return torch.stack(views, dim=1).flatten(0, 1)


def _images_at_once(encoder: nn.Module, device: torch.device, trial: int = 8) -> int:
    """Images to encode together; on a GPU, from the memory that a few take."""
    if device.type != "cuda":
        return 4
    blank = torch.zeros(trial, PATCH_PIXELS, PATCH_PIXELS, 3, dtype=torch.uint8, device=device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    encoder(blank)
    taken = (torch.cuda.max_memory_allocated(device) - before) / trial
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    # Larger batches than 256 only take memory: the matrix units are busy long before.
    return int(min(max(free / 2 / max(taken, 1), 1), 256))


def _colour_jitter(settings: EncoderSettings) -> Callable[[Tensor], Tensor]:
    declare_torchvision_ops()
    from torchvision.transforms import ColorJitter

    transform = ColorJitter(*settings.jitter)

    def apply(images: Tensor) -> Tensor:
        each = [transform(image) for image in images.permute(0, 3, 1, 2)]
        return torch.stack(each).permute(0, 2, 3, 1)

    return apply
