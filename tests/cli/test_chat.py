"""`milonga chat`: a session in the terminal, through pipes and through a pseudo-terminal."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from milonga.cli import main
from milonga.cli.chat import HELP
from milonga.cli.sampling_options import unescaped
from milonga.errors import UserError
from milonga.inference import Sampling, load
from milonga.models.pretrained import save_weights
from tests.inference.helpers import opinionated

from .processes import Done, milonga, script

REPLY = Sampling(temperature=0.8, stop=(b"\n\n",), valid_utf8=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    save_weights(opinionated().network, folder / "model.safetensors")
    return folder


class _Stdin:
    def __init__(self, content):
        self.buffer = io.BytesIO(content)

    def isatty(self):
        return False


@pytest.fixture
def chat(folder, capsys, monkeypatch):
    """A chat in this process: what is typed and options -> how it ended."""

    def run(text, *options):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "stdin", _Stdin(text))
        code = main.run(["chat", "model.safetensors", "--device", "cpu", *options])
        return Done(code, *capsys.readouterr())

    return run


def test_a_chat_in_a_process_of_its_own(folder):
    done = milonga(
        "chat", "model.safetensors", "--device", "cpu", "--bytes", "9", folder=folder, stdin=b"Hello\n/quit\n"
    )
    session = load(folder / "model.safetensors", device="cpu").session()
    assert (done.code, done.out) == (0, reply(session, b"Hello", 9))
    assert re.fullmatch(r"\[15 bytes, [\d,]+ bytes/s, state .+\]\n", done.err)


def reply(session, line, count=30, sampling=REPLY):
    session.feed(line + b"\n")
    return "".join(session.generate(count, sampling)) + "\n"


def test_replies_are_all_there_is_on_stdout_and_each_has_a_status_line(folder, chat):
    done = chat(b"Hello\n\xff\xfe raw\r\n\nlast", "--bytes", "30")
    session = load(folder / "model.safetensors", device="cpu").session()
    assert done.out == "".join(reply(session, line) for line in (b"Hello", b"\xff\xfe raw", b"", b"last"))
    lines = done.err.splitlines()
    assert len(lines) == 4
    held = {re.fullmatch(r"\[[\d,]+ bytes, [\d,]+ bytes/s, state (.+)\]", line)[1] for line in lines}
    assert len(held) == 1, "the state is flat"


def test_commands(folder, chat):
    text = b"""Hello
/save a.state
How are you
/rewind
/fork other
How are you
/go main
How are you
/load a.state
How are you
/stats
/help
//slash
/quit
never read
"""
    done = chat(text, "--bytes", "30")
    session = load(folder / "model.safetensors", device="cpu").session()
    expected = reply(session, b"Hello")
    answer = reply(session, b"How are you")
    assert done.out == expected + answer * 4 + reply(session, b"/slash")
    assert "saved to a.state" in done.err
    assert re.search(r"^session: main \(of main, other\)$", done.err, re.MULTILINE)
    assert re.search(r"^bytes read and written: \d+$", done.err, re.MULTILINE)
    assert "/rewind [N]" in done.err
    assert re.search(r"^\[other, ", done.err, re.MULTILINE)


def test_every_session_has_its_own_rate(chat):
    done = chat(b"Hello\n/fork other\nHow are you\n/go main\n/stats\n/go other\n", "--bytes", "9")
    rates = re.findall(r"\[(?:main, |other, )?[\d,]+ bytes, ([\d,.]+) bytes/s", done.err)
    assert len(rates) == 5
    first, second = rates[0], rates[2]
    assert rates == [first, first, second, first, second]
    assert f"last reply: {first} bytes/s" in done.err


def test_a_chat_loads_its_model_as_it_is_asked_to(folder, chat):
    done = chat(b"Hello\n", "--bytes", "60", "--weights", "int8")
    session = load(folder / "model.safetensors", device="cpu", weights="int8").session()
    assert done.out == reply(session, b"Hello", 60)
    assert "--weights: must be one of" in chat(b"", "--weights", "int4").err


def test_help_fits_a_narrow_terminal():
    assert max(map(len, HELP.splitlines())) <= 79


def test_a_chat_goes_on_from_a_state_file(chat):
    first = chat(b"Hello\n/save b.state\nHow are you\n", "--bytes", "30").out
    later = chat(b"How are you\n", "--bytes", "30", "--load", "b.state").out
    assert first.endswith(later)


def test_errors_of_commands_do_not_end_it(folder, chat):
    (folder / "text.txt").write_text("no state")
    text = b"""/nonsense
/save
/save no/such/folder/a.state
/load nowhere.state
/load text.txt
/load .
/rewind
/rewind x
/rewind \xc2\xb2
/rewind 99999999999999999999
/rewind 0065
/save .
/save a\0b
Hello
/rewind 2
/fork
/fork main
/go
/go nowhere
/
/quit now
\xff/quit
"""
    done = chat(text, "--bytes", "5")
    complaints = [line for line in done.err.splitlines() if line.startswith("chat: ")]
    words = ["/nonsense", "usage", "cannot write", "nowhere.state", "text.txt", "no such state file", "only 0 turns"]
    words += ["'x'", "'\u00b2'", "/rewind 99999999999999999999: only 0 turns", "/rewind 65: only 0"]
    words += ["that is a folder", "zero byte", "only 1 turns", "usage", "already"]
    words += ["usage: /go NAME, of the sessions main", "not 'nowhere'", "no command /;", "/quit takes nothing"]
    assert len(complaints) == len(words)
    for word, complaint in zip(words, complaints, strict=True):
        assert word in complaint
    assert done.out.count("\n") >= 2


def test_settings_that_cannot_be_are_told_before_it_begins(chat):
    for options, words in (
        (["--top-p", "0"], "top_p"),
        (["--stop", r"\q"], "--stop"),
        (["--ban", "é"], "--ban"),
        (["--load", "nowhere.state"], "nowhere.state"),
    ):
        done = chat(b"Hello\n", *options)
        assert (done.code, done.out) == (2, "")
        assert words in done.err
        assert done.err.count("\n") == 1


def test_escapes():
    assert unescaped("--stop", r"a\n\t\\n\xff é") == b"a\n\t\\n\xff " + "é".encode()
    for wrong in ("\\", r"\xf", r"\q", "\udcff"):
        with pytest.raises(UserError, match="--stop"):
            unescaped("--stop", wrong)


class Terminal:
    """The command on a pseudo-terminal."""

    def __init__(self, folder, *options):
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [script(), "chat", "model.safetensors", "--device", "cpu", *options],
            cwd=folder,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm-256color"},
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # makes it the controlling terminal
        )
        os.close(theirs)
        self.shown = b""

    def type(self, data):
        os.write(self._ours, data)

    def sees(self, pattern, timeout):
        """Read until a pattern shows, or not in time; what was shown up to it is used up."""
        end = time.monotonic() + timeout
        while (match := re.search(pattern, self.shown, re.DOTALL)) is None:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._ours], [], [], left)[0]:
                return None
            try:
                self.shown += os.read(self._ours, 65536)
            except OSError:  # the other end is closed
                return None
        self.shown = self.shown[match.end() :]
        return match

    def wait_for(self, pattern):
        match = self.sees(pattern, timeout=60)
        assert match, f"{pattern!r} did not come: {self.shown[-2000:]!r}"
        return match

    def press(self, key, pattern):
        """A key until it works: an interrupt between the prompt and the wait for a line is heard with the next key."""
        for _ in range(12):
            self.type(key)
            if match := self.sees(pattern, timeout=5):
                return match
        raise AssertionError(f"{pattern!r} did not come: {self.shown[-2000:]!r}")

    def close(self):
        os.close(self._ours)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def terminal(folder):
    made = Terminal(folder, "--bytes", "10000000", "--stop", "a stop never met", "--top-k", "3")
    yield made
    made.close()


def test_ctrl_c_ends_what_is_being_written_and_ctrl_d_the_chat(terminal):
    terminal.wait_for(rb"Ctrl-D ends.*> ")
    terminal.press(b"\x03", rb"> ")
    terminal.type(b"Hello\n")
    terminal.wait_for(rb"Hello\r\n.{40}")
    status = terminal.press(b"\x03", rb"\[([\d,]+) bytes, [\d,]+ bytes/s, state [^\]]+\]")
    written = int(status[1].replace(b",", b""))
    assert 40 <= written < 10_000_000
    terminal.wait_for(rb"> ")
    terminal.type(b"/stats\n")
    assert int(terminal.wait_for(rb"bytes read and written: ([\d,]+)")[1].replace(b",", b"")) == written
    terminal.wait_for(rb"> ")
    terminal.type(b"/rewind\n")
    terminal.wait_for(rb"\[0 bytes")
    terminal.wait_for(rb"> ")
    terminal.type(b"\x04")
    assert terminal.process.wait(timeout=30) == 0


def test_an_interrupt_of_a_piped_chat_ends_one_reply_only(folder):
    command = [script(), "chat", "model.safetensors", "--device", "cpu", "--bytes", "10000000", "--stop", "never met!"]
    with subprocess.Popen(
        command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdin.write(b"Hello\n")
        process.stdin.flush()
        assert process.stdout.read(40)
        process.send_signal(signal.SIGINT)
        line = process.stderr.readline()
        while not line.startswith(b"["):
            line = process.stderr.readline()
        out, err = process.communicate(b"/stats\n/quit\n", timeout=60)
        assert process.returncode == 0
        assert b"Traceback" not in err
        assert b"bytes read and written" in err
        assert out
