"""Running the command line in real processes, the slow imports paid once.

`Server` is one process that has imported everything the commands import; each command is a fork of it: a process of its
own, with its own exit code, output, working folder and limits.
"""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

SERVER = """
import json, os, resource, select, signal, sys
import milonga.cli.evaluate, milonga.cli.generate, milonga.cli.presets, milonga.cli.train, milonga.cli.main
import milonga.cli.demo, milonga.cli.bench_run
from milonga.ops.backend import COMPILED, kernels

for op in COMPILED:
    kernels(op, "cpu").compile_kernels()


def run(job, pipes):
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, (_, writing) in pipes.items():
        os.dup2(writing, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)
    os.chdir(job["folder"])
    if job["file_limit"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    sys.argv = ["milonga", *[os.fsdecode(bytes.fromhex(word)) for word in job["arguments"]]]
    milonga.cli.main.main()


for line in sys.stdin:
    pipes = {1: os.pipe(), 2: os.pipe()}
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(json.loads(line), pipes)
        except SystemExit as leaving:
            code = leaving.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    texts = {1: b"", 2: b""}
    left = {}
    for number, (reading, writing) in pipes.items():
        os.close(writing)
        left[reading] = number
    while left:
        for reading in select.select(list(left), [], [])[0]:
            piece = os.read(reading, 65536)
            texts[left[reading]] += piece
            if not piece:
                os.close(reading)
                del left[reading]
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, texts[1].decode(), texts[2].decode()]), flush=True)
"""


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def script() -> Path:
    """The installed console script."""
    return Path(sys.executable).parent / "milonga"


def milonga(*arguments, folder, stdin=None, environment=None, timeout=120) -> Done:
    """Run the installed command in a fresh process."""
    done = subprocess.run(
        [script(), *arguments],
        cwd=folder,
        input=stdin,
        capture_output=True,
        timeout=timeout,
        env=os.environ | (environment or {}),
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def milonga_on_a_terminal(*arguments, folder) -> tuple[int, bytes]:
    """Run the installed command with stdout and stderr on a terminal: -> (exit code, what it showed)."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color"}
    process = subprocess.Popen([script(), *arguments], cwd=folder, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    return process.wait(timeout=60), shown


class Server:
    """See the module's docstring."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # it forks: no thread may be running
        )

    def run(self, *arguments, folder, file_limit=None) -> Done:
        """Run one command line (str or bytes words) in `folder`; no file may grow past `file_limit` bytes."""
        words = [os.fsencode(word).hex() for word in arguments]
        job = {"arguments": words, "folder": str(folder), "file_limit": file_limit}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Done(*json.loads(self._process.stdout.readline()))

    def close(self):
        """End the process."""
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()
