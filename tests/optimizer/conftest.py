"""Fixtures of the tests in this folder. Modules beside this file (`runs`, `far`) can be imported by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from far import far, place, server

__all__ = ["far", "place", "server"]
