"""The rival of benchmarks/analysis.py: the statistics of `burstgate analyze` as one writes them with pandas and scipy.

`python analysis_rival.py TRACE` reads a trace (Parquet or BurstGPT's CSV) and prints them as JSON. It runs in an
environment of its own, so it imports nothing of this repository. Vectorised where pandas offers it: nobody's straw man.
It lacks what has no one-liner: the likelihood of whole seconds (its Gamma fit is by moments and scipy), mixtures, the
Zipf tail, intervals of failure rates against load, burn rates, episodes of failures.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd  # type: ignore[import-untyped,import-not-found]
from scipy import signal, stats  # type: ignore[import-untyped]

COLUMNS = {
    "Timestamp": "received_at",
    "Session ID": "session_id",
    "Elapsed time": "elapsed_s",
    "Model": "model",
    "Request tokens": "request_tokens",
    "Response tokens": "response_tokens",
    "Log Type": "log_type",
}
SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)


def read(path: str) -> pd.DataFrame:
    if path.endswith(".parquet"):
        rows = pd.read_parquet(path, columns=[*COLUMNS.values(), "outcome"])
        rows["failed"] = rows.pop("outcome") != "ok"
    else:
        rows = pd.read_csv(path, usecols=list(COLUMNS)).rename(columns=COLUMNS)
        rows["failed"] = rows["response_tokens"] == 0
    return rows.sort_values("received_at", kind="stable", ignore_index=True)


def arrivals(stamps: pd.Series) -> dict[str, object]:
    gaps = stamps.diff().dropna()
    found: dict[str, object] = {"gaps": gaps.describe(percentiles=SHARES).to_dict(), "cv": gaps.std() / gaps.mean()}
    for window in (1, 10, 60, 300, 1200, 3600):
        counts = np.bincount(((stamps - stamps.iloc[0]) // window).astype(int))
        found[f"dispersion_{window}"] = counts.var() / counts.mean()
    for window in (1200, 300):
        place = (stamps // window).astype(int)
        by = gaps[place.eq(place.shift())[1:]].groupby(place)
        table = by.agg(["mean", "std", "count"])
        table = table[table["count"] >= 20]
        cv = table["std"] / table["mean"]
        alphas, rejected = [], 0
        for number, values in by if window == 1200 else ():
            if number in table.index and values.gt(0).any():
                alpha = stats.gamma.fit(values.clip(lower=0.5), floc=0)[0]
                alphas.append(alpha)
                rejected += stats.kstest(values, "expon", args=(0, values.mean())).pvalue < 0.05
        found[f"windows_{window}"] = [cv.quantile([0.1, 0.5, 0.9]).tolist(), float(np.median(alphas or [0])), rejected]
    return found


def periods(rows: pd.DataFrame) -> dict[str, object]:
    hour = (rows["received_at"] // 3600).astype(int)
    by = rows.groupby(hour).agg(n=("failed", "size"), request=("request_tokens", "sum"),
                                response=("response_tokens", "sum"))  # fmt: skip
    by = by.reindex(range(by.index.min(), by.index.max() + 1), fill_value=0)
    boxes = by.groupby(by.index % 24).quantile([0.05, 0.25, 0.5, 0.75, 0.95])
    days = by["n"].groupby(by.index // 24).sum()
    values = np.sqrt(by["n"].to_numpy())
    power = signal.periodogram(values - values.mean())[1]
    acf = [float(by["n"].autocorr(lag)) for lag in range(1, 193)]
    return {"boxes": boxes.to_numpy().tolist(), "days": days.tolist(), "peak": int(power.argmax()), "acf": acf}


def lengths(good: pd.DataFrame) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in ("request_tokens", "response_tokens"):
        values = good[name]
        found[name] = values.describe(percentiles=SHARES).to_dict()
        logs = np.log(values[values > 0])
        found[f"{name}_lognormal"] = [logs.mean(), logs.std(), stats.skew(logs), stats.kurtosis(logs)]
        sample = values[values > 0].to_numpy()
        shape, _, scale = stats.gamma.fit(sample, floc=0)
        found[f"{name}_ks"] = [
            stats.kstest(sample, "lognorm", args=(logs.std(), 0, np.exp(logs.mean()))).statistic,
            stats.kstest(sample, "gamma", args=(shape, 0, scale)).statistic,
        ]
        found[f"{name}_histogram"] = np.histogram(logs, 100)[0].tolist()
    by = good.groupby(good["request_tokens"] // 10)["response_tokens"]
    found["bins"] = by.agg(["mean", "median", "size"]).join(by.quantile([0.05, 0.95]).unstack()).to_numpy().tolist()
    found["spearman"] = good["request_tokens"].corr(good["response_tokens"], method="spearman")
    return found


def conversations(rows: pd.DataFrame) -> dict[str, object]:
    turns = rows.dropna(subset=["session_id"]).sort_values(["session_id", "received_at"], kind="stable")
    by = turns.groupby("session_id")
    gaps = by["received_at"].diff()
    think = gaps - by["elapsed_s"].shift()
    growth = by["request_tokens"].diff()
    span = by["received_at"].agg(lambda each: each.iloc[-1] - each.iloc[0])
    switches = int((by["model"].nunique() > 1).sum())
    figures = [each.describe(percentiles=SHARES).to_dict() for each in (by.size(), gaps, think, growth, span)]
    return {"figures": figures, "switches": switches}


def load(rows: pd.DataFrame) -> dict[str, object]:
    timed = rows[rows["elapsed_s"] > 0]
    starts, ends = timed["received_at"].to_numpy(), np.sort((timed["received_at"] + timed["elapsed_s"]).to_numpy())
    at = np.arange(len(starts)) - np.searchsorted(ends, starts, side="right")
    stamps = rows["received_at"].to_numpy()
    rows["in_flight"] = np.searchsorted(starts, stamps) - np.searchsorted(ends, stamps, side="right")
    rows["rate"] = np.arange(len(stamps)) - np.searchsorted(stamps, stamps - 60, side="right")
    return {"most": int(at.max(initial=0))}


def failures(rows: pd.DataFrame) -> dict[str, object]:
    hour = (rows["received_at"] // 3600 % 24).astype(int)
    found: dict[str, object] = {}
    for key in ("model", "log_type", hour, np.log2(rows["request_tokens"] + 1).astype(int),
                (rows["received_at"] // 86_400).astype(int), pd.qcut(rows["in_flight"], 10, duplicates="drop"),
                pd.qcut(rows["rate"], 10, duplicates="drop")):  # fmt: skip
        table = rows.groupby(key, observed=True)["failed"].agg(["sum", "size"])
        found[str(len(found))] = table.to_numpy().tolist()
    runs = rows["failed"].ne(rows["failed"].shift()).cumsum()[rows["failed"]]
    found["longest"] = int(runs.value_counts().max())
    counts = pd.Series(np.bincount((rows["received_at"] // 10).astype(int)))
    base = counts.rolling(361, center=True, min_periods=1).median()
    found["bursts"] = int((counts > base + 5 * np.sqrt(base.clip(lower=1))).sum())
    by_day = rows[~rows["failed"]].groupby((rows["received_at"] // 86_400).astype(int))["elapsed_s"]
    found["latency"] = by_day.quantile([0.5, 0.9, 0.99]).tolist()
    return found


def main() -> None:
    rows = read(sys.argv[1])
    good = rows[~rows["failed"]]
    parts = [rows] + [part for _, part in rows.groupby("log_type")]
    services = [rows] + [part for _, part in rows.groupby(["model", "log_type"])]
    good_services = [good] + [part for _, part in good.groupby(["model", "log_type"])]
    found = {
        "arrivals": [arrivals(part["received_at"]) for part in parts],
        "periods": [periods(part) for part in services],
        "lengths": [lengths(part) for part in good_services],
        "conversations": conversations(rows),
        "load": load(rows),
        "failures": failures(rows),
    }
    json.dump(found, sys.stdout, default=float)


if __name__ == "__main__":
    main()
