"""A GPU is used or refused, never replaced in silence; its memory and its graphs stay in place."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from service import providers
from service.inference import Inference, ProviderUnavailable, load
from service.providers import BoundSession, DeviceInDoubt, DeviceLost, GpuOptions, is_lost
from tests.service import toy_artifact
from tests.service.conftest import BATCH_SIZES
from tests.service.fake_cuda import FakeCuda, install

IMAGES_NHWC = np.random.default_rng(5).integers(
    1, 256, (4, toy_artifact.HEIGHT, toy_artifact.WIDTH, 3), np.uint8
)
ILLEGAL_ADDRESS = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 std::conditional_t<THRW, void> "
    "onnxruntime::CudaCall(ERRTYPE, const char*) CUDA failure 700: an illegal memory access was encountered "
    "; GPU=0 ; hostname=here ; file=cuda_graph.cc ; line=120 ; expr=cudaStreamSynchronize(stream_); "
)

CUDNN_FAILURE = (
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Conv node. Name:'' Status "
    "Message: CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0 ; hostname=here ; file=conv.cc ; "
    "line=470 ; expr=cudnnConvolutionForward(cudnn_handle, &alpha); "
)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install(monkeypatch, FakeCuda())


def on_gpu(artifact: Path, provider: Any = "cuda", **gpu: Any) -> Inference:
    return load(
        artifact, provider=provider, intra_op_threads=2, batch_sizes=BATCH_SIZES, gpu=GpuOptions(**gpu)
    )


# ---- refused, or used: never replaced ----


@pytest.mark.parametrize(
    ("provider", "absent", "says"),
    [
        ("cuda", ("CUDAExecutionProvider",), "the session would run on CPUExecutionProvider"),
        ("tensorrt", ("TensorrtExecutionProvider",), "the session would run on CUDAExecutionProvider"),
    ],
)
def test_a_session_that_onnxruntime_moved_elsewhere_is_refused(
    cuda: FakeCuda, artifact: Path, provider: str, absent: tuple[str, ...], says: str
) -> None:
    cuda.absent = absent
    with pytest.raises(ProviderUnavailable, match=f"{says}.*ANYTIME_PROVIDER=cpu"):
        on_gpu(artifact, provider)


def test_a_gpu_that_fails_is_not_taken_for_a_bad_graph(cuda: FakeCuda, artifact: Path) -> None:
    cuda.open_error = ILLEGAL_ADDRESS.replace(
        "700: an illegal memory access was encountered", "2: out of memory"
    )
    with pytest.raises(ProviderUnavailable, match=r"\(CUDA failure 2: out of memory\)"):
        on_gpu(artifact)
    cuda.open_error = ILLEGAL_ADDRESS
    with pytest.raises(DeviceLost, match=r"^CUDA failure 700: an illegal memory access was encountered$"):
        on_gpu(artifact)


def test_a_bad_graph_is_not_taken_for_a_gpu_that_fails(cuda: FakeCuda) -> None:
    cuda.open_error = "this is no graph"
    with pytest.raises(providers.GraphError):
        providers.open_graph(b"no graph", "cuda")


def test_an_onnxruntime_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch, artifact: Path) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderUnavailable, match="install onnxruntime-gpu alone"):
        on_gpu(artifact)


def test_onnxruntime_is_not_allowed_to_go_on_with_the_cpu(cuda: FakeCuda, artifact: Path) -> None:
    """Neither when the session is opened nor, which is its default, when a run fails."""
    on_gpu(artifact)
    for session in cuda.sessions:
        assert [name for name, _ in session.chain] == ["CUDAExecutionProvider"]
        assert not session.enable_fallback


def test_operators_that_stay_on_the_cpu_are_told(
    cuda: FakeCuda, artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    on_gpu(artifact)
    assert caplog.text == ""
    cuda.left_to_cpu = ("Shape", "Gather", "Shape")
    on_gpu(artifact)
    assert "1 Gather on CPUExecutionProvider, 2 Shape on CPUExecutionProvider" in caplog.text


def test_a_gpu_on_which_columns_do_not_run_is_refused(cuda: FakeCuda, artifact: Path) -> None:
    loaded = on_gpu(artifact)
    cuda.run_error = "CUDA failure 209: no kernel image is available for execution on the device"
    with pytest.raises(ProviderUnavailable, match=r"Column 1 cannot be run on 1 images.*failure 209"):
        loaded.warm_up(BATCH_SIZES)
    cuda.run_error = ILLEGAL_ADDRESS
    with pytest.raises(DeviceLost, match=r"Column 1 cannot be run on 1 images.*failure 700"):
        loaded.warm_up(BATCH_SIZES)


def test_a_gpu_without_enough_memory_is_refused(cuda: FakeCuda, artifact: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; hostname=here")

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", full)
    with pytest.raises(ProviderUnavailable, match=r"\(CUDA failure 2: out of memory\)"):
        on_gpu(artifact)


# ---- what auto tries ----


@pytest.mark.parametrize("device", ["nvidia0", "dxg"])
def test_auto_tries_cuda_where_there_is_a_device(
    cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(providers, "DEVICES", tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert providers.candidates("auto") == ("cpu",)
    (tmp_path / device).touch()
    assert providers.candidates("auto") == ("cuda", "cpu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert providers.candidates("auto") == ("cpu",)


@pytest.mark.parametrize("asked", ["cpu", "cuda", "tensorrt"])
def test_what_is_asked_for_is_all_that_is_tried(asked: Any) -> None:
    assert providers.candidates(asked) == (asked,)


def test_the_driver_says_which_gpus_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "DRIVER", tmp_path)
    assert providers.gpus() == ()
    for address, model in (("0000:01:00.0", "NVIDIA H100 80GB HBM3"), ("0000:02:00.0", "NVIDIA L4")):
        folder = tmp_path / "gpus" / address
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 33\nGPU UUID: \t GPU-1\n")
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06\nGCC version: 12\n"
    )
    driver = "NVIDIA UNIX x86_64 Kernel Module  580.65.06"
    assert providers.gpus() == ("NVIDIA H100 80GB HBM3", "NVIDIA L4", driver)


# ---- memory and graphs ----


def test_answers_are_those_of_the_cpu_whatever_ran_before(
    cuda: FakeCuda, artifact: Path, inference: Inference
) -> None:
    """Sizes and columns in turn: a graph, or a place in memory, that two of them shared would show."""
    loaded = on_gpu(artifact)
    loaded.warm_up(BATCH_SIZES)
    kept = []
    for n in (1, 4, 2, 3, 1, 4):
        for column in toy_artifact.COLUMNS:
            images_NHWC = np.roll(IMAGES_NHWC, n, axis=0)[:n]
            kept.append((loaded.run(column, images_NHWC), inference.run(column, images_NHWC)))
    for answered_NK, expected_NK in kept:  # after the last run, which may have written over the first
        np.testing.assert_allclose(answered_NK, expected_NK, rtol=1e-5, atol=1e-5)


def test_every_column_and_batch_size_has_a_graph_of_its_own(cuda: FakeCuda, artifact: Path) -> None:
    on_gpu(artifact).warm_up(BATCH_SIZES)
    used = [set(session.ids) for session in cuda.sessions]
    assert [len(ids) for ids in used] == [len(BATCH_SIZES)] * len(toy_artifact.COLUMNS)
    assert set.union(*used) == set(range(1, len(BATCH_SIZES) * len(toy_artifact.COLUMNS) + 1))
    assert {session.chain[0][1]["enable_cuda_graph"] for session in cuda.sessions} == {"1"}


@pytest.mark.parametrize(("provider", "chosen"), [("cuda", False), ("tensorrt", True)])
def test_without_graphs_nothing_is_captured(
    cuda: FakeCuda, artifact: Path, provider: str, chosen: bool
) -> None:
    on_gpu(artifact, provider, cuda_graphs=chosen).warm_up(BATCH_SIZES)
    for session in cuda.sessions:
        assert set(session.ids) == {-1}
        assert dict(session.chain)["CUDAExecutionProvider"]["enable_cuda_graph"] == "0"


def test_memory_is_taken_once(cuda: FakeCuda, artifact: Path) -> None:
    loaded = on_gpu(artifact)
    places = 2 * len(BATCH_SIZES) * len(toy_artifact.COLUMNS)
    assert cuda.n_values == places
    loaded.warm_up(BATCH_SIZES)
    for n in (1, 2, 3, 4):
        loaded.run("1", IMAGES_NHWC[:n])
    assert cuda.n_values == places


def test_nothing_of_one_batch_is_left_in_the_padding_of_the_next(cuda: FakeCuda, artifact: Path) -> None:
    loaded = on_gpu(artifact)
    loaded.run("1", IMAGES_NHWC)
    assert loaded.run("1", IMAGES_NHWC[:3]).shape == (3, len(toy_artifact.LABELS))
    np.testing.assert_array_equal(cuda.sessions[0].images[-1][:3], IMAGES_NHWC[:3])
    assert not cuda.sessions[0].images[-1][3:].any()


@pytest.mark.parametrize(
    "images_NHWC",
    [
        pytest.param(np.zeros((5, 8, 8, 3), np.uint8), id="no such batch size"),
        pytest.param(np.zeros((2, 8, 9, 3), np.uint8), id="another shape"),
        pytest.param(
            np.zeros((2, 8, 8, 3), np.float32), id="another type: onnxruntime would write four times as much"
        ),
    ],
)
def test_only_what_fits_is_copied_into_a_place(cuda: FakeCuda, images_NHWC: Any) -> None:
    session = providers.open_graph(toy_artifact.graph("1"), "cuda")
    with pytest.raises(ValueError, match="no place was made"):
        BoundSession(session, {1: 1, 2: 2}).run([], {"images_NHWC": images_NHWC})
    assert cuda.sessions[0].ids == []


def test_runs_on_a_gpu_never_overlap(cuda: FakeCuda, artifact: Path) -> None:
    """Another model's neither: what it asked of the GPU would spoil a graph that is being captured."""
    both_started = threading.Barrier(2)

    def take_a_while() -> None:
        threading.Event().wait(0.01)

    cuda.during_run = take_a_while

    def work() -> None:
        loaded = on_gpu(artifact)
        both_started.wait(30)
        for _ in range(5):
            loaded.run("1", IMAGES_NHWC)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cuda.most_running == 1


# ---- what a GPU is told ----


def test_options_reach_the_provider(cuda: FakeCuda, artifact: Path) -> None:
    on_gpu(artifact)
    on_gpu(artifact, conv_algorithms="exhaustive", use_tf32=True, prefer_nhwc=True)
    first, *_, last = [dict(session.chain)["CUDAExecutionProvider"] for session in cuda.sessions]
    assert first == {
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "enable_cuda_graph": "1",
        "prefer_nhwc": "0",
        "use_tf32": "0",
    }
    assert (last["cudnn_conv_algo_search"], last["use_tf32"], last["prefer_nhwc"]) == ("EXHAUSTIVE", "1", "1")


def test_tensorrt_is_told_every_shape_and_keeps_what_it_built_by_graph(
    cuda: FakeCuda, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    loaded = on_gpu(artifact, "tensorrt", tensorrt_cache=tmp_path / "cache")
    assert loaded.provider == "tensorrt"
    chains = [session.chain for session in cuda.sessions]
    assert [[name for name, _ in chain] for chain in chains] == [
        ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    ] * 3
    options = chains[0][0][1]
    assert options["trt_profile_min_shapes"] == "images_NHWC:1x8x8x3"
    assert options["trt_profile_opt_shapes"] == options["trt_profile_max_shapes"] == "images_NHWC:4x8x8x3"
    folders = [Path(chain[0][1]["trt_engine_cache_path"]) for chain in chains]
    assert len(set(folders)) == 3
    assert all(folder.is_dir() and folder.parent == tmp_path / "cache" for folder in folders)
    assert options["trt_timing_cache_path"] == str(folders[0])
    enabled = [options[f"trt_{what}_cache_enable"] for what in ("engine", "timing")]
    assert enabled == ["True", "True"]  # "1" is refused


def test_tensorrt_does_without_a_cache(
    cuda: FakeCuda, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    on_gpu(artifact, "tensorrt", tensorrt_cache=None)
    assert not any("cache" in name for name in cuda.sessions[0].chain[0][1])


@pytest.mark.parametrize(("use_tf32", "told"), [(False, "0"), (True, None)])
def test_tensorrt_multiplies_as_precisely_as_was_asked_for(
    cuda: FakeCuda, artifact: Path, monkeypatch: pytest.MonkeyPatch, use_tf32: bool, told: str | None
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")  # so that it is put back afterwards
    del os.environ["NVIDIA_TF32_OVERRIDE"]
    on_gpu(artifact, "tensorrt", use_tf32=use_tf32)
    assert os.environ.get("NVIDIA_TF32_OVERRIDE") == told


# ---- errors ----


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (ILLEGAL_ADDRESS, True),
        ("CUDA failure 719: unspecified launch failure ; GPU=0", True),
        ("CUDA error 214: uncorrectable ECC error encountered", True),
        ("CUDA failure 2: out of memory ; GPU=0", False),
        ("CUDA failure 901: operation failed due to a previous error during capture", False),
        ("CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED ; GPU=0 ; line=700", False),
        ("Unexpected input data type. Actual: (tensor(float))", False),
    ],
)
def test_errors_that_only_a_new_process_gets_over_are_told_from_others(message: str, expected: bool) -> None:
    assert is_lost(RuntimeError(message)) == expected


@pytest.mark.parametrize(
    ("message", "raised"),
    [
        (ILLEGAL_ADDRESS, DeviceLost),
        (f"{CUDNN_FAILURE} {ILLEGAL_ADDRESS}", DeviceLost),
        (CUDNN_FAILURE, DeviceInDoubt),
        ("CUDNN_FE failure 11: CUDNN_BACKEND_API_FAILED ; GPU=0", DeviceInDoubt),
        ("CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED ; GPU=0 ; line=700", DeviceInDoubt),
        ("TensorRT EP execution context enqueue failed.", DeviceInDoubt),
        ("CUDA failure 2: out of memory", RuntimeError),
    ],
)
def test_a_run_says_when_the_gpu_is_lost_or_may_be(
    cuda: FakeCuda, artifact: Path, message: str, raised: type[Exception]
) -> None:
    loaded = on_gpu(artifact)
    cuda.run_error = message
    with pytest.raises(raised, match=re.escape(message)):
        loaded.run("1", IMAGES_NHWC[:1])
    cuda.run_error = ""
    assert loaded.run("1", IMAGES_NHWC[:1]).shape == (1, 5)  # the lock was given back


# ---- the real libraries ----

DRIVER = """
int cuInit(unsigned flags) { return 100; }
int cuTensorMapEncodeTiled(void) { return 100; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
static int nothing(void) { return 100; }
int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags, int *status) {
    *found = !__builtin_strcmp(name, "cuInit") ? (void *)cuInit
        : !__builtin_strcmp(name, "cuDriverGetVersion") ? (void *)cuDriverGetVersion
        : !__builtin_strcmp(name, "cuGetProcAddress") ? (void *)cuGetProcAddress_v2 : (void *)nothing;
    if (status) *status = 0;
    return 0;
}
"""
"""NVIDIA's driver where there is no device: whatever is asked of it fails with 100, cudaErrorNoDevice."""

INFER = """
static void *zero(void) { return 0; }
static void *methods[400], *registry[] = {methods};
__attribute__((constructor)) static void fill(void) {
    for (int i = 0; i < 400; i++) methods[i] = (void *)zero;
}
void *getPluginRegistry(void) { return registry; }
int getInferLibVersion(void) { return 101400; }
void *createInferBuilder_INTERNAL(void) { return 0; }
void *createInferRefitter_INTERNAL(void) { return 0; }
void *createInferRuntime_INTERNAL(void) { return 0; }
"""
PARSER = """
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
"""
LIBRARIES = {"libcuda.so.1": DRIVER, "libnvinfer.so.10": INFER, "libnvonnxparser.so.10": PARSER}
"""Enough of them for the real providers to be loaded and told their options; TensorRT's has no plugins."""

OPEN = """
import sys
from pathlib import Path
from service import providers
graph, cache = map(Path, sys.argv[1:])
every = dict(cuda_graphs=False, conv_algorithms="exhaustive", use_tf32=True, prefer_nhwc=True)
for provider in ("cuda", "tensorrt"):
    for options in (providers.GPU_DEFAULTS, providers.GpuOptions(**every, tensorrt_cache=cache)):
        try:
            providers.open_graph(graph.read_bytes(), provider, gpu=options, batch_sizes=(1, 8))
        except providers.ProviderError as error:
            print(error)
"""


def test_the_real_providers_take_every_option_and_say_that_there_is_no_device(
    artifact: Path, tmp_path: Path
) -> None:
    """An option that they do not know, or a value that they cannot read, is refused before that."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.cudnn") is None:
        pytest.skip("the extra `cuda` is not installed")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    for name, source in LIBRARIES.items():
        (tmp_path / "source.c").write_text(source)
        options = ["-w", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(tmp_path / name)]
        subprocess.run([compiler, *options, str(tmp_path / "source.c")], check=True)
    opened = subprocess.run(
        [sys.executable, "-c", OPEN, artifact / "column-1.onnx", tmp_path / "cache"],
        cwd=Path(__file__).parents[2],
        env={"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    assert opened.stdout.splitlines() == ["CUDA failure 100: no CUDA-capable device is detected"] * 4
