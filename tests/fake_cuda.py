"""A GPU that does not exist: what runs on it is checked without one.

Tensors on the CPU are real. Tensors on ``"cuda"`` have a shape, a type and a device, but no values
(``FakeTensorMode`` of PyTorch), so a program that needs a value, or that mixes devices, fails as
it would wait or fail on a GPU.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Waited(AssertionError):
    """The program waited for the GPU where it must not."""


class FakeCuda(TorchDispatchMode):
    """Sends what concerns ``"cuda"`` to ``FakeTensorMode`` and runs everything else.

    Attributes:
        may_wait: whether the program may wait for the GPU. Then a number that it reads is 1, and
            every entry of a tensor whose nonzero entries it looks for is one.
        waits: how often each operator waited.
        ran: how often each operator ran on the GPU.
        results: the operators that ran there and gave numbers of each type.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.may_wait = True
        self.waits: Counter[str] = Counter()
        self.ran: Counter[str] = Counter()
        self.results: dict[torch.dtype, set[str]] = defaultdict(set)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = tree_leaves((args, kwargs))
        tensors = [value for value in values if isinstance(value, Tensor)]
        target = kwargs.get("device")
        to_cuda = target is not None and torch.device(target).type == "cuda"
        if not to_cuda and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self.ran[name] += 1
        result = self._run(name, func, args, kwargs, tensors)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.results[value.dtype].add(name)
        return result

    def _run(self, name: str, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        if name in ("_to_copy", "copy_") and _makes_the_host_wait(func, args, kwargs, tensors):
            self._wait(name)
        elif name in ("index", "index_put_"):
            self._look_up(name, *args)
        elif name == "_local_scalar_dense":
            self._wait(name)
            return True if args[0].dtype == torch.bool else 1
        elif name == "nonzero":
            self._wait(name)
            shape = (args[0].numel(), args[0].dim())
            return torch.empty(shape, dtype=torch.int64, device=args[0].device)
        elif name.startswith("_fused_"):  # the step of an optimizer: all in place
            on_cpu = [tensor for tensor in tensors if tensor.device.type != "cuda"]
            assert not on_cpu, f"{name} got {len(on_cpu)} tensors on the CPU"
            return None
        return func(*args, **kwargs)

    def _look_up(
        self, name: str, tensor: Tensor, indices: Any, values: Any = None, *_: Any
    ) -> None:
        given = [index for index in indices if index is not None]
        if any(index.device.type != tensor.device.type for index in given):
            if tensor.device.type == "cpu":
                raise RuntimeError(f"{name}: a tensor on the CPU, and indices on another device")
            self._wait(f"{name} with indices on the CPU")
        # One value is filled in where a mask is true; several need the positions.
        masks = any(index.dtype in (torch.bool, torch.uint8) for index in given)
        if masks and values is not None and values.numel() != 1:
            self._wait(f"{name} with a mask")

    def _wait(self, what: str) -> None:
        if not self.may_wait:
            raise Waited(f"{what} waits for the GPU")
        self.waits[what] += 1


def _makes_the_host_wait(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> bool:
    """Whether a copy goes to the GPU and waits for it, or comes from there, to be looked at."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    source = (given["src"] if "src" in given else given["self"]).device.type
    target = torch.device(given["device"]) if given.get("device") else tensors[0].device
    if source == target.type:
        return False
    return source == "cuda" or not given.get("non_blocking", False)


@contextlib.contextmanager
def fake_cuda(bfloat16: bool = True) -> Iterator[FakeCuda]:
    """Within the block, there is a GPU; ``torch.cuda.is_available()`` stays as it is.

    Args:
        bfloat16: whether it computes in bfloat16.
    """
    gpu = FakeCuda()
    with pytest.MonkeyPatch.context() as patch, gpu.fake_mode, gpu:
        # Automatic mixed precision would switch itself off.
        patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16)
        patch.setattr(Tensor, "backward", backward)
        yield gpu


def backward(loss: Tensor) -> None:
    """Compute gradients as ``Tensor.backward`` does, which needs a driver for a GPU."""
    order: list[Any] = []  # every node before those that come after it in the forward pass
    seen = set()

    def visit(node: Any) -> None:
        stack = [(node, iter(node.next_functions))]
        seen.add(node)
        while stack:
            current, following = stack[-1]
            for child, _ in following:
                if child is not None and child not in seen:
                    seen.add(child)
                    stack.append((child, iter(child.next_functions)))
                    break
            else:
                order.append(current)
                stack.pop()

    assert loss.grad_fn is not None
    visit(loss.grad_fn)
    gradients: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    with torch.no_grad():
        for node in reversed(order):
            received = gradients.pop(node, {})
            if hasattr(node, "variable"):  # a leaf, whose gradient is accumulated
                if 0 in received:
                    leaf = node.variable
                    leaf.grad = received[0] if leaf.grad is None else leaf.grad + received[0]
                continue
            produced = node(*(received.get(i) for i in range(len(node._input_metadata))))
            produced = produced if isinstance(produced, tuple) else (produced,)
            for gradient, (child, position) in zip(produced, node.next_functions, strict=True):
                if child is not None and gradient is not None:
                    # As autograd: a broadcast input gets the sum, in its own type.
                    wanted = child._input_metadata[position]
                    gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                    slots = gradients.setdefault(child, {})
                    known = slots.get(position)
                    slots[position] = gradient if known is None else known + gradient
