"""The other web server of the tests: a real Apache with the same page, in a namespace."""

from __future__ import annotations

import subprocess
from pathlib import Path

from .netns import terminate
from .website import NAME, Website

_UNPACKED = Path(__file__).resolve().parents[2] / ".cache" / "apache" / "usr"

_CONFIGURATION = """\
ServerRoot {directory}
ServerName {name}
PidFile {directory}/apache.pid
DefaultRuntimeDir {directory}
Mutex file:{directory}
ErrorLog {directory}/error.log
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule dir_module {modules}/mod_dir.so
LoadModule headers_module {modules}/mod_headers.so
LoadModule ssl_module {modules}/mod_ssl.so
Listen 443
LogFormat "%h" address
CustomLog {directory}/access.log address
SSLEngine on
SSLCertificateFile {certificate}
SSLCertificateKeyFile {key}
DocumentRoot {directory}/pages
DirectoryIndex index.html
Header set Seen-From "expr=%{{REMOTE_ADDR}}"
"""


class NoApache(RuntimeError):
    """It is not unpacked."""


class Apache(Website):
    """A running Apache, and the ways to visit it. It does not tell its own address."""

    def start(self) -> subprocess.Popen[str]:
        program = _UNPACKED / "sbin" / "apache2"
        if not program.exists():
            raise NoApache("apache2 is missing: run tests/install-debian-packages")
        pair = self.authority.issue("site", NAME)
        configuration = self.directory / "apache.conf"
        configuration.write_text(
            _CONFIGURATION.format(
                directory=self.directory,
                name=NAME,
                modules=_UNPACKED / "lib" / "apache2" / "modules",
                certificate=pair.certificate,
                key=pair.key,
            )
        )
        log = self.directory / "apache.log"
        process = self.namespace.popen(program, "-X", "-f", configuration, log=log)
        try:
            self.namespace.wait_until_listening(process, "127.0.0.1", 443)
            self.namespace.wait_until_listening(process, "::1", 443)
        except BaseException:
            terminate(process)
            raise
        return process
