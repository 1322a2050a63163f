"""Tests of the emulator's mbarriers, tensor copies and wgmma: they do what hardware does, and each
planted fault is found. The kernels are in faults_sm90.cu."""

import subprocess
import sys

import numpy as np
import pytest

from tests import simt

LINE = r"faults_sm90\.cu:\d+"
NOTHING = np.zeros(())
BOX = 8192


def run(name, a=NOTHING, b=NOTHING, outputs=32, *, seed=0, check_races=True, count=True, **launch):
    module = simt.load()
    module.reset()
    module.configure(seed, check_races, count)
    return module.run_fault_sm90(name, a, b, outputs, **launch)


def fails(message, name, *arguments, **launch):
    """The kernel with its fault planted raises this message."""
    with pytest.raises(
        RuntimeError, match=f"(?s)^faults::.*::{name.split('_bf16')[0]}.*: .*({message})"
    ):
        run(name, *arguments, right=False, **launch)


def floats(rows, cols, seed=0):
    return np.random.default_rng(seed).integers(-8, 8, (rows, cols)).astype(np.float32)


def swizzled(box):
    """Moves chunk c, of 16 bytes, in line i, of 128 bytes, to c ^ i % 8, as a copy does."""
    chunks = box.reshape(len(box), 8, -1)
    out = np.empty_like(chunks)
    for i, line in enumerate(chunks):
        out[i, np.arange(8) ^ i % 8] = line
    return out.reshape(box.shape)


@pytest.mark.parametrize("col", [0, 32, 5, -3, 80, 100, 200, -40])
@pytest.mark.parametrize("row", [0, 30, -5, 60, 200, -80])
def test_copies_of_boxes(col, row):
    """A box is zero outside the matrix, also between its last column and the end of its rows."""
    a = floats(70, 104)[:, :102]
    y = run("copy_box", a, outputs=64 * 32, argument=[col, row, 0, 0], shared_bytes=BOX + 8)
    padded = np.zeros((400, 500), np.float32)
    padded[100:170, 100:202] = a
    expected = padded[100 + row : 164 + row, 100 + col : 132 + col]
    np.testing.assert_array_equal(y.reshape(64, 32), swizzled(expected))
    (report,) = simt.load().reports()
    inside = max(0, min(row + 64, 70) - max(row, 0)) * max(0, min(col + 32, 102) - max(col, 0))
    assert report.global_read_bytes == 4 * inside
    assert (report.tensor_copies, report.tensor_copy_bytes) == (1, BOX)


def test_a_lone_thread_waits_for_its_own_copy():
    """The copy arrives as the thread waits, which makes the thread itself the next one to run."""
    a = floats(64, 32)
    for seed in range(8):
        y = run("copy_box", a, outputs=64 * 32, seed=seed, threads=1, shared_bytes=BOX + 8)
        np.testing.assert_array_equal(y.reshape(64, 32), swizzled(a))


@pytest.mark.parametrize("box", [8, 128, 256])
def test_boxes_of_any_height(box):
    a = floats(300, 64).astype(np.float16)
    y = run(
        "copy_box",
        a,
        outputs=box * 32,
        box_a=box,
        argument=[0, 3, 0, 0],
        shared_bytes=box * 128 + 8,
    )
    np.testing.assert_array_equal(y.view(np.float16).reshape(box, 64), swizzled(a[3 : 3 + box]))


@pytest.mark.parametrize("seed", range(3))
def test_a_read_without_waiting_for_the_copy_is_found(seed):
    a, launch = floats(64, 32), {"outputs": 64 * 32, "shared_bytes": BOX + 8, "seed": seed}
    race = rf"race on shared memory.*\(read at {LINE}\) and .* a copy \(tensor copy at {LINE}\)"
    fails(f"({race}|exits before its copy has arrived)", "copy_box", a, **launch)


@pytest.mark.parametrize(
    ("wrong", "launch"),
    [
        ("stride", {"a": np.zeros((64, 33), np.float32)[:, :32]}),
        ("box", {"a": np.zeros((64, 32), np.float32), "box_a": 257}),
        ("box", {"a": np.zeros((64, 32), np.float32), "box_cols": 16}),
    ],
)
def test_impossible_maps_are_refused(wrong, launch):
    with pytest.raises(ValueError, match="invalid argument"):
        run("copy_box", shared_bytes=BOX + 8, **launch)


def test_the_destination_of_a_copy_must_be_aligned():
    launch = {"shared_bytes": 2 * BOX + 8}
    run("copy_alignment", floats(64, 32), **launch)
    fails(f"not aligned to 1024 at {LINE}", "copy_alignment", floats(64, 32), **launch)


# A launch of the kernel `ring`, and its faults: numbers as in faults_sm90.cu, and messages.
RING = {"outputs": 2 * 64, "grid": 2, "threads": 96, "shared_bytes": 3 * BOX + 48}
RING_FAULTS = [
    (1, r"race on shared memory.* a copy \(tensor copy .*|phase has ended, too"),
    (2, r"race on shared memory.* a copy \(tensor copy |more arrivals than the 1 of the mbarrier"),
    (3, r"race on shared memory.* and .* a copy \(tensor copy "),
    (
        4,
        rf"deadlock: .*: barrier_wait at {LINE} for parity . of shared memory \+ \d+ "
        r"\(\d phases ended, 1 of 3 arrivals and 0 bytes missing\)",
    ),
    (
        5,
        rf"deadlock: .*: barrier_wait at {LINE} for parity 0 of shared memory \+ 24576 "
        r"\(0 phases ended, 0 of 1 arrivals and 8192 bytes missing\)",
    ),
    (6, "deadlock: .*|more bytes are copied than expected"),
]


@pytest.mark.parametrize("seed", range(3))
def test_a_ring_of_stages(seed):
    a = floats(128, 400)
    y = run("ring", a, seed=seed, **RING)
    columns = np.zeros((2, 13 * 32), np.float32)
    columns[:, :400] = a.reshape(2, 64, 400).sum(1)
    np.testing.assert_array_equal(y.reshape(2, 2, 32).sum(1), columns.reshape(2, 13, 32).sum(1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("fault", "message"), RING_FAULTS)
def test_faults_of_a_ring(fault, message, seed):
    fails(message, "ring", floats(128, 400), argument=[fault, 0, 0, 0], seed=seed, **RING)


def bf16(values):
    """Rounds towards zero, and returns the bits and their values."""
    bits = values.view(np.uint32) & 0xFFFF0000
    return (bits >> 16).astype(np.uint16), bits.view(np.float32)


def f16(values):
    half = values.astype(np.float16)
    return half.view(np.uint16), half.astype(np.float32)


def operands(kind, cols, seed=0):
    """A [64, 64] and B [cols, 64], each as its bits and their values."""
    convert = {"bf16": bf16, "f16": f16}[kind]
    random = np.random.default_rng(seed)
    return [convert(random.standard_normal((n, 64), dtype=np.float32)) for n in (64, cols)]


def shared_of(cols):
    """The bytes of both operands and of an mbarrier."""
    return BOX + cols * 128 + 8


@pytest.mark.parametrize("cols", [128, 256])
@pytest.mark.parametrize("form", ["r0", "00", "01", "10", "11"])
@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("add", [0, 1])
def test_products(kind, form, cols, add):
    (a_bits, a), (b_bits, b) = operands(kind, cols)
    a_stored = a_bits.T.copy() if form[0] == "1" else a_bits
    b_stored = b_bits.T.copy() if form[1] == "1" else b_bits
    y = run(
        f"product_{kind}_{form}_{cols}",
        a_stored,
        b_stored,
        64 * cols,
        argument=[0, add, 0, 0],
        shared_bytes=shared_of(cols),
    )
    expected = add + a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_allclose(y.reshape(64, cols), expected, rtol=0, atol=3e-5)
    assert simt.load().reports()[0].wgmma == 4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, rf"exits without waiting for its wgmma at {LINE}"),
        (3, rf"registers of this wgmma may have changed since wgmma_fence at {LINE}"),
        (4, r"race on shared memory.*\((read|wgmma read) at .* a copy"),
        (5, "different numbers of wgmma"),
    ],
)
@pytest.mark.parametrize("form", ["r0", "00"])
def test_faults_of_products(form, fault, message, seed):
    (a, _), (b, _) = operands("bf16", 128)
    fails(
        message,
        f"product_bf16_{form}_128",
        a,
        b,
        64 * 128,
        argument=[fault, 0, 0, 0],
        shared_bytes=shared_of(128),
        seed=seed,
    )


def test_accumulators_are_nan_until_the_wait():
    (a, _), (b, _) = operands("bf16", 128)
    y = run(
        "product_bf16_00_128",
        a,
        b,
        64 * 128,
        argument=[2, 1, 0, 0],
        right=False,
        shared_bytes=shared_of(128),
    )
    assert np.isnan(y).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_stage_released_before_wgmma_has_read_it(seed):
    (a, _), (b, _) = operands("bf16", 128)
    launch = {
        "a": a,
        "b": b,
        "outputs": 128 * 64,
        "threads": 160,
        "seed": seed,
        "shared_bytes": 3 * BOX + 16,
    }
    assert np.isfinite(run("early_release", **launch)).all()
    fails(
        r"race on shared memory.*(wgmma read at .* a copy|a copy .* wgmma read at)",
        "early_release",
        **launch,
    )


@pytest.mark.parametrize("late", [0, 1])
def test_written_operands_need_a_fence(late):
    launch = {"outputs": 128 * 64, "shared_bytes": 3 * BOX}
    assert (run("written_operand", **launch) == 16).all()
    fails(
        f"no fence .* write of thread \\d+ at {LINE} and this wgmma read at {LINE}",
        "written_operand",
        argument=[late, 0, 0, 0],
        **launch,
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, f"no mbarrier was initialised at shared memory \\+ 0, used at {LINE}"),
        (2, "no mbarrier was initialised|race on shared memory"),
        (3, r"deadlock: .*1 phases ended, 1 of 32 arrivals and 0 bytes missing"),
    ],
)
def test_uses_of_mbarriers(fault, message):
    launch = {"outputs": 64, "threads": 64, "shared_bytes": 8}
    np.testing.assert_array_equal(run("barrier_uses", **launch), np.arange(64))
    fails(message, "barrier_uses", argument=[fault, 0, 0, 0], **launch)


def test_address_sanitizer_passes_right_kernels():
    program = (
        "import sys, numpy as np; from tests import simt; module = simt.load('simt_asan')\n"
        "from tests.simt import test_faults_sm90 as t; run = module.run_fault_sm90\n"
        "a, b = [bits for bits, _ in t.operands('bf16', 256)]\n"
        "run('product_bf16_00_256', a, b, 64 * 256, shared_bytes=t.shared_of(256))\n"
        "run('ring', t.floats(128, 400), t.NOTHING, **t.RING)\n"
        "print('passed')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=simt.asan_environment(), capture_output=True, text=True
    )
    assert done.stdout.split() == ["passed"], done.stderr
