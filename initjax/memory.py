"""Budgets of memory: what a user writes, what is free by default, and how a number of bytes reads."""

import os
import re

from initjax.errors import InputError

_UNITS = {"": 1, "b": 1} | {f"{c}{i}b": k**n for i, k in (("", 1000), ("i", 1024)) for n, c in enumerate("kmgt", 1)}


def budget(memory) -> int:
    """`memory` in bytes: a number, a text such as "2GiB", or None for half of what the host has free.

    Raises
    ------
    InputError : no positive number of bytes.
    """
    if memory is None:
        return _free() // 2
    found = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", memory) if isinstance(memory, str) else None
    try:
        size = float(found[1]) * _UNITS[found[2].lower()] if found else float(memory)
    except (ValueError, TypeError, KeyError):
        size = 0.0
    if isinstance(memory, bool) or not 1 <= size < 2**62:
        raise InputError(
            f"memory = {memory!r}",
            'a number of bytes, a text such as "500MB" or "2GiB", or None for half of what is free',
            "it bounds how much a computation holds at once",
            "leave it at None, or give a budget with its unit",
        )
    return int(size)


def _free() -> int:
    try:
        with open("/proc/meminfo") as file:  # counts what caches would give back
            found = re.search(r"MemAvailable:\s+(\d+) kB", file.read())
        if found:
            return 1024 * int(found[1])
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30  # not a POSIX system


def readable(size: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    raise AssertionError


__all__ = ["budget", "readable"]
