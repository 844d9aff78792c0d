"""HTTPS at both listeners, with certificates made by openssl."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from proxy.config_error import ConfigError
from proxy.tls import ServerTls, server_tls

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key),
         "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


def shown_by(context: ssl.SSLContext, trusted: Path) -> bool:
    """Whether a client that trusts only this certificate gets through a handshake, in memory."""
    client_in, client_out, server_in, server_out = (ssl.MemoryBIO() for _ in range(4))
    trusting = ssl.create_default_context(cafile=str(trusted))
    client = trusting.wrap_bio(client_in, client_out, server_hostname="localhost")
    server = context.wrap_bio(server_in, server_out, server_side=True)
    for _ in range(10):
        done = 0
        for side, source, target in ((client, client_out, server_in), (server, server_out, client_in)):
            try:
                side.do_handshake()
                done += 1
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError:
                return False
            target.write(source.read())
        if done == 2:
            return True
    raise AssertionError("no handshake")


def test_a_replaced_certificate_is_taken_over(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "one")
    other, other_key = make_certificate(tmp_path, "two")
    first = tmp_path / "first.pem"
    first.write_bytes(certificate.read_bytes())
    tls = ServerTls("tls.cert_file", certificate, key)
    assert shown_by(tls.context, first)
    assert not tls.refresh()
    certificate.write_bytes(other.read_bytes())  # half of a renewal: the old one stays
    with pytest.raises(ConfigError, match=r"tls\.cert_file: .*one\.pem: not a certificate and its key"):
        tls.refresh()
    assert shown_by(tls.context, first)
    key.write_bytes(other_key.read_bytes())
    assert tls.refresh()
    assert shown_by(tls.context, other)
    assert not shown_by(tls.context, first)


def test_old_versions_of_tls_are_refused(tmp_path: Path) -> None:
    tls = ServerTls("tls.cert_file", *make_certificate(tmp_path, "one"))
    assert tls.context.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_what_can_not_be_used_is_named(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "one")
    locked = tmp_path / "locked.key"
    subprocess.run(["openssl", "ec", "-in", str(key), "-aes128", "-passout", "pass:secret", "-out", str(locked)],
                   check=True, capture_output=True)  # fmt: skip
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    for cert_file, key_file, problem in [
        (tmp_path / "none.pem", None, r"none\.pem: No such file"),
        (junk, None, r"junk\.pem: not a certificate"),
        (certificate, None, r"one\.pem: not a certificate and its key"),
        (certificate, locked, r"one\.pem: expected a key without a password"),
    ]:
        with pytest.raises(ConfigError, match=rf"^tls\.cert_file: .*{problem}"):
            server_tls("tls.cert_file", cert_file, key_file)
    assert server_tls("tls.cert_file", None, None) is None
