"""What a long benchmark does in parts: each alone can fail, in the time that there is, and what it finds is written."""

import json
import time
import traceback
from contextlib import contextmanager

from score_sde.training.parts.run_folder import read_records


class Work:
    """A command's time, folders and findings.

    Attributes: `ends`, time.monotonic() when it must be through; `folder`; `data`; `facts`, which `write` adds to.

    Args:
        options: of the command; `output` is the folder.
        seconds: that are left.
    """

    def __init__(self, name, options, data, seconds, **facts):
        self.name, self.data, self.folder, self.options = name, data, options.output, options
        self.began = time.monotonic()
        self.ends = self.began + seconds
        self.facts = {"failed": {}} | facts
        self.folder.mkdir(parents=True, exist_ok=True)

    def left(self):
        return self.ends - time.monotonic()

    def needs(self, seconds):
        """Raise TimeoutError where they aren't left."""
        if self.left() < seconds:
            raise TimeoutError(f"{self.left():.0f} s are left of {seconds} that are needed")

    def write(self, **facts):
        self.facts |= facts | {"seconds": round(time.monotonic() - self.began, 1)}
        temporary = self.folder / "result.json.partial"
        temporary.write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.folder / "result.json")

    @contextmanager
    def part(self, name):
        """A part without which the others go on: where it fails, that is written."""
        began = time.monotonic()
        try:
            yield
            print(f"[{self.name}] {name}: {time.monotonic() - began:.1f} s", flush=True)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            self.facts["failed"][name] = "".join(traceback.format_exception(error))[-3000:]
        self.write(**{f"seconds_of_{name}": round(time.monotonic() - began, 1)})

    def speed(self, folder):
        """What the log says of a run."""
        lines = read_records(str(self.folder / folder / "log.jsonl"))
        keys = ("images_per_second", "mfu", "waiting_for_data", "tflops_per_second")
        later = lines[1:] or lines
        medians = {key: sorted(line[key] for line in later)[len(later) // 2] for key in keys if later}
        return {"first": lines[:1], "last": lines[-1:], "medians": medians}
