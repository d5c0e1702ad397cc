"""Running the command line in real processes, the slow imports paid once.

`Server` is one process that has imported everything the commands import; each command is a fork of it: a process of its
own, with its own exit code, output, working folder and limits.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SERVER = """
import json, os, resource, signal, sys
import milonga.cli.evaluate, milonga.cli.generate, milonga.cli.presets, milonga.cli.train, milonga.cli.main
import milonga.evaluation, milonga.inference

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        for number, path in ((0, job["stdin"]), (1, job["stdout"]), (2, job["stderr"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        os.chdir(job["folder"])
        if job["file_limit"] is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
        sys.argv = ["milonga", *[os.fsdecode(bytes.fromhex(word)) for word in job["arguments"]]]
        try:
            milonga.cli.main.main()
        except SystemExit as leaving:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(leaving.code or 0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(code), flush=True)
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


class Server:
    """See the module's docstring."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, *arguments, folder, stdin=b"", file_limit=None) -> Done:
        """Run one command line (str or bytes words) in `folder`; no file may grow past `file_limit` bytes."""
        with tempfile.TemporaryDirectory() as place:
            paths = {name: str(Path(place) / name) for name in ("stdin", "stdout", "stderr")}
            Path(paths["stdin"]).write_bytes(stdin)
            job = paths | {
                "arguments": [os.fsencode(word).hex() for word in arguments],
                "folder": str(folder),
                "file_limit": file_limit,
            }
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            code = json.loads(self._process.stdout.readline())
            out, err = (Path(paths[name]).read_bytes().decode() for name in ("stdout", "stderr"))
            return Done(code, out, err)

    def close(self):
        """End the process."""
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()
