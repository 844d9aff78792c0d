"""TLS towards clients: a certificate from files, which is read again when they change."""

from __future__ import annotations

import ssl
from pathlib import Path

from proxy.config_error import ConfigError
from storage.key_file import signature


class ServerTls:
    """The certificate of one listener. Raises ConfigError naming the setting and what is wrong with its file."""

    def __init__(self, setting: str, cert_file: Path, key_file: Path | None) -> None:
        self._setting = setting
        self._cert_file = cert_file
        self._key_file = key_file
        self._seen = self._signature()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # of versions 1.2 and 1.3
        self.context.set_alpn_protocols(["http/1.1"])
        self._load()

    def refresh(self) -> bool:
        """Take over files that have changed, for connections from now on; whether they had. Raises ConfigError."""
        found = self._signature()
        if found == self._seen:
            return False
        self._seen = found
        self._load()
        return True

    def _signature(self) -> tuple[object, ...]:
        return tuple(signature(path) for path in (self._cert_file, self._key_file) if path is not None)

    def _load(self) -> None:
        def no_password() -> str:
            raise ConfigError(f"{self._setting}: {self._cert_file}: expected a key without a password")

        try:
            # First into a context of its own: of files that do not belong together, half would be taken over.
            for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self.context):
                context.load_cert_chain(self._cert_file, self._key_file, no_password)
        except OSError as error:
            reason = "not a certificate and its key, PEM" if isinstance(error, ssl.SSLError) else error.strerror
            raise ConfigError(f"{self._setting}: {self._cert_file}: {reason}") from None


def server_tls(setting: str, cert_file: Path | None, key_file: Path | None) -> ServerTls | None:
    """None without a certificate. Raises ConfigError."""
    return None if cert_file is None else ServerTls(setting, cert_file, key_file)
