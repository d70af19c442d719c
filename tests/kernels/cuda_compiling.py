"""Compiles the CUDA kernels that calls of perwatt.kernels launch, where there is no GPU. Run in a process of its own:

    python cuda_compiling.py < calls > found

`calls`: as `simulate` in conftest.py takes them. What is found: the `launches`, and the kernels and device functions `left`
that none of them needed. Both are pickled.

Host code runs as it is, on arrays "on the device" that lie in the host's memory and keep what they hold, as launches compile
the kernel for their very arguments and no more. Numba types and lowers it. What stands in the place of pieces of Numba: a
device and its arrays; launching; and NVVM, NVIDIA's compiler from LLVM's language to PTX, for which LLVM's own does it (it
comes with llvmlite), without functions of NVIDIA's libdevice, which stay unresolved.
"""

import gc
import importlib
import math
import pickle
import re
import sys
import types

import llvmlite.binding as llvm
import numpy as np
from numba import cuda
from numba.cuda import api, dispatcher
from numba.cuda.cudadrv import devices, nvvm


class OnDevice(np.ndarray):
    """As Numba's device arrays look to host code."""

    __cuda_ndarray__ = True
    __cuda_array_interface__ = property(lambda self: self.__array_interface__)

    def copy_to_host(self, target=None):
        if target is None:
            return np.array(self)
        target[...] = self
        return target

    def is_c_contiguous(self):
        return self.flags.c_contiguous


def to_device(array):
    return np.array(array).view(OnDevice)


class Nvvm:
    """What Numba asks of NVVM besides compiling."""

    data_layout = nvvm._datalayout_original

    def get_ir_version(self):
        return 1, 6, 3, 0


def compile_ir(modules, arch, **_):
    """PTX of the modules together. Functions of NVIDIA's libdevice stay calls, as that isn't here."""
    whole, *others = [llvm.parse_assembly(text) for text in modules]
    for module in others:
        whole.link_in(module)
    whole.verify()
    target = llvm.Target.from_triple("nvptx64-nvidia-cuda")
    return target.create_target_machine(cpu=arch, opt=0).emit_assembly(whole).encode()


CAPABILITIES = (8, 0), (9, 0)
"""The device's, for which kernels are typed and lowered, and others for which what came out is compiled as well."""


def replaced(launches):
    """(owner, name, what stands in its place) of each piece of Numba that needs a GPU."""
    context = types.SimpleNamespace(device=types.SimpleNamespace(compute_capability=CAPABILITIES[0], uuid="none"))

    def launch(kernel, args, griddim, blockdim, stream, sharedmem):
        ptx, *_ = [kernel.inspect_asm(capability) for capability in CAPABILITIES]
        launches.append(
            {
                "kernel": f"{kernel.py_func.__module__.rpartition('.')[2]}.{kernel.py_func.__name__}",
                "types": tuple(map(str, kernel.argtypes)),
                "grid": tuple(griddim),
                "block": math.prod(blockdim),
                "shared_bytes": sharedmem + sum(map(int, re.findall(r"\.shared .*\.b8 \w+\[(\d+)\];", ptx))),
                "unresolved": set(re.findall(r"\.extern \.func[^;]*?(\w+)\s*\(\s*\.param", ptx)),
                "double": re.findall(r"\b(?:add|sub|mul|div|fma|mad|sqrt)\S*\.f64", ptx),
            }
        )

    return [
        (cuda, "to_device", to_device),
        (cuda, "device_array", lambda shape, dtype=np.float64: np.zeros(shape, dtype).view(OnDevice)),
        (cuda, "as_cuda_array", lambda array: array),
        (cuda, "current_context", lambda: context),
        (api, "current_context", lambda: context),
        (devices, "get_context", lambda: context),
        (nvvm, "NVVM", Nvvm),
        (nvvm, "get_arch_option", lambda major, minor: f"sm_{major}{minor}"),
        (nvvm, "compile_ir", compile_ir),
        (dispatcher._Kernel, "bind", lambda kernel: None),
        (dispatcher._Kernel, "launch", launch),
    ]


def on_device(module, name, *args):
    """The call with its arrays on the device."""
    arrays = [to_device(given) if isinstance(given, np.ndarray) else given for given in args]
    getattr(importlib.import_module(module), name)(*arrays)


def main():
    launches = []
    for owner, name, piece in replaced(launches):
        if not hasattr(owner, name):
            raise SystemExit(f"{owner.__name__} has no {name} any more: what this script replaces of Numba has moved")
        setattr(owner, name, piece)
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    for module, name, args, kwargs in pickle.load(sys.stdin.buffer):
        getattr(importlib.import_module(module), name)(*args, **kwargs)
    own = [
        piece
        for piece in gc.get_objects()
        if isinstance(piece, dispatcher.CUDADispatcher) and piece.py_func.__module__.startswith("perwatt.")
    ]
    left = sorted({f"{piece.py_func.__module__}.{piece.py_func.__name__}" for piece in own if not piece.overloads})
    sys.stdout.buffer.write(pickle.dumps({"launches": launches, "left": left}))


if __name__ == "__main__":
    main()
