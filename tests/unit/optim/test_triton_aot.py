"""Every Triton kernel compiles ahead of time for several GPUs, without register spills and with 128-bit loads.

The launches are those of real plans, with their block sizes and numbers of warps.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from lightning_adam_mini import Blocks
from lightning_adam_mini.optim.kernels.triton_plan import make_plan
from lightning_adam_mini.optim.shards import Shard
from lightning_adam_mini.optim.state import init_state
from lightning_adam_mini.optim.update import ParameterView

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

FLOATS = ("beta2", "weight1", "weight2", "eps", "sign")
TYPES = {torch.int64: "*i64", torch.int32: "*i32", torch.float32: "*fp32", torch.float64: "*fp64"}
ROW_LENGTHS = (64, 768, 1024, 3072, 4096, 8192, 11008)

BLOCKS = {
    **{f"rows of {length}": Blocks.rows((4, length)) for length in ROW_LENGTHS},
    "rows of odd length": Blocks.rows((4, 8191)),
    "long rows": Blocks.rows((2, 28672)),
    "whole": Blocks.whole((2, 65536)),
    "columns": Blocks.rows((64, 256), axis=1),
    "columns, many sums": Blocks.whole((65536, 65), batch_axes=()),
    "element": Blocks.element((2, 64)),
    "one column in many tiles": Blocks.rows((256 * 33, 16), axis=1),
}


def launches(names, dtype, exp_avg_dtype=None):
    tensors = []
    for name in names:
        blocks = BLOCKS[name]
        param = torch.zeros(blocks.shape, dtype=dtype)
        state = init_state(param, blocks, exp_avg_dtype=exp_avg_dtype, capturable=False)
        grad = torch.zeros_like(param)
        tensors.append(
            ParameterView(param, grad, Shard(blocks), state["step"], state["exp_avg"], (state["exp_avg_sq"],))
        )
    return make_plan(tensors, torch.device("cpu")).launches


def compiled(launch, capability):
    """The PTX of a launch, and the report of ptxas."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    given = launch.arguments
    constants = {name: given[name] for name in names if name in given and not isinstance(given[name], torch.Tensor)}
    run_time = {"num_blocks": "i32", "longest": "i32", "addresses": "*i64", "scalars": "*fp32"}
    signature = {}
    for name in names:
        if name in run_time or name in FLOATS:
            signature[name] = run_time.get(name, "fp32")
        else:
            signature[name] = TYPES[given[name].dtype] if name not in constants else "constexpr"
    constants = {(names.index(name),): value for name, value in constants.items() if name not in run_time}
    pointers = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(launch.kernel, signature, constants, pointers)
    options = {"num_warps": given["num_warps"], "enable_fp_fusion": True}
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    return ptx, assembled(ptx)


def assembled(ptx):
    """The report of the first ptxas in the wheel that knows this version of PTX."""
    architecture = re.search(r"\.target (\w+)", ptx).group(1)
    for ptxas in sorted((Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*")):
        command = [str(ptxas), "-v", f"-arch={architecture}", "-o", os.devnull, "/dev/stdin"]
        result = subprocess.run(command, input=ptx, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return result.stderr
    raise AssertionError(result.stderr)


def assert_no_spill(launch, capability):
    ptx, report = compiled(launch, capability)
    label = f"{launch.kernel.__name__}, sm_{capability}, {launch.arguments}"
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spilled is not None, report
    assert spilled.groups() == ("0", "0"), f"{label}\n{report}"
    if launch.arguments.get("is_aligned"):
        assert re.search(r"ld\.global[^;]*\.v4\.b32", ptx), f"no load of 128 bits: {label}"
        stored = re.findall(r"st\.global[^;]*\.v4\.b32", ptx)
        assert stored or "sum" in launch.kernel.__name__, f"no store of 128 bits: {label}"
    return launch.kernel.__name__


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        (torch.float32, 80),
        (torch.float32, 90),
        (torch.bfloat16, 80),
        (torch.bfloat16, 90),
    ],
)
def test_no_kernel_spills_registers(dtype, capability):
    names = [assert_no_spill(launch, capability) for launch in launches(BLOCKS, dtype)]
    assert set(names) == {
        "finish_moments",
        "sum_chunks",
        "sum_columns",
        "update_chunks",
        "update_columns",
        "update_elements",
        "update_long_runs",
        "update_runs",
    }
    assert names.count("finish_moments") >= 2
    assert names.count("update_runs") >= 6


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize(
    ("dtype", "exp_avg_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, None), (torch.float32, None)],
)
def test_other_dtypes_and_devices(dtype, exp_avg_dtype, capability):
    for launch in launches(BLOCKS, dtype, exp_avg_dtype):
        assert_no_spill(launch, capability)


@pytest.mark.slow
def test_a_kernel_that_spills_is_found():
    """The test can fail: 16 times as many elements per thread do not fit in its registers."""
    (launch,) = (x for x in launches(["rows of 11008"], torch.float32) if x.kernel.__name__ == "update_runs")
    launch.arguments["num_warps"] = 2
    with pytest.raises(AssertionError, match="bytes spill stores"):
        assert_no_spill(launch, 90)
