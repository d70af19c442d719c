"""The interpreter against onnx's own node tests: every operator that it claims, within the tests' own tolerance."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from nodes import claimed_cases, problem


def test_onnx_node_tests_agree_within_their_own_tolerance() -> None:
    """One test for all of them: making them takes onnx many seconds, which collecting tests must not."""
    found = claimed_cases()
    wrong = {case.name: said for case in found if (said := problem(case)) is not None}
    assert len(found) > 1600
    assert not wrong, "\n".join(f"{name}: {said}" for name, said in wrong.items())
