"""A report of the daemon, and what C{start} receives from it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.console.handover import Report


class ReportCase(SynchronousTestCase):
    """A report, and what C{start} receives from it."""

    def setUp(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.addCleanup(self.ours.close)
        self.addCleanup(self.theirs.close)
        # A hook of C{os.register_at_fork} cannot be removed: so the tests only remember it.
        self.patch(os, "register_at_fork", self.remember)
        self.report = Report(self.theirs)

    def remember(
        self, *, after_in_parent: Callable[[], None], after_in_child: Callable[[], None]
    ) -> None:
        self.after_fork_in_parent = after_in_parent
        self.after_fork_in_child = after_in_child

    def told(self) -> Any:
        return json.loads(self.ours.makefile("rb").readline())
