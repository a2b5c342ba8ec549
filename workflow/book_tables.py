"""Tables that the book's chapters include, written as Markdown from the preset and the module."""

from __future__ import annotations

import json
import platform
import re
from importlib import metadata
from pathlib import Path

import nbformat
import pandas as pd
import scaling
import torch

from sparsity_trap.bins import TOKEN_GRID
from sparsity_trap.data.patches import PATCH_PIXELS
from sparsity_trap.decoders import DECODERS, build_decoder
from sparsity_trap.encoders import ENCODERS, EncoderCard, FilterBank, TimmTokens
from sparsity_trap.evaluation.protocols import PROTOCOLS
from sparsity_trap.presets import load_preset, other_worlds
from sparsity_trap.settings import PUBLISHED_ARMS, ROOT, Preset

SECTIONS = (3, 100, 10_000)


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table; cells are text already."""
    lines = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def protocols() -> str:
    """How the same maps are scored as others have scored theirs."""
    rows = [
        {
            "protocol": protocol.title,
            "what it is": protocol.definition,
            "source": f"{{cite:t}}`{protocol.source}`" if protocol.source else "",
        }
        for protocol in PROTOCOLS.values()
    ]
    return markdown(pd.DataFrame(rows))


def arms(preset: Preset) -> str:
    """Every arm that the preset trains, and where."""
    runs = preset.all_runs()
    rows = []
    for name in sorted({r.arm for r in runs}, key=lambda a: (a not in PUBLISHED_ARMS, a)):
        arm = preset.arm(name)
        tested = dict.fromkeys(r.test_patient for r in runs if r.arm == name)
        seeds = {r.seed for r in runs if r.arm == name}
        bias = "gene means" if arm.bias == "gene-mean" else f"{arm.bias:g}".replace("-", "−")
        widths = ", ".join(f"{width}" for width in arm.resolutions_um)
        if arm.bicubic_from_um:
            widths += f", bicubic from {arm.bicubic_from_um}"
        rows.append(
            {
                "arm": name + (" (published)" if name in PUBLISHED_ARMS else ""),
                "decoder": arm.decoder,
                "loss": arm.loss,
                "genes weighed by": "" if arm.gene_weight == "none" else arm.gene_weight,
                "link, bias": f"{arm.link}, {bias}",
                "bins, µm": widths,
                "bins averaged": "tissue" if arm.masked else "all",
                "counts kept": f"{arm.keep:g}",
                "tested on (seeds)": f"{' '.join(tested)} ({len(seeds)})",
            }
        )
    table = pd.DataFrame(rows)
    alike = table.columns[table.nunique() == 1].drop(["arm", "decoder", "loss"], errors="ignore")
    said = "; ".join(f"{name} {table[name].iloc[0] or 'nothing'}" for name in alike)
    note = f"\nThe same in all arms: {said}.\n" if said else ""
    return markdown(table.drop(columns=alike)) + note


def decoders(preset: Preset, channels: int, genes: int) -> str:
    """Parts of every decoder with their parameters, at the size of this build."""
    rows = []
    for name in DECODERS:
        # On the meta device a decoder of any size costs no memory or time.
        with torch.device("meta"):
            decoder = build_decoder(name, channels, genes, **preset.decoder.model_dump())
        sizes = {
            part: sum(p.numel() for p in m.parameters()) for part, m in decoder.named_children()
        }
        sizes |= {part: p.numel() for part, p in decoder.named_parameters(recurse=False)}
        sizes = {part: size for part, size in sizes.items() if size} | {
            "total": sum(sizes.values())
        }
        rows += [(name, part, f"{size:,}") for part, size in sizes.items()]
    table = pd.DataFrame(rows, columns=["decoder", "part", "parameters"])
    table["decoder"] = table["decoder"].mask(table["decoder"].duplicated(), "")
    return markdown(table)


def encoders() -> str:
    """Names that ``encoder.name`` takes, with what is known of their weights."""
    return markdown(pd.DataFrame([_encoder(name, card) for name, card in ENCODERS.items()]))


def _encoder(name: str, card: EncoderCard) -> dict[str, str]:
    """Row of an encoder; its shapes are those that timm builds here, without weights."""
    shape, trained_at = f"{TOKEN_GRID}² × {FilterBank().channels}", ""
    if card.architecture:
        trained_at = ", ".join(f"{r:g}" for r in card.um_per_px or ()) or "not stated"
        with torch.device("meta"):
            # Drawing weights takes time even where there are none.
            model = TimmTokens(name, pretrained=False, weight_init="skip").model
        patch = model.patch_embed.patch_size[0]
        weights = sum(p.numel() for p in model.parameters())
        grid, prefix = PATCH_PIXELS // patch, model.num_prefix_tokens
        shape = f"({grid}² + {prefix}) × {model.num_features}; {patch} px; {weights / 1e6:.0f} M"
    gated = {True: ", gated", False: "", None: ", gating not stated"}[card.gated]
    return {
        "encoder": name,
        "weights": f"[{card.hub}]({card.page})" if card.hub else "",
        "licence": (card.licence or "not stated") + gated,
        "trained at, µm per pixel": trained_at,
        "tokens; patch; parameters": shape,
        "note": card.note,
    }


def packages() -> str:
    """Installed version of every package that ``requirements.in`` names, by what it is for."""
    use, rows = "", [{"for": "", "package": "Python", "version": platform.python_version()}]
    for line in (ROOT / "requirements.in").read_text().splitlines():
        if line.startswith("# "):
            use = line.removeprefix("# ").lower()
        elif name := re.match(r"[\w.-]+", line):
            rows.append({"for": use, "package": name[0], "version": metadata.version(name[0])})
    table = pd.DataFrame(rows)
    table["for"] = table["for"].mask(table["for"].duplicated(), "")
    return markdown(table)


def times(preset: Preset, notebooks: list[Path]) -> str:
    """Wall time of executed notebooks that have a page, and of every run, other worlds' too."""
    rows = []
    for path in notebooks:
        seconds = nbformat.read(path, as_version=4).metadata["papermill"]["duration"]
        rows.append({"": "notebook", "step": path.stem, "s": f"{seconds:,.1f}"})
    for name, world in {"": preset, **other_worlds(preset)}.items():
        for run in world.all_runs():
            record = json.loads((world.run_dir(run) / "provenance.json").read_text())
            what = f"run in world {name}" if name else "run"
            rows.append({"": what, "step": run.name, "s": f"{record['seconds']:,.1f}"})
    table = pd.DataFrame(rows)
    table[""] = table[""].mask(table[""].duplicated(), "")
    return markdown(table)


def scale() -> str:
    """Cost of cohorts of several sizes at the settings of preset ``paper``."""
    costs = scaling.cost_table(load_preset("paper"), 50, SECTIONS)
    names = {
        "raw": "raw files",
        "stores": "patch stores, before compression",
        "tokens": "tokens, all views",
        "training": "at hand in training",
        "folds": "folds per arm",
        "encoding": "GPU hours, encoding",
        "one_arm": "GPU hours, one arm, all folds",
    }
    rows = []
    for key, name in names.items():
        values = costs[key]
        if key == "folds":
            cells = [f"{v:d}" for v in values.astype(int)]
        elif key in ("encoding", "one_arm"):
            cells = [f"{v:,.2g}" if v < 10 else f"{v:,.0f}" for v in values]
        else:
            cells = [f"{v:,.0f} GB" if v < 1000 else f"{v / 1000:,.1f} TB" for v in values]
        rows.append([name, *cells])
    columns = ["", *(f"{n:,} sections" for n in SECTIONS)]
    return markdown(pd.DataFrame(rows, columns=columns))
