"""Who may ask for what: clients' keys, and the routes that clients are kept from. Pure.

Keys: what `Authorization: Bearer` or `x-api-key` carries is looked up by its keyed hash in a dictionary. That takes no
longer for a key that is nearly right, as a comparison of keys might: who does not know the installation's secret can
not choose how a hash begins, so the time of the lookup tells nothing. Of several credentials one that is valid is
enough. Without `keys.required` a credential that is not one of ours (they begin with `bg-`) is the upstream's to judge.

Routes: vLLM serves its management beside its API, on one port. A path is refused when any reading of it is a refused
route: decoded once or several times, with or without `.` and `..`, empty segments, `;parameters`, backslashes, white
space or capitals, and behind any prefix, because servers and the proxies before them differ in all of that. Entries are
paths, as `/metrics`, or all below one, as `/internal/*`. The most exact entry decides, in this order: `routes.deny`,
`routes.allow`, vLLM's management, then `/*` entries of `routes.allow`, of `routes.deny`. `deny: ["/*"]` with an
`allow` is an allow list. An `allow` entry holds only for paths that can be read in no other way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from urllib.parse import unquote

from proxy.errors import GatewayError
from proxy.request_head import RequestHead
from storage.key_file import CLIENT_MARK, CachedKey, key_hash

_MARK = CLIENT_MARK.encode()
MAX_DECODINGS = 8
"""A path that is still encoded after so many decodings is refused: nobody means well with it."""

MANAGEMENT = (
    # What a developer's, a trainer's or an operator's vLLM serves (vLLM 0.2x: entrypoints/serve, entrypoints/rl).
    "/abort_requests", "/adapters", "/adapters/*", "/collective_rpc", "/fault_tolerance/*", "/finish_weight_update",
    "/get_world_size", "/init_weight_transfer_engine", "/init_weights_update", "/is_paused", "/is_scaling_elastic_ep",
    "/is_sleeping", "/kv_event_sources", "/load_lora_adapter", "/pause", "/release_kv_cache_memory",
    "/reset_encoder_cache", "/reset_mm_cache", "/reset_prefix_cache", "/resume", "/scale_elastic_ep", "/server_info",
    "/shutdown_weight_transfer_engine", "/sleep", "/start_draft_weight_update", "/start_profile",
    "/start_weight_update", "/stop_profile", "/unload_lora_adapter", "/update_weight_version", "/update_weights",
    "/wake_up", "/weight_checker", "/weight_info",
)  # fmt: skip
"""Refused while `routes.deny_management` is true."""

_Segments = tuple[str, ...]


def _segments(path: str, *, resolve: bool) -> _Segments:
    found: list[str] = []
    for part in path.replace("\\", "/").split("/"):
        segment = "".join(char for char in part.partition(";")[0] if " " < char != "\x7f").casefold()
        if segment == ".." and resolve:
            del found[-1:]
        elif segment and segment != ".":
            found.append(segment)
    return tuple(found)


def readings(target: bytes) -> set[_Segments] | None:
    """Every way in which servers may read a request target's path; None when it is encoded too often to tell."""
    text = target.partition(b"?")[0].decode("latin-1")
    found: set[_Segments] = set()
    for _ in range(MAX_DECODINGS):
        for path in {text, text.partition("#")[0], text.partition("?")[0]}:
            found |= {_segments(path, resolve=True), _segments(path, resolve=False)}
        decoded = unquote(text, "latin-1") if "%" in text else text
        if decoded == text:
            return found
        text = decoded
    return None


class _Entries:
    """Paths, and the beginnings of paths."""

    def __init__(self, entries: Iterable[str]) -> None:
        self.exact: set[_Segments] = set()
        self.below: list[_Segments] = []
        for entry in entries:
            if entry.endswith("/*"):
                self.below.append(_segments(entry[:-2], resolve=True))
            else:
                self.exact.add(_segments(entry, resolve=True))
        self._sizes = sorted({len(entry) for entry in self.exact})

    def ends(self, path: _Segments) -> bool:
        """A path ends with one of them."""
        return any(path[len(path) - size :] in self.exact for size in self._sizes if size or not path)

    def holds(self, path: _Segments) -> bool:
        """A path lies below one of them, behind any prefix."""
        return any(
            any(path[at : at + len(entry)] == entry for at in range(len(path) - len(entry))) or not entry
            for entry in self.below
        )

    def begins(self, path: _Segments) -> bool:
        """A path lies below one of them, from the root on."""
        return any(path[: len(entry)] == entry for entry in self.below)


class RouteRules:
    """Which request targets are refused."""

    def __init__(self, *, deny_management: bool, allow: Sequence[str], deny: Sequence[str]) -> None:
        self._allow = _Entries(allow)
        self._deny = _Entries(deny)
        self._management = _Entries(MANAGEMENT if deny_management else ())

    def refuses(self, target: bytes) -> bool:
        """target: in origin form, as it is sent to the upstream."""
        paths = readings(target)
        if paths is None:
            return True
        if any(self._deny.ends(path) for path in paths):
            return True
        if paths <= self._allow.exact:
            return False
        if any(self._management.ends(path) or self._management.holds(path) for path in paths):
            return True
        if all(self._allow.begins(path) for path in paths):
            return False
        return any(self._deny.holds(path) for path in paths)


class Access:
    """The keys that are valid."""

    def __init__(self, keys: Iterable[CachedKey], secret: bytes, *, required: bool) -> None:
        self._keys = {key.hash: key for key in keys if key.role is None}
        self._secret = secret
        self._required = required

    def check(self, head: RequestHead, now_s: float) -> CachedKey | GatewayError | None:
        """The key that a request may use, why it is refused, or None: it needs none, and has none of ours.

        now_s: epoch seconds.
        """
        expired = is_ours = False
        for token in head.credentials:
            key = self._keys.get(key_hash(self._secret, token))
            if key is not None:
                if not key.is_expired(now_s):
                    return key
                expired = True
            is_ours = is_ours or token.startswith(_MARK)
        if expired:
            return GatewayError(401, "invalid_api_key", "the API key has expired")
        if is_ours or (self._required and head.credentials):
            return GatewayError(401, "invalid_api_key", "the API key is not known, or was revoked")
        if self._required:
            text = "no API key: send it as Authorization: Bearer KEY, or as x-api-key"
            return GatewayError(401, "invalid_api_key", text)
        return None


def access_of(keys: Sequence[CachedKey] | None, secret: bytes, *, required: bool) -> Access | None:
    """None when there is nothing to check. keys: None where none was ever made."""
    return Access(keys or (), secret, required=required) if required or keys is not None else None
