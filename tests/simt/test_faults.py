"""Tests of the emulator: it finds each planted fault, passes the right version of each kernel, and
its counts are those made by hand. The kernels are in faults.cu."""

import subprocess
import sys

import numpy as np
import pytest

from tests import simt

X = np.arange(1, 257, dtype=np.float32)
LINE = r"faults\.cu:\d+"
THREAD = r"block \(\d+, 0, 0\) thread \d+"


def run(name, x=X, outputs=32, *, seed=0, check_races=True, count=True, **launch):
    module = simt.load()
    module.reset()
    module.configure(seed, check_races, count)
    return module.run_fault(name, x, outputs, **launch)


def counted(name, *arguments, **launch):
    run(name, *arguments, **launch)
    (report,) = simt.load().reports()
    return report


def race(memory, first, second):
    access = rf"{THREAD} \({{}} at {LINE}\)"
    return rf"race on {memory} \+ \d+: {access.format(first)} and {access.format(second)}"


FAULTS = {
    "block_sum": (
        {"threads": 256, "shared_bytes": 1024},
        race("shared memory", "read|write", ".*"),
    ),
    "write_word": ({"shared_bytes": 128}, race("shared memory", "write", "write")),
    "write_half_word": ({"shared_bytes": 64}, race("shared memory", "write", "write")),
    "warp_exchange": ({"shared_bytes": 128}, race("shared memory", ".*", ".*")),
    "async_neighbour": ({"shared_bytes": 512}, race("shared memory", ".*", "cp.async|read")),
    "async_alignment": ({"shared_bytes": 512}, f"cp.async address is not aligned.* at {LINE}"),
    "write_across_blocks": ({"grid": 5}, race("y", "write", "write")),
    "count_threads": ({"grid": 5}, race("y", "read", "write")),
    "shared_extent": ({"shared_bytes": 128}, f"write at {LINE} outside shared memory of 128 bytes"),
    "global_extent": ({"x": X[:32]}, f"read at {LINE} outside every buffer"),
    "deadlock": (
        {"threads": 64, "outputs": 64},
        f"deadlock: threads 0-15: __syncthreads at {LINE}; threads 16-63: exited",
    ),
    "divergent_collectives": (
        {},
        f"lanes of a warp meet at different collectives: .*: a (shuffle|vote) at {LINE}",
    ),
    "early_exit": ({}, f"deadlock: threads 0-6, 8-31: a shuffle at {LINE}; threads 7: exited"),
    "named_barriers": (
        {"threads": 64, "outputs": 64, "shared_bytes": 256},
        race("shared memory", ".*", ".*"),
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_the_right_kernel_passes(name, seed):
    launch, message = FAULTS[name]
    right = run(name, seed=seed, **launch)
    np.testing.assert_array_equal(right, run(name, seed=seed + 100, **launch))
    with pytest.raises(RuntimeError, match=f"^faults::.*::{name}: (?s:.*){message}"):
        run(name, seed=seed, right=False, **launch)
    np.testing.assert_array_equal(right, run(name, seed=seed, **launch))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault", range(3), ids=["no release", "no acquire", "no barrier"])
def test_a_last_block_needs_fences_and_a_barrier(fault, seed):
    launch = {"seed": seed, "grid": 4, "threads": 64, "outputs": 1 + 5 * 64, "shared_bytes": 4}
    right = run("last_block", **launch)
    np.testing.assert_array_equal(right[-64:], 4 * X[:64] + 6)
    message = race("y", "read", "write")
    with pytest.raises(RuntimeError, match=f"^faults::.*::last_block: (?s:.*){message}"):
        run("last_block", argument=fault, right=False, **launch)


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize(
    ("argument", "access"),
    [(0, "read"), (1, "write"), (2, "read")],
    ids=["global", "write", "shared"],
)
def test_a_misaligned_address_is_found(size, argument, access):
    launch = {"outputs": 128, "shared_bytes": 528, "argument": argument, "count": False}
    run(f"misaligned_{size}", **launch)
    memory = "shared memory" if argument else "x"
    with pytest.raises(
        RuntimeError,
        match=rf"^faults::.*::misaligned.*: block \(0, 0, 0\) thread 5: misaligned address: "
        rf"{access} at {LINE} of {size} bytes at {memory} \+ {5 * 16 + size // 2}$",
    ):
        run(f"misaligned_{size}", right=False, **launch)


@pytest.mark.parametrize("name", ["async_without_wait", "async_pending"])
def test_a_copy_is_nan_until_its_wait(name):
    launch = {"outputs": 64, "shared_bytes": 1024}
    last = slice(1, None, 2) if name == "async_pending" else slice(0, 32)
    right = run(name, **launch)
    wrong = run(name, right=False, **launch)
    assert np.isfinite(right[last]).all()
    assert np.isnan(wrong[last]).all()
    if name == "async_pending":
        np.testing.assert_array_equal(right, np.stack([X[:128:4], X[128::4]], 1).ravel())
        np.testing.assert_array_equal(wrong[::2], right[::2])


@pytest.mark.parametrize("bytes_read", [0, 4, 6, 16])
def test_a_partial_copy_is_padded_with_zeros(bytes_read):
    y = run("async_ragged", outputs=128, shared_bytes=512, argument=bytes_read)
    expected = np.frombuffer(X[:4].tobytes()[:bytes_read].ljust(16, b"\0"), np.float32)
    np.testing.assert_array_equal(y.reshape(32, 4), np.tile(expected, (32, 1)))


def test_unwritten_memory_is_nan():
    assert np.isnan(run("write_across_blocks", grid=5)[5:]).all()
    assert np.isnan(run("read_shared_4", shared_bytes=128, argument=1)).all()


def test_the_seed_orders_threads_and_blocks():
    orders = {run("arrival_order", seed=s, shared_bytes=4).tobytes() for s in range(5)}
    again = {run("arrival_order", seed=s, shared_bytes=4).tobytes() for s in range(5)}
    launch = {"threads": 256, "shared_bytes": 1024}
    sums = {float(run("block_sum", seed=s, **launch)[0]) for s in range(5)}
    assert len(orders) == 5
    assert orders == again
    assert sums == {float(X.sum())}


def test_shuffles_and_votes():
    y = run("shuffles", X[:64] - 32, 8 * 64, threads=64).reshape(8, 2, 32)
    v = (X[:64] - 32).reshape(2, 32)
    lane = np.arange(32)
    np.testing.assert_array_equal(y[0], v[:, lane ^ 5])
    np.testing.assert_array_equal(y[1], v[:, np.where(lane < 29, lane + 3, lane)])
    np.testing.assert_array_equal(y[2], v[:, lane // 8 * 8 + 3])
    assert (y[3] == 1).all()
    np.testing.assert_array_equal(y[4], v > 0)
    assert (y[5] == 0).all() and (y[6] == 1).all()
    np.testing.assert_array_equal(
        y[7], np.where(lane % 16 < 15, lane + 1, lane) + np.array([[0], [32]])
    )


def bf16(values):
    """Rounds towards zero, and returns the bits and their values."""
    bits = values.view(np.uint32) & 0xFFFF0000
    return (bits >> 16).astype(np.uint16), bits.view(np.float32)


def f16(values):
    return values.astype(np.float16), values.astype(np.float16).astype(np.float32)


def tf32(values):
    """Returns the bits unchanged, because the hardware ignores the low ones, and their values."""
    return values, (values.view(np.uint32) & 0xFFFFE000).view(np.float32)


@pytest.mark.parametrize(
    ("kind", "convert", "depth", "transposed"),
    [
        (0, bf16, 16, False),
        (0, bf16, 16, True),
        (1, f16, 16, False),
        (1, f16, 16, True),
        (2, tf32, 8, False),
    ],
)
def test_fragments_make_a_matrix_product(kind, convert, depth, transposed):
    random = np.random.default_rng(kind)
    a_bits, a = convert(random.standard_normal((16, depth), dtype=np.float32))
    b_bits, b = convert(random.standard_normal((8, depth), dtype=np.float32))
    b_stored = b_bits.T if transposed else b_bits
    x = np.frombuffer(a_bits.tobytes() + b_stored.tobytes(), np.uint8)
    y = run("matrix_product", x, 128, argument=kind + 4 * transposed, shared_bytes=4096)
    expected = 1 + a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_allclose(y.reshape(16, 8), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan, 6e-8, 65504.0])
def test_float16_covers_its_range(special):
    a = np.zeros((16, 16), np.float16)
    a[3, 5] = special
    x = np.frombuffer(a.tobytes() + np.eye(8, 16, dtype=np.float16).tobytes(), np.uint8)
    y = run("matrix_product", x, 128, argument=1, shared_bytes=4096).reshape(16, 8)
    expected = 1 + a.astype(np.float32)[:, :8]
    if not np.isfinite(special):  # inf * 0 is NaN
        expected[3, :5] = expected[3, 6:] = np.nan
    np.testing.assert_array_equal(y, expected)


# Counted by hand: how many distinct words the lanes read from the busiest bank.
@pytest.mark.parametrize(
    ("size", "stride", "wavefronts", "conflicts"),
    [
        (4, 0, 1, 0),  # all lanes read one word
        (4, 1, 1, 0),
        (4, 2, 2, 1),
        (4, 32, 32, 31),
        (4, 33, 1, 0),
        (8, 1, 2, 0),  # a wavefront serves at most a half-warp
        (8, 2, 4, 2),
        (8, 16, 32, 30),
        (16, 1, 4, 0),  # a wavefront serves at most a quarter-warp
        (16, 8, 32, 28),
        (16, 9, 4, 0),
    ],
)
def test_bank_conflicts(size, stride, wavefronts, conflicts):
    report = counted(
        f"read_shared_{size}",
        X,
        32 * size // 4,
        argument=stride,
        shared_bytes=32 * size * 10 + 4096,
    )
    assert (report.shared_wavefronts, report.bank_conflicts) == (wavefronts, conflicts)
    (site,) = [s for s in report.sites if s.kind == "shared read"]
    assert (site.requests, site.conflicts) == (1, conflicts)
    assert site.where.startswith("faults.cu:")


def test_bank_conflicts_of_matrices():
    assert counted("read_matrices", shared_bytes=4096).bank_conflicts == 0
    report = counted("read_matrices", shared_bytes=4096, right=False)
    assert (report.shared_wavefronts, report.bank_conflicts) == (4 * 8, 4 * 7)
    assert report.load_matrix == 1


@pytest.mark.parametrize(
    ("size", "stride", "sectors"),
    [(4, 0, 1), (4, 1, 4), (4, 2, 8), (4, 8, 32), (16, 1, 16), (16, 2, 32)],
)
def test_sectors(size, stride, sectors):
    x = np.zeros(32 * size * max(stride, 1), np.uint8)
    report = counted(f"read_global_{size}", x, 32 * size // 4, argument=stride, threads=32, grid=1)
    assert report.global_read_bytes == report.global_write_bytes == 32 * size
    assert report.global_read_sectors == report.global_unique_read_sectors == sectors
    assert report.global_write_sectors == report.global_unique_write_sectors == size


def test_lanes_in_the_same_round_of_a_loop_share_a_request():
    report = counted("divergent_reads")
    (reads,) = [s for s in report.sites if s.kind == "global read"]
    assert reads.requests == 31
    assert reads.bytes == 4 * sum(range(32))
    assert reads.sectors == 31
    assert report.global_unique_read_sectors == 4


def test_counts_of_instructions():
    report = counted("many_products", X, 8 * 64, argument=5, threads=64, shared_bytes=1024)
    assert (report.mma, report.load_matrix, report.barriers) == (2 * 5 * 8, 2 * 5 * 2, 1)
    assert report.kernel.endswith("::many_products")
    assert (report.threads, report.shared_bytes, report.grid) == (64, 1024, [1, 1, 1])


@pytest.mark.parametrize("name", ["shared_extent", "global_extent"])
def test_address_sanitizer_finds_accesses_out_of_bounds(name):
    launch = FAULTS[name][0]
    program = (
        "import sys, numpy as np; from tests import simt; module = simt.load('simt_asan')\n"
        f"x = np.arange({launch.get('x', X).size}, dtype=np.float32)\n"
        f"for right in (True, False): module.run_fault({name!r}, x, 32, right=right,"
        f" shared_bytes={launch.get('shared_bytes', 0)}); print(right, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=simt.asan_environment(), capture_output=True, text=True
    )
    assert done.stdout.split() == ["True"], done.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert f"in {name}" in done.stderr and "faults.cu:" in done.stderr
