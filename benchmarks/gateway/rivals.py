"""The gateways that are measured, and how each is told to do the same work.

All listen on their own loopback port, forward to the one upstream over kept-alive HTTP/1.1, with one worker. Envoy and
nginx write an access log in JSON to a file, because burstgate records; both have the limits raised that would cut
2,000 streams, and nothing between client and upstream but their router.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gateway.install import environment, installed_burstgate, program
from benchmarks.gateway.processes import free_ports


@dataclass(frozen=True, slots=True)
class Site:
    """Where a gateway is put."""

    folder: Path
    """Its own, empty."""
    port: int
    upstream_port: int


@dataclass(frozen=True, slots=True)
class Command:
    """How it is started."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


def _burstgate(site: Site, *more: str, env: dict[str, str] | None = None) -> Command:
    argv = (
        str(installed_burstgate() / "burstgate"), "serve",
        "--upstream", f"http://127.0.0.1:{site.upstream_port}",
        "--port", str(site.port), "--control-port", "0", "--data-dir", str(site.folder / "data"),
    )  # fmt: skip
    return Command((*argv, *more), env or {})


def burstgate(site: Site) -> Command:
    """As released: no configuration, SQLite."""
    return _burstgate(site)


def burstgate_unrecorded(site: Site) -> Command:
    """With recording switched off: every record is made for the metrics, and nothing is kept of it."""
    return _burstgate(site, env={"BURSTGATE_RECORD__ENABLED": "false"})


def burstgate_two(site: Site) -> Command:
    """Two workers."""
    return _burstgate(site, "--workers", "2")


_ENVOY = "type.googleapis.com/envoy.extensions"


def envoy(site: Site) -> Command:
    """Envoy with one worker thread."""
    log = {
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": f"{_ENVOY}.access_loggers.file.v3.FileAccessLog",
            "path": str(site.folder / "access.log"),
            "log_format": {
                "json_format": {
                    "request_id": "%REQ(X-REQUEST-ID)%",
                    "received_at": "%START_TIME%",
                    "elapsed_ms": "%DURATION%",
                    "first_byte_ms": "%RESPONSE_DURATION%",
                    "method": "%REQ(:METHOD)%",
                    "endpoint": "%REQ(:PATH)%",
                    "status": "%RESPONSE_CODE%",
                    "flags": "%RESPONSE_FLAGS%",
                    "upstream": "%UPSTREAM_HOST%",
                    "bytes_received": "%BYTES_RECEIVED%",
                    "bytes_sent": "%BYTES_SENT%",
                }
            },
        },
    }
    manager = {
        "@type": f"{_ENVOY}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "gateway",
        "codec_type": "HTTP1",
        "access_log": [log],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "upstream", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_ENVOY}.filters.http.router.v3.Router"},
            }
        ],
    }

    def address(port: int) -> dict[str, object]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": port}}

    unlimited = 1_000_000
    config = {
        "static_resources": {
            "listeners": [
                {
                    "name": "gateway",
                    "address": address(site.port),
                    "filter_chains": [
                        {
                            "filters": [
                                {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
                            ]
                        }
                    ],
                }
            ],
            "clusters": [
                {
                    "name": "upstream",
                    "type": "STATIC",
                    "connect_timeout": "5s",
                    "circuit_breakers": {
                        "thresholds": [
                            {
                                "max_connections": unlimited,
                                "max_pending_requests": unlimited,
                                "max_requests": unlimited,
                            }
                        ]
                    },
                    "load_assignment": {
                        "cluster_name": "upstream",
                        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(site.upstream_port)}}]}],
                    },
                }
            ],
        }
    }
    path = site.folder / "envoy.json"
    path.write_text(json.dumps(config, indent=1))
    argv = ("-c", str(path), "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning")
    return Command((str(environment("envoy") / "envoy"), *argv))


def vllm_router(site: Site) -> Command:
    """vLLM's router in Rust; it has as many threads as it has cores, so one."""
    argv = (
        "--host", "127.0.0.1", "--port", str(site.port), "--prometheus-port", str(free_ports(1)[0]),
        "--worker-urls", f"http://127.0.0.1:{site.upstream_port}", "--policy", "round_robin",
        "--max-concurrent-requests", "8192", "--log-level", "warning",
    )  # fmt: skip
    return Command((str(environment("vllm-router") / "vllm-router"), *argv))


def litellm(site: Site) -> Command:
    """LiteLLM's proxy without a database."""
    model = {
        "model": "openai/bench-model",
        "api_base": f"http://127.0.0.1:{site.upstream_port}/v1",
        "api_key": "sk-bench",
    }
    config = {
        "model_list": [{"model_name": "bench-model", "litellm_params": model}],
        "litellm_settings": {"telemetry": False, "set_verbose": False},
        "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},  # on loopback, for minutes
    }
    path = site.folder / "litellm.json"  # JSON is YAML
    path.write_text(json.dumps(config, indent=1))
    argv = ("--config", str(path), "--host", "127.0.0.1", "--port", str(site.port), "--num_workers", "1")
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "NO_DOCS": "True"}
    return Command((str(environment("litellm") / "litellm"), *argv), env)


def nginx(site: Site) -> Command:
    """nginx, as the floor: what forwarding costs at the least."""
    path, env = program("nginx")
    config = f"""
daemon off;
worker_processes 1;
worker_rlimit_nofile 65536;
pid {site.folder}/nginx.pid;
error_log {site.folder}/error.log warn;
events {{ worker_connections 16384; }}
http {{
  log_format record escape=json '{{"request_id":"$request_id","received_at":$msec,"elapsed_s":$request_time,'
    '"first_byte_s":"$upstream_header_time","method":"$request_method","endpoint":"$uri","status":$status,'
    '"upstream":"$upstream_addr","bytes_received":$request_length,"bytes_sent":$bytes_sent}}';
  access_log {site.folder}/access.log record buffer=64k flush=1s;
  keepalive_requests 1000000000;
  client_max_body_size 64m;
  client_body_buffer_size 1m;
  client_body_temp_path {site.folder}/body;
  proxy_temp_path {site.folder}/proxy;
  fastcgi_temp_path {site.folder}/fastcgi;
  uwsgi_temp_path {site.folder}/uwsgi;
  scgi_temp_path {site.folder}/scgi;
  upstream backend {{
    server 127.0.0.1:{site.upstream_port};
    keepalive 4096;
    keepalive_requests 1000000000;
  }}
  server {{
    listen 127.0.0.1:{site.port} backlog=4096;
    location / {{
      proxy_pass http://backend;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""
    file = site.folder / "nginx.conf"
    file.write_text(config)
    return Command((path, "-p", str(site.folder), "-c", str(file), "-e", str(site.folder / "error.log")), env)


RIVALS: dict[str, Callable[[Site], Command]] = {
    "burstgate": burstgate,
    "burstgate-unrecorded": burstgate_unrecorded,
    "envoy": envoy,
    "vllm-router": vllm_router,
    "nginx": nginx,
    "litellm": litellm,
    "burstgate-2-workers": burstgate_two,
}
"""By name. `direct`, the upstream without a gateway, is not among them."""
