"""A training script under FSDP2 on CPUs. Accelerate offers FSDP2 on accelerators alone; what it then does, and what
PyTorch does, is the same here.

    python -m torch.distributed.run --nproc_per_node 2 tests/helpers/fsdp_on_cpu.py train --max_train_steps 3 ...
"""

import importlib
import json
import os
import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from recording import recorded_run


os.environ |= {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
accelerator = Accelerator(cpu=True)
# what AcceleratorState does for accelerators
plugin = FullyShardedDataParallelPlugin()
if accelerator.mixed_precision != "no":
    plugin.set_mixed_precision(accelerator.mixed_precision)
PartialState._shared_state["distributed_type"] = DistributedType.FSDP
AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}


if __name__ == "__main__":
    script, *arguments = sys.argv[1:]
    with recorded_run() as record:
        importlib.import_module(f"score_sde.training.{script}").main(arguments)
    if "RECORD" in os.environ:
        record["reduced_in"] = str(plugin.mixed_precision_policy.reduce_dtype)
        Path(os.environ["RECORD"], f"{accelerator.process_index}.json").write_text(json.dumps(record))
