"""Tables as text or as Markdown, and the line that says on what kind of machine they were made."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path


def table(header: list[str], rows: list[list[str]], *, left: int, markdown: bool = False) -> str:
    """Rows of texts under a header: the first `left` columns aligned to the left, numbers to the right."""
    if markdown:
        rule = ["---"] * left + ["---:"] * (len(header) - left)
        return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    align = [str.ljust] * left + [str.rjust] * (len(header) - left)
    return "\n".join("  ".join(side(cell, width) for side, cell, width in zip(align, line, widths)).rstrip()
                     for line in [header, *rows])


def machine() -> str:
    """Kind of processor, memory, versions, and the date; no names of hosts or users."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in cpus if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    kind = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    return f"{kind}; {versions}; {datetime.date.today().isoformat()}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
