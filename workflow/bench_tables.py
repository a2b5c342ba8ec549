"""Benchmarks as Markdown, from the files in results/bench, or a sentence where one is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path


def ingest(bench: dict) -> str:
    """Seconds and memory of each reader, and what bounds them."""
    names = {
        "scanpy": "`scanpy.read_10x_h5` and subsetting",
        "matrix": "matrix",
        "8 um table": "all genes, summed to 8 µm",
        "inflate matrix": "*bound:* inflating the matrix alone",
        "inflate by zlib": "the same by zlib in one thread",
    }
    sizes = bench["sections"]
    lines = [
        "| seconds (peak MB) | "
        + " | ".join(f"{s['million_bins']:g} M bins" for s in sizes)
        + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for key, name in names.items():
        cells = [s["readers"].get(key) for s in sizes]
        text = [
            f"{c['seconds']:.2f} ({c['peak_mb']:.0f})" if c and "seconds" in c else "–"
            for c in cells
        ]
        lines.append(f"| {name} | " + " | ".join(text) + " |")
    pairs = [(s["readers"]["scanpy"], s["readers"]["matrix"]) for s in sizes]
    text = [f"{a['seconds'] / b['seconds']:.1f} ×" if "seconds" in a else "–" for a, b in pairs]
    lines.append("| matrix, faster than scanpy | " + " | ".join(text) + " |")
    lines += _ingest_notes(sizes[-1], bench["twice_other_nonzeros"])
    side = bench["image_pixels"]
    for key, name in (("patch images", "images"), ("patches", "whole patch store")):
        cell = bench["patches"][key]
        lines.append(
            f"\n{name.capitalize()} of {cell['patches']} patches from a BigTIFF of {side:,} × "
            f"{side:,} pixels, {bench['image_counts']:,} counts: {cell['seconds']:.0f} s, peak "
            f"{cell['peak_mb']:.0f} MB."
        )
    same = all(s["arrays_equal"] for s in sizes)
    lines.append(
        f"\nMeasured on {bench['hardware']}, commit {bench['commit']}. The readers returned "
        f"{'identical' if same else '**different**'} arrays. Note: {bench['note']}."
    )
    return "\n".join(lines) + "\n"


def _ingest_notes(largest: dict, twice: dict) -> list[str]:
    """What bounds the reading, and what memory depends on, of the largest section measured."""
    rows = largest["readers"]
    memory = rows["matrix"]["peak_mb"], twice["readers"]["matrix"]["peak_mb"]
    return [
        f"\nAt {largest['million_bins']:g} M bins, inflating the matrix takes "
        f"{rows['inflate matrix']['seconds']:.2f} s of {rows['matrix']['seconds']:.2f} s.",
        f"\nThe same bins and panel with {twice['nonzeros'] / 1e6:.0f} M instead of "
        f"{largest['nonzeros'] / 1e6:.0f} M non-zero entries: peak {memory[1]:.0f} instead of "
        f"{memory[0]:.0f} MB through the matrix. Memory grows with bins (by 8 to 12 bytes each) "
        "and entries of the panel (by 6 bytes each in the result, as many while it is put "
        "together), not with entries of other genes.",
    ]


def metrics(bench: dict) -> str:
    """Seconds and memory of scoring, against a loop over scipy and scikit-image."""
    names = {
        "scipy and scikit-image": "loop over scipy and scikit-image",
        "pcc and ssim": "PCC and SSIM",
        "GeneScores": "every score of a run in one pass",
        "GeneScores, reading": "the same, of patches read from disk meanwhile",
    }
    lines = ["| | seconds | peak MB | times faster |", "|---|---|---|---|"]
    for key, row in bench["scorers"].items():
        faster = f"{row['times_faster']:.1f} ×" if "times_faster" in row else "–"
        name = names.get(key, key)
        lines.append(f"| {name} | {row['seconds']:.1f} | {row['peak_mb']:.0f} | {faster} |")
    worst = max(
        (
            d
            for row in bench["scorers"].values()
            for d in row.get("largest_difference", {}).values()
        ),
        default=float("nan"),
    )
    lines.append(
        f"\n{bench['patches']} patches of {bench['genes']} genes on {bench['hardware']}, "
        f"{bench['threads']} threads, commit {bench['commit']}; largest difference of any score "
        f"{worst:.0e}. Note: {bench['note']}."
    )
    return "\n".join(lines) + "\n"


def training(bench: dict) -> str:
    """A training step against its floor and the published way, and how both grow."""
    lines = [
        "| precision | s per epoch | ms per batch | decoder and loss alone, ms | floor, ms | "
        "over floor | bound by |",
        "|---|---|---|---|---|---|---|",
    ]
    for precision, run in bench["run"].items():
        floor = max(run["floor_compute_milliseconds"], run["floor_memory_milliseconds"])
        lines.append(
            f"| {precision} | {run['seconds_per_epoch']:.2f} | "
            f"{run['milliseconds_per_batch']:.1f} | "
            f"{run['milliseconds_of_decoder_and_loss']:.1f} | {floor:.1f} | "
            f"{run['measured_over_floor']:.1f} × | {run['bound_by']} |"
        )
    if found := bench.get("before_and_after"):
        lines += [
            "\n| arm, one thread | ms per step by plain operations | now | ratio | floor, ms "
            "| s per run by plain operations | now | ratio |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for arm, row in found.items():
            step, whole = row["step_milliseconds"], row["run_seconds"]
            lines.append(
                f"| {arm} | {step['before']:.0f} | {step['after']:.0f} | {row['step_ratio']:.2f} "
                f"| {row['floor_milliseconds']:.0f} | {whole['before']:.0f} "
                f"| {whole['after']:.0f} | {row['run_ratio']:.2f} |"
            )
    run, way = next(iter(bench["run"].values())), bench["published_way"]
    lines.append(
        f"\nArm {bench['arm']} at the size of preset `{bench['preset']}`: {run['patches']} "
        f"training patches, batch {run['batch_size']}, {run['parameters']:,} parameters, "
        f"{run['gflop_per_batch']:.1f} GFLOP and {run['gb_per_batch']:.2f} GB per batch. The "
        "published way (open PNGs, encode the image in every step, loop on the host) takes "
        f"{way['times_slower_per_epoch']:.1f} times as long per epoch."
    )
    kinds = run["shares_of_decoder_and_loss"].items()
    lines.append(
        "\nOf the decoder's and the loss's time, "
        + ", ".join(f"{kind} take {share:.0%}" for kind, share in kinds)
        + ". Only large matrix products reach the rate that the floor assumes; the tensors here "
        "are small, and their element-wise passes do little arithmetic per byte."
    )
    if bench["encoder"]:
        encoder = bench["encoder"]
        lines.append(
            f"\nEncoding with the Virchow2 architecture: {encoder['patches_per_second']:.0f} "
            f"patches per second, {encoder['share_of_matmul_rate']:.0%} of "
            "the measured matrix rate."
        )
    lines += ["\n| patches | genes | views | ms per patch | peak GB |", "|---|---|---|---|---|"]
    for row in bench["growth"]:
        cells = row.get("failed") or (f"{row['milliseconds_per_patch']:.0f} | {row['peak_gb']:.2f}")
        lines.append(f"| {row['patches']} | {row['genes']} | {row['views']} | {cells} |")
    lines.append(
        f"\nMeasured on {bench['hardware']}, {bench['threads']} thread(s), commit "
        f"{bench['commit']}. Note: {bench['note']}."
    )
    return "\n".join(lines) + "\n"


def stability(bench: dict) -> str:
    """Verdict of every claim on each set of runs, by preset."""
    lines = []
    for preset, found in bench.items():
        sets = list(next(iter(found["claims"].values()))["sets"])
        flips = _named(found["claims"][key] for key in found["flips"])
        weaker = _named(c for c in found["claims"].values() if not _held(c["sets"], sets[0]))
        machines = found["hardware"] + (f"; GPU: {found['gpu']}" if "gpu" in found else "")
        about = f"**Preset `{preset}`**, {machines}, commit {found['commit']}."
        lines += [
            f"{about} From *supported* to *not supported* or back: {flips}. Supported by "
            f"the book's runs and not by those of every other set: {weaker}. Of "
            f"{found['compared']} values of other sets, {found['covered']} lie within the book's "
            "interval, widened by √2 for a second draw.\n",
            "| claim | " + " | ".join(sets) + " |",
            "|---" * (len(sets) + 1) + "|",
        ]
        for claim in found["claims"].values():
            cells = [_verdict(claim["sets"].get(name)) for name in sets]
            lines.append(f"| {claim['text']} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _named(claims: Iterable[dict]) -> str:
    """Texts of claims in a sentence."""
    return "; ".join(f"*{claim['text'].rstrip('.')}*" for claim in claims) or "none"


def _held(sets: dict, first: str) -> bool:
    """Whether a claim that the first set supports is supported by all that it was judged on."""
    verdicts = {found["verdict"] for found in sets.values()}
    return sets[first]["verdict"] != "supported" or verdicts == {"supported"}


def _verdict(found: dict | None) -> str:
    """Verdict, and the value where there is one."""
    if found is None:
        return "not judged"
    value = "" if found["value"] is None else f" ({found['value']:+.3f})".replace("-", "−")
    return found["verdict"] + value


def score(bench: dict) -> str:
    """Seconds and memory of scoring a table of a whole section, against a plain loop."""
    names = {
        "score": "model, nulls, ceilings and protocols, as `make score` takes them",
        "loop": "loop over `scipy.stats`, PCC and Spearman of the model alone",
    }
    lines = ["| | seconds | of CPU | peak MB |", "|---|---|---|---|"]
    for key, name in names.items():
        row = bench["scorers"][key]
        lines.append(
            f"| {name} | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} | {row['peak_mb']:.0f} |"
        )
    lines.append(
        f"\n{bench['bins'] / 1e6:g} million bins of 2 µm, {bench['genes']} genes, on "
        f"{bench['hardware']}, {bench['threads']} threads, commit {bench['commit']}; largest "
        f"difference of a PCC {bench['largest_difference']:.0e}."
    )
    return "\n".join(lines) + "\n"


#: Benchmark -> its table and the make target that measures it.
TABLES = {
    "score": (score, "bench"),
    "ingest": (ingest, "bench"),
    "metrics": (metrics, "bench"),
    "training": (training, "bench-train"),
    "training_gpu": (training, "bench-train"),
    "stability": (stability, "stability"),
}


def table(name: str, folder: Path) -> str:
    """Table of one benchmark, or a sentence where it has not been measured."""
    tabulate, target = TABLES[name]
    path = folder / f"{name}.json"
    if not path.is_file():
        return f"Not measured yet: `make {target}` does it.\n"
    return tabulate(json.loads(path.read_text()))
