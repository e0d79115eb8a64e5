"""The command line in processes of its own, that begin where the heavy imports are already done."""

import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

# What takes seconds to import, once for all processes of a test run; of diffkd itself nothing.
HEAVY = [
    *(
        "torch",
        "torch._dynamo",
        "torchvision",
        "torchmetrics",
        "lightning.fabric",
        "timm",
        "sklearn.datasets",
    ),
    *("torch.utils.tensorboard", "matplotlib.figure", "scipy.stats", "sklearn.datasets"),
]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(HEAVY)


def command(words, cwd, env, out, err):
    """What a new process does: the command, as if it had been typed."""
    for number, place in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(place, os.O_RDWR | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["diffkd", *words]
    # Whoever starts it again, for a second device, does so as for `python -m diffkd.cli`.
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("diffkd.cli")
    from diffkd.cli import main

    main()


class Command:
    """A command that runs; of the face of `subprocess.Popen`."""

    def __init__(self, words, cwd, env):
        self.place = Path(tempfile.mkdtemp())
        out, err = self.place / "out", self.place / "err"
        self.process = FORKS.Process(
            target=command, args=([*map(str, words)], str(cwd), os.environ | env, out, err)
        )
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            self.process.kill()
            raise TimeoutError(f"it has not ended within {timeout} s: {(self.place / 'err').read_text()}")
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return (self.place / "out").read_text(), (self.place / "err").read_text()


def wait_until(done, process, patience=120):
    """Until something is so, while a process runs; False where the process ended before."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if done():
            return True
        if process.poll() is not None:
            return bool(done())
        time.sleep(0.005)
    return False
