"""Long runs of the wire's parsers under atheris (coverage-guided libFuzzer): `make fuzz`, or

    python -m tests.fuzz.fuzz_wire response|events|account [libFuzzer's options] [corpus folders]

The corpus is kept in tests/fuzz/corpus/NAME, which git ignores; an input that fails is written to the current folder
as crash-..., timeout-... or oom-..., and given as the last argument it is run again.
"""

from __future__ import annotations

import importlib
import sys
from hashlib import sha256
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
HEADER_BYTES = 4
"""Of an input: three that say where the stream is cut, one for the target; the stream follows."""


def main(arguments: list[str]) -> None:
    """Fuzz one target; never returns."""
    try:
        atheris = importlib.import_module("atheris")
    except ImportError:
        sys.exit("fuzzing needs atheris, which is not a dependency: python -m pip install atheris")
    with atheris.instrument_imports(include=["wire"]):
        from tests.fuzz.targets import TARGETS, TOKENS

    if not arguments or arguments[0] not in TARGETS:
        sys.exit(f"expected a target ({', '.join(TARGETS)}), got {arguments[:1]}")
    name, *rest = arguments
    check, seeds = TARGETS[name]
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (corpus / sha256(seed).hexdigest()[:16]).write_bytes(b"\x05\x40\x90\x00" + seed)
    words = corpus.with_suffix(".dict")
    words.write_text("".join('"{}"\n'.format("".join(f"\\x{byte:02x}" for byte in token)) for token in TOKENS))

    def one(data: bytes) -> None:
        stream = data[HEADER_BYTES:]
        at = [byte * (len(stream) + 1) // 256 for byte in data[: HEADER_BYTES - 1]]
        check(stream, at, data[HEADER_BYTES - 1] if len(data) >= HEADER_BYTES else 0)

    options = [f"-dict={words}", "-max_len=2048", "-timeout=10", *rest]
    if all(each.startswith("-") for each in rest):
        options.append(str(corpus))
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
