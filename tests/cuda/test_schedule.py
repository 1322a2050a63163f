"""How the blocks of Hopper's products share the tiles of dw and dx (csrc/cuda/sm90/schedule.h)."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import simt

SIZES = st.tuples(
    st.integers(1, 3000),  # rows
    st.integers(1, 3000),  # features
    st.integers(1, 20000),  # classes
    st.integers(1, 200),  # multiprocessors
    st.integers(1, 12),  # partial sums of dx
)


def parts_of(schedule):
    """For each tile of dx the (block, steps) of its parts."""
    count, steps = schedule["features"]
    parts = [[] for _ in range(count)]
    for block, (_, _, begin, end, _) in enumerate(schedule["blocks"]):
        while begin < end:
            tile = begin // steps
            part = min(end, (tile + 1) * steps) - begin
            parts[tile].append((block, part))
            begin += part
    return parts


@given(SIZES)
def test_every_tile_and_step_is_made_once(sizes):
    rows, features, classes, sms, most_partials = sizes
    schedule = simt.load().product_schedule(*sizes)
    blocks = schedule["blocks"]
    assert 1 <= len(blocks) <= sms
    cols = -(-features // 256)
    assert schedule["weight"] == (-(-classes // 128) * cols, -(-rows // 64))
    assert schedule["features"] == (-(-rows // 128) * cols, -(-classes // 64))
    for first, last, count in (
        (0, 1, schedule["weight"][0]),
        (2, 3, math.prod(schedule["features"])),
    ):
        assert blocks[0][first] == 0 and blocks[-1][last] == count
        assert all(one[last] == next_one[first] for one, next_one in pairwise(blocks))
        assert all(block[first] <= block[last] for block in blocks)
    parts = parts_of(schedule)
    assert schedule["parts"] == sum(map(len, parts))
    assert schedule["partials"] == max(map(len, parts))
    assert schedule["partials"] <= most_partials or schedule["whole"]
    assert not schedule["whole"] or schedule["partials"] == 1


@given(SIZES)
def test_the_parts_of_a_tile_have_partial_sums_of_their_own(sizes):
    schedule = simt.load().product_schedule(*sizes)
    turns = [block[4] for block in schedule["blocks"]]
    for parts in parts_of(schedule):
        mine = [turns[block] for block, _ in parts]
        assert mine == list(range(mine[0], mine[0] + len(parts)))


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ((1024, 512, 12672, 132, 10), 1.05),
        ((1024, 768, 8448, 132, 7), 1.05),
        ((256, 2048, 8142, 132, 9), 1.1),
        ((1024, 4096, 3072, 132, 1), 1.05),
        ((1024, 2048, 4224, 132, 3), 1.2),
    ],
    ids=str,
)
def test_the_longest_block_has_little_more_than_its_share(sizes, most):
    schedule = simt.load().product_schedule(*sizes)
    weight, features = schedule["weight"], schedule["features"]
    share = (math.prod(weight) + math.prod(features)) / len(schedule["blocks"])
    assert share <= schedule["steps"] <= most * share
