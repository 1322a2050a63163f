"""Checks the code that nvcc made of the kernels, read from the installed library: its registers,
shared memory and instructions against the sources and the tile table of docs/measurements.md.

python -m tests.cuda.test_sass    prints that table
"""

import functools
import heapq
import importlib.util
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tests import problem as problems
from tests import simt
from tests.cuda import test_emulated_sm90 as hopper
from tests.cuda.test_emulated import CHUNKED, LARGE_CLASSES, MIXES, SMALL, make
from tvmf_ext import _C, build_info

CAPABILITIES = ("8.0", "9.0")  # the kernels are tuned for these; a build can have others
DOCUMENT = Path(__file__).parents[2] / "docs" / "measurements.md"
TILED = ("row_statistics", "class_gradient", "input_gradient")
# Hopper's own kernels, and for each the numbers of rows of a tile that a warpgroup can have. The
# instances named "prior" have a prior in the logits; those named "all" also have biases, and make
# sums and ranks, or the gradients of kappa and bias.
TERMS = ("", ", prior", ", all")
PRIOR = ("statistics, prior", "gradient, prior")
HOPPER = {
    **{kernel + terms: (128, 256) for kernel in ("statistics", "gradient") for terms in TERMS},
    **{"kept_gradient" + terms: (0,) for terms in TERMS},
    "products": (0,),
}
# At most so many instructions an element of a tile of 64 x 256, with all that belongs to the tile
# but its main loop: in bfloat16 and in float16, whose statistics also find the largest logit.
EPILOGUE = {
    "statistics": (13, 14.1),
    "statistics, prior": (14.1, 15),
    "gradient": (18.7, 18.9),
    "gradient, prior": (19.7, 19.7),
}
# The same of kept_gradient, in bfloat16 and in float16: of each 32 rows of a warp without a target.
KEPT_LOOP = {
    "kept_gradient": (24.2, 23.5),
    "kept_gradient, prior": (25.2, 24.5),
    "kept_gradient, all": (31.1, 30),
}
# Bytes of stack: 240 registers do not hold everything beside 64 x 256 accumulators.
HOPPER_STACK = {("statistics, all", 256): 160}
MMA = {"fp16": "HMMA.16816.F32", "bf16": "HMMA.16816.F32.BF16", "tf32": "HMMA.1688.F32.TF32"}


@dataclass(frozen=True)
class Kernel:
    """An instance of a kernel as the compiler reports it."""

    name: str
    mix: str  # a key of MIXES; float or double where only the accumulator's type matters
    tile: int  # 0 where the kernel has a single size
    registers: int
    local: int  # bytes of stack and local memory
    operations: Counter  # instructions with their modifiers, as often as they stand in the code
    epilogue: Counter = None  # those of a tile of cosines without a target, outside its main loop;
    # of kept_gradient those of 32 rows

    def count(self, pattern):
        return sum(n for name, n in self.operations.items() if re.match(pattern, name))

    def __str__(self):
        return f"{self.name} {self.mix} {self.tile or ''}".strip()


@dataclass(frozen=True)
class Multiprocessor:
    name: str
    capability: str
    shared: int  # bytes; CUDA takes 1024 of them for each block
    registers: int = 65536  # a warp gets a multiple of 256
    threads: int = 2048

    def blocks(self, registers, threads, shared):
        by_registers = self.registers // (-(-registers // 8) * 8 * threads)
        return min(by_registers, self.threads // threads, self.shared // (shared + 1024))


A100 = Multiprocessor("A100", "8.0", 164 * 1024)
H200 = Multiprocessor("H200", "9.0", 228 * 1024)


def expected():
    """(name, mix, tile) of every instance that the library should have."""
    tiles = {mix: (64,) if mix in ("fp32", "fp64") else (64, 128) for mix in MIXES}
    return (
        {("prepare_rows", mix, 0) for mix in MIXES}
        | {
            ("class_gradient", mix, tile)
            for mix in MIXES
            for tile in tiles[mix]
            if tile == 64 or mix.startswith("bf16")
        }
        | {
            (name, mix, tile)
            for name in ("row_statistics", "input_gradient")
            for mix in MIXES
            for tile in tiles[mix]
            if (name, mix) != ("input_gradient", "fp16-fp32")  # its weights are rounded before
        }
        | {("unit_rows", weight, 0) for weight in ("float", "fp16")}
        | {
            (name, accumulator, 0)
            for accumulator in ("float", "double")
            for name in ("finish_rows", "prepare_gradient", "finish_gradient")
        }
        | {
            (name, mix, tile)
            for name, tiles in HOPPER.items()
            for mix in (*hopper.MIXES, *hopper.NARROW)
            for tile in tiles
            # Weights of the features' dtype have no instances for a prior. Kept products do not
            # depend on the dtype of the weight.
            if (
                mix in hopper.NARROW
                if name in KEPT_LOOP
                else mix in hopper.MIXES or name not in PRIOR
            )
        }
    )


_MATH = ("fp16", "bf16", "tf32", "fp32", "fp64")  # Math of plan.h
_MANGLED = re.compile(
    r"_ZN4tvmf4(?:rows|sm80)\w*?\d(?P<name>[a-z]+_[a-z]+)I"
    r"(?:LNS_4MathE(?P<math>\d)E(?P<weight>f|d|NS_\dbf16E|NS_\df16E)"
    r"(?:(?:NS\d?_4TileI)?Li(?P<tile>\d+)E\w*?)?|(?P<element>f|d|NS_\df16E))E+v"
)
_MANGLED_HOPPER = re.compile(
    r"_ZN4tvmf4sm90\w*?\d(?P<name>statistics|gradient|kept_gradient|products)I"
    r"LNS_4MathE(?P<math>\d)E"
    r"(?:NS0_11CosineShapeILi(?P<tile>\d+)ELb\dELb(?P<narrow>\d)EEE)?"
    r"(?:LNS0_5TermsE(?P<terms>\d)E)?"
    r"(?P<output>f|NS_\dbf16E|NS_\df16E)?E+v"
)


def instance(mangled):
    """(name, mix, tile) of a kernel's symbol."""
    if match := _MANGLED_HOPPER.match(mangled):
        name = match["name"] + TERMS[int(match["terms"] or 0)]
        narrow = match["narrow"] == "1" or (match["output"] or "f") != "f"
        narrow |= name in KEPT_LOOP
        return name, _MATH[int(match["math"])] + "-fp32" * (not narrow), int(match["tile"] or 0)
    match = _MANGLED.match(mangled)
    assert match, f"no kernel of ours: {mangled}"
    if match["element"]:
        return match["name"], {"f": "float", "d": "double"}.get(match["element"], "fp16"), 0
    mix = _MATH[int(match["math"])]
    if mix in ("fp16", "bf16") and match["weight"] == "f":
        mix += "-fp32"
    return match["name"], mix, int(match["tile"] or 0)


def parse_usage(text):
    """Registers, and bytes of stack and local memory, by architecture and symbol."""
    usage, arch = {}, None
    for line in re.finditer(
        r"^arch = (\w+)|^ Function (\w+):\n\s+REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", text, re.M
    ):
        if line[1]:
            arch = line[1]
        else:
            usage[arch, line[2]] = int(line[3]), int(line[4]) + int(line[5])
    return usage


def parse_sass(text):
    """How often each instruction stands in the code, by symbol."""
    instruction = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
    parts = re.split(r"^\.text\.(\w+):$", text, flags=re.M)
    return {
        symbol: Counter(instruction.findall(code))
        for symbol, code in zip(parts[1::2], parts[2::2], strict=True)
    }


def shortest_path(blocks, follows, start, via, end):
    """The blocks of the way from one block to another through one of `via` that has the fewest
    instructions, without both ends; None where there is none."""

    def from_block(first):
        best, queue = {first: (0, None)}, [(0, first)]
        while queue:
            length, at = heapq.heappop(queue)
            for after in follows[at]:
                longer = length + len(blocks[after])
                if longer < best.get(after, (math.inf,))[0]:
                    best[after] = longer, at
                    heapq.heappush(queue, (longer, after))
        return best

    def way(best, to):
        return [] if to is None else [*way(best, best[to][1]), to]

    first, ways = from_block(start), []
    for middle in via:
        second = from_block(middle)
        if middle in first and end in second:
            length = first[middle][0] + second[end][0]
            ways.append((length, (way(first, middle) + way(second, end)[1:])[1:-1]))
    return min(ways)[1] if ways else None


def control_flow(code):
    """The basic blocks of a kernel's code, each a list of instructions, and for each those that may
    follow it. A call without a return is a jump."""
    line = re.compile(r"^(\.L_\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", re.M)
    blocks, labels = [[]], {}
    for match in line.finditer(code):
        if match[1]:
            labels[match[1]] = len(blocks)
            blocks.append([])
        else:
            blocks[-1].append(match[2])
            if re.search(r"\b(BRA|EXIT|RET|CALL)\b", match[2]):
                blocks.append([])
    text = ["\n".join(block) for block in blocks]
    follows = []
    for i, block in enumerate(blocks):
        last = block[-1] if block else ""
        jump = re.search(r"\b(?:BRA|CALL)\b.*`\((\.L_\w+)\)", last)
        to = labels.get(jump[1]) if jump else None
        skipped = "\n".join(text[i + 1 : to]) if to and last.startswith("@") else ""
        over_stores = "STG" in skipped and "MUFU" not in skipped
        follows.append([to] if to is not None and not over_stores else [])
        leaves = jump or re.search(r"\b(BRA|EXIT|RET)\b", last)
        if i + 1 < len(blocks) and (last.startswith("@") or not leaves):
            follows[-1].append(i + 1)
    return blocks, follows


def count_operations(blocks):
    """How often each instruction stands in basic blocks."""
    return Counter(
        re.sub(r"^@!?U?P\w+\s+", "", each).split()[0] for block in blocks for each in block
    )


def parse_epilogue(code):
    """The instructions that a tile of cosines executes outside its main loop.

    They are the fewest between the last product of one tile and the first of the next: those of a
    tile without a target, of which no reference is raised. Stores are never branched over.
    """
    blocks, follows = control_flow(code)
    text = ["\n".join(block) for block in blocks]
    products = [i for i, block in enumerate(text) if "HGMMA" in block]
    exponentials = [i for i, block in enumerate(text) if "MUFU.EX2" in block]
    if not products or not exponentials:
        return None
    path = shortest_path(blocks, follows, products[-1], exponentials, products[0])
    return count_operations(blocks[i] for i in path or ())


def parse_loop(code):
    """The instructions of the shortest loop that makes the 16 exponentials of a lane without a
    branch between them: in kept_gradient that of 32 rows without a target."""
    blocks, follows = control_flow(code)
    ways = []
    for i, block in enumerate(blocks):
        if sum("MUFU.EX2" in each for each in block) < 16:
            continue
        for after in follows[i]:
            way = shortest_path(blocks, follows, after, [after], i)
            if way is not None:
                ways.append(count_operations(blocks[b] for b in {i, after, *way}))
    return min(ways, key=lambda way: way.total(), default=None)


def parse_epilogues(text):
    """The same by symbol, for the kernels of cosines and of kept products."""
    parts = re.split(r"^\.text\.(\w+):$", text, flags=re.M)
    codes = zip(parts[1::2], parts[2::2], strict=True)
    return {
        symbol: (parse_loop if "kept_gradient" in symbol else parse_epilogue)(code)
        for symbol, code in codes
        if "CosineShape" in symbol or "kept_gradient" in symbol
    }


def find_tool(name):
    """cuobjdump or nvdisasm, of the toolkit or of Triton, which CUDA builds of torch depend on."""
    folders = [os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    if spec := importlib.util.find_spec("triton"):
        folders.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def run(*command, **options):
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


@functools.cache
def disassemble():
    """The architecture and the code of every image in the installed library."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        run(cuobjdump, "-xelf", "all", _C.__file__, cwd=folder)
        images = sorted(Path(folder).glob("*.cubin"))
        texts = list(pool.map(lambda image: run(nvdisasm, "-c", str(image)), images))
    return [
        (re.search(r"sm_\d+[af]?", image.name)[0], text)
        for image, text in zip(images, texts, strict=True)
    ]


@functools.cache
def dump():
    """The kernels of the installed library by capability."""
    usage = parse_usage(run(find_tool("cuobjdump"), "-res-usage", _C.__file__))
    kernels = {}
    for arch, text in disassemble():
        code, epilogues = parse_sass(text), parse_epilogues(text)
        capability = re.sub(r"sm_(\d+)(\d).*", r"\1.\2", arch)
        for symbol, operations in code.items():
            epilogue = epilogues.get(symbol)
            kernel = Kernel(*instance(symbol), *usage[arch, symbol], operations, epilogue)
            kernels.setdefault(capability, []).append(kernel)
    return kernels


def epilogue_counts(kernel):
    """Instructions, special functions and exponentials an element of a tile of cosines. A lane has
    two elements of each four rows of its warpgroup, and where products were kept 16 of 32 rows."""
    elements = kernel.tile / 2 or 16
    named = kernel.epilogue.items()
    special = sum(n for name, n in named if name.startswith("MUFU"))
    exponentials = sum(n for name, n in named if name.startswith("MUFU.EX2"))
    return kernel.epilogue.total() / elements, special / elements, exponentials / elements


def atomic_complaints(kernel, has_last_block):
    """What is wrong with a kernel's atomics. The only one is the counter by which the last block
    knows itself, between two fences for the whole GPU."""
    wrong = []
    if kernel.count("RED|ATOM") != has_last_block:
        wrong.append(f"{kernel}: atomics: sums must not depend on the order of threads")
    if has_last_block and kernel.count(r"MEMBAR\.\w+\.GPU") != 2:
        wrong.append(f"{kernel}: the counter of finished blocks lacks a fence")
    return wrong


def kept_complaints(kernel):
    """What is wrong with the code of kept_gradient, whose 512 threads have 128 registers each."""
    wrong = []

    def need(condition, text):
        if not condition:
            wrong.append(f"{kernel}: {text}")

    count = kernel.count
    need(sum(kernel.operations.values()) > 1000, "hardly any code: is the dump whole?")
    need(
        not kernel.local and not count("LDL|STL"), f"{kernel.local} bytes of stack, or local memory"
    )
    need(not count(r"(LD|ST)(\.|$)"), "accesses by generic addresses")
    wrong.extend(atomic_complaints(kernel, has_last_block=False))
    need(kernel.registers <= 128, f"{kernel.registers} registers: a block does not launch")
    need(count(r"LDGSTS\..*BYPASS\.128") >= 8, "products not copied by 16 bytes")
    need(count(r"STG\.E\.128") >= 2, "gradients not written by 16 bytes")
    an_element, special, exponentials = epilogue_counts(kernel)
    most = KEPT_LOOP[kernel.name][kernel.mix.startswith("fp16")]
    need(an_element <= most, f"{an_element:.2f} instructions an element, {most} are known")
    need(exponentials == 1, f"{exponentials:.2f} exponentials an element: another loop was found")
    need(special <= 1.55, f"{special:.2f} special functions an element: no shared reciprocals")
    return wrong


def hopper_complaints(kernel):
    """What is wrong with the code of one of Hopper's own kernels. They launch with 168 registers a
    thread, which the warpgroups then divide among them."""
    wrong = []

    def need(condition, text):
        if not condition:
            wrong.append(f"{kernel}: {text}")

    count, operations = kernel.count, kernel.operations
    need(sum(operations.values()) > 1000, "hardly any code: is the dump whole?")
    stack = HOPPER_STACK.get((kernel.name, kernel.tile), 0)
    need(kernel.local <= stack, f"{kernel.local} bytes of stack, {stack} are known")
    need(stack or not count("LDL|STL"), "accesses to local memory")
    need(not count(r"(LD|ST)(\.|$)"), "accesses by generic addresses")
    wrong += atomic_complaints(kernel, kernel.name.startswith("statistics") and kernel.tile == 128)
    need(kernel.registers == 168, f"{kernel.registers} registers: three warpgroups do not launch")
    need(count("USETMAXREG") == 2, "registers are not shared out anew")
    product = f"HGMMA.64x{kernel.tile or 256}x16.F32" + ".BF16" * kernel.mix.startswith("bf16")
    need(operations[product] >= 4, f"no {product}: not on tensor cores")
    need(operations[product] == count("HGMMA"), "HGMMA of another dtype or shape")
    loops = 2 if kernel.name == "products" else 1
    need(count("WARPGROUP.DEPBAR") <= 4 * loops, "wgmma are waited for one by one")
    need(not count("HMMA|LDSM|LDGSTS"), "instructions of older chips")
    need(count(r"UTMALDG\.2D") == count("UTMALDG") > 0, "no bulk copies of tiles")
    if kernel.tile:
        need(count(r"LDS\.128") >= 30, "rows' terms or weights not read by 16 bytes")
    if kernel.name in EPILOGUE and kernel.tile == 256:
        most = EPILOGUE[kernel.name][kernel.mix.startswith("fp16")]
        an_element, special, exponentials = epilogue_counts(kernel)
        need(an_element <= most, f"{an_element:.2f} instructions an element, {most} are known")
        need(
            exponentials == 1, f"{exponentials:.2f} exponentials an element: another path was found"
        )
        need(special <= 1.55, f"{special:.2f} special functions an element: no shared reciprocals")
    if "gradient" in kernel.name and kernel.tile:
        need(count(r"STG\.E\.128") >= 12, "gradients or rounded weights not written by 16 bytes")
    if kernel.name == "products":
        size = 128 if kernel.mix.endswith("-fp32") else 64
        need(count(rf"STG\.E\.{size}") >= 32, "the weights' gradient not written by 4 elements")
    return wrong


def complaints(kernel):
    """What is wrong with a kernel's code."""
    if kernel.name in KEPT_LOOP:
        return kept_complaints(kernel)
    if kernel.name in HOPPER:
        return hopper_complaints(kernel)
    wrong = []

    def need(condition, text):
        if not condition:
            wrong.append(f"{kernel}: {text}")

    count, mix = kernel.count, kernel.mix
    need(sum(kernel.operations.values()) > 100, "hardly any code: is the dump whole?")
    need(not kernel.local, f"{kernel.local} bytes of stack: spilled registers or a local array")
    need(not count("LDL|STL"), "accesses to local memory")
    need(not count(r"(LD|ST)(\.|$)"), "accesses by generic addresses")
    wrong += atomic_complaints(kernel, kernel.name == "finish_rows")
    if kernel.name == "prepare_rows":
        need(count(r"LDG\.E\.128"), "no 128-bit loads of rows")
    if kernel.name not in TILED:
        return wrong

    need(count("LDGSTS"), "no cp.async")
    need(count("LDGSTS") == count(r"LDGSTS\..*BYPASS\.128"), "a cp.async of less than 16 bytes")
    operand = mix.removesuffix("-fp32")
    for name in {*MMA.values()} - {MMA.get(operand)}:
        need(not kernel.operations[name], f"{name}: products of another dtype")
    if operand in MMA:
        need(kernel.operations[MMA[operand]] >= 16, f"no {MMA[operand]}: not on tensor cores")
        need(count(r"LDSM\.16\.M88\.4"), "no ldmatrix")
        half = torch.finfo(MIXES[mix]["dtype"]).bits == 16
        transposed = half and kernel.name != "row_statistics"
        need(bool(count(r"LDSM\.16\.MT88\.4")) == transposed, "transposed ldmatrix, or none")
        need(not count(r"LDSM(?!\.16\.MT?88\.4)"), "ldmatrix of less than four matrices")
    else:
        need(not count("HMMA|LDSM"), "tensor cores in exact products")
        need(count("FFMA" if mix == "fp32" else "DFMA") >= 64, "no fused multiply-adds")
        need(count(r"LDS\.128") >= 4, "operands not read by 16 bytes")
    if kernel.name == "row_statistics" and mix != "fp16-fp32":
        need(count(r"LDS\.128") >= 2, "the weights' squares not read by 16 bytes")
    if kernel.name == "class_gradient":
        need(count(r"LDG\.E\.128") >= 32, "terms of rows not read by 16 bytes")
    return wrong


@functools.cache
def launches():
    """(threads, bytes of shared memory) of each instance; for class_gradient without the resident
    tile, whose size depends on the number of rows."""
    module = simt.load()
    found = {}

    def add(problem, mix, **how):
        module.configure(seed=0, check_races=False, count=False)
        module.reset()
        compute = problems.compute_dtype(problem["input"].dtype)
        simt.step(problem, {"loss": torch.ones((), dtype=compute)}, **how)
        for report in module.reports():
            name = re.search(r"(\w+)<", report.kernel)[1]
            tile = re.search(r"(?:Tile|CosineShape)<(\d+)|(?<=, )(\d+)>", report.kernel)
            terms = re.search(r"Terms\)(\d)", report.kernel)
            accumulator = re.search(r"\w+<(float|double)>", report.kernel)
            name += TERMS[int(terms[1]) if terms else 0]
            own = mix.replace("fp16-fp32", "fp16") if name == "input_gradient" else mix
            own = own.removesuffix("-fp32") if name in KEPT_LOOP else own
            size = int(tile[1] or tile[2]) if tile else 0
            key = name, accumulator[1] if accumulator else own, size
            found.setdefault(key, (report.threads, report.shared_bytes))

    for mix in MIXES:
        for rows, gpu in ((256, SMALL | CHUNKED), (256, {}), (1025, LARGE_CLASSES)):
            problem, how = make(rows, 256, 64, mix)
            add(problem, mix, **gpu, **how)
    for mix in ("fp32", "fp64"):  # so many partial results that several blocks merge them
        add(make(1100, 520, 4, mix)[0], mix, wanted=[])
    for mix in (*hopper.MIXES, *hopper.NARROW):
        for gpu in (hopper.SMALL, hopper.AGAIN, hopper.LARGE):
            for options in ({}, {"prior": True}, {"bias": True, "label_smoothing": 0.1}):
                add(hopper.hopper(33, 70, 8, mix, **options), mix, **gpu)
    assert set(found) == expected()
    return found


def table():
    """Rows of the tile table: kernel, tile, threads, registers on either architecture, bytes of
    shared memory, blocks a multiprocessor on either GPU."""
    by_kernel = {}
    for multiprocessor in (A100, H200):
        for kernel in dump()[multiprocessor.capability]:
            bf16_alone = (kernel.name, kernel.tile) == ("class_gradient", 128)
            dtype = kernel.mix if bf16_alone else re.sub("(fp|bf)16", "16-bit", kernel.mix)
            threads, shared = launches()[kernel.name, kernel.mix, kernel.tile]
            rows = by_kernel.setdefault((kernel.name, dtype, kernel.tile, threads, shared), {})
            if kernel.name not in HOPPER or multiprocessor is H200:
                rows.setdefault(multiprocessor, []).append(kernel.registers)
    order = (
        "prepare_rows",
        "row_statistics",
        "finish_rows",
        "prepare_gradient",
        "class_gradient",
        "unit_rows",
        "input_gradient",
        "finish_gradient",
        *HOPPER,
    )
    half = ("16-bit", "16-bit-fp32", "bf16", "bf16-fp32")
    operands = (*half, "tf32", "fp32", "fp64", "float", "double")
    lines = []
    for (name, dtype, tile, threads, shared), rows in sorted(
        by_kernel.items(), key=lambda r: (order.index(r[0][0]), -r[0][2], operands.index(r[0][1]))
    ):
        registers = [max(rows[m]) if m in rows else "" for m in (A100, H200)]
        shape = f"{tile} x {tile}" if tile else ""
        if name == "class_gradient":
            shape = f"128 x {tile}, {tile} x 128"
        if name in HOPPER:
            shape = "64 x 256" if tile == 128 else "" if name in KEPT_LOOP else "128 x 256"
        blocks = [
            m.blocks(max(rows[m]), threads, shared) if m in rows else "" for m in (A100, H200)
        ]
        cells = (name, dtype, shape, threads, *registers, shared, *blocks)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


needs_cuda = pytest.mark.skipif(not build_info().cuda, reason="the library is built without CUDA")
needs_tools = pytest.mark.skipif(
    not (find_tool("cuobjdump") and find_tool("nvdisasm")),
    reason="needs cuobjdump and nvdisasm: of the CUDA toolkit, or of Triton's package",
)
of_each = pytest.mark.parametrize("capability", CAPABILITIES)


def kernels_of(capability):
    if capability not in build_info().cuda_archs:
        pytest.skip(f"the library is built for {', '.join(build_info().cuda_archs)}")
    return dump()[capability]


@needs_cuda
@needs_tools
@of_each
def test_every_kernel_is_there_once(capability):
    instances = [(kernel.name, kernel.mix, kernel.tile) for kernel in kernels_of(capability)]
    assert len(instances) == 96
    assert set(instances) == expected()


@needs_cuda
@needs_tools
@of_each
def test_code_is_what_the_sources_mean(capability):
    kernels = kernels_of(capability)
    if capability != "9.0":
        for kernel in kernels:
            if kernel.name in HOPPER:
                assert sum(kernel.operations.values()) < 100, f"{kernel}: code for another chip"
        kernels = [kernel for kernel in kernels if kernel.name not in HOPPER]
    wrong = [text for kernel in kernels for text in complaints(kernel)]
    assert not wrong, "\n".join(wrong)


@needs_cuda
@needs_tools
@pytest.mark.parametrize("multiprocessor", [A100, H200], ids=lambda m: m.name)
def test_two_blocks_of_tiles_share_a_multiprocessor(multiprocessor):
    """An exception is the class_gradient of float64. Four small tiles of row_statistics do."""
    for kernel in kernels_of(multiprocessor.capability):
        if kernel.name in HOPPER and multiprocessor is A100:
            continue
        threads, shared = launches()[kernel.name, kernel.mix, kernel.tile]
        assert multiprocessor.blocks(kernel.registers, threads, shared) >= 1, kernel
        if kernel.name not in TILED or (kernel.name == "class_gradient" and kernel.mix == "fp64"):
            continue
        small = (kernel.name, kernel.tile) == ("row_statistics", 64) and kernel.mix != "fp64"
        least = 4 if small else 2
        assert multiprocessor.blocks(kernel.registers, threads, shared) >= least, kernel


@needs_cuda
@needs_tools
def test_the_documents_tile_table_is_true():
    """Registers, and the numbers of blocks that follow from them, are not compared, because they
    differ from one nvcc to the next."""
    for capability in CAPABILITIES:
        kernels_of(capability)
    lines = DOCUMENT.read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    documented = {(*row[1:5], row[7]) for row in rows if len(row) == 11}
    for line in table():
        row = [cell.strip() for cell in line.split("|")]
        assert (*row[1:5], row[7]) in documented, f"not in docs/measurements.md: {line}"


GOOD = Kernel(
    "input_gradient",
    "bf16",
    128,
    121,
    0,
    Counter(
        {
            "HMMA.16816.F32.BF16": 32,
            "LDGSTS.E.BYPASS.128.ZFILL": 4,
            "LDSM.16.M88.4": 8,
            "LDSM.16.MT88.4": 4,
            "STG.E.64": 64,
            "IMAD": 900,
        }
    ),
)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"LDL.LU.64": 1}, "local memory"),
        ({"STL": 2}, "local memory"),
        ({"HMMA.16816.F32.BF16": 0}, "not on tensor cores"),
        ({"HMMA.16816.F32": 1}, "another dtype"),
        ({"LDSM.16.M88.4": 0}, "no ldmatrix"),
        ({"LDSM.16.MT88.4": 0}, "transposed ldmatrix"),
        ({"LDSM.16.M88.2": 1}, "less than four"),
        ({"LDGSTS.E.BYPASS.128.ZFILL": 0}, "no cp.async"),
        ({"LDGSTS.E.64": 1}, "less than 16 bytes"),
        ({"RED.E.ADD.F32.FTZ.RN.STRONG.GPU": 1}, "atomics"),
        ({"LD.E": 1}, "generic"),
        ({"IMAD": 0, "STG.E.64": 0}, "hardly any code"),
    ],
    ids=str,
)
def test_what_must_not_be_is_found(change, text):
    assert not complaints(GOOD)
    wrong = complaints(replace(GOOD, operations=Counter({**GOOD.operations, **change})))
    assert len(wrong) == 1 and text in wrong[0]


def test_a_counter_without_both_fences_is_found():
    operations = Counter({"ATOMG.E.ADD.STRONG.GPU": 1, "MEMBAR.SC.GPU": 2, "IMAD": 900})
    last_block = replace(GOOD, name="finish_rows", mix="float", tile=0, operations=operations)
    assert not complaints(last_block)
    for change, text in (({"MEMBAR.SC.GPU": 1}, "lacks a fence"), ({"RED.E.ADD": 1}, "atomics")):
        (wrong,) = complaints(replace(last_block, operations=Counter({**operations, **change})))
        assert text in wrong


GOOD_HOPPER = Kernel(
    "gradient",
    "fp16-fp32",
    256,
    168,
    0,
    Counter(
        {
            "HGMMA.64x256x16.F32": 4,
            "UTMALDG.2D": 21,
            "USETMAXREG.TRY_ALLOC.CTAPOOL": 1,
            "USETMAXREG.DEALLOC.CTAPOOL": 1,
            "LDS.128": 88,
            "STG.E.128": 20,
            "IMAD": 8000,
            "WARPGROUP.DEPBAR.LE": 3,
        }
    ),
    Counter({"FMUL": 2100, "MUFU.EX2": 128, "MUFU.RCP": 64}),
)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"STL": 2}, "local memory"),
        ({"HGMMA.64x256x16.F32": 0}, "not on tensor cores"),
        ({"HGMMA.64x256x16.F32.BF16": 1}, "another dtype"),
        ({"WARPGROUP.DEPBAR.LE": 8}, "one by one"),
        ({"UTMALDG.2D": 0}, "no bulk copies"),
        ({"USETMAXREG.DEALLOC.CTAPOOL": 0}, "shared out"),
        ({"ATOMG.E.ADD.STRONG.GPU": 1}, "atomics"),
        ({"STG.E.128": 0}, "16 bytes"),
        ({"IMAD": 0}, "hardly any code"),
    ],
    ids=str,
)
def test_what_must_not_be_is_found_on_hopper(change, text):
    assert not complaints(GOOD_HOPPER)
    operations = Counter({**GOOD_HOPPER.operations, **change})
    wrong = complaints(replace(GOOD_HOPPER, operations=operations))
    assert len(wrong) == 1 and text in wrong[0]
    assert complaints(replace(GOOD_HOPPER, registers=170))
    assert complaints(replace(GOOD_HOPPER, local=8))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"FMUL": 2236}, "instructions an element"),
        ({"FMUL": 2036, "MUFU.RCP": 128}, "no shared reciprocals"),
        ({"MUFU.EX2": 64}, "another path"),
    ],
    ids=str,
)
def test_a_longer_epilogue_is_found(change, text):
    epilogue = Counter({**GOOD_HOPPER.epilogue, **change})
    wrong = complaints(replace(GOOD_HOPPER, epilogue=epilogue))
    assert len(wrong) == 1 and text in wrong[0]


def test_the_epilogue_is_the_shortest_way_that_stores():
    """The way passes the group without a target, and not beside the store."""
    code = "\n".join(
        line if line.startswith(".") else f"        /*0010*/                   {line} ;"
        for line in (
            ".L_x_1:",
            "HGMMA.64x256x16.F32 R24",
            "@P0 BRA `(.L_x_1)",
            "@!P1 BRA `(.L_x_2)",
            "ISETP R1",
            "MUFU.EX2 R1",
            "BRA `(.L_x_3)",
            ".L_x_2:",
            "MUFU.EX2 R1",
            ".L_x_3:",
            "@P2 BRA `(.L_x_4)",
            "STG.E.128 R1",
            ".L_x_4:",
            "@P3 BRA `(.L_x_1)",
            "EXIT",
        )
    )
    assert parse_epilogue(code) == {"BRA": 3, "MUFU.EX2": 1, "STG.E.128": 1}
    assert parse_epilogue("") is None


def test_what_must_not_be_is_found_in_a_dump():
    symbol = (
        "_ZN4tvmf4sm8054_GLOBAL__N__8be7058d_17_input_gradient_cu_1fd631c1_59114input_gradientILNS_4Mat"
        "hE1EfNS0_4TileILi128ELi128ELi2ELi4EEEEEvNS0_19InputGradientParamsINS_10MathTraitsIXT_EE3AccEEE"
    )
    assert instance(symbol) == ("input_gradient", "bf16-fp32", 128)
    prefix = "_ZN4tvmf4sm9049_GLOBAL__N__8825d9c4_16_backward_sm90_cu_60869e71"
    shaped = prefix + (
        "8gradientILNS_4MathE1ENS0_11CosineShapeILi256ELb0ELb0EEELNS0_5TermsE2EEEvNS0_14GradientParamsE"
    )
    assert instance(shaped) == ("gradient, all", "bf16-fp32", 256)
    product = prefix + "8productsILNS_4MathE0EfEEvNS_14ProductsParamsE"
    assert instance(product) == ("products", "fp16-fp32", 0)
    usage = parse_usage(
        f"arch = sm_90a\n\n Function {symbol}:\n  REG:127 STACK:24 SHARED:1024 LOCAL:8 CONST\n"
    )
    assert usage == {("sm_90a", symbol): (127, 32)}
    assert parse_sass(
        f".text.{symbol}:\n        /*0000*/                   LDC R1, c[0x0][0x28] ;\n"
        "        /*0010*/              @!P0 STL.64 [R1], R2 ;\n.L_x_1:\n"
        "        /*12ab0*/              @!UP1 UMOV UR4, 0x1 ;\n"
    ) == {symbol: {"LDC": 1, "STL.64": 1, "UMOV": 1}}
    assert parse_sass("") == parse_usage("") == {}


if __name__ == "__main__":
    print("\n".join(table()))
