"""A predictor whose code is a stranger's, in a sandbox that leaves nothing behind and is shown only
what is revealed.

The judge talks to a Remote as to any predictor: predict, learn. A Remote talks to serve(), the
judge's own end of the pipe, in the child. Both know how long each message is: b"p", inputs, fresh
asks for logits, b"l", targets, real to learn; the answer is b"=" and the logits or nothing, or b"!"
and what went wrong.

The sandbox is bubblewrap's (0.8 or newer; the package `bubblewrap` of Debian and Ubuntu):
namespaces of its own for files, processes, users, network and what processes share. All files it
sees, the system's and Python's, are mounted read-only; its folder, /tmp, is 1 GB of memory. It ends
with the judge, and can reach nothing that could prevent that. What is left is what the kernel
counts, timing, and the memory of a GPU.
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
from functools import partial
from pathlib import Path
from subprocess import PIPE

import numpy as np
import torch

from data.dataset import BadInput

PYTHON = [sys.prefix, sys.base_prefix, str(Path(torch.__file__).parents[1])]  # the last: packages
READABLE = ["/usr", "/lib", "/lib64", "/bin", *PYTHON, *map(os.path.realpath, PYTHON)]  # to the child
ENVIRONMENT = {"PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
               "GOMP_SPINCOUNT"}  # which the child gets
CACHES = Path("/proc/sys/vm/drop_caches")
MAPPED = """cat /proc/[1-9]*/maps 2>/dev/null | grep -o ' /.*[^)]$' | cut -c2- | sort -u |
    while read -r file; do [ -f "$file" ] && echo "$file"; done"""  # files, by any process
STDERR_LINES = 20  # of what it writes there that are shown

# What the mounts leave open, by processor: its name to seccomp, the number of fcntl, and the names
# and numbers of what is denied. Owners, times and attributes, for the child of a root owns the
# devices in /dev, which are not mounted read-only, for then they do not open.
NEWEST = 451  # cachestat; from there on all are denied: fchmodat2, setxattrat and what is to come
F_SET_RW_HINT = 1036  # what fcntl may say of any file, and the kernel keeps as long as the file
DENIED = {
    "x86_64": (0xC000003E, 72, """
        chmod 90 fchmod 91 fchmodat 268 chown 92 fchown 93 lchown 94 fchownat 260
        utime 132 utimes 235 futimesat 261 utimensat 280
        setxattr 188 lsetxattr 189 fsetxattr 190 getxattr 191 lgetxattr 192 fgetxattr 193
        listxattr 194 llistxattr 195 flistxattr 196 removexattr 197 lremovexattr 198 fremovexattr 199
        socket 41 socketpair 53 ptrace 101 process_vm_readv 310 process_vm_writev 311
        syslog 103 add_key 248 request_key 249 keyctl 250 io_uring_setup 425
        mincore 27 fadvise64 221 preadv2 327"""),
    "aarch64": (0xC00000B7, 25, """
        fchmod 52 fchmodat 53 fchown 55 fchownat 54 utimensat 88
        setxattr 5 lsetxattr 6 fsetxattr 7 getxattr 8 lgetxattr 9 fgetxattr 10
        listxattr 11 llistxattr 12 flistxattr 13 removexattr 14 lremovexattr 15 fremovexattr 16
        socket 198 socketpair 199 ptrace 117 process_vm_readv 270 process_vm_writev 271
        syslog 116 add_key 217 request_key 218 keyctl 219 io_uring_setup 425
        mincore 232 fadvise64 223 preadv2 286"""),
}


def reachable(folder):
    """A Path -> what a child may read that holds it, or ""."""
    real = os.path.realpath(folder)
    return next((path for path in READABLE if real.startswith(os.path.realpath(path) + os.sep)), "")


def forget_files():
    """Makes the kernel forget which files were read and which names were looked up, even of files
    that are not there, lest one child tells the next by what it remembers. (By the time that a look
    takes, 2,000 bits came through names of /usr/bin without an error; after this, with 980.) What
    processes have mapped stays, each page with a mark of how it was used, 12,000 in libtorch: read
    three times, all have the same."""
    for path in filter(reachable, 3 * os.popen(MAPPED).read().splitlines()):
        Path(path).read_bytes()
    CACHES.write_text("3")


# ---- the sandbox


def filter_calls():
    """-> a program for seccomp, bytes: ENOSYS to the DENIED system calls and to those of other
    processors."""
    load, if_equal, if_at_least, answer = 0x20, 0x15, 0x35, 0x06
    deny = (answer, 0, 0, 0x50000 | 38)
    processor, fcntl, calls = DENIED[platform.machine()]
    program = [(load, 0, 0, 4), (if_equal, 1, 0, processor), deny]   # what is equal skips a line,
    program += [(load, 0, 0, 0), (if_at_least, 0, 1, NEWEST), deny]
    for call in calls.split()[1::2]:
        program += [(if_equal, 0, 1, int(call)), deny]
    program += [(if_equal, 0, 3, fcntl), (load, 0, 0, 24), (if_equal, 0, 1, F_SET_RW_HINT), deny,
                (answer, 0, 0, 0x7FFF0000)]
    return b"".join(struct.pack("HBBI", *line) for line in program)


def sandbox(artifact):
    """-> the words before a command that put it into the sandbox, with the artifact as
    /tmp/artifact.pyz."""
    words = """bwrap --unshare-all --unshare-user --disable-userns --cap-drop ALL --uid 65534
        --gid 65534 --new-session --die-with-parent --proc /proc --tmpfs /proc/sys/fs --dev /dev
        --size 1073741824 --tmpfs /tmp""".split()
    for path in ["/sys", "/etc/alternatives", "/etc/ld.so.cache", *READABLE]:  # some may be in /tmp
        words += ["--ro-bind-try", path, path]
    for path in map(str, Path("/dev").glob("nvidia*")):
        words += ["--dev-bind", path, path]
    words += ["--ro-bind", str(artifact.resolve()), "/tmp/artifact.pyz"]
    # A root's child could read the kernel's own pages and debugging files.
    return words + """--ro-bind /dev/null /proc/kpageflags --ro-bind /dev/null /proc/kpagecount
        --ro-bind /dev/null /proc/kpagecgroup --tmpfs /sys/kernel --remount-ro /sys/kernel
        --tmpfs /sys/fs --remount-ro /sys/fs --remount-ro /proc/sys/fs --remount-ro /proc
        --remount-ro /dev --remount-ro / --chdir /tmp""".split()


class Child:
    """A command, a list of words, in the sandbox, or unconfined in the artifact's folder. close()
    returns when nothing of it is left. One that was never started may be killed and closed, too."""

    process = first = None

    def __init__(self, artifact, command, env, confined=True):
        start = partial(subprocess.Popen, cwd=artifact.parent, env=env, stdin=PIPE, stdout=PIPE,
                        stderr=PIPE, start_new_session=True)
        if not confined:
            self.process = start(command)
            return
        calls, calls_in = os.pipe()
        info, info_in = os.pipe()
        os.write(calls_in, filter_calls())
        os.close(calls_in)
        pipes = ["--seccomp", str(calls), "--info-fd", str(info_in), "--"]
        self.process = start([*sandbox(artifact), *pipes, *command], pass_fds=(calls, info_in))
        os.close(calls)
        os.close(info_in)
        with open(info) as file:
            if said := file.read():  # of the sandbox's processes:
                self.first = os.pidfd_open(json.loads(said)["child-pid"])

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


def lacking(audited=True):
    """-> what this system lacks to confine a child, and to audit it, in words, or ""."""
    if platform.machine() not in DENIED or not shutil.which("bwrap"):
        return "bubblewrap (Linux on x86_64 or aarch64: apt-get install bubblewrap)"
    if audited and not os.access(CACHES, os.W_OK):
        return f"a root who may write {CACHES}"
    child = Child(Path(sys.executable), ["true"], {})
    _, said = child.process.communicate()
    child.close()
    return f"bubblewrap that works: {said!r:.200}" if child.process.returncode else ""


# ---- both ends of the pipe


def serve(name, device, vocab_size):
    """The child's side of Remote, until its stdin ends. Prints go to stderr."""
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))  # a byte: an empty one goes through a pipe
    if device == "cpu":
        half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # of the memory
        resource.setrlimit(resource.RLIMIT_DATA, (half, half))
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def answer(content):
        answers.write(content)
        answers.flush()
    try:
        sys.path[:0] = ["artifact.pyz"]
        predictor, name = importlib.import_module("eval_bpb").build("artifact.pyz", name, device)
        B, T = int(predictor.slots), int(predictor.chunk)
        answer(struct.pack("<c2q64s", b"=", B, T, name.encode()))
        while ask := requests.read(1):
            tokens = np.frombuffer(bytearray(requests.read(8 * B * T)), np.int64).reshape(B, T)
            flags = np.frombuffer(bytearray(requests.read(B if ask == b"p" else B * T)), bool)
            if ask == b"l":
                predictor.learn(tokens, flags.reshape(B, T))
                answer(b"=")
                continue
            logits = predictor.predict(flags, tokens).detach().float().cpu().numpy()
            if logits.shape != (B, T, vocab_size):
                raise ValueError(f"predict() must return logits {B, T, vocab_size}, not "
                                 f"{logits.shape}")
            answers.write(b"=")
            answer(np.ascontiguousarray(logits))
    except BaseException as e:
        answer(f"!{type(e).__name__}: {e}".encode()[:4097])
        raise


class Remote(Child):
    """A predictor in a child process: predict and learn send it what is revealed, no more.

    The child, which open() starts, is told no path but those of Python, and runs serve() before any
    code of the artifact.
    """

    def __init__(self, artifact, device, vocab_size, confined):
        self.artifact, self.device, self.vocab_size = artifact, device, vocab_size
        self.confined = confined

    def open(self, name, seconds=0):
        """Starts the child, which ends after `seconds`; 0: never -> the predictor's name. From then
        on .slots and .chunk are known."""
        env = {key: os.environ[key] for key in ENVIRONMENT & os.environ.keys()}
        env |= {"USER": "nobody", "PYTHONPATH": PYTHON[-1]}
        code = f"""import importlib, os, struct, sys
os.environ["HOME"] = os.environ["TMPDIR"] = os.getcwd()
import numpy as np
{inspect.getsource(serve)}
serve({name!r}, {self.device!r}, {self.vocab_size})"""
        super().__init__(self.artifact, [sys.executable, "-c", code], env, self.confined)
        threading.Thread(target=self.show_stderr, daemon=True).start()
        if seconds:
            timer = threading.Timer(seconds, self.kill)
            timer.daemon = True
            timer.start()
        self.slots, self.chunk, said = struct.unpack("<2q64s", self.receive(80))
        return said.rstrip(b"\0").decode("utf-8", "replace")

    def show_stderr(self):
        lines = 0
        while data := self.process.stderr.readline(1 << 12):
            lines += 1
            if lines <= STDERR_LINES:
                print(f"artifact: {data!r:.60}", file=sys.stderr)

    def receive(self, size):
        """The answer, a bytearray of that size."""
        sign = self.process.stdout.read(1)
        if sign == b"!":
            raise BadInput(f"its code says {self.process.stdout.read(4096)!r:.240}")
        content = bytearray(size)
        if sign != b"=" or self.process.stdout.readinto(content) < size:
            self.close()
            raise BadInput(f"no answer from its process: exit code {self.process.returncode}; -9 "
                           "where its time was over")
        return content

    def ask(self, sign, tokens, flags, size):
        with suppress(BrokenPipeError):  # then there is no answer either
            self.process.stdin.write(sign + tokens.tobytes() + flags.tobytes())
            self.process.stdin.flush()
        return self.receive(size)

    def predict(self, fresh, inputs):
        said = self.ask(b"p", inputs, fresh, 4 * inputs.size * self.vocab_size)
        # To the device: counting took a CPU thread 29 ns a logit, 2,000 s for a rank of eight.
        return torch.frombuffer(said, dtype=torch.float32).view(*inputs.shape, -1).to(self.device)

    def learn(self, targets, real):
        self.ask(b"l", targets, real, 0)
