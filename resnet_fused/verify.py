# SPDX-License-Identifier: BSD-3-Clause
"""verify: prove on given inputs that a fused model computes what the original does.

The judge is float64, not the original in its own dtype, which may be wrong: torch's bfloat16
convolution on AMX CPUs is, where a strided convolution's output is one pixel wide. Everything runs
on copies of the model. Three things are compared:

* every module with fused calls, in float64: the fused forward against the original one;
* every fused call, in the model's dtype: its result against float64 on the same input, within the
  bound that ``rounding`` derives;
* the model's outputs: at most 1.5 times as far from float64 as the original's, plus what random
  roundings of every layer's result would do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from resnet_fused import rounding
from resnet_fused.fuse import fuse_in_place
from resnet_fused.fusion import steps
from resnet_fused.fusion.plan import Plan, current_plan
from resnet_fused.fusion.units import child, is_native, is_norm, is_planned
from resnet_fused.modules import Fused, ungraphed
from resnet_fused.watched import (
    Watched,
    copy_of,
    disturb,
    double,
    double_inputs,
    is_step,
    plain,
    rebound,
    remade,
    watched_class,
)

_TIMES_EAGER = 1.5
# Differences of two float64 computations are below this, relative to the largest value of the
# channel; what a float32 result cannot show is no defect.
_PLAN_UNIT = 2.0**-24
_LEAST = 2.0**-40  # likewise, relative to the largest value of all, for channels that cancel


class VerificationError(RuntimeError):
    """A fused model does not compute what the original does."""


class Stage(NamedTuple):
    """One fused call, as it was verified.

    Args:
        name: the layers with weights that it replaces; of an addition, the module that makes it.
        op: the op.
        path: what computed it, as in ``report``.
        dtype: of its result.
        error: largest difference from float64.
        bound: largest bound.
        used: largest share of its bound that any element's error takes.
    """

    name: str
    op: str
    path: str
    dtype: torch.dtype
    error: float
    bound: float
    used: float


class Stages(list[Stage]):
    """The stages in the order of the forward; prints as a table."""

    def __str__(self) -> str:
        rows = [
            f"{s.op:12} {s.path:9} {str(s.dtype)[6:]:8} error {s.error:.2e}  bound {s.bound:.2e}  "
            f"{s.used:4.0%}  {s.name}"
            for s in self
        ]
        return "\n".join(rows)


def verify(model: nn.Module, x: Tensor | tuple[Tensor, ...]) -> Stages:
    """Check that ``fuse(model)`` computes what ``model`` does on ``x``, in eval mode.

    Two copies are compared, one of them in float64: the model and torch's random state stay as they
    are. Hooks run only if they are torch's own, such as those of weight normalisation.

    Args:
        model: any module, fused already or not.
        x: its positional arguments: a tensor, or a tuple of tensors.

    Returns:
        What was compared.

    Raises:
        TypeError: ``x`` is no tensor or tuple of tensors.
        ValueError: the original model does not take ``x``.
        VerificationError: the fused model is wrong, or the comparison cannot be made.
    """
    model = ungraphed(model)
    given = x if isinstance(x, tuple) else (x,)
    if not given or not all(isinstance(a, Tensor) for a in given):
        kinds = ", ".join(type(a).__name__ for a in given)
        raise TypeError(
            "verify must be a tensor or a tuple of tensors, the model's positional arguments, got "
            + (f"({kinds})" if isinstance(x, tuple) else kinds)
        )
    if any(is_norm(m) and m.training for m in model.modules()):
        warnings.warn(
            f"{type(model).__name__} is in train mode, where nothing runs fused; it is verified as "
            "it will be in eval mode",
            stacklevel=3,
        )
    with torch.inference_mode(False), torch.no_grad(), _same_noise(model, given) as seeded:
        return _Trial(model, tuple(a.detach().clone() for a in given), seeded).run()


@contextmanager
def _same_noise(model: nn.Module, x: tuple[Tensor, ...]) -> Iterator[Callable[[], None]]:
    """Keep torch's random state; gives a function that starts the same random numbers again."""
    tensors = (*x, *model.parameters(), *model.buffers())
    gpus = sorted({t.device.index for t in tensors if t.is_cuda})

    def seeded(seed: int = 0) -> None:
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)

    with torch.random.fork_rng(gpus):
        yield seeded


class _Trial:
    """The copies that are compared, and what was seen."""

    def __init__(
        self, model: nn.Module, x: tuple[Tensor, ...], seeded: Callable[..., None]
    ) -> None:
        self.x, self.seeded = x, seeded
        self.plain = plain(copy_of(model))
        self.fused = copy_of(model)
        self.name = type(model).__name__
        self.where = ""
        self.stages = Stages()

    def run(self) -> Stages:
        """Compare."""
        try:
            eager = self.call(self.plain, self.x)
        except Exception as error:  # the user's code
            raise ValueError(
                f"verify must be an input that {self.name} takes; the original model raised "
                f"{type(error).__name__}: {error}"
            ) from error
        try:
            self.exact = double(self.plain)
            doubles = double_inputs(self.x)
            exact = self.call(self.exact, doubles)
            handles = disturb(self.exact, _unit(eager))
            noise = [self.call(self.exact, doubles, seed) for seed in (1, 2)]
            for handle in handles:
                handle.remove()
        except Exception as error:
            raise VerificationError(
                f"{self.name} cannot be verified, because it does not run in float64: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.watch()
        try:
            got = self.call(self.fused, self.x)
        except VerificationError:
            raise
        except Exception as error:
            self.fail(f"it raised {type(error).__name__}: {error}", error)
        self.compare_outputs(got, eager, exact, noise)
        if not self.stages and any(isinstance(m, Fused) for m in self.fused.modules()):
            warnings.warn(
                f"no fused call ran in {self.name} with this input, so that only its outputs were "
                "verified; resnet_fused.report(model) says why",
                stacklevel=5,
            )
        return self.stages

    def call(self, model: nn.Module, x: tuple[Tensor, ...], seed: int = 0) -> Any:
        """The outputs of ``model``; it may write to what it gets."""
        self.seeded(seed)
        return model(*(a.clone() for a in x))

    # Calls

    def watch(self) -> None:
        """Fuse a copy, and let every fused call in it be checked."""
        fuse_in_place(self.fused)
        names = {id(m._parameters.get("weight")): n for n, m in self.fused.named_modules()}
        watched = Watched(self, names)
        space = rebound(vars(steps), watched)
        for name, module in list(self.fused.named_modules()):
            if is_planned(module):
                plan = current_plan(module)
                if plan.run is not None:
                    module.__dict__["_fuse_plan"] = self.checked(name, plan, space)
            elif is_native(module):
                module.__class__ = watched_class(type(module), watched)

    def checked(self, name: str, plan: Plan, space: dict[str, Any]) -> Plan:
        """``plan`` with a forward that is compared in float64 and makes watched calls."""
        code: Any = plan.run
        own = {k: space[v.__name__] if is_step(v) else v for k, v in code.__globals__.items()}
        watched = remade(code, own)

        def run(owner: nn.Module, convs: Any, *args: Any) -> Any:
            self.compare_plan(name, plan, args)
            before, self.where = self.where, name
            try:
                return watched(owner, convs, *args)
            finally:
                self.where = before

        return replace(plan, run=run)

    def compare_plan(self, name: str, plan: Plan, args: tuple[Tensor, ...]) -> None:
        """In float64 a module's fused forward gives what its original forward does."""
        assert plan.run is not None
        module = child(self.exact, name)
        mine, theirs = double_inputs(args), double_inputs(args)
        self.seeded()
        want = pytree.tree_leaves((module(*theirs), theirs))
        self.seeded()
        got = pytree.tree_leaves((plan.run(module, plan.convs(module), *mine), mine))
        least = _LEAST * max((_largest(a) for a in double_inputs(args)), default=0.0)
        for a, b in zip(got, want, strict=True):
            if not isinstance(b, Tensor) or not b.is_floating_point():
                continue
            same = a.shape == b.shape
            if same and not bool((bad := _differ(a, b, least)).any()):
                continue
            what = (
                f"{int(bad.sum())} of {bad.numel()} elements differ, the worst by "
                f"{_largest(a - b):.3g}, where the largest value is {_largest(b):.3g}"
                if same
                else f"its result has shape {tuple(a.shape)} instead of {tuple(b.shape)}"
            )
            self.fail(f"{_quoted(name, module)}, computed in float64, fused and not: {what}")

    def compare_call(self, name: str, op: str, want: rounding.Exact, y: Tensor, path: str) -> None:
        """A fused call is within the derived bound."""
        if y.shape != want.value.shape:
            shapes = f"{tuple(y.shape)} instead of {tuple(want.value.shape)}"
            self.fail(f"{name} ({op} on {path}): its result has shape {shapes}")
        bad = rounding.outside(y, want)
        judged = want.value.isfinite() & want.error.isfinite()
        error = (y.double() - want.value).abs().where(judged, 0)
        used = (error / want.error).nan_to_num(0.0, 0.0)
        bound = _largest(want.error.where(judged, 0))
        stage = Stage(name, op, path, y.dtype, _largest(error), bound, _largest(used))
        self.stages.append(stage)
        if bool(bad.any()):
            at = int((used + bad * 1e-3).argmax())
            self.fail(
                f"{name} ({op} on {path}, {str(y.dtype)[6:]}): {int(bad.sum())} of {bad.numel()} "
                f"elements are further from float64 than rounding explains; the worst is "
                f"{y.flatten()[at].item():.6g} instead of {want.value.flatten()[at].item():.6g}, "
                f"and the bound is {want.error.flatten()[at].item():.3g}"
            )

    # Outputs

    def compare_outputs(self, got: Any, eager: Any, exact: Any, noise: list[Any]) -> None:
        """The fused model's outputs are about as near to float64 as the original's."""
        leaves = [pytree.tree_leaves(v) for v in (got, eager, exact, *noise)]
        if len(leaves[0]) != len(leaves[1]):
            self.fail(f"it gives {len(leaves[0])} outputs instead of {len(leaves[1])}")
        if len({len(v) for v in leaves}) > 1:
            return
        for i, (a, b, e, *noisy) in enumerate(zip(*leaves, strict=True)):
            if not isinstance(b, Tensor) or not b.is_floating_point() or b.shape != e.shape:
                continue  # how many there are depends on values: rounding may change it
            if a.shape != b.shape or a.dtype != b.dtype:
                self.fail(f"output {i} is {_kind(a)} instead of {_kind(b)}")
            finite = e.isfinite()
            # What the dtype cannot hold is infinite in the original, too.
            lost = ~a.isfinite() & finite & b.isfinite()
            if bool((lost | ~finite & ~_alike(a.double(), e)).any()):
                self.fail(
                    f"output {i} has NaN or infinity where the original has numbers, or the "
                    "other way round"
                )
            error, theirs, floor = (
                max(_largest((v.double() - e).where(finite & v.isfinite(), 0)) for v in some)
                for some in ((a,), (b,), noisy)
            )
            floor = 2 * (floor + rounding.unit_of_results(b.dtype) * _largest(e.where(finite, 0)))
            if error > _TIMES_EAGER * theirs + floor:
                self.fail(
                    f"output {i} is {error:.3g} from float64; the original is {theirs:.3g} from "
                    f"it, and rounding explains {floor:.3g} more"
                )

    def fail(self, what: str, cause: Exception | None = None) -> NoReturn:
        raise VerificationError(
            f"the fused {self.name} is not the original: {what}. The model is as it was before. "
            "Use it without fuse(), or in `with resnet_fused.backend('reference')`, and please "
            "report this message"
        ) from cause


def _unit(outputs: Any) -> float:
    """The largest unit roundoff of any output."""
    dtypes = (t.dtype for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor))
    return max((rounding.unit_of_results(d) for d in dtypes), default=0.0)


def _differ(a: Tensor, b: Tensor, least: float) -> Tensor:
    """Where two float64 tensors differ by more than float64's rounding."""
    size = b.abs().nan_to_num(0.0, 0.0)
    others = [d for d in range(b.dim()) if d != 1]
    largest = size.amax(others, keepdim=True) if b.dim() > 1 and b.numel() else size
    allowed = _PLAN_UNIT * largest + _LEAST * _largest(b) + least
    return torch.where(b.isfinite(), ~((a - b).abs() <= allowed), ~_alike(a, b))


def _alike(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _largest(t: Tensor) -> float:
    """The largest finite magnitude; 0 of nothing."""
    return float(t.abs().nan_to_num(0.0, 0.0).max()) if t.numel() else 0.0


def _kind(t: Any) -> str:
    return f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__


def _quoted(name: str, module: nn.Module) -> str:
    return f"'{name}' ({type(module).__name__})" if name else type(module).__name__
