"""Numbers and results in words: what the tables, captions and the opening paragraph of the report say."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Sequence

from kvpack.evaluate.bootstrap import ROUGH_BELOW
from kvpack.report.rows import Row, pareto_policies

MISSING = "–"
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn"}


def visible(text: str, limit: int | None = None) -> str:
    """Text from outside, harmless to look at: control and direction characters become U+FFFD, length is bounded."""
    clean = "".join("\ufffd" if unicodedata.category(c) in _UNPRINTABLE else c for c in text)
    return clean if limit is None or len(clean) <= limit else clean[: limit - 1] + "…"


def short_names(names: Collection[str], limit: int) -> dict[str, str]:
    """Every name, cut to a limit; those that would then look alike get their number among them at the end."""
    short = {name: visible(name, limit) for name in names}
    for text in {text for text in short.values() if list(short.values()).count(text) > 1}:
        alike = [name for name in short if short[name] == text]
        for number, name in enumerate(alike, 1):
            short[name] = f"{text[: limit - 1 - len(str(number))].rstrip('…')}…{number}"
    return short


def say(value: float | None, decimals: int = 3, *, sign: bool = False) -> str:
    """A number for a reader: so many decimals, but two digits at least and not more than five or so."""
    if value is None:
        return MISSING
    if math.isnan(value):
        return "not a number"
    plus = "+" if sign and value > 0 else ""
    if math.isinf(value):
        return f"{plus}∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-4:
        mantissa, exponent = f"{size:.1e}".split("e")
        text = f"{mantissa}·{power_of_ten(int(exponent))}"
    elif size < 0.1:
        text = f"{size:.{max(decimals, 1 - math.floor(math.log10(size)))}f}" if size else "0"
    else:
        text = f"{size:,.{max(0, decimals - (2 if size >= 1000 else 1 if size >= 100 else 0))}f}"
    return ("−" if value < 0 else plus) + text


def power_of_ten(exponent: int) -> str:
    """10 with a raised exponent."""
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def say_interval(row: Row) -> str:
    """The 95 % interval of a row's rise, "0.20 to 0.40", or a dash where there is none, as for fp16 itself."""
    if row.interval is None or row.is_baseline:
        return MISSING
    return f"{say(row.interval[0], 2)} to {say(row.interval[1], 2)}"


def say_rise(row: Row) -> str:
    """A row's rise of perplexity with its interval where there is one, "0.30 (0.20 to 0.40)"."""
    interval = "" if row.interval is None else f" ({say_interval(row)})"
    return say(row.rise, 2) + interval


def _sentence(row: Row, baseline: Row | None) -> str:
    """What one policy does: bits, how much smaller, what it costs."""
    text = f"{row.policy} keeps {say(row.bits, 2)} bits per element"
    if row.bits:
        text += f" ({say(16 / row.bits, 1)} times smaller than fp16)"
    if row.rise is None or not math.isfinite(row.rise):
        return text + ", and the perplexity is not finite"
    if row.interval is not None and row.interval[0] <= 0 <= row.interval[1]:
        return text + f", and no change of perplexity can be told from chance: {say_rise(row)}"
    verb = "raises" if row.rise >= 0 else "lowers"
    amount = say(abs(row.rise), 2) if row.rise < 0 else say_rise(row)
    text += f" and {verb} perplexity by {amount}"
    if baseline is not None and baseline.ppl and abs(row.rise) < 10 * baseline.ppl < math.inf:
        text += f", or {say(100 * abs(row.rise) / baseline.ppl, 1)}\u00a0%"
    return text


def _smallest_within(rows: Sequence[Row], baseline: Row, share: float) -> Row | None:
    """The row with the fewest bits whose perplexity rises by at most this share of fp16's."""
    if not baseline.ppl:
        return None
    sized = [row for row in rows if row.rise is not None and row.bits is not None]
    fitting = [row for row in sized if row.rise <= share * baseline.ppl]
    return min(fitting, key=lambda row: (row.bits, row.rise), default=None)


def read_result(rows: Sequence[Row]) -> list[str]:
    """Sentences that say what one dataset's rows mean, computed from the rows alone."""
    baseline = next((row for row in rows if row.is_baseline), None)
    measured = [row for row in rows if not row.is_baseline]
    sentences = []
    if baseline is not None:
        sentences.append(f"With the uncompressed cache (fp16, 16 bits per element) perplexity is {say(baseline.ppl)}.")
    if not measured:
        sentences.append("No other policy has been measured, so there is nothing to compare yet.")
        return sentences
    named: set[str] = set()
    if baseline is not None:
        for share, words in ((0.01, "1\u00a0%"), (0.05, "5\u00a0%")):
            row = _smallest_within(measured, baseline, share)
            if row is None:
                sentences.append(f"No policy measured here stays within {words} of it.")
            elif row.policy not in named:
                named.add(row.policy)
                sentences.append(f"The smallest policy within {words} of it: {_sentence(row, baseline)}.")
    sized = [row for row in measured if row.bits is not None]
    smallest = min(sized, key=lambda row: (row.bits, row.policy), default=None)
    if smallest is not None and smallest.policy not in named:
        sentences.append(f"The smallest of all: {_sentence(smallest, baseline)}.")
    front = set(pareto_policies(rows))
    beaten = [row.policy for row in sized if row.policy not in front]
    if beaten:
        subject = " and ".join(beaten) if len(beaten) <= 2 else f"{len(beaten)} of {len(measured)} policies"
        verb = "is" if len(beaten) == 1 else "are"
        sentences.append(f"{subject} {verb} beaten by policies that are no larger and do better.")
    return sentences


def read_caveats(rows: Sequence[Row]) -> list[str]:
    """Sentences that say what the rows of one dataset cannot show."""
    measured = [row for row in rows if not row.is_baseline]
    if not measured:
        return []
    sentences = []
    if any(row.rise is not None and not math.isfinite(row.rise) for row in measured):
        broken = [row.policy for row in measured if row.rise is not None and not math.isfinite(row.rise)]
        sentences.append(f"Not finite, so broken on this model: {', '.join(broken)}.")
    if all(row.interval is None for row in measured):
        sentences.append("There are no intervals (one segment only), so small differences mean nothing.")
    elif 0 < max(row.segments for row in measured) < ROUGH_BELOW:
        sentences.append(f"With {max(row.segments for row in measured)} segments the intervals are rough.")
    if any(row.mode == "oracle" for row in measured):
        every = all(row.mode == "oracle" for row in measured)
        sentences.append(
            f"{'All' if every else 'Some'} policies use oracle statistics: they see the whole segment, the future "
            "included, which a decoder cannot."
        )
    return sentences
