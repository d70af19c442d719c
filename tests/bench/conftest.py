"""Fixtures of the tests of measuring."""

import importlib
import os
import sys
from pathlib import Path

import models as tests_models
import pytest

SUITES = Path(__file__).resolve().parents[2] / "bench" / "suites"


@pytest.fixture(scope="module")
def suite():
    """`suite("points")`: that suite as a module. What importing it changes for others is put back."""
    environment, path = dict(os.environ), list(sys.path)
    known = set(sys.modules)
    sys.path.insert(0, str(SUITES))
    del sys.modules["models"]
    try:
        yield importlib.import_module
    finally:
        for name in set(sys.modules) - known | {"models"}:
            held = getattr(sys.modules[name], "__file__", None)
            if held and Path(held).parent == SUITES:
                del sys.modules[name]
        sys.modules["models"] = tests_models
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)
