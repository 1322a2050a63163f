"""The cases that each suite measures, with its device, its dtype and the seconds for each case."""

KAPPA = 16.0
# ImageNet-LT, iNaturalist 2018, ImageNet-21k, and a million classes.
GPU_SHAPES = [(256, 1000, 512), (256, 8142, 2048), (1024, 21841, 768), (1024, 10**6, 512)]
# Variants that would take too long at some shapes: torch.compile takes 10 to 20 s for each.
UNTUNED = {"leave_out": ["max-autotune"]}
UNCOMPILED = {"leave_out": ["max-autotune", "compile", "pml"]}


def cases(shapes, kappa=KAPPA, **more):
    """A case for each (N, C, D). `leave_out` names variants that are not run, `threads` sets the
    CPU's threads, `dtype` takes the place of the suite's, and `sweep` puts the case into the plot
    against C instead of a document's table.
    """
    return [{"shape": list(shape), "kappa": kappa, **more} for shape in shapes]


SUITES = {
    "quick": {
        "device": "cpu",
        "dtype": "float32",
        "seconds": 3,
        "cases": [
            *cases([(256, 1000, 512), (127, 1003, 130)]),
            *cases([(256, 1000, 512)], kappa=0.0),
        ],
    },
    "cpu": {
        "device": "cpu",
        "dtype": "float32",
        "seconds": 7,
        "cases": [
            *cases([(256, 1000, 512), (256, 8142, 2048), (256, 21841, 768), (256, 100_000, 512)]),
            *cases([(1, 8, 8)], threads=1),
            *cases([(127, 8143, 511), (33, 1003, 2047)]),
            *cases([(256, 1000, 512), (256, 8142, 2048), (1024, 8142, 512)], kappa=0.0),
            *cases([(256, 1000, 512), (256, 8142, 2048), (256, 21841, 768)], dtype="bfloat16"),
            *cases([(64, 10**i, 512) for i in (3, 4, 5, 6)], sweep=True),
        ],
    },
    "gpu": {
        "device": "cuda",
        "dtype": "bfloat16",
        "seconds": 1,
        "cases": [
            *cases(GPU_SHAPES, **UNTUNED),
            *cases(GPU_SHAPES, kappa=0.0, **UNCOMPILED),
            *cases([(256, 10**i, 512) for i in (3, 4, 5, 6)], sweep=True, **UNCOMPILED),
        ],
    },
    "gpu-more": {
        "device": "cuda",
        "dtype": "bfloat16",
        "seconds": 2,
        "cases": [
            *cases(GPU_SHAPES),
            *cases([(8192, 128_256, 2304), (127, 8143, 511), (1000, 21_839, 1001)], **UNTUNED),
            *cases(GPU_SHAPES, kappa=0.0, **UNTUNED),
            *cases([(8192, 128_256, 2304)], kappa=0.0, **UNTUNED),
        ],
    },
}
