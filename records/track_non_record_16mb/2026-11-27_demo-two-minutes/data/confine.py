"""A predictor whose code is not the judge's own, confined in a child process that is shown only what is revealed.

The judge talks to Remote as to any predictor: plan, predict, learn. Remote talks to serve(), the judge's own end of the
pipe, in the child: frames of 4 bytes of name, 8 bytes of length, content. The child is given confine(), serve() and
what they call as source, before any code of the artifact.
"""
import importlib
import inspect
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from data.dataset import BadInput

READABLE = [os.path.realpath(p) for p in ("/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys", sys.prefix,
                                          sys.base_prefix, Path(torch.__file__).parents[1])]  # by the child
STDERR_BYTES = 1 << 20  # that a child may write to its stderr


class Refused(BadInput):
    """The predictor broke a rule: there is no score."""


def failure(error: BaseException) -> str:
    """An exception in the artifact's code -> one line: its type, its message, the last line of code."""
    import traceback
    last = (traceback.extract_tb(error.__traceback__) or [None])[-1]
    message = (str(error).splitlines() or [""])[0][:500]
    return f"{type(error).__name__}: {message} ({last.filename}:{last.lineno}: {last.line})" if last else message


def reachable(folder: Path) -> str:
    """-> what a child may read that holds the folder, or ""."""
    real = os.path.realpath(folder)
    return next((path for path in READABLE if real.startswith(path + os.sep)), "")


def one_line(data: bytes) -> str:
    """What a child says, without what could make a terminal show something else."""
    return "".join(c if c.isprintable() else " " for c in data.decode("utf-8", "replace")).strip()


def send(pipe, name: bytes, *arrays) -> None:
    parts = [memoryview(np.ascontiguousarray(a)).cast("B") for a in arrays if a.size]
    pipe.write(struct.pack("<4sQ", name, sum(part.nbytes for part in parts)))
    for part in parts:
        pipe.write(part)
    pipe.flush()


def receive(pipe, limits: dict) -> tuple[bytes, bytearray]:
    """-> (name, content) of the next frame. limits: {name: most bytes}. Raises EOFError at the end, else ValueError."""
    header = pipe.read(12)
    if len(header) < 12:
        raise EOFError
    name, size = struct.unpack("<4sQ", header)
    if size > limits.get(name, -1):
        raise ValueError(f"a frame {name!r} of {size} bytes where {limits} may come")
    content = bytearray(size)
    if pipe.readinto(content) < size:
        raise EOFError
    return name, content


def confine(readable: list, memory: int) -> str:
    """Takes from this process the network, what processes share, all files but `readable` (to read) and its folder (to
    write), and memory (bytes; 0: no limit) beyond a limit, as far as Linux lets an ordinary user: namespaces, Landlock,
    seccomp, limits. It goes on in a fork that is the first of its own processes, so that none of them outlives it.
    -> what is missing, or "". What stays is what a machine remembers by itself: caches, times of last access."""
    import ctypes
    import os
    import resource
    import struct
    uid, gid = os.getuid(), os.getgid()
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        alone = libc.unshare(0x78000000) == 0  # CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC
    except (OSError, AttributeError):
        return "namespaces and Landlock (this is not Linux)"
    maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1", "oom_score_adj": "1000"}
    for name, line in maps.items() if alone else ():
        try:
            with open(f"/proc/self/{name}", "w") as f:
                f.write(line)
        except OSError:
            pass  # the process then has no name for its user, no more
    if alone and (child := os.fork()):
        for fd in (0, 1):
            os.close(fd)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    libc.prctl(1, 9, 0, 0, 0)  # dies with its parent
    # Landlock is system calls 444 to 446 on every processor. Rights by bit: 0 execute, 1 write, 2 read, 3 list, 4 to 12
    # make and remove, 13 move (since version 2), 14 truncate (since version 3).
    version = libc.syscall(444, None, ctypes.c_size_t(0), 1)
    rights = (1 << min(12 + version, 15)) - 1
    ruleset = libc.syscall(444, struct.pack("<Q", rights), ctypes.c_size_t(8), 0) if version > 0 else -1
    files = ruleset >= 0
    devices = [f"/dev/{n}" for n in os.listdir("/dev") if n in ("null", "zero", "urandom") or n.startswith("nvidia")]
    for path, allowed in [*((p, 0b1101) for p in readable), *((p, 0b0110) for p in devices), (".", rights)]:
        if files and os.path.exists(path):
            fd = os.open(path, os.O_PATH)
            files = libc.syscall(445, ruleset, 1, struct.pack("<Qi", allowed, fd), 0) == 0
            os.close(fd)
    files = files and libc.prctl(38, 1, 0, 0, 0) == 0 and libc.syscall(446, ruleset, 0) == 0  # 38: no new privileges
    # By seccomp, three ways out that the others leave: sockets that are files, keyrings, io_uring to reach the first.
    arch, *calls = {"x86_64": (0xC000003E, 42, 248, 249, 250, 425),  # connect, add_key, request_key, keyctl, io_uring
                    "aarch64": (0xC00000B7, 203, 217, 218, 219, 425)}.get(os.uname().machine, (0,))
    program = [(0x20, 0, 0, 4), (0x15, 0, len(calls) + 3, arch), (0x20, 0, 0, 0)]  # load the architecture, the call
    program += [(0x15, len(calls) - i + 1, 0, call) for i, call in enumerate(calls)]  # equal: to the last line
    program += [(0x35, 1, 0, 1 << 30), (6, 0, 0, 0x7FFF0000), (6, 0, 0, 0x50000 | 13)]  # x86's other table; yes; EACCES
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    shut = bool(calls) and libc.prctl(22, 2, struct.pack("HP", len(program), ctypes.addressof(code)), 0, 0) == 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    missing = {"user namespaces": alone, "Landlock": files, "seccomp": shut}
    return " and ".join(name for name, there in missing.items() if not there)


def serve(name: str, device: str, missing: str) -> None:
    """The child's side of Remote, until its stdin ends. Prints go to stderr."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def text(s):
        return np.frombuffer(s.encode()[:1 << 12], np.uint8)

    send(answers, b"conf", text(missing))
    try:
        sys.path[:0] = ["artifact.pyz"]
        predictor, name = importlib.import_module("eval_bpb").build("artifact.pyz", name, device)
        send(answers, b"open", text(name))
        while True:
            ask, content = receive(requests, dict.fromkeys((b"plan", b"pred", b"lern"), 1 << 40))
            values = np.frombuffer(content, np.int64)
            if ask == b"plan":
                rounds = enumerate(predictor.plan(values))
                send(answers, b"plan", np.concatenate([np.insert(np.asarray(r, np.int64), 0, i, 1) for i, r in rounds]))
            elif ask == b"pred":
                spans, inputs = np.split(values[1:], [3 * values[0]])
                send(answers, b"logi", predictor.predict(spans.reshape(-1, 3), inputs).detach().float().cpu().numpy())
            else:
                predictor.learn(values)
                send(answers, b"done")
    except EOFError:
        pass
    except BaseException as e:
        send(answers, b"bad!", text(str(e) if type(e).__name__ == "BadInput" else failure(e)))


class Remote:
    """A predictor in a child process, in an empty folder: plan, predict and learn send it what is revealed, no more.

    The child is told no path but those of Python, and runs confine() and serve() before any code of the artifact.
    """

    def __init__(self, remotes: list, blob: bytes, name: str, device: str, vocab_size: int):
        self.folder, self.vocab_size, self.child = tempfile.mkdtemp(prefix="nanogolf"), vocab_size, None
        remotes.append(self)  # at once: the clock may end everything while the child starts
        (Path(self.folder) / "artifact.pyz").write_bytes(blob)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if device == "cpu" else 0
        code = "\n".join([*map(inspect.getsource, (confine, failure, send, receive, serve)),
                          f"missing = confine({READABLE!r}, {memory})", "import importlib, os, struct, sys",
                          "import numpy as np", f"serve({name!r}, {device!r}, missing)"])
        env = {k: v for k, v in os.environ.items() if k in ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES",
                                                            "OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT")}
        env |= {"HOME": self.folder, "TMPDIR": self.folder, "PYTHONPATH": READABLE[-1]}
        self.child = subprocess.Popen([sys.executable, "-c", code], cwd=self.folder, env=env, start_new_session=True,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.too_much = ""
        threading.Thread(target=self.read_stderr, daemon=True).start()

    def read_stderr(self):
        """Shows what the child writes, line by line and as its words; more than STDERR_BYTES end it."""
        left = STDERR_BYTES
        while data := self.child.stderr.readline(1 << 12):
            if (left := left - len(data)) >= 0:
                print(f"artifact: {one_line(data)}", file=sys.stderr)
            elif not self.too_much:
                self.too_much = f", having written more than {STDERR_BYTES} bytes to stderr"
                self.kill()

    def open(self) -> list[str]:
        """-> [what the system lacks to confine the child or "", the predictor's name], once the artifact is loaded."""
        return [one_line(self.receive({name: 1 << 8})) for name in (b"conf", b"open")]

    def receive(self, limits: dict) -> bytearray:
        try:
            name, content = receive(self.child.stdout, limits | {b"bad!": 1 << 12})
        except EOFError:
            with suppress(subprocess.TimeoutExpired):
                self.child.wait(2)
            self.kill()
            code = self.child.wait()
            raise Refused(f"the predictor's process ended in the middle (exit code {code}{self.too_much})") from None
        except ValueError as e:
            raise Refused(f"the predictor's process sent {e}") from None
        if name == b"bad!":
            raise Refused(one_line(content))
        return content

    def ask(self, limits: dict, name: bytes, *arrays) -> bytearray:
        if select.select([self.child.stdout], [], [], 0)[0] and self.child.stdout.peek(1):
            raise Refused("the predictor's process sent something before it was asked")
        with suppress(BrokenPipeError):  # then there is no answer either
            send(self.child.stdin, name, *arrays)
        return self.receive(limits)

    def plan(self, lengths):
        content = self.ask({b"plan": 32 * int(lengths.sum())}, b"plan", lengths)
        if len(content) % 32:
            raise Refused("the predictor's process sent a plan cut short")
        table = np.frombuffer(content, np.int64).reshape(-1, 4)  # round, document, start, stop
        return np.split(table[:, 1:], np.flatnonzero(np.diff(table[:, 0])) + 1)

    def predict(self, spans, inputs):
        size = 4 * len(inputs) * self.vocab_size
        content = self.ask({b"logi": size}, b"pred", np.array([len(spans)]), spans, inputs)
        if len(content) != size:
            raise Refused(f"predict() must return logits {(len(inputs), self.vocab_size)}, not {len(content)} bytes")
        return torch.frombuffer(content, dtype=torch.float32).view(len(inputs), self.vocab_size)

    def learn(self, targets):
        self.ask({b"done": 0}, b"lern", targets)

    def kill(self):
        """First the child's own child, without which all that it started dies, whatever group it has moved to."""
        with suppress(OSError):
            for pid in Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)

    def close(self):
        if self.child:
            self.kill()
            self.child.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
