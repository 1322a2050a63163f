"""Counts what the portable kernels execute in a step of their main loops and after a tile, in the
code that nvcc made for an A100.

python -m tests.cuda.test_sass_sm80    prints the counts
"""

import functools
import heapq
import re
from collections import Counter

import pytest

from tests.cuda import test_sass as sass

# A warp's products in a step, and at most so many instructions for each in 16-bit kernels: with
# 16-bit weights, and with float32 weights that the block rounds.
MAIN_LOOP = {
    "row_statistics": (64, 5.7, 6.5),
    "gradient tile": (64, 3.5, 6.0),
    "weight gradient": (64, 3.5, 3.5),
    "input_gradient": (64, 3.6, 4.8),
}
# At most so many instructions for an element of a tile outside its main loop, where neither ranks
# nor gradients of biases or kappa are wanted.
EPILOGUE = {"row_statistics": 27, "gradient tile": 41}
ELEMENTS = {"row_statistics": 128, "gradient tile": 128}  # of a thread


def shortest_tour(blocks, follows, start, stops):
    """The blocks from `start` through one block of each of `stops` in turn, without the first, so
    that the whole has the fewest instructions; None where there is none."""
    ends = {start: (0, ())}
    for stop in stops:
        best = {}
        queue = [(length, block, path) for block, (length, path) in ends.items()]
        heapq.heapify(queue)
        ends = {}
        while queue:
            length, at, path = heapq.heappop(queue)
            for after in follows[at]:
                longer = length + len(blocks[after])
                if longer < best.get(after, longer + 1):
                    best[after] = longer
                    heapq.heappush(queue, (longer, after, (*path, after)))
                    if after in stop:
                        ends[after] = longer, (*path, after)
    return min(ends.values())[1] if ends else None


def find(blocks, pattern, least=1):
    """The blocks in which a pattern occurs so often."""
    return {
        i for i, block in enumerate(blocks) if len(re.findall(pattern, "\n".join(block))) >= least
    }


def weight_gradient(block):
    """Whether a block of products is that of the weight gradient, whose operands both lie
    transposed."""
    return "LDSM.16.MT88" in "".join(block) and "LDSM.16.M88" not in "".join(block)


def step_of(blocks, follows, products, rounded):
    """The instructions of a step of a main loop: products, the rounding of weights where there is
    one, and the copies of two operands, which are the blocks of several copies each."""
    copies = find(blocks, "LDGSTS", 2)
    rounds = [find(blocks, r"F2FP(?s:.*)STS\.64")] if rounded else []
    tours = [
        shortest_tour(blocks, follows, products, [*rounds, {first}, copies - {first}, {products}])
        for first in copies
    ]
    counts = [sass.count_operations(blocks[i] for i in tour) for tour in tours if tour]
    return min(counts, key=Counter.total)


def tile_of(blocks, follows, products, elements):
    """The instructions from the last products of a tile of cosines to the first of the next. A jump
    over a few exponentials leaves out a row beyond the last, and is not taken."""
    exponentials = [len(re.findall(r"MUFU\.EX2", "\n".join(block))) for block in blocks]
    inside = [
        [j for j in after if not 0 < sum(exponentials[i + 1 : j]) < elements / 2]
        for i, after in enumerate(follows)
    ]
    via = {i for i, count in enumerate(exponentials) if count}
    path = sass.shortest_path(blocks, inside, products, via, products)
    return sass.count_operations(blocks[i] for i in path)


@functools.cache
def counts():
    """Instructions of a step and of the end of a tile, by kernel and dtypes."""
    found = {}
    for arch, text in sass.disassemble():
        if arch != "sm_80":
            continue
        parts = re.split(r"^\.text\.(\w+):$", text, flags=re.M)
        for symbol, code in zip(parts[1::2], parts[2::2], strict=True):
            name, mix, tile = sass.instance(symbol)
            if name not in sass.TILED or mix.removesuffix("-fp32") not in ("bf16", "fp16"):
                continue
            if tile == 64:
                continue
            blocks, follows = sass.control_flow(code)
            for products in find(blocks, r"\bHMMA", 16):
                part = name
                if name == "class_gradient":
                    part = (
                        "weight gradient" if weight_gradient(blocks[products]) else "gradient tile"
                    )
                rounded = mix.endswith("-fp32") and part != "weight gradient"
                step = step_of(blocks, follows, products, rounded)
                tile_end = (
                    tile_of(blocks, follows, products, ELEMENTS[part]) if part in EPILOGUE else None
                )
                found[part, mix] = step, tile_end
    return found


@pytest.fixture(scope="module")
def found():
    if not sass.build_info().cuda:
        pytest.skip("the library is built without CUDA")
    if not (sass.find_tool("cuobjdump") and sass.find_tool("nvdisasm")):
        pytest.skip("needs cuobjdump and nvdisasm")
    sass.kernels_of("8.0")
    return counts()


def products_of(step):
    return sum(n for name, n in step.items() if name.startswith("HMMA"))


def test_a_step_of_the_main_loop_is_mostly_products(found):
    assert len(found) == 11  # class_gradient has large tiles in bfloat16 alone
    for (part, mix), (step, _) in found.items():
        products, *most = MAIN_LOOP[part]
        assert products_of(step) == products, (part, mix, step)
        assert step.total() / products <= most[mix.endswith("-fp32")], (part, mix, step)


def test_the_end_of_a_tile_takes_few_instructions_an_element(found):
    for (part, mix), (_, end) in found.items():
        if part in EPILOGUE:
            elements = ELEMENTS[part]
            exponentials = sum(n for name, n in end.items() if name.startswith("MUFU.EX2"))
            assert elements <= exponentials < 1.1 * elements, (part, mix, "another path was found")
            assert end.total() / elements <= EPILOGUE[part], (part, mix, end)


def test_a_tour_visits_every_stop():
    blocks = [["A"], ["B"] * 5, ["C"], ["D"] * 2]
    follows = [[1, 2], [3], [3], [0]]
    assert shortest_tour(blocks, follows, 0, [{3}, {0}]) == (2, 3, 0)
    assert shortest_tour(blocks, follows, 0, [{1}, {0}]) == (1, 3, 0)
    assert shortest_tour(blocks, follows, 0, [{2}, {1}]) == (2, 3, 0, 1)
    assert shortest_tour(blocks, [[1], [], [3], [0]], 0, [{3}]) is None


if __name__ == "__main__":
    for (part, mix), (step, end) in sorted(counts().items()):
        print(part, mix, step.total(), products_of(step), end and end.total())
