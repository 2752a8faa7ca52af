"""Figures as the log writes them."""


def short(n: int) -> str:
    """Three digits: 6.66M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)


def percent(share: float, digits: int) -> str:
    """A share of 1 with so many digits behind the point: 7.39 %."""
    return f"{100 * share:.{digits}f} %"
