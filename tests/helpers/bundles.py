"""Bundles that tests save and change."""

import json

from safetensors.torch import load_file, save_file


WEIGHTS = "diffusion_pytorch_model.safetensors"
METRIC = {"name": "accuracy", "value": 0.9, "n": 10, "seed": 0, "dataset": "d", "split": "test", "command": "measure"}
# of another process: forgets this package, as if it were not installed
WITHOUT_PACKAGE = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "score_sde":
            raise ImportError(name)
for name in [name for name in sys.modules if name.split(".")[0] == "score_sde"]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocked())
import torch
"""
# then opens a bundle by the code that it carries, and compares what it draws with an image; its arguments are the
# image, the bundle, and what the pipeline is told
LOAD_BY_REMOTE_CODE = f"""{WITHOUT_PACKAGE}
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
pipeline = DiffusionPipeline.from_pretrained(sys.argv[2], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
arguments = dict(num_inference_steps=3, output_type="pt") | json.loads(sys.argv[3])
image = pipeline(**arguments, generator=torch.Generator().manual_seed(3)).images
difference = (image - load_file(sys.argv[1])["image"]).abs().max()
print(json.dumps([float(difference), type(pipeline).__module__.split(".")[0]]))
"""


def edit(path, **changes):
    """Change values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retensor(folder, change, part="transformer"):
    """Change the weights of a part of a bundle: `change` is given them by name."""
    path = folder / part / WEIGHTS
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
