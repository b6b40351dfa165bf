"""Models in float64 throughout: transformers rounds norms, rotations and routers to float32 in models of any dtype."""

from typing import Any

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


def in_float64(model: Any) -> Any:
    """A float64 model of which no forward pass computes anything in float32: what then differs is an error."""
    for module in (model, model.base_model):
        entered: list[_Doubles] = []

        def enter(*_: Any, entered: list[_Doubles] = entered) -> None:
            entered.append(_Doubles())
            entered[-1].__enter__()

        def leave(*_: Any, entered: list[_Doubles] = entered) -> None:
            entered.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)
    return model
