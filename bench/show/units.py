"""Numbers as text."""


def with_unit(value, unit):
    """Three significant digits with an SI prefix: with_unit(0.0121, "s") is "12.1 ms".

    A value that is not known (None) is a dash.
    """
    if not value:
        return "-" if value is None else f"0 {unit}"
    prefixes = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    # From 999.5 on three digits are printed as 1000, so the next prefix is taken.
    fitting = (prefix for prefix, size in prefixes.items() if value / size < 999.5)
    prefix = next(fitting, "T")
    return f"{value / prefixes[prefix]:.3g} {prefix}{unit}"


def milliseconds(value):
    """A time that is given in milliseconds, in the unit that suits it."""
    return with_unit(value / 1e3, "s")


def with_spread(figures):
    """The median, and half of the distance between the quartiles."""
    low, high = figures["quartiles"]
    median, half = figures["median"], (high - low) / 2
    # Without exponents: 2441 and not 2.44e+03, 74 and not 7e+01.
    median = f"{median:.3g}" if median < 999.5 else f"{median:.0f}"
    return f"{median} ± {half:.1g}" if half < 9.5 else f"{median} ± {half:.0f}"


def ratio(figures):
    return f"{figures['median']:.2f}x"


def shape_of(case):
    return "({}, {}, {})".format(*case["shape"])
