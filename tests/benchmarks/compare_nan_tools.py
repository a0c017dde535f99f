"""Who names the origin of a NaN: attncli, and what people use today, on the fault suite of the tests.

    PYTHONPATH=tests python tests/benchmarks/compare_nan_tools.py

Each tool runs every fault, every healthy twin, and the healthy programs in which NaN and Inf occur. It is right
where it names the true origin in its own terms: `detect_anomaly` the autograd node of the operator or its line,
`DebugUnderflowOverflow` the module (of a free function, the root), "first op" (a dispatch mode that stops at the
first output that is not finite) the operator. A silent fault counts as well: it is right to name it, and none of the
others can.
"""

from __future__ import annotations

import contextlib
import io
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from nan_faults import FAULTS, HEALTHY, Built, Fault
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attncli


def main() -> None:
    rows = []
    for name, tool in TOOLS.items():
        right = alarms = 0
        start = time.perf_counter()
        missed = []
        for fault in FAULTS:
            found = told(tool, lambda fault=fault: fault.build(False))
            if found is not None and found(fault):
                right += 1
            else:
                missed.append(fault.name)
            alarms += told(tool, lambda fault=fault: fault.build(True)) is not None
        alarms += sum(told(tool, build) is not None for build in HEALTHY)
        rows.append((name, right, alarms, time.perf_counter() - start, missed))
    total, healthy = len(FAULTS), len(FAULTS) + len(HEALTHY)
    print("| tool | true origin named | false alarms on healthy programs | seconds |\n|---|---|---|---|")
    for name, right, alarms, seconds, _ in rows:
        print(f"| {name} | {right} of {total} | {alarms} of {healthy} | {seconds:.0f} |")
    for name, _, _, _, missed in rows:
        print(f"\n{name} missed: {', '.join(missed) or 'nothing'}")


# What a tool said, as a question whether it is true of a fault; None where it said nothing.
Said = Callable[[Fault], bool]


def told(
    tool: Callable[[nn.Module, Callable[[Any], Any]], Said | None], build: Callable[[], Built]
) -> Said | None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tool(*build())


def with_attncli(model: nn.Module, step: Callable[[Any], Any]) -> Said | None:
    report = attncli.nan_check(model, step)
    if not report.origins:
        return None
    first = report.origins[0]
    return lambda fault: (
        len(report.origins) == 1
        and first.phase == fault.phase
        and first.op in fault.ops
        and fault.module in ("*", first.module)
    )


def with_anomaly_mode(model: nn.Module, step: Callable[[Any], Any]) -> Said | None:
    with warnings.catch_warnings(record=True) as printed, torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("always")
        try:
            backward(step(model))
        except RuntimeError as error:
            found = re.search(r"Function '(\w+)' returned nan", str(error))
            if found is None:
                return None
            node, lines = found[1].lower(), [line_in(str(warning.message)) for warning in printed]
            return lambda fault: (
                any(name and node.startswith(plain(name)) for name in (fault.forward, *fault.ops))
                or any(fault.line and fault.line in line for line in lines)
            )
    return None


def plain(name: str) -> str:
    """An operator as autograd spells it in its nodes: "nll_loss_forward" is NllLossBackward0."""
    return name.removesuffix("_forward").replace("_", "").lower()


def line_in(traceback: str) -> str:
    """The innermost line of the suite in the traceback that anomaly mode prints of the forward pass."""
    lines = traceback.splitlines()
    ours = [index for index, line in enumerate(lines) if "nan_faults.py" in line]
    return lines[ours[-1] + 1] if ours and ours[-1] + 1 < len(lines) else ""


def with_module_hooks(model: nn.Module, step: Callable[[Any], Any]) -> Said | None:
    from transformers.debug_utils import DebugUnderflowOverflow

    DebugUnderflowOverflow(model)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            backward(step(model))
    except ValueError:
        frames = re.findall(r"^\s+(\S*) (\w+)$", printed.getvalue(), re.MULTILINE)
        module = frames[-1][0] if frames else ""
        return lambda fault: fault.module == module and fault.phase not in ("backward", "optimizer")
    except RuntimeError:
        pass
    return None


class FirstBad(TorchDispatchMode):
    """Remembers the first operator that gave NaN or Inf."""

    def __init__(self) -> None:
        super().__init__()
        self.name = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, (tuple, list)) else [result]:
            floating = isinstance(output, Tensor) and output.is_floating_point()
            if floating and not self.name and not bool(torch.isfinite(output).all()):
                self.name = func._schema.name.partition("::")[2].rstrip("_")
        return result


def with_first_bad(model: nn.Module, step: Callable[[Any], Any]) -> Said | None:
    mode = FirstBad()
    # Some operators refuse what is not finite; that was seen before.
    with contextlib.suppress(RuntimeError), mode:
        backward(step(model))
    return (lambda fault: mode.name in fault.ops) if mode.name else None


def backward(result: Any) -> None:
    if isinstance(result, Tensor) and result.requires_grad and result.dim() == 0:
        try:
            result.backward()
        except RuntimeError as error:
            # A step that has run its own backward pass has freed the graph.
            if "second time" not in str(error):
                raise


TOOLS = {
    "`attncli.nan_check`": with_attncli,
    "`torch.autograd.set_detect_anomaly`": with_anomaly_mode,
    "transformers `DebugUnderflowOverflow`": with_module_hooks,
    "first op whose output is not finite": with_first_bad,
}

if __name__ == "__main__":
    main()
