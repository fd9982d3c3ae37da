"""Uploads of a run's pipeline to the Hub."""

import threading

from score_sde.sharing.hub import push_to_hub


class Uploads:
    """Uploads to the repo of a `TrainConfig`: one at a time on the way, in the background, and one at the end. What
    fails is said, and costs no more than the upload."""

    def __init__(self, config):
        self.config, self.thread = config, None

    def is_busy(self):
        return self.thread is not None and self.thread.is_alive()

    def begin(self, folder, steps):
        # a daemon: what doesn't answer keeps no run from ending
        self.thread = threading.Thread(target=self.push, args=(folder, steps), daemon=True)
        self.thread.start()

    def finish(self, folder, steps):
        """Wait for what is on its way, then upload this."""
        if self.thread is not None:
            self.thread.join()
        self.push(folder, steps)

    def push(self, folder, steps):
        repo = self.config.push_to_hub
        message = f"{self.config.model_name}, {steps:,} steps"
        try:
            address = push_to_hub(folder, repo, private=self.config.hub_private or None, commit_message=message)
            print(f"pushed: {address}")
        except (OSError, ValueError) as error:  # the bundle is saved: no reason to fail
            print(f"{error}; nothing is lost: `score-sde push {folder} {repo}` pushes it")
