"""Stands in for torchvision: its names can be imported, as image code does that never runs, and nothing works."""

import sys
import types

__version__ = "0.28.0"


class _Names(type):
    """Classes whose members can be named: InterpolationMode.BICUBIC."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Absent(metaclass=_Names):
    def __init__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError("torchvision is a stand-in here")


def _name(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Names(name, (_Absent,), {})


for _part in (
    "io",
    "ops",
    "ops.boxes",
    "transforms",
    "transforms.functional",
    "transforms.v2",
    "transforms.v2.functional",
):
    _module = types.ModuleType(f"{__name__}.{_part}")
    _module.__getattr__ = _name  # type: ignore[method-assign]
    _module.__path__ = []
    sys.modules[_module.__name__] = _module
    _parent, _, _last = _module.__name__.rpartition(".")
    setattr(sys.modules[_parent], _last, _module)
