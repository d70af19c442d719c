"""The M/D/1 queue in closed form: Poisson arrivals, one server, a service time that never varies.

Erlang (1909) and Crommelin (Post Office Electrical Engineers' Journal 25, 1932), as in Gross et al., Fundamentals of
Queueing Theory, 4th ed., section 5.1; the mean is Pollaczek and Khinchine's. Times are in units of the service time; `load`
is the arrival rate times the service time.
"""

from decimal import Decimal, getcontext
from math import factorial

# The sum alternates, with terms far larger than the result.
getcontext().prec = 120


def mean_wait(load):
    """Expected time before service begins."""
    return load / (2 * (1 - load))


def wait_at_most(time, load):
    """Probability that a request waits no longer than `time`."""
    if time < 0:
        return 0.0
    rho, t = Decimal(load), Decimal(time)
    terms = ((rho * (j - t)) ** j / factorial(j) * (rho * (t - j)).exp() for j in range(1, int(time) + 1))
    return float((1 - rho) * ((rho * t).exp() + sum(terms)))


def latency_percentile(share, load):
    """The latency, waiting and service, that `share` of all requests do not exceed; exact to a millionth."""
    low, high = 0.0, 1.0
    while wait_at_most(high, load) < share:
        high *= 2
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if wait_at_most(middle, load) >= share else (middle, high)
    return 1 + high


def highest_load(bound, share):
    """The load at which `share` of all requests are answered within `bound`."""
    low, high = 1e-4, 1 - 1e-4
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if wait_at_most(bound - 1, middle) >= share else (low, middle)
    return low
