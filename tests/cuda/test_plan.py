"""The plan: pure, within its bounds on memory, launches and traffic for any size, and printed."""

import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tvmf_ext import CpuPlan, CudaPlan, ops, plan
from tvmf_ext.head import kept_products
from tvmf_ext.planning import Sm80Plan, Sm90Plan

GPUS = ("A100", "L40S", "H100", "H200", "B200")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MIB = 2**20


@st.composite
def arguments(draw, classes):
    D = draw(st.one_of(st.integers(1, 4096), st.sampled_from([64, 512, 768, 2048])))
    N = draw(st.one_of(st.integers(1, 2**22 // D), st.sampled_from([1, 64, 256, 1024])))
    return (N, draw(classes), D), {
        "dtype": draw(st.sampled_from(DTYPES)),
        "weight_dtype": draw(st.sampled_from(DTYPES)),
        "device": draw(st.sampled_from(GPUS)),
        "allow_tf32": draw(st.booleans()),
        "backward": draw(st.booleans()),
    }


many = st.one_of(st.integers(1, 10**8), st.sampled_from([10**5, 10**6, 10**7, 10**8]))
few = st.integers(1, 10_000)


def takes_hopper(D, dtype, weight_dtype, device, **_):
    half = (torch.float16, torch.bfloat16)
    run = {torch.float32: 4, dtype: 8}.get(weight_dtype)  # of elements that copies can read
    return dtype in half and run is not None and D % run == 0 and device in ("H100", "H200")


@given(arguments(many))
def test_workspace_stays_under_64_mib_whatever_the_classes(problem):
    (N, C, D), options = problem
    result = plan(N, C, D, **options)
    most = 64 * MIB
    if isinstance(result.variant, Sm90Plan):
        # No segment is shorter than 256 rows. They need two padded copies of their features and a
        # float32 gradient, a tile with the rounded weights of its classes, and the rows' terms.
        most = max(most, 256 * (2 * 2 + 4) * (D + 63) + 2 * 128 * (256 + D + 7) + MIB)
    assert 0 < result.forward_workspace <= most
    assert 0 < result.backward_workspace <= most


@pytest.mark.parametrize(
    ("N", "C", "D"),
    [(65536, 100_000, 2048), (2**20, 1000, 128), (16384, 10**7, 512), (1024, 10**4, 16384)],
)
def test_many_rows_are_worked_on_in_segments(N, C, D):
    bf16 = {"dtype": torch.bfloat16, "weight_dtype": torch.float32, "device": "H200"}
    result = plan(N, C, D, **bf16)
    variant = result.variant
    assert result.workspace <= 64 * MIB
    assert variant.segments * variant.segment_rows >= N > (variant.segments - 1) * 256
    # The products fill the multiprocessors: the step takes little longer for each of its rows than
    # that of a few rows does.
    few = plan(variant.segment_rows, C, D, **bf16)
    assert few.variant.segments == 1
    seconds, alone = (p.forward_seconds + p.backward_seconds for p in (result, few))
    assert seconds <= 1.2 * variant.segments * alone


@pytest.mark.parametrize("N", [1, 256, 1000, 4096, 65536])
@pytest.mark.parametrize("D", [4, 512, 1024, 4096])
def test_usual_batches_stay_under_64_mib_on_hopper(N, D):
    bf16 = {"dtype": torch.bfloat16, "weight_dtype": torch.float32, "device": "H200"}
    for C in (1, 1000, 10**6, 10**8):
        result = plan(N, C, D, **bf16)
        assert isinstance(result.variant, Sm90Plan) and result.workspace <= 64 * MIB


@given(arguments(few))
def test_hopper_runs_16_bit_features_with_a_float32_weight(problem):
    (N, C, D), options = problem
    result = plan(N, C, D, **options)
    hopper = result.variant
    if not takes_hopper(D, **options):
        assert isinstance(hopper, Sm80Plan)
        return
    assert isinstance(hopper, Sm90Plan)
    rows = hopper.segment_rows
    assert hopper.segments * rows >= N > (hopper.segments - 1) * rows
    assert hopper.row_blocks * 256 >= rows > (hopper.row_blocks - 1) * 256
    assert hopper.tile_classes in (64, 128) and hopper.chunk % hopper.tile_classes == 0
    tiles = hopper.class_tiles
    assert tiles * hopper.tile_classes >= C > (tiles - 1) * hopper.tile_classes
    assert 1 <= hopper.statistics_blocks <= tiles
    assert hopper.row_blocks * hopper.statistics_blocks <= max(result.sms, hopper.row_blocks)
    assert result.backward_flops == (4.0 if result.kept else 6.0) * N * C * D
    if not result.kept:
        assert 1 <= hopper.gradient_blocks <= hopper.statistics_blocks
        return
    # What is kept and the workspace share the budget. A block of the gradient tile has all rows.
    assert options["backward"] and N <= 1024 and hopper.tile_classes == 64
    assert result.saved + result.backward_workspace <= 64 * MIB + 4 * (5 * N + C + 32 * N)
    assert result.saved >= 4 * N * C + (2 * C * D if hopper.kept_weights else 0)
    assert hopper.segments == hopper.chunks == 1
    assert hopper.gradient_classes % 16 == 0
    assert 1 <= hopper.gradient_blocks <= min(result.sms, -(-C // hopper.gradient_classes))


@given(arguments(st.one_of(many, few)))
def test_launches_traffic_and_tiles_add_up(problem):
    (N, C, D), options = problem
    result = plan(N, C, D, **options)
    assert result == plan(N, C, D, **options)
    variant = result.variant
    hopper = isinstance(variant, Sm90Plan)
    segments = variant.segments if hopper else 1
    # The last block of Hopper's small tiles merges up to 8192 partial results.
    small = hopper and segments == 1 and variant.tile_classes == 64
    merges = small and N * variant.statistics_blocks <= 8192
    assert result.forward_launches == 3 * segments - merges
    latency = not hopper and variant.latency
    launches = 4 if latency else segments * (2 + (2 if hopper else 3) * variant.chunks)
    if hopper and result.kept:
        launches = 3
    if not hopper and options["dtype"] == torch.float16:
        launches += variant.chunks  # each copies a chunk's weights as unit rows
    assert result.backward_launches == launches
    if not hopper:
        assert variant.row_tiles * variant.tile >= N > (variant.row_tiles - 1) * variant.tile
        classes = variant.class_splits * variant.tiles_per_split * variant.tile
        assert classes >= C > classes - (variant.tiles_per_split + 1) * variant.tile
    assert variant.chunks * variant.chunk >= C > (variant.chunks - 1) * variant.chunk
    assert variant.chunk % (64 if hopper else variant.class_tile) == 0
    assert latency <= (variant.chunks == 1)
    itemsize = 8 if options["dtype"] == torch.float64 else 4
    assert result.kept == 0 or (result.kept % 16 == 0 and result.kept >= C)
    assert result.saved == itemsize * ((5 * N + C + 15) // 16 * 16 + N * result.kept)
    assert result.forward_flops >= 2.0 * N * C * D
    assert result.backward_flops >= 4.0 * N * C * D
    reads = result.weight_copy == 0
    features, weight = options["dtype"].itemsize, options["weight_dtype"].itemsize
    if reads and not latency:
        floor = 2 * C * D * weight + 2 * N * D * features
        most = 1.15 * floor + N * result.kept * itemsize
        if not hopper and variant.chunk == variant.class_tile:
            # The smallest chunk may be too large for the cache: its weights are read again, and its
            # gradient tile is written once and read twice.
            most += C * D * weight + 3 * N * C * features
        if hopper and result.kept:
            floor = C * D * weight + 2 * N * D * features
            most = floor + 6 * C * (N + D) + N * result.kept * itemsize
        elif hopper:
            # The gradient tile and the rounded weights may be written once and read twice.
            # Each segment of rows reads the weights and adds to their gradient.
            most = floor + 6 * C * (N + D * segments) + (segments - 1) * 16 * C * D
        assert floor <= result.backward_hbm <= most
    for which in ("forward", "backward"):
        times = result.times(which)
        seconds = getattr(result, f"{which}_seconds")
        assert max(times.values()) <= seconds <= sum(times.values()) * (1 + 1e-9)
        assert times[result.limit(which)] == max(times.values())


def test_the_sizes_of_long_tailed_training_take_the_latency_plan_and_faces_the_other():
    bf16 = {"dtype": torch.bfloat16, "weight_dtype": torch.float32, "device": "A100"}
    for N, C, D in ((256, 1000, 512), (256, 8142, 2048)):
        small = plan(N, C, D, **bf16)
        assert small.variant.latency and small.kept >= C
        assert small.forward_launches == 3 and small.backward_launches == 4
    large = plan(1024, 10**6, 512, **bf16)
    assert not large.variant.latency and large.kept == 0 and large.variant.chunks > 1
    assert large.variant.class_tile == 128
    few_rows = plan(64, 10**6, 512, **bf16)
    assert not few_rows.variant.latency and few_rows.variant.class_tile == 64
    # float16 has no large tiles of classes, and of an L40S's multiprocessor they would take all.
    for other in ({"dtype": torch.float16}, {"device": "L40S"}):
        assert plan(1024, 10**6, 512, **bf16 | other).variant.class_tile == 64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_a_weight_that_kernels_do_not_read_is_copied(dtype, weight_dtype):
    result = plan(8, 10, 64, dtype=dtype, weight_dtype=weight_dtype, device="A100")
    half = (torch.float16, torch.bfloat16)
    read = weight_dtype == dtype or (dtype in half and weight_dtype == torch.float32)
    itemsize = 4 if dtype in half else dtype.itemsize
    assert result.weight_copy == (0 if read else 10 * 64 * itemsize)
    assert ("copy of the weight" in str(result)) == (not read)


def test_tf32_is_a_matter_of_float32_features_alone():
    for dtype in DTYPES:
        math = [plan(8, 9, 10, dtype=dtype, device="H100", allow_tf32=a).math for a in (0, 1)]
        assert (math == ["float32", "TF32"]) if dtype == torch.float32 else (math[0] == math[1])


@pytest.mark.parametrize(
    ("layout", "hopper", "hopper_of_16_bits"),
    [
        ((64, 1, True), True, True),
        ((68, 1, True), True, False),  # rows off 16 bytes, where elements have 2
        ((66, 1, True), False, False),  # rows off 16 bytes
        ((1, 512, True), False, False),  # transposed
        ((64, 1, False), False, False),  # first element off 16 bytes
        ((0, 1, True), False, False),  # one row for all classes
    ],
)
def test_what_is_kept_is_what_the_kernels_that_serve_a_layout_keep(
    layout, hopper, hopper_of_16_bits
):
    def kept(weight, gpu):
        return kept_products(1000, 64, torch.bfloat16, weight, layout, gpu)

    portable = kept(torch.float32, "A100")
    assert portable.most_rows > 2**30 and portable[1:] == (1, 0)
    # Hopper's kernels keep whole 32 rows, and float32 weights as 32 pairs of 16-bit numbers.
    assert kept(torch.float32, "H200") == ((1024, 32, 32) if hopper else portable)
    assert kept(torch.bfloat16, "H200") == ((1024, 32, 0) if hopper_of_16_bits else portable)


@pytest.mark.parametrize(
    ("weight", "dtype", "shape", "kept"),
    [
        (torch.float32, torch.bfloat16, (256, 8142, 2048), True),
        (torch.float32, torch.float16, (256, 8142, 2048), True),
        (torch.bfloat16, torch.bfloat16, (256, 8142, 2048), True),
        (torch.float16, torch.float16, (256, 8142, 2048), False),
        (torch.float32, torch.bfloat16, (256, 1000, 512), True),
        (torch.float32, torch.bfloat16, (1, 65, 64), True),
        (torch.float32, torch.bfloat16, (1024, 1000, 512), True),
        (torch.float32, torch.bfloat16, (1025, 1000, 512), False),
        (torch.float32, torch.bfloat16, (256, 128 * 132, 64), False),
        (torch.float32, torch.bfloat16, (256, 8142, 4096), False),
    ],
)
def test_hopper_keeps_products_of_few_rows_and_small_tiles_within_the_budget(
    weight, dtype, shape, kept
):
    result = plan(*shape, dtype=dtype, weight_dtype=weight, device="H200")
    assert (result.kept > 0) == kept
    if not kept:
        assert result.backward_launches >= 4
        return
    assert result.backward_launches == 3
    alone = plan(*shape, dtype=dtype, weight_dtype=weight, device="H200", backward=False)
    assert alone.saved < 1e6 and alone.kept == 0  # which then makes the products of both passes
    again = alone.forward_seconds + alone.backward_seconds
    assert result.forward_seconds + result.backward_seconds < again
    weights = shape[1] * shape[2] * 2 if weight == torch.float32 else 0
    assert result.saved + result.workspace <= 64 * MIB + 1e6
    assert result.saved >= shape[1] * shape[0] * 4 + weights
    assert ("rounded weights" in str(result)) == (weight == torch.float32)


@pytest.mark.parametrize("gpu", ["H100", "H200"])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
def test_it_pays_wherever_products_are_kept(weight, gpu):
    options = {"dtype": torch.bfloat16, "weight_dtype": weight, "device": gpu}
    kept = 0
    for N, C, D in itertools.product(
        (1, 64, 256, 257, 512, 513, 1024),
        (1, 100, 1000, 2000, 4000, 8142, 16000),
        (64, 256, 512, 1024, 2048, 4096),
    ):
        result, again = (plan(N, C, D, **options, backward=b) for b in (True, False))
        seconds = [p.forward_seconds + p.backward_seconds for p in (result, again)]
        kept += result.kept > 0
        assert seconds[0] < seconds[1] or not result.kept, (N, C, D)
    assert kept > 50


def test_the_rows_of_which_products_are_kept_are_as_many_as_the_budget_has_room_for():
    most = kept_products(
        8142, 2048, torch.bfloat16, torch.float32, (2048, 1, True), "H200"
    ).most_rows
    assert 256 < most < 1024
    for rows, kept in ((1, True), (most, True), (most + 1, False)):
        result = plan(
            rows, 8142, 2048, dtype=torch.bfloat16, weight_dtype=torch.float32, device="H200"
        )
        assert (result.kept > 0) == kept


def test_a_plan_without_backward_keeps_nothing():
    both, alone = (plan(64, 1000, 128, device="H200", backward=b) for b in (True, False))
    assert both.kept == 1008 and alone.kept == 0
    assert "backward" in str(both) and "backward" not in str(alone)


def numbers(text):
    return re.findall(r"\d+(?:\.\d+)?(?:e\+\d+)?", text)


def test_the_report_names_what_runs_and_what_limits_it():
    result = plan(256, 8142, 2048, dtype=torch.bfloat16, weight_dtype=torch.float32, device="B200")
    text, tiles = str(result), result.variant
    for words in (
        "[256, 8142, 2048], bfloat16 features, float32 weight, on B200",
        "latency",
        "all products",
        "matrix units",
        "GPU memory",
        "L2 cache",
        "launches",
        "workspace",
        f"limited by {result.limit('forward')}",
        f"tile {tiles.tile} x {tiles.tile}, grid {tiles.row_tiles} x {tiles.class_splits}",
        f"{result.forward_flops:.3g}",
    ):
        assert words in text
    assert str(tiles.input_splits) in numbers(text)
    assert max(map(len, text.splitlines())) <= 120
    assert "throughput: " in str(plan(1024, 10**6, 512, device="H200"))
    bf16 = {"dtype": torch.bfloat16, "weight_dtype": torch.float32}
    hopper = plan(1024, 10**6, 512, device="H200", **bf16)
    tiles = hopper.variant
    for words in (
        f"Hopper: {tiles.chunks} chunks of {tiles.chunk} classes",
        "no products",
        f"256 rows x 128 classes, grid 4 x {tiles.statistics_blocks}",
        "gradient tile",
        "198 tiles of 128 classes x 256 features",
        f"16 tiles of 128 rows x 256 features, each by up to {tiles.partial_features} blocks",
    ):
        assert words in str(hopper)
    assert max(map(len, str(hopper).splitlines())) <= 120
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.sms = 1


def test_the_cpu_has_a_plan_too():
    result = plan(256, 8142, 2048, device="cpu")
    assert isinstance(result, CpuPlan)
    assert result == plan(256, 8142, 2048, device=torch.device("cpu"))
    assert result.class_block % 16 == 0 and result.kept == 8144
    assert result.saved == 4 * ((5 * 256 + 8142 + 15) // 16 * 16 + 256 * result.kept)
    tasks, products = "32 rows x 512 classes", "by PyTorch"
    if result.own_products:
        tasks, products = "16 rows x 128 classes", "our own"
    for words in (f"of {result.class_block} classes", tasks, products, "all products"):
        assert words in str(result)
    assert plan(256, 10**6, 2048, device="cpu").backward_flops > 5.8 * 256 * 10**6 * 2048


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("N", [1, 256, 5000, 16384, 40000])
def test_what_the_cpu_keeps_and_its_tile_stay_under_64_mb(N, dtype):
    result = plan(N, 10**6, 128, dtype=dtype, device="cpu")
    itemsize = 4 if dtype == torch.float32 else 8
    tile = itemsize * N * result.class_block
    terms = itemsize * (10**6 + 3 * N)  # the numbers per class and per row
    assert result.saved + tile - terms <= 56e6 or result.kept == 0


@pytest.mark.parametrize("N", [16, 1024, 20000])
def test_many_threads_share_a_bounded_tile_on_the_cpu(threads, N):
    threads(256)
    assert 4 * N * plan(N, 10**6, 128, device="cpu").class_block <= 32 << 20


def test_the_default_device_is_one_that_is_here():
    here = CudaPlan if ops.HAS_CUDA and torch.cuda.is_available() else CpuPlan
    assert isinstance(plan(4, 5, 6), here)


@pytest.mark.parametrize(
    ("sizes", "options", "error", "message"),
    [
        ((0, 5, 6), {}, ValueError, "N must be at least 1, got 0"),
        ((4, -5, 6), {}, ValueError, "C must be at least 1, got -5"),
        ((2**30, 2**30, 6), {}, ValueError, "N x C, .* must be at most 2\\^53, got"),
        ((4, 10**20, 6), {}, ValueError, "must be at most 2\\^53, got"),
        ((2**31 - 1, 5, 6), {"device": "H200"}, ValueError, "N must be at most 2147483391 on CUDA"),
        ((4, 5, 6.0), {}, TypeError, "D must be an int, got float"),
        ((4, 5, 6), {"dtype": torch.int64}, ValueError, "dtype must be .* got torch.int64"),
        (
            (4, 5, 6),
            {"weight_dtype": torch.int8},
            ValueError,
            "weight_dtype must be .* got torch.int8",
        ),
        (
            (4, 5, 6),
            {"device": "V100"},
            ValueError,
            "device must be cpu, cuda or one of .*H200.* got V100",
        ),
        ((4, 5, 6), {"device": "meta"}, ValueError, "device must be .* got meta"),
    ],
)
def test_bad_arguments_are_refused(sizes, options, error, message):
    with pytest.raises(error, match=message):
        plan(*sizes, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_here_is_refused():
    with pytest.raises(ValueError, match="one that is here or a GPU's name, got cuda"):
        plan(4, 5, 6, device="cuda")


def test_the_command_prints_the_plan_and_refuses_what_plan_refuses():
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "tvmf_ext", "plan", *arguments],
            cwd=Path(ops.__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=120,
        )

    flags = ["--dtype", "bfloat16", "--weight-dtype", "float32", "--gpu", "H200"]
    done = run("256", "8142", "2048", *flags)
    options = {"dtype": torch.bfloat16, "weight_dtype": torch.float32, "device": "H200"}
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(plan(256, 8142, 2048, **options))
    refused = run("256", "8142", "2048", "--gpu", "V100")
    assert refused.returncode == 2
    assert "H200" in refused.stderr and "got V100" in refused.stderr


def test_a_reader_who_leaves_early_gets_no_traceback():
    command = [sys.executable, "-m", "tvmf_ext", "plan", "256", "1000", "512", "--gpu", "H200"]
    root = Path(ops.__file__).parents[1]
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
