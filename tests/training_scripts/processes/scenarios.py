"""Runs scenarios one after the other in one process group and prints one JSON line for each.

`scenarios.py FILE:FUNCTION:FAULT[:CHOICE] …`: FUNCTION(FAULT) of FILE.py runs under `attncli.watch`, with CHOICE
"plain" without it, with "continue" to its end, with "capsule" into a folder. No digest: it did not end.
"""

import importlib
import json
import sys
import time
import warnings

import torch
import torch.distributed as dist

import attncli

torch.set_num_threads(1)
# Said by torch of modules on inputs of three dimensions, with attncli and without.
warnings.filterwarnings("ignore", "FSDP2-wrapped module")
dist.init_process_group("gloo")
for scenario in sys.argv[1:]:
    dist.barrier()
    file, function, fault, *choice = scenario.split(":")
    train = getattr(importlib.import_module(file), function)
    said = {"scenario": scenario, "rank": dist.get_rank(), "digest": None, "report": None, "speaks": None}
    began = time.monotonic()
    if choice == ["plain"]:
        said["digest"] = train(fault)
    else:
        settings = {
            "every": 2 if fault == "none" else 0,
            "on_fault": "continue" if choice == ["continue"] else "raise",
            "capsule": f"capsule-{fault}" if choice == ["capsule"] else None,
        }
        watch = attncli.watch(**settings)
        watch.tell = lambda text, said=said: said.setdefault("told", []).append(text)
        try:
            with watch as run:
                said["digest"] = train(fault)
            report = run.report
        except attncli.TrainingFault as error:
            report = error.report
        said |= {"report": report.to_dict(), "speaks": run.speaks, "text": str(report)}
    said["seconds"] = time.monotonic() - began
    print(json.dumps(said), flush=True)
dist.destroy_process_group()
