"""Fixtures and options of all tests. Modules beside this file (`models`, `nets`) can be imported by name."""

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))

# A shell that runs the tests in the background has Ctrl-C ignored, and whatever they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, and no clock: a slow machine is no failure.
settings.register_profile("perwatt", deadline=None, derandomize=True, max_examples=15, database=None)
settings.load_profile("perwatt")


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/ anew from what comes out now")


def pytest_collection_modifyitems(items):
    """Files with slow tests first: what is begun last is what a run waits for in the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def run_folder(tmp_path_factory):
    """The folder of this test run, for all of its processes: PERWATT_TEST_RUN."""
    folder = tmp_path_factory.getbasetemp()
    os.environ["PERWATT_TEST_RUN"] = str(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


@pytest.fixture
def golden(request):
    """`golden("name", text)`: the text equals tests/golden/name.txt; with `--update-golden` it is written there."""

    def check(name, text):
        path = TESTS / "golden" / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text)
        assert path.exists(), f"no golden file {path.name}: run pytest --update-golden, and read what it wrote"
        assert text == path.read_text(), f"{path.name} differs: run pytest --update-golden, and read the difference"

    return check


@pytest.fixture
def golden_pass(golden):
    """`golden_pass("name", before, after, changes)`: a pass's printed graphs and its words are as recorded."""
    from models import printed

    def check(name, before, after, changes):
        golden(name, f"{printed(before)}\n=> {'; '.join(changes)}\n\n{printed(after)}")

    return check
