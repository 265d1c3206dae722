"""A predictor whose code is a stranger's, in a sandbox that leaves nothing behind and is shown only
what is revealed.

The judge talks to a Remote as to any predictor: predict, learn. A Remote talks to serve(), the
judge's own end of the pipe, in the child. Both know how long each message is: b"p", inputs, fresh
asks for logits, b"l", targets, real to learn; the answer is b"=" and the logits or nothing, or b"!"
and what went wrong.

The sandbox is bubblewrap's (0.8 or newer; the package `bubblewrap` of Debian and Ubuntu):
namespaces of its own for files, processes, users, network and what processes share. All files it
sees, the system's and Python's, are mounted read-only; its folder, /tmp, is 1 GB of memory. It ends
with the judge, and can reach nothing that could prevent that. What is left is what hardware
remembers by itself: timing, and the memory of a GPU.
"""
import importlib
import inspect
import json
import os
import platform
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from data.dataset import BadInput

PYTHON = [sys.prefix, sys.base_prefix, str(Path(torch.__file__).parents[1])]  # the last: packages
READABLE = ["/usr", "/lib", "/lib64", "/bin", *PYTHON, *map(os.path.realpath, PYTHON)]  # by the child
ENVIRONMENT = {"PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
               "GOMP_SPINCOUNT"}  # it is given
STDERR_LINES = 20  # of what it writes there that are shown

# What the mounts leave open, by processor: its name to seccomp, then socket, socketpair; ptrace,
# process_vm_readv and _writev; syslog; add_key, request_key, keyctl; io_uring_setup; what tells or
# changes which pages of a file are in memory: mincore, fadvise64, preadv2, cachestat; all that
# begin with set, get, list and remove and end in xattr.
DENIED = {
    "x86_64": (0xC000003E, 41, 53, 101, 310, 311, 103, 248, 249, 250, 425, 27, 221, 327, 451, *range(188, 200)),
    "aarch64": (0xC00000B7, 198, 199, 117, 270, 271, 116, 217, 218, 219, 425, 232, 223, 286, 451, *range(5, 17)),
}


def reachable(folder: Path) -> str:
    """-> what a child may read that holds the folder, or ""."""
    real = os.path.realpath(folder)
    return next((path for path in READABLE if real.startswith(os.path.realpath(path) + os.sep)), "")


def forget_files() -> None:
    """Drops the files that a child may read from memory, lest one child tells the next by which of
    them are there."""
    roots = {os.path.realpath(path) for path in READABLE}
    for root in roots:
        inside = not roots.isdisjoint(map(str, Path(root).parents))
        for _, _, names, folder in os.fwalk(root) if not inside else ():
            for name in names:
                with suppress(OSError):
                    file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=folder)
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(file)


# ---- the sandbox


def filter_calls() -> bytes:
    """-> a program for seccomp: EACCES to the DENIED system calls and to those of other
    processors."""
    load, if_equal, if_at_least, answer = 0x20, 0x15, 0x35, 0x06
    processor, *calls = DENIED[platform.machine()]
    n = len(calls)
    program = [(load, 0, 0, 4), (if_equal, 0, n + 3, processor), (load, 0, 0, 0)]
    program += [(if_at_least, n + 1, 0, 1 << 30)]  # x86's other table
    program += [(if_equal, n - i, 0, call) for i, call in enumerate(calls)]
    program += [(answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x50000 | 13)]
    return b"".join(struct.pack("HBBI", *line) for line in program)


def sandbox(artifact: Path) -> list[str]:
    """-> the words before a command that put it into the sandbox, with the artifact as
    /tmp/artifact.pyz."""
    words = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL",
             "--uid", "65534", "--gid", "65534", "--new-session", "--die-with-parent",
             "--proc", "/proc", "--dev", "/dev", "--size", str(1 << 30), "--tmpfs", "/tmp"]
    for path in ["/sys", "/etc/alternatives", "/etc/ld.so.cache", *READABLE]:  # some may be in /tmp
        words += ["--ro-bind-try", path, path]
    for path in Path("/dev").glob("nvidia*"):
        words += ["--dev-bind", str(path), str(path)]
    words += ["--ro-bind", str(artifact.resolve()), "/tmp/artifact.pyz"]
    for path in ("/proc", "/dev", "/"):
        words += ["--remount-ro", path]
    return [*words, "--chdir", "/tmp"]


class Child:
    """A command in the sandbox, or unconfined in the artifact's folder. close() returns when
    nothing of it is left. One that was never started may be killed and closed, too."""

    process = first = None

    def __init__(self, artifact: Path, command: list, env: dict, confined: bool = True):
        calls, calls_in = os.pipe()
        info, info_in = os.pipe()
        words = [*sandbox(artifact), "--seccomp", str(calls), "--info-fd", str(info_in), "--"]
        os.write(calls_in, filter_calls() if confined else b"")
        os.close(calls_in)
        self.process = subprocess.Popen(
            [*words, *command] if confined else command, cwd=artifact.parent, env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, pass_fds=(calls, info_in))
        os.close(calls)
        os.close(info_in)
        with open(info) as file:
            said = file.read() if confined else ""
        if said:
            self.first = os.pidfd_open(json.loads(said)["child-pid"])  # of the sandbox's processes

    def kill(self):
        """The kernel kills the sandbox's processes when bubblewrap dies."""
        if self.process and self.process.returncode is None:  # else its number may be another's
            with suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self):
        self.kill()
        if self.process:
            self.process.wait()
        if self.first is not None:
            select.select([self.first], [], [])


def lacking() -> str:
    """-> what this system lacks to confine a child, in words, or ""."""
    if platform.machine() not in DENIED or not shutil.which("bwrap"):
        return "bubblewrap (Linux on x86_64 or aarch64: apt-get install bubblewrap)"
    child = Child(Path(sys.executable), ["true"], {})
    _, said = child.process.communicate()
    child.close()
    return f"bubblewrap that works: {said!r:.200}" if child.process.returncode else ""


# ---- both ends of the pipe


def serve(name: str, device: str, vocab_size: int) -> None:
    """The child's side of Remote, until its stdin ends. Prints go to stderr."""
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))  # to one byte, for an empty core would go through a pipe
    if device == "cpu":
        half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # of the memory
        resource.setrlimit(resource.RLIMIT_DATA, (half, half))
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def answer(sign, content=b""):
        answers.write(sign)
        answers.write(content)
        answers.flush()
    try:
        sys.path[:0] = ["artifact.pyz"]
        predictor, name = importlib.import_module("eval_bpb").build("artifact.pyz", name, device)
        B, T = int(predictor.slots), int(predictor.chunk)
        answer(b"=", struct.pack("<qq64s", B, T, name.encode()))
        while ask := requests.read(1):
            tokens = np.frombuffer(bytearray(requests.read(8 * B * T)), np.int64).reshape(B, T)
            flags = np.frombuffer(bytearray(requests.read(B if ask == b"p" else B * T)), bool)
            if ask == b"l":
                predictor.learn(tokens, flags.reshape(B, T))
                answer(b"=")
                continue
            logits = predictor.predict(flags, tokens).detach().float().cpu().numpy()
            if logits.shape != (B, T, vocab_size):
                raise ValueError(f"predict() must return logits {B, T, vocab_size}, not {logits.shape}")
            answer(b"=", memoryview(np.ascontiguousarray(logits)).cast("B"))
    except BaseException as e:
        answer(b"!", f"{type(e).__name__}: {e}".encode()[:4096])
        raise


class Remote(Child):
    """A predictor in a child process: predict and learn send it what is revealed, no more.

    The child, which open() starts, is told no path but those of Python, and runs serve() before any
    code of the artifact.
    """

    def __init__(self, artifact: Path, device: str, vocab_size: int, confined: bool):
        self.artifact, self.device, self.vocab_size = artifact, device, vocab_size
        self.confined = confined

    def open(self, name: str, seconds: float = 0) -> str:
        """Starts the child, which ends after `seconds`; 0: never -> the predictor's name. From then
        on .slots and .chunk are known."""
        folder = "/tmp" if self.confined else str(self.artifact.parent)
        env = {key: os.environ[key] for key in ENVIRONMENT & os.environ.keys()}
        env |= {"HOME": folder, "TMPDIR": folder, "USER": "nobody", "PYTHONPATH": PYTHON[-1]}
        code = f"""import importlib, os, struct, sys
import numpy as np
{inspect.getsource(serve)}
serve({name!r}, {self.device!r}, {self.vocab_size})"""
        super().__init__(self.artifact, [sys.executable, "-c", code], env, self.confined)
        threading.Thread(target=self.show_stderr, daemon=True).start()
        self.timer = threading.Timer(seconds, self.kill)
        self.timer.daemon = True
        if seconds:
            self.timer.start()
        self.slots, self.chunk, said = struct.unpack("<qq64s", self.receive(80))
        return said.rstrip(b"\0").decode("utf-8", "replace")

    def show_stderr(self):
        lines = 0
        while data := self.process.stderr.readline(1 << 12):
            lines += 1
            if lines <= STDERR_LINES:
                print(f"artifact: {data!r:.60}", file=sys.stderr)

    def receive(self, size: int) -> bytearray:
        """The answer, of so many bytes."""
        sign = self.process.stdout.read(1)
        if sign == b"!":
            raise BadInput(f"its code says {self.process.stdout.read(4096)!r:.240}")
        content = bytearray(size)
        if sign != b"=" or self.process.stdout.readinto(content) < size:
            self.close()
            raise BadInput(f"no answer from its process: exit code {self.process.returncode}; it had "
                           f"{self.timer.interval:.0f} s (0: any time)")
        return content

    def ask(self, sign: bytes, tokens, flags, size: int) -> bytearray:
        with suppress(BrokenPipeError):  # then there is no answer either
            self.process.stdin.write(sign + tokens.tobytes() + flags.tobytes())
            self.process.stdin.flush()
        return self.receive(size)

    def predict(self, fresh, inputs):
        B, T = inputs.shape
        content = self.ask(b"p", inputs, fresh, 4 * B * T * self.vocab_size)
        return torch.frombuffer(content, dtype=torch.float32).view(B, T, self.vocab_size)

    def learn(self, targets, real):
        self.ask(b"l", targets, real, 0)
