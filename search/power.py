"""What a number of replicates can show: the power of the paired t test, from the noncentral t distribution.

Two questions. Before a sweep: which true difference would so many replicates find (`detectable_difference`)? After one
that decided nothing: how many more would (`replicates_to_decide`)? Both take a spread as if it were the true one.

The variance of a mean difference has two parts: the spread from seed to seed, which replicates reduce, and what the
questions leave open, which all replicates share and none of them reduces. Where the second is too large, no number of
replicates decides.
"""

import math
from collections.abc import Callable

from scipy import optimize, special

from search.replicates import MIN_REPLICATES

MAX_REPLICATES = 10_000
"""Where the search for a number of replicates ends: nobody trains more."""
SURELY = 6
"""At a true difference of this many critical values and 8 standard errors the t test has power 1, for any degrees of
freedom from 2."""
ENOUGH = 0.8
"""Chance of a decision that counts as enough."""


def detectable_difference(sd: float, replicates: int, *, power: float = ENOUGH, confidence: float = 0.95) -> float:
    """The smallest true difference, a share, that a paired t test of so many replicates calls better or worse.

    `sd`: of the differences per seed, a share. `power`: the chance to call it. Infinite below three
    replicates. Raises ValueError for a spread, a power or a confidence that cannot be.
    """
    if not (math.isfinite(sd) and sd >= 0):
        raise ValueError(f"sd is a finite spread of at least 0, but got {sd}")
    if not 0.5 <= power < 1:
        raise ValueError(f"power is a share from 0.5 to below 1, but got {power}")
    level = level_of(confidence)
    if replicates < MIN_REPLICATES:
        return math.inf
    df = replicates - 1.0
    upper = SURELY * half_width(1.0, df, level) + 8
    ratio = float(optimize.brentq(lambda ratio: _power(ratio, df, level) - power, 0.0, upper, xtol=1e-10))
    return sd / math.sqrt(replicates) * ratio


def replicates_to_decide(
    difference: float,
    sd: float,
    se: float,
    count: int,
    *,
    margin: float,
    level: float,
) -> int | None:
    """More replicates until a verdict has a chance of 80 %, were this difference and this spread the true ones.

    `sd` of the differences per seed, `se` of the mean of `count` of them: what `sd` does not explain of it, all
    replicates share. None where no number up to MAX_REPLICATES is enough.
    """
    shared = max(0.0, se**2 - sd**2 / count)

    def enough(total: int) -> bool:
        se, df = planned_error(sd, shared, total)
        tell, same = _chance_to_tell(difference, se, df, level), _chance_of_same(difference, se, df, level, margin)
        return max(tell, same) >= ENOUGH

    total = _first(enough, max(count + 1, MIN_REPLICATES))
    return None if total is None else total - count


def half_width(se: float, df: float, level: float) -> float:
    """Of the t interval."""
    return float(special.stdtrit(df, 1 - level / 2)) * se


def level_of(confidence: float) -> float:
    """0.95 -> 0.05. Raises ValueError for what is no share."""
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence is a share between 0.5 and 1 (0.95 = 95 %), but got {confidence}")
    return round(1 - confidence, 12)


def planned_error(sd: float, shared: float, count: int) -> tuple[float, float]:
    """Standard error and degrees of freedom that so many replicates would have; `shared`: the variance that none of
    them reduces."""
    own = sd**2 / count
    if own == 0:
        return math.sqrt(shared), float(MAX_REPLICATES)
    return math.sqrt(own + shared), (own + shared) ** 2 / (own**2 / (count - 1))


def _power(ratio: float, df: float, level: float) -> float:
    """Of the two-sided t test, the true difference being `ratio` standard errors: the noncentral t distribution."""
    critical = float(special.stdtrit(df, 1 - level / 2))
    if ratio > SURELY * critical + 8:
        return 1.0
    # Rejecting on the wrong side: below 1e-7 or half the level where it is left out, since scipy has no number for some
    # of these.
    below = float(special.nctdtr(df, ratio, -critical)) if ratio < 4 and level > 1e-4 else 0.0
    power = 1 - float(special.nctdtr(df, ratio, critical)) + below
    if not math.isfinite(power):
        raise ArithmeticError(f"noncentral t has no number at df {df}, noncentrality {ratio}, level {level}")
    return power


def _chance_to_tell(difference: float, se: float, df: float, level: float) -> float:
    """That `better` or `worse` is said."""
    if se == 0:
        return 1.0 if difference != 0 else 0.0
    return _power(abs(difference) / se, df, level)


def _chance_of_same(difference: float, se: float, df: float, level: float, margin: float) -> float:
    """That the interval comes to lie within the margin; normal mean, spread as it is now."""
    if se == 0:
        return 1.0 if abs(difference) <= margin else 0.0
    room = margin - half_width(se, df, level)
    if room <= 0:
        return 0.0
    return float(special.ndtr((room - difference) / se) - special.ndtr((-room - difference) / se))


def _first(enough: Callable[[int], bool], least: int) -> int | None:
    """The smallest count from `least` on that is enough; chances grow with the count, so it is bracketed and halved."""
    if enough(least):
        return least
    low, high = least, 2 * least
    while not enough(high):
        if high >= MAX_REPLICATES:
            return None
        low, high = high, min(2 * high, MAX_REPLICATES)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
