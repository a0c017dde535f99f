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
        shown = f"{value:.4g}"
        return shown if "e" not in shown else f"{value:,.0f}".replace(",", " ")
    return f"{value:.2e}"


def percent(fraction: object) -> str:
    """A share in percent that shows 0 % or 100 % only where it is exactly that."""
    if not isinstance(fraction, (int, float)):
        return "—"
    if fraction in (0, 1):
        return f"{int(fraction * 100)} %"
    if fraction < 1e-4:
        return "<0.01 %"
    if fraction > 1 - 1e-4:
        return ">99.99 %"
    # Two digits of what is left to 0 or to 100.
    return f"{100 * fraction:.2g} %" if fraction < 0.985 else f"{100 * fraction:.4g} %"


def size(size_bytes: int) -> str:
    """Decimal units, as disks and downloads count."""
    return (
        _scaled(size_bytes, ("kB", "MB", "GB", "TB")) or f"{size_bytes} byte{'' if size_bytes == 1 else 's'}"
    )


def count(amount: int) -> str:
    return _scaled(amount, ("k", "M", "B", "T")) or str(amount)


def _scaled(amount: int, units: tuple[str, ...]) -> str:
    """Three digits and the unit in which they are no more than three; "" below a thousand."""
    scaled = float(amount)
    if scaled < 1000:
        return ""
    for unit in units:
        scaled /= 1000
        if "e" not in f"{scaled:.3g}":
            return f"{scaled:.3g} {unit}"
    return f"{scaled:.0f} {units[-1]}"
