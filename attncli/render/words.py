"""Numbers and names as a person reads them."""

from __future__ import annotations

import math


def clean(name: object) -> str:
    """`name` with control characters made visible: a checkpoint must not steer the terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(name))


def number(value: object) -> str:
    """Four significant digits; "0" only for zero."""
    if not isinstance(value, (int, float)):
        return "—" if value is None else str(value)
    if value == 0 or not math.isfinite(value):
        return str(int(value)) if value == 0 else str(value)
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}".replace(",", " ")
    return f"{value:.2e}"


def percent(fraction: object) -> str:
    """A share in percent that shows 0 % or 100 % only where it is exactly that."""
    if not isinstance(fraction, (int, float)):
        return "—"
    if fraction in (0, 1):
        return f"{int(fraction * 100)} %"
    shown = f"{100 * fraction:.2g}"
    if float(shown) >= 100:
        return ">99.9 %"
    return f"{shown} %" if fraction >= 1e-4 else "<0.01 %"


def size(size_bytes: int) -> str:
    """Decimal units, as disks and downloads count."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.3g} {unit}"
    return f"{size_bytes} bytes"


def count(amount: int) -> str:
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= scale:
            return f"{amount / scale:.3g} {unit}"
    return str(amount)
