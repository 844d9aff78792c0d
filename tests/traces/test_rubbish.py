"""What no reader may choke on: for every format, odd files that are traces, and rubbish that is one clear line."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import polars as pl
import pytest

from proxy.cli import main
from tests.traces.test_codec import LATER, ROW, records, write
from traces.codec import AZURE_COLUMNS, COLUMNS_6, COLUMNS_8, FORMATS, TraceFormatError, read_trace
from traces.profile import decode_profile

ROOT = Path(__file__).parents[2]
TEXTS = {
    "burstgpt": (",".join(COLUMNS_8), "{at},s,2,m,{n},5,{total},API log"),
    "burstgpt6": (",".join(COLUMNS_6), "{at},m,{n},5,{total},API log"),
    "azure": (",".join(AZURE_COLUMNS), "2024-05-10 00:00:0{at}+00:00,{n},5"),
    "azure_multimodal": ("TIMESTAMP,NumImages,ContextTokens,GeneratedTokens", "2025-05-10 00:00:0{at}+00:00,2,{n},5"),
    "mooncake": (None, '{{"timestamp": {at}, "input_length": {n}, "output_length": 5, "hash_ids": [1]}}'),
    "aiperf": (None, '{{"session_id": "s{at}", "timestamp": {at}, "input_length": {n}, "output_length": 5}}'),
    "bailian": (
        None,
        '{{"chat_id": {at}, "timestamp": {at}, "input_length": {n}, "output_length": 5, "hash_ids": [1]}}',
    ),
    "timed_trace": (None, '{{"timestamp": {at}.5, "input_length": {n}, "output_length": 5, "hash_ids": [1]}}'),
    "workload_trace": (
        None,
        '{{"timestamp": {at}, "body": {{"model": "m", "prompt": [{n}]}}, "completion_tokens": 5}}',
    ),
    "jsonl": (None, '{{"request_id": "r{at}", "received_at": {at}, "request_tokens": {n}}}'),
}
"""For every format of text its header and a row: `at` one digit of time, `n` a number of tokens."""
CSVS = [format for format, (header, _) in TEXTS.items() if header]


def text_of(format: str, ats: list[int], n: str = "7", end: str = "\n") -> str:
    header, row = TEXTS[format]
    total = str(int(float(n)) + 5) if re.fullmatch("[0-9.]+", n) else n
    return "".join(
        line + end for line in [*([header] if header else []), *(row.format(at=at, n=n, total=total) for at in ats)]
    )


def table_of(path: Path, format: str, content: str | bytes) -> list[tuple[float, int | None]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(row.received_at % 10, row.request_tokens) for row in records(path, format=format)]


@pytest.mark.parametrize("format", TEXTS)
def test_odd_files_that_are_traces(tmp_path: Path, format: str) -> None:
    path = tmp_path / "t"
    plain = table_of(path, format, text_of(format, [1, 2]))
    assert len(plain) == 2
    for name, content in {
        "byte order mark": "\ufeff" + text_of(format, [1, 2]),
        "CRLF": text_of(format, [1, 2], end="\r\n"),
        "blank lines at the end": text_of(format, [1, 2]) + "\n\n\r\n",
        "no line end at the end": text_of(format, [1, 2]).rstrip("\n"),
    }.items():
        assert table_of(path, format, content) == plain, name
    assert table_of(path, format, text_of(format, [2, 1])) == plain[::-1]  # unsorted
    assert table_of(path, format, text_of(format, [1])) == plain[:1]
    assert table_of(path, format, text_of(format, [])) == [] or format not in CSVS


@pytest.mark.parametrize("format", [*CSVS, "mooncake", "aiperf", "bailian", "timed_trace"])
def test_whole_numbers_written_as_floats_are_taken(tmp_path: Path, format: str) -> None:
    """AIPerf drops such rows, and says so at no level that is shown."""
    assert table_of(tmp_path / "t", format, text_of(format, [1], n="50.0")) == table_of(
        tmp_path / "t", format, text_of(format, [1], n="50")
    )


@pytest.mark.parametrize("format", CSVS)
def test_quoted_fields_are_taken(tmp_path: Path, format: str) -> None:
    header, _, row = text_of(format, [1]).strip().partition("\n")
    quoted = ",".join(f'"{field}"' for field in row.split(","))
    assert table_of(tmp_path / "t", format, f"{header}\n{quoted}\n") == table_of(
        tmp_path / "t", format, f"{header}\n{row}\n"
    )


NUMBERS = ["-3", "2.5", "nan", "NaN", "inf", "1e999", "x", "-0.5", "99999999999999999999", "True"]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("format", [format for format in TEXTS if format != "workload_trace"])
def test_wrong_numbers_are_one_clear_line(tmp_path: Path, format: str, number: str) -> None:
    """In the second row: the line and the file are named, whatever comes before."""
    path = tmp_path / "t"
    good, bad = text_of(format, [1]), text_of(format, [2], n=number).splitlines()[-1]
    with pytest.raises(TraceFormatError) as caught:
        table_of(path, format, f"{good}{bad}\n")
    line = 3 if format in CSVS else 2
    assert re.fullmatch(f"{re.escape(str(path))}:{line}: .*expected .+", str(caught.value))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "content",
    [
        b"\0\0\0\0",
        b"\xff\xfe\xfa\n",
        b"a,b,c\n1,2,3\n",
        b'{"x": 1}\n',
        b"[]\n",
        b"PAR1\0",
        gzip.compress(b"x", mtime=0),
    ],
)
def test_rubbish_is_one_clear_line(tmp_path: Path, format: str, content: bytes) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    for asked in (format, None):
        with pytest.raises(TraceFormatError) as caught:
            list(read_trace(path, format=asked))
        assert str(caught.value).startswith(f"{path}:")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", CSVS)
def test_text_that_is_no_utf8_is_named(tmp_path: Path, format: str) -> None:
    content = text_of(format, [1, 2]).encode().replace(b",5", b",\xff")
    with pytest.raises(TraceFormatError, match=r"t:2: .*expected UTF-8, got "):
        table_of(tmp_path / "t", format, content)


def test_damaged_parquet_is_one_clear_line_or_other_values(tmp_path: Path) -> None:
    """Cut anywhere, or with bytes changed: at some of these polars panics, which is no Exception of Python's."""
    path = tmp_path / "t.parquet"
    rows = [
        msgspec.structs.replace(ROW, request_id=f"r{n}", received_at=float(n), prefix_blocks=(n,)) for n in range(50)
    ]
    write(path, [rows], format="parquet")
    whole, rng = path.read_bytes(), random.Random(0)
    messages: list[str] = []
    for trial in range(150):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            del damaged[rng.randrange(len(whole)) :]
        for _ in range(0 if trial % 3 == 0 else rng.choice([1, 4, 20])):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            list(read_trace(path, format="parquet"))
        except TraceFormatError as error:
            messages.append(str(error))
    assert len(messages) > 75
    assert [text for text in messages if not text.startswith(f"{path}:") or "\n" in text] == []


def test_a_panic_of_polars_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.parquet"
    write(path, [[ROW, LATER]], format="parquet")

    def panics(*_: object, **__: object) -> None:
        raise pl.exceptions.PanicException("index out of bounds\nnote: run with RUST_BACKTRACE=1")

    monkeypatch.setattr(pl.LazyFrame, "collect", panics)
    with pytest.raises(TraceFormatError, match=r"expected a Parquet file, .* polars says: index out of bounds note"):
        list(read_trace(path))


def test_lines_of_two_gigabytes_are_refused_in_little_memory(tmp_path: Path) -> None:
    """As a sparse file, so that no disk is filled: what is read is NULs, and no line end."""
    for format in TEXTS:
        path = tmp_path / format
        path.write_text(text_of(format, [1]))
        os.truncate(path, 2 << 30)
    program = (
        "import re, sys; from pathlib import Path; from traces.codec import TraceFormatError, read_trace\n"
        "for path in map(Path, sys.argv[1:]):\n"
        "    try: list(read_trace(path, format=path.name)); print('read')\n"
        "    except TraceFormatError as error: print(error)\n"
        # Not ru_maxrss, which counts what this process had before it became another.
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *(str(tmp_path / format) for format in TEXTS)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    *lines, peak_kib = done.stdout.splitlines()
    assert len(lines) == len(TEXTS)
    for format, line in zip(TEXTS, lines, strict=True):
        at = 3 if format in CSVS else 2
        assert line.startswith(f"{tmp_path / format}:{at}: expected a line of at most ")
    assert int(peak_kib) < 400 * 1024


# The commands


def burstgate(*arguments: object, limit_bytes: int | None = None) -> tuple[int, str]:
    """Exit status and standard error. limit_bytes: the longest file that may be written, as on a full disk."""
    program = "from proxy.cli import main; import sys; sys.argv[0] = 'burstgate'; main()"
    if limit_bytes is not None:
        program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes},) * 2)\n{program}"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


def test_commands_say_a_torn_parquet_file_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write(path, [[ROW, LATER]], format="parquet")
    path.write_bytes(path.read_bytes()[:-30])
    replay = ("replay", path, "--target", "http://127.0.0.1:1", "--model", "m")
    for arguments in (
        ("stats", path),
        ("import", path, "--data-dir", tmp_path / "data"),
        ("fit", path, "-o", tmp_path / "p.json"),
        ("convert", path, tmp_path / "o.csv"),
        replay,
    ):
        status, text = burstgate(*arguments)
        if arguments is not replay:
            assert text.startswith(f"burstgate: {path}: expected a Parquet file, got one where polars says: "), (
                arguments
            )
        assert (status, text.count("\n")) == (1, 1), (arguments, text)
    assert {each.name for each in tmp_path.iterdir()} <= {"t.parquet", "data"}


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    process = ("--process", "poisson", "--rate", "9", "--rows", "20000")
    for format in ("burstgpt", "parquet", "jsonl", "mooncake"):
        target = tmp_path / "t"
        status, text = burstgate("generate", *process, "--format", format, "-o", target, limit_bytes=20_000)
        assert status == 1
        assert text.endswith("File too large\n"), (format, text)
        assert text.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


def test_a_device_is_written_and_not_replaced(tmp_path: Path) -> None:
    process = ("--process", "poisson", "--rate", "9", "--rows", "5000")
    assert burstgate("generate", *process, "-o", "/dev/full") == (1, "burstgate: /dev/full: No space left on device\n")
    assert Path("/dev/full").is_char_device()
    assert burstgate("generate", *process, "-o", "/dev/null")[0] == 0
    assert Path("/dev/null").is_char_device()
    trace = tmp_path / "t.csv"
    assert burstgate("generate", *process, "-o", trace)[0] == 0
    assert burstgate("fit", trace, "-o", "/dev/full") == (1, "burstgate: /dev/full: No space left on device\n")


def test_a_profile_that_is_none_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"burstgate_profile": 99}))
    status, text = burstgate("replay", "--profile", path, "--target", "http://127.0.0.1:1", "--model", "m")
    assert status != 0
    assert text == f"burstgate: {path}: profile: burstgate_profile: expected version 1 to 2, got 99\n"


HEADER = ",".join(COLUMNS_8)
LINE = "{at},{session},2.5,m,{request},{response},{total},API log\n"


def csv_of(*rows: tuple[float, int, int]) -> str:
    lines = (LINE.format(at=at, session="", request=a, response=b, total=a + b) for at, a, b in rows)
    return HEADER + "\n" + "".join(lines)


ODD_TRACES = {
    "empty": csv_of(),
    "one row": csv_of((5.0, 7, 3)),
    "all failures": csv_of(*((float(at), 0, 0) for at in range(60))),
    "one giant gap": csv_of(*((float(at % 9), 7, 3) for at in range(40)), (4.2e9, 7, 3)),
    "unsorted": csv_of(*((float(at * 7919 % 1000), at + 1, 3) for at in range(200))),
}
WRONG_TRACES = {
    "not a number": HEADER + "\nnan,,2.5,m,7,3,10,API log\n",
    "negative tokens": csv_of((1.0, 7, 3), (2.0, -7, 3)),
}
IS_NAN = re.compile(r"(?<![\w-])(NaN|nan|-?Infinity|-?inf)(?![\w-])")


def analyses(path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[int, str, str]]:
    """By command its exit status and what it says on standard output and error."""
    said = {}
    for name, arguments in {
        "analyze": [path, "--html", folder / "page.html", "--json", folder / "analyze.json"],
        "failures": [path, "--json", folder / "failures.json"],
        "compare": [path, path, "--rounds", "20", "--json", folder / "compare.json"],
        "fit": [path, "-o", folder / "profile.json"],
    }.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["burstgate", name, *map(str, arguments)])
            with pytest.raises(SystemExit) as left:
                main()
        told = capsys.readouterr()
        said[name] = (int(left.value.code or 0), told.out, told.err)
    return said


@pytest.mark.parametrize("name", ODD_TRACES)
def test_analyses_of_odd_traces_are_answers_without_nan(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(ODD_TRACES[name])
    said = analyses(path, tmp_path, capsys)
    for command in ("analyze", "failures", "compare"):
        status, out, err = said[command]
        # Compared with itself a trace is the same, or there is too little of it to tell.
        assert status in ((0, 3) if command == "compare" else (0,)), (command, err)
        assert "Traceback" not in err
        assert not IS_NAN.search(out), command
        text = (tmp_path / f"{command}.json").read_text()
        json.loads(text, parse_constant=pytest.fail)
    html = (tmp_path / "page.html").read_text()
    # plotly.js has such words of its own; the figures' data is JSON, in which there are none.
    figures = html[: html.index("plotly.js v")]
    assert not re.search(r"[\[:,] ?(NaN|-?Infinity)\b", figures)
    status, _, err = said["fit"]
    if (tmp_path / "profile.json").exists():
        assert status == 0
        decode_profile((tmp_path / "profile.json").read_bytes())
    else:
        assert (status, err.count("\n")) == (1, 1), err
        assert re.match(r"burstgate: (fit|.*t\.csv): expected ", err)


@pytest.mark.parametrize("name", WRONG_TRACES)
def test_analyses_of_wrong_traces_are_one_clear_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(WRONG_TRACES[name])
    for command, (status, out, err) in analyses(path, tmp_path, capsys).items():
        assert (status, out) == (2 if command == "compare" else 1, ""), command
        assert re.fullmatch(rf"burstgate: {re.escape(str(path))}:[23]: column '.*': expected .*, got .*\n", err)
    assert [each.name for each in tmp_path.iterdir()] == ["t.csv"]


def test_analyses_on_a_full_disk_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(ODD_TRACES["unsorted"])
    for arguments in (
        ("analyze", path, "--csv-dir", tmp_path / "csv"),
        ("failures", path, "--json", tmp_path / "f.json"),
        ("analyze", path, "--html", tmp_path / "r.html"),
        ("analyze", path, "--json", tmp_path / "a.json"),
        ("compare", path, path, "--json", tmp_path / "c.json"),
        ("fit", path, "-o", tmp_path / "p.json"),
    ):
        status, text = burstgate(*arguments, limit_bytes=200)
        assert (status, text.count("\n")) == (1, 1), (arguments, text)
        assert text.startswith("burstgate: ")
        assert text.endswith("File too large\n")
    assert {each.name for each in tmp_path.iterdir()} == {"t.csv", "csv"}
    # The small ones before the one that did not fit are whole.
    for table in (tmp_path / "csv").iterdir():
        assert table.suffix == ".csv"
        assert table.stat().st_size <= 200
        assert table.read_text().endswith("\n")
