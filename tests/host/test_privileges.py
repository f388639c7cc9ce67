"""What a process can still do after it has dropped its privileges."""

from __future__ import annotations

import os
import subprocess
import sys

from twisted.trial.unittest import SynchronousTestCase

DROPPED = """
import ctypes, os, sys
from acme_alpn_proxy.host.privileges import drop_privileges

uid, gid = map(int, sys.argv[1:])
drop_privileges(uid, gid)
print(open("/proc/self/status").read())
print("Dumpable:", ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""

SETS = ("CapInh", "CapPrm", "CapEff", "CapAmb", "CapBnd")
"""The last one can be emptied with CAP_SETPCAP alone."""


def dropped(uid: int, gid: int, *wrapper: str) -> dict[str, list[str]]:
    """The fields of /proc/PID/status of a process that has become this user, and more."""
    command = [*wrapper, sys.executable, "-c", DROPPED, str(uid), str(gid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    fields = (line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    return {name: value.split() for name, value in fields}


class DropPrivilegesTests(SynchronousTestCase):
    """It becomes the user of the tests, since only root may become another one."""

    def test_nothing_is_left(self) -> None:
        """The process has no capability, gets none when it runs a program, and cannot be traced by
        others."""
        status = dropped(os.geteuid(), os.getegid())
        for name in SETS if os.geteuid() == 0 else SETS[:-1]:
            self.assertEqual(int(status[name][0], 16), 0, name)
        self.assertEqual(status["NoNewPrivs"], ["1"])
        self.assertEqual(status["Dumpable"], ["0"])
        self.assertEqual(status["Uid"], [str(os.geteuid())] * 4)

    def test_bounding_set_cannot_be_emptied(self) -> None:
        """Without CAP_SETPCAP, the bounding set stays, and everything else is dropped."""
        wrapper = ("setpriv", "--bounding-set=-setpcap") if os.geteuid() == 0 else ()
        status = dropped(os.geteuid(), os.getegid(), *wrapper)
        self.assertNotEqual(int(status["CapBnd"][0], 16), 0)
        self.assertEqual(int(status["CapPrm"][0], 16), 0)
        self.assertEqual(status["NoNewPrivs"], ["1"])

    def test_other_user_is_refused(self) -> None:
        """If the user may not become another one, the kernel's error is raised."""
        code = (
            "import os; from acme_alpn_proxy.host.privileges import drop_privileges\n"
            "if os.geteuid() == 0: os.setresuid(1, 1, 1)\n"
            "try: drop_privileges(2)\n"
            "except PermissionError: print('refused', os.geteuid() != 2)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        self.assertEqual(done.stdout, "refused True\n", done.stderr)
