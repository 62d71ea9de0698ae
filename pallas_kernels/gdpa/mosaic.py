"""GDPA on Hopper: ties the forward and the backward kernel together."""


def unsupported(*args, **kwargs) -> str | None:
    return "the kernel is not written yet"


def mosaic_gpu(*args, **kwargs):
    raise AssertionError("unreachable: `unsupported` always answers")
