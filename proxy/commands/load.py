"""Commands that send: replay, sweep, the simulator; and what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from proxy.commands.common import (
    LOG_TYPES,
    Config,
    DatabaseUrl,
    DataDir,
    Format,
    From,
    Json,
    Origins,
    Timezone,
    To,
    app,
    check_format,
    check_timezone,
    fail,
    one_of,
    open_database,
    parse_model_map,
    read_profile_file,
    selection_of,
    stamp_s,
    whole_file,
)
from proxy.config_error import ConfigError

if TYPE_CHECKING:
    import sqlalchemy as sa

    from replay.metrics import Summary
    from replay.runner import ReplayOptions
    from storage.query import Filter

MAX_LAG_S = 0.010
"""As in `replay.verdict`, which takes longer to import than --help may."""
SloText = Annotated[
    str | None, typer.Option("--slo", help="Bounds in seconds, as ttft=0.5,tpot=0.05,itl=0.2,e2e=10; gives goodput.")
]
MinGoodput = Annotated[
    float | None, typer.Option(help="Exit status 1 below this share of requests within --slo.  [default: 0.99]")
]
MaxLag = Annotated[float, typer.Option(help="Exit status 3 where the replay's own lag (p99) is more seconds.")]
MaxErrorRate = Annotated[float | None, typer.Option(help="Exit status 1 beyond this share of failures.")]
Html = Annotated[Path | None, typer.Option(help="Write the report as one HTML page that opens offline.")]


@app.command()
def replay(
    target: Annotated[str, typer.Option(help="Base URL to send to.")],
    trace: Annotated[Path | None, typer.Argument(help="A trace file; without it, --profile.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask for.")] = None,
    model_map: Annotated[
        list[str] | None, typer.Option(help="A=B asks for B where the trace has A; repeatable, instead of --model.")
    ] = None,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Ask for the trace's own models.")] = False,
    speed: Annotated[float, typer.Option(help="Divides the trace's time.")] = 1.0,
    limit: Annotated[int | None, typer.Option(help="At most this many rows.")] = None,
    from_database: Annotated[
        bool, typer.Option("--from-database", help="Send what the database holds, instead of a trace file.")
    ] = False,
    since: From = None,
    until: To = None,
    origin: Origins = None,
    timezone: Timezone = None,
    start: Annotated[float, typer.Option(help="Skip this many seconds of trace time.")] = 0.0,
    duration: Annotated[float | None, typer.Option(help="Seconds of trace time to take.")] = None,
    only_model: Annotated[list[str] | None, typer.Option(help="Only rows of this model; repeatable.")] = None,
    only_log_type: Annotated[list[str] | None, typer.Option(help="Only rows of this log type; repeatable.")] = None,
    only_session: Annotated[list[str] | None, typer.Option(help="Only this session; repeatable.")] = None,
    only_outcome: Annotated[list[str] | None, typer.Option(help="Only rows of this outcome; repeatable.")] = None,
    idle_cap: Annotated[float | None, typer.Option(help="Cut gaps that are longer, in seconds of trace time.")] = None,
    loop: Annotated[int, typer.Option(help="Send the trace so often; 0 is for ever.")] = 1,
    rate_scale: Annotated[
        float | None, typer.Option(help="Part of the sessions, or so many times as many; bursts stay bursts.")
    ] = None,
    target_rps: Annotated[float | None, typer.Option(help="The rate scale that gives this mean rate.")] = None,
    warmup: Annotated[float, typer.Option(help="Seconds whose requests are sent and not measured.")] = 0.0,
    process: Annotated[
        str, typer.Option(help="When rows are due: trace, constant, poisson, gamma, curve or modeled.")
    ] = "trace",
    rate: Annotated[float | None, typer.Option(help="Requests a second, with --process.")] = None,
    shape: Annotated[float | None, typer.Option(help="Gamma shape of the gaps: 1 is Poisson, below it bursty.")] = None,
    curve: Annotated[Path | None, typer.Option(help="CSV with the columns time_s,rps.")] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Workload profile: without a trace its rows, from --start after Monday 0:00; or for modeled."
        ),
    ] = None,
    capacity: Annotated[
        str | None, typer.Option(help="Requests a second that the target can do, or a sweep's JSON file; with --load.")
    ] = None,
    load: Annotated[float | None, typer.Option(help="Share of --capacity to send.")] = None,
    kv_budget: Annotated[
        float | None, typer.Option(help="Send what fills this share of vLLM's KV cache on average.")
    ] = None,
    tpot: Annotated[
        float | None, typer.Option(help="For --kv-budget, seconds a token.  [default: the trace's elapsed times]")
    ] = None,
    ttft: Annotated[float, typer.Option(help="For --kv-budget with --tpot, seconds to the first token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of prompts, ties and arrivals.")] = 0,
    ties: Annotated[
        str, typer.Option(help="spread equal whole-second stamps inside their second, or keep them.")
    ] = "spread",
    endpoint: Annotated[str, typer.Option(help="chat, completions or embeddings.")] = "chat",
    stream: Annotated[bool, typer.Option(help="Ask for streamed answers.")] = True,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The model's tokenizer.json, or a folder with it and the chat template.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts to take texts from: ShareGPT JSON, JSONL, or a text with one a line.")
    ] = None,
    history: Annotated[
        str, typer.Option(help="A session's earlier turns in each request: none, synthetic or real answers.")
    ] = "none",
    block_tokens: Annotated[int | None, typer.Option(help="Of the trace's prefix blocks, if it does not say.")] = None,
    blocks: Annotated[
        bool, typer.Option(" /--no-blocks", show_default=False, help="Make no prompts of the trace's prefix blocks.")
    ] = True,
    extra_body: Annotated[
        str | None, typer.Option(help="JSON object whose fields replace ours in each body; @FILE reads it.")
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE or NAME=$VARIABLE of the environment; repeatable.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option(" /--no-ignore-eos", show_default=False, help="Let answers end by themselves.")
    ] = True,
    min_tokens: Annotated[
        bool, typer.Option(" /--no-min-tokens", show_default=False, help="Ask for no least length.")
    ] = True,
    max_tokens: Annotated[
        bool, typer.Option(" /--no-max-tokens", show_default=False, help="Ask for no greatest length.")
    ] = True,
    format: Format = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the API key.")] = None,
    run_id: Annotated[str | None, typer.Option(help="Name of this run in the records.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Write a row a request: JSON lines, or Parquet for a name in .parquet.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the summary as JSON.")] = None,
    max_in_flight: Annotated[int | None, typer.Option(help="Hold back beyond this; counts as lag.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 600.0,
    max_error_rate: MaxErrorRate = None,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
    sessions: Annotated[
        str,
        typer.Option(help="independent (strict open loop), ordered or think-time: a turn waits for the one before."),
    ] = "independent",
    late: Annotated[str, typer.Option(help="send rows that are late, or drop and count them.")] = "send",
    late_after: Annotated[float, typer.Option(help="Seconds from which --late drop drops.")] = 1.0,
    processes: Annotated[
        int | None, typer.Option(help="Sender processes on this host.  [default: by the rate, where it is known]")
    ] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: send this part of n; auto/n in a Kubernetes Job.")] = None,
    start_at: Annotated[str | None, typer.Option(help="Schedule zero, as ISO 8601 or epoch seconds.")] = None,
    ray: Annotated[str | None, typer.Option(help="Send from this Ray cluster: an address, auto or local.")] = None,
    senders: Annotated[int | None, typer.Option(help="Actors on that cluster.  [default: one a node]")] = None,
    slo: SloText = None,
    min_goodput: MinGoodput = None,
    max_lag: MaxLag = MAX_LAG_S,
    html: Html = None,
    metrics_url: Annotated[
        list[str] | None,
        typer.Option(help="Metrics of a vLLM behind the target; repeatable.  [default: TARGET/metrics]"),
    ] = None,
    store: Annotated[bool, typer.Option("--store", help="Keep the run in the database.")] = False,
    store_requests: Annotated[
        bool | None,
        typer.Option(
            "--store-requests/--no-store-requests",
            help="With --store, its requests, too.  [default: unless the target is a burstgate that records them]",
        ),
    ] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Send a trace to a server, open loop on absolute deadlines, and report what came back.

    Exit status: 0 good, 1 a threshold was missed, 2 wrong usage, 3 the replay itself was the bottleneck.
    """
    from replay.arrivals import ArrivalOptions
    from replay.bodies import parse_fields, parse_header
    from replay.metrics import parse_slo
    from replay.options import parse_shard
    from replay.prompts import PromptOptions
    from replay.runner import ReplayOptions
    from replay.runner import replay as run
    from replay.scaling import ScaleOptions, asked_rate_rps
    from replay.source import SourceOptions

    check_format(format)
    literal: Any = {"ties": ties, "endpoint": endpoint, "sessions": sessions, "late": late}
    named: Any = process
    try:
        source = SourceOptions(
            start_s=start, duration_s=duration, models=tuple(only_model or ()),
            log_types=one_of(only_log_type, LOG_TYPES, "--only-log-type"), sessions=tuple(only_session or ()),
            outcomes=tuple(only_outcome or ()), idle_cap_s=idle_cap, passes=loop or None, rate_scale=rate_scale,
            target_rps=target_rps, speed=speed, seed=seed, model_map=parse_model_map(model_map),
        )  # fmt: skip
        told: Any = history
        texts = PromptOptions(
            tokenizer=tokenizer, pool=prompts, blocks=blocks, block_tokens=block_tokens, history=told,
            max_tokens=max_tokens, min_tokens=min_tokens, ignore_eos=ignore_eos,
            extra_body={} if extra_body is None else parse_fields(extra_body),
            extra_headers=tuple(parse_header(each) for each in header or ()),
        )  # fmt: skip
        if from_database and (trace is not None or (profile is not None and process != "modeled")):
            raise ConfigError("--from-database: expected without a trace or a profile, whose place it takes")
        if not from_database and (since, until, origin, timezone) != (None, None, None, None):
            raise ConfigError("--from, --to, --origin, --timezone: expected with --from-database")
        if (model is None) == (not source.model_map and not keep_models):
            raise ConfigError("--model: expected one model for all rows, or --model-map or --keep-models, and not both")
        fitted = None if profile is None else read_profile_file(profile)
        scale = ScaleOptions(capacity, load, kv_budget, ttft, tpot)
        if scale.is_asked:
            if from_database:
                raise ConfigError("--load, --kv-budget: expected with a trace file, which `burstgate export` writes")
            if (target_rps, rate_scale, rate) != (None, None, None):
                raise ConfigError("--load: expected without --rate, --rate-scale and --target-rps, which it stands for")
            found = asked_rate_rps(
                scale, trace, source, fitted, target=target, format=format, api_key_env=api_key_env
            )  # fmt: skip
            if process == "trace":
                source = dataclasses.replace(source, target_rps=found)
            else:
                rate = found
        arrivals = ArrivalOptions(named, rate, shape, curve, fitted)
        options = ReplayOptions(
            prompts=texts, target=target, model=model or "", speed=speed, limit=limit, source=source,
            arrivals=arrivals, warmup_s=warmup, seed=seed,
            stream=stream, format=format, api_key_env=api_key_env, run_id=run_id, samples=samples, json=json,
            max_in_flight=max_in_flight, timeout_s=timeout, max_error_rate=max_error_rate, quiet=quiet,
            late_after_s=late_after, processes=processes, ray=ray, senders=senders,
            shard=None if shard is None else parse_shard(shard, os.environ),
            start_at_s=stamp_s(start_at, None, "--start-at"),
            slo=None if slo is None else parse_slo(slo), min_goodput=min_goodput, max_lag_s=max_lag, html=html,
            metrics_urls=tuple(metrics_url or ()), **literal,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with contextlib.ExitStack() as undo:
        engine = None
        if from_database:
            check_timezone(timezone)
            selection = selection_of(
                only_model, only_session, only_outcome, origin or ["client"], only_log_type, None,
                stamp_s(since, timezone, "--from"), stamp_s(until, timezone, "--to"),
            )  # fmt: skip
            trace = _recorded(selection, (config, data_dir, database_url), undo)
        if store:
            engine = undo.enter_context(open_database(config, data_dir, database_url, revision="head"))
            options = _options_to_store(options, engine, undo)
        summary = run(trace, options, console=Console(highlight=False))
        if engine is not None:
            _store_run(engine, options, summary, store_requests)
    _exit_by_verdict(summary, quiet=quiet)


def _recorded(
    selection: Filter, database: tuple[Path | None, Path | None, str | None], undo: contextlib.ExitStack
) -> Path:
    """What the database holds of a selection, as a file that all senders read as often as they need to.

    One snapshot, every field: sessions and prefix blocks as they were recorded. Raises ConfigError where nothing is.
    """
    from storage.export import export

    path = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="burstgate-replay-"))) / "recorded.parquet"
    with open_database(*database) as engine:
        if not export(engine, path, selection, format="parquet").rows_written:
            raise ConfigError("--from-database: no recorded request matches")
    return path


def _exit_by_verdict(summary: Summary, *, quiet: bool) -> None:
    """Raises typer.Exit unless the run was good; says why where nothing has been printed."""
    from replay.verdict import exit_status

    if quiet:
        for reason in summary.reasons:
            print(f"burstgate: {summary.verdict}: {reason}", file=sys.stderr)
    if status := exit_status(summary):
        raise typer.Exit(status)


def _options_to_store(options: ReplayOptions, engine: sa.Engine, undo: contextlib.ExitStack) -> ReplayOptions:
    """With a samples file, from which the requests are stored. Raises RunConflict before anything is sent."""
    from storage.runs import check_new

    if options.run_id is not None:
        check_new(engine, options.run_id)
    if options.samples is not None:
        return options
    folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="burstgate-run-"))
    return dataclasses.replace(options, samples=Path(folder) / "samples.jsonl")


def _store_run(engine: sa.Engine, options: ReplayOptions, summary: Summary, store_requests: bool | None) -> None:
    """Keep a run; its requests, too, where nobody else records them."""
    from replay.sample import read_samples, record_of
    from replay.scrape import is_burstgate
    from storage.runs import Run, store_run

    run_id, started_at = summary.run_id, summary.started_at
    if run_id is None or started_at is None or options.samples is None:
        print("burstgate: not stored: nothing was sent", file=sys.stderr)
        return
    asked = store_requests if store_requests is not None else not is_burstgate(str(summary.target))
    stored = Run(
        run_id, started_at, str(summary.target), options.model, summary.sent, summary.ok, summary.verdict,
        msgspec.json.encode(options, enc_hook=str).decode(), msgspec.json.encode(summary).decode(),
    )  # fmt: skip
    samples = read_samples(options.samples) if asked else iter(())
    records = (
        record_of(
            each, run_id=run_id, started_at=started_at, model=options.model, endpoint=options.endpoint,
            stream=options.stream,
        )
        for each in samples
    )  # fmt: skip
    inserted = store_run(engine, stored, records)
    kept = f"with {inserted:,} requests" if asked else "its requests are the gateway's to record"
    print(f"burstgate: stored as run {run_id}, {kept}", file=sys.stderr)


@app.command()
def report(
    samples: Annotated[list[Path], typer.Argument(help="Samples files of one run.")],
    summary: Annotated[
        list[Path] | None,
        typer.Option(help="Summary that replay wrote with --json, for what no sample tells; repeatable."),
    ] = None,
    json: Json = False,
    html: Html = None,
    slo: SloText = None,
    min_goodput: MinGoodput = None,
    max_lag: MaxLag = MAX_LAG_S,
    max_error_rate: MaxErrorRate = None,
) -> None:
    """Make a replay's report again from its samples files, of all shards together; exit status as of replay."""
    from itertools import chain

    from replay.metrics import Summary, Workload, merge_workloads, parse_slo, summarize
    from replay.page import page
    from replay.report import render, summary_json
    from replay.sample import read_samples
    from replay.verdict import Limits, judged

    try:
        bounds = None if slo is None else parse_slo(slo)
        limits = Limits(max_lag, max_error_rate=max_error_rate, min_goodput=min_goodput)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    told: list[Workload] = []
    for path in summary or ():
        try:
            told.append(msgspec.json.decode(path.read_bytes(), type=Summary))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected a summary, as replay --json writes it: {error}") from None
    workload = merge_workloads(told) if told else Workload()
    found = judged(summarize(chain.from_iterable(map(read_samples, samples)), workload, bounds), limits)
    if html is not None:
        with whole_file(html) as stream:
            stream.write(page(found))
    if json:
        print(summary_json(found).decode(), end="")
    else:
        Console(highlight=False).print(render(found))
    _exit_by_verdict(found, quiet=json)


@app.command()
def runs(
    run_id: Annotated[str | None, typer.Option(help="Only this run.")] = None,
    json: Json = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """List the replays that were kept with `replay --store`, the newest first."""
    from storage.runs import read_runs

    with open_database(config, data_dir, database_url) as engine:
        found = read_runs(engine, run_id)
    if run_id is not None and not found:
        raise ValueError(f"run id {run_id!r}: expected one that is stored, `burstgate runs` lists them")
    if json:
        whole = [
            {**dataclasses.asdict(each), "options": msgspec.Raw(each.options.encode()),
             "summary": msgspec.Raw(each.summary.encode())}
            for each in found
        ]  # fmt: skip
        print(msgspec.json.encode(whole).decode())
        return
    if not found:
        print("no run is stored", file=sys.stderr)
        return
    table = Table("run", "started", "target", "model", "sent", "ok", "verdict", box=None, pad_edge=False)
    for each in found:
        started = datetime.datetime.fromtimestamp(each.started_at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        table.add_row(each.run_id, started, each.target, each.model, f"{each.sent:,}", f"{each.ok:,}", each.verdict)
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def sweep(
    context: typer.Context,
    trace: Annotated[
        Path | None, typer.Option(help="Trace whose lengths are sent and whose own arrivals are compared.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Base URL of a live target.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask a live target for.")] = None,
    simulate: Annotated[
        str | None,
        typer.Option(
            help="Preset of a simulated machine, or default; with burstgate simulate's flags for it, as --kv-blocks."
        ),
    ] = None,
    fit: Annotated[
        Path | None, typer.Option(help="Costs of the simulated machine, fitted to samples or steps.")
    ] = None,
    rates: Annotated[str | None, typer.Option(help="Requests a second to measure, as 1,2,4.")] = None,
    first: Annotated[float | None, typer.Option("--from", help="Lowest rate of a geometric ladder.")] = None,
    last: Annotated[float | None, typer.Option("--to", help="Its highest rate.")] = None,
    steps: Annotated[int, typer.Option(help="How many rates it has.")] = 6,
    shapes: Annotated[str, typer.Option(help="Gamma shapes of the gaps to compare with Poisson.")] = "0.5,0.25",
    duration: Annotated[float | None, typer.Option(help="Seconds of arrivals a cell.  [default: 60]")] = None,
    requests: Annotated[int | None, typer.Option(help="Requests a cell, instead of a duration.")] = None,
    seeds: Annotated[int, typer.Option(help="Cells of each kind; figures are medians over them.")] = 3,
    seed: Annotated[int, typer.Option(help="The first of them.")] = 0,
    profile: Annotated[
        Path | None, typer.Option(help="Workload profile whose lengths are sent, without a trace.")
    ] = None,
    request_tokens: Annotated[
        int | None, typer.Option(help="Of every request.  [default: the trace's, the profile's, or 512]")
    ] = None,
    response_tokens: Annotated[
        int | None, typer.Option(help="Of every answer.  [default: the trace's, the profile's, or 128]")
    ] = None,
    slo: Annotated[
        str | None, typer.Option(help="Bounds in seconds, as ttft=0.5,tpot=0.05,e2e=10; itl of a live target only.")
    ] = None,
    max_lag: Annotated[
        float, typer.Option(help="A live cell is invalid where the replay's own lag (p99) is more seconds.")
    ] = MAX_LAG_S,
    all: Annotated[bool, typer.Option("--all", help="Measure every rate, past the knee too.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which a client leaves.")] = None,
    cool_down: Annotated[float, typer.Option(help="Seconds of rest before each cell of a live target.")] = 0.0,
    idle_timeout: Annotated[float, typer.Option(help="Most seconds to wait for a live target to be idle.")] = 120.0,
    metrics_url: Annotated[
        list[str] | None,
        typer.Option(help="Metrics of a vLLM behind the target; repeatable.  [default: TARGET/metrics]"),
    ] = None,
    endpoint: Annotated[str, typer.Option(help="chat or completions.")] = "chat",
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the API key.")] = None,
    format: Format = None,
    json: Annotated[Path | None, typer.Option(help="Write everything as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one line a cell.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts.")] = None,
    quiet: Annotated[bool, typer.Option(help="No line a cell.")] = False,
) -> None:
    """Find what bursts cost: the same mean rate as Poisson, Gamma and a trace's arrivals, rate by rate to the knee."""
    from replay.metrics import parse_slo
    from replay.sweep import SweepOptions, Workload, as_csv, ladder, numbers, progress_text
    from replay.sweep import sweep as measured
    from replay.sweep_report import page, render

    check_format(format)
    for file in (json, csv, html):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"{file}: no such directory")
    try:
        if (rates is None) == (first is None or last is None):
            raise ValueError("rates: expected --rates, or --from and --to")
        options = SweepOptions(
            rates_rps=numbers(rates, "rates") if rates is not None else ladder(first or 0.0, last or 0.0, steps),
            shapes=numbers(shapes, "shapes"),
            duration_s=60.0 if duration is None and requests is None else duration,
            requests=requests, seeds=seeds, seed=seed, is_full=all, slo=None if slo is None else parse_slo(slo),
        )  # fmt: skip
        if timeout is not None and not 0 < timeout < 1e9:
            raise ValueError(f"timeout: expected seconds > 0, got {timeout:g}")
        run_cell, name = _sweep_target(
            context.args, target, model, simulate, fit, timeout, cool_down, idle_timeout, metrics_url or (), endpoint,
            api_key_env, max_lag,
        )  # fmt: skip
        if target is None and options.slo is not None and options.slo.itl_s is not None:
            raise ValueError("slo: itl: expected with --target only; the simulator keeps no gaps between chunks")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    rows, lengths = _sweep_rows(trace, format, profile, request_tokens, response_tokens, seed)
    found = measured(
        options, Workload(rows, has_gaps=trace is not None), run_cell, target=name, lengths=lengths,
        on_cell=lambda cell: None if quiet else print(progress_text(cell), flush=True),
    )  # fmt: skip
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(render(found))
    if json is not None:
        with whole_file(json) as stream:
            stream.write(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    if csv is not None:
        with whole_file(csv) as stream:
            stream.write(as_csv(found.cells).encode())
    if html is not None:
        with whole_file(html) as stream:
            stream.write(page(found))
    if found.stopped_by is not None:
        raise fail(found.stopped_by)
    if found.is_interrupted or not found.is_valid:
        raise typer.Exit(130 if found.is_interrupted else 3)


def _sweep_target(
    flags: list[str],
    target: str | None,
    model: str | None,
    preset: str | None,
    fit: Path | None,
    timeout_s: float | None,
    cool_down_s: float,
    idle_timeout_s: float,
    metrics_url: Sequence[str],
    endpoint: Any,
    api_key_env: str | None,
    max_lag_s: float,
) -> tuple[Any, str]:
    """What runs a sweep's cells, and its name. Raises ValueError naming the option."""
    from replay.cells import live_cells, virtual_cells

    if (target is None) == (preset is None):
        raise ValueError("target: expected either --target or --simulate")
    if preset is not None:
        from replay.simulator.__main__ import machine_config

        machine = machine_config(None if preset == "default" else preset, fit, flags, prog="burstgate sweep")
        return virtual_cells(machine, timeout_s), " ".join(["simulated", preset, *flags])
    if flags or fit is not None:
        raise ValueError(f"{flags[0] if flags else '--fit'}: it needs --simulate")
    if model is None:
        raise ValueError("model: expected with --target, got none")
    if not (0 <= cool_down_s < 1e6 and 0 <= idle_timeout_s < 1e6):
        raise ValueError(f"cool-down, idle timeout: expected seconds >= 0, got {cool_down_s:g}, {idle_timeout_s:g}")
    from replay.runner import ReplayOptions

    assert target is not None
    options = ReplayOptions(
        target=target, model=model, endpoint=endpoint, api_key_env=api_key_env, timeout_s=timeout_s or 600.0,
        metrics_urls=tuple(metrics_url), max_lag_s=max_lag_s,
    )  # fmt: skip
    cells = live_cells(options, idle_timeout_s=idle_timeout_s, cool_down_s=cool_down_s)
    return cells, f"{model} at {target}"


def _sweep_rows(
    trace: Path | None,
    format: str | None,
    profile: Path | None,
    request_tokens: int | None,
    response_tokens: int | None,
    seed: int,
) -> tuple[list[Any], str]:
    """The rows that a sweep sends, and where they are from."""
    from replay.schedule import PlanOptions, plan
    from replay.sweep import MAX_REQUESTS
    from traces.codec import read_trace
    from traces.generation import fixed_lengths, plain_profile
    from traces.generation import generate as generated
    from traces.profile import decode_profile

    if trace is not None and profile is not None:
        raise ConfigError("--profile: expected without a trace, whose lengths are sent")
    try:
        fixed = plain_profile(
            fixed_lengths(
                512 if request_tokens is None else request_tokens, 128 if response_tokens is None else response_tokens
            )
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if trace is not None:
        rows = list(plan(read_trace(trace, format=format), PlanOptions(limit=MAX_REQUESTS, seed=seed)))
        name = f"rows of {trace}"
    elif profile is not None:
        try:
            fitted = decode_profile(profile.read_bytes())
        except ValueError as error:
            raise ValueError(f"{profile}: {error}") from None
        rows = list(plan(generated(fitted, seed=seed, rows=100_000), PlanOptions(ties="keep")))
        name = f"lengths of {profile}"
    else:
        rows = list(plan(generated(fixed, seed=seed, rows=2, rate_rps=1.0), PlanOptions(ties="keep")))
        name = f"{rows[0].request_tokens} prompt and {rows[0].response_tokens} answer tokens"
    given = {"request_tokens": request_tokens, "response_tokens": response_tokens}
    given = {key: tokens for key, tokens in given.items() if tokens is not None}
    if given and (trace is not None or profile is not None):
        rows = [msgspec.structs.replace(row, **given) if row.is_sendable else row for row in rows]
        name += "".join(f", {key.replace('_', ' ')} {tokens}" for key, tokens in given.items())
    return rows, name


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def simulate(context: typer.Context) -> None:
    """Run a vLLM-like server on a simulated GPU, or a trace through one (--trace); `--help` lists the flags."""
    from replay.simulator.__main__ import main as simulator

    raise typer.Exit(simulator(context.args))
