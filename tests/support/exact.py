"""Everything in float64: transformers rounds norms, rotations and routers to float32 in models of any dtype."""

from torch import Tensor, float32, float64
from torch.overrides import TorchFunctionMode


class _Doubles(TorchFunctionMode):
    """What would be made in float32 is made in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            return args[0].double()
        args = tuple(float64 if argument is float32 else argument for argument in args)
        kwargs = {name: float64 if value is float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def in_float64() -> TorchFunctionMode:
    """The context in which a float64 model computes nothing in float32, so that only an error is left to be seen."""
    return _Doubles()
