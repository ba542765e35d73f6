"""What there is to say about a corpus, in figures: for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from elastic_lm.terminal import visible

if TYPE_CHECKING:
    from elastic_lm.data.manifest import Manifest
    from elastic_lm.data.summary import Figures, Summary
    from elastic_lm.storage import Storage

MOST_SOURCES = 20  # that have a row of their own


def facts(storage: Storage, manifest: Manifest, summary: Summary | None) -> dict[str, Any]:
    """What there is to say about a corpus, for programs."""
    told = {
        "corpus": storage.url, "manifest": manifest.hash, "vocab_size": manifest.vocab_size, "dtype": manifest.dtype,
        "tokenizer": manifest.tokenizer_hash, "tokens": manifest.num_tokens, "blocks": len(manifest.blocks),
        "block_tokens": manifest.block_tokens, "held_out_tokens": manifest.held_out_part().num_tokens,
        **manifest.counts,
    }  # fmt: skip
    if summary is None:
        return told
    rows = [{"source": address, "weight": weight, **asdict(figures)} for address, weight, figures in summary.sources]
    return {**told, **asdict(summary.total), "bytes_per_token": summary.total.bytes_per_token, "sources": rows}


def describe(storage: Storage, manifest: Manifest, summary: Summary | None, seconds: float | None = None) -> str:
    """The same for people. `seconds`: how long it took to prepare."""
    counts, held_out = manifest.counts, manifest.held_out_part().num_tokens
    rows = [
        ("corpus", visible(storage.url)),
        ("manifest", manifest.hash),
        ("documents", f"{counts.get('documents', 0):,} to train on"),
        ("tokens", f"{manifest.num_tokens:,} in {_blocks(manifest)}, as {manifest.dtype}"),
        ("vocabulary", f"{manifest.vocab_size:,}, tokenizer {manifest.tokenizer_hash[:12]}"),
    ]
    if summary is not None and summary.total.bytes_per_token is not None:
        rows.append(("bytes/token", f"{summary.total.bytes_per_token:.2f}"))
    num_held_out = counts.get("held_out_documents", 0)
    read = summary.total.read_documents if summary else counts.get("documents", 0) + num_held_out
    rows.append(
        (
            "held out",
            f"{num_held_out:,} documents ({_share(num_held_out, read)}), {held_out:,} tokens "
            f"({_share(held_out, held_out + manifest.num_tokens)})",
        )
    )
    for name, words in (("empty", "left out"), ("replaced", "with bytes that are no UTF-8, replaced")):
        if number := counts.get(f"{name}_documents", 0):
            rows.append((name, f"{number:,} documents {words}"))
    if seconds is not None:
        from elastic_lm.monitor.progress import clock

        rows.append(("time", clock(seconds)))
    lines = [f"{name:>11}  {value}" for name, value in rows]
    if summary is not None and len(summary.sources) > 1:
        lines += ["", *_sources(summary)]
    return "\n".join(lines)


def _blocks(manifest: Manifest) -> str:
    num_blocks = len(manifest.blocks)
    return f"{num_blocks:,} block{'s' if num_blocks != 1 else ''} of {manifest.block_tokens:,}"


def _sources(summary: Summary) -> Iterator[str]:
    """A table of the sources, the largest numbers aligned."""
    total = summary.total.tokens
    rows = [("weight", "documents", "tokens", "share", "source")]
    for address, weight, figures in summary.sources[:MOST_SOURCES]:
        rows.append((f"{weight:g}", *_amounts(figures, total), visible(address)))
    if more := [figures for _, _, figures in summary.sources[MOST_SOURCES:]]:
        rows.append(("", *_amounts(sum(more[1:], more[0]), total), f"{len(more):,} more"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        yield "  ".join(f"{cell:>{width}}" for cell, width in zip(row, [*widths, 0], strict=True))


def _amounts(figures: Figures, total: int) -> tuple[str, str, str]:
    return f"{figures.documents:,}", f"{figures.tokens:,}", _share(figures.tokens, total)


def _share(part: int, whole: int) -> str:
    return f"{part / whole if whole else 0:.1%}"
