"""The highest sustained rate: against the analytic M/D/1 queue on the scripted device, and how the search behaves."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, feed, node
from queues import highest_load

from perwatt.bench.capacity import growth_ms, highest_rate, judged, window_s
from perwatt.bench.traffic import poisson_arrivals
from perwatt.contract import OperatingPoint
from perwatt.measurement import Window
from perwatt.targets.null import Null


def scripted_device(folder):
    """A program of one operator that takes 0.05 ms by the script, and its sample."""
    artifact = build([node("Relu", "x", "y")], "x:float32[batch,4]", "y:float32[batch,4]")
    artifact.file(folder)
    return Null().lower(artifact, OperatingPoint("server")), [feed(artifact, items=1)]


@pytest.mark.parametrize("bound", [3.0, 10.0])
def test_the_rate_found_is_that_of_an_m_d_1_queue_on_a_scripted_device(bound, tmp_path):
    program, samples = scripted_device(tmp_path)
    bound_ms, offline = bound * program.cost_ms, 1e3 / program.cost_ms
    seeds = itertools.count()

    def serve(rate):
        return program.serve(samples, poisson_arrivals(rate, next(seeds), seconds=window_s(rate, bound_ms)))

    found = highest_rate(serve, bound_ms=bound_ms, start_rate=offline)
    # Half the bracket, and two standard deviations of the search with windows of 2,000 requests.
    assert found.rate_per_s == pytest.approx(highest_load(bound, 0.99) * offline, rel=0.015 + 0.1)
    last = found.tries[-1]
    assert last.ok and last.rate_per_s == found.rate_per_s and last.windows == len(found.windows) == 3
    assert last.latency_ms <= bound_ms and last.requests == sum(len(w.latencies_ms) for w in found.windows)
    assert "held in a longer run" in found.reason


def window(latencies):
    return Window(len(latencies), 1.0, 1.0, list(latencies))


# How the search behaves, on a made-up server whose latency is known for every rate -----------------------------------


def server(latency_ms, lucky=0):
    """`serve` of a server that answers the first request in 1 ms and all others in `latency_ms(rate)`; in its `lucky` first
    windows, these as well."""
    calls = []

    def serve(rate):
        calls.append(rate)
        return Window(200, 1.0, 0.5, [1.0] + [1.0 if len(calls) <= lucky else latency_ms(rate)] * 199)

    serve.calls = calls
    return serve


def step(limit, good=1.0, bad=99.0):
    return lambda rate: good if rate <= limit else bad


@given(limit=st.floats(20, 5000), start=st.floats(500, 2000))
def test_a_sharp_limit_is_found_from_below_to_the_precision(limit, start):
    found = highest_rate(server(step(limit)), bound_ms=10, start_rate=start, max_tries=40)
    if found.rate_per_s is None:
        assert limit < start / 64
    else:
        assert limit / 1.03 <= found.rate_per_s <= limit


@given(limit=st.floats(1, 1e5), tries=st.integers(1, 14), wobble=st.floats(0, 20))
def test_no_more_rates_are_tried_than_allowed_and_no_rate_is_told_that_did_not_prove_itself(limit, tries, wobble):
    serve = server(lambda rate: 10 * rate / limit + wobble)
    found = highest_rate(serve, bound_ms=15, start_rate=1000, max_tries=tries)
    assert 1 <= len(found.tries) <= max(tries, 4)
    assert sum(t.windows for t in found.tries) == len(serve.calls)
    if found.rate_per_s is not None:
        proof = found.tries[-1]
        assert (proof.rate_per_s, proof.windows, proof.ok) == (found.rate_per_s, 3, True)
    assert found.reason


def test_a_request_that_takes_longer_than_the_bound_by_itself_ends_the_search_at_once():
    found = highest_rate(lambda rate: window([20.0] * 100), bound_ms=10, start_rate=100)
    assert found.rate_per_s is None and len(found.tries) == 2 and not found.windows
    assert found.reason == "the fastest of all requests took 20 ms, and 10 ms are allowed"


def test_a_tail_beyond_the_bound_at_any_rate_is_no_rate():
    def serve(rate):
        return window(([1.0] * 9 + [50.0]) * 10)

    found = highest_rate(serve, bound_ms=10, start_rate=640)
    assert found.rate_per_s is None
    assert [t.rate_per_s for t in found.tries] == [640, 320, 80, 10]
    assert found.reason == "even 10 requests a second were not answered in time"
    assert highest_rate(serve, bound_ms=10, share=0.9, start_rate=640).rate_per_s >= 640


def test_a_start_that_is_too_low_is_left_upwards_as_far_as_tries_reach():
    found = highest_rate(server(step(1000)), bound_ms=10, start_rate=100)
    assert 1000 / 1.03 <= found.rate_per_s <= 1000
    endless = highest_rate(server(step(math.inf)), bound_ms=10, start_rate=100, max_tries=6)
    assert endless.rate_per_s == pytest.approx(100 * 1.5**2) and "for want of tries" in endless.reason


def test_a_lucky_rate_does_not_survive_the_longer_run():
    # The first window at 1000/s is lucky, the rate above fails, and all that is below 700/s holds.
    found = highest_rate(server(step(700), lucky=1), bound_ms=10, start_rate=1000, max_tries=30)
    assert found.tries[0].ok and 700 / 1.3 <= found.rate_per_s <= 700
    dropped = [t for t in found.tries if t.windows == 3 and not t.ok]
    assert dropped and all(t.rate_per_s > found.rate_per_s for t in dropped)


def test_near_the_edge_a_second_window_joins_the_first():
    found = highest_rate(server(lambda rate: rate / 100), bound_ms=10, start_rate=1050)
    for tried in found.tries:
        near = abs(tried.rate_per_s / 1000 - 1) < 0.1
        assert tried.windows in ((2, 3) if near else (1, 3))
    assert found.tries[0].windows == 2


def test_progress_hears_of_every_try():
    heard = []
    found = highest_rate(server(step(300)), bound_ms=10, start_rate=1000, progress=heard.append)
    assert heard == found.tries and len(heard) > 3


def test_a_backlog_that_grows_within_the_bound_is_not_sustained():
    climbing = [1 + 8 * i / 999 for i in range(1000)]
    tried = judged(100, [window(climbing)], 10, 0.99)
    assert tried.latency_ms < 10 and tried.growth_ms == pytest.approx(8 * 2 / 3, rel=0.01) and not tried.ok
    # The same latencies in another order are no backlog.
    mixed = [climbing[i * 7 % 1000] for i in range(1000)]
    assert judged(100, [window(mixed)], 10, 0.99).ok


def test_windows_are_judged_together():
    tried = judged(5, [window([1.0] * 99 + [20.0]), window([1.0] * 100)], 10, 0.99)
    assert tried.ok and tried.requests == 200 and tried.windows == 2
    assert not judged(5, [window([1.0] * 99 + [20.0]), window([1.0] * 98 + [20.0] * 2)], 10, 0.99).ok


def test_growth_wants_three_requests_and_judging_wants_one():
    assert growth_ms([5.0, 9.0]) == 0.0 and growth_ms([5.0, 0.0, 9.0]) == 4.0
    with pytest.raises(ValueError, match="no request came in a window"):
        judged(0.5, [window([])], 10, 0.99)


def test_a_window_is_long_enough_for_the_percentile_and_for_the_bound():
    assert window_s(1000, 10) == pytest.approx(2.0) and window_s(1000, 200) == pytest.approx(8.0)
    assert window_s(1000, 10, share=0.9) == pytest.approx(0.4) and window_s(10, 10, at_most_s=20) == 20


def test_high_rates_are_told_in_whole_requests():
    found = highest_rate(server(step(20_000)), bound_ms=10, start_rate=16_000, max_tries=8)
    held = max(t.rate_per_s for t in found.tries if t.ok)
    not_held = min(t.rate_per_s for t in found.tries if not t.ok)
    assert found.reason == f"{held:,.0f}/s held in a longer run, {not_held:,.0f}/s did not hold"
    assert "e+" not in highest_rate(server(step(0)), bound_ms=10, start_rate=1e6).reason
