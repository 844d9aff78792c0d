"""Lists of models (`GET /v1/models`): asked of an upstream, read, and merged."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from wire.http import ConnectFailed, ConnectionLost, HttpClient
from wire.http1 import BadResponse, Headers

MAX_ANSWER_BYTES = 4 * 1024 * 1024
"""A list of models, or a probe's answer, that is longer counts as none."""
_NOT_OF_A_QUESTION = (b"accept-encoding", b"content-", b"if-", b"range")
"""How names of headers begin that would make the answer something else than a plain list."""


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[msgspec.Raw]


_models_decoder = msgspec.json.Decoder(_Models)
_model_decoder = msgspec.json.Decoder(_Model)


async def ask(client: HttpClient, target: bytes, headers: Headers, timeout_s: float) -> tuple[int, bytes]:
    """Status and body of a GET. Raises OSError with one line, whatever goes wrong."""
    exchange = None
    try:
        async with asyncio.timeout(timeout_s):
            exchange = await client.request(b"GET", target, headers)
            await exchange.wait_head()
            body = bytearray()
            while True:
                body += exchange.take()
                if len(body) > MAX_ANSWER_BYTES:
                    raise OSError(f"answer over {MAX_ANSWER_BYTES} bytes")
                if exchange.is_complete:
                    return exchange.status, bytes(body)
                await exchange.wait()
    except TimeoutError:
        raise OSError(f"no answer within {timeout_s:g} s") from None
    except (ConnectFailed, ConnectionLost, BadResponse) as error:
        raise OSError(str(error)) from None
    finally:
        if exchange is not None:
            exchange.abort()


async def ask_models(
    client: HttpClient, headers: Headers, timeout_s: float
) -> tuple[int, dict[str, msgspec.Raw] | None]:
    """The status, and the objects of the list by id; None when it is no such list. Raises OSError."""
    headers = [header for header in headers if not header[0].lower().startswith(_NOT_OF_A_QUESTION)]
    status, body = await ask(client, b"/v1/models", headers, timeout_s)
    if status != 200:
        return status, None
    try:
        return status, {_model_decoder.decode(model).id: model for model in _models_decoder.decode(body).data}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return status, None


def merge(answers: Sequence[Mapping[str, msgspec.Raw]], aliases: Mapping[str, str]) -> bytes:
    """One list for all: each upstream's own objects, the first one of an id.

    An alias is its model's object under another id, with `root` naming the model; it hides a model of its name, and is
    left out where nobody lists its model.
    """
    listed: dict[str, msgspec.Raw] = {}
    for answer in answers:
        for name, model in answer.items():
            listed.setdefault(name, model)
    models = dict(listed)
    for alias, name in aliases.items():
        if name in listed:
            fields = msgspec.json.decode(listed[name], type=dict[str, msgspec.Raw])
            fields["id"] = msgspec.Raw(msgspec.json.encode(alias))
            fields["root"] = msgspec.Raw(msgspec.json.encode(name))
            models[alias] = msgspec.Raw(msgspec.json.encode(fields))
    return msgspec.json.encode({"object": "list", "data": list(models.values())})
