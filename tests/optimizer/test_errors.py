"""The words of errors: which command gets what an extra needs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from perwatt import errors

REQUIRED = [
    "numpy>=2", 'torch>=2.11; extra == "torch"', "safetensors>=0.4; extra == 'torch'",
    'perwatt[torch]; extra == "huggingface"', 'transformers>=5.0; extra == "huggingface"',
]  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "command"),
    [
        ("torch", "pip install 'safetensors>=0.4' 'torch>=2.11'"),
        ("huggingface", "pip install 'safetensors>=0.4' 'torch>=2.11' 'transformers>=5.0'"),
        ("unknown", "pip install 'perwatt[unknown]'"),
    ],
)
def test_the_packages_of_an_extra_are_named_those_of_its_own_extras_included(monkeypatch, extra, command) -> None:
    monkeypatch.setattr(errors, "requires", lambda name: REQUIRED)
    assert errors.install_words(extra) == command


def test_a_perwatt_that_is_not_installed_names_the_extra(monkeypatch) -> None:
    def missing(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(errors, "requires", missing)
    assert errors.install_words("torch") == "pip install 'perwatt[torch]'"


def test_every_extra_that_an_error_names_is_one_of_ours() -> None:
    for extra in ("torch", "huggingface"):
        assert "perwatt[" not in errors.install_words(extra)
