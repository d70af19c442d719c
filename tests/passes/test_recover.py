"""`recover`: what pruning lost comes back; nothing is learnt without something lost, samples, time and torch."""

import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from models import context, conv_net, executed, feed, outputs

pytest.importorskip("torch")

from perwatt.data import Samples
from perwatt.errors import BackendError, PassError
from perwatt.passes._learning import seconds_to_learn
from perwatt.passes.prune_channels import PruneChannels
from perwatt.passes.recover import Recover


def not_here(*_):
    raise BackendError("nothing can be measured here")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def given(artifact, roles=None, **more):
    """A context with samples for each role."""
    roles = roles or {"learn": 256, "calibrate": 64, "select": 64}
    held = {role: Samples([feed(artifact, items=count, seed=i)]) for i, (role, count) in enumerate(roles.items())}

    def samples(role):
        if role not in held:
            raise PassError(f"there are no samples for {role!r}")
        return held[role]

    made = context([], execute=executed, measure=not_here, profile=not_here)
    return replace(made, samples=samples, original=artifact, **more)


def pruned(artifact):
    after, _ = PruneChannels(ratio=0.4, multiple=1, compensate=False).run(artifact, given(artifact))
    assert after is not artifact
    return after


def far(one, other):
    batch = feed(one, items=64, seed=9)
    old, new = outputs(one, batch), outputs(other, batch)
    return max(float(np.linalg.norm(new[n] - old[n]) / np.linalg.norm(old[n])) for n in old)


def test_a_pruned_network_learns_back_what_it_lost():
    before = conv_net()
    worse = pruned(before)
    after, changes = Recover(steps=200, batch=32).run(worse, given(before))
    assert far(before, after) < 0.6 * far(before, worse)
    assert (
        changes[0].startswith("200 steps in ") and "256 samples to learn from: loss against the original" in changes[0]
    )
    assert after.steps[-1].name == "recover" and list(after.steps[-1].changes) == changes
    assert {step.name for step in after.steps} >= {"prune-channels", "recover"}
    assert after.size_bytes() <= 1.1 * worse.size_bytes()


def test_without_samples_to_learn_from_those_to_calibrate_on_serve_and_some_are_held_out():
    before = conv_net()
    after, changes = Recover(steps=60, batch=16).run(pruned(before), given(before, {"calibrate": 200}))
    assert "180 samples to calibrate on, as there are none to learn from" in changes[0]
    assert "on 20 held-out samples" in changes[0] and after.steps[-1].name == "recover"


def test_too_few_samples_are_an_error_that_says_what_to_give():
    before = conv_net()
    with pytest.raises(PassError, match="12 samples to learn from are too few") as caught:
        Recover(steps=5).run(pruned(before), given(before, {"calibrate": 12}))
    assert "--train" in str(caught.value.fix)


def test_what_lost_nothing_is_refused():
    before = conv_net()
    assert list(Recover().requires(before, given(before))) == ["nothing was pruned that could be learnt back"]
    assert list(Recover().requires(pruned(before), given(before))) == []
    assert list(Recover().requires(pruned(before), replace(given(before), original=None)))


def test_nothing_is_learnt_from_made_up_samples():
    before = conv_net()
    (reason,) = Recover().requires(pruned(before), given(before, made_up=True))
    assert reason == "there are no real samples to learn from: --train, or --data"


def test_half_of_what_is_left_is_for_what_comes_behind_and_the_ledger_says_so():
    assert seconds_to_learn(1.0, replace(given(conv_net()), deadline=time.monotonic() + 600)) == 60
    assert 9 < seconds_to_learn(1.0, replace(given(conv_net()), deadline=time.monotonic() + 20)) <= 10
    before = conv_net()
    _, changes = Recover(batch=32).run(pruned(before), given(before, deadline=time.monotonic() + 1.0))
    assert "of the 5 minutes, for --time)" in changes[0]


def test_without_torch_it_says_how_to_get_it(monkeypatch):
    before = conv_net()
    worse = pruned(before)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert any("pip install" in reason for reason in Recover().requires(worse, given(before)))


def test_the_deadline_is_kept():
    before = conv_net()
    worse = pruned(before)
    start = time.monotonic()
    Recover(minutes=10.0, batch=32).run(worse, given(before, deadline=time.monotonic() + 2.0))
    assert time.monotonic() - start < 60
    with pytest.raises(PassError, match="no time left"):
        Recover().run(worse, given(before, deadline=time.monotonic() - 1.0))


@pytest.mark.parametrize("settings", [{"minutes": 0.0}, {"steps": -1}, {"batch": 1}])
def test_settings_that_make_no_sense_are_errors(settings):
    before = conv_net()
    with pytest.raises(PassError):
        Recover(**settings).run(pruned(before), given(before))
