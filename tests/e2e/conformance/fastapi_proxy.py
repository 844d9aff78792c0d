"""What people write: a proxy of FastAPI and aiohttp, for comparison. `python fastapi_proxy.py PORT UPSTREAM`.

It is meant to be good of its kind: hop-by-hop headers left out, streams relayed as they come, no decompression, no cap
on connections, no total timeout. It imports nothing of this repository, because it runs in a rival's environment.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator

import aiohttp  # type: ignore[import-not-found,unused-ignore]
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "host",
    "expect",
}


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        sys.argv[2], timeout=timeout, connector=connector, auto_decompress=False
    ) as client:
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan, openapi_url=None)


@app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"])
async def forward(request: Request, path: str) -> Response:
    headers = [(name, value) for name, value in request.headers.items() if name not in HOP_BY_HOP | {"content-length"}]
    target = f"/{path}?{request.url.query}" if request.url.query else f"/{path}"
    try:
        answer = await app.state.client.request(
            request.method, target, headers=headers, data=await request.body(), allow_redirects=False
        )
    except (aiohttp.ClientError, TimeoutError) as error:
        return JSONResponse({"error": {"message": str(error), "type": "upstream_error"}}, 502)

    async def body() -> AsyncIterator[bytes]:
        async with answer:
            async for data in answer.content.iter_any():
                yield data

    response = StreamingResponse(body(), answer.status)
    response.raw_headers = [
        (n.lower(), v) for n, v in answer.raw_headers if n.decode("latin-1").lower() not in HOP_BY_HOP
    ]
    return response


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)
