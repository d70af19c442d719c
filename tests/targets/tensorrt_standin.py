"""A scripted stand-in for TensorRT and for `cuda.bindings`, since neither runs without a GPU.

Engines are executed by ONNX Runtime on the CPU; everything else follows the real signatures, which the contract test
compares with the real packages. It is strict where the real thing is silent: work in a stream is done only when somebody
waits for it, copies are checked against what was allocated where, a context refuses shapes outside its profile, and in a
capture nothing runs. `Machine` scripts the GPU and writes down what was asked of it.
"""

from __future__ import annotations

import base64
import ctypes
import enum
import json
import types

import numpy as np
from tensorrt_standin_cuda import STEP_MS, cuda_module


class Machine:
    """One scripted GPU: `said` is what was asked of it, in order; `measured` the layers that a builder timed."""

    def __init__(self, gpu="NVIDIA Scripted GPU", capability=(9, 0), version="11.4.0.106"):
        self.gpu, self.capability, self.version = gpu, capability, version
        self.said, self.measured, self.builds = [], [], []
        self.device, self.pinned, self.streams = {}, {}, {}
        self.time_ms = 0.0
        self.refuses_capture = False
        self.fails_to_build = False

    def say(self, *words):
        self.said.append(words)

    def count(self, name):
        return sum(words[0] == name for words in self.said)

    def install(self, monkeypatch):
        """Make `import tensorrt` and `from cuda.bindings import runtime` find the stand-ins."""
        import sys

        runtime = cuda_module(self)
        package, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
        package.bindings, bindings.runtime = bindings, runtime
        for name, module in {
            "tensorrt": tensorrt_module(self.version, self),
            "cuda": package, "cuda.bindings": bindings, "cuda.bindings.runtime": runtime,
        }.items():  # fmt: skip
            monkeypatch.setitem(sys.modules, name, module)
        return self

    def block(self, where, address, nbytes):
        """Check that `nbytes` from `address` were allocated there."""
        held = [size for start, (size, _) in where.items() if start == address]
        assert held and nbytes <= held[0], f"{nbytes} bytes at {address:#x} were never allocated there"


# TensorRT -------------------------------------------------------------------------------------------------------------


def tensorrt_module(version, machine=None):
    """The classes of `tensorrt` that are used, for that machine; 10 and 11 differ as the real ones do."""
    module = types.ModuleType("tensorrt")
    generation = int(version.split(".")[0])

    def kinds(name, *members):
        return enum.IntEnum(name, list(members), start=0)

    Severity = kinds("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
    BuilderFlag = kinds("BuilderFlag", *(["FP16", "INT8"] if generation == 10 else []), "TF32", "SPARSE_WEIGHTS")
    NetworkDefinitionCreationFlag = (
        kinds("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH", "STRONGLY_TYPED")
        if generation == 10
        else kinds("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")
    )
    MemoryPoolType = kinds("MemoryPoolType", "WORKSPACE")
    ProfilingVerbosity = kinds("ProfilingVerbosity", "LAYER_NAMES_ONLY", "DETAILED")
    LayerInformationFormat = kinds("LayerInformationFormat", "ONELINE", "JSON")
    TensorIOMode = kinds("TensorIOMode", "NONE", "INPUT", "OUTPUT")
    TensorLocation = kinds("TensorLocation", "DEVICE", "HOST")
    DataType = kinds("DataType", "FLOAT", "HALF", "BF16", "INT8", "INT32", "INT64", "BOOL", "UINT8", "FP8", "INT4")
    ErrorCode = kinds("ErrorCode", "SUCCESS", "INVALID_NODE", "UNSUPPORTED_NODE", "UNSUPPORTED_NODE_DATATYPE")

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING

        def __init__(self):
            self._ready = True

        def log(self, severity, msg):
            raise NotImplementedError

    class Logger(ILogger):
        def __init__(self, min_severity=Severity.WARNING):
            super().__init__()

        def log(self, severity, msg):
            pass

    def complain(logger, words):
        assert logger._ready, "ILogger.__init__ was never called"
        logger.log(Severity.ERROR, words)

    class IHostMemory(bytes):
        @property
        def nbytes(self):
            return len(self)

    class ITensor:
        def __init__(self, name, shape, decides_shapes):
            self.name, self.shape, self.is_shape_tensor = name, shape, decides_shapes

    class INetworkDefinition:
        def __init__(self, flags):
            self.flags, self._inputs, self._path = flags, [], None

        @property
        def num_inputs(self):
            return len(self._inputs)

        def get_input(self, index):
            return self._inputs[index]

    class ParserError:
        def __init__(self, *facts):
            self._code, self._node, self._name, self._operator, self._desc = facts

        def code(self):
            return self._code

        def node(self):
            return self._node

        def node_name(self):
            return self._name

        def node_operator(self):
            return self._operator

        def desc(self):
            return self._desc

    class OnnxParser:
        def __init__(self, network, logger):
            self._network, self._logger, self._errors = network, logger, []

        @property
        def num_errors(self):
            return len(self._errors)

        def get_error(self, index):
            return self._errors[index]

        def parse_from_file(self, model):
            import onnx

            loaded = onnx.load(model)
            constants = {t.name: onnx.numpy_helper.to_array(t) for t in loaded.graph.initializer}
            shapers = {node.input[1] for node in loaded.graph.node if node.op_type == "Reshape"}
            for tensor in loaded.graph.input:
                dims = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.type.tensor_type.shape.dim]
                self._network._inputs.append(ITensor(tensor.name, tuple(dims), tensor.name in shapers))
            for position, node in enumerate(loaded.graph.node):
                fault = parser_fault(node, constants)
                if fault:
                    code, words = fault
                    self._errors.append(ParserError(ErrorCode[code], position, node.name, node.op_type, words))
                    complain(self._logger, f"ModelImporter.cpp: ERROR: {words}")
            self._network._path = model
            return not self._errors

    class IOptimizationProfile:
        def __init__(self):
            self._shapes = {}

        def set_shape(self, input, min, opt, max):
            self._shapes[input] = [list(min), list(opt), list(max)]

    class ITimingCache:
        def __init__(self, gpu, layers):
            self._gpu, self._layers = gpu, layers

        def serialize(self):
            return IHostMemory(json.dumps({"gpu": self._gpu, "layers": self._layers}).encode())

    class IBuilderConfig:
        def __init__(self):
            self.builder_optimization_level = 3
            self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
            # As TensorRT's own.
            self._flags, self._pools, self._profiles, self._cache = {BuilderFlag.TF32}, {}, [], None

        def set_flag(self, flag):
            self._flags.add(flag)

        def clear_flag(self, flag):
            self._flags.discard(flag)

        def set_memory_pool_limit(self, pool, pool_size):
            self._pools[pool] = pool_size

        def add_optimization_profile(self, profile):
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache):
            if not serialized_timing_cache:
                return ITimingCache(machine.gpu, [])
            try:
                known = json.loads(serialized_timing_cache)
            except ValueError:
                return None
            return ITimingCache(known["gpu"], known["layers"])

        def set_timing_cache(self, cache, ignore_mismatch):
            if cache._gpu != machine.gpu and not ignore_mismatch:
                return False
            self._cache = cache
            return True

        def get_timing_cache(self):
            return self._cache

    class Builder:
        def __init__(self, logger):
            self._logger = logger

        def create_network(self, flags=0):
            return INetworkDefinition(flags)

        def create_builder_config(self):
            return IBuilderConfig()

        def create_optimization_profile(self):
            return IOptimizationProfile()

        def build_serialized_network(self, network, config):
            import onnx

            if machine.fails_to_build:
                complain(self._logger, "Error Code 10: Could not find any implementation for node /conv")
                return None
            shapes = config._profiles[0]._shapes if config._profiles else {}
            for tensor in (t for t in network._inputs if -1 in t.shape):
                if tensor.name not in shapes:
                    complain(self._logger, f"Network has dynamic input {tensor.name}, but no optimization profile")
                    return None
            model = onnx.load(network._path)
            layers = [f"{node.op_type} {list(node.output)}" for node in model.graph.node]
            fresh = [layer for layer in layers if layer not in config._cache._layers]
            machine.measured += fresh
            config._cache._layers += fresh
            machine.builds.append(types.SimpleNamespace(config=config, network=network, profile=shapes))
            held = {"version": version, "profile": shapes, "level": config.builder_optimization_level}
            held["model"] = base64.b64encode(model.SerializeToString()).decode()
            return IHostMemory(json.dumps(held).encode())

    class Runtime:
        def __init__(self, logger):
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine):
            held = json.loads(serialized_engine)
            if held["version"] != version:
                complain(self._logger, "The engine plan file is not compatible with this version of TensorRT")
                return None
            return ICudaEngine(held, self._logger)

    class ICudaEngine:
        def __init__(self, held, logger):
            import onnx
            import onnxruntime

            model = base64.b64decode(held["model"])
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            self._graph, self._profile, self._logger = onnx.load_from_string(model).graph, held["profile"], logger
            self._ports = [(p, TensorIOMode.INPUT) for p in self._session.get_inputs()]
            self._ports += [(p, TensorIOMode.OUTPUT) for p in self._session.get_outputs()]

        def _port(self, name):
            return next(both for both in self._ports if both[0].name == name)

        @property
        def num_io_tensors(self):
            return len(self._ports)

        def get_tensor_name(self, index):
            return self._ports[index][0].name

        def get_tensor_mode(self, name):
            return self._port(name)[1]

        def get_tensor_location(self, name):
            return TensorLocation.DEVICE

        def get_tensor_dtype(self, name):
            return TYPES(DataType)[self._port(name)[0].type]

        def get_tensor_profile_shape(self, name, profile_index):
            fixed = [d if isinstance(d, int) else -1 for d in self._port(name)[0].shape]
            return self._profile.get(name, [fixed] * 3)

        def create_execution_context(self, runtime_config=None):
            machine.say("context")
            return IExecutionContext(self)

        def create_engine_inspector(self):
            return EngineInspector(self)

    class IExecutionContext:
        def __init__(self, engine):
            self._engine, self._shapes, self._addresses = engine, {}, {}

        def set_input_shape(self, name, shape):
            low, _, high = self._engine.get_tensor_profile_shape(name, 0)
            if len(shape) != len(low) or any(not a <= d <= b for a, d, b in zip(low, shape, high, strict=True)):
                complain(self._engine._logger, f"setInputShape: {name} is outside of the profile")
                return False
            self._shapes[name] = tuple(shape)
            return True

        def get_tensor_shape(self, name):
            port, mode = self._engine._port(name)
            if mode == TensorIOMode.INPUT:
                return self._shapes[name]
            if any(node.op_type == "NonZero" for node in self._engine._graph.node):
                return (-1,) * len(port.shape)
            inputs = [p for p, kind in self._engine._ports if kind == TensorIOMode.INPUT]
            feed = {p.name: np.zeros(self._shapes[p.name], NUMPY[p.type]) for p in inputs}
            return self._engine._session.run([name], feed)[0].shape

        def set_tensor_address(self, name, memory):
            assert memory in machine.device, f"{name} is to lie where nothing was allocated"
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle):
            stream = machine.streams[stream_handle]
            if stream.recording is not None and machine.refuses_capture:
                complain(self._engine._logger, "operation not permitted when stream is capturing")
                return False
            machine.say("execute", stream_handle)
            shapes, addresses = dict(self._shapes), dict(self._addresses)
            stream.add(lambda: self._work(shapes, addresses))
            return True

        def _work(self, shapes, addresses):
            engine = self._engine
            feed = {}
            for port, mode in engine._ports:
                if mode == TensorIOMode.INPUT:
                    array = np.empty(shapes[port.name], NUMPY[port.type])
                    machine.block(machine.device, addresses[port.name], array.nbytes)
                    ctypes.memmove(array.ctypes.data, addresses[port.name], array.nbytes)
                    feed[port.name] = array
            names = [port.name for port, mode in engine._ports if mode == TensorIOMode.OUTPUT]
            for name, array in zip(names, engine._session.run(names, feed), strict=True):
                array = np.ascontiguousarray(array)
                machine.block(machine.device, addresses[name], array.nbytes)
                ctypes.memmove(addresses[name], array.ctypes.data, array.nbytes)
            machine.time_ms += STEP_MS

    class EngineInspector:
        def __init__(self, engine):
            self._engine = engine

        def get_engine_information(self, format):
            assert format == LayerInformationFormat.JSON
            graph = self._engine._graph
            eight = {o for node in graph.node if node.op_type == "DequantizeLinear" for o in node.output}
            layers = []
            for node in graph.node:
                kind = "Int8" if set(node.input) & eight else "Float"
                key = "Format/Datatype" if generation == 10 else "DataType"
                layers.append({"Name": node.name, "Inputs": [{"Name": node.input[0], key: kind}], "Outputs": []})
            return json.dumps({"Layers": layers, ("Bindings" if generation == 10 else "I/O Tensors"): []})

    def nptype(trt_type):
        return NUMPY[next(words for words, kind in TYPES(DataType).items() if kind == trt_type)]

    found = {name: value for name, value in locals().items() if isinstance(value, type) and name[0].isupper()}
    found.pop("Severity")
    found["nptype"] = nptype
    vars(module).update(found | {"__version__": version})
    return module


NUMPY = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32,
    "tensor(int8)": np.int8, "tensor(uint8)": np.uint8, "tensor(bool)": np.bool_,
}  # fmt: skip


def TYPES(DataType):
    """ONNX Runtime's words for types to TensorRT's."""
    return {
        "tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF, "tensor(int64)": DataType.INT64,
        "tensor(int32)": DataType.INT32, "tensor(int8)": DataType.INT8, "tensor(uint8)": DataType.UINT8,
        "tensor(bool)": DataType.BOOL,
    }  # fmt: skip


def parser_fault(node, constants):
    """(code, description) where TensorRT's parser would refuse the node, in its words; None where it would not."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        zero = constants.get(node.input[2]) if len(node.input) > 2 else None
        if zero is not None and np.any(zero):
            return "INVALID_NODE", "Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported."
    if node.op_type == "DynamicQuantizeLinear":
        return "UNSUPPORTED_NODE", "getPluginCreator could not find plugin: DynamicQuantizeLinear version: 1"
    return None
