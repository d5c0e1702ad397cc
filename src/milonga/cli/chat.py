"""`milonga chat`: one session in the terminal, text in and text out, with the session's own verbs as commands.

Text goes to stdout, all else to stderr. A line is read by the session, line break included, and the model goes on.
Nothing but the end of the input, or `/quit`, ends a chat.
"""

import re
import sys
import time
from collections import deque
from collections.abc import Callable

from milonga.cli import console
from milonga.cli.generate import storage_of, warm_up
from milonga.errors import UserError
from milonga.inference import LanguageModel, Mark, Sampling, Session, load

if sys.platform != "win32":
    import readline  # noqa: F401  `input` then has a history and lines that can be edited

# Turns that can be taken back; each keeps one state.
TURNS = 64
# No line longer than a narrow terminal.
HELP = """\
TEXT            the model reads the line and goes on; an empty line lets it go
                on alone
//TEXT          a line that begins with a slash
/save FILE      save the session; `milonga chat RUN --load FILE` goes on there
/load FILE      go to a saved place
/rewind [N]     take the last N turns back (1)
/fork NAME      go on in a copy of the session; the other stays where it is
/go NAME        go to another of the sessions; the first is called main
/stats          where the session stands
/help           this
/quit           end; so does Ctrl-D. Ctrl-C ends what is being written"""


class Branch:
    """A session, the places before its last turns, and how fast the last reply in it was written."""

    def __init__(self, session: Session):
        self.session = session
        self.turns: deque[Mark] = deque(maxlen=TURNS)
        self.rate = float("nan")  # bytes/s


class Chat:
    """The state of a chat, and its commands.

    Args:
        lm: the model.
        session: where to begin.
        sampling: how to draw.
        bytes_: a reply has at most.
    """

    def __init__(self, lm: LanguageModel, session: Session, sampling: Sampling, bytes_: int):
        self._lm, self._sampling, self._bytes = lm, sampling, bytes_
        self._branches = {"main": Branch(session)}
        self._name = "main"
        self._commands: dict[str, Callable[[str], None]] = {
            "save": self._save,
            "load": self._load,
            "rewind": self._rewind,
            "fork": self._fork,
            "go": self._go,
            "stats": self._stats,
            "help": lambda argument: console.say(HELP),
        }

    @property
    def _branch(self) -> Branch:
        return self._branches[self._name]

    def take(self, line: bytes) -> bool:
        """One line of input without its line break: -> whether the chat goes on. Errors are said and forgotten."""
        words = line.decode(errors="replace").strip()
        if words == "/quit":
            return False
        try:
            if line.startswith(b"/") and not line.startswith(b"//"):
                self._command(words)
            else:
                self._turn(line[1:] if line.startswith(b"//") else line)
        except (UserError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            console.say(f"chat: {' '.join(str(error).split())}")
        except KeyboardInterrupt:
            console.say("")
        return True

    def _command(self, words: str) -> None:
        name, _, argument = words[1:].partition(" ")
        command = self._commands.get(name)
        if name == "quit":
            raise UserError(f"/quit takes nothing behind it, got {argument.strip()!r}")
        if command is None:
            raise UserError(f"no command /{name}; /help lists them, and // begins a text with a slash")
        command(argument.strip())

    def _turn(self, text: bytes) -> None:
        """Read a line and write a reply. Interrupted while reading, the turn never was."""
        branch = self._branch
        before = branch.session.mark()
        try:
            branch.session.feed(text + b"\n")
        except BaseException:
            branch.session.rewind(before)
            raise
        branch.turns.append(before)
        generation = branch.session.generate(self._bytes, self._sampling)
        generation.most_bytes = self._bytes  # of subwords `generate` counts tokens
        terminal = sys.stdout.isatty()
        try:
            for piece in generation:
                sys.stdout.write(console.harmless(piece) if terminal else piece)
                sys.stdout.flush()
        finally:
            generation.close()
            sys.stdout.write("\n")
            sys.stdout.flush()
            branch.rate = generation.bytes_per_second
            self.status()

    def status(self) -> None:
        """One line: where the session stands, how fast it wrote, what it holds."""
        branch, name = self._branch, self._name if len(self._branches) > 1 else None
        console.standing(branch.session.bytes_read, branch.rate, branch.session.nbytes, name)

    def _save(self, argument: str) -> None:
        path = _needed(argument, "/save FILE")
        began = time.monotonic()
        self._branch.session.save(path)
        console.say(f"saved to {path} in {time.monotonic() - began:.2f} s")

    def _load(self, argument: str) -> None:
        path = _needed(argument, "/load FILE")
        branch = self._branch
        before = branch.session.mark()
        branch.session.restore(path)
        branch.turns.append(before)
        self.status()

    def _rewind(self, argument: str) -> None:
        if not re.fullmatch("[0-9]*", argument):
            raise UserError(f"/rewind takes a number of turns, got {argument!r}")
        digits, turns = argument.lstrip("0") if argument else "1", self._branch.turns
        if len(digits) > len(str(TURNS)) or int(digits or 0) > len(turns):
            raise UserError(f"/rewind {digits}: only {len(turns)} turns can be taken back (at most {TURNS} are kept)")
        count = int(digits or 0)
        for _ in range(count):
            self._branch.session.rewind(turns.pop())
        self.status()

    def _fork(self, argument: str) -> None:
        name = _needed(argument, "/fork NAME")
        if name in self._branches:
            raise UserError(f"/fork: there is a session {name!r} already; /go {name} goes to it")
        twin = Branch(self._branch.session.fork())
        twin.turns.extend(self._branch.turns)
        twin.rate = self._branch.rate
        self._branches[name], self._name = twin, name
        self.status()

    def _go(self, argument: str) -> None:
        name = _needed(argument, f"/go NAME, of the sessions {', '.join(self._branches)}")
        if name not in self._branches:
            raise UserError(f"/go: there are the sessions {', '.join(self._branches)}, not {name!r}")
        self._name = name
        self.status()

    def _stats(self, argument: str) -> None:
        session, turns, rate = self._branch.session, self._branch.turns, self._branch.rate
        rows = [
            ("session", f"{self._name} (of {', '.join(self._branches)})"),
            ("bytes read and written", console.count(session.bytes_read)),
            ("tokens", console.count(session.position)),
            ("state", f"{console.size(session.nbytes)}, next prediction included"),
            ("last reply", f"{console.count(rate)} bytes/s" if rate == rate else "none yet"),
            ("turns that can be taken back", f"{len(turns)}, {console.size(sum(mark.nbytes for mark in turns))}"),
            ("seed", str(self._sampling.seed)),
        ]
        for what, value in rows:
            console.say(f"{what}: {value}")


def _needed(argument: str, usage: str) -> str:
    if not argument:
        raise UserError(f"usage: {usage}")
    return argument


def _line(terminal: bool) -> bytes | None:
    """The next line of input without its line break; None at the end."""
    if terminal:
        try:
            return input("> ").encode(errors="surrogateescape")
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise UserError(f"the line is not valid UTF-8 ({error.reason})") from error
    line = sys.stdin.buffer.readline()
    return line.removesuffix(b"\n").removesuffix(b"\r") if line else None


def run_chat(
    run: str,
    bytes_: int,
    sampling: Sampling,
    state: str | None,
    device: str | None,
    dtype: str | None = None,
    weights: str | None = None,
) -> int:
    """Talk to a model until the input ends.

    Args:
        run: where the model is.
        bytes_: a reply has at most.
        sampling: how to draw.
        state: a state file to go on from.
        device: `cpu`, `cuda`, `cuda:N` or None.
        dtype, weights: as for `milonga.load`.

    Raises:
        UserError: if there is no model at `run`, it cannot be loaded so, or the state file does not fit it.
    """
    lm = load(run, device=device, dtype=dtype, weights=storage_of(weights))
    warm_up(lm)
    chat = Chat(lm, lm.session(state), sampling, bytes_)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        console.say("The model goes on from what you write. /help lists the commands, Ctrl-D ends.")
    while True:
        try:
            line = _line(terminal)
            if line is None or not chat.take(line):
                break
        except UserError as error:
            console.say(f"chat: {error}")
        except KeyboardInterrupt:  # at the prompt, or just after a reply
            console.say("")
    if terminal:
        sys.stdout.write("\n")
    return 0
