"""Programs in a pseudo-terminal, and what is then to be seen on its screen."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from pathlib import Path

_CONTROL = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|(\r)|(\n)|(.)", re.DOTALL)


def screen(output, columns):
    """The lines of a terminal that has got the output."""
    lines, row, column = [[]], 0, 0
    for number, command, back, down, char in _CONTROL.findall(output):
        if command == "A":
            row = max(0, row - int(number or 1))
        elif command == "K":
            assert number == "2"
            lines[row] = []
        elif command:
            assert command in "mhl", command  # colours, and whether the cursor is shown
        elif back:
            column = 0
        elif down:
            row += 1
        else:
            if column == columns:  # a full line goes on only with the next character
                row, column = row + 1, 0
            while len(lines) <= row:
                lines.append([])
            lines[row] += " " * (column + 1 - len(lines[row]))
            lines[row][column] = char
            column += 1
        while len(lines) <= row:
            lines.append([])
    return ["".join(line).rstrip() for line in lines]


def interrupted(program, arguments, when, columns=80, rows=30, seconds=180):
    """Run a Python program in a terminal of its own, and press Ctrl-C there.

    The key is pressed when ``when(output, processes)`` first holds; the terminal passes it to all
    processes of the program. Returns the exit status, the screen, and the processes that are left.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
        os.environ.pop("COLUMNS", None)
        os.environ |= {"TERM": "xterm", "PYTHONWARNINGS": "error::ResourceWarning"}
        os.execv(sys.executable, [sys.executable, "-c", program, *arguments])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    output, pressed, until = b"", False, time.monotonic() + seconds
    try:
        while True:
            if select.select([terminal], [], [], 0.05)[0]:
                try:
                    output += os.read(terminal, 1 << 16)
                except OSError:  # all processes have closed it
                    break
            if not pressed and when(output.decode(errors="ignore"), processes(pid)):
                os.write(terminal, b"\x03")
                pressed = True
            assert time.monotonic() < until, output
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(terminal)
    left = processes(pid)
    while left and time.monotonic() < until:  # they may need a moment
        time.sleep(0.02)
        left = processes(pid)
    return os.waitstatus_to_exitcode(status), screen(output.decode(), columns), left


def processes(leader):
    """The living processes of a session with this leader, as /proc has them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        if int(session) == leader and state != "Z":
            found.append(int(folder.name))
    return found
