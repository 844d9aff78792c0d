"""The replayers that are measured, and how each is told to send the same rows at their times.

All stream from the same mock, with whatever of their own would only cost them (dashboards, connection tests, other
metrics) switched off. AIPerf, GuideLLM and burstgate send chats; EvalScope and `vllm bench serve` take token ids, and
inference-perf's trace mode texts, all of which are completions.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gateway.install import PACKAGES, ROOT, compiled, environment, newer_interpreter
from benchmarks.gateway.processes import BenchError
from benchmarks.gateway.rivals import Command
from benchmarks.replay.workload import MODEL

TOKENIZER = "bench/tokenizer"
"""A name as on Hugging Face's hub; it lies in a cache of the benchmark's own, and no tool may ask the network."""
_REVISION = "0" * 40


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a tool."""

    url: str
    trace: Path
    rows: int
    folder: Path
    """Its own; the working directory."""
    hub: Path
    """`tokenizer`'s."""
    burstgate: Path
    processes: int | None = None
    """burstgate's --processes; None does not ask for any."""

    @property
    def env(self) -> dict[str, str]:
        """For a tool that uses Hugging Face's libraries."""
        return {"HF_HOME": str(self.hub), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}

    @property
    def tokenizer(self) -> str:
        """The tokenizer's folder; AIPerf, while it is offline, takes its name only."""
        return str(_snapshot(self.hub))


def _snapshot(hub: Path) -> Path:
    return hub / "hub" / f"models--{TOKENIZER.replace('/', '--')}" / "snapshots" / _REVISION


def make_tokenizer(hub: Path) -> None:
    """A byte-level BPE of 2,000 tokens learnt from this repository's own pages, as if it had been downloaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pages = [page.read_text(encoding="utf-8") for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])]
    tokenizer.train_from_iterator(pages, trainer)
    folder = _snapshot(hub)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "model_max_length": 1_000_000}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    refs = folder.parent.parent / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(_REVISION)


def burstgate(job: Job) -> Command:
    argv = [
        str(job.burstgate), "replay", str(job.trace), "--target", job.url, "--model", MODEL, "--ties", "keep",
        "--json", str(job.folder / "summary.json"), "--quiet",
    ]  # fmt: skip
    if job.processes is not None:
        argv += ["--processes", str(job.processes)]
    return Command(tuple(argv))


def floor(job: Job) -> Command:
    """No replayer: what this machine makes of a C program that only sends (floor.c)."""
    program = compiled(ROOT / "benchmarks" / "replay" / "floor.c")
    argv = (str(program), job.url.rpartition(":")[2], str(job.trace), str(job.folder / "summary.json"))
    return Command(argv)


def aiperf(job: Job) -> Command:
    argv = (
        str(environment("aiperf") / "aiperf"), "profile", "-m", MODEL, "--url", job.url, "--endpoint-type", "chat",
        "--streaming", "--input-file", str(job.trace), "--custom-dataset-type", "mooncake-trace", "--fixed-schedule",
        "--tokenizer", TOKENIZER, "--ui", "none", "--artifact-dir", str(job.folder / "artifacts"),
        "--no-server-metrics", "--no-gpu-telemetry",
    )  # fmt: skip
    return Command(argv, job.env)


def guidellm(job: Job, **columns: str) -> Command:
    """columns: what the trace calls its columns, where not as Mooncake does."""
    kind = "csv_file" if job.trace.suffix == ".csv" else "json_file"
    data = {"kind": "trace_synthetic", "source": {"kind": kind, "path": str(job.trace)}, **columns}
    argv = (
        str(environment("guidellm") / "guidellm"), "run",
        "--backend", f"kind=openai_http,target={job.url},model={MODEL}",
        "--profile", "kind=replay,schedule_turn=timestamp", "--data", json.dumps(data),
        "--tokenizer", f"kind=huggingface_auto,model={job.tokenizer}",
        "--output", f"kind=json,path={job.folder / 'report.json'}", "--disable-console",
    )  # fmt: skip
    return Command(argv, job.env)


def evalscope(job: Job) -> Command:
    argv = (
        str(environment("evalscope") / "evalscope"), "perf", "--url", f"{job.url}/v1/completions", "--model", MODEL,
        "--api", "openai", "--open-loop", "--dataset", "workload_trace", "--dataset-path", str(job.trace),
        "--no-test-connection", "--tokenizer-path", job.tokenizer, "--outputs-dir", str(job.folder / "outputs"),
        "--stream", "--number", str(job.rows),
    )  # fmt: skip
    return Command(argv, job.env)


def inference_perf(job: Job) -> Command:
    """Its worker sends at most 100 at once unless it is told otherwise, and it has as many workers as cores."""
    trace = {"file": str(job.trace), "format": "AzurePublicDataset"}
    config = {
        "load": {
            "type": "trace_replay",
            "trace": trace,
            "stages": [{"rate": 1, "duration": 1}],
            "worker_max_concurrency": 10_000,
        },
        "api": {"type": "completion", "streaming": True},
        "server": {"type": "vllm", "model_name": MODEL, "base_url": job.url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": job.tokenizer},
        "data": {"type": "random", "trace": trace},
        "storage": {"local_storage": {"path": str(job.folder / "reports")}},
    }
    path = job.folder / "config.yml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return Command(
        (str(environment("inference-perf", newer_interpreter(12)) / "inference-perf"), "-c", str(path)), job.env
    )


def vllm_home() -> Path:
    """Where `venv/bin/vllm` lies, a build that is not installed here: VLLM_CPU_HOME. Raises BenchError."""
    home = Path(os.environ.get("VLLM_CPU_HOME", "~/.cache/vllm-cpu")).expanduser()
    if not (home / "venv/bin/vllm").exists():
        raise BenchError(f"no vLLM in {home} (VLLM_CPU_HOME)")
    return home


def vllm_bench(job: Job) -> Command:
    argv = (
        str(vllm_home() / "venv/bin/vllm"), "bench", "serve", "--backend", "vllm", "--base-url", job.url,
        "--endpoint", "/v1/completions", "--model", MODEL, "--tokenizer", job.tokenizer,
        "--dataset-name", "timed_trace", "--dataset-path", str(job.trace),
        "--num-prompts", str(job.rows), "--ready-check-timeout-sec", "0",
        "--disable-tqdm",
    )  # fmt: skip
    return Command(argv, {**job.env, "VLLM_NO_USAGE_STATS": "1", "PYTHONHASHSEED": "0"})


@dataclass(frozen=True, slots=True)
class Tool:
    """A replayer. version: as the results name it."""

    name: str
    format: str
    command: Callable[[Job], Command] = field(repr=False)

    def version(self) -> str:
        """Of what is measured. Raises BenchError."""
        if self.name == "vllm":
            argv = [
                str(vllm_home() / "venv/bin/python"),
                "-c",
                "import importlib.metadata as m; print(m.version('vllm'))",
            ]
            return f"vllm {subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()}"
        return PACKAGES[self.name][-1].replace("[perf]", "").replace("==", " ") if self.name in PACKAGES else self.name


OURS = "burstgate"
FLOOR = "floor"
TOOLS = {
    tool.name: tool
    for tool in (
        Tool(OURS, "mooncake", burstgate),
        Tool(FLOOR, "mooncake", floor),
        Tool("aiperf", "mooncake", aiperf),
        Tool("guidellm", "timed_trace", guidellm),
        Tool("evalscope", "workload_trace", evalscope),
        Tool("inference-perf", "azure", inference_perf),
        Tool("vllm", "timed_trace", vllm_bench),
    )
}


def new_folder(path: Path) -> Path:
    """An empty one."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path
