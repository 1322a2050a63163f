"""The calls of the CUDA runtime and driver that the host makes in a step, counted by the emulator's
version of them. No kernel runs."""

import pytest

from tests import simt

# Launches and encoded tensor maps of a step with bfloat16 features and a float32 weight.
CALLS = {
    (256, 1000, 512): (5, 6),
    (256, 8142, 2048): (6, 6),
    (1024, 21841, 768): (11, 11),
    (1024, 10**6, 512): (163, 11),
}
PORTABLE_LAUNCHES = dict(zip(CALLS, (7, 7, 14, 362), strict=True))


@pytest.fixture
def module():
    loaded = simt.load()
    loaded.configure(execute=False)
    yield loaded
    loaded.configure()


def calls(module, shape, capability):
    module.reset()
    module.call_step(*shape, capability)
    return module.calls()


@pytest.mark.parametrize("shape", CALLS, ids=str)
def test_a_step_of_hopper(module, shape):
    """A kind of map is encoded once, and thrice more where the last chunk is smaller."""
    first, second = (calls(module, shape, 90) for _ in range(2))
    assert (second["launches"], second["maps"]) == CALLS[shape]
    assert first["launches"] == second["launches"] and first["maps"] == second["maps"]
    # statistics, a kernel of gradients and the products may have more than 48 KiB of shared memory
    # from the first step of the process on.
    assert first["attributes_set"] == first["attributes_read"] <= 3
    assert second["attributes_set"] == second["attributes_read"] == 0


@pytest.mark.parametrize("shape", CALLS, ids=str)
def test_a_step_of_the_portable_path(module, shape):
    first, second = (calls(module, shape, 80) for _ in range(2))
    assert second["launches"] == PORTABLE_LAUNCHES[shape] and second["maps"] == 0
    assert first["attributes_set"] <= 4 and second["attributes_set"] == 0


def test_segments_of_rows_make_maps_for_each(module):
    counted = calls(module, (65536, 100_000, 2048), 90)
    assert counted["launches"] == 32 * (3 + 2 + 2 * 49)
    assert counted["maps"] <= 32 * 11
