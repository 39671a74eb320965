"""``train.finetune`` in torchrun's processes, on CPUs: DDP, or with ACCELERATE_USE_FSDP FSDP.

accelerate knows FSDP for devices alone; here it is told to take it for CPUs too, where torch has it. With
STOP_AFTER the run ends behind the state of that step, like a killed one. At the end it says what it ran in.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from dualfocus.train import finetune, loop

init, save_state = AcceleratorState.__init__, loop.save_state


def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **how: Any) -> None:
    init(self, *args, fsdp_plugin=fsdp_plugin, **how)
    if fsdp_plugin is not None:
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)


def stopping(accelerator: Any, folder: Any, done: int, counts: Any) -> None:
    save_state(accelerator, folder, done, counts)
    if str(done) == os.environ.get("STOP_AFTER"):
        sys.exit("stopped")


class Run(finetune.Run):
    def run(self) -> None:
        super().run()
        of = self.accelerator
        self.say(f"{of.num_processes} processes, {of.distributed_type.value}")


AcceleratorState.__init__ = with_fsdp  # type: ignore[method-assign]
finetune.DROPOUT = 0.0  # of which each process draws its own
loop.save_state, finetune.Run = stopping, Run  # type: ignore[misc]
finetune.main()
