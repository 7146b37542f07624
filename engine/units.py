"""Bytes and times as a person reads them."""

from __future__ import annotations


def format_bytes(count: int) -> str:
    """Return a size as a person reads it, such as "6.9 GB" or "12 kB"."""
    units = ("B", "kB", "MB", "GB")
    power = 0
    # By the rounded size: 999 600 B is "1 MB", not "1000 kB".
    while power + 1 < len(units) and float(f"{count / 1000**power:.3g}") >= 1000:
        power += 1
    size = count / 1000**power
    return f"{size:.3g} {units[power]}" if size < 1000 else f"{size:.0f} {units[power]}"


def format_memory(count: int) -> str:
    """Return an amount of memory as drivers and options count it, such as "9.8 GiB" or "12 MiB"."""
    mebibytes = count / 2**20
    return f"{mebibytes:.3g} MiB" if mebibytes < 999.5 else f"{mebibytes / 2**10:.3g} GiB"


def format_duration(seconds: float) -> str:
    """Return a time as a person reads it, such as "12.3 s", "4 min 5 s" or "2 h 3 min"."""
    if seconds < 99.95:
        return f"{seconds:.3g} s"
    minutes = round(seconds) // 60
    if minutes < 100:
        return f"{minutes} min {round(seconds) % 60} s"
    return f"{minutes // 60} h {minutes % 60} min"
