"""A handler that runs what it is sent, and what it must not get away with: each attempt is Python, made in a worker."""

from __future__ import annotations

SOURCE = """
import ctypes, errno, os, json
import numpy as np
from handlers.base import Handler

libc = ctypes.CDLL(None, use_errno=True)

def raise_errno(what):
    raise OSError(ctypes.get_errno(), what)

def syscall(number, *arguments):
    return raise_errno("syscall") if libc.syscall(number, *arguments) < 0 else None

class HostileHandler(Handler):
    def preprocess(self, body, content_type):
        scope = {"os": os, "np": np, "ctypes": ctypes, "libc": libc, "syscall": syscall,
                 "raise_errno": raise_errno}
        try:
            exec(body.decode(), scope)
            self.report = {"refused": False, "value": scope.get("value")}
        except BaseException as error:
            self.report = {"refused": True, "error": type(error).__name__, "errno": getattr(error, "errno", None),
                           "text": str(error)}
        return {"x": np.zeros((1, 4), "float32")}

    def postprocess(self, outputs, rows):
        return self.report
"""

# Each of these must end in EPERM, EACCES, EXDEV or ENOSYS.
REFUSED = {
    "tcp socket": "import socket; socket.socket()",
    "udp socket": "import socket; socket.socket(type=socket.SOCK_DGRAM)",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "unix datagram socket": "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "netlink socket": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "packet socket": "import socket; socket.socket(17, socket.SOCK_RAW, 3)",
    "vsock": "import socket; socket.socket(40)",
    "socket pair": "import socket; socket.socketpair()",
    "connect on the channel": "syscall(42 if os.uname().machine == 'x86_64' else 203, 3, b'x' * 16, 16)",
    "io_uring": "syscall(425, 8, ctypes.create_string_buffer(256))",
    "fork": "os.fork()",
    "clone": "syscall(56 if os.uname().machine == 'x86_64' else 220, 17, 0, 0, 0, 0)",
    "clone3": "syscall(435, ctypes.create_string_buffer(88), 88)",
    "vfork by libc": "libc.vfork() < 0 and raise_errno('vfork')",
    "exec": "os.execv('/bin/true', ['true'])",
    "exec by descriptor": "os.execve(os.open('/proc/self/exe', os.O_RDONLY), ['x'], {})",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "subprocess": "import subprocess; subprocess.run(['/bin/true'])",
    "multiprocessing": """
        import multiprocessing
        p = multiprocessing.get_context('fork').Process(target=print)
        p.start()
    """,
    "unshare": "libc.unshare(0x10000000) and raise_errno('unshare')",
    "ptrace of the parent": "libc.ptrace(16, os.getppid(), 0, 0) and raise_errno('ptrace')",
    "ptrace me": "libc.ptrace(0, 0, 0, 0) and raise_errno('ptrace')",
    "read of another memory": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "another environment": "open(f'/proc/{os.getppid()}/environ', 'rb')",
    "signal to the parent": "os.kill(os.getppid(), 0)",
    "signal to all": "os.kill(-1, 0)",
    "signal to the group": "os.kill(0, 0)",
    "signal by group id": "os.killpg(os.getpgid(0), 0)",
    "signal by pidfd": "import signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
    "signal through a descriptor": "import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "another process' limits": "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (1, 1))",
    "another process' priority": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "another process' cores": "os.sched_setaffinity(os.getppid(), {0})",
    "typing into the terminal": "import fcntl; fcntl.ioctl(2, 0x5412, b'x')",
    "shadow": "open('/etc/shadow')",
    "passwd": "open('/etc/passwd')",
    "root directory": "os.listdir('/')",
    "home": "os.listdir(os.path.expanduser('~root'))",
    "through proc": "open('/proc/self/root/etc/passwd')",
    "through cwd": "os.listdir('/proc/self/cwd/..')",
    "raw device": "open('/dev/zero', 'rb')",
    "terminal": "open('/dev/tty', 'w')",
    "shared memory": "open('/dev/shm/x', 'w')",
    "temporary file elsewhere": "open('/tmp/inferd-escape', 'w')",
    "temporary file in var": "open('/var/tmp/inferd-escape', 'w')",
    "mode of a system file": "os.chmod('/tmp', 0o777)",
    "owner of a system file": "os.chown('/tmp', 1, 1)",
    "times of a system file": "os.utime('/tmp')",
    "attribute of a system file": "os.setxattr('/tmp', 'user.x', b'1')",
    "truncate of a system file": "os.truncate('/etc/hostname', 0)",
    "hard link out": "open('mine', 'w'); os.link('mine', '/tmp/inferd-escape')",
    "device node": "os.mknod('node', 0o20600, os.makedev(1, 1))",
    "mount": "libc.mount(b'x', b'/mnt', b'tmpfs', 0, 0) and raise_errno('mount')",
    "chroot": "os.chroot('.')",
    "bpf": "syscall(321 if os.uname().machine == 'x86_64' else 280, 0, 0, 0)",
    "perf": "syscall(298 if os.uname().machine == 'x86_64' else 241, 0, 0, 0, 0, 0)",
    "userfaultfd": "syscall(323 if os.uname().machine == 'x86_64' else 282, 0)",
    "keyring": "syscall(250 if os.uname().machine == 'x86_64' else 219, 0, -3, 0)",
    "memory beside the limit": "os.memfd_create('x')",
    "watching a directory": "libc.inotify_add_watch(libc.inotify_init(), b'/', 2) < 0 and raise_errno('')",
    "flags of a file it may read": """
        import fcntl
        fcntl.ioctl(os.open(np.__file__, os.O_RDONLY), 0x40086602, b'x' * 8)
    """,
    "system v memory": "libc.shmget(1, 4096, 0o1666) < 0 and raise_errno('shmget')",
    "calls newer than reviewed": "syscall(463, 0, 0, 0, 0, 0, 0)",
    "capability back": "os.setgroups([0])",
    "more open files": "libc.setrlimit(7, (ctypes.c_ulong * 2)(10**5, 10**5)) and raise_errno('setrlimit')",
    "oom score back": "open('/proc/self/oom_score_adj', 'w').write('0')",
}
