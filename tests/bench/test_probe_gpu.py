"""GPUs by a scripted nvidia-smi; the matrix products on the CPU, where torch has them."""

import stat

import pytest

from perwatt.bench.probe_gpu import PRODUCTS, gpus, measure


def tool(folder, monkeypatch, script):
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_scripted_gpus_are_told_with_what_the_driver_says(tmp_path, monkeypatch):
    tool(
        tmp_path,
        monkeypatch,
        "echo '0, NVIDIA H100 80GB HBM3, 9.0, 81559, 550.54.15'; echo '1, NVIDIA Old, [N/A], [N/A], [N/A]'",
    )
    assert gpus() == [
        {"index": 0, "name": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "memory_bytes": 81559 * 2**20,
         "driver": "550.54.15"},
        {"index": 1, "name": "NVIDIA Old", "compute_capability": None, "memory_bytes": None, "driver": None},
    ]  # fmt: skip


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'"])
def test_a_scripted_driver_that_finds_nothing_gives_no_gpus(tmp_path, monkeypatch, script):
    tool(tmp_path, monkeypatch, script)
    assert gpus() == []


def test_without_the_tool_there_are_no_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == []


def test_without_a_gpu_for_torch_nothing_is_measured():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        found = measure()
        assert found["tops"]["float32"] > 0 and not set(found["tops"]) & set(found["refused"])
    else:
        assert measure() is None


@pytest.mark.parametrize(("kind", "result"), [
    ("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"), ("int8", "int32"), ("float8", "bfloat16"),
])  # fmt: skip
def test_a_product_calls_torch_as_torch_wants_it(kind, result):
    torch = pytest.importorskip("torch")
    product = PRODUCTS[kind](torch, 64, "cpu")()
    assert product.dtype == getattr(torch, result) and product.shape == (64, 64)
