"""Isolation: takes the network from a process and all that it starts, without any privilege.

A filter of system calls (seccomp, as containers and browsers use it) lets no socket be made; pairs
of sockets within the machine and connections that are open already go on.
"""

import ctypes
import errno
import platform
import struct

PR_SET_NO_NEW_PRIVS = 38
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_TSYNC = 1
"""For the threads that there are, too."""
CALLS = {
    "x86_64": {"audit": 0xC000003E, "seccomp": 317, "socket": 41},
    "aarch64": {"audit": 0xC00000B7, "seccomp": 277, "socket": 198},
}
"""Numbers of the system calls by machine, and of the machine itself."""
IO_URING_SETUP = 425
"""On every machine; through a ring of it sockets could be made unseen."""
X32 = 0x40000000
"""From here on an x86-64 kernel has its system calls once more, for another kind of program."""
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
NUMBER_AT, MACHINE_AT = 0, 4
ALLOW, REFUSE = 0x7FFF0000, 0x00050000


def deny_network() -> str | None:
    """Let this process and its children make no socket any more; returns why not, if not."""
    machine = platform.machine()
    if machine not in CALLS:
        return f"no filter of system calls is known for {machine}"
    calls = CALLS[machine]
    refuse = REFUSE | errno.ENETUNREACH
    steps = [
        (LOAD, 0, 0, MACHINE_AT),
        (EQUAL, 0, 5, calls["audit"]),  # a program of another kind: refuse
        (LOAD, 0, 0, NUMBER_AT),
        (AT_LEAST, 3, 0, X32),
        (EQUAL, 2, 0, calls["socket"]),
        (EQUAL, 1, 0, IO_URING_SETUP),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, refuse),
    ]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(steps), ctypes.addressof(filters))
    )
    libc = ctypes.CDLL(None, use_errno=True)
    nothing = ctypes.c_ulong(0)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), nothing, nothing, nothing):
        return f"the kernel refuses it: {errno.errorcode[ctypes.get_errno()]}"
    done = libc.syscall(
        ctypes.c_long(calls["seccomp"]),
        ctypes.c_ulong(SECCOMP_SET_MODE_FILTER),
        ctypes.c_ulong(SECCOMP_FILTER_FLAG_TSYNC),
        ctypes.c_void_p(ctypes.addressof(program)),
    )
    if done > 0:
        return f"its thread {done} has a filter of its own"
    return f"the kernel refuses it: {errno.errorcode[ctypes.get_errno()]}" if done else None
